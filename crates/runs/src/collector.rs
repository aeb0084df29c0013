//! Takes a run's results from its queue into a [`Journal`].
//!
//! One collector at a time: it holds the run's turn at the broker, on the connection that consumes. So
//! what it acks is in its own journal, and nobody else's.

mod watch;

use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use angler_amqp::ask::{answer, is_missing, look, look_at};
use angler_amqp::run_queues::{IdQueues, RunQueues};
use angler_amqp::turn::{Turn, TurnError};
use angler_amqp::{AmqpError, AmqpOptions, short};

use super::finished_jobs::Added;
use super::journal::{Journal, JournalError};
use super::mark::MarkError;
use super::reconnect::{self, Failed, Reconnect, lacking};
use super::result::{RunResult, line_of};
use crate::collector::watch::Watch;

/// Results that are delivered and not acked yet.
const IN_FLIGHT: u16 = 512;
/// After so many, or so long, what was taken is made safe and acked.
const SYNC: usize = 256;
const SYNC_AFTER: Duration = Duration::from_millis(250);
/// How long no result comes when the last one was taken. Then the queue is looked at.
const QUIET: Duration = Duration::from_millis(50);
/// The longest wait for a result before everything else is looked at again.
const LOOK: Duration = Duration::from_secs(1);
/// How long after a run was cancelled its sender has certainly stopped.
const SETTLED: Duration = Duration::from_secs(3);
/// How long to wait for another collector, which may just have been killed, to end its turn.
const TURN: Duration = Duration::from_secs(5);
/// How long to wait for the turn again after the connection was lost. This collector's own connection
/// keeps it until the broker notices: it may have to miss heartbeats first.
const TURN_AGAIN: Duration = Duration::from_secs(150);

/// Why collecting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Each job of the run has a result.
    Complete {
        /// `true` if the run was cancelled all the same.
        cancelled: bool,
    },
    /// The run was cancelled, and each job that was sent has a result.
    Cancelled,
    /// Nothing was left to take for now ([`Until::empty`]).
    Empty,
    /// It was asked to.
    Stopped,
    /// Too many images failed, or whole jobs.
    Failing,
    /// No result came for [`Until::silence`].
    Silent,
}

impl Ended {
    /// `true` if the queue must be empty when collecting ends like this. Behind the last result may be a
    /// better one of a job that failed before.
    fn is_final(self) -> bool {
        matches!(self, Self::Complete { .. } | Self::Cancelled | Self::Empty)
    }
}

/// Why a run cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The broker has no such run.
    #[error(
        "there is no run {run} (no queue {queue}): it was never enqueued here, or it was collected"
    )]
    NoRun {
        /// The run's id.
        run: String,
        /// The queue of its results.
        queue: String,
    },
    /// Another collector has the run's turn.
    #[error(
        "another command is collecting run {run}: let it finish, or stop it and repeat its command, with its --out on its machine, which has the results that it took"
    )]
    Busy {
        /// The run's id.
        run: String,
    },
    /// Another journal has results of the run.
    #[error(
        "another command has taken results of run {run}: they are in a journal next to its --out, perhaps on another machine. Repeat that command there, with its --out. If that journal is lost, --partial writes the other results, and its summary says which jobs are missing"
    )]
    Elsewhere {
        /// The run's id.
        run: String,
    },
    /// The user lacks a right.
    #[error("run {run} cannot be collected: {}", lacking(.words))]
    Denied {
        /// The run's id.
        run: String,
        /// What the broker said.
        words: String,
    },
    /// What was sent cannot be told.
    #[error(transparent)]
    Mark(MarkError),
    /// Results cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl CollectError {
    /// Tells a missing right from other reasons why a run's mark cannot be read.
    pub fn of_mark(run: &str, error: MarkError) -> Self {
        let denied = match &error {
            MarkError::Amqp(error) => error.denied(),
            _ => None,
        };
        match denied {
            Some(words) => Self::Denied { run: run.to_owned(), words },
            None => Self::Mark(error),
        }
    }
}

/// What decides when collecting ends.
#[derive(Clone, Copy)]
pub struct Until<'a> {
    /// Ends it at once.
    pub stop: &'a CancellationToken,
    /// Ends it when no result comes for this long.
    pub silence: Duration,
    /// Ends it when no result waits.
    pub empty: bool,
}

