//! Several queues of jobs: their shares, and where what is given up or given back returns to.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use serde_json::{Value, json};

use super::{World, persistent};
use crate::support::{Bucket, eventually, tiny};

const LANES: &str = "angler.quick:8,angler.jobs";

/// Both queues, declared by a worker that has ended.
async fn world() -> (World, Bucket, Vec<String>) {
    let mut world = World::new().await;
    world.setup.set("amqp.jobs_queue", LANES);
    let bucket = Bucket::new().await;
    let images = tiny::images(&bucket).await;
    let mut worker = world.setup.start().await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
    (world, bucket, images)
}

async fn send(world: &World, queue: &str, id: &str, uris: &[String]) {
    let images: Vec<Value> = uris.iter().map(|uri| json!({"uri": uri})).collect();
    let job = json!({"id": id, "classes": "colours@1", "images": images});
    world.client.publish(queue, job.to_string().as_bytes(), classify()).await;
}

fn classify() -> BasicProperties {
    persistent().with_type("classify.v1".into()).with_content_type("application/json".into())
}

/// The ids of so many results, in the order in which they were published.
async fn results(world: &World, count: usize) -> Vec<String> {
    let mut results = world.client.consume("angler.results").await;
    let mut ids = Vec::new();
    for _ in 0..count {
        let result = results.next().await;
        assert_eq!(result.body["status"], "done", "{}", result.body);
        ids.push(result.body["id"].as_str().unwrap().to_owned());
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn each_queue_has_its_share_and_a_job_that_is_alone_is_the_next() {
    let (mut world, _bucket, images) = world().await;
    // Images are what there is too little room for, and jobs of both are always at hand.
    world.setup.set("amqp.prefetch", "50");
    world.setup.set("limits.images_in_flight", "3");
    world.setup.set("embedder.max_batch", "3");
    world.setup.set("classes.preload", "colours@1");
    let images: Vec<String> = images.iter().cycle().take(15).cloned().collect();
    let _worker = world.setup.start().await;
    for number in 0..90 {
        send(&world, "angler.jobs", &format!("long/{number}"), &images).await;
    }
    for number in 0..80 {
        send(&world, "angler.quick", &format!("quick/{number}"), &images).await;
    }
    let ids = results(&world, 170).await;
    let quick: Vec<usize> = (0..170).filter(|at| ids[*at].starts_with("quick")).collect();
    // Jobs of the long queue between the first and the last quick one: one for eight, and few more
    // while the first ones were still being sent.
    let between = quick[79] - quick[0] - 79;
    assert!((8..=20).contains(&between), "{between} between the quick ones: {ids:?}");
    assert!(quick[0] < 60, "the first quick one came after {} others: {ids:?}", quick[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_returns_to_its_own_queue() {
    let (world, _bucket, images) = world().await;
    world.client.publish("angler.quick", b"{\"id\": \"bad\"}", classify()).await;
    world.client.publish("angler.jobs", b"{\"id\": \"worse\"}", classify()).await;
    let mut worker = world.setup.start().await;
    world.until_ready("angler.dead", 2).await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
    let (code, out, log) = world.setup.run(&["dead", "redrive", "--all"]);
    assert_eq!(code, 0, "{log}");
    assert!(
        out.contains("2 dead letters of angler.dead sent to angler.quick, angler.jobs"),
        "{out}"
    );
    for (queue, id) in [("angler.quick", "bad"), ("angler.jobs", "worse")] {
        let job = world.client.get(queue).await.unwrap();
        assert_eq!(job.body["id"], id);
        assert_eq!(job.header("angler-jobs-queue"), None, "as it was before its first attempt");
        assert!(world.client.get(queue).await.is_none());
    }
    // What a worker has taken and not begun goes back where it was.
    for number in 0..40 {
        let queue = if number % 2 == 0 { "angler.quick" } else { "angler.jobs" };
        send(&world, queue, &format!("{queue}/{number}"), &images).await;
    }
    let mut worker = world.setup.start().await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
    let mut left: BTreeMap<String, usize> = BTreeMap::new();
    for queue in ["angler.quick", "angler.jobs", "angler.results"] {
        while let Some(message) = world.client.get(queue).await {
            let id = message.body["id"].as_str().unwrap();
            assert!(queue == "angler.results" || id.starts_with(queue), "{id} in {queue}");
            // Two results are for what is malformed.
            *left.entry(id.split('/').next().unwrap().to_owned()).or_default() += 1;
        }
    }
    assert_eq!((left["angler.quick"], left["angler.jobs"]), (20, 20), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_to_the_queue_that_is_named() {
    let (world, _bucket, _) = world().await;
    let list = world.list(4);
    let (code, _, log) = world.enqueue(&list, "a", &["--per-job", "1"]);
    assert_eq!(code, 0, "{log}");
    let named = ["--per-job", "1", "--queue", "angler.jobs"];
    assert_eq!(world.enqueue(&list, "b", &named).0, 0);
    assert_eq!(
        (world.ready("angler.quick").await, world.ready("angler.jobs").await),
        (Some(4), Some(4))
    );
    let (code, _, log) = world.enqueue(&list, "c", &["--queue", "angler.slow"]);
    assert!(code == 2 && log.contains("has only angler.quick, angler.jobs"), "{log}");
    // Wherever its jobs go, a run is found under one name.
    let (_, out, _) = world.setup.run(&["runs", "list", "--json"]);
    let queues: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["queue"].clone())
        .collect();
    assert_eq!(queues, ["angler.jobs", "angler.quick"]);
    let _worker = world.setup.start().await;
    for run in ["a", "b"] {
        let (code, _, log) = world.collect(run, &format!("{run}.csv"), &[]);
        assert_eq!(code, 0, "{log}");
    }
    let doctor = eventually("the doctor sees both", async || {
        let (_, out, _) = world.setup.run(&["doctor", "--json"]);
        (out.contains("angler.quick") && out.contains("angler.jobs")).then_some(out)
    })
    .await;
    assert!(doctor.contains("angler.quick.suspects"), "{doctor}");
}
