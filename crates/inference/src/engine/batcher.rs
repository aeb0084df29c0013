//! Forms batches: collects images, closes a batch when the [policy](super::policy) says so, and waits for
//! the frames that are still being written.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use angler_metrics::CloseReason;

use super::executor::Work;
use super::frames::{Frames, Part};
use super::policy::{BatchPolicy, Forming};
use super::{Batch, EngineStats, Image, Item};

pub(super) struct Batcher {
    pub policy: BatchPolicy,
    /// Embedders that take batches; fewer when one breaks.
    pub sessions: Arc<AtomicUsize>,
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
            let sessions = self.sessions.load(Ordering::SeqCst);
            if sessions == 0 {
                return; // The last one broke: what waits is answered by being dropped.
            }
            let idle = in_flight < sessions;
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
