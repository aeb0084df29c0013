//! What can go wrong while a run is sent: no job is lost, and none is said to be sent that is not.

use std::collections::BTreeSet;
use std::process::Stdio;

use lapin::options::{BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use angler_amqp::run_queues::IdQueues;
use angler_amqp::{AmqpOptions, connect};
use angler_runs::mark;

use super::{Running, World};
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Broker, Received, Results, eventually};

/// A policy of the test's own virtual host.
fn policy(world: &World, name: &str, pattern: &str, definition: &Value) {
    let path = format!("policies/{}/{name}", world.broker.vhost);
    let policy = json!({"pattern": pattern, "apply-to": "queues", "definition": definition});
    world.broker.manage("PUT", &path, Some(&policy.to_string()));
}

fn no_policy(world: &World, name: &str) {
    world.broker.manage("DELETE", &format!("policies/{}/{name}", world.broker.vhost), None);
}

/// Waits until the policies that a queue keeps to are these.
async fn until_policy(world: &World, queue: &str, name: &Value) {
    eventually(&format!("{queue} has policy {name}"), async || {
        (world.broker.queue(queue).get("policy").unwrap_or(&Value::Null) == name).then_some(())
    })
    .await;
}

/// Takes jobs until every one of the run's was seen.
async fn take_all(jobs: &mut Results, count: u64) -> Vec<Received> {
    let (mut indices, mut all) = (BTreeSet::new(), Vec::new());
    while (indices.len() as u64) < count {
        let job = jobs.next().await;
        indices.insert(job.body["run"]["index"].as_u64().unwrap());
        all.push(job);
    }
    assert_eq!(indices.last(), Some(&(count - 1)));
    all
}

/// A command whose standard error goes to a file.
fn spawn_logged(world: &World, arguments: &[&str], log: &str) -> Running {
    let file = std::fs::File::create(world.path(log)).unwrap();
    let mut command = world.setup.command(arguments);
    Running(command.stdout(Stdio::null()).stderr(file).spawn().unwrap())
}

