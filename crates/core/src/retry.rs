//! When a job that failed for a passing reason is tried again: a schedule as data.
//!
//! The attempt count travels in the header `angler-attempt`, so any worker can decide alone. Each
//! delay has a queue of its own (`angler.retry.<delay>`): RabbitMQ expires messages only at the
//! head of a queue, so different delays in one queue would wait for one another.

use std::time::Duration;

/// How often a job is tried, and how long it waits in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetrySchedule {
    /// The wait after attempt 1, 2, …; the last one repeats.
    pub delays: Vec<Duration>,
    /// How many attempts a job has in all; at least 1.
    pub max_attempts: u32,
}

impl RetrySchedule {
    /// One attempt and no other.
    pub const fn never() -> Self {
        Self { delays: Vec::new(), max_attempts: 1 }
    }

    /// How long to wait after `attempt` (the first is 1) failed; none when that was the last.
    pub fn delay_after(&self, attempt: u32) -> Option<Duration> {
        if attempt >= self.max_attempts {
            return None;
        }
        let step = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
        self.delays.get(step).or(self.delays.last()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_follow_the_schedule_and_end_with_the_last_attempt() {
        let schedule = RetrySchedule {
            delays: vec![Duration::from_secs(5), Duration::from_secs(60)],
            max_attempts: 4,
        };
        let seconds: Vec<_> =
            (1..=5).map(|attempt| schedule.delay_after(attempt).map(|d| d.as_secs())).collect();
        assert_eq!(seconds, [Some(5), Some(60), Some(60), None, None]);
    }

    #[test]
    fn without_delays_nothing_is_retried() {
        let schedule = RetrySchedule { delays: vec![], max_attempts: 9 };
        assert_eq!(schedule.delay_after(1), None);
    }
}
