//! Work that continues over one connection after another.

use std::time::Duration;

use lapin::Connection;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use angler_amqp::{AmqpError, AmqpOptions, Backoff, close, connect};
use angler_wire::error::Reason;
use angler_wire::text::chain;

/// Why an attempt ended before its work did.
pub(super) enum Failed<E> {
    /// Another attempt may succeed.
    Connection(Reason),
    /// The user lacks a right, in the broker's words.
    Denied(String),
    /// None will.
    Final(E),
}

impl<E> From<AmqpError> for Failed<E> {
    fn from(error: AmqpError) -> Self {
        match error.denied() {
            Some(words) => Self::Denied(words),
            None => Self::Connection(Reason::of(error)),
        }
    }
}

/// How the work ended.
pub(super) enum Ended<T> {
    /// It is done.
    Done(T),
    /// It was asked to stop.
    Stopped,
    /// The user lacks a right, in the broker's words.
    Denied(String),
    /// Connections failed and nothing progressed for as long as [`Reconnect::patience`].
    Away(Reason),
}

/// How connections are made and replaced.
pub(super) struct Reconnect<'a> {
    pub options: &'a AmqpOptions,
    /// What the connections are named after.
    pub role: &'static str,
    pub stop: &'a CancellationToken,
    /// How long there may be no progress while connections fail.
    pub patience: Duration,
}

impl Reconnect<'_> {
    /// Runs `attempt` on one connection after another until it ends for good. `attempt` sets the instant
    /// that it is given whenever it makes progress.
    ///
    /// # Errors
    /// The first that is final.
    pub(super) async fn run<T, E>(
        &self,
        mut attempt: impl AsyncFnMut(&Connection, &mut Instant) -> Result<T, Failed<E>>,
    ) -> Result<Ended<T>, E> {
        let Self { options, role, stop, patience } = self;
        let (mut backoff, mut progress) = (Backoff::default(), Instant::now());
        loop {
            let before = progress;
            let outcome = match connect(options, role).await {
                Ok(connection) => {
                    let outcome = attempt(&connection, &mut progress).await;
                    close(&connection).await;
                    outcome
                }
                // Also if the login is refused: a broker that starts may not know its users yet.
                Err(error) => Err(Failed::Connection(Reason::of(error))),
            };
            let reason = match outcome {
                Ok(done) => return Ok(Ended::Done(done)),
                Err(Failed::Final(error)) => return Err(error),
                Err(Failed::Denied(words)) => return Ok(Ended::Denied(words)),
                Err(Failed::Connection(reason)) => reason,
            };
            if progress > before {
                backoff.reset();
            }
            if progress.elapsed() >= *patience {
                return Ok(Ended::Away(reason));
            }
            let pause = backoff.pause();
            tracing::warn!(
                pause_seconds = pause.as_secs_f64(),
                "{role}: reconnecting to the broker: {}",
                chain(&reason)
            );
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => return Ok(Ended::Stopped),
            }
        }
    }
}

/// The sentence for a user that lacks a right.
pub(super) fn lacking(words: &str) -> String {
    format!(
        "the broker's user lacks a right: {words}; runs need configure, write and read on ^angler\\.run, or on what the queues of amqp.jobs_queue begin with, in addition to the workers' queues"
    )
}
