//! Jobs that come back, whatever the reason: which of them are set apart, and what becomes of them.

use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;

use crate::faults::ledger::Ledger;
use crate::faults::world::{World, unready};
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Broker, DEADLINE, Worker, eventually, http_get, var};

/// A world whose workers reach the broker and the store through proxies.
async fn proxied() -> (World, Proxy, Proxy) {
    let mut world = World::new().await;
    let broker = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&broker.address(), 5);
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let endpoint = var("ANGLER_TEST_S3_ENDPOINT");
    let store = Proxy::new(endpoint.trim_start_matches("http://")).await;
    world.setup.set("s3.endpoint", &format!("http://{}", store.address()));
    world.setup.set("limits.image_seconds", "300");
    (world, broker, store)
}

/// Jobs that the workers work on.
fn in_hand(workers: &[Worker]) -> Option<u64> {
    let of = |worker: &Worker| {
        let (_, text) = http_get(&format!("{}/metrics", worker.http))?;
        let line = text.lines().find_map(|line| line.strip_prefix("angler_jobs_in_flight "))?;
        line.parse::<f64>().ok().map(|jobs| jobs as u64)
    };
    workers.iter().map(of).sum()
}

fn told(workers: &[Worker], words: &str) -> usize {
    workers.iter().map(|worker| worker.log().matches(words).count()).sum()
}

