//! Notices work that does not move: a decoder or a back end that hangs holds its thread for ever,
//! and no deadline ends it.
//!
//! Waiting for a broker or a store is not watched: both have deadlines, and a restart would not
//! bring them back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// A step that runs on a thread of its own and cannot be cancelled.
pub struct Step {
    /// What happens there, to follow a number: "image(s) being decoded".
    doing: &'static str,
    inside: AtomicUsize,
    /// When work last entered the empty step or left it.
    moved: Mutex<Instant>,
}

impl Step {
    /// A step with nothing in it.
    pub fn new(doing: &'static str) -> Arc<Self> {
        let moved = Mutex::new(Instant::now());
        Arc::new(Self { doing, inside: AtomicUsize::new(0), moved })
    }

    /// One piece of work enters, and leaves when the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> Inside {
        // The clock first: a look in between must not see old work.
        if self.inside.load(Ordering::Acquire) == 0 {
            self.moves();
        }
        self.inside.fetch_add(1, Ordering::AcqRel);
        Inside(Arc::clone(self))
    }

    fn moves(&self) {
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long nothing has left although something is inside, if it is longer than `patience`.
    fn stuck(&self, patience: Duration) -> Option<String> {
        let inside = self.inside.load(Ordering::Acquire);
        let still = self.moved.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        (inside > 0 && still > patience)
            .then(|| format!("{inside} {}, none finished for {} s", self.doing, still.as_secs()))
    }
}

/// Work inside a [`Step`].
pub struct Inside(Arc<Step>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.moves();
        self.0.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Looks at the steps for as long as it is awaited, and tells `say` where work is stuck, or none
/// once it moves again.
pub async fn watch(steps: Vec<Arc<Step>>, patience: Duration, say: impl Fn(Option<String>)) {
    let mut stuck_before = false;
    loop {
        sleep(patience / 10).await;
        let stuck: Vec<String> = steps.iter().filter_map(|step| step.stuck(patience)).collect();
        if stuck.is_empty() != stuck_before {
            continue;
        }
        stuck_before = !stuck.is_empty();
        if stuck_before {
            let stuck = stuck.join("; ");
            tracing::error!("no progress (limits.stall_seconds): {stuck}");
            say(Some(stuck));
        } else {
            tracing::info!("work moves again");
            say(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::task::AbortOnDropHandle;

    const PATIENCE: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn what_does_not_move_is_said_and_what_moves_again_too() {
        let (decoding, embedding) =
            (Step::new("image(s) being decoded"), Step::new("batch(es) being embedded"));
        let said = Arc::new(Mutex::new(Vec::new()));
        let (steps, heard) = (vec![Arc::clone(&decoding), Arc::clone(&embedding)], said.clone());
        let say = move |stuck| heard.lock().unwrap().push(stuck);
        let _watch = AbortOnDropHandle::new(tokio::spawn(watch(steps, PATIENCE, say)));
        // Idle for long, then at work without a pause longer than the patience.
        sleep(10 * PATIENCE).await;
        let stuck = decoding.enter();
        for _ in 0..20 {
            let moving = decoding.enter();
            sleep(PATIENCE / 2).await;
            drop(moving);
        }
        assert!(said.lock().unwrap().is_empty());
        let _also = decoding.enter();
        let embedded = embedding.enter();
        sleep(PATIENCE / 2).await;
        drop(embedded);
        sleep(PATIENCE).await;
        let first = said.lock().unwrap().pop().unwrap().unwrap();
        assert!(first.starts_with("2 image(s) being decoded, none finished for 1"), "{first}");
        sleep(10 * PATIENCE).await;
        assert!(said.lock().unwrap().is_empty(), "said once");
        drop(stuck);
        sleep(PATIENCE / 2).await;
        assert_eq!(*said.lock().unwrap(), [None]);
    }
}
