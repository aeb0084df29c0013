//! Jobs at a pace, through whichever node works, and what comes of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use angler_amqp::{AmqpOptions, connect};

use crate::support::tiny;

/// How long a broker may be silent before a client turns to another node.
const SILENCE: Duration = Duration::from_secs(5);

/// What was published, and what came of it.
#[derive(Default)]
pub struct Outcomes(Mutex<State>);

#[derive(Default)]
struct State {
    published: Vec<String>,
    first: BTreeMap<String, Value>,
    duplicates: usize,
    wrong: Vec<String>,
    /// Results of runs, which belong into the runs' queues.
    strays: Vec<String>,
    last: Option<Instant>,
    /// The longest time without a result since it was last asked for.
    gap: Duration,
}

impl Outcomes {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Begins to look for the longest time without a result.
    pub fn watch(&self) {
        let mut state = self.state();
        (state.gap, state.last) = (Duration::ZERO, Some(Instant::now()));
    }

    /// The longest time without a result since [`Self::watch`].
    pub fn gap(&self) -> Duration {
        let state = self.state();
        let open = state.last.map(|last| last.elapsed()).unwrap_or_default();
        state.gap.max(open)
    }

    /// When the last result came.
    pub fn last(&self) -> Option<Instant> {
        self.state().last
    }

    /// Jobs without a result.
    pub fn missing(&self) -> Vec<String> {
        let state = self.state();
        state.published.iter().filter(|id| !state.first.contains_key(*id)).cloned().collect()
    }

    /// What came otherwise than it must.
    pub fn wrong(&self) -> Vec<String> {
        self.state().wrong.clone()
    }

    /// Jobs of runs whose results came to the common queue.
    pub fn strays(&self) -> Vec<String> {
        self.state().strays.clone()
    }

    /// Jobs, and second results.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.published.len(), state.duplicates)
    }

    fn take(&self, result: Value) {
        let mut state = self.state();
        if let Some(last) = state.last.replace(Instant::now()) {
            state.gap = state.gap.max(last.elapsed());
        }
        let id = result["id"].as_str().unwrap_or_default().to_owned();
        if !id.starts_with("load/") {
            return state.strays.push(id);
        }
        let labels = result["images"].as_array().map(|images| {
            images.iter().filter_map(|image| image["label"].as_str()).collect::<Vec<_>>()
        });
        if labels.as_deref() != Some(&tiny::LABELS) {
            state.wrong.push(result.to_string());
        }
        if state.first.insert(id, result).is_some() {
            state.duplicates += 1;
        }
    }
}

/// A connection that is kept with its channel.
struct Open {
    channel: Channel,
    _connection: Connection,
}

async fn open(options: &AmqpOptions) -> Option<Open> {
    let opening = async {
        let connection = connect(options, "load").await.ok()?;
        let channel = connection.create_channel().await.ok()?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.ok()?;
        Some(Open { channel, _connection: connection })
    };
    timeout(3 * SILENCE, opening).await.ok()?
}

/// Publishes jobs at a pace, each until it is confirmed.
pub async fn produce(
    options: AmqpOptions,
    images: &[String],
    pace: Duration,
    outcomes: &Outcomes,
    stop: CancellationToken,
) {
    let mut pace = interval(pace);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut live = None;
    while stop.run_until_cancelled(pace.tick()).await.is_some() {
        let id = format!("load/{}", outcomes.counts().0);
        let job = json!({"id": id, "images": images, "classes": "colours@1"}).to_string();
        outcomes.state().published.push(id);
        loop {
            if live.is_none() {
                live = open(&options).await;
            }
            if let Some(Open { channel, .. }) = &live
                && timeout(SILENCE, publish(channel, job.as_bytes())).await == Ok(Some(()))
            {
                break;
            }
            live = None;
            sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn publish(channel: &Channel, job: &[u8]) -> Option<()> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let properties = BasicProperties::default().with_delivery_mode(2);
    let publishing =
        channel.basic_publish("".into(), "angler.jobs".into(), options, job, properties);
    let confirm = publishing.await.ok()?.await.ok()?;
    matches!(confirm, Confirmation::Ack(None)).then_some(())
}

/// Takes results until it is stopped.
pub async fn collect(options: AmqpOptions, outcomes: &Outcomes, stop: CancellationToken) {
    let forever = async {
        loop {
            if let Some(live) = open(&options).await {
                let _ = consume(&live.channel, outcomes).await;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    stop.run_until_cancelled(forever).await;
}

async fn consume(channel: &Channel, outcomes: &Outcomes) -> Result<(), lapin::Error> {
    let options = BasicConsumeOptions::default();
    let queue = "angler.results".into();
    let consuming = channel.basic_consume(queue, "load".into(), options, FieldTable::default());
    let mut consumer = consuming.await?;
    while let Some(delivery) = consumer.next().await {
        let delivery = delivery?;
        outcomes.take(serde_json::from_slice(&delivery.data).unwrap());
        delivery.acker.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}
