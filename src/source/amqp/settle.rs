//! How a delivery from RabbitMQ is settled: published where it goes next and confirmed there, then
//! acked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::acks::PendingAck;
use crate::amqp::publisher::{Published, Publisher};
use crate::amqp::topology::Topology;
use crate::amqp::{DELIVERY_COUNT, DIED_AT, JOBS_QUEUE, again, short};
use crate::source::{Settle, Settlement};

/// Counts attempts across retries; never begins with `x-`, which RabbitMQ keeps for itself.
pub(super) const ATTEMPT: &str = "angler-attempt";
const ERROR: &str = "angler-error";

/// The most bytes of a producer's headers that go on with its message. Headers are one frame (AMQP
/// 0-9-1, 2.3.5.2), which a broker takes up to its `frame_max`, 128 KiB, and else closes the
/// connection; ours have to fit in as well.
const HEADERS: usize = 64 << 10;

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
    /// Whether it came from the queue of suspects, else from that of jobs.
    pub suspect: bool,
    pub properties: BasicProperties,
    pub body: Vec<u8>,
    pub attempt: u32,
}

impl Message {
    /// The message again, with our headers and without the broker's record of dead-lettering,
    /// which RabbitMQ before 4.0 would read as a cycle and drop the message.
    fn copy(&self, own: &[(&str, AMQPValue)]) -> BasicProperties {
        let stripped = |key: &str| {
            key == "x-death"
                || key == DELIVERY_COUNT
                || key.starts_with("x-first-death-")
                || key.starts_with("x-last-death-")
        };
        let headers = self.properties.headers().as_ref().map(FieldTable::inner);
        let mut room = HEADERS;
        let mut fits = |key: &ShortString, value: &AMQPValue| {
            let bytes = key.as_str().len() + size(value);
            let fits = bytes <= room;
            if fits {
                room -= bytes;
            } else {
                tracing::warn!(
                    header = key.as_str(),
                    bytes,
                    "a header is too large to go on with its message"
                );
            }
            fits
        };
        let kept: BTreeMap<ShortString, AMQPValue> = headers
            .into_iter()
            .flatten()
            .filter(|(key, _)| !stripped(key.as_str()))
            .filter(|(key, value)| fits(key, value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .chain(own.iter().map(|(key, value)| (short(key), value.clone())))
            .collect();
        again(&self.properties, FieldTable::from(kept))
    }

    /// To a queue of the topology, with these headers of ours.
    async fn republish(&self, queue: &str, own: &[(&str, AMQPValue)]) {
        self.publisher.publish_to_own(queue, &self.copy(own), &self.body).await;
    }

    /// To the end of its own queue, as it came. A nack would put it to the front, but the broker
    /// counts that as a failed delivery, and whoever gets it would take it for a suspect.
    pub async fn give_back(self) {
        if self.suspect {
            return self.set_apart().await;
        }
        self.republish(&self.topology.jobs, &[]).await;
        self.ack.ack().await;
    }

    /// To the queue of suspects.
    pub async fn set_apart(self) {
        self.republish(&self.topology.suspects_queue(), &[]).await;
        self.ack.ack().await;
    }
}

#[async_trait]
impl Settle for Message {
    async fn settle(self: Box<Self>, settlement: Settlement) {
        let text = |t: &str| AMQPValue::LongString(t.into());
        match settlement {
            Settlement::Ack => {}
            Settlement::Requeue => return self.give_back().await,
            Settlement::Retry { delay, error } => {
                let queue = self.topology.retry_queue(delay);
                let attempt = AMQPValue::LongUInt(self.attempt.saturating_add(1));
                let own = [(ATTEMPT, attempt), (ERROR, text(&error))];
                let copy = self.copy(&own);
                let published = self.publisher.publish(&queue, &copy, &self.body).await;
                if published == Published::Unroutable {
                    tracing::error!(
                        queue,
                        "the queue does not exist: the job goes back to its own"
                    );
                    return self.give_back().await;
                }
            }
            Settlement::DeadLetter(failure) => {
                let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                let own = [
                    (DIED_AT, text(&now)),
                    ("angler-reason", text(failure.code.as_str())),
                    ("angler-attempts", AMQPValue::LongUInt(self.attempt)),
                    (JOBS_QUEUE, text(&self.topology.jobs)),
                    (ERROR, text(&failure.message)),
                ];
                self.republish(&self.topology.dead, &own).await;
            }
        }
        self.ack.ack().await;
    }
}
