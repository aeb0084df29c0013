//! What every [`JobSource`] that others share does: a delivery is settled once, and what is not
//! settled comes back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde_json::json;

use angler_amqp::AmqpOptions;
use angler_amqp::losses::Losses;
use angler_amqp::publisher::{Published, Publisher};
use angler_amqp::source::AmqpSource;
use angler_amqp::topology::Topology;
use angler_core::readiness::Readiness;
use angler_core::source::memory::MemoryQueue;
use angler_core::source::{Delivery, JobSource, Reply, Settlement};
use angler_wire::error::{Failure, FailureCode};
use angler_wire::job::{Job, JobLimits};

use super::soon;
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Broker, Client, Received, eventually};

const LIMITS: JobLimits = JobLimits { images: 10, message_bytes: 10_000 };
const SHORT: Duration = Duration::from_millis(300);

/// A queue, and what a producer and an operator see of it.
pub trait World {
    async fn push(&self, body: &[u8]);
    /// One more consumer.
    fn source(&self) -> Box<dyn JobSource>;
    /// Takes what waits; what is delivered and not settled is not seen.
    async fn take_waiting(&self) -> Vec<Vec<u8>>;
}

struct Memory {
    queue: MemoryQueue,
}

impl Memory {
    async fn new() -> Self {
        Self { queue: MemoryQueue::with_suspects() }
    }
}

impl World for Memory {
    async fn push(&self, body: &[u8]) {
        self.queue.push(body);
    }

    fn source(&self) -> Box<dyn JobSource> {
        Box::new(self.queue.source(LIMITS))
    }

    async fn take_waiting(&self) -> Vec<Vec<u8>> {
        let mut source = self.source();
        let mut bodies = Vec::new();
        while self.queue.depth().0 > 0 {
            let delivery = receive(&mut source).await;
            bodies.push(id(&delivery).into_bytes());
            delivery.settle.settle(Settlement::Ack).await;
        }
        bodies
    }
}

/// A virtual host with the topology in it.
pub struct Amqp {
    broker: Broker,
    client: Client,
    topology: Topology,
    publisher: Arc<Publisher>,
}

impl Amqp {
    pub async fn new() -> Self {
        Self::on(Broker::new().await).await
    }

    /// On this broker.
    pub async fn on(broker: Broker) -> Self {
        let topology = Topology {
            jobs: "angler.jobs".into(),
            results: "angler.results".into(),
            dead: "angler.dead".into(),
            control_exchange: "angler.control".into(),
            retry_delays: vec![SHORT],
        };
        let options = Self::options(&broker);
        // As a worker does it, so that producers find the queues.
        let connection = angler_amqp::connect(&options, "test").await.unwrap();
        let mismatches = topology.declare(&connection).await.unwrap();
        assert!(mismatches.is_empty(), "{mismatches:?}");
        drop(connection); // which closes it
        let publisher = Arc::new(Publisher::new(options, topology.clone()));
        Self { client: broker.connect().await, broker, topology, publisher }
    }

    fn options(broker: &Broker) -> AmqpOptions {
        AmqpOptions {
            url: broker.url.clone(),
            ca_file: None,
            client_cert_file: None,
            client_key_file: None,
            name: "conformance".into(),
        }
    }

    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// A source that reaches the broker by another way.
    pub fn source_at(&self, url: &str, prefetch: u16) -> Box<dyn JobSource> {
        let options = AmqpOptions { url: url.to_owned(), ..Self::options(&self.broker) };
        let losses = Losses::new(options.clone(), self.topology.clone());
        let source = AmqpSource::new(
            options,
            self.topology.clone(),
            prefetch,
            LIMITS,
            self.publisher(),
            Arc::new(Readiness::default()),
        );
        Box::new(source.with_losses(Arc::new(losses.with_patience(Duration::ZERO))))
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn publisher(&self) -> Arc<Publisher> {
        Arc::clone(&self.publisher)
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        self.client.publish("angler.jobs", body, properties).await;
    }

    /// How many jobs nobody holds.
    async fn ready(&self) -> u32 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.client.channel.queue_declare("angler.jobs".into(), passive, table(&[]));
        declared.await.unwrap().message_count()
    }

