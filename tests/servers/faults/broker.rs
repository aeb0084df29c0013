//! The broker fails, or the way to it.

use std::time::{Duration, Instant};

use crate::faults::ledger::Ledger;
use crate::faults::world::{World, unready};
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Broker, eventually, var};

/// A world whose workers reach the broker through a proxy, with heartbeats of 2 s.
async fn proxied() -> (World, Proxy) {
    let mut world = World::new().await;
    let proxy = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&proxy.address(), 2);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    (world, proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_way_to_the_broker_delays_results_and_nothing_else() {
    let (world, proxy) = proxied().await;
    proxy.fault(Fault { latency: Duration::from_millis(40), ..Fault::default() });
    let _worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let ids = world.jobs(&client, "slow", 100).await;
    let start = Instant::now();
    ledger.collect(&mut results, &ids).await;
    assert_eq!((ledger.all_done(), ledger.duplicates), (1, 0));
    // A confirm takes two latencies at least. One after the other they would take 8 s.
    println!("100 jobs with 80 ms to a confirm: {:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_reset_again_and_again_lose_no_job() {
    let (world, proxy) = proxied().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    for round in 0..4 {
        let ids = world.jobs(&client, &format!("reset{round}"), 25).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        proxy.cut();
        ledger.collect(&mut results, &ids).await;
    }
    ledger.all_done();
    worker.ready().await;
    println!("duplicates: {}", ledger.duplicates);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_says_nothing_any_more_is_noticed_by_its_heartbeats() {
    let (world, proxy) = proxied().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let mut ids = world.jobs(&client, "before", 10).await;
    proxy.fault(Fault { black_hole: true, ..Fault::default() });
    ids.extend(world.jobs(&client, "within", 10).await);
    unready(&worker, "no jobs are being consumed").await;
    proxy.heal();
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    worker.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_stopped_or_short_of_memory_is_outlived_and_no_job_is_lost() {
    let server = Server::rabbitmq("heartbeat = 2\n");
    let world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut ids = world.jobs(&client, "before", 50).await;
    // Killed in the middle of the work.
    server.kill();
    unready(&worker, "no jobs are being consumed").await;
    server.start();
    let back = Instant::now();
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    ids.extend(world.jobs(&client, "after", 10).await);
    ledger.collect(&mut results, &ids).await;
    println!("all jobs {:?} after the broker was back", back.elapsed());
    worker.ready().await;

    // Stopped for longer than the heartbeats allow.
    let stopped = world.jobs(&client, "stopped", 20).await;
    // A consumer that outlived the stop would take some of the results.
    client.close().await;
    server.signal("STOP");
    unready(&worker, "no jobs are being consumed").await;
    server.signal("CONT");
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    ledger.collect(&mut results, &stopped).await;
    worker.ready().await;

    // Out of memory: publishers are blocked, and the worker waits with its results.
    server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    // The client would be blocked as well: its job goes through the management API.
    let exchange = format!("exchanges/{}/amq.default/publish", world.broker.vhost);
    let message = serde_json::json!({
        "routing_key": "angler.jobs", "payload_encoding": "string", "properties": {},
        "payload": world.job("blocked").to_string(),
    });
    world.broker.manage("POST", &exchange, Some(&message.to_string()));
    unready(&worker, "the broker blocks publishers").await;
    server.ctl(&["set_vm_memory_high_watermark", "0.6"]);
    ledger.collect(&mut results, &["blocked".to_owned()]).await;
    worker.ready().await;
    ledger.all_done();
    println!("duplicates: {}", ledger.duplicates);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_outlasts_the_brokers_consumer_timeout_is_done_all_the_same() {
    let server = Server::rabbitmq("consumer_timeout = 3000\n");
    let mut world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    let endpoint = var("ANGLER_TEST_S3_ENDPOINT");
    let proxy = Proxy::new(endpoint.trim_start_matches("http://")).await;
    world.setup.set("s3.endpoint", &format!("http://{}", proxy.address()));
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    proxy.fault(Fault { black_hole: true, ..Fault::default() });
    let ids = world.jobs(&client, "long", 3).await;
    eventually("the broker takes the channel away", async || {
        worker.log().contains("PRECONDITION_FAILED").then_some(())
    })
    .await;
    proxy.heal();
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    worker.ready().await;
}
