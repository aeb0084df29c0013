//! `angler collect` next to other collectors, after kills and damage, and with results that come twice.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Stdio;

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use super::{Running, World, lines, persistent};
use crate::support::servers::Server;
use crate::support::{Broker, Received, eventually};

impl World {
    /// Enqueues a run of `jobs` jobs, an image each, and takes them as a worker would.
    async fn begin(&self, run: &str, jobs: usize) -> Vec<Received> {
        let (code, _, log) = self.enqueue(&self.list(jobs), run, &["--per-job", "1"]);
        assert_eq!(code, 0, "{log}");
        self.take(jobs).await
    }

    /// Takes the next jobs from their queue.
    async fn take(&self, jobs: usize) -> Vec<Received> {
        let client = self.broker.connect().await;
        let mut queue = client.consume("angler.jobs").await;
        let mut taken = Vec::new();
        for _ in 0..jobs {
            taken.push(queue.next().await);
        }
        client.close().await;
        taken
    }

    async fn answer_all(&self, jobs: &[Received]) {
        for job in jobs {
            self.answer(job).await;
        }
    }

    /// Answers a job as a worker that gave it up.
    async fn fail(&self, job: &Received) {
        let result = json!({
            "id": job.body["id"], "status": "failed", "run": job.body["run"], "attempt": 5,
            "error": {"code": "retries_exhausted", "message": "the store is down"},
            "worker": "test", "finished_at": "2026-01-31T12:00:00.000Z",
        });
        let to = results_queue(job);
        self.client.publish(&to, result.to_string().as_bytes(), persistent()).await;
    }

    /// Where `collect` keeps the results of a run until it is complete.
    fn journal(&self, out: &str, run: &str) -> PathBuf {
        self.path(&format!(".{out}@{}.results", run.replace('/', "%")))
    }

    /// Waits until a journal keeps `results` results.
    async fn until_kept(&self, journal: &PathBuf, results: usize) {
        eventually(&format!("{results} results in {}", journal.display()), async || {
            let text = std::fs::read_to_string(journal).ok()?;
            (text.lines().count() > results).then_some(())
        })
        .await;
    }

    /// Collects into `out`, and checks that it holds each of `images` images once.
    fn collect_all(&self, run: &str, out: &str, images: usize) -> Vec<Value> {
        let (code, _, log) = self.collect(run, out, &[]);
        assert_eq!(code, 0, "{log}");
        assert!(!self.journal(out, run).exists());
        each_once(lines(&self.path(out)), images)
    }

    /// Deletes a run's queues behind everybody's back.
    fn lose(&self, jobs: &[Received]) {
        let results = results_queue(&jobs[0]);
        let mark = format!("{}@mark", results.rsplit_once('@').unwrap().0);
        for queue in [results, mark] {
            let queue = queue.replace('@', "%40");
            self.broker.manage("DELETE", &format!("queues/{}/{queue}", self.broker.vhost), None);
        }
    }
}

fn results_queue(job: &Received) -> String {
    job.properties.reply_to().as_ref().unwrap().to_string()
}

