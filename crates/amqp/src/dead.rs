//! Dead letters: jobs given up on, looked at without being taken away ([`Pass`]), and sent again or
//! removed.

mod letter;

use std::time::Duration;

use tokio::time::timeout;

use angler_wire::error::Reason;

use super::publisher::{Published, Publisher};
use super::{AmqpError, AmqpOptions};
pub use crate::dead::letter::DeadLetter;
pub(crate) use crate::dead::letter::reason_of_death;
use crate::queue_scan::{Pass, PassError};

/// What publishing one job may take, reconnecting included.
const PUBLISH: Duration = Duration::from_secs(30);

/// What keeps dead letters from being read or sent again. None of them loses a message.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// The broker cannot be reached, or said no; or somebody else reads them.
    #[error(transparent)]
    Pass(PassError),
    /// Nothing has declared the queue.
    #[error(
        "there is no queue {0} on this virtual host: no worker has run here yet, or amqp.dead_queue is another"
    )]
    NoQueue(String),
    /// The jobs queue takes nothing.
    #[error("job {job} was not sent again and stays where it is: {reason}")]
    NotPublished {
        /// The job's id.
        job: String,
        /// Why.
        #[source]
        reason: Reason,
    },
}

impl From<PassError> for DeadError {
    fn from(error: PassError) -> Self {
        match error {
            PassError::NoQueue(queue) => Self::NoQueue(queue),
            other => Self::Pass(other),
        }
    }
}

impl From<AmqpError> for DeadError {
    fn from(error: AmqpError) -> Self {
        Self::Pass(error.into())
    }
}

/// Which dead letters are meant. Several values of one kind are alternatives; kinds add up.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Reasons, as in `angler-reason`.
    pub reasons: Vec<String>,
    /// Ids of bulk runs.
    pub runs: Vec<String>,
    /// Job ids.
    pub jobs: Vec<String>,
}

impl Filter {
    /// Whether it means every dead letter.
    pub fn is_empty(&self) -> bool {
        self.reasons.is_empty() && self.runs.is_empty() && self.jobs.is_empty()
    }

    /// Whether it means this one.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let among = |wanted: &[String], found: Option<&str>| {
            wanted.is_empty() || found.is_some_and(|found| wanted.iter().any(|w| w == found))
        };
        among(&self.reasons, Some(&letter.reason))
            && among(&self.runs, letter.run.as_deref())
            && among(&self.jobs, Some(&letter.job))
    }
}

/// One pass over the dead letters, from the oldest on.
pub struct DeadLetters(Pass);

impl DeadLetters {
    /// Connects, waits for its turn and counts what is there.
    ///
    /// # Errors
    /// [`DeadError`].
    pub async fn open(options: &AmqpOptions, queue: &str) -> Result<Self, DeadError> {
        Ok(Self(Pass::open(options, "dead", queue).await?))
    }

    /// The next one; none at the end of the pass. It stays in the queue unless it is removed.
    ///
    /// # Errors
    /// [`DeadError`]; everything that was not removed is still there.
    pub async fn next(&mut self) -> Result<Option<DeadLetter>, DeadError> {
        Ok(self.0.next().await?.map(DeadLetter::read))
    }

    /// Messages that the pass has not come to.
    pub fn unseen(&self) -> u64 {
        self.0.unseen()
    }

    /// Removes it for good.
    ///
    /// # Errors
    /// [`DeadError`]; it is still there then.
    pub async fn remove(&mut self, letter: DeadLetter) -> Result<(), DeadError> {
        Ok(self.0.remove(letter.tag).await?)
    }

    /// Gives back everything that was not removed, and ends the turn.
    ///
    /// # Errors
    /// [`DeadError`] if the broker did not say that it has what was acked and given back: what was
    /// removed may be there again.
    pub async fn close(self) -> Result<(), DeadError> {
        Ok(self.0.close().await?)
    }
}

impl DeadLetter {
    /// Sends it to the queue `jobs` as a new job; yields it once the broker has confirmed it there, to be
    /// removed here. If the connection breaks in between, the job is in both.
    ///
    /// # Errors
    /// [`DeadError`]; it was not sent then.
    pub async fn send_again(self, publisher: &Publisher, jobs: &str) -> Result<Self, DeadError> {
        let properties = self.properties_again();
        let publishing = publisher.publish(jobs, &properties, &self.body);
        let reason = match timeout(PUBLISH, publishing).await {
            Ok(Published::Confirmed) => return Ok(self),
            Ok(Published::Unroutable) => format!("the queue {jobs} does not exist").into(),
            Ok(Published::TooLarge(error)) => Reason::of(error),
            Err(_) => format!("{jobs} did not confirm it within {} s", PUBLISH.as_secs()).into(),
        };
        Err(DeadError::NotPublished { job: self.job, reason })
    }
}
