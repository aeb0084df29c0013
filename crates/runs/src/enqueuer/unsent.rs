//! The jobs of a run that are not known to be sent, in order.

use super::{EnqueueError, Plan};
use crate::mark::Mark;
use crate::spool::{Images, Jobs};

/// Jobs in a batch, and the bytes after which a batch has no further job.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 4 << 20;

/// A job as it is published.
pub(super) struct Message {
    /// Its number in the run.
    pub index: u64,
    /// Its id.
    pub id: String,
    /// Its JSON.
    pub body: Vec<u8>,
}

/// What is left to send of a run.
pub(super) struct Unsent<'a> {
    plan: &'a Plan,
    /// The run's mark, with the `sent` that was written last.
    pub mark: Mark,
    jobs: Jobs<'a>,
    /// The number of the next job of `jobs`.
    next: u64,
    /// Read and not confirmed, in the run's order.
    batch: Vec<Message>,
    /// Messages that are published together: fewer while the broker refuses some.
    size: usize,
}

impl<'a> Unsent<'a> {
    /// Begins behind the jobs that `mark` says were sent.
    pub(super) fn new(
        plan: &'a Plan,
        mark: Mark,
        images: &'a Images,
    ) -> Result<Self, std::io::Error> {
        let next = mark.sent.min(mark.jobs);
        let jobs = images.jobs_from(next, plan.per_job)?;
        Ok(Self { plan, mark, jobs, next, batch: Vec::new(), size: BATCH })
    }

    /// Jobs that are confirmed.
    pub(super) fn confirmed(&self) -> u64 {
        self.next - self.batch.len() as u64
    }

    /// Jobs before the first that is not confirmed.
    pub(super) fn first(&self) -> u64 {
        self.batch.first().map_or(self.next, |message| message.index)
    }

    /// `true` if all jobs are confirmed.
    pub(super) fn is_done(&self) -> bool {
        self.first() >= self.mark.jobs
    }

    /// Returns what to publish next, `most` messages at most.
    pub(super) fn batch(&mut self, most: u64) -> Result<&[Message], EnqueueError> {
        let most = self.size.min(usize::try_from(most).unwrap_or(usize::MAX));
        let mut bytes = self.batch.iter().map(|message| message.body.len()).sum::<usize>();
        while self.batch.len() < most && bytes < BATCH_BYTES {
            let Some(images) = self.jobs.next() else { break };
            let job = self.plan.job(self.next, &self.mark, images?);
            let body = serde_json::to_vec(&job)?;
            bytes += body.len();
            self.batch.push(Message { index: self.next, id: job.id, body });
            self.next += 1;
        }
        Ok(&self.batch[..most.min(self.batch.len())])
    }

    /// The batch of `published` messages was answered, and the messages at `refused`, in order, were
    /// refused.
    pub(super) fn answered(&mut self, published: usize, refused: &[usize]) {
        let mut at = 0;
        self.batch.retain(|_| {
            at += 1;
            at > published || refused.binary_search(&(at - 1)).is_ok()
        });
        self.size = match refused.len() {
            0 => (self.size * 2).min(BATCH),
            // Of many that are published beyond a full queue's end, all would be refused each time.
            refused => published.saturating_sub(refused).clamp(1, BATCH),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use angler_wire::job::{ClassSelector, ImageRef};

    use super::*;
    use crate::spool::Spool;

    fn images(count: usize) -> Images {
        let mut spool = Spool::new().unwrap();
        for number in 0..count {
            spool.push(ImageRef { uri: format!("s3://photos/{number}.jpg"), id: None }).unwrap();
        }
        spool.finish().unwrap()
    }

    fn plan() -> Plan {
        Plan {
            run: "nightly".into(),
            per_job: 1,
            classes: ClassSelector::parse("bottles").unwrap(),
            top_k: 1,
            min_score: None,
            embeddings: false,
            max_queued: None,
            patience: Duration::ZERO,
        }
    }

    fn mark(jobs: u64, sent: u64) -> Mark {
        let (run, nonce) = ("nightly".to_owned(), "4f1d09a3c2be".to_owned());
        let (digest, sender) = (String::new(), String::new());
        Mark { run, nonce, jobs, images: jobs, sent, digest, sender }
    }

    fn indices(messages: &[Message]) -> Vec<u64> {
        messages.iter().map(|message| message.index).collect()
    }

    #[test]
    fn what_was_refused_comes_again_and_nothing_else_does() {
        let (images, plan) = (images(10), plan());
        let mut unsent = Unsent::new(&plan, mark(10, 2), &images).unwrap();
        assert_eq!(indices(unsent.batch(6).unwrap()), [2, 3, 4, 5, 6, 7]);
        unsent.answered(6, &[1, 4]);
        assert_eq!((unsent.confirmed(), unsent.first(), unsent.is_done()), (6, 3, false));
        assert_eq!(indices(unsent.batch(u64::MAX).unwrap()), [3, 6, 8, 9]);
        unsent.answered(4, &[0, 1, 2, 3]);
        // One at a time while nothing is accepted.
        assert_eq!(indices(unsent.batch(u64::MAX).unwrap()), [3]);
        unsent.answered(1, &[]);
        assert_eq!((unsent.confirmed(), unsent.first()), (7, 6));
        assert_eq!(indices(unsent.batch(u64::MAX).unwrap()), [6, 8]);
        unsent.answered(2, &[]);
        assert_eq!(indices(unsent.batch(u64::MAX).unwrap()), [9]);
        unsent.answered(1, &[]);
        assert!(unsent.is_done() && unsent.batch(9).unwrap().is_empty());
    }

    #[test]
    fn a_batch_is_bounded_in_messages() {
        let (images, plan) = (images(1000), plan());
        let mut unsent = Unsent::new(&plan, mark(1000, 0), &images).unwrap();
        assert_eq!(unsent.batch(u64::MAX).unwrap().len(), BATCH);
        assert_eq!(unsent.batch(3).unwrap().len(), 3);
        // A mark that says more than there is.
        assert!(Unsent::new(&plan, mark(10, 11), &images).unwrap().is_done());
    }
}
