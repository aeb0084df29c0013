//! What the engine has done so far.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use angler_metrics::CloseReason;
use angler_metrics::Metrics;

/// Counts since the start.
#[derive(Default)]
pub struct EngineStats {
    /// What is counted for others to see.
    pub(super) metrics: Arc<Metrics>,
    images: AtomicU64,
    full: AtomicU64,
    linger: AtomicU64,
    drain: AtomicU64,
    embed_nanos: AtomicU64,
    pub(super) in_graph: AtomicU64,
}

impl EngineStats {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..Self::default() }
    }

    pub(super) fn closed(&self, reason: CloseReason, images: usize) {
        self.images.fetch_add(images as u64, Ordering::Relaxed);
        let counter = match reason {
            CloseReason::Full => &self.full,
            CloseReason::Linger => &self.linger,
            CloseReason::Drain => &self.drain,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.metrics.batch_closed(reason, images);
    }

    /// An embedder worked, and for so many images that was all: those of a run that is done again in
    /// parts are counted there.
    pub(super) fn embedded(&self, spent: Duration, answered: usize) {
        let nanos = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
        self.embed_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.metrics.embedded(spent, answered);
    }

    /// Batches that closed for this reason.
    pub fn batches(&self, reason: CloseReason) -> u64 {
        match reason {
            CloseReason::Full => self.full.load(Ordering::Relaxed),
            CloseReason::Linger => self.linger.load(Ordering::Relaxed),
            CloseReason::Drain => self.drain.load(Ordering::Relaxed),
        }
    }

    /// How many batches there were and why they closed, for people.
    pub fn describe(&self) -> String {
        let [full, linger, drain] = [CloseReason::Full, CloseReason::Linger, CloseReason::Drain]
            .map(|reason| self.batches(reason));
        let total = full + linger + drain;
        let in_graph = match self.scored_in_graph() {
            0 => String::new(),
            batches => format!(", {batches} scored in the graph"),
        };
        format!(
            "{total} (closed: {full} full, {linger} after the linger, {drain} on the drain){in_graph}"
        )
    }

    /// Batches that the back end scored itself. Of a batch that failed, its parts count.
    pub fn scored_in_graph(&self) -> u64 {
        self.in_graph.load(Ordering::Relaxed)
    }

    /// Images that were put into a batch.
    pub fn images(&self) -> u64 {
        self.images.load(Ordering::Relaxed)
    }

    /// Time that the embedders worked on batches, all threads together.
    pub fn embedding(&self) -> Duration {
        Duration::from_nanos(self.embed_nanos.load(Ordering::Relaxed))
    }
}
