//! Counts which jobs of a run have a result.

use angler_wire::job::Run;

/// The jobs of a run that have a result.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct FinishedJobs {
    /// Jobs that have any result.
    any: Bits,
    /// Jobs that have a `done` result.
    done: Bits,
    count: u64,
    /// One more than the highest job that has a result.
    end: u64,
    /// How many jobs the run has, as its sender and its results say.
    jobs: Option<u64>,
    /// How many of them were sent, if no more will be.
    sent: Option<u64>,
}

/// What a result adds to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// The first result of its job.
    First,
    /// A `done` result that replaces one that is not.
    Better,
    /// Nothing: the job has a result that is as good.
    Nothing,
}

impl FinishedJobs {
    /// Adds a result. A `done` result replaces any other; nothing replaces a `done` one.
    pub fn insert(&mut self, run: &Run, is_done: bool) -> Added {
        self.expect(run.jobs.max(run.index + 1));
        self.end = self.end.max(run.index + 1);
        let is_first = self.any.insert(run.index);
        let is_better = is_done && self.done.insert(run.index);
        match (is_first, is_better) {
            (true, _) => {
                self.count += 1;
                Added::First
            }
            (false, true) => Added::Better,
            (false, false) => Added::Nothing,
        }
    }

    /// `true` if the job has a `done` result.
    pub fn is_done(&self, index: u64) -> bool {
        self.done.contains(index)
    }

    /// How many jobs have a result.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many jobs can have a result: those that were sent, if no more will be. `None` if nothing
    /// says how many jobs the run has.
    pub fn jobs(&self) -> Option<u64> {
        // A job that has a result was sent, whatever the mark of the sender says.
        let sent = self.sent.map(|sent| sent.max(self.end));
        match (self.jobs, sent) {
            (Some(jobs), Some(sent)) => Some(jobs.min(sent)),
            (jobs, sent) => jobs.or(sent),
        }
    }

    /// How many jobs the run was planned with, cancelled or not.
    pub fn planned(&self) -> Option<u64> {
        self.jobs
    }

    /// Notes that only the first `sent` jobs of the run were sent, and no more will be.
    pub fn only(&mut self, sent: u64) {
        self.sent = Some(sent);
    }

    /// Notes that the run has at least `jobs` jobs.
    pub fn expect(&mut self, jobs: u64) {
        self.jobs = Some(self.jobs.unwrap_or(0).max(jobs));
    }

    /// `true` if each job that can have a result has one.
    pub fn is_complete(&self) -> bool {
        self.jobs().is_some_and(|jobs| self.count >= jobs)
    }

    /// `true` if each job that the run was planned with has a result.
    pub fn is_whole(&self) -> bool {
        self.jobs.is_some_and(|jobs| self.count >= jobs)
    }

    /// How many jobs have no result; `None` if nothing says how many there are.
    pub fn lacking(&self) -> Option<u64> {
        self.jobs().map(|jobs| jobs.saturating_sub(self.count))
    }

    /// The first `most` ranges of jobs without a result, both ends included, and how many more there
    /// are.
    pub fn missing(&self, most: usize) -> (Vec<(u64, u64)>, u64) {
        let (mut ranges, mut more) = (Vec::new(), 0);
        let (mut from, jobs) = (0, self.jobs().unwrap_or(0));
        while let Some(first) = self.any.first_unset(from).filter(|first| *first < jobs) {
            let next = self.any.first_set(first).unwrap_or(jobs).min(jobs);
            match ranges.len() < most {
                true => ranges.push((first, next - 1)),
                false => more += 1,
            }
            from = next;
        }
        (ranges, more)
    }
}

/// A set of small numbers.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    /// Adds a number; `false` if it was there.
    pub(super) fn insert(&mut self, index: u64) -> bool {
        let (word, bit) = Self::place(index);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }

    fn contains(&self, index: u64) -> bool {
        let (word, bit) = Self::place(index);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    fn place(index: u64) -> (usize, u64) {
        ((index / 64) as usize, 1 << (index % 64))
    }

    /// The first number from `from` on that is in the set.
    fn first_set(&self, from: u64) -> Option<u64> {
        self.first(from, |word| word)
    }

    /// The first number from `from` on that is not in the set.
    fn first_unset(&self, from: u64) -> Option<u64> {
        let behind = (self.0.len() as u64 * 64).max(from);
        Some(self.first(from, |word| !word).unwrap_or(behind))
    }

    fn first(&self, from: u64, of: impl Fn(u64) -> u64) -> Option<u64> {
        let start = (from / 64) as usize;
        let words = self.0.iter().enumerate().skip(start);
        words
            .map(|(at, word)| {
                let above = if at == start { u64::MAX << (from % 64) } else { u64::MAX };
                (at as u64, of(*word) & above)
            })
            .find(|(_, word)| *word != 0)
            .map(|(at, word)| at * 64 + u64::from(word.trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(index: u64, jobs: u64) -> Run {
        Run { id: "n".to_owned(), jobs, index, nonce: None }
    }

    #[test]
    fn a_done_result_replaces_another_and_is_not_replaced() {
        let mut finished = FinishedJobs::default();
        let added =
            [false, false, true, false, true].map(|is_done| finished.insert(&run(3, 5), is_done));
        assert_eq!(
            added,
            [Added::First, Added::Nothing, Added::Better, Added::Nothing, Added::Nothing]
        );
        assert_eq!((finished.count(), finished.is_done(3), finished.is_done(2)), (1, true, false));
        assert_eq!(finished.insert(&run(0, 5), true), Added::First);
        assert_eq!(finished.insert(&run(0, 5), false), Added::Nothing);
    }

    #[test]
    fn missing_jobs_are_ranges() {
        let mut finished = FinishedJobs::default();
        assert!(
            !finished.is_complete()
                && finished.missing(9) == (vec![], 0)
                && finished.lacking().is_none()
        );
        finished.expect(130);
        assert_eq!((finished.missing(9), finished.lacking()), ((vec![(0, 129)], 0), Some(130)));
        for index in (0..130).filter(|index| ![0, 64, 65, 129].contains(index)) {
            finished.insert(&run(index, 130), true);
        }
        assert_eq!(finished.missing(9), (vec![(0, 0), (64, 65), (129, 129)], 0));
        assert_eq!(finished.missing(1), (vec![(0, 0)], 2));
        assert_eq!((finished.count(), finished.lacking()), (126, Some(4)));
        finished.expect(200);
        assert_eq!(finished.missing(9).0[2], (129, 199));
    }

    #[test]
    fn a_cancelled_run_is_complete_with_what_was_sent() {
        let mut finished = FinishedJobs::default();
        for index in 0..10 {
            finished.insert(&run(index, 100), index % 2 == 0);
        }
        assert!(!finished.is_complete() && finished.lacking() == Some(90));
        finished.only(12);
        assert_eq!((finished.jobs(), finished.lacking()), (Some(12), Some(2)));
        // A mark that is behind what was sent, or is gone: more jobs than that have a result.
        finished.only(0);
        assert_eq!(
            (finished.jobs(), finished.lacking(), finished.is_complete()),
            (Some(10), Some(0), true)
        );
        assert_eq!((finished.planned(), finished.is_whole()), (Some(100), false));
    }
}
