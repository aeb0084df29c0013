//! The store fails.

use std::time::Duration;

use serde_json::json;

use crate::faults::ledger::Ledger;
use crate::faults::world::{World, unready};
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Results, eventually, var};

/// A world whose workers reach the store through a proxy.
async fn proxied() -> (World, Proxy) {
    let mut world = World::new().await;
    let endpoint = var("ANGLER_TEST_S3_ENDPOINT");
    let proxy = Proxy::new(endpoint.trim_start_matches("http://")).await;
    world.setup.set("s3.endpoint", &format!("http://{}", proxy.address()));
    (world, proxy)
}

async fn results(world: &World) -> Results {
    world.broker.connect().await.consume("angler.results").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_delays_jobs_and_nothing_else() {
    let (world, proxy) = proxied().await;
    let _worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    let latency = Duration::from_millis(150);
    proxy.fault(Fault { latency, bytes_per_second: Some(100_000), ..Fault::default() });
    let ids = world.jobs(&client, "slow", 20).await;
    ledger.collect(&mut results, &ids).await;
    assert_eq!((ledger.all_done(), ledger.duplicates), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_break_off_are_fetched_again_and_cost_no_attempt() {
    let (world, proxy) = proxied().await;
    let _worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    // In the middle of an image. The store's client tries three times, so two cuts cost no attempt.
    proxy.cut_answers(3_000, 2);
    let ids = world.jobs(&client, "cut", 4).await;
    ledger.collect(&mut results, &ids).await;
    proxy.heal();
    // And connections that are reset again and again.
    for round in 0..10 {
        let ids = world.jobs(&client, &format!("reset{round}"), 3).await;
        proxy.cut();
        ledger.collect(&mut results, &ids).await;
    }
    assert_eq!((ledger.all_done(), ledger.duplicates), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_swallows_requests_costs_each_image_its_time_and_the_worker_goes_on() {
    let (mut world, proxy) = proxied().await;
    world.setup.set("limits.image_seconds", "2");
    let _worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    proxy.fault(Fault { black_hole: true, ..Fault::default() });
    let swallowed = world.jobs(&client, "swallowed", 3).await;
    ledger.collect(&mut results, &swallowed).await;
    for id in &swallowed {
        for image in ledger.of(id)["images"].as_array().unwrap() {
            assert_eq!(image["error"]["code"], "timeout", "{image}");
        }
    }
    proxy.heal();
    let mut after = Ledger::default();
    let ids = world.jobs(&client, "after", 10).await;
    after.collect(&mut results, &ids).await;
    assert_eq!((after.all_done(), after.duplicates), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_store_is_away_no_attempts_are_spent_and_afterwards_all_jobs_are_done() {
    let (world, proxy) = proxied().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    let before = world.jobs(&client, "before", 1).await;
    ledger.collect(&mut results, &before).await;
    proxy.fault(Fault { refuse: true, ..Fault::default() });
    proxy.cut();
    let ids = world.jobs(&client, "away", 60).await;
    unready(&worker, "the store does not answer").await;
    // Given back, for others to take. It stays so for longer than the retries would take.
    eventually("all jobs wait", async || {
        let queue = world.broker.queue("angler.jobs");
        let waiting =
            queue["messages_ready"].as_u64()? + world.broker.depth("angler.retry.500ms")?;
        (waiting == 60).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    proxy.heal();
    ledger.collect(&mut results, &ids).await;
    worker.ready().await;
    // Those in flight when it began may have spent one.
    assert!(ledger.all_done() <= 2, "an attempt was spent while the store was away");
    assert_eq!(ledger.duplicates, 0);
    assert!(client.get("angler.dead").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_does_not_exist_stops_nobody() {
    let (world, _proxy) = proxied().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    let images = vec!["s3://no-such-bucket-anywhere/a.png"; 40];
    client.job(&json!({"id": "wrong", "images": images, "classes": "colours@1"})).await;
    let ids = world.jobs(&client, "right", 10).await;
    ledger.collect(&mut results, &ids).await;
    assert_eq!(Ledger::default().all_done(), 0);
    worker.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_killed_or_stopped_and_comes_back_loses_no_job() {
    let store = Server::seaweedfs();
    let broker = crate::support::Broker::new().await;
    let world = World::of(broker, &store.var("ANGLER_TEST_S3_ENDPOINT")).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let (mut results, mut ledger) = (results(&world).await, Ledger::default());
    let mut ids = world.jobs(&client, "before", 20).await;
    store.kill();
    ids.extend(world.jobs(&client, "down", 20).await);
    unready(&worker, "the store does not answer").await;
    store.start();
    ledger.collect(&mut results, &ids).await;
    // Stopped, it takes connections and says nothing.
    store.signal("STOP");
    let stopped = world.jobs(&client, "stopped", 20).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    store.signal("CONT");
    ledger.collect(&mut results, &stopped).await;
    ledger.all_done();
    worker.ready().await;
}
