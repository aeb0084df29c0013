//! Another version of a large set is served from one moment on, while images keep coming: how long do
//! they wait, and does each get the labels of its own version?
//!
//! The engine is kept full with pixels from memory. It answers batch by batch, so the time from one
//! batch's worth of answers to the next is what a batch takes, and the longest of those around a swap
//! is what the swap costs. The versions are in the host's memory before, as a worker's are, which loads
//! them beside its work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use ndarray::{Array4, Axis};
use tokio_util::sync::CancellationToken;

use angler_inference::embed::Scoring;
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, Want};
use angler_inference::model::Model;
use angler_vectors::ClassVectors;
use angler_vectors::score::ClassScore;

use crate::figures::{median, number};
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, Stage, TOP_K, Wish, units};

/// Different images.
const IMAGES: usize = 64;
/// A score by which the versions are told apart: another one's differ by far more, and rounding by
/// far less.
const APART: f32 = 1e-4;

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    let rows = stage.sized(100_000, 10_000);
    let batch = stage.sized(BATCH, 8);
    // The size that is asked about has 512 values, which a model for metric learning has mostly.
    let (name, model) = match stage.quick {
        false => ("ResNet-50's size", stage.resnet(224, Some(512))?),
        true => ("EfficientNet-Lite0", stage.default.clone()),
    };
    let swaps = stage.sized(5, 2);
    let rig = Rig::new(stage, &model, rows, swaps)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let watched = runtime.block_on(rig.run(stage, &model, batch))?;

    let size = format!("{} × {} vectors, {name}", number(rows as f64), model.dim);
    let times = watched.longest / watched.median;
    report.judge(
        format!("the longest batch of {batch} in {swaps} swaps of {size}"),
        format!(
            "{} ms, {times:.2} × the median of {} ms",
            number(watched.longest),
            number(watched.median)
        ),
        format!("≤ {} × the median", wanted::SWAP),
        Holds::OnAGpu(times <= wanted::SWAP),
        &[
            ("rows", rows as f64),
            ("dim", model.dim as f64),
            ("longest_ms", watched.longest),
            ("median_ms", watched.median),
            ("longest_otherwise_ms", watched.longest_otherwise),
        ],
    );
    report.note(
        "the longest batch without a swap, in the same run",
        format!("{} ms", number(watched.longest_otherwise)),
        &[],
    );
    report.judge(
        "answers with another version's labels, or none",
        format!("{} of {}", watched.wrong, watched.answers),
        "none",
        Holds::Anywhere(watched.wrong == 0),
        &[("wrong", watched.wrong as f64), ("answers", watched.answers as f64)],
    );
    Ok(())
}

/// An image's best class in each version, by its address.
type Expected = HashMap<usize, Vec<ClassScore>>;

struct Rig {
    pixels: Arc<Array4<u8>>,
    /// Served in turn.
    versions: Vec<Arc<ClassVectors>>,
    expected: Arc<Expected>,
}

struct Watched {
    /// In ms, as all of these.
    median: f64,
    longest: f64,
    longest_otherwise: f64,
    answers: usize,
    wrong: usize,
}

/// What was seen so far.
#[derive(Default)]
struct Seen {
    answered: Vec<Instant>,
    wrong: usize,
}

impl Rig {
    fn new(stage: &Stage, model: &Model, rows: usize, swaps: usize) -> Result<Self> {
        let (pixels, _) = stage.pixels(model, IMAGES)?;
        let units = units(stage.open(model, stage.wish(Scoring::Host))?.as_mut(), pixels.view())?;
        let (mut versions, mut expected) = (Vec::new(), Expected::new());
        for version in 0..=swaps {
            let classes = stage.random_set(model, rows, 100 + version as u64)?;
            let top = classes.score_with(&stage.scorer, units.view(), 1);
            let best = top.into_iter().map(|top| top[0]).collect();
            expected.insert(Arc::as_ptr(&classes).addr(), best);
            versions.push(classes);
        }
        Ok(Self { pixels: Arc::new(pixels), versions, expected: Arc::new(expected) })
    }