impl From<JournalError> for Failed<CollectError> {
    fn from(error: JournalError) -> Self {
        Self::Final(error.into())
    }
}

/// Takes results until the run is complete or `until` says so. `seen` is told of each result that adds
/// something, with its job's number, and may end the collecting by returning `false`.
///
/// * `journal`: the run's, claimed ([`Journal::claim`]).
///
/// # Errors
/// [`CollectError`]. What was acked is in the journal, everything else in the queue.
pub async fn collect(
    options: &AmqpOptions,
    queues: &RunQueues,
    journal: &mut Journal,
    until: Until<'_>,
    mut seen: impl FnMut(u64, RunResult, Added) -> bool,
) -> Result<Ended, CollectError> {
    let Until { stop, silence, .. } = until;
    let connections = Reconnect { options, role: "collect", stop, patience: silence };
    let watch = Watch::start(options.clone(), queues.clone(), journal.run().nonce.clone());
    let mut patience = TURN;
    let ended = connections
        .run(async |connection, last| {
            // Without an answer the broker may have given the turn to this connection all the same.
            let patience = std::mem::replace(&mut patience, silence.min(TURN_AGAIN));
            turn(connection, &queues.id, patience).await?;
            let is_fresh = journal.finished().count() == 0 && !until.empty;
            if is_fresh && look_at(connection, &queues.taken).await?.is_some() {
                return Err(Failed::Final(CollectError::Elsewhere {
                    run: journal.run().id.clone(),
                }));
            }
            let channel = answer(connection.create_channel()).await?;
            answer(channel.basic_qos(IN_FLIGHT, BasicQosOptions::default())).await?;
            let watch = &watch;
            let (is_marked, unacked) = (false, None);
            let mut taking =
                Taking { queues, journal, until, channel, watch, last, is_marked, unacked };
            taking.take(&mut seen).await
        })
        .await?;
    Ok(match ended {
        reconnect::Ended::Done(Ended::Complete { .. }) => {
            Ended::Complete { cancelled: watch.answer().await }
        }
        reconnect::Ended::Done(ended) => ended,
        reconnect::Ended::Denied(words) => {
            let run = journal.run().id.clone();
            return Err(CollectError::Denied { run, words });
        }
        reconnect::Ended::Stopped => Ended::Stopped,
        reconnect::Ended::Away(_) => Ended::Silent,
    })
}

/// Takes the run's turn, which ends with `connection`.
async fn turn(connection: &Connection, names: &IdQueues, patience: Duration) -> Outcome<()> {
    match Turn::take(connection, &names.collector, patience).await {
        Ok(_) => Ok(()),
        Err(TurnError::Amqp(error)) => Err(error.into()),
        Err(TurnError::Busy { .. }) => {
            Err(Failed::Final(CollectError::Busy { run: names.run.clone() }))
        }
    }
}

type Outcome<T> = Result<T, Failed<CollectError>>;

/// Takes results on one connection.
struct Taking<'a> {
    queues: &'a RunQueues,
    journal: &'a mut Journal,
    until: Until<'a>,
    channel: Channel,
    watch: &'a Watch,
    /// When the last result came.
    last: &'a mut Instant,
    /// Whether the broker knows that results were taken.
    is_marked: bool,
    /// How many deliveries are not acked, and the last one's tag.
    unacked: Option<(usize, u64)>,
}

