//! Queues that are full, or gone.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::ledger::Ledger;
use crate::support::eventually;
use crate::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn results_that_a_full_queue_refuses_are_offered_until_it_has_room() {
    let world = World::new().await;
    let client = world.broker.connect().await;
    let mut arguments = FieldTable::default();
    for (key, value) in [("x-queue-type", "quorum"), ("x-overflow", "reject-publish")] {
        arguments.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(3));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    client.channel.queue_declare("angler.results".into(), durable, arguments).await.unwrap();
    let worker = world.setup.start().await;
    let ids = world.jobs(&client, "full", 30).await;
    eventually("results are refused", async || {
        worker.log().contains("the broker refused it (nack)").then_some(())
    })
    .await;
    // No job is settled whose result nobody has.
    // (A quorum queue notices a little late that it is full.)
    eventually("each job is held by one of the two queues", async || {
        let held = world.broker.depth("angler.jobs")?;
        (held > 0 && held + world.broker.depth("angler.results")? == 30).then_some(())
    })
    .await;
    let mut ledger = Ledger::default();
    let mut results = client.consume("angler.results").await;
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_queue_that_is_deleted_is_declared_anew_and_consumed() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let before = world.jobs(&client, "before", 3).await;
    ledger.collect(&mut results, &before).await;
    let queue = format!("queues/{}/angler.jobs", world.broker.vhost);
    world.broker.manage("DELETE", &queue, None);
    eventually("the queue is there again", async || {
        (world.broker.queue("angler.jobs")["consumers"].as_u64()? == 1).then_some(())
    })
    .await;
    worker.ready().await;
    let after = world.jobs(&client, "after", 3).await;
    ledger.collect(&mut results, &after).await;
    ledger.linger(&mut results, Duration::from_millis(500)).await;
    assert_eq!((ledger.all_done(), ledger.duplicates), (1, 0));
}
