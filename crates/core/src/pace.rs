//! How much a worker holds: as much as it finishes within a given time, and within given bounds. So what a
//! slow worker holds does not wait for long, and a fast one holds all that it may.
//!
//! The measure is the time between one end and the next while anything is in hand, averaged over the
//! latest ends. Idle time does not count. The number changes only by a factor of two or more, and not
//! twice within seconds, so it does not swing with the measure.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long the number stays after it changed.
const CALM: Duration = Duration::from_secs(10);

/// What a [`Pace`] keeps to.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// What is held should be finished within this time.
    pub within: Duration,
    /// The bounds. The number begins at `most`, since nothing is known of the work yet.
    pub least: usize,
    /// The upper bound.
    pub most: usize,
    /// How many ends the average is over, roughly. The work of one batch ends at once, so it is a few batches.
    pub ends: u32,
}

/// Measures work and says how much of it to hold. Clones share the measure.
#[derive(Debug, Clone)]
pub struct Pace(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    rule: Rule,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// How much to hold.
    now: usize,
    /// When that changed.
    changed: Option<Instant>,
    in_hand: usize,
    /// Since when something is in hand and nothing has ended.
    since: Option<Instant>,
    /// Seconds from one end to the next. From zero, so that a slow start alone changes little.
    each: f64,
}

/// A piece of work in hand, until it is dropped. Unless it was [finished](Self::finished), it says nothing of
/// the rate: it was given back or lost.
#[derive(Debug)]
pub struct InHand {
    pace: Pace,
    finished: bool,
}

impl Pace {
    /// Begins with the most that the rule allows.
    pub fn new(rule: Rule) -> Self {
        let state = State { now: rule.most, changed: None, in_hand: 0, since: None, each: 0.0 };
        Self(Arc::new(Shared { rule, state: Mutex::new(state) }))
    }

    /// Returns how much to hold.
    pub fn now(&self) -> usize {
        self.state().now
    }

    /// Returns how much may be held at most.
    pub fn most(&self) -> usize {
        self.0.rule.most
    }

    /// Takes a piece of work in hand.
    pub fn begin(&self) -> InHand {
        let mut state = self.state();
        state.in_hand += 1;
        state.since.get_or_insert_with(Instant::now);
        InHand { pace: self.clone(), finished: false }
    }

    /// Returns how much was held so far and how much to hold from now on, if that is more or less.
    pub fn change(&self) -> Option<(usize, usize)> {
        let mut state = self.state();
        if state.changed.is_some_and(|changed| changed.elapsed() < CALM) {
            return None;
        }
        let now = state.wanted(self.0.rule)?;
        state.changed = Some(Instant::now());
        Some((std::mem::replace(&mut state.now, now), now))
    }

    /// Returns the seconds from one end to the next.
    pub fn seconds_each(&self) -> f64 {
        self.state().each(self.0.rule)
    }

    /// Nothing panics while it holds the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// An end that is overdue counts before it comes.
    fn each(&self, rule: Rule) -> f64 {
        let since = self.since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.each + (since - self.each).max(0.0) / f64::from(rule.ends)
    }

    fn ended(&mut self, rule: Rule) {
        let since = self.since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.each += (since - self.each) / f64::from(rule.ends);
        self.since = Some(Instant::now());
    }

    /// Less only if half is enough, and more only if that is twice as much or all.
    fn wanted(&self, rule: Rule) -> Option<usize> {
        let finished = rule.within.as_secs_f64() / self.each(rule);
        // An infinite number is `usize::MAX`.
        let bounded = |number: f64| (number as usize).clamp(rule.least, rule.most);
        let (less, more) = (bounded(finished.ceil()), bounded(finished.floor()));
        if less <= self.now / 2 {
            return Some(less);
        }
        let grows = more > self.now && (more >= self.now * 2 || more == rule.most);
        grows.then_some(more)
    }
}

impl InHand {
    /// It is done.
    pub fn finished(mut self) {
        self.finished = true;
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut state = self.pace.state();
        if self.finished {
            state.ended(self.pace.0.rule);
        }
        state.in_hand -= 1;
        if state.in_hand == 0 {
            state.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const SECOND: Duration = Duration::from_secs(1);

    /// Jobs of a prefetch of 16.
    fn pace() -> Pace {
        Pace::new(Rule { within: 60 * SECOND, least: 1, most: 16, ends: 8 })
    }

    /// Finishes pieces of work one after the other, with the next one in hand.
    async fn finish(pace: &Pace, count: usize, each: Duration) -> Vec<usize> {
        let mut changes = Vec::new();
        let mut next = pace.begin();
        for _ in 0..count {
            advance(each).await;
            let done = std::mem::replace(&mut next, pace.begin());
            done.finished();
            changes.extend(pace.change().map(|(_, now)| now));
        }
        changes
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_worker_holds_all_that_it_may() {
        let pace = pace();
        assert!(finish(&pace, 1000, SECOND / 5).await.is_empty());
        // Also if it finishes its work in bursts.
        for _ in 0..50 {
            let all: Vec<InHand> = (0..16).map(|_| pace.begin()).collect();
            advance(10 * SECOND).await;
            all.into_iter().for_each(InHand::finished);
            assert_eq!(pace.change(), None);
        }
        assert_eq!(pace.now(), 16);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_worker_holds_what_it_finishes_in_time() {
        for (each, holds) in [(2, 16), (12, 5), (25, 3), (250, 1), (1000, 1)] {
            let pace = pace();
            finish(&pace, 100, each * SECOND).await;
            let now = pace.now();
            assert!(now >= holds && now < 2 * holds, "{each} s each: {now}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_follows_the_rate_without_swinging() {
        let pace = pace();
        let changes = finish(&pace, 100, 20 * SECOND).await;
        assert!(changes.is_sorted_by(|a, b| a > b), "only down: {changes:?}");
        let slow = pace.now();
        // A third more or less changes nothing.
        for each in [26, 15, 26, 15].map(|seconds| seconds * SECOND) {
            assert!(finish(&pace, 50, each).await.is_empty());
        }
        assert_eq!(pace.now(), slow);
        let changes = finish(&pace, 1000, SECOND / 5).await;
        assert!(changes.is_sorted_by(|a, b| a < b), "only up: {changes:?}");
        assert_eq!(pace.now(), 16);
    }

    #[tokio::test(start_paused = true)]
    async fn it_changes_once_in_ten_seconds_at_most() {
        let pace = pace();
        let mut last: Option<Instant> = None;
        for round in 0..400 {
            // Quick jobs, and a long one now and then.
            let each = if round % 40 == 0 { 200 * SECOND } else { SECOND / 10 };
            if finish(&pace, 1, each).await.is_empty() {
                continue;
            }
            assert!(last.is_none_or(|last| last.elapsed() >= CALM));
            last = Some(Instant::now());
        }
        assert!(last.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_does_not_end_counts_before_it_does() {
        let pace = pace();
        let _first = pace.begin();
        advance(20 * SECOND).await;
        assert_eq!(pace.change(), None, "a slow start");
        advance(160 * SECOND).await;
        assert_eq!(pace.change(), Some((16, 3)));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_and_work_that_is_given_back_say_nothing() {
        let pace = pace();
        for _ in 0..100 {
            advance(1000 * SECOND).await;
            let given_back = pace.begin();
            advance(5 * SECOND).await;
            let finished = pace.begin();
            drop(given_back);
            finished.finished();
            let lost = pace.begin();
            advance(100 * SECOND).await;
            drop(lost);
            assert_eq!(pace.change(), None);
        }
        assert!(pace.seconds_each() < 6.0, "{}", pace.seconds_each());
    }
}
