//! Jobs that pin a version which is not in memory.

use serde_json::json;

use crate::support::{eventually, http_get};
use crate::swap::gate::Gate;
use crate::swap::world::{BLUE, GREEN, RED, SET, World, colours, labels_of, status};

/// Jobs that pin the version: fewer than a worker holds at once, so that others have a place.
const PINNED: usize = 20;
const OTHERS: usize = 10;

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_pin_the_same_version_share_one_load_and_hold_up_nobody() {
    let mut world = World::new().await;
    let images = world.images().await;
    world.put_colours("7").await;
    for (version, label) in [("1", "warm"), ("2", "hot")] {
        let classes = [(label, RED), ("mild", GREEN), ("cold", BLUE)];
        world.put_version("other", version, world.file(&classes)).await;
    }
    world.put_active("other", r#"{"version":"1"}"#).await;
    let gate = Gate::before(&format!("/{SET}/7.safetensors")).await;
    world
        .setup
        .set("s3.endpoint", &gate.url)
        .set("classes.preload", "other")
        .set("classes.poll_seconds", "3600")
        .set("amqp.prefetch", "32");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let send = async |kind: &str, count: usize, classes: &str| {
        for n in 0..count {
            let id = format!("{kind}/{n}");
            client.job(&json!({"id": id, "images": images, "classes": classes})).await;
        }
    };

    send("pinned", PINNED, &format!("{SET}@7")).await;
    // The store keeps the version to itself; the jobs that pin it have all been taken.
    gate.reached(1).await;
    eventually("every pinned job is with the worker", async || {
        (world.broker.queue("angler.jobs")["messages_unacknowledged"] == PINNED).then_some(())
    })
    .await;
    send("other", OTHERS, "other").await;
    for (id, result) in results.collect(OTHERS).await {
        assert!(id.starts_with("other/"), "{id} was done before its version was there");
        assert_eq!(labels_of(&result), ["warm", "mild", "cold"]);
    }
    // Nor does another set's activation wait.
    world.put_active("other", r#"{"version":"2"}"#).await;
    assert_eq!(world.announce(&client, "other").await["version"], "2");
    send("hot", 1, "other").await;
    assert_eq!(labels_of(&results.next().await), ["hot", "mild", "cold"]);

    gate.open();
    for (id, result) in results.collect(PINNED).await {
        assert!(id.starts_with("pinned/"), "{id}");
        assert_eq!(result.body["classes"], format!("{SET}@7"));
        assert_eq!(labels_of(&result), colours("7"));
    }
    assert_eq!(gate.reads(), 1, "the version is read once for all");
    assert!(status(&worker, SET).is_null(), "a pinned version is not the set's active one");
    assert_eq!(http_get(&format!("{}/readyz", worker.http)).unwrap().0, 200);
    drop(worker);
}
