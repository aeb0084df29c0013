//! Whose turn it is: suspects run alone, and other jobs must not wait for all of them.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Suspects run for so long at a stretch, and then the others for as long: neither waits for ever.
const STRETCH: Duration = Duration::from_secs(10);

/// Whose turn it is.
pub(super) struct Suspects {
    waiting: Option<watch::Receiver<bool>>,
    /// When the current stretch of suspects began.
    since: Option<Instant>,
    /// Until when the others have their turn.
    later: Option<Instant>,
}

impl Suspects {
    pub fn new(waiting: Option<watch::Receiver<bool>>) -> Self {
        Self { waiting, since: None, later: None }
    }

    /// Returns once suspects wait and it is their turn.
    pub async fn turn(&mut self) {
        let Some(waiting) = &mut self.waiting else { return std::future::pending().await };
        if !*waiting.borrow() {
            self.since = None;
        }
        if self.since.is_some_and(|since| since.elapsed() > STRETCH) {
            self.since = None;
            self.later = Some(Instant::now() + STRETCH);
        }
        if let Some(later) = self.later {
            sleep_until(later).await;
            self.later = None;
        }
        if waiting.wait_for(|waiting| *waiting).await.is_err() {
            std::future::pending::<()>().await;
        }
        self.since.get_or_insert_with(Instant::now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often it was the suspects' turn within a time, if each takes a second.
    async fn turns(suspects: &mut Suspects, within: Duration) -> usize {
        let until = Instant::now() + within;
        let mut count = 0;
        while tokio::time::timeout_at(until, suspects.turn()).await.is_ok() {
            count += 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        count
    }

    #[tokio::test(start_paused = true)]
    async fn suspects_and_others_take_turns() {
        let (waiting, seen) = watch::channel(false);
        let mut suspects = Suspects::new(Some(seen));
        assert_eq!(turns(&mut suspects, 5 * STRETCH).await, 0);
        waiting.send_replace(true);
        let count = turns(&mut suspects, 20 * STRETCH).await;
        assert!((90..=120).contains(&count), "half of 200 seconds: {count}");
        waiting.send_replace(false);
        assert_eq!(turns(&mut suspects, 5 * STRETCH).await, 0);
        waiting.send_replace(true);
        assert!(turns(&mut suspects, STRETCH / 2).await >= 4, "at once again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_without_suspects_never_has_a_turn() {
        assert_eq!(turns(&mut Suspects::new(None), 5 * STRETCH).await, 0);
    }
}
