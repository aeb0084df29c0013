//! The jobs, what must come of each, and what did.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::support::tiny;

const REPLIES: &str = "soak.replies";
const SILENCE: Duration = Duration::from_secs(5);

/// A seeded stream of jobs.
pub struct Load {
    random: fastrand::Rng,
    images: Vec<String>,
    number: usize,
}

impl Load {
    pub fn new(seed: u64, images: Vec<String>) -> Self {
        Self { random: fastrand::Rng::with_seed(seed ^ 0x10ad), images, number: 0 }
    }

    /// The next job, the queue that it wants its result in, and what must come of it.
    fn next(&mut self) -> (Value, Option<&'static str>, Value) {
        let id = format!("soak/{}", self.number);
        self.number += 1;
        let mut uris = Vec::new();
        let mut entries = Vec::new();
        for _ in 0..self.random.usize(1..=5) {
            let pick = self.random.usize(0..8);
            if pick == 7 {
                uris.push("s3://soak/no-such-object.png".to_owned());
                entries.push(json!("not_found"));
            } else {
                uris.push(self.images[pick % 3].clone());
                entries.push(json!(tiny::LABELS[pick % 3]));
            }
        }
        let mut job = json!({"id": id, "images": uris, "classes": "colours"});
        let mut outcome = json!(entries);
        let mut reply = None;
        match self.random.usize(0..20) {
            0 => {
                job.as_object_mut().unwrap().remove("images");
                outcome = json!("malformed_job");
            }
            1 => {
                job["classes"] = json!("colours@404");
                outcome = json!("unknown_version");
            }
            2 => reply = Some("no.such.queue"),
            3..8 => reply = Some(REPLIES),
            8..12 => job["classes"] = json!("colours@1"),
            _ => {}
        }
        (job, reply, outcome)
    }
}

/// What must come of each job that was published, and what came.
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    expected: BTreeMap<String, Value>,
    first: BTreeMap<String, Value>,
    duplicates: usize,
    wrong: Vec<String>,
    last: Option<Instant>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "printed")]
pub struct Summary {
    pub published: usize,
    pub done: usize,
    pub failed: usize,
    pub duplicates: usize,
    pub highest_attempt: u64,
}

impl Ledger {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// When the last result came.
    pub fn last(&self) -> Option<Instant> {
        self.state().last
    }

    /// Jobs without an outcome.
    pub fn missing(&self) -> Vec<String> {
        let state = self.state();
        state.expected.keys().filter(|id| !state.first.contains_key(*id)).cloned().collect()
    }

    /// What came otherwise than it must, in words.
    pub fn wrong(&self) -> Vec<String> {
        self.state().wrong.clone()
    }

    pub fn summary(&self) -> Summary {
        let state = self.state();
        let done = state.first.values().filter(|result| result["status"] == "done").count();
        let attempts = state.first.values().filter_map(|result| result["attempt"].as_u64());
        Summary {
            published: state.expected.len(),
            done,
            failed: state.first.len() - done,
            duplicates: state.duplicates,
            highest_attempt: attempts.max().unwrap_or(0),
        }
    }

    fn take(&self, result: Value) {
        let mut state = self.state();
        state.last = Some(Instant::now());
        let id = result["id"].as_str().unwrap_or_default().to_owned();
        let Some(expected) = state.expected.get(&id) else {
            return state.wrong.push(format!("a result of what was never sent: {result}"));
        };
        if outcome(&result) != *expected {
            let wrong = format!("{result} instead of {expected}");
            state.wrong.push(wrong);
        }
        match state.first.get(&id) {
            None => drop(state.first.insert(id, result)),
            Some(first) => {
                if essence(first) != essence(&result) {
                    let wrong = format!("{first}, and then {result}");
                    state.wrong.push(wrong);
                }
                state.duplicates += 1;
            }
        }
    }
}

/// Labels or error codes, or the code of the whole.
fn outcome(result: &Value) -> Value {
    match result["images"].as_array() {
        Some(images) => {
            images
                .iter()
                .map(|image| {
                    if image["label"].is_null() { &image["error"]["code"] } else { &image["label"] }
                })
                .cloned()
                .collect()
        }
        None => result["error"]["code"].clone(),
    }
}

/// What two results of one job share.
fn essence(result: &Value) -> Value {
    let mut essence = result.clone();
    for key in ["attempt", "worker", "finished_at"] {
        essence.as_object_mut().unwrap().remove(key);
    }
    essence
}

/// The queue that some jobs want their results in.
pub async fn declare_replies(url: &str) {
    let channel = channel(url).await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(REPLIES.into(), durable, arguments).await.unwrap();
}

async fn channel(url: &str) -> Result<Channel, lapin::Error> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    // It lives with its channel.
    tokio::spawn(async move {
        while connection.status().connected() {
            sleep(Duration::from_millis(200)).await;
        }
    });
    Ok(channel)
}

/// Publishes jobs at a pace, each until it is confirmed.
pub async fn produce(
    url: String,
    mut load: Load,
    pace: Duration,
    ledger: Arc<Ledger>,
    stop: CancellationToken,
) {
    let mut pace = interval(pace);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut open = None;
    while stop.run_until_cancelled(pace.tick()).await.is_some() {
        let (job, reply, outcome) = load.next();
        let id = job["id"].as_str().unwrap().to_owned();
        ledger.state().expected.insert(id, outcome);
        let properties = BasicProperties::default().with_delivery_mode(2);
        let properties = match reply {
            Some(queue) => properties.with_reply_to(queue.into()),
            None => properties,
        };
        let body = job.to_string();
        loop {
            if open.is_none() {
                open = timeout(SILENCE, channel(&url)).await.ok().and_then(Result::ok);
            }
            let Some(channel) = &open else {
                sleep(Duration::from_millis(200)).await;
                continue;
            };
            match timeout(SILENCE, publish(channel, body.as_bytes(), &properties)).await {
                Ok(Ok(true)) => break,
                _ => open = None,
            }
        }
    }
}

async fn publish(
    channel: &Channel,
    body: &[u8],
    properties: &BasicProperties,
) -> Result<bool, lapin::Error> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let published =
        channel.basic_publish("".into(), "angler.jobs".into(), options, body, properties.clone());
    Ok(matches!(published.await?.await?, Confirmation::Ack(None)))
}

/// Takes results from both queues until it is stopped.
pub async fn collect(url: String, ledger: Arc<Ledger>, stop: CancellationToken) {
    let forever = async {
        loop {
            if let Ok(Ok(channel)) = timeout(SILENCE, channel(&url)).await {
                let _ = consume(&channel, &ledger).await;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    stop.run_until_cancelled(forever).await;
}

async fn consume(channel: &Channel, ledger: &Ledger) -> Result<(), lapin::Error> {
    let mut consumers = Vec::new();
    for queue in ["angler.results", REPLIES] {
        let options = BasicConsumeOptions::default();
        let tag = queue.into();
        consumers
            .push(channel.basic_consume(queue.into(), tag, options, FieldTable::default()).await?);
    }
    let mut all = futures_util::stream::select_all(consumers);
    while let Some(delivery) = all.next().await {
        let delivery = delivery?;
        ledger.take(serde_json::from_slice(&delivery.data).unwrap());
        delivery.acker.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}
