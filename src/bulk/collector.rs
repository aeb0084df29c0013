//! Takes a run's results from its queue into a [`Journal`].

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::journal::Journal;
use super::queues::{RunQueues, answer};
use super::result::line_of;
use crate::amqp::{AmqpError, AmqpOptions, Backoff, close, connect, refused, short};

/// Results that are taken and not acked yet.
const IN_FLIGHT: u16 = 512;
/// After so many, or so long, what was taken is made safe and acked.
const SYNC: usize = 256;
const SYNC_AFTER: Duration = Duration::from_millis(250);

/// Why collecting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// There is a result of each job.
    Complete,
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
        "there is no run {run} (no queue {queue}): it was never enqueued here, or it was collected or cancelled"
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
pub struct Until<'a> {
    /// Whoever wants to stop.
    pub stop: &'a CancellationToken,
    /// How long nothing may come, as long as this says so.
    pub silence: Duration,
}

enum Failed {
    Connection(String),
    Final(CollectError),
}

impl From<AmqpError> for Failed {
    fn from(error: AmqpError) -> Self {
        Self::Connection(error.to_string())
    }
}

impl From<std::io::Error> for Failed {
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
    let mut backoff = Backoff::default();
    let mut last = Instant::now();
    loop {
        if journal.have().is_complete() {
            return Ok(Ended::Complete);
        }
        let mut taking = Taking { queues, run, journal, until: &until, last: &mut last };
        let outcome = match connect(options, "collect").await {
            Ok(connection) => {
                let outcome = taking.take(&connection, &mut seen).await;
                close(&connection).await;
                outcome
            }
            Err(error) => Err(error.into()),
        };
        let reason = match outcome {
            Ok(ended) => return Ok(ended),
            Err(Failed::Final(error)) => return Err(error),
            Err(Failed::Connection(reason)) => reason,
        };
        if last.elapsed() >= until.silence {
            return Ok(Ended::Silent);
        }
        let pause = backoff.next();
        tracing::warn!(
            pause_seconds = pause.as_secs_f64(),
            "collecting goes on in a moment: {reason}"
        );
        tokio::select! {
            () = sleep(pause) => {}
            () = until.stop.cancelled() => return Ok(Ended::Stopped),
        }
    }
}

struct Taking<'a> {
    queues: &'a RunQueues,
    run: &'a str,
    journal: &'a mut Journal,
    until: &'a Until<'a>,
    /// When the last result came.
    last: &'a mut Instant,
}

impl Taking<'_> {
    async fn take(
        &mut self,
        connection: &Connection,
        seen: &mut impl FnMut(&[u8]) -> bool,
    ) -> Result<Ended, Failed> {
        let (channel, mut consumer) = self.consume(connection).await?;
        // Not acked: how many, and the last one's tag.
        let (mut taken, mut tag) = (0, 0);
        let ended = loop {
            if taken >= SYNC || (taken > 0 && self.journal.have().is_complete()) {
                self.keep(&channel, tag).await?;
                taken = 0;
            }
            if self.journal.have().is_complete() {
                break Ended::Complete;
            }
            let patience = if taken > 0 { SYNC_AFTER } else { self.until.silence };
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
                Err(_) => break Ended::Silent,
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

    async fn consume(&self, connection: &Connection) -> Result<(Channel, Consumer), Failed> {
        let channel = answer(connection.create_channel()).await?;
        answer(channel.basic_qos(IN_FLIGHT, BasicQosOptions::default())).await?;
        let options = BasicConsumeOptions::default();
        let queue = &self.queues.results;
        let consuming =
            channel.basic_consume(short(queue), short(""), options, FieldTable::default());
        match answer(consuming).await {
            Ok(consumer) => Ok((channel, consumer)),
            Err(AmqpError::Broker(error))
                if refused(&error).is_some_and(|r| r.0 == AMQPSoftError::NOTFOUND) =>
            {
                let (run, queue) = (self.run.to_owned(), queue.clone());
                Err(Failed::Final(CollectError::NoRun { run, queue }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Makes what was taken safe, and acks it.
    async fn keep(&mut self, channel: &Channel, tag: u64) -> Result<(), Failed> {
        tokio::task::block_in_place(|| self.journal.sync())?;
        answer(channel.basic_ack(tag, BasicAckOptions { multiple: true })).await?;
        Ok(())
    }
}
