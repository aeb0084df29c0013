//! How a delivery from RabbitMQ is settled: published where it goes next and confirmed there, then
//! acked.
//!
//! Where a delivery cannot be published in time, or ever, it is handed back to the broker instead: it
//! is never lost, and it holds no place in the worker without end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::timeout;

use angler_core::source::{Settle, Settlement, Unsettled};
use angler_wire::text::cut;

use super::acks::PendingAck;
use crate::publisher::{Publisher, TooLarge, Unpublished};
use crate::topology::Topology;
use crate::{DIED_AT, JOBS_QUEUE, again, short, stays_behind};
use angler_core::pace::InHand;

/// Counts attempts across retries; never begins with `x-`, which RabbitMQ keeps for itself.
pub(super) const ATTEMPT: &str = "angler-attempt";
const ERROR: &str = "angler-error";

/// Which run alone of a suspect comes next, from 1.
pub(super) const LONE_RUN: &str = "angler-lone-run";

/// Tells the copies of a suspect apart.
pub(super) const STAMP: &str = "angler-stamp";

/// How long a retry queue may refuse a job, or be missing. After that the job goes back to the queue of
/// jobs; the time is also the pause between two such attempts.
const RETRY_PATIENCE: Duration = Duration::from_secs(5);

/// How long a job's own queue may take to accept it again. A queue that is bounded and full may never
/// do so, and a worker that drains or pauses cannot wait.
const GIVE_BACK: Duration = Duration::from_secs(3);

/// The most bytes of a producer's headers that a copy of its message keeps. Headers are one frame (AMQP
/// 0-9-1, 2.3.5.2), which a broker accepts up to its `frame_max`, 128 KiB, and else closes the
/// connection.
const HEADERS: usize = 64 << 10;

/// Room in that frame for the other properties and for headers of ours.
const OURS: usize = 6 << 10;

/// Roughly the bytes of a value on the wire.
fn size(value: &AMQPValue) -> usize {
    16 + match value {
        AMQPValue::LongString(text) => text.as_bytes().len(),
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().len(),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(size).sum(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(key, value)| key.as_str().len() + size(value)).sum()
        }
        _ => 0,
    }
}

/// A message as it came, with the duty to settle it.
pub(super) struct Message {
    pub ack: PendingAck,
    pub publisher: Arc<Publisher>,
    pub topology: Arc<Topology>,
    pub origin: Origin,
    pub properties: BasicProperties,
    pub body: Vec<u8>,
    pub attempt: u32,
    /// Which run alone this is, if it is a suspect.
    pub lone_run: u32,
    /// The largest frame that its connection allows. That of the publisher's is as large.
    pub frame_max: usize,
    /// The time that a job is worked on.
    pub in_hand: Option<InHand>,
}

/// The queue that a message came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Jobs,
    Suspects,
    /// Jobs that the broker gave up.
    Undeliverable,
}

impl Message {
    /// Returns the name of the queue that it came from.
    pub fn queue(&self) -> String {
        match self.origin {
            Origin::Jobs => self.topology.jobs.clone(),
            Origin::Suspects => self.topology.suspects_queue(),
            Origin::Undeliverable => self.topology.undeliverable_queue(),
        }
    }

    /// Returns the message's properties for publishing it again, with headers of ours and without
    /// those that [stay behind](stays_behind).
    fn copy(&self, own: &[(&str, AMQPValue)]) -> BasicProperties {
        let headers = self.properties.headers().as_ref().map(FieldTable::inner);
        let mut room = HEADERS.min(self.frame_max.saturating_sub(OURS));
        let mut fits = |key: &ShortString, value: &AMQPValue| {
            let bytes = key.as_str().len() + size(value);
            let fits = bytes <= room;
            if fits {
                room -= bytes;
            } else {
                tracing::warn!(
                    header = key.as_str(),
                    bytes,
                    "a header is too large for a copy of its message"
                );
            }
            fits
        };
        let kept: BTreeMap<ShortString, AMQPValue> = headers
            .into_iter()
            .flatten()
            .filter(|(key, _)| !stays_behind(key.as_str()))
            .filter(|(key, _)| !matches!(key.as_str(), LONE_RUN | STAMP))
            .filter(|(key, value)| fits(key, value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .chain(own.iter().map(|(key, value)| (short(key), value.clone())))
            .collect();
        again(&self.properties, FieldTable::from(kept))
    }

    /// Publishes it to a queue of the topology, with these headers of ours, and acks it. A message
    /// that the broker no longer accepts at its size is left to the broker's own dead-lettering, which
    /// moves it whatever its size.
    async fn move_to(self, queue: &str, own: &[(&str, AMQPValue)]) {
        let copy = self.copy(own);
        match self.publisher.publish_to_own(queue, &copy, &self.body).await {
            Ok(()) => self.ack.ack().await,
            Err(TooLarge(reason)) => {
                tracing::error!(
                    job = self.properties.message_id().as_ref().map(ShortString::as_str),
                    queue,
                    "the broker no longer accepts a message of this size, and dead-letters it itself: {reason}"
                );
                self.ack.reject().await;
            }
        }
    }

    /// Publishes it to the end of its own queue, as it came. A nack would put it to the front, but the
    /// broker counts that as a failed delivery, and anyone who gets it would take it for a suspect. So
    /// it is nacked only if the queue does not accept it soon.
    pub async fn give_back(self) {
        let own = match self.origin {
            Origin::Jobs | Origin::Undeliverable => vec![],
            Origin::Suspects => stamped(self.lone_run),
        };
        let queue = self.queue();
        self.give_back_to(&queue, &own).await;
    }

    async fn give_back_to(self, queue: &str, own: &[(&str, AMQPValue)]) {
        let copy = self.copy(own);
        let publishing = self.publisher.publish_to_own(queue, &copy, &self.body);
        match timeout(GIVE_BACK, publishing).await {
            Ok(Ok(())) => self.ack.ack().await,
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("not confirmed within {} s", GIVE_BACK.as_secs()),
                };
                tracing::info!(
                    job = self.properties.message_id().as_ref().map(ShortString::as_str),
                    queue,
                    "handed back to the head of its queue, and not to its end: {reason}"
                );
                self.ack.requeue().await;
            }
        }
    }

