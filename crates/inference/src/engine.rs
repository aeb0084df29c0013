//! The engine: one image in, its best classes out; batches form inside, across jobs.
//!
//! Whoever has decoded an image claims a [`Frame`] ([`Engine::frame`]), writes the pixels into it
//! and submits it ([`Engine::submit`]). One task, the `batcher`, collects images and closes
//! batches by policy. Each embedder is owned by an OS thread, the [`executor`], which embeds a
//! batch, scores it (or lets the back end do so: `scoring`) and answers. The channel between them
//! holds one batch: that is the prefetch, and all of it. Frames are parts of the buffer that the
//! embedder reads ([`frames`]), so pixels are written once.

mod batcher;
pub mod executor;
pub mod frames;
pub mod policy;
mod scoring;
mod stats;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use frames::Frame;
use frames::{Claim, Frames, Joined, Part, Sealed};
use policy::BatchPolicy;
pub use stats::EngineStats;

use angler_metrics::progress::Step;
use angler_metrics::stopwatch::Stopwatch;
use angler_metrics::trace::JobTrace;
use angler_metrics::{Clock, CloseReason, Metrics};
use angler_vectors::ClassVectors;
use angler_vectors::score::{ClassScore, Scorer};
use angler_wire::error::{FatalError, ImageError, Reason};

use crate::embed::{Backend, ClassMemory, Embedder};

/// What is wanted of one image.
#[derive(Debug, Clone, Default)]
pub struct Want {
    /// The class vectors to score against; none: only the embedding is wanted.
    pub classes: Option<Arc<ClassVectors>>,
    /// How many of the best classes are listed.
    pub top_k: usize,
    /// Another version to score against as well, from the same embedding.
    pub shadow: Option<Arc<ClassVectors>>,
    /// Whether the normalised embedding comes back.
    pub embedding: bool,
    /// The span of its job, if one is sent: batches are linked to it.
    pub trace: Option<JobTrace>,
    /// Takes the time of the image's own work, and runs while its batch is embedded.
    pub watch: Option<Stopwatch>,
}

/// What came of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The best classes, best first; empty if no classes were given.
    pub top: Vec<ClassScore>,
    /// The shadow version's best two, best first; empty if there is none.
    pub shadow: Vec<ClassScore>,
    /// The normalised embedding, if wanted.
    pub embedding: Option<Vec<f32>>,
}

/// Why an image has no score.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SubmitError {
    /// This image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The engine is gone: nothing can be said of the image.
    #[error("the engine stopped")]
    Gone,
}

/// An image that waits for its batch.
pub(crate) struct Item {
    frame: Frame,
    image: Image,
}

/// An image of a batch, without its pixels.
pub(crate) struct Image {
    want: Want,
    /// How long it had waited for its frame, and since then.
    waited: (Duration, Clock),
    reply: oneshot::Sender<Result<Scored, SubmitError>>,
}

/// Images that go through the model together.
pub(crate) struct Batch {
    images: Vec<Image>,
    joined: Joined,
    frames: Arc<Frames>,
    closed: CloseReason,
}

impl Batch {
    /// Of images and where they were written.
    fn join(
        mut written: Vec<(Part, Image)>,
        sealed: Sealed,
        frames: Arc<Frames>,
        closed: CloseReason,
    ) -> Self {
        let joined = sealed.join(&mut written);
        let images = written.into_iter().map(|(_, image)| image).collect();
        Self { images, joined, frames, closed }
    }

    fn len(&self) -> usize {
        self.images.len()
    }
}

/// What happens when an embedder is broken for good while others work:
/// `embedder.on_device_failure`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The engine is broken with it.
    #[default]
    Exit,
    /// It is taken out, and the others do what it did not finish.
    Continue,
}

