//! When this worker runs suspects.
//!
//! One worker of the fleet runs them at a time, and only that one stops taking other jobs. An idle
//! worker asks for the turn at once; a busy one leaves the suspects to an idle one for a few seconds
//! first. Suspects and other jobs alternate, so that neither waits forever.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// How long suspects run at a stretch. Other jobs then run for as long.
pub(super) const STRETCH: Duration = Duration::from_secs(10);

/// How long a busy worker leaves suspects to an idle one.
const HURRY: Duration = Duration::from_secs(3);

/// How long to wait before asking again for a turn that another worker has.
const TAKEN: Duration = Duration::from_secs(5);

/// How long the jobs in hand may take to end before the turn goes to another worker. Doubled each time
/// that they do not, so that the suspects of a fleet with long jobs have their turn in the end.
const PATIENCE: Duration = Duration::from_secs(30);
const MOST_PATIENCE: Duration = Duration::from_secs(900);

/// When suspects have their turn.
pub(super) struct Suspects {
    waiting: Option<watch::Receiver<bool>>,
    /// When to ask for the turn: if idle, and at the latest.
    ask: Option<(Instant, Instant)>,
    /// Until when other jobs have their turn.
    later: Option<Instant>,
    patience: Duration,
}

impl Suspects {
    /// * `waiting`: whether suspects wait; `None` if there cannot be any.
    pub fn new(waiting: Option<watch::Receiver<bool>>) -> Self {
        Self { waiting, ask: None, later: None, patience: PATIENCE }
    }

    /// Returns once suspects wait and it is time to ask for the turn. May be dropped at any moment.
    ///
    /// * `idle`: completes when no job is in hand.
    pub async fn due<T>(&mut self, idle: impl Future<Output = T>) {
        let Some(waiting) = &mut self.waiting else { return std::future::pending().await };
        tokio::pin!(idle);
        loop {
            if let Some(later) = self.later {
                sleep_until(later).await;
                self.later = None;
            }
            if !*waiting.borrow() {
                self.ask = None;
            }
            if waiting.wait_for(|waiting| *waiting).await.is_err() {
                return std::future::pending().await; // The source is gone.
            }
            let now = Instant::now();
            // Several workers see them at the same time.
            let (if_idle, at_last) =
                *self.ask.get_or_insert_with(|| (now + some(HURRY / 6), now + HURRY + some(HURRY)));
            let idle = async {
                sleep_until(if_idle).await;
                idle.as_mut().await
            };
            let none_left = tokio::select! {
                biased;
                _ = waiting.wait_for(|waiting| !waiting) => true,
                _ = idle => false,
                () = sleep_until(at_last) => false,
            };
            self.ask = None;
            if !none_left {
                return;
            }
        }
    }

    /// Another worker has the turn.
    pub fn taken(&mut self) {
        self.later = Some(Instant::now() + TAKEN + some(TAKEN));
    }

    /// How long to wait for the jobs in hand.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The jobs in hand did not end in time.
    pub fn given_up(&mut self) {
        self.later = Some(Instant::now() + self.patience);
        self.patience = (self.patience * 2).min(MOST_PATIENCE);
    }

    /// Suspects had their turn.
    pub fn had_their_turn(&mut self) {
        self.later = Some(Instant::now() + STRETCH);
        self.patience = PATIENCE;
    }

    /// None of them waits any more.
    pub fn none_left(&mut self) {
        self.patience = PATIENCE;
    }
}

/// A random part of a duration.
fn some(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use tokio::time::timeout;

    /// How long it takes until suspects are due.
    async fn after<T>(suspects: &mut Suspects, idle: impl Future<Output = T>) -> Duration {
        let start = Instant::now();
        suspects.due(idle).await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_worker_asks_at_once_and_a_busy_one_within_seconds() {
        let (waiting, seen) = watch::channel(false);
        let mut suspects = Suspects::new(Some(seen));
        assert!(timeout(10 * STRETCH, suspects.due(ready(()))).await.is_err(), "none wait");
        waiting.send_replace(true);
        for _ in 0..20 {
            assert!(after(&mut suspects, ready(())).await < Duration::from_secs(1));
            let busy = after(&mut suspects, pending::<()>()).await;
            assert!((HURRY..=2 * HURRY).contains(&busy), "{busy:?}");
        }
        // The time does not begin again with each job that is received meanwhile.
        let start = Instant::now();
        while timeout(Duration::from_millis(100), suspects.due(pending::<()>())).await.is_err() {}
        assert!(start.elapsed() <= 2 * HURRY, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn suspects_that_another_worker_took_are_not_asked_for() {
        let (waiting, seen) = watch::channel(true);
        let mut suspects = Suspects::new(Some(seen));
        assert!(timeout(HURRY / 2, suspects.due(pending::<()>())).await.is_err());
        waiting.send_replace(false);
        assert!(timeout(10 * HURRY, suspects.due(ready(()))).await.is_err());
        waiting.send_replace(true);
        let busy = after(&mut suspects, pending::<()>()).await;
        assert!(busy >= HURRY, "the next ones wait for an idle worker as well: {busy:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn others_have_their_time_after_a_turn_and_while_another_worker_has_it() {
        let (_waiting, seen) = watch::channel(true);
        let mut suspects = Suspects::new(Some(seen));
        suspects.had_their_turn();
        assert!(after(&mut suspects, ready(())).await >= STRETCH);
        suspects.taken();
        let next = after(&mut suspects, ready(())).await;
        assert!((TAKEN..3 * TAKEN).contains(&next), "{next:?}");
        suspects.none_left();
        assert!(after(&mut suspects, ready(())).await < HURRY);
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_do_not_end_have_at_least_half_of_the_time() {
        let (_waiting, seen) = watch::channel(true);
        let mut suspects = Suspects::new(Some(seen));
        let mut before = Duration::ZERO;
        for _ in 0..10 {
            let patience = suspects.patience();
            assert!(patience >= before && patience <= MOST_PATIENCE);
            before = patience;
            suspects.given_up();
            assert!(after(&mut suspects, pending::<()>()).await >= patience);
        }
        assert_eq!(suspects.patience(), MOST_PATIENCE);
        suspects.had_their_turn();
        assert_eq!(suspects.patience(), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_without_suspects_never_has_a_turn() {
        let mut suspects = Suspects::new(None);
        assert!(timeout(10 * STRETCH, suspects.due(ready(()))).await.is_err());
    }
}
