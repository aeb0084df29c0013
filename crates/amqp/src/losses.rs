//! Deliveries that came back although their worker lives.
//!
//! A broker counts every delivery that comes back: the process died, its connection broke, it kept the
//! job for too long, or it handed the job back. Only a death speaks against the job. So each worker
//! remembers the deliveries that *it* lost or handed back, and tells the other workers when they ask
//! over the control exchange. A process that died remembers nothing, and that is the evidence.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use angler_wire::control::{Answer, Request};

use super::control::ControlClient;
use super::topology::Topology;
use super::{AmqpError, AmqpOptions};

/// How many messages a worker remembers; the oldest are forgotten first.
const REMEMBERED: usize = 4096;

/// How long one question waits for answers.
const ANSWERS: Duration = Duration::from_secs(2);

/// How long to ask before a job is given up. A worker whose connections were cut answers once it has
/// connected again, which it tries every 15 s at least.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A message: a job, and which copy of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct JobCopy {
    /// The job's id.
    pub job: String,
    /// The stamp of a copy in the queue of suspects; empty in the queue of jobs.
    pub stamp: String,
}

/// What this process remembers, and how it asks the others.
pub struct Losses {
    memory: Mutex<Memory>,
    instance: String,
    options: AmqpOptions,
    topology: Topology,
    patience: Duration,
    /// One question at a time: each has a connection of its own.
    asking: tokio::sync::Mutex<()>,
}

impl Losses {
    /// Creates an empty memory. Other workers are asked over the control exchange of `topology`.
    pub fn new(options: AmqpOptions, topology: Topology) -> Self {
        Self {
            memory: Mutex::default(),
            instance: format!("{:016x}", fastrand::u64(..)),
            options,
            topology,
            patience: PATIENCE,
            asking: tokio::sync::Mutex::default(),
        }
    }

    /// Asks for this long before a job is given up, and not for [`PATIENCE`].
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The name of this process among all workers.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Notes that this process lost a delivery of the message, or handed it back.
    pub(crate) fn note(&self, copy: JobCopy) {
        self.memory().note(copy);
    }

    /// Returns how many deliveries of the message this process lost or handed back.
    pub fn of(&self, copy: &JobCopy) -> u32 {
        self.memory().counts.get(copy).copied().unwrap_or(0)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many deliveries of the message living workers lost or handed back, as far as they
    /// answer within seconds.
    ///
    /// * `enough`: the count at which the answer is known.
    ///
    /// # Errors
    /// If the workers cannot be asked.
    pub(crate) async fn of_all(&self, copy: &JobCopy, enough: u32) -> Result<u32, AmqpError> {
        self.ask(copy, enough, Duration::ZERO).await
    }

    /// Does the same, but asks for longer than a worker needs to connect again.
    ///
    /// # Errors
    /// As [`Self::of_all`].
    pub(crate) async fn of_all_at_last(
        &self,
        copy: &JobCopy,
        enough: u32,
    ) -> Result<u32, AmqpError> {
        self.ask(copy, enough, self.patience).await
    }

    async fn ask(&self, copy: &JobCopy, enough: u32, patience: Duration) -> Result<u32, AmqpError> {
        if self.of(copy) >= enough {
            return Ok(self.of(copy));
        }
        let _one = self.asking.lock().await;
        let mut client = ControlClient::connect(&self.options, &self.topology).await?;
        let counted = self.rounds(&mut client, copy, enough, patience).await;
        client.close().await;
        counted
    }

    /// Asks again and again until there is enough or `patience` is over.
    async fn rounds(
        &self,
        client: &mut ControlClient,
        copy: &JobCopy,
        enough: u32,
        patience: Duration,
    ) -> Result<u32, AmqpError> {
        let end = Instant::now() + patience;
        let mut answers: HashMap<String, u32> = HashMap::new();
        loop {
            let JobCopy { job, stamp } = copy.clone();
            client.ask(&Request::Losses { job, stamp }).await?;
            let round = Instant::now() + ANSWERS;
            while let Some(reply) = client.reply(round).await {
                // What this process says of itself is known.
                let count = match reply.answer {
                    Answer::Losses { count } if reply.instance != self.instance => count,
                    _ => 0,
                };
                answers.insert(reply.instance, count);
                let all = patience.is_zero() && answers.len() >= client.workers();
                if all || self.sum(copy, &answers) >= enough {
                    break;
                }
            }
            let sum = self.sum(copy, &answers);
            if sum >= enough || Instant::now() >= end {
                return Ok(sum);
            }
            sleep_until(round).await;
        }
    }

    /// Adds up the losses of this process and of the others.
    fn sum(&self, copy: &JobCopy, others: &HashMap<String, u32>) -> u32 {
        others.values().fold(self.of(copy), |sum, count| sum.saturating_add(*count))
    }
}

/// Counts by message, bounded.
#[derive(Default)]
struct Memory {
    counts: HashMap<JobCopy, u32>,
    /// In the order in which they were noted first.
    order: VecDeque<JobCopy>,
}

impl Memory {
    fn note(&mut self, copy: JobCopy) {
        if let Some(count) = self.counts.get_mut(&copy) {
            *count = count.saturating_add(1);
            return;
        }
        if self.order.len() >= REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
        self.order.push_back(copy.clone());
        self.counts.insert(copy, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(job: &str, stamp: &str) -> JobCopy {
        JobCopy { job: job.to_owned(), stamp: stamp.to_owned() }
    }

    #[test]
    fn each_copy_of_a_job_is_counted_by_itself() {
        let mut memory = Memory::default();
        for noted in [copy("a", ""), copy("a", ""), copy("a", "1"), copy("b", "")] {
            memory.note(noted);
        }
        let count = |job, stamp| memory.counts.get(&copy(job, stamp)).copied();
        assert_eq!((count("a", ""), count("a", "1"), count("b", "")), (Some(2), Some(1), Some(1)));
        assert_eq!(count("b", "1"), None);
    }

    #[test]
    fn of_more_messages_than_are_remembered_the_oldest_are_forgotten() {
        let mut memory = Memory::default();
        for number in 0..REMEMBERED + 10 {
            memory.note(copy(&number.to_string(), ""));
        }
        assert_eq!((memory.counts.len(), memory.order.len()), (REMEMBERED, REMEMBERED));
        assert!(!memory.counts.contains_key(&copy("9", "")));
        assert!(memory.counts.contains_key(&copy("10", "")));
    }
}
