//! Workers are killed and stopped.

use std::time::Duration;

use crate::faults::ledger::Ledger;
use crate::faults::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_killed_in_turn_lose_no_job() {
    let world = World::new().await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let mut ids = Vec::new();
    for round in 0..4 {
        ids.extend(world.jobs(&client, &format!("round{round}"), 40).await);
        tokio::time::sleep(Duration::from_millis(60)).await;
        worker.kill();
        worker = world.setup.start().await;
    }
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    assert!(client.get("angler.dead").await.is_none());
    println!("duplicates: {}", ledger.duplicates);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_for_long_does_no_harm_when_it_goes_on() {
    let mut world = World::new().await;
    let url = world.broker.url_through(&world.broker.address(), 2);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let stopped = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let ids = world.jobs(&client, "a", 60).await;
    tokio::time::sleep(Duration::from_millis(40)).await;
    stopped.signal("STOP");
    // The broker misses its heartbeats and gives its jobs to the other one.
    let other = world.setup.start().await;
    ledger.collect(&mut results, &ids).await;
    stopped.signal("CONT");
    let more = world.jobs(&client, "b", 60).await;
    ledger.collect(&mut results, &more).await;
    stopped.ready().await;
    other.ready().await;
    // What it was about to say is said a second time at most, and in the same words.
    ledger.linger(&mut results, Duration::from_secs(1)).await;
    ledger.all_done();
    println!("duplicates: {}", ledger.duplicates);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_in_order_leaves_no_job_unacked() {
    let world = World::new().await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let ids = world.jobs(&client, "a", 200).await;
    // In the middle: what it finished is acked, what it did not start goes back.
    ledger.collect(&mut results, &ids[..50]).await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
    let mut worker = world.setup.start().await;
    ledger.collect(&mut results, &ids).await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
    // A finished job whose ack was missing would have been done again. (What the broker had on its
    // way to the worker as it stopped consuming comes again too, but nobody had begun it.)
    ledger.linger(&mut results, Duration::from_millis(200)).await;
    ledger.all_done();
    assert_eq!(ledger.duplicates, 0);
    for queue in ["angler.jobs", "angler.suspects", "angler.dead"] {
        assert!(client.get(queue).await.is_none(), "left in {queue}");
    }
}
