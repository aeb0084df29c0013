//! When a batch closes: policy, plus a timer. It knows nothing of what a batch holds.
//!
//! While the engine is busy a batch keeps filling; nothing is gained by closing it early. When the
//! engine is idle, the oldest image waits at most `linger` for company.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::executor::Work;
use super::frames::{Frames, Part};
use super::{Batch, EngineStats, Image, Item};

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

impl CloseReason {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Full, Self::Linger, Self::Drain];

    /// The reason as metrics name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Linger => "linger",
            Self::Drain => "drain",
        }
    }
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
    /// Embedders that take batches; fewer when one breaks.
    pub lanes: Arc<AtomicUsize>,
    pub items: mpsc::Receiver<Item>,
    pub frames: Arc<Frames>,
    pub batches: mpsc::Sender<Work>,
    /// Batches that were handed over and are not finished.
    pub in_flight: watch::Sender<usize>,
    pub in_flight_seen: watch::Receiver<usize>,
    pub draining: watch::Receiver<bool>,
    pub closed: CancellationToken,
    pub stats: Arc<EngineStats>,
}

impl Drop for Batcher {
    /// However it ends: nobody waits for a frame any more.
    fn drop(&mut self) {
        self.frames.close();
    }
}

impl Batcher {
    /// Runs until the engine is closed or all its threads are gone.
    pub async fn run(mut self) {
        let mut batch = Growing::default();
        loop {
            let in_flight = *self.in_flight_seen.borrow_and_update();
            let lanes = self.lanes.load(Ordering::SeqCst);
            if lanes == 0 {
                return; // The last one broke: what waits is answered by being dropped.
            }
            let idle = in_flight < lanes;
            let draining = *self.draining.borrow_and_update();
            let images = batch.written.len();
            let forming = Forming { images, waited: batch.oldest.elapsed(), idle, draining };
            if let Some(reason) = self.policy.closes(forming) {
                let Some((closed, next)) = self.close(batch, reason).await else { return };
                batch = next;
                self.stats.closed(reason, closed.len());
                tracing::trace!(images = closed.len(), ?reason, "batch closed");
                self.in_flight.send_modify(|count| *count += 1);
                if self.batches.send(Work::Batch(closed)).await.is_err() {
                    return; // No thread is left; their senders' drop answers what waits.
                }
                continue;
            }
            tokio::select! {
                () = self.closed.cancelled() => return,
                item = self.items.recv() => {
                    let Some(item) = item else { return };
                    batch.push(item);
                }
                // Neither sender is dropped before this task ends, so these only wake.
                _ = self.in_flight_seen.changed() => {}
                _ = self.draining.changed() => {}
                () = tokio::time::sleep_until(batch.oldest + self.policy.linger), if idle && images > 0 => {}
            }
        }
    }

    /// Seals the batch's slab and waits for its frames that are being written; their images come
    /// along. Yields also what came meanwhile for the next batch. None if the engine was closed.
    async fn close(&mut self, mut batch: Growing, reason: CloseReason) -> Option<(Batch, Growing)> {
        let mut next = Growing::default();
        self.frames.seal();
        let sealed = loop {
            if let Some(sealed) = self.frames.take_sealed() {
                break sealed;
            }
            tokio::select! {
                () = self.closed.cancelled() => return None,
                item = self.items.recv() => {
                    let item = item?;
                    if item.frame.slab() == batch.slab { batch.push(item) } else { next.push(item) }
                }
                () = self.frames.settled() => {}
            }
        };
        Some((Batch::join(batch.written, sealed, Arc::clone(&self.frames), reason), next))
    }
}

/// A batch that forms.
struct Growing {
    /// Where its images lie, once there is one.
    slab: u64,
    written: Vec<(Part, Image)>,
    oldest: Instant,
}

impl Default for Growing {
    fn default() -> Self {
        Self { slab: 0, written: Vec::new(), oldest: Instant::now() }
    }
}

impl Growing {
    fn push(&mut self, Item { frame, image }: Item) {
        if self.written.is_empty() {
            self.slab = frame.slab();
            self.oldest = Instant::now();
        }
        // A frame is taken only here; one without its part is none to wait for.
        self.written.extend(frame.take().map(|part| (part, image)));
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