fn each_once(rows: Vec<Value>, images: usize) -> Vec<Value> {
    let uris: BTreeSet<String> = rows.iter().map(|row| row["uri"].to_string()).collect();
    assert_eq!((rows.len(), uris.len()), (images, images));
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_command_that_collects_a_run_is_refused_and_loses_nothing() {
    let world = World::new().await;
    let jobs = world.begin("two", 600).await;
    world.answer_all(&jobs[..500]).await;
    let out = world.path("a.jsonl");
    let mut first = world.spawn(&["collect", "--run", "two", "--out", out.to_str().unwrap()]);
    let journal = world.journal("a.jsonl", "two");
    world.until_kept(&journal, 500).await;
    let before = std::fs::read(&journal).unwrap();

    let (code, _, log) = world.collect("two", "a.jsonl", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("another process is collecting into this file"), "{log}");
    let (code, _, log) = world.collect("two", "b.jsonl", &["--partial"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("another command is collecting run two: let it finish"), "{log}");
    assert!(!world.path("b.jsonl").exists() && !world.journal("b.jsonl", "two").exists());
    assert_eq!(std::fs::read(&journal).unwrap(), before);

    world.answer_all(&jobs[500..]).await;
    let status = eventually("the first ends", async || first.0.try_wait().unwrap()).await;
    assert!(status.success(), "{status}");
    each_once(lines(&out), 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_another_journal_has_are_not_missed_in_silence() {
    let world = World::new().await;
    let jobs = world.begin("split", 4).await;
    world.answer_all(&jobs[..2]).await;
    let (code, _, log) = world.collect("split", "a.jsonl", &["--silence", "1"]);
    assert!(code == 1 && log.contains("2 of 4 jobs have no result"), "{log}");
    world.answer_all(&jobs[2..]).await;
    // As after the death of that command's machine.
    let (code, _, log) = world.collect("split", "b.jsonl", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("another command has taken results of run split"), "{log}");
    assert!(!world.path("b.jsonl").exists() && !world.journal("b.jsonl", "split").exists());
    let (code, _, log) = world.collect("split", "b.jsonl", &["--partial"]);
    assert!(code == 1 && log.contains("2 of 4 jobs have no result, numbers 0-1"), "{log}");
    assert_eq!(lines(&world.path("b.jsonl")).len(), 2);
    let (code, _, log) = world.setup.run(&["runs", "cancel", "split", "--delete"]);
    assert_eq!(code, 0, "{log}");
    let left = world.queues("split");
    assert!(left.len() == 1 && left[0].ends_with(".cancelled"), "{left:?}");
    // A run that was left alone is collected by the first that comes, and all queues go.
    let jobs = world.begin("whole", 2).await;
    world.answer_all(&jobs).await;
    world.collect_all("whole", "c.jsonl", 2);
    assert_eq!(world.queues("whole"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_commands_that_start_at_once_one_collects_all_of_a_run() {
    let world = World::new().await;
    let jobs = world.begin("rush", 600).await;
    world.answer_all(&jobs).await;
    let outs = ["a.jsonl", "b.jsonl", "a.jsonl", "c.jsonl"].map(|out| world.path(out));
    let mut running: Vec<_> = outs
        .iter()
        .map(|out| world.spawn(&["collect", "--run", "rush", "--out", out.to_str().unwrap()]))
        .collect();
    let mut good = 0;
    for command in &mut running {
        let status = eventually("it ends", async || command.0.try_wait().unwrap()).await;
        good += usize::from(status.success());
    }
    let written: Vec<_> = outs[..2].iter().chain(&outs[3..]).filter(|out| out.exists()).collect();
    assert_eq!((good, written.len()), (1, 1));
    each_once(lines(written[0]), 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_lost_its_turn_to_another_stops() {
    let world = World::new().await;
    let jobs = world.begin("lost", 3).await;
    world.answer_all(&jobs[..1]).await;
    let out = world.path("a.jsonl");
    let arguments = ["collect", "--run", "lost", "--out", out.to_str().unwrap(), "--silence", "5"];
    let mut command = world.setup.command(&arguments);
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let mut log = running.0.stderr.take().unwrap();
    world.until_kept(&world.journal("a.jsonl", "lost"), 1).await;
    // Its connection is cut, again and again, until somebody else was faster.
    let other = eventually("another has the turn", async || {
        for (connection, own) in world.broker.connections() {
            if own.starts_with("angler collect ") {
                world.broker.cut(&connection);
            }
        }
        let client = world.broker.connect().await;
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let name = "angler.run.lost@collector".into();
        let declared = client.channel.queue_declare(name, exclusive, FieldTable::default()).await;
        declared.ok().map(|_| client)
    })
    .await;
    world.answer_all(&jobs[1..]).await;
    let status = eventually("it stops", async || running.0.try_wait().unwrap()).await;
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("another command is collecting run lost: let it finish"), "{text}");
    assert_eq!(world.ready(&results_queue(&jobs[0])).await, Some(2));
    other.close().await;
    world.collect_all("lost", "a.jsonl", 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_journal_is_not_cut() {
    let world = World::new().await;
    let jobs = world.begin("torn", 4).await;
    world.answer_all(&jobs[..2]).await;
    assert_eq!(world.collect("torn", "t.jsonl", &["--silence", "1"]).0, 1);
    let journal = world.journal("t.jsonl", "torn");
    let append = |text: &str| {
        let file = std::fs::OpenOptions::new().append(true).open(&journal);
        file.unwrap().write_all(text.as_bytes()).unwrap();
    };
    // As a kill in the middle of a line leaves it.
    append("{\"id\":\"torn/3\",\"sta");
    world.answer_all(&jobs[2..3]).await;
    assert_eq!(world.collect("torn", "t.jsonl", &["--silence", "1"]).0, 1);
    let good = std::fs::read_to_string(&journal).unwrap();
    assert_eq!(good.lines().count(), 4, "{good}");

    // As a broken disk does.
    let lines: Vec<&str> = good.lines().collect();
    let damaged = format!("{}\n{}\n\0\0\n{}\n{}\n", lines[0], lines[1], lines[2], lines[3]);
    std::fs::write(&journal, &damaged).unwrap();
    world.answer_all(&jobs[3..]).await;
    for more in [&[][..], &["--partial"]] {
        let (code, _, log) = world.collect("torn", "t.jsonl", more);
        assert_eq!(code, 1, "{log}");
        let place = format!("line 3 of {} is no result of run torn", journal.display());
        assert!(log.contains(&place), "{log}");
        assert_eq!(std::fs::read_to_string(&journal).unwrap(), damaged);
    }
    std::fs::write(&journal, &good).unwrap();
    world.collect_all("torn", "t.jsonl", 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_with_similar_names_have_their_own_journals() {
    let world = World::new().await;
    let one = world.begin("a/b", 2).await;
    let two = world.begin("a_b", 2).await;
    world.answer_all(&one[..1]).await;
    assert_eq!(world.collect("a/b", "x.jsonl", &["--silence", "1"]).0, 1);
    world.answer_all(&two).await;
    world.collect_all("a_b", "x.jsonl", 2);
    world.answer_all(&one[1..]).await;
    world.collect_all("a/b", "x.jsonl", 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_run_of_the_same_id_is_told_from_a_later_one() {
    let world = World::new().await;
    let old = world.begin("nightly", 2).await;
    world.answer_all(&old[..1]).await;
    assert_eq!(world.collect("nightly", "n.jsonl", &["--silence", "1"]).0, 1);
    let kept = std::fs::read(world.journal("n.jsonl", "nightly")).unwrap();
    world.lose(&old);

    let new = world.begin("nightly", 2).await;
    assert_ne!(results_queue(&old[0]), results_queue(&new[0]));
    let (code, _, log) = world.collect("nightly", "n.jsonl", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("keeps results of an earlier run nightly"), "{log}");
    assert_eq!(std::fs::read(world.journal("n.jsonl", "nightly")).unwrap(), kept);

    // A late result of the earlier run, even if it finds its way into this run's queue.
    let late = Received {
        properties: old[1].properties.clone().with_reply_to(results_queue(&new[0]).as_str().into()),
        ..old[1].clone()
    };
    world.answer(&late).await;
    let (code, _, log) = world.collect("nightly", "new.jsonl", &["--silence", "1"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("dropped a message that is no result of this run"), "{log}");
    assert!(log.contains("2 of 2 jobs have no result"), "{log}");
    world.answer_all(&new).await;
    world.collect_all("nightly", "new.jsonl", 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_run_is_written_and_the_rest_later() {
    let world = World::new().await;
    let jobs = world.begin("part", 10).await;
    let (code, _, log) = world.collect("part", "part.jsonl", &["--partial"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("10 of 10 jobs have no result, numbers 0-9"), "{log}");
    assert!(!world.path("part.jsonl").exists());
    for job in &jobs {
        match job.body["run"]["index"].as_u64().unwrap() {
            2 | 3 | 7 => {}
            _ => world.answer(job).await,
        }
    }
    let (code, told, log) = world.collect("part", "part.jsonl", &["--partial", "--json"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("3 of 10 jobs have no result, numbers 2-3, 7"), "{log}");
    assert!(log.contains("angler collect --run part` with the same --out"), "{log}");
    let summary: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&summary["complete"], &summary["missing_jobs"]), (&json!(false), &json!(3)));
    each_once(lines(&world.path("part.jsonl")), 7);
    world.answer_all(&[jobs[2].clone(), jobs[3].clone()]).await;
    let (code, _, log) = world.collect("part", "part.jsonl", &["--partial"]);
    assert_eq!(code, 1, "{log}");
    each_once(lines(&world.path("part.jsonl")), 9);
    // Nothing is missing: then it is as without the flag.
    world.answer(&jobs[7]).await;
    let (code, _, log) = world.collect("part", "part.jsonl", &["--partial"]);
    assert_eq!(code, 0, "{log}");
    each_once(lines(&world.path("part.jsonl")), 10);
    assert!(!world.journal("part.jsonl", "part").exists());
    assert_eq!(world.ready(&results_queue(&jobs[0])).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_queues_are_gone_is_written_as_far_as_it_was_collected() {
    let world = World::new().await;
    let jobs = world.begin("gone", 3).await;
    world.answer_all(&jobs[..2]).await;
    assert_eq!(world.collect("gone", "g.jsonl", &["--silence", "1"]).0, 1);
    world.lose(&jobs);
    let (code, _, log) = world.collect("gone", "g.jsonl", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("there is no run gone"), "{log}");
    assert!(log.contains("keeps the results of 2 jobs; --partial writes them"), "{log}");
    let (code, _, log) = world.collect("gone", "g.jsonl", &["--partial"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("1 of 3 jobs have no result, numbers 2"), "{log}");
    each_once(lines(&world.path("g.jsonl")), 2);
    assert!(world.journal("g.jsonl", "gone").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_jobs_good_result_replaces_its_failed_one() {
    let world = World::new().await;
    let jobs = world.begin("mended", 3).await;
    world.answer(&jobs[0]).await;
    world.fail(&jobs[1]).await;
    let letter = json!(jobs[1].body).to_string();
    let headers = [("angler-reason", "retries_exhausted"), ("angler-jobs-queue", "angler.jobs")];
    let mut table = FieldTable::default();
    for (key, value) in headers {
        table.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    let properties = jobs[1].properties.clone().with_headers(table);
    world.client.publish("angler.dead", letter.as_bytes(), properties).await;
    let (code, _, log) = world.collect("mended", "m.jsonl", &["--silence", "1"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("failed jobs   retries_exhausted 1"), "{log}");

    let (code, told, log) = world.setup.run(&["dead", "redrive", "--run", "mended"]);
    assert!(code == 0 && told.contains("1 dead letter"), "{told} {log}");
    let again = world.take(1).await;
    world.answer(&again[0]).await;
    world.fail(&jobs[1]).await; // A late duplicate, as of a worker that was cut off.
    world.answer(&jobs[2]).await;
    let (code, told, log) = world.collect("mended", "m.jsonl", &["--json"]);
    assert_eq!(code, 0, "{log}");
    let summary: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&summary["failed_jobs"], &summary["images"]), (&json!({}), &json!(3)));
    let rows = each_once(lines(&world.path("m.jsonl")), 3);
    assert!(rows.iter().all(|row| row["label"] == "red"), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_result_behind_the_last_one_counts_too() {
    let world = World::new().await;
    let jobs = world.begin("behind", 200).await;
    for job in &jobs {
        world.fail(job).await;
    }
    world.answer_all(&jobs).await;
    let rows = world.collect_all("behind", "b.jsonl", 200);
    assert!(rows.iter().all(|row| row["label"] == "red"), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_had_finished_is_complete_although_it_was_cancelled() {
    let world = World::new().await;
    let jobs = world.begin("late", 3).await;
    world.answer_all(&jobs[..2]).await;
    world.fail(&jobs[2]).await;
    assert_eq!(world.setup.run(&["runs", "cancel", "late"]).0, 0);
    let (code, told, log) = world.collect("late", "late.jsonl", &["--json"]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("run late had finished before it was cancelled"), "{log}");
    let summary: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&summary["complete"], &summary["missing_jobs"]), (&json!(true), &json!(0)));
    assert_eq!(lines(&world.path("late.jsonl")).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_collected_while_the_broker_blocks_publishers() {
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server)).await;
    let jobs = world.begin("alarm", 1500).await;
    world.answer_all(&jobs).await;
    server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    let is_alarmed = || world.broker.manage("GET", "nodes", None)[0]["mem_alarm"] == true;
    eventually("the alarm", async || is_alarmed().then_some(())).await;
    let (code, _, log) = world.collect("alarm", "a.jsonl", &["--silence", "20"]);
    // Waited for: a busy broker leaves it out of its statistics now and then.
    eventually("the alarm still holds", async || is_alarmed().then_some(())).await;
    assert_eq!(code, 0, "{log}");
    each_once(lines(&world.path("a.jsonl")), 1500);
}
