//! Takes a run's results from its queue into a [`Journal`].

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::journal::Journal;
use super::mark::{self, MarkError};
use super::queues::RunQueues;
use super::reconnect::{self, Failed, Reconnect};
use super::result::line_of;
use crate::amqp::ask::{answer, is_missing};
use crate::amqp::{AmqpError, AmqpOptions, short};

/// Results that are taken and not acked yet.
const IN_FLIGHT: u16 = 512;
/// After so many, or so long, what was taken is made safe and acked.
const SYNC: usize = 256;
const SYNC_AFTER: Duration = Duration::from_millis(250);
/// How often it is looked whether the run was cancelled.
const LOOK: Duration = Duration::from_secs(1);
/// How long after it was, whoever enqueues it has certainly stopped.
const SETTLED: Duration = Duration::from_secs(3);

/// Why collecting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// There is a result of each job.
    Complete,
    /// The run was cancelled, and there is a result of each job that was sent.
    Cancelled,
    /// It was asked to.
    Stopped,
    /// Too many images failed, or whole jobs.
    Failing,
    /// Nothing came for so long.
    Silent,
}

/// Why a run cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// There is no such run.
    #[error(
        "there is no run {run} (no queue {queue}): it was never enqueued here, or it was collected"
    )]
    NoRun {
        /// The run's id.
        run: String,
        /// The queue of its results.
        queue: String,
    },
    /// Results cannot be kept.
    #[error("results cannot be kept: {0}")]
    Journal(#[from] std::io::Error),
}

/// What decides when it ends.
#[derive(Clone, Copy)]
pub struct Until<'a> {
    /// Whoever wants to stop.
    pub stop: &'a CancellationToken,
    /// How long nothing may come, as long as this says so.
    pub silence: Duration,
}

impl From<MarkError> for Failed<CollectError> {
    fn from(error: MarkError) -> Self {
        Self::Connection(error.to_string())
    }
}

impl From<std::io::Error> for Failed<CollectError> {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.into())
    }
}

/// Takes results until the run is complete or `until` says so. `seen` is told of each new one, and
/// may end it by returning false.
///
/// # Errors
/// [`CollectError`]. What was taken is in the journal, the rest in the queue.
pub async fn collect(
    options: &AmqpOptions,
    queues: &RunQueues,
    run: &str,
    journal: &mut Journal,
    until: Until<'_>,
    mut seen: impl FnMut(&[u8]) -> bool,
) -> Result<Ended, CollectError> {
    if journal.have().is_complete() {
        return Ok(Ended::Complete);
    }
    let Until { stop, silence } = until;
    let connections = Reconnect { options, role: "collect", stop, patience: silence };
    let mut cancelled = None;
    let ended = connections
        .run(async |connection, last| {
            let asking = confirming(connection).await?;
            let looked = None;
            let cancelled = &mut cancelled;
            let mut taking =
                Taking { queues, run, journal, until, connection, asking, looked, cancelled, last };
            taking.take(&mut seen).await
        })
        .await?;
    Ok(match ended {
        reconnect::Ended::Done(ended) => ended,
        reconnect::Ended::Stopped => Ended::Stopped,
        reconnect::Ended::Away(_) => Ended::Silent,
    })
}

/// A channel that confirms.
async fn confirming(connection: &Connection) -> Result<Channel, AmqpError> {
    let channel = answer(connection.create_channel()).await?;
    answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

struct Taking<'a> {
    queues: &'a RunQueues,
    run: &'a str,
    journal: &'a mut Journal,
    until: Until<'a>,
    connection: &'a Connection,
    /// To ask whether the run was cancelled.
    asking: Channel,
    looked: Option<Instant>,
    /// Since when it is known to be cancelled.
    cancelled: &'a mut Option<Instant>,
    /// When the last result came.
    last: &'a mut Instant,
}

impl Taking<'_> {
    async fn take(
        &mut self,
        seen: &mut impl FnMut(&[u8]) -> bool,
    ) -> Result<Ended, Failed<CollectError>> {
        let (channel, mut consumer) = self.consume().await?;
        // Not acked: how many, and the last one's tag.
        let (mut taken, mut tag) = (0, 0);
        let ended = loop {
            if taken >= SYNC || (taken > 0 && self.journal.have().is_complete()) {
                self.keep(&channel, tag).await?;
                taken = 0;
            }
            self.look().await?;
            if let Some(ended) = self.ended() {
                break ended;
            }
            let patience = if taken > 0 { SYNC_AFTER } else { LOOK };
            let next = tokio::select! {
                () = self.until.stop.cancelled() => break Ended::Stopped,
                next = timeout(patience, consumer.next()) => next,
            };
            let delivery = match next {
                Err(_) if taken > 0 => {
                    self.keep(&channel, tag).await?;
                    taken = 0;
                    continue;
                }
                Err(_) if self.last.elapsed() >= self.until.silence => break Ended::Silent,
                Err(_) => continue,
                Ok(Some(delivery)) => delivery.map_err(AmqpError::from)?,
                Ok(None) => return Err(Failed::Connection("the consumer ended".to_owned())),
            };
            *self.last = Instant::now();
            (taken, tag) = (taken + 1, delivery.delivery_tag);
            let id = delivery.properties.message_id().as_ref().map(|id| id.as_str());
            let Some((run, line)) = line_of(&delivery.data, id, self.run) else {
                tracing::warn!(
                    queue = self.queues.results,
                    "a message that is no result of this run is left out"
                );
                continue;
            };
            if self.journal.push(&run, &line)? && !seen(&line) {
                break Ended::Failing;
            }
        };
        if taken > 0 {
            self.keep(&channel, tag).await?;
        }
        Ok(ended)
    }

    /// Whether there is a result of each job that was sent or will be.
    fn ended(&self) -> Option<Ended> {
        if !self.journal.have().is_complete() {
            return None;
        }
        match *self.cancelled {
            None => Some(Ended::Complete),
            Some(since) if since.elapsed() >= SETTLED => Some(Ended::Cancelled),
            Some(_) => None,
        }
    }

    /// Looks now and then whether the run was cancelled: then there are no more jobs than were sent.
    async fn look(&mut self) -> Result<(), MarkError> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        if self.queues.is_cancelled(&self.asking).await? {
            self.cancelled.get_or_insert_with(Instant::now);
            if let Some(mark) = mark::read(self.connection, &self.queues.id).await? {
                self.journal.only(mark.sent);
            }
        }
        Ok(())
    }

    async fn consume(&self) -> Result<(Channel, Consumer), Failed<CollectError>> {
        let channel = answer(self.connection.create_channel()).await?;
        answer(channel.basic_qos(IN_FLIGHT, BasicQosOptions::default())).await?;
        let options = BasicConsumeOptions::default();
        let queue = &self.queues.results;
        let consuming =
            channel.basic_consume(short(queue), short(""), options, FieldTable::default());
        match answer(consuming).await {
            Ok(consumer) => Ok((channel, consumer)),
            Err(error) if is_missing(&error) => {
                let (run, queue) = (self.run.to_owned(), queue.clone());
                Err(Failed::Final(CollectError::NoRun { run, queue }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Makes what was taken safe, and acks it.
    async fn keep(&mut self, channel: &Channel, tag: u64) -> Result<(), Failed<CollectError>> {
        tokio::task::block_in_place(|| self.journal.sync())?;
        answer(channel.basic_ack(tag, BasicAckOptions { multiple: true })).await?;
        Ok(())
    }
}
