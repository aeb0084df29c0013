//! One connection of a sender: a batch and its confirms.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use angler_amqp::ask::answer;
use angler_amqp::run_queues::RunQueues;
use angler_amqp::{AmqpError, short};
use angler_wire::job::JOB_TYPE;

use super::EnqueueError;
use super::unsent::Message;
use crate::mark::Marker;
use crate::reconnect::Failed;

/// How often a wait looks whether the broker blocks publishers, and how long one that does not may
/// take to answer.
const TICK: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_secs(15);

pub(super) type Outcome<T> = Result<T, Failed<EnqueueError>>;

/// What a sender has of one connection.
pub(super) struct Link<'a> {
    pub connection: &'a Connection,
    pub queues: RunQueues,
    pub marker: Marker,
    /// When the mark was written last.
    pub marked: Instant,
    /// Confirms, and has one batch in flight.
    pub jobs: Channel,
    /// Confirms, and has one question in flight.
    pub asking: Channel,
    /// When the sender looked last, and for how many jobs there was room.
    pub looked: Option<(Instant, u64)>,
    pub properties: BasicProperties,
}

/// What the broker answered to a batch.
pub(super) enum Answers {
    /// A message came back, since there is no queue for it. Which one cannot be told.
    Returned,
    /// The messages at these places were refused, the others are in the queue.
    Refused(Vec<usize>),
}

/// How long to wait for confirms.
#[derive(Clone, Copy)]
pub(super) struct Waiting<'a> {
    pub stop: &'a CancellationToken,
    pub patience: Duration,
    pub progress: &'a Instant,
}

impl Waiting<'_> {
    /// Waits for what the broker answers. One that blocks publishers, because it is short of memory
    /// or disk, is waited for on the same connection.
    pub async fn answer<T>(
        self,
        connection: &Connection,
        call: impl Future<Output = Result<T, lapin::Error>>,
    ) -> Outcome<T> {
        tokio::pin!(call);
        let mut asked = Instant::now();
        loop {
            if let Ok(answer) = timeout(TICK, call.as_mut()).await {
                return Ok(answer.map_err(AmqpError::from)?);
            }
            let is_over = self.stop.is_cancelled() || self.progress.elapsed() >= self.patience;
            match connection.status().blocked() {
                true if is_over => {
                    let reason = "it blocks publishers (a memory or disk alarm)";
                    return Err(Failed::Connection(reason.into()));
                }
                true => asked = Instant::now(),
                false if asked.elapsed() < ANSWER => {}
                false => return Err(AmqpError::Silent(ANSWER.as_secs()).into()),
            }
        }
    }
}

impl Link<'_> {
    /// Publishes a batch and waits for all its confirms.
    pub async fn publish(
        &self,
        queue: &str,
        batch: &[Message],
        waiting: Waiting<'_>,
    ) -> Outcome<Answers> {
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let mut confirms = Vec::with_capacity(batch.len());
        for Message { id, body, .. } in batch {
            let properties = self.properties.clone().with_message_id(short(id));
            let publishing =
                self.jobs.basic_publish("".into(), short(queue), mandatory, body, properties);
            confirms.push(waiting.answer(self.connection, publishing).await?);
        }
        let (mut refused, mut is_returned) = (Vec::new(), false);
        for (at, confirm) in confirms.into_iter().enumerate() {
            match waiting.answer(self.connection, confirm).await? {
                Confirmation::Ack(None) => {}
                Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) => is_returned = true,
                Confirmation::Nack(None) | Confirmation::NotRequested => refused.push(at),
            }
        }
        Ok(if is_returned { Answers::Returned } else { Answers::Refused(refused) })
    }
}

pub(super) async fn confirming(connection: &Connection) -> Result<Channel, AmqpError> {
    let channel = answer(connection.create_channel()).await?;
    answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

pub(super) fn properties(queues: &RunQueues) -> BasicProperties {
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_type(JOB_TYPE.into())
        .with_content_type("application/json".into())
        .with_reply_to(short(&queues.results))
}
