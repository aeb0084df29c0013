//! When a batch closes: policy, plus a timer. It knows nothing of what a batch holds.
//!
//! While the engine is busy a batch keeps filling; nothing is gained by closing it early. When the
//! engine is idle, the oldest image waits at most `linger` for company.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Batch, EngineStats, Item};

/// When batches close.
#[derive(Debug, Clone, Copy)]
pub struct BatchPolicy {
    /// The most images in a batch.
    pub max_batch: usize,
    /// How long the oldest image of a batch waits for others while the engine is idle.
    pub linger: Duration,
}

/// Why a batch closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// It held as many images as a batch may.
    Full,
    /// The engine was idle and the oldest image had waited long enough.
    Linger,
    /// The engine was idle and no more images were to come.
    Drain,
}

/// A batch that is forming, as the policy sees it.
#[derive(Debug, Clone, Copy)]
pub struct Forming {
    /// Images so far.
    pub images: usize,
    /// How long the oldest has waited.
    pub waited: Duration,
    /// Whether an embedder has nothing to do and nothing is queued for it.
    pub idle: bool,
    /// Whether no more images are to come.
    pub draining: bool,
}

impl BatchPolicy {
    /// Whether the batch closes now, and why.
    pub fn closes(&self, forming: Forming) -> Option<CloseReason> {
        match forming {
            Forming { images: 0, .. } => None,
            Forming { images, .. } if images >= self.max_batch => Some(CloseReason::Full),
            Forming { idle: false, .. } => None,
            Forming { draining: true, .. } => Some(CloseReason::Drain),
            Forming { waited, .. } => (waited >= self.linger).then_some(CloseReason::Linger),
        }
    }
}

pub(super) struct Batcher {
    pub policy: BatchPolicy,
    /// Embedders that take batches.
    pub lanes: usize,
    pub items: mpsc::Receiver<Item>,
    pub batches: mpsc::Sender<Batch>,
    /// Batches that were handed over and are not finished.
    pub in_flight: watch::Sender<usize>,
    pub in_flight_seen: watch::Receiver<usize>,
    pub draining: watch::Receiver<bool>,
    pub closed: CancellationToken,
    pub stats: Arc<EngineStats>,
}

impl Batcher {
    /// Runs until the engine is closed or all its threads are gone.
    pub async fn run(mut self) {
        let mut items: Vec<Item> = Vec::with_capacity(self.policy.max_batch);
        let mut oldest = Instant::now();
        loop {
            let idle = *self.in_flight_seen.borrow_and_update() < self.lanes;
            let draining = *self.draining.borrow_and_update();
            let forming = Forming { images: items.len(), waited: oldest.elapsed(), idle, draining };
            if let Some(reason) = self.policy.closes(forming) {
                self.stats.closed(reason, items.len());
                tracing::trace!(images = items.len(), ?reason, "batch closed");
                let full = std::mem::replace(&mut items, Vec::with_capacity(self.policy.max_batch));
                self.in_flight.send_modify(|count| *count += 1);
                if self.batches.send(Batch { items: full }).await.is_err() {
                    return; // No thread is left; their senders' drop answers what waits.
                }
                continue;
            }
            tokio::select! {
                () = self.closed.cancelled() => return,
                item = self.items.recv() => {
                    let Some(item) = item else { return };
                    if items.is_empty() {
                        oldest = Instant::now();
                    }
                    items.push(item);
                }
                // Neither sender is dropped before this task ends, so these only wake.
                _ = self.in_flight_seen.changed() => {}
                _ = self.draining.changed() => {}
                () = tokio::time::sleep_until(oldest + self.policy.linger), if idle && !items.is_empty() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: BatchPolicy = BatchPolicy { max_batch: 8, linger: Duration::from_millis(5) };
    const FORMING: Forming =
        Forming { images: 3, waited: Duration::from_millis(1), idle: true, draining: false };

    #[test]
    fn a_batch_closes_when_full_even_if_the_engine_is_busy() {
        let full = Forming { images: 8, idle: false, ..FORMING };
        assert_eq!(POLICY.closes(full), Some(CloseReason::Full));
    }

    #[test]
    fn while_the_engine_is_busy_a_batch_keeps_filling() {
        let old = Forming { waited: Duration::from_secs(9), idle: false, ..FORMING };
        assert_eq!(POLICY.closes(old), None);
        assert_eq!(POLICY.closes(Forming { draining: true, ..old }), None);
    }

    #[test]
    fn an_idle_engine_waits_for_company_only_as_long_as_the_linger() {
        assert_eq!(POLICY.closes(FORMING), None);
        let waited = Forming { waited: POLICY.linger, ..FORMING };
        assert_eq!(POLICY.closes(waited), Some(CloseReason::Linger));
    }

    #[test]
    fn a_drain_does_not_linger_and_closes_nothing_empty() {
        let drain = Forming { draining: true, ..FORMING };
        assert_eq!(POLICY.closes(drain), Some(CloseReason::Drain));
        assert_eq!(POLICY.closes(Forming { images: 0, ..drain }), None);
    }
}