    async fn run(self, stage: &Stage, model: &Model, batch: usize) -> Result<Watched> {
        let wish = Wish { max_batch: batch, ..stage.wish(Scoring::Graph) };
        let opened = stage.open_all(model, wish)?;
        let policy = BatchPolicy { max_batch: batch, linger: Duration::from_millis(5) };
        let size = (model.pixels.width, model.pixels.height);
        let engine = Engine::start(opened.embedders, policy, size, stage.scorer.clone())?;
        let mut versions = self.versions.into_iter();
        let first = versions.next();
        let served = Arc::new(RwLock::new(first));
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = CancellationToken::new();
        // Enough that the next batch is full before the last is done.
        let clients: Vec<_> = (0..4 * batch)
            .map(|number| {
                let client = Client {
                    engine: engine.clone(),
                    pixels: Arc::clone(&self.pixels),
                    expected: Arc::clone(&self.expected),
                    served: Arc::clone(&served),
                    seen: Arc::clone(&seen),
                };
                tokio::spawn(client.run(number, stop.clone()))
            })
            .collect();
        let answers = |count: usize| {
            let (seen, wanted) = (&seen, lock(&seen).answered.len() + count);
            async move {
                while lock(seen).answered.len() < wanted {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        };
        let mut swaps = Vec::new();
        let swapping = async {
            // Kernels are found, the first version's copy is made.
            answers(8 * batch).await;
            let began = Instant::now();
            // The median is of batches between the swaps.
            let between = async || {
                tokio::time::sleep(stage.time).await;
                answers(6 * batch).await;
            };
            between().await;
            for next in versions {
                let at = Instant::now();
                announce(&engine, &next).await;
                let last = replace(&served, next);
                // Some batches on, every image is one of the new version.
                answers(8 * batch).await;
                drop(last);
                answers(2 * batch).await;
                swaps.push(at..Instant::now());
                between().await;
            }
            began
        };
        let began = tokio::select! {
            began = swapping => began,
            reason = engine.broken() => bail!("the engine broke: {reason}"),
        };
        let ended = Instant::now();
        stop.cancel();
        for client in clients {
            client.await?;
        }
        engine.close().await;
        let seen = std::mem::take(&mut *lock(&seen));
        let mut answered = seen.answered;
        answered.sort();
        let all: Vec<(Instant, Instant)> = answered
            .iter()
            .step_by(batch)
            .zip(answered.iter().skip(batch).step_by(batch))
            .map(|(from, to)| (*from, *to))
            .filter(|(from, to)| *from >= began && *to <= ended)
            .collect();
        let ms = |(from, to): &(Instant, Instant)| 1e3 * (*to - *from).as_secs_f64();
        let in_swap = |(from, to): &&(Instant, Instant)| {
            swaps.iter().any(|swap| *to > swap.start && *from < swap.end)
        };
        let (swapping, otherwise): (Vec<_>, Vec<_>) = all.iter().partition(in_swap);
        ensure!(!swapping.is_empty() && !otherwise.is_empty(), "too few batches were seen");
        let most =
            |times: &[&(Instant, Instant)]| times.iter().copied().map(ms).fold(0.0, f64::max);
        Ok(Watched {
            median: median(otherwise.iter().copied().map(ms)),
            longest: most(&swapping),
            longest_otherwise: most(&otherwise),
            answers: answered.len(),
            wrong: seen.wrong,
        })
    }
}

/// What a worker does when it has loaded a version that it will serve: it is uploaded beside the one
/// that is served.
async fn announce(engine: &Engine, next: &Arc<ClassVectors>) {
    let (memories, next) = (engine.class_memories().to_vec(), Arc::clone(next));
    let uploading = tokio::task::spawn_blocking(move || {
        memories.iter().for_each(|memory| memory.upload(&next));
    });
    let _ = uploading.await; // What is not there is scored on the host.
}

type Served = RwLock<Option<Arc<ClassVectors>>>;

/// From now on images are scored against this version; yields the last one.
fn replace(served: &Served, next: Arc<ClassVectors>) -> Option<Arc<ClassVectors>> {
    served.write().unwrap_or_else(PoisonError::into_inner).replace(next)
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Submits one image after another, each against what is served at that moment.
struct Client {
    engine: Engine,
    pixels: Arc<Array4<u8>>,
    expected: Arc<Expected>,
    served: Arc<Served>,
    seen: Arc<Mutex<Seen>>,
}

impl Client {
    async fn run(self, number: usize, stop: CancellationToken) {
        let mut image = number;
        while !stop.is_cancelled() {
            image = (image + 1) % IMAGES;
            let right = self.image(image).await;
            // Without an answer the engine may be gone, and another try would be one of very many.
            tokio::task::yield_now().await;
            let mut seen = lock(&self.seen);
            seen.answered.push(Instant::now());
            seen.wrong += usize::from(!right);
        }
    }

    /// Whether the answer is that of the version that was asked for.
    async fn image(&self, image: usize) -> bool {
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(classes) = served else { return false };
        let expected = self.expected.get(&Arc::as_ptr(&classes).addr()).map(|best| best[image]);
        let Ok(mut frame) = self.engine.frame().await else { return false };
        let pixels = self.pixels.index_axis(Axis(0), image);
        let Some(values) = pixels.as_slice() else { return false };
        frame.pixels_mut().copy_from_slice(values);
        let want = Want { classes: Some(classes), top_k: TOP_K, ..Want::default() };
        let Ok(scored) = self.engine.submit(frame, want).await else { return false };
        match (scored.top.first(), expected) {
            (Some(found), Some(expected)) => (found.score - expected.score).abs() < APART,
            _ => false,
        }
    }
}
