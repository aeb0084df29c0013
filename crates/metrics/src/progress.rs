//! Whether work moves that no deadline can end: what a watchdog looks at.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

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

    /// What is inside and for how long none of it has finished, if that is longer than `patience`.
    pub fn stuck(&self, patience: Duration) -> Option<String> {
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