    /// Returns an error's text, cut to leave most of a small frame to other headers.
    fn shortened(&self, error: &str) -> String {
        // A character has 4 bytes at most.
        cut(error, self.frame_max / 16)
    }

    /// Moves it to the end of the queue of suspects, for a run alone of this number.
    ///
    /// # Errors
    /// The message again, if the queue can never accept it.
    pub async fn set_apart(self, lone_run: u32) -> Result<(), (Box<Self>, TooLarge)> {
        let queue = self.topology.suspects_queue();
        let copy = self.copy(&stamped(lone_run));
        match self.publisher.publish_to_own(&queue, &copy, &self.body).await {
            Ok(()) => {
                self.ack.ack().await;
                Ok(())
            }
            Err(error) => Err((Box::new(self), error)),
        }
    }

    /// Moves it to the retry queue of this delay, or at once to the queue of jobs, where that leads, if
    /// it cannot wait there. The attempt counts in both.
    async fn retry(self, delay: Duration, error: &str) -> Option<Unsettled> {
        let queue = self.topology.retry_queue(delay);
        let attempt = AMQPValue::LongUInt(self.attempt.saturating_add(1));
        let own = [(ATTEMPT, attempt), (ERROR, text(&self.shortened(error)))];
        let copy = self.copy(&own);
        let body = &self.body;
        let published =
            self.publisher.publish_to_own_within(RETRY_PATIENCE, &queue, &copy, body).await;
        match published {
            Ok(()) => self.ack.ack().await,
            Err(Unpublished::TooLarge(TooLarge(reason))) => {
                return Some(Unsettled { settle: Box::new(self), reason });
            }
            Err(Unpublished::Refused(refusal)) => {
                tracing::error!(
                    job = self.properties.message_id().as_ref().map(ShortString::as_str),
                    queue,
                    "the job cannot wait here, and goes back to the queue of jobs: {refusal}"
                );
                let jobs = self.topology.jobs.clone();
                self.give_back_to(&jobs, &own).await;
            }
        }
        None
    }
}

/// The headers of a new copy of a suspect.
fn stamped(lone_run: u32) -> Vec<(&'static str, AMQPValue)> {
    let stamp = format!("{:016x}", fastrand::u64(..));
    vec![(LONE_RUN, AMQPValue::LongUInt(lone_run)), (STAMP, text(&stamp))]
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

#[async_trait]
impl Settle for Message {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Option<Unsettled> {
        // What is given back was not worked on to its end.
        if settlement != Settlement::Requeue
            && let Some(in_hand) = self.in_hand.take()
        {
            in_hand.finished();
        }
        match settlement {
            Settlement::Ack => self.ack.ack().await,
            Settlement::Requeue => self.give_back().await,
            Settlement::Retry { delay, error } => return self.retry(delay, &error).await,
            Settlement::DeadLetter(failure) => {
                let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                let (jobs, dead) = (self.topology.jobs.clone(), self.topology.dead.clone());
                let own = [
                    (DIED_AT, text(&now)),
                    ("angler-reason", text(failure.code.as_str())),
                    ("angler-attempts", AMQPValue::LongUInt(self.attempt)),
                    (JOBS_QUEUE, text(&jobs)),
                    (ERROR, text(&self.shortened(&failure.message))),
                ];
                self.move_to(&dead, &own).await;
            }
        }
        None
    }
}
