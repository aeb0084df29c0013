//! The thread that owns an embedder: takes a batch, embeds it, scores it, answers.
//!
//! One bad image hurts only itself: a batch that fails, or panics, is halved until the guilty
//! image is alone, and only that one is answered with an error. A device that has no memory for a
//! batch gets smaller ones from then on. One that is broken for good is taken out, and what it did
//! not finish is done by others, if there are any and that is wanted ([`OnFailure`]).

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use ndarray::{Array2, ArrayView4, Axis};
use tokio::sync::{mpsc, watch};

use angler_metrics::CloseReason;
use angler_metrics::Stage;
use angler_metrics::progress::Step;
use angler_metrics::trace::{BatchFacts, BatchTrace};
use angler_vectors::ClassVectors;
use angler_vectors::score::{ClassScore, Scorer};
use angler_vectors::unit::normalise;
use angler_wire::error::{ImageError, ImageErrorCode, Reason};
use angler_wire::text::chain;

use super::{Batch, EngineStats, Image, OnFailure, Scored, SubmitError, Want, scoring};
use crate::embed::{EmbedError, Embedder, Scores};

/// What a thread is given.
pub(super) enum Work {
    Batch(Batch),
    /// What another thread gave up.
    Left(Left),
}

/// Images that a broken back end did not finish.
pub(super) struct Left {
    images: Vec<Image>,
    /// u8 RGB, [N, H, W, 3], of these N images.
    pixels: Vec<u8>,
}

/// What the threads share.
#[derive(Clone)]
pub(super) struct Shared {
    /// The thread that waits holds the lock; the others queue behind it.
    pub work: Arc<Mutex<mpsc::Receiver<Work>>>,
    /// For what a broken back end leaves. Weak, so that the threads end with the batcher.
    pub others: mpsc::WeakSender<Work>,
    /// Embedders that go on.
    pub sessions: Arc<AtomicUsize>,
    pub on_failure: OnFailure,
    pub in_flight: watch::Sender<usize>,
    pub broken: Arc<watch::Sender<Option<Reason>>>,
    pub stats: Arc<EngineStats>,
    pub embedding: Arc<Step>,
    pub scorer: Scorer,
}

/// Warms the embedder on its own thread and starts taking batches.
pub(super) fn spawn(
    session: usize,
    embedder: Box<dyn Embedder>,
    size: (u32, u32),
    shared: Shared,
) -> Result<std::thread::JoinHandle<()>, Reason> {
    let (warmed, warm) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("angler-embed-{session}"))
        .spawn(move || {
            let scoring_failed = false;
            let (limit, trace) = (usize::MAX, None);
            let mut executor =
                Executor { session, embedder, size, limit, scoring_failed, trace, shared };
            let result = executor.warm();
            let ready = result.is_ok();
            // Nobody waits any more only if the start was given up.
            if warmed.send(result).is_ok() && ready {
                executor.run();
            }
        })
        .map_err(|e| Reason::new("the thread for the model cannot be started", e))?;
    warm.recv().map_err(|_| "the back end panicked on a black image")??;
    Ok(thread)
}

struct Executor {
    session: usize,
    embedder: Box<dyn Embedder>,
    size: (u32, u32),
    /// The most images at once, since the device had no memory for more.
    limit: usize,
    /// Whether it has been said that the back end could not score a batch.
    scoring_failed: bool,
    /// The span of the batch that is worked on, if a job in it is traced.
    trace: Option<BatchTrace>,
    shared: Shared,
}

/// Why a back end is broken for good, and what it did not finish.
struct Gone {
    reason: Reason,
    left: Left,
}

/// Breaks off with these images unanswered.
fn gone(reason: Reason, images: Vec<Image>, pixels: &[u8]) -> ControlFlow<Gone> {
    ControlFlow::Break(Gone { reason, left: Left { images, pixels: pixels.to_vec() } })
}

/// Drops the images whose tasks are gone: their jobs ended or were lost. The pixels of the last ones
/// move into their places. Yields how many bytes of the pixels are left.
fn keep_awaited(images: &mut Vec<Image>, pixels: &mut [u8]) -> usize {
    let frame = pixels.len().checked_div(images.len()).unwrap_or(0);
    let mut at = 0;
    while at < images.len() {
        if !images[at].reply.is_closed() {
            at += 1;
            continue;
        }
        images.swap_remove(at);
        let last = images.len() * frame;
        pixels.copy_within(last..last + frame, at * frame);
    }
    images.len() * frame
}

/// How far the back end brought a batch.
enum Ran {
    Scored(Scores),
    /// [N, dim], not normalised.
    Embedded(Array2<f32>),
}

