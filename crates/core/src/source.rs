//! Where jobs come from: the port [`JobSource`], and the deliveries that it hands out.

pub mod folder;
pub mod lanes;
pub mod memory;

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use angler_wire::error::{Failure, FatalError};
use angler_wire::job::{Job, Run};

/// Hands out jobs one at a time.
#[async_trait]
pub trait JobSource: Send {
    /// The next delivery; none when there will be no more (a folder that was read to its end).
    ///
    /// Cancel-safe: a call that is dropped loses no delivery.
    ///
    /// # Errors
    /// Only when the source is gone for good; what can come back is waited for inside.
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError>;

    /// Returns whether suspects wait: jobs that workers held when they died. One of them may be what
    /// killed them, so each runs alone. `None` if this source cannot have any.
    fn suspects(&self) -> Option<watch::Receiver<bool>> {
        None
    }

    /// Asks to be the one worker that runs suspects, and returns whether it is. Answers within
    /// seconds.
    async fn take_turn(&mut self) -> bool {
        true
    }

    /// Lets another worker run suspects.
    async fn end_turn(&mut self) {}

    /// Returns a suspect, or `None` if none can run now. To be called only in this worker's turn and
    /// while no other job is in hand: a suspect is not taken from the broker before, so that no job but
    /// the guilty one is held when the process dies.
    ///
    /// Cancel-safe: a suspect that nobody receives goes back.
    ///
    /// # Errors
    /// Only when the source is gone for good.
    async fn receive_suspect(&mut self) -> Result<Option<Delivery>, FatalError> {
        Ok(None)
    }

    /// Takes no jobs until the next `receive`, for the reason given; what was only prefetched goes
    /// back, what was handed out can still be settled.
    async fn pause(&mut self, reason: &'static str) {
        let _ = reason;
    }

    /// Hands out no more. What was handed out can still be settled; what was only prefetched goes
    /// back.
    async fn stop(&mut self);

    /// Ends the source once everything that was handed out is settled or given up.
    async fn close(&mut self);
}

/// Knows which bulk runs were cancelled.
#[async_trait]
pub trait Cancellations: Send + Sync {
    /// `true` if a run was cancelled, so that its jobs are not worked on; `false` also if that cannot
    /// be known now, or if the run has no nonce. Answers within seconds.
    async fn is_cancelled(&self, run: &Run) -> bool;
}

/// One job on its way through the worker, and the duty to settle it exactly once.
pub struct Delivery {
    /// The job, or why the message is not worked on.
    pub job: Result<Job, Unworkable>,
    /// The queue, or what else it came from, for people.
    pub queue: String,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// Whether it is a suspect, which runs alone and a few images at a time.
    pub suspect: bool,
    /// Where the result goes, if the job said so.
    pub reply: Reply,
    /// Settles the delivery. A delivery that is dropped unsettled comes back.
    pub settle: Box<dyn Settle>,
    /// Cancelled when the delivery can no longer be settled, because its connection is gone: it
    /// comes back to some worker, and work on it here is wasted.
    pub lost: CancellationToken,
}

/// A message that is not a job, or one that is given up.
#[derive(Debug, Clone)]
pub struct Unworkable {
    /// The id under which its result is published.
    pub id: String,
    /// The run that it belongs to, if that could be read.
    pub run: Option<Run>,
    /// What is wrong with it.
    pub failure: Failure,
}

/// Where a result goes and how its reader recognises it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// A queue of the producer's own; none: the results queue.
    pub to: Option<String>,
    /// The producer's own correlation id; none: the job id.
    pub correlation_id: Option<String>,
    /// W3C trace context, echoed.
    pub traceparent: Option<String>,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// Its result is confirmed: it is done with.
    Ack,
    /// It goes to the retry queue of this delay, as the next attempt.
    Retry {
        /// How long it waits.
        delay: Duration,
        /// Why.
        error: String,
    },
    /// Its result is confirmed and it is kept for a person to look at.
    DeadLetter(Failure),
    /// It goes back as it came, for any worker.
    Requeue,
}

/// Settles one delivery.
#[async_trait]
pub trait Settle: Send + Sync {
    /// Settles it; returns `None` once that is done. A delivery whose connection is gone cannot be
    /// settled and comes back: that is not an error here, since the worker can do nothing about it.
    ///
    /// Only a [`Settlement::Retry`] may be impossible. Then the delivery has to be settled otherwise.
    async fn settle(self: Box<Self>, settlement: Settlement) -> Option<Unsettled>;
}

/// A delivery that cannot be tried again.
pub struct Unsettled {
    /// Settles it otherwise.
    pub settle: Box<dyn Settle>,
    /// Why it cannot be tried again.
    pub reason: String,
}