impl Taking<'_> {
    async fn take(
        &mut self,
        seen: &mut impl FnMut(u64, RunResult, Added) -> bool,
    ) -> Outcome<Ended> {
        loop {
            let mut consumer = self.consume().await?;
            let ended = self.until_ended(&mut consumer, seen).await?;
            if ended.is_final() {
                self.drain(&mut consumer, seen).await?;
            }
            self.keep().await?;
            if !ended.is_final() || look(&self.channel, &self.queues.results).await?.ready == 0 {
                return Ok(ended);
            }
        }
    }

    async fn until_ended(
        &mut self,
        consumer: &mut Consumer,
        seen: &mut impl FnMut(u64, RunResult, Added) -> bool,
    ) -> Outcome<Ended> {
        loop {
            if self.unacked.is_some_and(|(count, _)| count >= SYNC) {
                self.keep().await?;
            }
            let ended = self.ended();
            let patience = match ended {
                Some(_) => QUIET,
                None if self.unacked.is_some() => SYNC_AFTER,
                None => LOOK,
            };
            let next = tokio::select! {
                () = self.until.stop.cancelled() => return Ok(Ended::Stopped),
                next = timeout(patience, consumer.next()) => next,
            };
            match (next, ended) {
                (Ok(Some(delivery)), _) => {
                    if !self.accept(delivery.map_err(AmqpError::from)?, seen)? {
                        return Ok(Ended::Failing);
                    }
                }
                (Ok(None), _) => {
                    return Err(Failed::Connection("the consumer ended".into()));
                }
                (Err(_), Some(ended)) => return Ok(ended),
                (Err(_), None) if self.unacked.is_some() => self.keep().await?,
                (Err(_), None) if self.until.empty => return Ok(Ended::Empty),
                (Err(_), None) if self.last.elapsed() >= self.until.silence => {
                    return Ok(Ended::Silent);
                }
                (Err(_), None) => {}
            }
        }
    }

    /// Returns `Some` if each job that was sent, or will be, has a result.
    fn ended(&mut self) -> Option<Ended> {
        if self.journal.finished().is_whole() {
            return Some(Ended::Complete { cancelled: false });
        }
        let cancelled = self.watch.cancelled()?;
        self.journal.only(cancelled.sent);
        let is_settled = cancelled.since.elapsed() >= SETTLED;
        (is_settled && self.journal.finished().is_complete()).then_some(Ended::Cancelled)
    }

    /// Puts a message into the journal; `false` if collecting shall end.
    fn accept(
        &mut self,
        delivery: Delivery,
        seen: &mut impl FnMut(u64, RunResult, Added) -> bool,
    ) -> Outcome<bool> {
        *self.last = Instant::now();
        let count = self.unacked.map_or(0, |(count, _)| count);
        self.unacked = Some((count + 1, delivery.delivery_tag));
        let id = delivery.properties.message_id().as_ref().map(|id| id.as_str());
        let Some((run, line)) = line_of(&delivery.data, id, self.journal.run()) else {
            tracing::warn!(
                queue = self.queues.results,
                message_id = id,
                "dropped a message that is no result of this run"
            );
            return Ok(true);
        };
        let result = RunResult::read(&line, self.journal.run());
        match self.journal.push(&run, result.is_done(), &line)? {
            Added::Nothing => Ok(true),
            added => Ok(seen(run.index, result, added)),
        }
    }

    async fn consume(&self) -> Outcome<Consumer> {
        let options = BasicConsumeOptions::default();
        let queue = &self.queues.results;
        let consuming =
            self.channel.basic_consume(short(queue), short(""), options, FieldTable::default());
        match answer(consuming).await {
            Ok(consumer) => Ok(consumer),
            Err(error) if is_missing(&error, queue) => {
                let (run, queue) = (self.journal.run().id.clone(), queue.clone());
                Err(Failed::Final(CollectError::NoRun { run, queue }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the consumer and takes what was on its way.
    async fn drain(
        &mut self,
        consumer: &mut Consumer,
        seen: &mut impl FnMut(u64, RunResult, Added) -> bool,
    ) -> Outcome<()> {
        let cancelling = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        answer(cancelling).await?;
        loop {
            match timeout(LOOK, consumer.next()).await {
                Ok(Some(delivery)) => {
                    self.accept(delivery.map_err(AmqpError::from)?, seen)?;
                }
                Ok(None) => return Ok(()),
                Err(_) => return Err(Failed::Connection("the consumer did not end".into())),
            }
        }
    }

    /// Makes what was taken safe, and acks it.
    async fn keep(&mut self) -> Outcome<()> {
        let Some((_, tag)) = self.unacked.take() else { return Ok(()) };
        tokio::task::block_in_place(|| self.journal.sync())?;
        if !self.is_marked && self.journal.finished().count() > 0 {
            self.queues.mark_taken(&self.channel).await?;
            self.is_marked = true;
        }
        answer(self.channel.basic_ack(tag, BasicAckOptions { multiple: true })).await?;
        Ok(())
    }
}
