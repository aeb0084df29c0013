//! Queues that are full, or gone.

use std::sync::Arc;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use angler_amqp::AmqpOptions;
use angler_amqp::publisher::{Published, Publisher};
use angler_amqp::topology::Topology;

use crate::faults::ledger::Ledger;
use crate::faults::world::{World, unready};
use crate::support::eventually;

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
    unready(&worker, "a message for angler.results has not been confirmed").await;
    assert!(worker.log().contains("the broker refused it (nack)"), "{}", worker.log());
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
    worker.ready().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn of_many_messages_at_once_those_that_no_queue_takes_are_told_from_those_that_one_has() {
    let world = World::new().await;
    let client = world.broker.connect().await;
    let options = AmqpOptions {
        url: world.broker.url.clone(),
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        name: "many".into(),
    };
    let topology = Topology {
        jobs: "angler.jobs".into(),
        results: "angler.results".into(),
        dead: "angler.dead".into(),
        control_exchange: "angler.control".into(),
        retry_delays: vec![],
    };
    let publisher = Arc::new(Publisher::new(options, topology));
    let properties = BasicProperties::default();
    // The first also waits until a queue that is missing cannot be one that a broker which just
    // started has not found yet.
    assert_eq!(publisher.publish("none", &properties, b"").await, Published::Unroutable);
    for round in 0..5 {
        let sent = (0..100).map(|number| {
            let (publisher, properties) = (Arc::clone(&publisher), properties.clone());
            tokio::spawn(async move {
                let (queue, expected) = match number % 4 {
                    0 => ("none", Published::Unroutable),
                    _ => ("angler.results", Published::Confirmed),
                };
                let body = format!("{round}/{number}");
                let published = publisher.publish(queue, &properties, body.as_bytes()).await;
                assert_eq!(published, expected, "{body}");
            })
        });
        for sent in sent.collect::<Vec<_>>() {
            sent.await.unwrap();
        }
    }
    let mut taken = Vec::new();
    while let Some(message) = client.get("angler.results").await {
        taken.push(message.raw);
    }
    taken.sort_unstable();
    let all = taken.len();
    taken.dedup();
    assert_eq!((all, taken.len()), (375, 375), "each once");
    publisher.close().await;
}
