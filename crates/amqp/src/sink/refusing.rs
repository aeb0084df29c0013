//! Which reply queues refuse results, so that no result is offered to one of them for long.
//!
//! A job holds its place in the worker until its result is safe. A queue that is full, or whose node
//! is down, must not hold all places: a result is offered to it for [`PATIENCE`], counted from the
//! queue's first refusal. Later results for it are offered once, until it accepts one or nothing was
//! offered to it for a while.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a queue may refuse. A change of a queue's leader takes less.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a queue that has used up its patience may take to confirm.
const BRIEF: Duration = Duration::from_secs(1);

/// How long a queue's last refusal is remembered.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Queues that are remembered at most. With more refusing ones nobody has patience with another.
const KEPT: usize = 1000;

#[derive(Default)]
pub(super) struct Refusing(Mutex<HashMap<String, Refusals>>);

/// A queue's refusals since it last accepted a result.
struct Refusals {
    first: Instant,
    last: Instant,
}

impl Refusing {
    /// Returns how long `queue` may take to confirm a result.
    pub fn confirm(&self, queue: &str) -> Duration {
        self.left(queue).max(BRIEF)
    }

    /// Notes that `queue` did not accept a result. Returns how long it may still be offered to it.
    pub fn refused(&self, queue: &str) -> Duration {
        let now = Instant::now();
        let mut queues = self.lock();
        if let Some(refusals) = queues.get_mut(queue) {
            refusals.last = now;
        } else if queues.len() < KEPT {
            queues.insert(queue.to_owned(), Refusals { first: now, last: now });
        }
        drop(queues);
        self.left(queue)
    }

    /// Notes that `queue` accepted a result.
    pub fn accepted(&self, queue: &str) {
        self.lock().remove(queue);
    }

    fn left(&self, queue: &str) -> Duration {
        let queues = self.lock();
        match queues.get(queue) {
            Some(refusals) => PATIENCE.saturating_sub(refusals.first.elapsed()),
            None if queues.len() < KEPT => PATIENCE,
            None => Duration::ZERO,
        }
    }

    /// The queues that are remembered. Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Refusals>> {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|_, refusals| refusals.last.elapsed() < REMEMBERED);
        queues
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_begins_with_the_first_refusal_and_ends_for_all_at_once() {
        let queues = Refusing::default();
        assert_eq!(queues.confirm("full"), PATIENCE);
        assert_eq!(queues.refused("full"), PATIENCE);
        advance(PATIENCE - Duration::from_millis(100)).await;
        assert_eq!(queues.refused("full"), Duration::from_millis(100));
        advance(Duration::from_millis(100)).await;
        assert_eq!((queues.refused("full"), queues.confirm("full")), (Duration::ZERO, BRIEF));
        assert_eq!(queues.confirm("other"), PATIENCE);
        // As long as results are refused, it stays so.
        for _ in 0..10 {
            advance(REMEMBERED / 2).await;
            assert_eq!(queues.refused("full"), Duration::ZERO);
        }
        advance(REMEMBERED).await;
        assert_eq!(queues.refused("full"), PATIENCE);
        queues.accepted("full");
        advance(2 * PATIENCE).await;
        assert_eq!(queues.refused("full"), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn few_queues_are_remembered_and_there_is_no_patience_with_more() {
        let queues = Refusing::default();
        for number in 0..KEPT {
            assert_eq!(queues.refused(&number.to_string()), PATIENCE);
        }
        assert_eq!((queues.refused("more"), queues.confirm("more")), (Duration::ZERO, BRIEF));
        assert_eq!(queues.lock().len(), KEPT);
        advance(REMEMBERED).await;
        assert_eq!(queues.confirm("more"), PATIENCE);
        assert!(queues.lock().is_empty());
    }
}