impl Executor {
    /// Runs every shape that will come, so that no image waits while the back end makes room for it
    /// or looks for its fastest kernels.
    fn warm(&mut self) -> Result<(), Reason> {
        for images in self.embedder.shapes() {
            match self.black(images) {
                Ok(()) => {}
                Err(EmbedError::OutOfMemory(reason)) if self.embedder.shrink() => {
                    self.short_of_memory(images, &reason);
                    return self.warm();
                }
                // Smaller ones ran; larger ones need not be tried.
                Err(EmbedError::OutOfMemory(reason)) if images > 1 => {
                    self.lower_limit(images, &reason);
                    break;
                }
                Err(e) => {
                    return Err(Reason::new(
                        format!("the model fails on {images} black image(s)"),
                        e,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Embeds this many black images, on which no model fails.
    fn black(&mut self, images: usize) -> Result<(), EmbedError> {
        let frame = self.size.0 as usize * self.size.1 as usize * 3;
        self.embed(&vec![0; images * frame], images).map(drop)
    }

    fn run(mut self) {
        loop {
            let next = {
                let mut work = self.shared.work.lock().unwrap_or_else(PoisonError::into_inner);
                work.blocking_recv()
            };
            let outcome = match next {
                Some(Work::Batch(Batch { mut images, mut joined, frames, closed })) => {
                    self.waited(&images);
                    let kept = keep_awaited(&mut images, &mut joined.pixels);
                    let outcome = self.begin(images, &joined.pixels[..kept], Some(closed));
                    frames.recycle(joined);
                    outcome
                }
                Some(Work::Left(Left { mut images, mut pixels })) => {
                    let kept = keep_awaited(&mut images, &mut pixels);
                    self.begin(images, &pixels[..kept], None)
                }
                None => return,
            };
            if let (Some(trace), ControlFlow::Break(Gone { reason, .. })) =
                (&mut self.trace, &outcome)
            {
                trace.broke(&chain(reason));
            }
            self.trace = None;
            if let ControlFlow::Break(Gone { reason, left }) = outcome {
                return self.leave(reason, left);
            }
            self.shared.in_flight.send_modify(|count| *count = count.saturating_sub(1));
        }
    }

    /// Works on a batch, unless nobody waits for it any more.
    fn begin(
        &mut self,
        images: Vec<Image>,
        pixels: &[u8],
        closed: Option<CloseReason>,
    ) -> ControlFlow<Gone> {
        if images.is_empty() {
            return ControlFlow::Continue(());
        }
        for watch in images.iter().filter_map(|image| image.want.watch.as_ref()) {
            watch.share(images.len());
        }
        self.trace = self.begin_trace(&images, closed);
        self.batch(images, pixels)
    }

    /// Ends this thread: others take what it leaves, or the engine is broken. Images that are
    /// dropped unanswered are seen as [`SubmitError::Gone`].
    fn leave(self, reason: Reason, left: Left) {
        let Self { session, shared, .. } = self;
        let others = shared.sessions.fetch_sub(1, Ordering::SeqCst) - 1;
        if others == 0 || shared.on_failure == OnFailure::Exit {
            // Said before the images are given up: a worker whose last jobs end by that must
            // not take it for a drain that went well.
            shared.broken.send_replace(Some(reason));
            if others == 0 {
                // Nobody may wait to hand anything over.
                shared.work.lock().unwrap_or_else(PoisonError::into_inner).close();
            }
            shared.in_flight.send_modify(|count| *count = count.saturating_sub(1));
            return;
        }
        tracing::error!(
            session,
            "a back end is broken for good and is taken out, {others} go on: {}",
            chain(&reason)
        );
        // The batcher looks anew at how many there are.
        shared.in_flight.send_modify(|_| {});
        if let Some(sender) = shared.others.upgrade() {
            // If it fails, the others broke, too, which they have said.
            let _ = sender.blocking_send(Work::Left(left));
        }
    }

    /// Embeds, scores and answers; breaks off, with the images that were not answered, if the back
    /// end is broken for good.
    ///
    /// * `pixels`: u8 RGB, [N, H, W, 3], of these N images.
    fn batch(&mut self, images: Vec<Image>, pixels: &[u8]) -> ControlFlow<Gone> {
        let count = images.len();
        if count > self.limit {
            // About half, in whole batches of the limit.
            let first = (count / 2).div_ceil(self.limit) * self.limit;
            return self.parts(images, pixels, first);
        }
        let (started, began) = (Instant::now(), SystemTime::now());
        let ran = match self.classify(&images, pixels) {
            Some(scores) => scores.map(Ran::Scored),
            None => self.embed(pixels, count).map(Ran::Embedded),
        };
        let last = matches!((&ran, count), (Ok(_), _) | (Err(EmbedError::Batch(_)), 1));
        self.shared.stats.embedded(started.elapsed(), if last { count } else { 0 });
        if let Some(trace) = &self.trace {
            let name = if matches!(ran, Ok(Ran::Scored(_))) { "embed and score" } else { "embed" };
            let failed = ran.as_ref().err().map(|error| chain(error));
            trace.step(name, began, count, failed.as_deref());
        }
        match ran {
            Ok(Ran::Scored(scores)) => {
                scoring::answer(images, scores);
                ControlFlow::Continue(())
            }
            Ok(Ran::Embedded(embeddings)) => {
                let (clock, began) = (self.shared.stats.metrics.clock(), SystemTime::now());
                answer(images, embeddings, &self.shared.scorer);
                self.shared.stats.metrics.step_of(Stage::Score, clock.spent(), count);
                if let Some(trace) = &self.trace {
                    trace.step("score", began, count, None);
                }
                ControlFlow::Continue(())
            }
            Err(EmbedError::OutOfMemory(reason)) if self.embedder.shrink() => {
                self.short_of_memory(count, &reason);
                self.batch(images, pixels)
            }
            Err(EmbedError::OutOfMemory(reason)) if count > 1 => {
                self.lower_limit(count, &reason);
                self.batch(images, pixels)
            }
            // Not for this image's sake: it has no memory for any.
            Err(EmbedError::Broken(reason) | EmbedError::OutOfMemory(reason)) => {
                gone(reason, images, pixels)
            }
            Err(EmbedError::Batch(reason)) => self.bisect(images, pixels, &reason),
        }
    }

    /// The batch's span, if a job in it is traced.
    fn begin_trace(&self, images: &[Image], closed: Option<CloseReason>) -> Option<BatchTrace> {
        let jobs = images.iter().filter_map(|image| image.want.trace.as_ref());
        let backend = self.embedder.backend().as_str();
        let facts = BatchFacts { images: images.len(), closed, backend, session: self.session };
        BatchTrace::begin(jobs, facts)
    }

    /// Their wait for this batch is over.
    fn waited(&self, images: &[Image]) {
        let (metrics, now) = (&self.shared.stats.metrics, Instant::now());
        for Image { waited: (before, clock), .. } in images {
            metrics.step(Stage::Wait, *before + clock.spent_at(now));
        }
    }

    /// From now on batches are smaller than one of so many images, for which there was no memory.
    fn lower_limit(&mut self, images: usize, reason: &Reason) {
        self.shared.stats.metrics.out_of_memory();
        // Back ends fill batches up to powers of two, so no other size takes less.
        let limit = 1 << (images.max(2) / 2).ilog2();
        if limit < self.limit {
            self.limit = limit;
            self.shared.stats.metrics.limit_batches(limit);
            tracing::warn!(
                session = self.session,
                "no memory for {images} images at once, from now on at most {limit}: {}",
                chain(reason)
            );
        }
    }

    /// The back end has made its calls smaller.
    fn short_of_memory(&self, images: usize, reason: &Reason) {
        self.shared.stats.metrics.out_of_memory();
        let calls = self.embedder.shapes();
        tracing::warn!(
            session = self.session,
            ?calls,
            "no memory for {images} images at once, calls are smaller from now on: {}",
            chain(reason)
        );
    }

    /// Finds the image that the model fails on. If it fails on a black one as well, the fault is the
    /// back end's: then no image is answered, and the reason is what it said of the black one.
    fn bisect(&mut self, images: Vec<Image>, pixels: &[u8], reason: &Reason) -> ControlFlow<Gone> {
        if images.len() > 1 {
            tracing::debug!(images = images.len(), %reason, "a batch failed and is halved");
            let half = images.len() / 2;
            return self.parts(images, pixels, half);
        }
        if let Err(error) = self.black(1) {
            return gone(Reason::new("it fails on a black image, too", error), images, pixels);
        }
        for image in images {
            let message = format!("the model failed on this image: {}", chain(reason));
            let error = ImageError::new(ImageErrorCode::Internal, message);
            // The image's task may be gone, its job timed out or lost.
            let _ = image.reply.send(Err(SubmitError::Image(error)));
        }
        ControlFlow::Continue(())
    }

    /// The first so many, then the rest.
    fn parts(&mut self, mut images: Vec<Image>, pixels: &[u8], at: usize) -> ControlFlow<Gone> {
        let (first, second) = pixels.split_at(pixels.len() / images.len() * at);
        let rest = images.split_off(at);
        match self.batch(images, first) {
            ControlFlow::Continue(()) => self.batch(rest, second),
            ControlFlow::Break(Gone { reason, mut left }) => {
                left.images.extend(rest);
                left.pixels.extend_from_slice(second);
                ControlFlow::Break(Gone { reason, left })
            }
        }
    }

    /// Lets the back end score the batch, if it can and all want the same. None: the batch is to
    /// be embedded, and scored here.
    fn classify(&mut self, images: &[Image], pixels: &[u8]) -> Option<Result<Scores, EmbedError>> {
        let against = scoring::against(images)?;
        let classified = self.run_model(pixels, images.len(), |embedder, pixels| {
            embedder.classify(pixels, &against)
        });
        match classified.unwrap_or_else(|error| Some(Err(error)))? {
            Ok(scores) => {
                self.shared.stats.in_graph.fetch_add(1, Ordering::Relaxed);
                Some(Ok(scores))
            }
            // A smaller one may be scored.
            Err(EmbedError::OutOfMemory(reason)) if images.len() > 1 => {
                Some(Err(EmbedError::OutOfMemory(reason)))
            }
            Err(EmbedError::Broken(reason)) => Some(Err(EmbedError::Broken(reason))),
            Err(EmbedError::Batch(reason) | EmbedError::OutOfMemory(reason)) => {
                if !std::mem::replace(&mut self.scoring_failed, true) {
                    tracing::warn!("a batch could not be scored in the graph: {}", chain(&reason));
                }
                None
            }
        }
    }

    /// Embeds so many images.
    fn embed(&mut self, pixels: &[u8], images: usize) -> Result<Array2<f32>, EmbedError> {
        self.run_model(pixels, images, |embedder, pixels| embedder.embed(pixels)).flatten()
    }

    /// Runs the back end on so many images. A panic in it is an error of the batch.
    fn run_model<T>(
        &mut self,
        pixels: &[u8],
        images: usize,
        run: impl FnOnce(&mut dyn Embedder, ArrayView4<'_, u8>) -> T,
    ) -> Result<T, EmbedError> {
        let (width, height) = (self.size.0 as usize, self.size.1 as usize);
        let view = ArrayView4::from_shape((images, height, width, 3), pixels)
            .map_err(|e| EmbedError::Batch(Reason::new("pixels do not fit the batch", e)))?;
        let _watched = self.shared.embedding.enter();
        let embedder = &mut self.embedder;
        catch_unwind(AssertUnwindSafe(|| run(embedder.as_mut(), view)))
            .map_err(|_| EmbedError::Batch("the back end panicked".into()))
    }
}

/// Scores the batch, once for each version of class vectors in it, and answers each image.
fn answer(items: Vec<Image>, mut embeddings: Array2<f32>, scorer: &Scorer) {
    let directed: Vec<bool> = embeddings.rows_mut().into_iter().map(normalise).collect();
    let embeddings = embeddings;
    let served = |want: &Want| want.classes.as_ref().map(|c| (Arc::clone(c), want.top_k));
    let mut tops = score(&items, &embeddings, scorer, served);
    let candidate = |want: &Want| want.shadow.as_ref().map(|c| (Arc::clone(c), 2));
    let mut shadows = score(&items, &embeddings, scorer, candidate);
    for (index, item) in items.into_iter().enumerate() {
        let scored = if directed[index] {
            Ok(Scored {
                top: std::mem::take(&mut tops[index]),
                shadow: std::mem::take(&mut shadows[index]),
                embedding: item.want.embedding.then(|| embeddings.row(index).to_vec()),
            })
        } else {
            Err(scoring::undirected())
        };
        let _ = item.reply.send(scored); // The image's task may be gone.
    }
}

/// The best classes of each image, as many as wanted: one product for each version that `wanted`
/// names.
fn score(
    items: &[Image],
    embeddings: &Array2<f32>,
    scorer: &Scorer,
    wanted: impl Fn(&Want) -> Option<(Arc<ClassVectors>, usize)>,
) -> Vec<Vec<ClassScore>> {
    struct Member {
        index: usize,
        top_k: usize,
    }
    let mut tops = vec![Vec::new(); items.len()];
    let mut versions: Vec<(Arc<ClassVectors>, Vec<Member>)> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some((classes, top_k)) = wanted(&item.want) else { continue };
        let member = Member { index, top_k };
        match versions.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &classes)) {
            Some((_, members)) => members.push(member),
            None => versions.push((classes, vec![member])),
        }
    }
    for (classes, members) in versions {
        // Images of one version want different numbers of classes; the largest serves all.
        let most = members.iter().map(|member| member.top_k).max().unwrap_or(1);
        let scores = if members.len() == items.len() {
            classes.score_with(scorer, embeddings.view(), most)
        } else {
            let rows: Vec<usize> = members.iter().map(|member| member.index).collect();
            classes.score_with(scorer, embeddings.select(Axis(0), &rows).view(), most)
        };
        for (member, mut top) in members.into_iter().zip(scores) {
            top.truncate(member.top_k);
            tops[member.index] = top;
        }
    }
    tops
}
