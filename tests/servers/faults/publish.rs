//! Messages that the broker or a queue does not accept: results that are too large, reply queues that
//! refuse, producers' headers that send copies elsewhere, queues that may not be declared.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde_json::{Value, json};

use crate::faults::world::{World, unready};
use crate::support::servers::Server;
use crate::support::{Broker, Client, DEADLINE, Received, Worker, eventually, http_get, var};

fn job_properties() -> BasicProperties {
    BasicProperties::default().with_type("classify.v1".into()).with_delivery_mode(2)
}

impl World {
    /// Publishes jobs whose results go to `reply_to`; returns their ids.
    async fn jobs_for(
        &self,
        client: &Client,
        reply_to: &str,
        prefix: &str,
        count: usize,
    ) -> Vec<String> {
        let ids: Vec<String> = (0..count).map(|number| format!("{prefix}/{number}")).collect();
        for id in &ids {
            let properties = job_properties().with_reply_to(reply_to.into());
            let job = self.job(id).to_string();
            client.publish("angler.jobs", job.as_bytes(), properties).await;
        }
        ids
    }

    /// Waits until nothing is left of any job, for as long as a second look needs.
    async fn nothing_is_left(&self) {
        for queue in ["angler.jobs", "angler.suspects", "angler.retry.500ms"] {
            eventually(&format!("{queue} is empty"), async || {
                (self.broker.depth(queue)? == 0).then_some(())
            })
            .await;
        }
    }
}

fn id(result: &Received) -> String {
    result.body["id"].as_str().unwrap().to_owned()
}

/// Takes everything out of a queue.
async fn drain(client: &Client, queue: &str) -> Vec<Received> {
    let mut all = Vec::new();
    while let Some(message) = client.get(queue).await {
        all.push(message);
    }
    all
}