    /// Waits until angler has these connections here, for a second time a second later: the broker
    /// lists a new one with a delay.
    async fn settled_on(&self, names: &[&str]) {
        for _ in 0..2 {
            eventually(&format!("the connections {names:?}"), async || {
                let all: Vec<String> = self.broker.connections().into_iter().map(|c| c.1).collect();
                let own: Vec<&String> = all.iter().filter(|n| n.starts_with("angler ")).collect();
                (own == names).then_some(())
            })
            .await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// The only message of the dead-letter queue, once it is there.
    async fn dead(&self) -> Received {
        let dead = eventually("a dead letter", async || self.client.get("angler.dead").await).await;
        assert!(self.client.get("angler.dead").await.is_none(), "a second dead letter");
        dead
    }
}

impl World for Amqp {
    async fn push(&self, body: &[u8]) {
        self.publish(body, BasicProperties::default()).await;
    }

    fn source(&self) -> Box<dyn JobSource> {
        self.source_at(&self.broker.url, 10)
    }

    async fn take_waiting(&self) -> Vec<Vec<u8>> {
        let mut bodies = Vec::new();
        while let Some(message) = self.client.get("angler.jobs").await {
            bodies.push(message.body["id"].as_str().unwrap_or_default().into());
        }
        bodies
    }
}

macro_rules! job_source {
    ($adapter:ident, $world:expr) => {
        suite!(
            $adapter,
            $world,
            [
                a_job_comes_with_all_its_fields,
                what_is_no_job_comes_with_the_reason_and_an_id,
                what_is_acked_is_gone,
                what_a_dead_worker_held_comes_again_apart,
                a_suspect_that_is_given_back_stays_one_and_one_that_is_retried_is_none,
                a_pause_gives_back_what_was_not_handed_out,
                what_is_requeued_comes_again_as_the_same_attempt,
                what_is_retried_comes_again_later_as_the_next_attempt,
                a_dead_letter_does_not_come_again,
                a_stop_gives_back_what_was_not_handed_out,
                a_stop_before_the_first_job_is_fine,
                a_call_that_is_dropped_loses_nothing,
                two_consumers_share_the_queue,
            ]
        );
    };
}

job_source!(memory, super::Memory::new());
job_source!(amqp, super::Amqp::new());

pub fn job(id: &str) -> Vec<u8> {
    json!({"id": id, "images": ["s3://b/k"], "classes": "s"}).to_string().into_bytes()
}

pub fn id(delivery: &Delivery) -> String {
    match &delivery.job {
        Ok(job) => job.id.clone(),
        Err(malformed) => malformed.id.clone(),
    }
}

pub async fn receive(source: &mut Box<dyn JobSource>) -> Delivery {
    let received = soon("a delivery", source.receive()).await.unwrap();
    received.expect("the source ended")
}

/// A job, or a suspect.
pub async fn receive_any(source: &mut Box<dyn JobSource>) -> Delivery {
    let mut waiting = source.suspects().expect("this source has suspects");
    let any = async {
        loop {
            tokio::select! {
                waits = waiting.wait_for(|waits| *waits) => drop(waits.unwrap()),
                // It moves those that are delivered again, and hands out the others.
                other = source.receive() => return other.unwrap().expect("the source ended"),
            }
            if source.take_turn().await
                && let Some(delivery) = source.receive_suspect().await.unwrap()
            {
                assert!(delivery.suspect);
                return delivery;
            }
        }
    };
    soon("a delivery", any).await
}

/// One job that a worker held when it ended.
async fn receive_suspect(source: &mut Box<dyn JobSource>) -> Delivery {
    let delivery = receive_any(source).await;
    assert!(delivery.suspect, "{} came", id(&delivery));
    delivery
}

/// Ends a worker as its death does: without a word, and with what it holds.
async fn die(mut source: Box<dyn JobSource>, held: impl IntoIterator<Item = Delivery>) {
    source.close().await;
    drop(source);
    held.into_iter().for_each(drop);
}

/// Nothing comes; waited for as long as it takes to be fairly sure.
async fn nothing_comes(source: &mut Box<dyn JobSource>) {
    let received = tokio::time::timeout(2 * SHORT, source.receive()).await;
    if let Ok(delivery) = received {
        panic!("{:?} came", delivery.unwrap().map(|d| id(&d)));
    }
}

/// Stops, as a worker does when it ends in order.
pub async fn end(mut source: Box<dyn JobSource>) {
    soon("the source stops", source.stop()).await;
    soon("the source closes", source.close()).await;
}

async fn a_job_comes_with_all_its_fields(world: &impl World) {
    let body = json!({
        "id": "nightly/000017",
        "images": ["s3://photos/ü.jpg", {"uri": "s3://photos/b.jpg", "id": "sku-1"}],
        "classes": "bottles@7", "top_k": 5, "min_score": 0.35, "embeddings": true,
        "run": {"id": "nightly", "jobs": 1563, "index": 17}, "from_the_future": [1]
    })
    .to_string();
    world.push(body.as_bytes()).await;
    let mut source = world.source();
    let delivery = receive(&mut source).await;
    let expected = Job::parse(body.as_bytes(), None, LIMITS).unwrap();
    assert_eq!(delivery.job.as_ref().unwrap(), &expected);
    assert_eq!((delivery.attempt, &delivery.reply), (1, &Reply::default()));
    assert!(!delivery.lost.is_cancelled());
    delivery.settle.settle(Settlement::Ack).await;
    end(source).await;
}

async fn what_is_no_job_comes_with_the_reason_and_an_id(world: &impl World) {
    world.push(br#"{"id": "half", "classes": "s"}"#).await;
    world.push(b"\xff\xfe no JSON").await;
    world.push(b"").await;
    let many = json!({"id": "many", "images": vec!["u"; 11], "classes": "s"}).to_string();
    world.push(many.as_bytes()).await;
    let long = json!({"id": "long", "images": ["u".repeat(10_000)], "classes": "s"}).to_string();
    world.push(long.as_bytes()).await;
    world.push(&job("good")).await;
    let mut source = world.source();
    let mut ids = Vec::new();
    for (code, word) in [
        (FailureCode::MalformedJob, "images"),
        (FailureCode::MalformedJob, "not a job"),
        (FailureCode::MalformedJob, "not a job"),
        (FailureCode::TooManyImages, "limits.images_per_job"),
        (FailureCode::MalformedJob, "limits.message_bytes"),
    ] {
        let delivery = receive(&mut source).await;
        let malformed = delivery.job.unwrap_err();
        assert_eq!(malformed.failure.code, code, "{malformed:?}");
        assert!(malformed.failure.message.contains(word), "{malformed:?}");
        ids.push(malformed.id);
        delivery.settle.settle(Settlement::Ack).await;
    }
    assert_eq!((ids[0].as_str(), ids[3].as_str(), ids[4].as_str()), ("half", "many", "long"));
    assert!(ids[1].starts_with("malformed-") && ids[2].starts_with("malformed-"), "{ids:?}");
    assert_ne!(ids[1], ids[2]);
    // It blocks nothing.
    let delivery = receive(&mut source).await;
    assert_eq!(id(&delivery), "good");
    delivery.settle.settle(Settlement::Ack).await;
    end(source).await;
}

async fn what_is_acked_is_gone(world: &impl World) {
    let mut source = world.source();
    for name in ["a", "b", "c"] {
        world.push(&job(name)).await;
    }
    for _ in 0..3 {
        receive(&mut source).await.settle.settle(Settlement::Ack).await;
    }
    nothing_comes(&mut source).await;
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

async fn what_a_dead_worker_held_comes_again_apart(world: &impl World) {
    let mut source = world.source();
    for name in ["a", "b", "c", "d"] {
        world.push(&job(name)).await;
    }
    let acked = receive(&mut source).await;
    assert_eq!(id(&acked), "a");
    acked.settle.settle(Settlement::Ack).await;
    let held = [receive(&mut source).await, receive(&mut source).await];
    die(source, held).await;
    // The first time may be an accident of its connection.
    let mut source = world.source();
    let held = [receive(&mut source).await, receive(&mut source).await];
    assert_eq!(held.each_ref().map(|delivery| delivery.suspect), [false; 2]);
    die(source, held).await;

    let mut source = world.source();
    let mut again = Vec::new();
    for _ in 0..3 {
        // The last one was only prefetched, which a broker cannot tell from held.
        let delivery = receive_any(&mut source).await;
        assert!(delivery.suspect || id(&delivery) == "d");
        assert_eq!(delivery.attempt, 1);
        again.push(id(&delivery));
        delivery.settle.settle(Settlement::Ack).await;
    }
    again.sort();
    assert_eq!(again, ["b", "c", "d"]);
    nothing_comes(&mut source).await;
    end(source).await;
}

async fn a_suspect_that_is_given_back_stays_one_and_one_that_is_retried_is_none(
    world: &impl World,
) {
    world.push(&job("a")).await;
    for _ in 0..2 {
        let mut source = world.source();
        let held = receive(&mut source).await;
        die(source, [held]).await;
    }
    let mut source = world.source();
    // As often as it likes: this is no failed run.
    for _ in 0..5 {
        let suspect = receive_suspect(&mut source).await;
        assert_eq!((suspect.job.as_ref().unwrap().id.as_str(), suspect.attempt), ("a", 1));
        suspect.settle.settle(Settlement::Requeue).await;
    }
    let retry = Settlement::Retry { delay: SHORT, error: "e".into() };
    receive_suspect(&mut source).await.settle.settle(retry).await;
    let delivery = receive(&mut source).await;
    assert_eq!((delivery.suspect, delivery.attempt), (false, 2));
    delivery.settle.settle(Settlement::Ack).await;
    nothing_comes(&mut source).await;
    end(source).await;
}

async fn a_pause_gives_back_what_was_not_handed_out(world: &impl World) {
    for number in 0..5 {
        world.push(&job(&number.to_string())).await;
    }
    let mut source = world.source();
    let held = receive(&mut source).await;
    soon("the source pauses", source.pause("it is told to")).await;
    let mut other = world.source();
    let first = receive(&mut other).await;
    assert!(!first.suspect);
    first.settle.settle(Settlement::Ack).await;
    end(other).await;
    // What was handed out can be settled, and the others come once it is asked for more.
    held.settle.settle(Settlement::Ack).await;
    for _ in 0..3 {
        receive(&mut source).await.settle.settle(Settlement::Ack).await;
    }
    nothing_comes(&mut source).await;
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

async fn what_is_requeued_comes_again_as_the_same_attempt(world: &impl World) {
    world.push(&job("a")).await;
    let mut source = world.source();
    for _ in 0..3 {
        let delivery = receive(&mut source).await;
        assert_eq!((id(&delivery).as_str(), delivery.attempt), ("a", 1));
        delivery.settle.settle(Settlement::Requeue).await;
    }
    receive(&mut source).await.settle.settle(Settlement::Ack).await;
    nothing_comes(&mut source).await;
    end(source).await;
}

async fn what_is_retried_comes_again_later_as_the_next_attempt(world: &impl World) {
    let body = json!({
        "id": "a", "images": [{"uri": "s3://b/ü", "id": "i"}], "classes": "s@1", "top_k": 3
    });
    world.push(body.to_string().as_bytes()).await;
    let mut source = world.source();
    let mut first = None;
    for attempt in 1..=3 {
        let delivery = receive(&mut source).await;
        assert_eq!(delivery.attempt, attempt);
        let job = delivery.job.unwrap();
        assert_eq!(first.get_or_insert_with(|| job.clone()), &job);
        let error = format!("attempt {attempt} failed");
        delivery.settle.settle(Settlement::Retry { delay: SHORT, error }).await;
    }
    // Retried and requeued: still the same attempt.
    let delivery = receive(&mut source).await;
    assert_eq!(delivery.attempt, 4);
    delivery.settle.settle(Settlement::Requeue).await;
    let delivery = receive(&mut source).await;
    assert_eq!(delivery.attempt, 4);
    delivery.settle.settle(Settlement::Ack).await;
    nothing_comes(&mut source).await;
    end(source).await;
}

async fn a_dead_letter_does_not_come_again(world: &impl World) {
    world.push(&job("a")).await;
    world.push(&job("b")).await;
    let mut source = world.source();
    let failure = Failure::new(FailureCode::MalformedJob, "no good");
    receive(&mut source).await.settle.settle(Settlement::DeadLetter(failure)).await;
    let delivery = receive(&mut source).await;
    assert_eq!(id(&delivery), "b");
    delivery.settle.settle(Settlement::Ack).await;
    nothing_comes(&mut source).await;
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

async fn a_stop_gives_back_what_was_not_handed_out(world: &impl World) {
    for number in 0..5 {
        world.push(&job(&number.to_string())).await;
    }
    let mut source = world.source();
    let held = receive(&mut source).await;
    soon("the source stops", source.stop()).await;
    assert!(soon("no more", source.receive()).await.unwrap().is_none());
    // While the first is still being worked on, the others are free for another worker.
    let mut other = world.source();
    let mut given_back = Vec::new();
    for _ in 1..5 {
        let delivery = receive(&mut other).await;
        assert_eq!((delivery.attempt, delivery.suspect), (1, false));
        given_back.push(id(&delivery));
        delivery.settle.settle(Settlement::Ack).await;
    }
    given_back.sort();
    assert_eq!(given_back, ["1", "2", "3", "4"]);
    nothing_comes(&mut other).await;
    // What was handed out can still be settled.
    assert!(!held.lost.is_cancelled());
    held.settle.settle(Settlement::Ack).await;
    soon("the source closes", source.close()).await;
    assert!(soon("no more", source.receive()).await.unwrap().is_none());
    nothing_comes(&mut other).await;
    end(other).await;
    assert!(world.take_waiting().await.is_empty());
}

async fn a_stop_before_the_first_job_is_fine(world: &impl World) {
    world.push(&job("a")).await;
    let mut source = world.source();
    soon("the source stops", source.stop()).await;
    assert!(soon("no more", source.receive()).await.unwrap().is_none());
    source.close().await;
    assert_eq!(world.take_waiting().await, [b"a"]);
}

async fn a_call_that_is_dropped_loses_nothing(world: &impl World) {
    const JOBS: usize = 60;
    let mut source = world.source();
    for number in 0..JOBS / 2 {
        world.push(&job(&number.to_string())).await;
    }
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut pushed = JOBS / 2;
    let mut calls = 0;
    let patience = [0, 50, 300, 1_000, 5_000, 200, 0, 700_000].map(Duration::from_micros);
    soon("all came", async {
        while seen.len() < JOBS {
            let wait = patience[calls % patience.len()];
            calls += 1;
            let received = tokio::time::timeout(wait, source.receive()).await;
            if let Ok(delivery) = received {
                let delivery = delivery.unwrap().unwrap();
                *seen.entry(id(&delivery)).or_default() += 1;
                delivery.settle.settle(Settlement::Ack).await;
                if pushed < JOBS {
                    world.push(&job(&pushed.to_string())).await;
                    pushed += 1;
                }
            }
        }
    })
    .await;
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

async fn two_consumers_share_the_queue(world: &impl World) {
    const JOBS: usize = 40;
    let mut sources = [world.source(), world.source()];
    for number in 0..JOBS {
        world.push(&job(&number.to_string())).await;
    }
    let mut seen = Vec::new();
    let [one, two] = &mut sources;
    while seen.len() < JOBS {
        let delivery = tokio::select! {
            delivery = one.receive() => delivery,
            delivery = two.receive() => delivery,
            () = tokio::time::sleep(Duration::from_secs(30)) => panic!("{} came", seen.len()),
        };
        let delivery = delivery.unwrap().unwrap();
        seen.push(id(&delivery));
        delivery.settle.settle(Settlement::Ack).await;
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), JOBS, "one came to both");
    for source in sources {
        end(source).await;
    }
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn a_memory_queue_that_ended_ends_its_sources_once_all_is_settled() {
    let world = Memory::new().await;
    world.push(&job("a")).await;
    let mut source = world.source();
    let delivery = receive(&mut source).await;
    world.queue.end();
    nothing_comes(&mut source).await; // it may come back yet
    delivery.settle.settle(Settlement::Ack).await;
    assert!(soon("the end", source.receive()).await.unwrap().is_none());
}

fn table(headers: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in headers {
        table.insert(ShortString::from(*key), value.clone());
    }
    table
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

#[tokio::test]
async fn amqp_properties_become_the_reply_and_stand_in_for_the_id() {
    let world = Amqp::new().await;
    let properties = BasicProperties::default()
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into())
        .with_reply_to("replies".into())
        .with_headers(table(&[("traceparent", text("00-aa-bb-01"))]));
    let nameless = json!({"images": ["s3://b/k"], "classes": "s"}).to_string();
    world.publish(nameless.as_bytes(), properties.clone()).await;
    world.publish(b"no job", properties.clone()).await;
    world.publish(&job("own"), properties.with_reply_to("".into())).await;
    let mut source = world.source();
    let reply = Reply {
        to: Some("replies".into()),
        correlation_id: Some("c-1".into()),
        traceparent: Some("00-aa-bb-01".into()),
    };
    for (name, reply) in [
        ("m-1", reply.clone()),
        ("m-1", reply.clone()),
        ("own", Reply { to: None, ..reply.clone() }),
    ] {
        let delivery = receive(&mut source).await;
        assert_eq!((id(&delivery).as_str(), &delivery.reply), (name, &reply));
        delivery.settle.settle(Settlement::Ack).await;
    }
    end(source).await;
}

#[tokio::test]
async fn the_amqp_attempt_is_read_whatever_its_width_and_nonsense_counts_as_the_first() {
    let world = Amqp::new().await;
    let values = [
        (AMQPValue::ShortShortUInt(7), 7),
        (AMQPValue::LongInt(7), 7),
        (AMQPValue::LongUInt(7), 7),
        (AMQPValue::LongLongInt(7), 7),
        (AMQPValue::LongInt(0), 1),
        (AMQPValue::LongLongInt(-3), 1),
        (AMQPValue::LongLongInt(1 << 40), 1),
        (text("seven"), 1),
    ];
    let mut source = world.source();
    for (value, expected) in values {
        let headers = table(&[("angler-attempt", value.clone())]);
        world.publish(&job("a"), BasicProperties::default().with_headers(headers)).await;
        let delivery = receive(&mut source).await;
        assert_eq!(delivery.attempt, expected, "{value:?}");
        delivery.settle.settle(Settlement::Ack).await;
    }
    end(source).await;
}

#[tokio::test]
async fn a_dead_letter_lies_in_the_dead_queue_with_why_and_without_the_brokers_record() {
    let world = Amqp::new().await;
    let own = table(&[
        // Nowhere: RabbitMQ would send a copy there.
        ("CC", AMQPValue::FieldArray(vec![text("nowhere")].into())),
        ("traceparent", text("00-aa-bb-01")),
        ("x-first-death-queue", text("made up")),
        ("tenant", text("t")),
    ]);
    let properties = BasicProperties::default()
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into())
        .with_reply_to("replies".into())
        .with_content_type("application/json".into())
        .with_headers(own);
    let body = job("a");
    world.publish(&body, properties).await;
    let mut source = world.source();
    // Over a retry queue, which leaves a record in the headers, and over a redelivery.
    let delivery = receive(&mut source).await;
    let error = "first \u{1f980}".to_owned();
    delivery.settle.settle(Settlement::Retry { delay: SHORT, error }).await;
    receive(&mut source).await.settle.settle(Settlement::Requeue).await;
    let delivery = receive(&mut source).await;
    assert_eq!(delivery.attempt, 2);
    let failure = Failure::new(FailureCode::RetriesExhausted, "attempt 2 was the last: away");
    delivery.settle.settle(Settlement::DeadLetter(failure)).await;

    let dead = world.dead().await;
    assert_eq!(dead.raw, body);
    let headers: BTreeMap<String, AMQPValue> = dead
        .properties
        .headers()
        .as_ref()
        .unwrap()
        .inner()
        .iter()
        .map(|(key, value)| (key.to_string(), value.clone()))
        .collect();
    assert_eq!(headers["angler-reason"], text("retries_exhausted"));
    assert_eq!(headers["angler-attempts"], AMQPValue::LongUInt(2));
    assert_eq!(headers["angler-error"], text("attempt 2 was the last: away"));
    // What the producer said stays; nothing of the broker's own does.
    assert_eq!(headers["tenant"], text("t"));
    assert_eq!(headers["traceparent"], text("00-aa-bb-01"));
    // `x-delivery-count` is written by the broker as it hands a message out, over any other.
    let of_broker = |key: &&String| key.starts_with("x-") && *key != "x-delivery-count";
    let foreign: Vec<&String> = headers.keys().filter(of_broker).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    assert!(!headers.contains_key("CC"));
    let properties = &dead.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    for (property, expected) in [
        (properties.kind(), "classify.v1"),
        (properties.message_id(), "m-1"),
        (properties.correlation_id(), "c-1"),
        (properties.reply_to(), "replies"),
        (properties.content_type(), "application/json"),
    ] {
        assert_eq!(property.as_ref().map(ShortString::as_str), Some(expected));
    }
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn a_suspect_whose_worker_ends_again_and_again_is_given_up_with_a_reason() {
    let world = Amqp::new().await;
    let run = json!({"id": "r", "jobs": 2, "index": 1});
    let body = json!({"id": "a", "images": ["s3://b/k"], "classes": "s", "run": run}).to_string();
    world.push(body.as_bytes()).await;
    for _ in 0..2 {
        let mut source = world.source();
        let held = receive(&mut source).await;
        die(source, [held]).await;
    }
    let mut source = world.source();
    for _ in 0..3 {
        let suspect = receive_suspect(&mut source).await;
        assert_eq!(suspect.job.as_ref().unwrap().id, "a");
        die(source, [suspect]).await;
        source = world.source();
    }
    let given_up = receive_suspect(&mut source).await;
    let unworkable = given_up.job.unwrap_err();
    assert_eq!(unworkable.failure.code, FailureCode::RetriesExhausted);
    assert!(unworkable.failure.message.contains("3 times alone"), "{unworkable:?}");
    assert_eq!((unworkable.id.as_str(), unworkable.run.unwrap().id.as_str()), ("a", "r"));
    given_up.settle.settle(Settlement::DeadLetter(unworkable.failure)).await;
    assert_eq!(world.dead().await.body["id"], "a");
    end(source).await;
}

#[tokio::test]
async fn a_retry_without_a_queue_for_its_delay_goes_back_and_is_not_lost() {
    let world = Amqp::new().await;
    world.push(&job("a")).await;
    let mut source = world.source();
    let nowhere = Settlement::Retry { delay: Duration::from_secs(77), error: "e".into() };
    let began = Instant::now();
    receive(&mut source).await.settle.settle(nowhere).await;
    let delivery = receive(&mut source).await;
    // Counted, and not at once: a job that fails each time ends, and does not spin until then.
    assert_eq!((id(&delivery).as_str(), delivery.attempt), ("a", 2));
    assert!(began.elapsed() > Duration::from_secs(4), "{:?}", began.elapsed());
    delivery.settle.settle(Settlement::Ack).await;
    end(source).await;
}

#[tokio::test]
async fn a_retry_queue_that_was_deleted_is_declared_again() {
    let world = Amqp::new().await;
    world.push(&job("a")).await;
    let mut source = world.source();
    let delivery = receive(&mut source).await;
    let queue = world.topology.retry_queue(SHORT);
    let path = format!("queues/{}/{queue}", world.broker.vhost);
    world.broker.manage("DELETE", &path, None);
    delivery.settle.settle(Settlement::Retry { delay: SHORT, error: "e".into() }).await;
    let delivery = receive(&mut source).await;
    assert_eq!((id(&delivery).as_str(), delivery.attempt), ("a", 2));
    delivery.settle.settle(Settlement::Ack).await;
    assert_eq!(world.broker.queue(&queue)["type"], "quorum");
    end(source).await;
}

#[tokio::test]
async fn what_a_full_queue_does_not_take_back_is_handed_back_to_its_head() {
    let world = Amqp::new().await;
    for name in ["a", "b", "c"] {
        world.push(&job(name)).await;
    }
    let mut source = world.source();
    let held = receive(&mut source).await;
    assert_eq!(id(&held), "a");
    // Whatever is published to it is nacked.
    let full = json!({
        "pattern": "^angler.jobs$", "apply-to": "queues", "definition": {"max-length": 0},
    });
    let path = format!("policies/{}/full", world.broker.vhost);
    world.broker.manage("PUT", &path, Some(&full.to_string()));
    eventually("the queue is full", async || {
        (world.broker.queue("angler.jobs")["policy"] == "full").then_some(())
    })
    .await;
    soon("the source pauses", source.pause("it is told to")).await;
    soon("one is given back", held.settle.settle(Settlement::Requeue)).await;
    // While the first source keeps its connection.
    let mut other = world.source();
    let mut names = Vec::new();
    for _ in 0..3 {
        let delivery = receive_any(&mut other).await;
        names.push(id(&delivery));
        delivery.settle.settle(Settlement::Ack).await;
    }
    names.sort();
    assert_eq!(names, ["a", "b", "c"]);
    end(other).await;
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn headers_of_ours_fit_into_small_frames_as_well() {
    let world = Amqp::new().await;
    let url = format!("{}?frame_max=8192", world.broker.url);
    let options = AmqpOptions { url: url.clone(), ..Amqp::options(&world.broker) };
    let publisher = Arc::new(Publisher::new(options, world.topology.clone()));
    let world = Amqp { publisher, ..world };
    let headers = table(&[("tenant", text(&"t".repeat(500))), ("large", text(&"l".repeat(6_000)))]);
    let properties = BasicProperties::default().with_headers(headers);
    world.publish(&job("a"), properties).await;
    let mut source = world.source_at(&url, 10);
    let error = "\u{1f980}".repeat(1_000);
    let retry = Settlement::Retry { delay: SHORT, error: error.clone() };
    receive(&mut source).await.settle.settle(retry).await;
    let failure = Failure::new(FailureCode::RetriesExhausted, error);
    let settled = receive(&mut source).await.settle.settle(Settlement::DeadLetter(failure));
    soon("the job is given up", settled).await;
    let dead = world.dead().await;
    assert_eq!(dead.header("tenant").unwrap().len(), 500);
    assert!(dead.header("large").is_none());
    assert!(dead.header("angler-error").unwrap().starts_with("\u{1f980}"));
    end(source).await;
}

#[tokio::test]
async fn a_retry_that_the_broker_refuses_for_its_size_can_be_settled_otherwise() {
    let server = Server::rabbitmq("");
    let world = Amqp::on(Broker::of(&server)).await;
    let body = [job("a"), vec![b' '; 5_000]].concat();
    world.push(&body).await;
    // Two places: until 4.0, and from then on.
    server.ctl(&[
        "eval",
        "application:set_env(rabbit, max_message_size, 3000), \
         persistent_term:put(max_message_size, 3000).",
    ]);
    let mut source = world.source();
    let retry = Settlement::Retry { delay: SHORT, error: "e".into() };
    let unsettled = receive(&mut source).await.settle.settle(retry).await.unwrap();
    assert!(unsettled.reason.contains("3000"), "{}", unsettled.reason);
    let failure = Failure::new(FailureCode::RetriesExhausted, unsettled.reason);
    assert!(unsettled.settle.settle(Settlement::DeadLetter(failure)).await.is_none());
    // A letter that cannot be published is left to the broker, which hands it to the queue of what it
    // gave up. A source leads it on to the dead letters while it waits for jobs.
    let dead = tokio::select! {
        dead = world.dead() => dead,
        _ = source.receive() => panic!("it has its result"),
    };
    assert_eq!(dead.raw, body);
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn calls_that_are_dropped_leave_no_connection_behind() {
    let world = Amqp::new().await;
    let mut source = world.source();
    world.push(&job("a")).await;
    // Given up at every stage of connecting.
    for micros in (0..60_000).step_by(1_500) {
        let given_up = tokio::time::timeout(Duration::from_micros(micros), source.receive()).await;
        if let Ok(delivery) = given_up {
            delivery.unwrap().unwrap().settle.settle(Settlement::Requeue).await;
            break;
        }
    }
    let delivery = receive(&mut source).await;
    assert_eq!(id(&delivery), "a");
    world.publisher.close().await;
    world.settled_on(&["angler consume conformance"]).await;
    delivery.settle.settle(Settlement::Ack).await;
    end(source).await;
}

#[tokio::test]
async fn a_stop_while_connecting_leaves_no_consumer_behind() {
    let world = Amqp::new().await;
    world.push(&job("a")).await;
    for millis in [0, 2, 10, 30, 60, 90] {
        let mut source = world.source();
        let wait = Duration::from_millis(millis);
        if let Ok(delivery) = tokio::time::timeout(wait, source.receive()).await {
            delivery.unwrap().unwrap().settle.settle(Settlement::Requeue).await;
        }
        end(source).await;
    }
    let mut source = world.source();
    receive_any(&mut source).await.settle.settle(Settlement::Ack).await;
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn a_publish_that_is_dropped_leaves_no_connection_behind() {
    let world = Amqp::new().await;
    let publisher = world.publisher();
    let properties = BasicProperties::default();
    for micros in (0..60_000).step_by(1_500) {
        let wait = Duration::from_micros(micros);
        let publish = publisher.publish("angler.results", &properties, b"{}");
        let _ = tokio::time::timeout(wait, publish).await;
    }
    let publish = publisher.publish("angler.results", &properties, b"{}");
    assert_eq!(soon("a confirm", publish).await, Published::Confirmed);
    world.settled_on(&["angler publish conformance"]).await;
    publisher.close().await;
    world.settled_on(&[]).await;
}

#[tokio::test]
async fn deliveries_of_a_connection_that_is_cut_are_lost_and_come_again() {
    let world = Amqp::new().await;
    for name in ["a", "b"] {
        world.push(&job(name)).await;
    }
    let mut source = world.source();
    let held = receive(&mut source).await;
    assert_eq!(id(&held), "a");
    let connection = eventually("the connection is listed", async || {
        let all = world.broker.connections();
        all.into_iter().find(|c| c.1 == "angler consume conformance").map(|c| c.0)
    })
    .await;
    world.broker.cut(&connection);
    soon("the delivery is known to be lost", held.lost.cancelled()).await;
    // Too late, and no harm.
    soon("settled", held.settle.settle(Settlement::Ack)).await;
    let mut again = Vec::new();
    while again.len() < 2 {
        // What was prefetched on the old connection may still be handed out; it is lost too.
        let delivery = receive_any(&mut source).await;
        if !delivery.lost.is_cancelled() {
            assert!(!delivery.suspect, "no worker has died");
            again.push(id(&delivery));
            delivery.settle.settle(Settlement::Ack).await;
        }
    }
    again.sort();
    assert_eq!(again, ["a", "b"]);
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

#[tokio::test]
async fn the_prefetch_follows_the_rate_of_jobs() {
    const JOBS: u32 = 1100;
    const MOST: u16 = 1000;
    let world = Amqp::new().await;
    for number in 0..JOBS {
        world.push(&job(&number.to_string())).await;
    }
    // A job that is given back is there twice for a moment.
    let held = async || JOBS.saturating_sub(world.ready().await);
    let mut source = world.source_at(&world.broker.url, MOST);
    let slow = receive(&mut source).await;
    eventually("all that the setting allows is held", async || {
        (held().await == u32::from(MOST)).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let next = receive(&mut source).await;
    eventually("what takes more than a minute at this rate is given back", async || {
        (50..=u32::from(MOST) / 2).contains(&held().await).then_some(())
    })
    .await;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for delivery in [slow, next] {
        *seen.entry(id(&delivery)).or_default() += 1;
        delivery.settle.settle(Settlement::Ack).await;
    }
    // Fast ones now. The prefetch grows once it has stayed for ten seconds.
    let mut grown = false;
    while seen.len() < JOBS as usize {
        let delivery = receive(&mut source).await;
        assert_eq!((delivery.attempt, delivery.suspect), (1, false));
        *seen.entry(id(&delivery)).or_default() += 1;
        delivery.settle.settle(Settlement::Ack).await;
        if seen.len() == 50 {
            tokio::time::sleep(Duration::from_secs(11)).await;
        }
        let left = JOBS - u32::try_from(seen.len()).unwrap();
        grown = grown || (left > 600 && world.ready().await < left - 600);
    }
    assert!(grown, "it grew");
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    end(source).await;
    assert!(world.take_waiting().await.is_empty());
}

/// A source that has the turn, with one suspect in its queue.
async fn with_a_suspect(world: &Amqp, url: &str) -> Box<dyn JobSource> {
    let properties = BasicProperties::default();
    world.client.publish("angler.suspects", &job("suspect"), properties).await;
    let mut source = world.source_at(url, 10);
    let mut waiting = source.suspects().unwrap();
    let turn = async {
        // Suspects may be seen a moment before the source has its connection.
        while !source.take_turn().await {
            tokio::select! {
                other = source.receive() => panic!("{} came", id(&other.unwrap().unwrap())),
                waits = waiting.wait_for(|waits| *waits) => drop(waits.unwrap()),
            }
        }
    };
    soon("the turn", turn).await;
    source
}

#[tokio::test]
async fn a_suspect_that_the_broker_hands_out_too_late_is_not_lost() {
    let world = Amqp::new().await;
    let proxy = Proxy::new(&world.broker.address()).await;
    let url = world.broker.url_through(&proxy.address(), 60);
    let mut source = with_a_suspect(&world, &url).await;
    proxy.fault(Fault { black_hole: true, ..Fault::default() });
    let received = soon("an answer", source.receive_suspect()).await.unwrap();
    assert!(received.is_none(), "nothing passes");
    proxy.heal();
    // On the same connection: nobody waited for it, so it went back.
    let suspect = receive_any(&mut source).await;
    assert_eq!((id(&suspect).as_str(), proxy.accepted()), ("suspect", 1));
    suspect.settle.settle(Settlement::Ack).await;
    end(source).await;
    assert!(world.client.get("angler.suspects").await.is_none());
}

#[tokio::test]
async fn no_suspect_is_taken_on_a_connection_that_has_lost_its_consumer() {
    let server = Server::rabbitmq("consumer_timeout = 3000\n");
    let world = Amqp::on(Broker::of(&server)).await;
    let mut source = with_a_suspect(&world, &world.broker.url).await;
    world.push(&job("kept")).await;
    let kept = receive(&mut source).await;
    soon("the broker closes the consumer's channel", kept.lost.cancelled()).await;
    // Each one would be let go at once, and the broker counts that.
    for _ in 0..10 {
        assert!(source.receive_suspect().await.unwrap().is_none());
    }
    drop(kept);
    let mut came = Vec::new();
    while came.len() < 2 {
        let delivery = receive_any(&mut source).await;
        assert!(!delivery.lost.is_cancelled());
        came.push(id(&delivery));
        delivery.settle.settle(Settlement::Ack).await;
    }
    came.sort();
    assert_eq!(came, ["kept", "suspect"]);
    end(source).await;
}
