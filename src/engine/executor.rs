//! The thread that owns an embedder: takes a batch, embeds it, scores it, answers.
//!
//! One bad image hurts only itself: a batch that fails, or panics, is halved until the guilty
//! image is alone, and only that one is answered with an error.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ndarray::{Array2, ArrayView4, Axis};
use tokio::sync::{mpsc, watch};

use super::{Batch, EngineStats, Image, Scored, SubmitError, Want, scoring};
use crate::classes::ClassVectors;
use crate::embed::{EmbedError, Embedder, Scores};
use crate::error::{ImageError, ImageErrorCode};
use crate::score::{ClassScore, Scorer, normalise};
use crate::watchdog::Step;

/// What the threads share.
#[derive(Clone)]
pub(super) struct Shared {
    /// The thread that waits holds the lock; the others queue behind it.
    pub batches: Arc<Mutex<mpsc::Receiver<Batch>>>,
    pub in_flight: watch::Sender<usize>,
    pub broken: Arc<watch::Sender<Option<String>>>,
    pub stats: Arc<EngineStats>,
    pub embedding: Arc<Step>,
    pub scorer: Scorer,
}

/// Warms the embedder on its own thread and starts taking batches.
pub(super) fn spawn(
    lane: usize,
    embedder: Box<dyn Embedder>,
    size: (u32, u32),
    shared: Shared,
) -> Result<std::thread::JoinHandle<()>, String> {
    let (warmed, warm) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("angler-embed-{lane}"))
        .spawn(move || {
            let mut executor = Executor { embedder, size, scoring_failed: false, shared };
            let result = executor.warm();
            let ready = result.is_ok();
            // Nobody waits any more only if the start was given up.
            if warmed.send(result).is_ok() && ready {
                executor.run();
            }
        })
        .map_err(|e| format!("the thread for the model cannot be started: {e}"))?;
    warm.recv().map_err(|_| "the back end panicked on a black image".to_owned())??;
    Ok(thread)
}

struct Executor {
    embedder: Box<dyn Embedder>,
    size: (u32, u32),
    /// Whether it has been said that the back end could not score a batch.
    scoring_failed: bool,
    shared: Shared,
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
    fn warm(&mut self) -> Result<(), String> {
        let frame = self.size.0 as usize * self.size.1 as usize * 3;
        for images in self.embedder.shapes() {
            let black = vec![0; images * frame];
            self.embed(&black, images)
                .map_err(|e| format!("the model fails on {images} black image(s): {e}"))?;
        }
        Ok(())
    }

    fn run(mut self) {
        loop {
            let next = {
                let mut batches =
                    self.shared.batches.lock().unwrap_or_else(PoisonError::into_inner);
                batches.blocking_recv()
            };
            let Some(batch) = next else { return };
            let Batch { images, joined, frames } = batch;
            let outcome = self.batch(images, &joined.pixels);
            frames.recycle(joined);
            self.shared.in_flight.send_modify(|count| *count = count.saturating_sub(1));
            if outcome.is_break() {
                return;
            }
        }
    }

    /// Embeds, scores and answers; breaks off if the back end is broken for good. Images that are
    /// dropped unanswered are seen as [`SubmitError::Gone`].
    ///
    /// * `pixels`: u8 RGB, [N, H, W, 3], of these N images.
    fn batch(&mut self, images: Vec<Image>, pixels: &[u8]) -> ControlFlow<()> {
        let ran = match self.classify(&images, pixels) {
            Some(scores) => scores.map(Ran::Scored),
            None => self.embed(pixels, images.len()).map(Ran::Embedded),
        };
        match ran {
            Ok(Ran::Scored(scores)) => {
                scoring::answer(images, scores);
                ControlFlow::Continue(())
            }
            Ok(Ran::Embedded(embeddings)) => {
                answer(images, embeddings, &self.shared.scorer);
                ControlFlow::Continue(())
            }
            Err(EmbedError::Broken(reason)) => {
                // Said before the images are given up: a worker whose last jobs end by that must
                // not take it for a drain that went well.
                self.shared.broken.send_replace(Some(reason));
                ControlFlow::Break(())
            }
            Err(EmbedError::Batch(reason)) => self.bisect(images, pixels, &reason),
        }
    }

    fn bisect(&mut self, mut images: Vec<Image>, pixels: &[u8], reason: &str) -> ControlFlow<()> {
        if images.len() > 1 {
            tracing::debug!(images = images.len(), reason, "a batch failed and is halved");
            let half = images.len() / 2;
            let (first, second) = pixels.split_at(pixels.len() / images.len() * half);
            let rest = images.split_off(half);
            self.batch(images, first)?;
            return self.batch(rest, second);
        }
        for image in images {
            let message = format!("the model failed on this image: {reason}");
            let error = ImageError::new(ImageErrorCode::Internal, message);
            // The image's task may be gone, its job timed out or lost.
            let _ = image.reply.send(Err(SubmitError::Image(error)));
        }
        ControlFlow::Continue(())
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
            Err(EmbedError::Broken(reason)) => Some(Err(EmbedError::Broken(reason))),
            Err(EmbedError::Batch(reason)) => {
                if !std::mem::replace(&mut self.scoring_failed, true) {
                    tracing::warn!("a batch could not be scored in the graph: {reason}");
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
            .map_err(|e| EmbedError::Batch(format!("pixels do not fit the batch: {e}")))?;
        let started = Instant::now();
        let _watched = self.shared.embedding.enter();
        let embedder = &mut self.embedder;
        let ran = catch_unwind(AssertUnwindSafe(|| run(embedder.as_mut(), view)))
            .map_err(|_| EmbedError::Batch("the back end panicked".to_owned()));
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared.stats.embed_nanos.fetch_add(nanos, Ordering::Relaxed);
        ran
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
