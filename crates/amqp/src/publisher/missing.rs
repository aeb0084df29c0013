//! Queues that the broker said do not exist.
//!
//! Asking costs a channel and leaves an error in the broker's log, and thousands of results may be for
//! one client that is gone. So an answer holds for a while: meanwhile a message that comes back counts
//! as one for a missing queue.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long an answer holds.
const HOLDS: Duration = Duration::from_secs(10);

/// Queues that are remembered at most.
const KEPT: usize = 1000;

#[derive(Default)]
pub(super) struct Missing(Mutex<HashMap<String, Instant>>);

impl Missing {
    /// Notes that there is no such queue now.
    pub fn note(&self, queue: &str) {
        // Nothing panics while it holds the lock.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT {
            all.retain(|_, at| at.elapsed() < HOLDS);
        }
        if all.len() < KEPT {
            all.insert(queue.to_owned(), Instant::now());
        }
    }

    /// Returns whether there was no such queue a moment ago.
    pub fn knows(&self, queue: &str) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(queue).is_some_and(|at| at.elapsed() < HOLDS)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_holds_for_a_while_and_few_are_kept() {
        let missing = Missing::default();
        missing.note("gone");
        advance(HOLDS - Duration::from_millis(1)).await;
        assert!(missing.knows("gone") && !missing.knows("other"));
        advance(Duration::from_millis(1)).await;
        assert!(!missing.knows("gone"));
        for number in 0..2 * KEPT {
            missing.note(&number.to_string());
        }
        assert!(missing.knows("0") && !missing.knows(&KEPT.to_string()));
        advance(HOLDS).await;
        missing.note("gone");
        assert!(missing.knows("gone"));
    }
}
