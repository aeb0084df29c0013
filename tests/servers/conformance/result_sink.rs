//! What every [`ResultSink`] does.

use std::io::Write;
use std::sync::{Arc, Mutex};

use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Confirmation};
use serde_json::Value;
use tokio::task::JoinSet;

use angler_amqp::sink::AmqpSink;
use angler_core::sink::ResultSink;
use angler_core::sink::jsonl::JsonLinesSink;
use angler_core::source::Reply;
use angler_wire::error::{Failure, FailureCode, ImageError, ImageErrorCode};
use angler_wire::job::{
    Classified, Embedding, ImageEntry, JobResult, LabelScore, Outcome, Provenance, Run, Verdict,
};

use super::job_source::Amqp;
use super::soon;
use crate::support::Received;

/// A sink, and what its readers see.
pub trait World {
    fn sink(&self) -> Arc<dyn ResultSink>;
    /// What was written, once this many pieces are there; more are a failure.
    async fn written(&self, count: usize) -> Vec<Value>;
    /// The pieces that a result makes.
    fn pieces(&self, result: &JobResult) -> Vec<Value>;
    /// Whether the pieces lie there in the order of the jobs.
    fn keeps_order(&self) -> bool;
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Lines {
    written: Shared,
    sink: Arc<JsonLinesSink>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Lines {
    async fn new() -> Self {
        let written = Shared::default();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let observed = Arc::clone(&seen);
        let sink = JsonLinesSink::new(
            Some(Box::new(written.clone())),
            Box::new(move |entry| observed.lock().unwrap().push(entry.uri.clone())),
        );
        Self { written, sink: Arc::new(sink), seen }
    }
}

impl World for Lines {
    fn sink(&self) -> Arc<dyn ResultSink> {
        self.sink.clone()
    }

    async fn written(&self, count: usize) -> Vec<Value> {
        self.sink.flush().unwrap();
        let text = String::from_utf8(self.written.0.lock().unwrap().clone()).unwrap();
        assert!(text.ends_with('\n'));
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), count);
        let uris: Vec<&str> = lines.iter().map(|line| line["uri"].as_str().unwrap()).collect();
        assert_eq!(*self.seen.lock().unwrap(), uris, "the observer saw something else");
        lines
    }

    /// A line is an image's entry with what classified it beside.
    fn pieces(&self, result: &JobResult) -> Vec<Value> {
        let whole = json(result);
        let line = |entry: &Value| {
            let mut line = entry.clone();
            for key in ["classes", "model", "backend"] {
                line[key] = whole[key].clone();
            }
            line
        };
        whole["images"].as_array().unwrap().iter().map(line).collect()
    }

    fn keeps_order(&self) -> bool {
        true
    }
}

impl World for Amqp {
    fn sink(&self) -> Arc<dyn ResultSink> {
        Arc::new(AmqpSink::new(self.publisher(), "angler.results".into(), vec![]))
    }

    async fn written(&self, count: usize) -> Vec<Value> {
        let mut results = Vec::new();
        while let Some(message) = self.client().get("angler.results").await {
            results.push(message.body);
        }
        assert_eq!(results.len(), count);
        results
    }

    fn pieces(&self, result: &JobResult) -> Vec<Value> {
        vec![json(result)]
    }

    /// A queue keeps the order in which results are published, not that of the jobs.
    fn keeps_order(&self) -> bool {
        false
    }
}

macro_rules! result_sink {
    ($adapter:ident, $world:expr) => {
        suite!(
            $adapter,
            $world,
            [results_published_at_once_arrive_whole_and_once, a_published_result_is_there]
        );
    };
}

result_sink!(json_lines, super::Lines::new());
result_sink!(amqp, super::Amqp::new());

/// What a reader makes of a result. Read back from its text, since there 0.1 stands for an f32 that
/// is another number as an f64.
fn json(result: &JobResult) -> Value {
    serde_json::from_str(&serde_json::to_string(result).unwrap()).unwrap()
}

fn result(index: u64, images: usize) -> JobResult {
    let classified = |n: usize| Classified {
        label: (!n.is_multiple_of(3)).then(|| format!("label \"{n}\"\n\u{1f980}")),
        score: n as f32 / 1000.0 - 0.1234,
        margin: None,
        top: vec![
            LabelScore { label: format!("label {n}"), score: 0.831_2 },
            LabelScore { label: String::new(), score: -1.0 },
        ],
        embedding: n.is_multiple_of(2).then(|| Embedding(vec![n as f32; 100])),
    };
    let entry = |n: usize| ImageEntry {
        uri: format!("s3://photos/{index}/{n} ü.jpg"),
        id: (n % 2 == 1).then(|| format!("sku-{n}")),
        verdict: if n % 5 == 4 {
            Verdict::Failed { error: ImageError::new(ImageErrorCode::CorruptImage, "torn, \"so\"") }
        } else {
            Verdict::Labelled(classified(n))
        },
    };
    JobResult {
        id: format!("run/{index:06}"),
        outcome: Outcome::Done {
            provenance: Provenance {
                classes: "bottles@7".into(),
                model: "m@0123456789ab".into(),
                backend: "fake".into(),
            },
            images: (0..images).map(entry).collect(),
        },
        run: Some(Run { id: "run".into(), jobs: 200, index, nonce: None }),
        attempt: 1,
        worker: "w".into(),
        finished_at: "2026-01-31T12:00:00.000Z".into(),
    }
}

