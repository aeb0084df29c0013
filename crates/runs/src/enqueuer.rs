//! Sends the jobs of a run.
//!
//! Jobs are published in batches, each on a channel on which nothing else is in flight, and a batch
//! counts once all its confirms are there: lapin hands a message that came back unroutable to some
//! confirm of its channel, not to its own ([`angler_amqp::publisher`]). What the broker refused is
//! published again. Only then does the run's [mark](super::mark) move. However the sending ends, the
//! same command continues behind the last job that is known to be sent.

mod link;
mod sender;
mod unsent;

use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use angler_amqp::AmqpOptions;
use angler_amqp::topology::Topology;
use angler_wire::error::Reason;
use angler_wire::job::{ClassSelector, ImageRef, Job, Run, hex};

use super::mark::{Mark, MarkError};
use super::reconnect::{Ended, Failed, Reconnect, lacking};
use super::spool::Images;
use crate::enqueuer::sender::Sender;

/// What all jobs of a run have in common.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The run's id.
    pub run: String,
    /// Images in a job; the last may have fewer.
    pub per_job: usize,
    /// What they are scored against.
    pub classes: ClassSelector,
    /// How many of the best classes are listed for each image.
    pub top_k: usize,
    /// Below it an image is unknown; none: the set's own threshold.
    pub min_score: Option<f32>,
    /// Whether embeddings come back.
    pub embeddings: bool,
    /// Nothing is sent while this many jobs wait in the queue.
    pub max_queued: Option<u64>,
    /// How long the broker may accept no job before the sending ends.
    pub patience: Duration,
}

impl Plan {
    /// How many jobs `images` images make.
    pub fn jobs(&self, images: u64) -> u64 {
        images.div_ceil(self.per_job as u64)
    }

    /// Makes job number `index` of the run that `mark` is of.
    pub fn job(&self, index: u64, mark: &Mark, images: Vec<ImageRef>) -> Job {
        let (id, nonce) = (self.run.clone(), Some(mark.nonce.clone()));
        Job {
            id: format!("{}/{index}", self.run),
            images,
            classes: self.classes.clone(),
            top_k: self.top_k,
            min_score: self.min_score,
            embeddings: self.embeddings,
            run: Some(Run { id, jobs: mark.jobs, index, nonce }),
        }
    }

    /// What a run is recognised by: its images, and how they are sent.
    pub fn digest(&self, images: &Images) -> String {
        let Self { per_job, classes, top_k, min_score, embeddings, .. } = self;
        let how = format!("{per_job} {classes} {top_k} {min_score:?} {embeddings}");
        let mut digest = Sha256::new();
        digest.update(images.digest());
        digest.update(how);
        hex(&digest.finalize())[..32].to_owned()
    }
}

/// What is told while jobs are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The run is there: it was begun now or before.
    Begun(Mark),
    /// This many of the run's jobs are in the queue or were.
    Sent(u64),
    /// Nothing is sent until the queue has become shorter.
    Full {
        /// Jobs that wait in it.
        queued: u64,
    },
    /// The broker refuses jobs, which are sent again.
    Refused,
    /// The run was cancelled: nothing more is sent.
    Cancelled,
}