/// Cuts all connections under a long job, again and again; the job has to be done by one of so many
/// workers.
async fn a_long_job_is_done(workers: usize) -> Vec<Worker> {
    let (world, broker, store) = proxied().await;
    let mut fleet = Vec::new();
    for _ in 0..workers {
        fleet.push(world.setup.start().await);
    }
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    store.fault(Fault { black_hole: true, ..Fault::default() });
    let ids = world.jobs(&client, "long", 1).await;
    for cut in 1..=5 {
        eventually("a worker works on it", async || {
            (told(&fleet, "let go:") == cut - 1 && in_hand(&fleet)? == 1).then_some(())
        })
        .await;
        broker.cut();
        eventually("the worker lives and lost it", async || {
            (told(&fleet, "let go:") == cut).then_some(())
        })
        .await;
    }
    store.heal();
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    assert!(client.get("angler.dead").await.is_none(), "no worker has died");
    fleet
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_connection_breaks_again_and_again_is_done_while_its_worker_lives() {
    let fleet = a_long_job_is_done(1).await;
    assert_eq!(told(&fleet, "runs alone"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_several_living_workers_lost_is_done() {
    a_long_job_is_done(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_one_worker_runs_suspects_the_others_answer() {
    let (world, _broker, store) = proxied().await;
    let mut fleet = Vec::new();
    for _ in 0..3 {
        fleet.push(world.setup.start().await);
    }
    // Four at a time, each image of a suspect takes this long.
    store.fault(Fault { latency: Duration::from_millis(50), ..Fault::default() });
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let images: Vec<&String> = world.images.iter().cycle().take(60).collect();
    for number in 0..6 {
        let job =
            json!({"id": format!("suspect/{number}"), "images": images, "classes": "colours@1"});
        let body = job.to_string();
        client.publish("angler.suspects", body.as_bytes(), BasicProperties::default()).await;
    }
    let mut order = Vec::new();
    let suspects = |order: &[String]| order.iter().filter(|id| id.starts_with("suspect")).count();
    let (mut number, start) = (0, Instant::now());
    while suspects(&order) < 6 {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {order:?}");
        client.job(&world.job(&format!("small/{number}"))).await;
        number += 1;
        let wait = Duration::from_millis(50);
        while let Ok(result) = tokio::time::timeout(wait, results.next()).await {
            assert_eq!(result.body["status"], "done", "{}", result.body);
            order.push(result.body["id"].as_str().unwrap().to_owned());
            // So that there are always small jobs, and never a backlog.
            if order.len() + 20 > number + suspects(&order) {
                break;
            }
        }
    }
    let first = order.iter().position(|id| id.starts_with("suspect")).unwrap();
    let last = order.iter().rposition(|id| id.starts_with("suspect")).unwrap();
    let runs = order[first..=last].split(|id| id.starts_with("suspect"));
    let between: Vec<usize> = runs.map(<[String]>::len).skip(1).collect();
    // One at a time, and jobs are answered all the while.
    let between = &between[..between.len() - 1];
    assert!(between.len() == 5 && between.iter().all(|small| *small >= 3), "{order:?}");
}

/// Deliveries of the only message of a queue come back to it.
async fn lose(world: &World, queue: &str, times: usize) {
    for _ in 0..times {
        let client = world.broker.connect().await;
        eventually("a delivery", async || {
            client.channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap()
        })
        .await;
        client.close().await;
    }
}

async fn declare(world: &World, queue: &str, limit: i64, dead_letters: Option<&str>) {
    let client = world.broker.connect().await;
    let mut arguments = FieldTable::default();
    let mut put = |key: &str, value: &str| {
        arguments.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    put("x-queue-type", "quorum");
    if let Some(target) = dead_letters {
        put("x-dead-letter-exchange", "");
        put("x-dead-letter-routing-key", target);
        put("x-dead-letter-strategy", "at-least-once");
        put("x-overflow", "reject-publish");
    }
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(limit));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    client.channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
    client.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_gives_up_has_a_result_and_a_dead_letter_with_a_reason() {
    let world = World::new().await;
    // As workers declare them, but for the limit.
    declare(&world, "angler.dead", 1_000_000_000, None).await;
    declare(&world, "angler.undeliverable", 1_000_000_000, Some("angler.dead")).await;
    declare(&world, "angler.jobs", 2, Some("angler.undeliverable")).await;
    let client = world.broker.connect().await;
    let ids = world.jobs(&client, "unlucky", 1).await;
    lose(&world, "angler.jobs", 3).await;
    eventually("the broker gave it up", async || {
        (world.broker.depth("angler.undeliverable")? == 1).then_some(())
    })
    .await;
    let worker = world.setup.start().await;
    let mut results = client.consume("angler.results").await;
    let result = results.next().await.body;
    assert_eq!((&result["id"], &result["status"]), (&json!(ids[0]), &json!("failed")));
    assert_eq!(result["error"]["code"], "retries_exhausted");
    let message = result["error"]["message"].as_str().unwrap();
    assert!(message.contains("delivery_limit"), "{message}");
    let dead = eventually("a dead letter", async || client.get("angler.dead").await).await;
    assert_eq!(dead.header("angler-reason").as_deref(), Some("retries_exhausted"));
    assert_eq!(dead.header("angler-jobs-queue").as_deref(), Some("angler.jobs"));
    assert!(dead.header("x-death").is_none(), "it is sent again as a new job");
    // And others are done.
    let mut ledger = Ledger::default();
    let ids = world.jobs(&client, "lucky", 3).await;
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    worker.ready().await;
    eventually("nothing is left there", async || {
        (world.broker.depth("angler.undeliverable")? == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_of_an_older_angler_are_used_as_they_are() {
    let world = World::new().await;
    for queue in ["angler.jobs", "angler.suspects"] {
        declare(&world, queue, 10, Some("angler.dead")).await;
    }
    let client = world.broker.connect().await;
    let mut ids = world.jobs(&client, "lost", 1).await;
    lose(&world, "angler.jobs", 3).await;
    let worker = world.setup.start().await;
    let mut results = client.consume("angler.results").await;
    ids.extend(world.jobs(&client, "new", 5).await);
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    worker.ready().await;
    for queue in ["angler.jobs", "angler.suspects"] {
        let note = format!("{queue} exists with other arguments and is used unchanged");
        assert!(worker.log().contains(&note), "{}", worker.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_that_outlasts_the_brokers_consumer_timeout_costs_no_job() {
    let server = Server::rabbitmq("consumer_timeout = 8000\n");
    // The broker looks every tick, a minute by default.
    server.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."]);
    let mut world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    world.setup.set("amqp.blocked_seconds", "2");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    // The client would be blocked as well: its jobs go through the management API.
    let exchange = format!("exchanges/{}/amq.default/publish", world.broker.vhost);
    let ids: Vec<String> = (0..30).map(|number| format!("blocked/{number}")).collect();
    for id in &ids {
        let message = json!({
            "routing_key": "angler.jobs", "payload_encoding": "string", "properties": {},
            "payload": world.job(id).to_string(),
        });
        world.broker.manage("POST", &exchange, Some(&message.to_string()));
    }
    unready(&worker, "the broker blocks publishers").await;
    eventually("all are given back, and nobody consumes", async || {
        let queue = world.broker.queue("angler.jobs");
        let counts = ["messages_ready", "messages_unacknowledged", "consumers"];
        (counts.map(|count| queue[count].as_u64()) == [Some(30), Some(0), Some(0)]).then_some(())
    })
    .await;
    // Longer than the broker would have waited.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!worker.log().contains("PRECONDITION_FAILED"), "{}", worker.log());
    server.ctl(&["set_vm_memory_high_watermark", "0.6"]);
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &ids).await;
    ledger.all_done();
    worker.ready().await;
    assert!(!worker.log().contains("runs alone"), "{}", worker.log());
    for queue in ["angler.dead", "angler.suspects", "angler.jobs"] {
        assert!(client.get(queue).await.is_none(), "left in {queue}");
    }
}
