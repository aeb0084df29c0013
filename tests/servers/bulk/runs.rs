//! `angler runs`: what there is, how far it is, and its end before its time.

use serde_json::{Value, json};

use super::World;
use crate::support::servers::Server;
use crate::support::{Broker, eventually};

/// The runs that are listed, by their ids.
fn listed(world: &World) -> Vec<Value> {
    let (code, out, log) = world.setup.run(&["runs", "list", "--json"]);
    assert_eq!(code, 0, "{log}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn shown(world: &World, run: &str) -> Value {
    let (code, out, log) = world.setup.run(&["runs", "show", run, "--json"]);
    assert_eq!(code, 0, "{log}");
    serde_json::from_str(&out).unwrap()
}

fn errors(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["error"]["code"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_listed_until_they_are_collected() {
    let world = World::new().await;
    assert_eq!(listed(&world), [] as [Value; 0], "before the first one");
    let (code, out, _) = world.setup.run(&["runs", "list"]);
    assert_eq!((code, out.as_str()), (0, "no run waits to be collected\n"));
    for (run, images) in [("one", 3), ("two", 2)] {
        let (code, _, log) = world.enqueue(&world.list(images), run, &["--per-job", "1"]);
        assert_eq!(code, 0, "{log}");
    }
    // The same again is no other run.
    assert_eq!(world.enqueue(&world.list(3), "one", &["--per-job", "1"]).0, 0);
    let runs = listed(&world);
    let ids: Vec<&Value> = runs.iter().map(|run| &run["run"]).collect();
    assert_eq!(ids, ["two", "one"], "the latest first");
    let one = &runs[1];
    for (key, value) in [
        ("jobs", json!(3)),
        ("images", json!(3)),
        ("sent", json!(3)),
        ("results", json!(0)),
        ("classes", json!("colours@1")),
        ("queue", json!("angler.jobs")),
        ("is_cancelled", json!(false)),
    ] {
        assert_eq!(one[key], value, "{key}: {one}");
    }
    let (_, table, _) = world.setup.run(&["runs", "list"]);
    assert!(table.contains("colours@1") && table.contains("3/3"), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");

    let mut jobs = world.client.consume("angler.jobs").await;
    for _ in 0..5 {
        let job = jobs.next().await;
        world.answer(&job).await;
    }
    world.until_ready(&world.results("one"), 3).await;
    let one = shown(&world, "one");
    assert_eq!((&one["results"], &one["dead"], &one["sent"]), (&json!(3), &json!([]), &json!(3)));
    assert_eq!(one["all_runs"]["queued"], json!(0));
    let (code, text, _) = world.setup.run(&["runs", "show", "one"]);
    assert!(code == 0 && text.contains("3 wait to be collected"), "{text}");

    assert_eq!(world.collect("one", "one.jsonl", &[]).0, 0);
    let ids: Vec<Value> = listed(&world).iter().map(|run| run["run"].clone()).collect();
    assert_eq!(ids, ["two"]);
    // What was collected is off the list for good.
    assert_eq!(world.ready("angler.runs").await, Some(1));
    for command in [["runs", "show", "one"], ["runs", "cancel", "one"]] {
        let (code, _, log) = world.setup.run(&command);
        assert!(code == 1 && log.contains("there is no run one"), "{log}");
    }
    let (code, _, log) = world.setup.run(&["runs", "show", "a b"]);
    assert!(code == 2 && log.contains("cannot be a run's id"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_is_dropped_by_workers_and_ends_with_what_there_is() {
    let world = World::new().await;
    let (code, _, log) = world.enqueue(&world.list(300), "wrong", &["--per-job", "1"]);
    assert_eq!(code, 0, "{log}");
    // Another one, whose jobs are behind it in the same queue, is none of its business.
    assert_eq!(world.enqueue(&world.list(2), "right", &["--per-job", "1"]).0, 0);
    let (code, told, log) = world.setup.run(&["runs", "cancel", "wrong"]);
    assert!(code == 0 && told.contains("300 of its 300 jobs had been sent"), "{told} {log}");
    assert!(told.contains("angler collect --run wrong"), "{told}");
    let runs = listed(&world);
    let cancelled: Vec<(&str, bool)> = runs
        .iter()
        .map(|run| (run["run"].as_str().unwrap(), run["is_cancelled"] == true))
        .collect();
    assert_eq!(cancelled, [("right", false), ("wrong", true)]);

    let worker = world.setup.start().await;
    let (code, _, log) = world.collect("wrong", "wrong.jsonl", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("it was cancelled when 300 of its 300 jobs had been sent"), "{log}");
    assert!(log.contains("failed jobs   cancelled 300"), "{log}");
    let rows = super::lines(&world.path("wrong.jsonl"));
    assert_eq!(errors(&rows), vec!["cancelled"; 300]);
    // Said once, and nothing is left of it but its name in no list.
    assert_eq!(worker.log().matches("cancelled").count(), 1, "{}", worker.log());
    assert_eq!(world.queues("wrong"), [] as [String; 0]);
    assert_eq!(world.ready("angler.dead").await, Some(0));
    let (code, _, log) = world.collect("right", "right.jsonl", &[]);
    assert_eq!(code, 0, "{log}");
    assert!(!log.contains("cancelled"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_the_sending_too() {
    let world = World::new().await;
    let list = world.list(60);
    let sending = ["enqueue", &list, "--classes", "colours@1", "--run", "half"];
    let out = world.path("half.csv");
    let more = ["--per-job", "1", "--max-queued", "10", "--wait", "--out", out.to_str().unwrap()];
    let mut running = world.spawn(&[&sending[..], &more].concat());
    world.until_ready("angler.jobs", 10).await;
    assert_eq!(world.setup.run(&["runs", "cancel", "half"]).0, 0);
    let _worker = world.setup.start().await;
    let status = eventually("the command ends", async || running.0.try_wait().unwrap()).await;
    assert_eq!(status.code(), Some(1));
    let csv = std::fs::read_to_string(&out).unwrap();
    let rows: Vec<&str> = csv.lines().skip(1).collect();
    assert_eq!(rows.len(), 10, "{csv}");
    assert!(rows.iter().all(|row| row.contains(",cancelled,")), "{csv}");
    assert_eq!(listed(&world), [] as [Value; 0]);
}

/// Stops what serves a quorum queue, which the broker then has and cannot read. RabbitMQ 3.10 comes back
/// like that if it is killed within a second after the queue was declared.
fn lose(server: &Server, vhost: &str, queue: &str) {
    let process = format!("list_to_existing_atom(\"{vhost}_{queue}\")");
    let stop = format!("ok = ra:stop_server(quorum_queues, {{{process}, node()}}).");
    server.ctl(&["eval", &stop]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_the_broker_lost_says_so_and_its_id_can_be_freed() {
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server)).await;
    let (list, more) = (world.list(2), ["--per-job", "1", "--patience", "1"]);
    for run in ["good", "lost"] {
        assert_eq!(world.enqueue(&list, run, &more).0, 0);
    }
    let before = world.results("lost");
    lose(&server, &world.broker.vhost, "angler.run.lost@mark");
    let free = "`angler runs cancel --delete lost` frees the run's id";
    for command in ["show", "cancel"] {
        let (code, _, log) = world.setup.run(&["runs", command, "lost"]);
        assert!(code == 1 && log.contains(free), "{log}");
    }
    let (code, _, log) = world.collect("lost", "lost.jsonl", &[]);
    assert!(code == 1 && log.contains(free), "{log}");
    let (code, _, log) = world.enqueue(&list, "lost", &more);
    assert!(code == 1 && log.contains(free), "{log}");
    let unknown: Vec<Value> = listed(&world).iter().map(|run| run["unknown"].clone()).collect();
    assert!(unknown[0].as_str().unwrap().contains(free) && unknown[1].is_null(), "{unknown:?}");

    // Its results can be gone as well.
    lose(&server, &world.broker.vhost, &before);
    let (code, told, log) = world.setup.run(&["runs", "cancel", "--delete", "lost"]);
    assert!(code == 0 && told.contains("run lost is deleted"), "{told}{log}");
    assert_eq!(world.queues("lost"), [format!("{before}.cancelled")]);
    assert_eq!(listed(&world).len(), 1);
    let (code, _, log) = world.setup.run(&["runs", "cancel", "--delete", "lost"]);
    assert!(code == 1 && log.contains("there is no run lost"), "{log}");
    assert_eq!(world.enqueue(&list, "lost", &more).0, 0);
    let _worker = world.setup.start().await;
    for run in ["good", "lost"] {
        let (code, _, log) = world.collect(run, &format!("{run}.jsonl"), &[]);
        assert_eq!(code, 0, "{log}");
        assert!(!log.contains("cancelled"), "{log}");
    }
}
