//! Watches whether a run is cancelled while its results are collected.
//!
//! The question is a publish, and a broker under a memory or disk alarm stops reading from a connection
//! that publishes. So it has a connection of its own: the one that consumes keeps acking.

use std::time::Duration;

use lapin::Connection;
use lapin::options::ConfirmSelectOptions;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use angler_amqp::ask::answer;
use angler_amqp::run_queues::RunQueues;
use angler_amqp::{AmqpError, AmqpOptions, Backoff, close, connect};
use angler_wire::text::chain;

use super::super::mark;

/// How often the broker is asked.
const LOOK: Duration = Duration::from_secs(1);
/// How long an answer may take. A broker under an alarm does not answer.
const ANSWER: Duration = Duration::from_secs(5);

/// A run that is cancelled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cancelled {
    /// When that was noticed.
    pub(super) since: Instant,
    /// How many of its jobs were sent, as far as their mark says.
    pub(super) sent: u64,
}

/// What is known of a run.
#[derive(Debug, Clone, Copy)]
enum Known {
    Nothing,
    Runs,
    Cancelled(Cancelled),
}

/// Asks until it is dropped.
pub(super) struct Watch {
    told: watch::Receiver<Known>,
    _task: AbortOnDropHandle<()>,
}

impl Watch {
    /// * `nonce`: the run's.
    pub(super) fn start(options: AmqpOptions, queues: RunQueues, nonce: String) -> Self {
        let (teller, told) = watch::channel(Known::Nothing);
        let task = tokio::spawn(async move {
            let mut backoff = Backoff::default();
            loop {
                let reason = match connect(&options, "collect asking").await {
                    Ok(connection) => {
                        let asking =
                            Asking { connection: &connection, queues: &queues, nonce: &nonce };
                        let reason = asking.until_it_fails(&teller, &mut backoff).await;
                        close(&connection).await;
                        reason
                    }
                    Err(error) => chain(&error),
                };
                tracing::debug!("it is unknown whether the run is cancelled: {reason}");
                sleep(backoff.pause()).await;
            }
        });
        Self { told, _task: AbortOnDropHandle::new(task) }
    }

    /// `None` if the run is not cancelled, or the broker has not said so yet.
    pub(super) fn cancelled(&self) -> Option<Cancelled> {
        match *self.told.borrow() {
            Known::Cancelled(cancelled) => Some(cancelled),
            Known::Nothing | Known::Runs => None,
        }
    }

    /// `true` if the run is cancelled. Waits for the first answer, but not long.
    pub(super) async fn answer(mut self) -> bool {
        let answered = self.told.wait_for(|known| !matches!(known, Known::Nothing));
        let _ = timeout(ANSWER, answered).await;
        self.cancelled().is_some()
    }
}

/// Asks on one connection.
struct Asking<'a> {
    connection: &'a Connection,
    queues: &'a RunQueues,
    nonce: &'a str,
}

impl Asking<'_> {
    /// Asks until an answer fails to come, and returns why.
    async fn until_it_fails(&self, teller: &watch::Sender<Known>, backoff: &mut Backoff) -> String {
        loop {
            let is_cancelled = match timeout(ANSWER, self.is_cancelled()).await {
                Ok(Ok(is_cancelled)) => is_cancelled,
                Ok(Err(error)) => return chain(&error),
                Err(_) => return format!("no answer within {} s", ANSWER.as_secs()),
            };
            if is_cancelled {
                // How many jobs were sent may still grow: the sender notices the same thing.
                match mark::read(self.connection, &self.queues.id).await {
                    Ok(Some(mark)) if mark.nonce == self.nonce => cancelled(teller, mark.sent),
                    Ok(_) => {} // The run's queues are being deleted.
                    Err(error) => return chain(&error),
                }
            } else {
                teller.send_replace(Known::Runs);
            }
            backoff.reset();
            sleep(LOOK).await;
        }
    }

    async fn is_cancelled(&self) -> Result<bool, AmqpError> {
        let channel = answer(self.connection.create_channel()).await?;
        answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let is_cancelled = self.queues.is_cancelled(&channel).await?;
        answer(channel.close(200, "done".into())).await?;
        Ok(is_cancelled)
    }
}

/// Tells how many jobs were sent, and keeps the time when the run was first known to be cancelled.
fn cancelled(teller: &watch::Sender<Known>, sent: u64) {
    teller.send_modify(|known| {
        let since = match known {
            Known::Cancelled(cancelled) => cancelled.since,
            Known::Nothing | Known::Runs => Instant::now(),
        };
        *known = Known::Cancelled(Cancelled { since, sent });
    });
}