fn log(world: &World, name: &str) -> String {
    std::fs::read_to_string(world.path(name)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_stays_full_is_an_error_and_what_it_refused_is_sent_later() {
    const JOBS: u64 = 600;
    let world = World::new().await;
    // Declares the queues.
    assert_eq!(world.enqueue(&world.list(1), "first", &[]).0, 0);
    world.client.get("angler.jobs").await.unwrap();
    let bounded = json!({"max-length": 50, "overflow": "reject-publish"});
    policy(&world, "bounded", "^angler\\.jobs$", &bounded);
    until_policy(&world, "angler.jobs", &json!("bounded")).await;
    let list = world.list(600);
    let more = ["--per-job", "1", "--patience", "2"];
    let (code, _, log) = world.enqueue(&list, "full", &more);
    let queued = u64::from(world.ready("angler.jobs").await.unwrap());
    assert!(code == 1 && (50..JOBS).contains(&queued), "{queued}: {log}");
    let unsent = JOBS - queued;
    assert!(log.contains(&format!("{unsent} of {JOBS} jobs of run full were not sent")), "{log}");
    assert!(log.contains("queue angler.jobs has refused jobs for 2 s"), "{log}");
    assert!(log.contains("the same command with --run full continues"), "{log}");
    // A consumer makes room, and the same command sends the rest.
    let (list, setup) = (list.clone(), world.setup.clone());
    let sending = tokio::task::spawn_blocking(move || {
        let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "full"];
        setup.run(&[&arguments[..], &["--per-job", "1"]].concat())
    });
    let mut jobs = world.client.consume("angler.jobs").await;
    take_all(&mut jobs, JOBS).await;
    let (code, _, log) = sending.await.unwrap();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("600 images in 600 jobs"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_rights_on_the_runs_queues_is_told_at_once_which_one_is_missing() {
    let world = World::new().await;
    let allow = |configure: &str| {
        let rights = json!({"configure": configure, "write": ".*", "read": ".*"}).to_string();
        let path = format!("permissions/{}/guest", world.broker.vhost);
        world.broker.manage("PUT", &path, Some(&rights));
    };
    assert_eq!(world.enqueue(&world.list(1), "before", &[]).0, 0);
    allow(r"^angler\.(jobs|results|dead|control|suspects|undeliverable|retry\..*)$");
    let told = |(code, _, log): (i32, String, String), run: &str| {
        assert_eq!(code, 1, "{log}");
        assert!(log.contains(&format!("angler.run.{run}@")), "{log}");
        assert!(log.contains("configure, write and read on ^angler\\.run"), "{log}");
        assert!(!log.contains("reconnecting"), "{log}");
        log
    };
    let log = told(world.enqueue(&world.list(3), "new", &["--per-job", "1"]), "new");
    assert!(log.contains("3 of 3 jobs of run new were not sent"), "{log}");
    told(world.collect("before", "before.csv", &[]), "before");
    // Of the workers' queues as well.
    world.broker.manage("DELETE", &format!("queues/{}/angler.jobs", world.broker.vhost), None);
    allow("^$");
    let (code, _, log) = world.enqueue(&world.list(3), "new", &["--per-job", "1"]);
    assert!(code == 1 && !log.contains("reconnecting"), "{log}");
    assert!(log.contains("there is no angler.jobs"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_deleted_in_between_is_an_error() {
    let world = World::new().await;
    let list = world.list(400);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "cut", "--per-job", "1"];
    let mut sending =
        spawn_logged(&world, &[&arguments[..], &["--max-queued", "100"]].concat(), "log");
    world.until_ready("angler.jobs", 100).await;
    let client = world.broker.connect().await;
    let delete = client.channel.queue_delete("angler.jobs".into(), QueueDeleteOptions::default());
    assert_eq!(delete.await.unwrap(), 100);
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    let log = log(&world, "log");
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("300 of 400 jobs of run cut were not sent"), "{log}");
    assert!(log.contains("queue angler.jobs was deleted"), "{log}");
    // What was not sent is sent by the same command.
    let (code, _, log) = world.enqueue(&list, "cut", &["--per-job", "1"]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(world.ready("angler.jobs").await, Some(300), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_there_and_gets_nothing_is_waited_for() {
    let server = Server::rabbitmq("");
    let mut world = World::of(Broker::of(&server)).await;
    let proxy = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&proxy.address(), 0);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    // So that it still sends when the queue is hidden: a job has some 400 bytes.
    proxy.fault(Fault { bytes_per_second: Some(50_000), ..Fault::default() });
    let (list, vhost) = (world.list(2000), world.broker.vhost.clone());
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "hid", "--per-job", "1"];
    let mut sending = spawn_logged(&world, &arguments, "log");
    world.until_ready("angler.jobs", 50).await;
    if !server.hide(&vhost, "angler.jobs") {
        return;
    }
    eventually("the command tries again", async || {
        log(&world, "log").contains("reconnecting to the broker").then_some(())
    })
    .await;
    server.show(&vhost, "angler.jobs");
    proxy.heal();
    let mut jobs = world.client.consume("angler.jobs").await;
    take_all(&mut jobs, 2000).await;
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert!(status.success(), "{}", log(&world, "log"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_a_lost_connection_may_have_is_waited_for() {
    let mut world = World::new().await;
    let proxy = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&proxy.address(), 0);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    world.setup.set("log.level", "info,angler_amqp=debug");
    // A broker in a minority hands a turn to a connection and cannot say so, nor take it back.
    let other = world.broker.connect().await;
    let turn = IdQueues::new("angler.jobs", "turn").sender;
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    other.channel.queue_declare(turn.into(), exclusive, FieldTable::default()).await.unwrap();
    let list = world.list(2);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "turn", "--per-job", "1"];
    let mut sending = spawn_logged(&world, &arguments, "log");
    eventually("it waits for the turn", async || {
        log(&world, "log").contains("waiting for the turn").then_some(())
    })
    .await;
    proxy.cut();
    eventually("it tries a third time", async || {
        assert_eq!(sending.0.try_wait().unwrap(), None, "{}", log(&world, "log"));
        (proxy.accepted() >= 3).then_some(())
    })
    .await;
    other.close().await;
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert!(status.success(), "{}", log(&world, "log"));
    assert_eq!(world.ready("angler.jobs").await, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_sends_a_run_and_the_next_continues_when_that_is_killed() {
    const JOBS: u64 = 500;
    let world = World::new().await;
    let list = world.list(500);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "one", "--per-job", "1"];
    let first = world.spawn(&[&arguments[..], &["--max-queued", "300"]].concat());
    world.until_ready("angler.jobs", 300).await;
    let pid = first.0.id();
    let (code, _, log) = world.setup.run(&arguments);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains(&format!("run one is being sent by process {pid} on ")), "{log}");
    assert_eq!(world.ready("angler.jobs").await, Some(300));
    // With images that are others it is no less taken.
    let (code, _, log) = world.enqueue(&world.list(3), "one", &[]);
    assert!(code == 1 && log.contains("is being sent by process"), "{log}");
    first.kill();
    let (code, _, log) = world.setup.run(&arguments);
    assert_eq!(code, 0, "{log}");
    let mut jobs = world.client.consume("angler.jobs").await;
    let taken = take_all(&mut jobs, JOBS).await;
    // One run, although two processes sent it.
    let nonces: BTreeSet<&str> =
        taken.iter().map(|job| job.body["run"]["nonce"].as_str().unwrap()).collect();
    assert_eq!(nonces.len(), 1, "{nonces:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_costs_no_job() {
    const JOBS: u64 = 3000;
    let mut world = World::new().await;
    let proxy = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&proxy.address(), 10);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let list = world.list(3000);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "lost", "--per-job", "1"];
    let mut sending =
        spawn_logged(&world, &[&arguments[..], &["--max-queued", "100"]].concat(), "log");
    world.until_ready("angler.jobs", 100).await;
    let mut jobs = world.client.consume("angler.jobs").await;
    let mut indices = BTreeSet::new();
    for cut in 1..=3 {
        while indices.len() < cut * 500 {
            indices.insert(jobs.next().await.body["run"]["index"].as_u64().unwrap());
        }
        proxy.cut();
    }
    while (indices.len() as u64) < JOBS {
        indices.insert(jobs.next().await.body["run"]["index"].as_u64().unwrap());
    }
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    let log = log(&world, "log");
    // One that reads the list of runs, the first that sends, and three after it.
    assert_eq!((status.code(), proxy.accepted()), (Some(0), 5), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_mark_never_find_nothing_while_it_is_written() {
    let world = World::new().await;
    let list = world.list(2000);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "read", "--per-job", "1"];
    let mut sending = world.spawn(&[&arguments[..], &["--max-queued", "20"]].concat());
    world.until_ready("angler.jobs", 20).await;
    let drained = tokio::spawn({
        let client = world.broker.connect().await;
        async move {
            let mut jobs = client.consume("angler.jobs").await;
            take_all(&mut jobs, 2000).await;
        }
    });
    let options = AmqpOptions {
        url: world.broker.url.clone(),
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        name: "reader".into(),
    };
    let names = IdQueues::new("angler.jobs", "read");
    let readers = (0..4).map(|_| {
        let (options, names) = (options.clone(), names.clone());
        tokio::spawn(async move {
            let connection = connect(&options, "test").await.unwrap();
            let mut last = 0;
            for _ in 0..50 {
                let mark = mark::read(&connection, &names).await.unwrap().expect("nothing");
                assert_eq!(mark.jobs, 2000);
                assert!(mark.sent >= last, "{} after {last}", mark.sent);
                last = mark.sent;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    drained.await.unwrap();
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert_eq!(status.code(), Some(0));
    // What readers held when the last ones were written is left over.
    let marks = world.ready(&names.mark).await.unwrap();
    assert!((1..20).contains(&marks), "{marks} marks");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_cannot_be_read_is_unknown_and_hides_no_other_run() {
    let world = World::new().await;
    for run in ["held", "good"] {
        assert_eq!(world.enqueue(&world.list(2), run, &["--per-job", "1"]).0, 0);
    }
    // As by a reader that takes no turn.
    let client = world.broker.connect().await;
    let mark = IdQueues::new("angler.jobs", "held").mark;
    let held = client.channel.basic_get(mark.as_str().into(), BasicGetOptions::default()).await;
    assert!(held.unwrap().is_some());
    let (code, out, log) = world.setup.run(&["runs", "list", "--json"]);
    assert_eq!(code, 0, "{log}");
    let runs: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&runs[0]["run"], &runs[0]["sent"]), (&json!("good"), &json!(2)));
    assert_eq!((&runs[1]["run"], runs[1].get("sent")), (&json!("held"), None));
    assert!(runs[1]["unknown"].as_str().unwrap().contains("held@mark is empty"), "{}", runs[1]);
    let (code, out, log) = world.setup.run(&["runs", "list"]);
    assert!(code == 0 && out.contains("unknown") && out.contains("?/2"), "{out}{log}");
    let (code, _, log) = world.setup.run(&["runs", "show", "held"]);
    assert!(code == 1 && log.contains("try again"), "{log}");
    client.close().await;
    let (code, _, log) = world.setup.run(&["runs", "show", "held"]);
    assert_eq!(code, 0, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_listing_is_refused_is_listed_later_and_sent_then() {
    let world = World::new().await;
    assert_eq!(world.enqueue(&world.list(1), "one", &[]).0, 0);
    let full = json!({"max-length": 1, "overflow": "reject-publish"});
    policy(&world, "full", "^angler\\.runs$", &full);
    until_policy(&world, "angler.runs", &json!("full")).await;
    // The list may take one message beyond its length.
    let listed = |world: &World| {
        let (code, out, log) = world.setup.run(&["runs", "list", "--json"]);
        assert_eq!(code, 0, "{log}");
        out.lines().count()
    };
    let (list, mut runs) = (world.list(2), 1);
    let last = loop {
        let run = format!("run-{runs}");
        let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", &run];
        let mut sending = spawn_logged(&world, &arguments, "log");
        let ended = eventually("it is sent or refused", async || {
            let refused = log(&world, "log").contains("the broker refused the list of runs");
            sending.0.try_wait().unwrap().map(Some).or(refused.then_some(None))
        })
        .await;
        match ended {
            Some(status) => assert!(status.success(), "{}", log(&world, "log")),
            None => break sending,
        }
        runs += 1;
        assert!(runs < 5, "the list is never full");
    };
    let mut sending = last;
    assert_eq!(listed(&world), runs);
    no_policy(&world, "full");
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert!(status.success(), "{}", log(&world, "log"));
    assert_eq!(listed(&world), runs + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_was_killed_before_its_first_mark_leaves_the_id_usable() {
    let world = World::new().await;
    let mark = IdQueues::new("angler.jobs", "begun").mark;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000_000));
    let durable = QueueDeclareOptions::durable();
    world.client.channel.queue_declare(mark.into(), durable, arguments).await.unwrap();
    let (code, _, log) = world.setup.run(&["runs", "cancel", "begun"]);
    assert!(code == 1 && log.contains("begun@mark is empty; try again"), "{log}");
    let (code, _, log) = world.enqueue(&world.list(2), "begun", &["--per-job", "1"]);
    assert_eq!((code, world.ready("angler.jobs").await), (0, Some(2)), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_is_waited_for_and_runs_can_be_looked_at_meanwhile() {
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server)).await;
    let list = world.list(200);
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "slow", "--per-job", "1"];
    let mut sending =
        spawn_logged(&world, &[&arguments[..], &["--max-queued", "50"]].concat(), "log");
    world.until_ready("angler.jobs", 50).await;
    server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    let mut jobs = world.client.consume("angler.jobs").await;
    for _ in 0..50 {
        jobs.next().await;
    }
    let (code, out, log) = world.setup.run(&["runs", "show", "slow", "--json"]);
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &shown["jobs"], &shown["is_cancelled"]),
        (0, &json!(200), &json!(false)),
        "{log}"
    );
    server.ctl(&["set_vm_memory_high_watermark", "0.6"]);
    let mut indices = BTreeSet::new();
    while indices.len() < 150 {
        indices.insert(jobs.next().await.body["run"]["index"].as_u64().unwrap());
    }
    let status = eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert!(status.success(), "{}", self::log(&world, "log"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_end_in_words_of_ours_are_ids_like_others() {
    let world = World::new().await;
    let list = world.list(2);
    for run in ["x", "x.cancelled", "x.sent", "x/1"] {
        let (code, _, log) = world.enqueue(&list, run, &["--per-job", "1"]);
        assert_eq!(code, 0, "{log}");
    }
    let (code, out, _) = world.setup.run(&["runs", "list", "--json"]);
    assert_eq!(code, 0);
    let runs: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(runs.len(), 4, "{out}");
    assert!(runs.iter().all(|run| run["is_cancelled"] == false && run["sent"] == 2), "{out}");
    // Cancelled is only the one that was.
    assert_eq!(world.setup.run(&["runs", "cancel", "x"]).0, 0);
    let _worker = world.setup.start().await;
    for (run, code) in [("x", 1), ("x.cancelled", 0)] {
        let out = format!("{}.jsonl", run.replace('.', "-"));
        assert_eq!(world.collect(run, &out, &[]).0, code);
        let rows = super::lines(&world.path(&out));
        let cancelled = rows.iter().filter(|row| row["error"]["code"] == "cancelled").count();
        assert_eq!((rows.len(), cancelled), (2, if run == "x" { 2 } else { 0 }), "{rows:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_an_older_run_with_the_same_id_has_no_part_in_the_new_one() {
    let world = World::new().await;
    let list = world.list(2);
    assert_eq!(world.enqueue(&list, "again", &["--per-job", "1"]).0, 0);
    let mut jobs = world.client.consume("angler.jobs").await;
    let old = take_all(&mut jobs, 2).await;
    let old_results = world.results("again");
    for job in &old {
        world.answer(job).await;
    }
    assert_eq!(world.collect("again", "old.jsonl", &[]).0, 0);
    let told = "the last run with this id was collected or deleted; beginning it again";
    // The id is free, for the same images too.
    let (code, _, log) = world.enqueue(&list, "again", &["--per-job", "1"]);
    assert!(code == 0 && log.contains(told), "{log}");
    let (code, _, log) = world.enqueue(&list, "another", &["--per-job", "1"]);
    assert!(code == 0 && !log.contains(told), "{log}");
    let new = take_all(&mut jobs, 2).await;
    assert_ne!(world.results("again"), old_results);
    assert_ne!(old[0].body["run"]["nonce"], new[0].body["run"]["nonce"]);
    assert_ne!(old[0].properties.reply_to(), new[0].properties.reply_to());
    // Jobs of the old run that come late have nowhere to answer.
    assert_eq!(world.ready(&old_results).await, None);
    assert_eq!(world.ready(&world.results("again")).await, Some(0));
    // Cancelling the new run is not cancelling the old one, and the other way round.
    let cancelled = |job: &Received| {
        format!("{}.cancelled", job.properties.reply_to().as_ref().unwrap().as_str())
    };
    assert_eq!(world.setup.run(&["runs", "cancel", "again"]).0, 0);
    assert_eq!(world.ready(&cancelled(&new[0])).await, Some(0));
    assert_eq!(world.ready(&cancelled(&old[0])).await, None);
}