async fn results_published_at_once_arrive_whole_and_once(world: &impl World) {
    // Some are larger than a frame of AMQP's (128 KiB), so that frames of many could mix.
    let results: Vec<JobResult> =
        (0..200).map(|n| result(n, if n % 25 == 7 { 600 } else { 1 + n as usize % 7 })).collect();
    assert!(json(&results[7]).to_string().len() > 200_000);
    let sink = world.sink();
    let mut publishing = JoinSet::new();
    // The last first: what ends first is not what was first.
    for result in results.iter().rev() {
        let (sink, result) = (Arc::clone(&sink), result.clone());
        publishing.spawn(async move { sink.publish(&result, &Reply::default()).await });
    }
    for published in soon("all are confirmed", publishing.join_all()).await {
        published.unwrap();
    }
    let mut expected: Vec<Value> = results.iter().flat_map(|r| world.pieces(r)).collect();
    let mut written = world.written(expected.len()).await;
    if !world.keeps_order() {
        for list in [&mut expected, &mut written] {
            list.sort_by_key(|piece| piece["id"].as_str().map(str::to_owned));
        }
    }
    for (written, expected) in written.iter().zip(&expected) {
        assert!(written == expected, "{written}\nwas published as\n{expected}");
    }
}

async fn a_published_result_is_there(world: &impl World) {
    let sink = world.sink();
    let mut expected = 0;
    for index in 0..5 {
        let result = result(index, 2);
        soon("it is confirmed", sink.publish(&result, &Reply::default())).await.unwrap();
        // With the return, not some time after it.
        if !world.keeps_order() {
            expected = 0; // a queue's reader takes what it reads
        }
        expected += world.pieces(&result).len();
        let written = world.written(expected).await;
        assert_eq!(written[expected - 1], *world.pieces(&result).last().unwrap());
    }
}

fn reply(to: Option<&str>, correlation_id: Option<&str>) -> Reply {
    Reply {
        to: to.map(Into::into),
        correlation_id: correlation_id.map(Into::into),
        traceparent: None,
    }
}

async fn get(world: &Amqp, queue: &str) -> Received {
    let message = world.client().get(queue).await;
    let message = message.unwrap_or_else(|| panic!("{queue} is empty"));
    assert!(world.client().get(queue).await.is_none(), "{queue} has a second one");
    message
}

#[tokio::test]
async fn amqp_results_carry_the_properties_of_the_contract() {
    let world = Amqp::new().await;
    let sink = world.sink();
    let long = "ü".repeat(200); // as long as an id may be, and 400 bytes
    for (id, correlation_id, expected) in [
        ("run/000001", None, "run/000001"),
        ("run/000001", Some("c-1"), "c-1"),
        (long.as_str(), None, &long[..254]), // what a short string of AMQP's can hold
    ] {
        let result = JobResult { id: id.into(), ..result(1, 1) };
        let traceparent = Some("00-aa-bb-01".to_owned());
        let reply = Reply { traceparent, ..reply(None, correlation_id) };
        sink.publish(&result, &reply).await.unwrap();
        let message = get(&world, "angler.results").await;
        assert_eq!(message.body, json(&result));
        let properties = &message.properties;
        assert_eq!(*properties.delivery_mode(), Some(2));
        let id: String = if id.len() > 255 { expected.into() } else { id.into() };
        for (property, expected) in [
            (properties.kind(), "classify.result.v1"),
            (properties.content_type(), "application/json"),
            (properties.message_id(), &id),
            (properties.correlation_id(), expected),
        ] {
            assert_eq!(property.as_ref().map(ShortString::as_str), Some(expected));
        }
        assert_eq!(message.header("traceparent").as_deref(), Some("00-aa-bb-01"));
    }
}

#[tokio::test]
async fn amqp_results_that_failed_are_published_like_others() {
    let world = Amqp::new().await;
    let error = Failure::new(FailureCode::UnknownClassSet, "class set \"x\" is unknown");
    let result = JobResult { outcome: Outcome::Failed { error }, ..result(1, 0) };
    world.sink().publish(&result, &reply(None, None)).await.unwrap();
    let message = get(&world, "angler.results").await;
    assert_eq!(message.body, json(&result));
    assert_eq!(message.body["status"], "failed");
    assert_eq!(message.body["error"]["code"], "unknown_class_set");
}