/// Runs the model. Clones share it.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    items: mpsc::Sender<Item>,
    frames: Arc<Frames>,
    draining: watch::Sender<bool>,
    broken: watch::Receiver<Option<Reason>>,
    closed: CancellationToken,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    stats: Arc<EngineStats>,
    embedding: Arc<Step>,
    /// Embedders that go on.
    sessions: Arc<AtomicUsize>,
    backend: Backend,
    devices: Vec<String>,
    class_memories: Vec<Arc<dyn ClassMemory>>,
}

impl Engine {
    /// Warms the embedders and starts their threads and the batcher; must be called inside a
    /// tokio runtime.
    ///
    /// * `size`: width and height of the pixels that will be submitted.
    /// * `scorer`: the threads that large sets are scored on.
    ///
    /// # Errors
    /// [`FatalError::Engine`] if there is no embedder, one fails on a black image, or a thread
    /// cannot be started.
    pub fn start(
        embedders: Vec<Box<dyn Embedder>>,
        policy: BatchPolicy,
        size: (u32, u32),
        scorer: Scorer,
    ) -> Result<Self, FatalError> {
        Self::start_with(embedders, policy, size, scorer, OnFailure::Exit, Arc::default())
    }

    /// As [`start`](Self::start), which exits when an embedder breaks and counts for itself.
    ///
    /// * `metrics`: where batches and their times are recorded.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(
        embedders: Vec<Box<dyn Embedder>>,
        policy: BatchPolicy,
        (width, height): (u32, u32),
        scorer: Scorer,
        on_failure: OnFailure,
        metrics: Arc<Metrics>,
    ) -> Result<Self, FatalError> {
        let backend = embedders
            .first()
            .map(|e| e.backend())
            .ok_or_else(|| FatalError::Engine("there is no embedder".into()))?;
        // A queue of one batch in front of the batcher: what waits beyond that waits in `submit`.
        let (items, queued) = mpsc::channel(policy.max_batch);
        let (batches, ready) = mpsc::channel(1);
        let (draining, drain_seen) = watch::channel(false);
        let (in_flight, in_flight_seen) = watch::channel(0);
        let (break_it, broken) = watch::channel(None);
        let closed = CancellationToken::new();
        metrics.limit_batches(policy.max_batch);
        let stats = Arc::new(EngineStats::new(metrics));
        let embedding = Step::new("batch(es) being embedded");
        let sessions = Arc::new(AtomicUsize::new(embedders.len()));
        let shared = executor::Shared {
            embedding: Arc::clone(&embedding),
            work: Arc::new(Mutex::new(ready)),
            others: batches.downgrade(),
            sessions: Arc::clone(&sessions),
            on_failure,
            in_flight: in_flight.clone(),
            broken: Arc::new(break_it),
            stats: Arc::clone(&stats),
            scorer,
        };
        let frame_bytes = width as usize * height as usize * 3;
        // One fills and one waits while each embedder reads one.
        let frames = Frames::new(embedders.len() + 2, policy.max_batch, frame_bytes);
        let class_memories = each_once(embedders.iter().filter_map(|e| e.class_memory()));
        let devices = embedders.iter().map(|e| e.device()).collect::<BTreeSet<_>>();
        let threads = embedders
            .into_iter()
            .enumerate()
            .map(|(session, embedder)| {
                executor::spawn(session, embedder, (width, height), shared.clone())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(FatalError::Engine)?;
        tokio::spawn(
            batcher::Batcher {
                policy,
                sessions: Arc::clone(&sessions),
                items: queued,
                frames: Arc::clone(&frames),
                batches,
                in_flight,
                in_flight_seen,
                draining: drain_seen,
                closed: closed.clone(),
                stats: Arc::clone(&stats),
            }
            .run(),
        );
        Ok(Self {
            inner: Arc::new(Inner {
                items,
                frames,
                draining,
                broken,
                closed,
                threads: Mutex::new(threads),
                stats,
                embedding,
                sessions,
                backend,
                devices: devices.into_iter().collect(),
                class_memories,
            }),
        })
    }

    /// A place for one image's pixels in a batch that forms, as soon as there is one; while every
    /// embedder is busy and the next batches are full, that takes until one is done. Claim it
    /// late and write it at once: a batch that closes waits for it.
    ///
    /// # Errors
    /// [`SubmitError::Gone`] if the engine broke or was closed.
    pub async fn frame(&self) -> Result<Frame, SubmitError> {
        let asked = Instant::now();
        let mut frame = self.inner.frames.claim().await.ok_or(SubmitError::Gone)?;
        frame.waited = asked.elapsed();
        self.metrics().frame_waited(frame.waited);
        Ok(frame)
    }

    /// A place that is there now, for threads that do not wait; none if there is none, or none any
    /// more, which [`frame`](Self::frame) tells.
    pub fn frame_now(&self) -> Option<Frame> {
        match self.inner.frames.try_claim() {
            Claim::Frame(frame) => Some(frame),
            Claim::Wait | Claim::Closed => None,
        }
    }

    /// Embeds and scores the image that was written into `frame`, in a batch with whatever else is
    /// there.
    ///
    /// # Errors
    /// [`SubmitError::Image`] for this image's own failure, [`SubmitError::Gone`] if the engine
    /// broke or was closed.
    pub async fn submit(&self, frame: Frame, want: Want) -> Result<Scored, SubmitError> {
        let (reply, answer) = oneshot::channel();
        let waited = (frame.waited, self.metrics().clock());
        let item = Item { frame, image: Image { want, waited, reply } };
        self.inner.items.send(item).await.map_err(|_| SubmitError::Gone)?;
        answer.await.map_err(|_| SubmitError::Gone)?
    }

    /// No more images will come than are on their way: batches close without lingering.
    pub fn drain(&self) {
        self.inner.draining.send_replace(true);
    }

    /// Returns once the engine is broken for good, with the reason; else never.
    pub async fn broken(&self) -> FatalError {
        let mut broken = self.inner.broken.clone();
        let reason = broken.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        FatalError::Engine(reason.unwrap_or_else(|| "its threads are gone".into()))
    }

    /// What executes.
    pub fn backend(&self) -> Backend {
        self.inner.backend
    }

    /// The devices that execute, each once: `cpu`, `cuda:0`.
    pub fn devices(&self) -> &[String] {
        &self.inner.devices
    }

    /// Sessions of the model that work.
    pub fn sessions(&self) -> usize {
        self.inner.sessions.load(Ordering::SeqCst)
    }

    /// Where batches and their times are recorded, and so is all that surrounds them.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.stats.metrics
    }

    /// Batches that are being embedded, for the watchdog.
    pub fn embedding(&self) -> Arc<Step> {
        Arc::clone(&self.inner.embedding)
    }

    /// Where class vectors lie beside the models, each memory once. A version that is uploaded
    /// before it is served delays no batch.
    pub fn class_memories(&self) -> &[Arc<dyn ClassMemory>] {
        &self.inner.class_memories
    }

    /// Counts since the start.
    pub fn stats(&self) -> &EngineStats {
        &self.inner.stats
    }

    /// Ends the threads and waits for them, so that the back end is torn down before the process
    /// is. Images that still wait are answered with [`SubmitError::Gone`].
    pub async fn close(&self) {
        self.inner.closed.cancel();
        let threads = {
            let mut threads =
                self.inner.threads.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::take(&mut *threads)
        };
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                // A thread that panicked has said so; there is nothing left to do here.
                let _ = thread.join();
            }
        });
        // A back end that hangs must not keep the process from ending.
        let _ = tokio::time::timeout(Duration::from_secs(5), joined).await;
    }
}

/// Memories, without those that were there before: sessions of one device share one.
fn each_once(memories: impl Iterator<Item = Arc<dyn ClassMemory>>) -> Vec<Arc<dyn ClassMemory>> {
    memories.fold(Vec::new(), |mut all, memory| {
        if !all.iter().any(|known| Arc::ptr_eq(known, &memory)) {
            all.push(memory);
        }
        all
    })
}