/// Why a run was not sent whole.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The run was begun with other images.
    #[error(
        "run {run} was begun with other images or options ({sent} of {jobs} jobs were sent): give this one another --run, or cancel that with `angler runs cancel {run}`"
    )]
    Other {
        /// The run's id.
        run: String,
        /// Jobs of it that were sent.
        sent: u64,
        /// Jobs that it has.
        jobs: u64,
    },
    /// Another process sends it.
    #[error(
        "run {run} is being sent by {sender}: wait until that command ends. If its machine or network was lost, the broker notices within a few minutes, and the same command continues then"
    )]
    Busy {
        /// The run's id.
        run: String,
        /// The other process.
        sender: String,
    },
    /// Its mark is gone, or is another run's.
    #[error(
        "run {run} is gone from the broker after {sent} of {jobs} jobs were sent: its queues were deleted, or it was collected and its id used again"
    )]
    Gone {
        /// The run's id.
        run: String,
        /// Jobs of it that were sent.
        sent: u64,
        /// Jobs that it has.
        jobs: u64,
    },
    /// Not all jobs were sent.
    #[error(
        "{unsent} of {jobs} jobs of run {run} were not sent: {why}; the same command with --run {run} continues"
    )]
    Unsent {
        /// The run's id.
        run: String,
        /// Jobs that the broker did not confirm.
        unsent: u64,
        /// Jobs that the run has.
        jobs: u64,
        /// What was in the way.
        #[source]
        why: Obstacle,
    },
    /// What was sent before cannot be told.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// The list of images could not be read again.
    #[error("cannot read the list of images")]
    Images(#[from] std::io::Error),
    /// A job is not what it should be.
    #[error("cannot write a job")]
    Json(#[from] serde_json::Error),
}

/// What kept jobs from being sent.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// The jobs queue accepted nothing for too long.
    #[error(
        "queue {queue} has refused jobs for {seconds} s (it is full, by a policy's max-length, or has no leader)"
    )]
    Refused {
        /// The jobs queue.
        queue: String,
        /// For how long.
        seconds: u64,
    },
    /// The jobs queue was deleted.
    #[error("queue {0} was deleted, with all jobs that waited in it")]
    NoQueue(String),
    /// The user lacks a right.
    #[error("{}", lacking(.0))]
    Denied(String),
    /// The broker was down or refused everything for too long.
    #[error("the broker accepted nothing for {seconds} s: {reason}")]
    Broker {
        /// For how long.
        seconds: u64,
        /// What it said last.
        #[source]
        reason: Reason,
    },
}

impl From<EnqueueError> for Failed<EnqueueError> {
    fn from(error: EnqueueError) -> Self {
        Self::Final(error)
    }
}

impl From<MarkError> for Failed<EnqueueError> {
    fn from(error: MarkError) -> Self {
        match error {
            MarkError::Unreadable { .. } => Self::Final(error.into()),
            MarkError::Amqp(error) => error.into(),
            other => Self::Connection(Reason::of(other)),
        }
    }
}

/// Where the jobs go.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// How the broker is reached.
    pub options: &'a AmqpOptions,
    /// The queues around the one that the jobs go to.
    pub topology: &'a Topology,
    /// The fleet's first jobs queue, which the runs' queues are named after.
    pub first: &'a str,
    /// What this process is called, for the error of another that sends the same run.
    pub sender: &'a str,
}

/// Sends what the broker does not have yet, and returns how many of the run's jobs it has then: fewer
/// than all only after `stop`, or if the run was cancelled.
///
/// # Errors
/// [`EnqueueError`]. What was sent stays sent.
pub async fn enqueue(
    target: Target<'_>,
    plan: &Plan,
    images: &Images,
    stop: &CancellationToken,
    seen: impl FnMut(Step),
) -> Result<u64, EnqueueError> {
    let mut sender = Sender::new(target, plan, images, stop, seen);
    let connections =
        Reconnect { options: target.options, role: "enqueue", stop, patience: plan.patience };
    let ended = connections
        .run(async |connection, progress| sender.attempt(connection, progress).await)
        .await?;
    match ended {
        Ended::Done(()) | Ended::Stopped => Ok(sender.sent()),
        // Not an attempt's fault: nobody wants it any more.
        Ended::Denied(words) => Err(sender.unsent(Obstacle::Denied(words))),
        Ended::Away(_) if stop.is_cancelled() => Ok(sender.sent()),
        Ended::Away(reason) => {
            Err(sender.unsent(Obstacle::Broker { seconds: plan.patience.as_secs(), reason }))
        }
    }
}