#[tokio::test]
async fn amqp_results_go_to_the_queue_that_the_job_names() {
    let world = Amqp::new().await;
    world.client().private_queue("replies").await;
    world.sink().publish(&result(1, 1), &reply(Some("replies"), Some("c-1"))).await.unwrap();
    let message = get(&world, "replies").await;
    assert_eq!(message.body, json(&result(1, 1)));
    assert_eq!(message.properties.correlation_id().as_ref().unwrap().as_str(), "c-1");
    assert!(world.client().get("angler.results").await.is_none());
}

#[tokio::test]
async fn amqp_results_for_a_queue_that_is_not_there_are_kept_with_its_name() {
    let world = Amqp::new().await;
    let sink = world.sink();
    // Many at once: a message that is returned must not be taken for another's.
    let gone = reply(Some("gone"), None);
    let mut publishing = JoinSet::new();
    for index in 0..40 {
        let (sink, gone) = (Arc::clone(&sink), gone.clone());
        let to = if index % 2 == 0 { gone } else { Reply::default() };
        publishing.spawn(async move { sink.publish(&result(index, 1), &to).await });
    }
    for published in soon("all are confirmed", publishing.join_all()).await {
        published.unwrap();
    }
    let mut seen = Vec::new();
    while let Some(message) = world.client().get("angler.results").await {
        let index = message.body["run"]["index"].as_u64().unwrap();
        let note = message.header("angler-reply-to-unroutable");
        assert_eq!(note.as_deref(), (index % 2 == 0).then_some("gone"), "{index}");
        assert!(message.header("angler-reply-to-refused").is_none());
        seen.push(index);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
}

/// A bounded quorum queue that is full.
async fn full_queue(world: &Amqp, name: &str) {
    let mut arguments = FieldTable::default();
    for (key, value) in [("x-queue-type", "quorum"), ("x-overflow", "reject-publish")] {
        arguments.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let channel = &world.client().channel;
    channel.queue_declare(name.into(), durable, arguments).await.unwrap();
    // It notices a little late that it is full.
    loop {
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default();
        let sent = channel.basic_publish("".into(), name.into(), options, b"full", properties);
        if matches!(sent.await.unwrap().await.unwrap(), Confirmation::Nack(_)) {
            return;
        }
    }
}

#[tokio::test]
async fn amqp_results_of_a_run_wait_for_its_queue_where_others_do_not() {
    let world = Amqp::new().await;
    let queue = "angler.run.nightly@4f1d09a3c2be";
    full_queue(&world, queue).await;
    let sink = AmqpSink::new(world.publisher(), "angler.results".into(), vec![])
        .with_runs_of("angler.jobs");
    let to = reply(Some(queue), None);
    // Somebody else's result is given up, and from then on the queue is known to refuse.
    sink.publish(&result(1, 1), &to).await.unwrap();
    let diverted = get(&world, "angler.results").await;
    assert_eq!(diverted.header("angler-reply-to-refused").as_deref(), Some(queue));
    let mut own = result(2, 1);
    let nonce = Some("4f1d09a3c2be".to_owned());
    own.run = Some(Run { id: "nightly".into(), jobs: 9, index: 2, nonce });
    let expected = json(&own);
    let publishing = tokio::spawn(async move { sink.publish(&own, &to).await });
    // There is room once the queue is emptied.
    let arrived = async {
        loop {
            match world.client().get(queue).await {
                Some(message) if message.raw != b"full" => return message,
                Some(_) => {}
                None => tokio::task::yield_now().await,
            }
        }
    };
    assert_eq!(soon("the result is in its queue", arrived).await.body, expected);
    soon("it is confirmed", publishing).await.unwrap().unwrap();
    assert!(world.client().get("angler.results").await.is_none());
}

#[tokio::test]
async fn amqp_results_for_a_queue_that_is_not_allowed_are_kept_with_its_name() {
    let world = Amqp::new().await;
    world.client().private_queue("replies.a").await;
    world.client().private_queue("secret").await;
    let sink = AmqpSink::new(
        world.publisher(),
        "angler.results".into(),
        vec!["replies.*".into(), "one".into()],
    );
    sink.publish(&result(1, 1), &reply(Some("replies.a"), None)).await.unwrap();
    assert_eq!(get(&world, "replies.a").await.body, json(&result(1, 1)));
    for refused in ["secret", "angler.jobs", "replies", "xreplies.a"] {
        sink.publish(&result(2, 1), &reply(Some(refused), None)).await.unwrap();
        let message = get(&world, "angler.results").await;
        assert_eq!(message.header("angler-reply-to-refused").as_deref(), Some(refused));
        assert!(message.header("angler-reply-to-unroutable").is_none());
    }
    for queue in ["secret", "angler.jobs"] {
        assert!(world.client().get(queue).await.is_none(), "{queue}");
    }
}