fn long(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Lowers the size of messages that new channels may publish.
fn limit_messages(server: &Server, bytes: usize) {
    // Two places: until 4.0, and from then on.
    server.ctl(&[
        "eval",
        &format!(
            "application:set_env(rabbit, max_message_size, {bytes}), \
             persistent_term:put(max_message_size, {bytes})."
        ),
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_the_broker_ends_and_holds_up_nothing_else() {
    const LIMIT: usize = 30_000;
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    world.declare_queues().await;
    let client = world.broker.connect().await;
    // Malformed and too large for the dead letters, once the limit is there.
    let junk = "x".repeat(2 * LIMIT);
    let named = job_properties().with_message_id("junk".into());
    client.publish("angler.jobs", junk.as_bytes(), named).await;
    client.close().await;
    limit_messages(&server, LIMIT);
    let mut client = world.broker.connect().await;
    client.private_queue("replies").await;
    // The jobs fit, their results do not.
    let images: Vec<&String> = (0..300).map(|number| &world.images[number % 3]).collect();
    for number in 0..20 {
        let job = json!({
            "id": format!("large/{number}"), "images": images, "classes": "colours@1", "top_k": 3,
        });
        let properties = match number % 2 {
            0 => job_properties(),
            _ => job_properties().with_reply_to("replies".into()),
        };
        client.publish("angler.jobs", job.to_string().as_bytes(), properties).await;
    }
    let mut ids = world.jobs(&client, "small", 20).await;
    let worker = world.setup.start().await;
    let mut results = client.consume("angler.results").await;
    let mut all: BTreeMap<String, Received> = results.collect(31).await;
    // A consumer and `get` do not share a queue.
    client = world.broker.connect().await;
    let replies = drain(&client, "replies").await;
    assert_eq!(replies.len(), 10);
    all.extend(replies.into_iter().map(|reply| (id(&reply), reply)));
    for id in ids.drain(..) {
        assert_eq!(all[&id].body["status"], "done", "{:?}", all[&id].body);
    }
    for number in 0..20 {
        let result = &all[&format!("large/{number}")].body;
        assert_eq!(result["status"], "failed");
        assert_eq!(result["error"]["code"], "result_too_large");
        let message = result["error"]["message"].as_str().unwrap();
        assert!(message.contains(&LIMIT.to_string()) && message.contains("top_k"), "{message}");
    }
    assert_eq!(all["junk"].body["error"]["code"], "malformed_job");
    // The broker moved it itself: its size does not matter then.
    let dead = eventually("a dead letter", async || client.get("angler.dead").await).await;
    assert_eq!(dead.raw, junk.as_bytes());
    assert!(client.get("angler.dead").await.is_none(), "the producers of large results know");
    world.nothing_is_left().await;
    worker.ready().await;
}

/// Declares a queue that takes one message and refuses more.
async fn declare_full(client: &Client, name: &str) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-overflow".into(), long("reject-publish"));
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    let options = QueueDeclareOptions::default();
    client.channel.queue_declare(name.into(), options, arguments).await.unwrap();
}

/// What came to the results queue: the ids of others' jobs and of those that `reply_to` was to get,
/// and the longest pause.
async fn results_of(
    client: &Client,
    reply_to: &str,
    count: usize,
) -> (Vec<String>, Vec<String>, Duration) {
    let mut results = client.consume("angler.results").await;
    let (mut others, mut diverted) = (Vec::new(), Vec::new());
    let (mut last, mut gap) = (Instant::now(), Duration::ZERO);
    while others.len() + diverted.len() < count {
        let result = results.next().await;
        assert_eq!(result.body["status"], "done", "{}", result.body);
        gap = gap.max(last.elapsed());
        last = Instant::now();
        match result.header("angler-reply-to-refused") {
            Some(queue) => {
                assert_eq!(queue, reply_to);
                diverted.push(id(&result));
            }
            None => others.push(id(&result)),
        }
    }
    others.sort();
    diverted.sort();
    (others, diverted, gap)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_is_full_holds_up_nobody_else_and_its_results_are_kept() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    declare_full(&client, "replies").await;
    // More than the worker has places for.
    let mut wanted = world.jobs_for(&client, "replies", "full", 20).await;
    let mut ids = world.jobs(&client, "other", 20).await;
    ids.sort();
    let (others, mut diverted, gap) =
        results_of(&world.broker.connect().await, "replies", 39).await;
    println!("longest pause between results: {gap:?}");
    assert_eq!(others, ids);
    let reply = client.get("replies").await.unwrap();
    diverted.push(id(&reply));
    diverted.sort();
    wanted.sort();
    assert_eq!(diverted, wanted);
    world.nothing_is_left().await;
    worker.ready().await;
    // There is room again.
    let last = world.jobs_for(&client, "replies", "last", 1).await;
    let reply = eventually("a reply", async || client.get("replies").await).await;
    assert_eq!(id(&reply), last[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_confirms_nothing_holds_up_nobody_else() {
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let none = FieldTable::default();
    client.channel.queue_declare("replies".into(), durable, none).await.unwrap();
    // As a queue whose node is down: it is known, and says nothing.
    server.ctl(&[
        "eval",
        &format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"replies\">>)), \
             sys:suspend(amqqueue:get_pid(Q)).",
            world.broker.vhost
        ),
    ]);
    let mut wanted = world.jobs_for(&client, "replies", "silent", 20).await;
    let mut ids = world.jobs(&client, "other", 20).await;
    ids.sort();
    wanted.sort();
    let (others, diverted, gap) = results_of(&client, "replies", 40).await;
    println!("longest pause between results: {gap:?}");
    assert_eq!((others, diverted), (ids, wanted));
    // The connection was not the fault: nobody replaced it.
    assert!(!worker.log().contains("the broker is tried again"), "{}", worker.log());
    worker.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_waits_for_its_runs_queue_that_is_there_and_gets_nothing() {
    let server = Server::rabbitmq("");
    let world = World::of(Broker::of(&server), &var("ANGLER_TEST_S3_ENDPOINT")).await;
    let client = world.broker.connect().await;
    let replies = "angler.run.r@0123456789ab";
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), long("quorum"));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    client.channel.queue_declare(replies.into(), durable, arguments).await.unwrap();
    let worker = world.setup.start().await;
    let vhost = &world.broker.vhost;
    if !server.hide(vhost, replies) {
        return;
    }
    let mut job = world.job("r/0");
    job["run"] = json!({"id": "r", "jobs": 1, "index": 0, "nonce": "0123456789ab"});
    let properties = job_properties().with_reply_to(replies.into());
    client.publish("angler.jobs", job.to_string().as_bytes(), properties).await;
    unready(&worker, "the broker returned it as unroutable").await;
    // Others do not wait for it.
    let ids = world.jobs(&client, "other", 3).await;
    let others = client.consume("angler.results").await.collect(3).await;
    assert_eq!(others.into_keys().collect::<Vec<_>>(), ids);
    server.show(vhost, replies);
    let result = eventually("the result", async || client.get(replies).await).await;
    assert_eq!(id(&result), "r/0");
    worker.ready().await;
    world.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_job_with_cc_comes_once_and_again_only_when_it_is_redriven() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut headers = FieldTable::default();
    for key in ["CC", "BCC"] {
        let queues = vec![long("angler.jobs"), long("angler.results")];
        headers.insert(key.into(), AMQPValue::FieldArray(queues.into()));
    }
    headers.insert("tenant".into(), long("t"));
    let properties = job_properties().with_message_id("bad".into()).with_headers(headers);
    client.publish("angler.jobs", b"{", properties).await;
    // What the producer itself sent there.
    let copy = eventually("the copy", async || client.get("angler.results").await).await;
    assert_eq!(copy.raw, b"{");
    for round in 0..2 {
        let what = format!("result {round}");
        let result = eventually(&what, async || client.get("angler.results").await).await;
        assert_eq!(result.body["error"]["code"], "malformed_job", "{}", result.body);
        eventually("a dead letter", async || {
            (world.broker.depth("angler.dead")? == 1).then_some(())
        })
        .await;
        world.nothing_is_left().await;
        // A copy would have come with the dead letter: both were routed at once.
        assert!(client.get("angler.results").await.is_none());
        if round == 0 {
            let (code, _, log) = world.setup.run(&["dead", "redrive", "--all"]);
            assert_eq!(code, 0, "{log}");
        }
    }
    let dead = client.get("angler.dead").await.unwrap();
    assert_eq!((dead.header("CC"), dead.header("BCC")), (None, None));
    assert_eq!(dead.header("tenant").as_deref(), Some("t"));
    drop(worker);
}

/// A client that waits for direct replies, and the channel that it has to send its jobs on.
async fn direct(client: &Client) -> lapin::Consumer {
    let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let (queue, none) = ("amq.rabbitmq.reply-to".into(), FieldTable::default());
    client.channel.basic_consume(queue, "direct".into(), no_ack, none).await.unwrap()
}

/// Publishes a job of one image for a direct reply.
async fn ask(world: &World, client: &Client, id: &str) {
    let job = json!({"id": id, "images": [world.images[0]], "classes": "colours@1"}).to_string();
    let properties = job_properties()
        .with_reply_to("amq.rabbitmq.reply-to".into())
        .with_correlation_id(format!("c-{id}").as_str().into());
    let options = BasicPublishOptions::default();
    let sent = client.channel.basic_publish(
        "".into(),
        "angler.jobs".into(),
        options,
        job.as_bytes(),
        properties,
    );
    sent.await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_replies_come_once_and_leave_nothing_behind() {
    const JOBS: usize = 20;
    let mut world = World::new().await;
    world.declare_queues().await;
    world.setup.set("amqp.reply_to_allow", "amq.rabbitmq.reply-to");
    // A client that is gone when its reply comes.
    let gone = world.broker.connect().await;
    let _replies = direct(&gone).await;
    for number in 0..JOBS {
        ask(&world, &gone, &format!("gone/{number}")).await;
    }
    gone.close().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut replies = direct(&client).await;
    for number in 0..JOBS {
        ask(&world, &client, &format!("here/{number}")).await;
    }
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        let reply = tokio::time::timeout(DEADLINE, replies.next()).await.expect("no reply in time");
        let reply = reply.unwrap().unwrap();
        let body: Value = serde_json::from_slice(&reply.data).unwrap();
        assert_eq!(body["status"], "done", "{body}");
        let id = body["id"].as_str().unwrap().to_owned();
        let correlation = reply.properties.correlation_id().as_ref().map(ShortString::as_str);
        assert_eq!(correlation, Some(format!("c-{id}").as_str()));
        ids.push(id);
    }
    world.nothing_is_left().await;
    ids.sort();
    let before = ids.len();
    ids.dedup();
    assert_eq!((before, ids.len()), (JOBS, JOBS), "each once");
    assert!(ids.iter().all(|id| id.starts_with("here/")), "{ids:?}");
    // All jobs are settled, so all results were published.
    let more = tokio::time::timeout(Duration::from_millis(500), replies.next()).await;
    assert!(more.is_err(), "a second reply: {more:?}");
    let other = world.broker.connect().await;
    assert!(other.get("angler.results").await.is_none());
    assert!(other.get("angler.dead").await.is_none());
    assert!(!worker.log().contains("reply_to"), "{}", worker.log());
}

impl World {
    /// Declares the queues by a worker that ends at once.
    async fn declare_queues(&self) {
        drop(self.setup.start().await);
    }
}

/// The user may read and write, and configure what matches.
fn permit(world: &World, configure: &str) {
    let permissions = json!({"configure": configure, "write": ".*", "read": ".*"});
    let path = format!("permissions/{}/guest", world.broker.vhost);
    world.broker.manage("PUT", &path, Some(&permissions.to_string()));
}

/// Whether a worker's log says that it uses a queue unchanged.
fn told(worker: &Worker, name: &str) -> usize {
    worker.log().matches(&format!("{name} exists and is used unchanged")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_declare_uses_what_is_there_and_is_told_what_is_missing() {
    let world = World::new().await;
    world.declare_queues().await;
    permit(&world, "^$");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids = world.jobs(&client, "a", 3).await;
    let done = results.collect(3).await;
    assert!(ids.iter().all(|id| done[id].body["status"] == "done"), "{done:?}");
    for name in ["angler.jobs", "angler.retry.500ms", "angler.dead", "angler.control"] {
        assert_eq!(told(&worker, name), 1, "{name}:\n{}", worker.log());
    }
    drop(worker);
    permit(&world, ".*");
    for queue in ["angler.retry.500ms", "angler.dead"] {
        let path = format!("queues/{}/{queue}", world.broker.vhost);
        world.broker.manage("DELETE", &path, None);
    }
    permit(&world, "^$");
    let worker = world.setup.launch().await;
    unready(&worker, "there is no angler.dead, angler.retry.500ms on this virtual host").await;
    let (_, text) = http_get(&format!("{}/readyz", worker.http)).unwrap();
    assert!(text.contains("configure") && text.contains("ACCESS_REFUSED"), "{text}");
    permit(&world, ".*");
    worker.ready().await;
}
