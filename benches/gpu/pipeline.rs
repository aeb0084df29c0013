//! The way of a worker's images, without a broker and a store: encoded images lie in memory, and the
//! pipeline decodes, embeds and scores them, as many at once as a worker has in flight.
//!
//! Two things can limit it: the bare session, and the cores that decode. Both are measured beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;

use angler_core::pipeline::{ImageLimits, Pipeline};
use angler_core::store::{ByteBudget, Fetched, ImageStore};
use angler_inference::embed::Scoring;
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, Want};
use angler_metrics::CloseReason;
use angler_pixels::decode_for;
use angler_wire::error::{ImageError, ImageErrorCode};

use crate::child::Bare;
use crate::figures::{number, percent};
use crate::photos::{Photos, jpeg};
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, LIMITS, Stage, TOP_K, Wish};

/// What images are made as.
const SIZE: (u32, u32) = (640, 480);
const QUALITY: f32 = 85.0;
const CLASSES: usize = 10_000;

/// `embedder.max_batch`.
fn batch(stage: &Stage) -> usize {
    stage.sized(BATCH, 8)
}

/// Images that need no fetching; a URI is a number.
struct Memory(Vec<Bytes>);

#[async_trait::async_trait]
impl ImageStore for Memory {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        let number: usize =
            uri.parse().map_err(|_| ImageError::new(ImageErrorCode::BadUri, "not a number"))?;
        let bytes = self.0[number % self.0.len()].clone();
        let permit = budget.reserve(bytes.len() as u64).await?;
        Ok(Fetched { bytes, permit })
    }
}

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    let photos = Photos::read(&stage.photos)?;
    let images: Vec<Bytes> = (0..stage.sized(256, 16))
        .map(|n| Ok(jpeg(&photos.photo(n, SIZE), QUALITY)?.into()))
        .collect::<Result<_>>()?;
    let bytes = images.iter().map(Bytes::len).sum::<usize>() as f64 / images.len() as f64;
    let runtime = tokio::runtime::Runtime::new()?;
    let mut bare = Bare::start(stage, &stage.default)?;
    let mut alone = || match &mut bare {
        Some(bare) => bare.rate(batch(stage), stage.time),
        None => Ok(f64::NAN),
    };
    // Before and after, and the pipeline between them.
    let before = alone()?;
    let decoders = decoding(stage, &images)?;
    let ran = runtime.block_on(run(stage, images))?;
    let alone = f64::midpoint(before, alone()?);

    let limit = if alone.is_nan() { decoders } else { alone.min(decoders) };
    let (width, height) = SIZE;
    report.judge(
        format!(
            "decode, embed and score JPEGs of {width} × {height}, {:.0} kB, images/s",
            bytes / 1e3
        ),
        format!(
            "{}, {} of the limit: bare session {}, decoding alone on {} cores {}",
            number(ran.rate),
            percent(ran.rate / limit),
            if alone.is_nan() { "–".to_owned() } else { number(alone) },
            stage.cores,
            number(decoders)
        ),
        format!("≥ {} of the lower one", percent(wanted::OF_LIMIT)),
        Holds::OnAGpu(ran.rate >= wanted::OF_LIMIT * limit),
        &[("rate", ran.rate), ("decoders", decoders), ("bare", alone)],
    );
    report.judge(
        "time that a session is busy meanwhile",
        format!(
            "{} of each of {}; {:.1} images in a batch",
            percent(ran.busy),
            ran.lanes,
            ran.filled
        ),
        format!("≥ {} where decoding allows it", percent(wanted::BUSY)),
        Holds::OnAGpu(ran.busy >= wanted::BUSY * (decoders / alone).min(1.0)),
        &[("busy", ran.busy), ("sessions", ran.lanes as f64)],
    );
    report.judge(
        "images that failed meanwhile",
        format!("{} of {}", ran.failed, ran.done),
        "none",
        Holds::Anywhere(ran.failed == 0),
        &[("failed", ran.failed as f64), ("images", ran.done as f64)],
    );
    Ok(())
}

/// Images a second that all cores decode when they have nothing else to do.
fn decoding(stage: &Stage, images: &[Bytes]) -> Result<f64> {
    let spec = &stage.default.pixels;
    let done = AtomicUsize::new(0);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let worker = || -> Result<()> {
            let mut pixels = vec![0; spec.width as usize * spec.height as usize * 3];
            while started.elapsed() < stage.time {
                let number = done.fetch_add(1, Ordering::Relaxed);
                let decoded = decode_for(&images[number % images.len()], spec, LIMITS)?;
                decoded.resize_into(spec, &mut pixels)?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..stage.cores).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(done.into_inner() as f64 / started.elapsed().as_secs_f64())
}

struct Ran {
    rate: f64,
    /// Of each session's time.
    busy: f64,
    lanes: usize,
    /// Images in a batch, on average.
    filled: f64,
    done: usize,
    failed: usize,
}

async fn run(stage: &Stage, images: Vec<Bytes>) -> Result<Ran> {
    let model = &stage.default;
    let classes = stage.random_set(model, CLASSES, 1)?;
    let max_batch = batch(stage);
    // As many sessions as a worker has.
    let wish = Wish { alone: false, max_batch, ..stage.wish(Scoring::Graph) };
    let opened = stage.open_all(model, wish)?;
    let lanes = opened.embedders.len();
    let policy = BatchPolicy { max_batch, linger: Duration::from_millis(5) };
    let size = (model.pixels.width, model.pixels.height);
    let engine = Engine::start(opened.embedders, policy, size, stage.scorer.clone())?;
    // The defaults of `[limits]`.
    let limits = ImageLimits {
        image_bytes: 32 << 20,
        image_pixels: LIMITS.max_pixels,
        images_in_flight: 256,
        images_at_least: 256,
        bytes_in_flight: 256 << 20,
        image_time: Duration::from_secs(60),
        wait_time: Duration::from_secs(900),
        decoders: stage.cores,
    };
    let store = Arc::new(Memory(images));
    let pipeline = Arc::new(Pipeline::new(store, engine.clone(), model.pixels.clone(), &limits));
    let done = Arc::new(AtomicUsize::new(0));
    let failed = Arc::new(AtomicUsize::new(0));
    let want = Want { classes: Some(classes), top_k: TOP_K, ..Want::default() };
    let mut number = 0_usize;
    let mut until = async |time: Duration| {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let slot = pipeline.slot().await;
            let (pipeline, want) = (Arc::clone(&pipeline), want.clone());
            let (done, failed) = (Arc::clone(&done), Arc::clone(&failed));
            let uri = number.to_string();
            number += 1;
            tokio::spawn(async move {
                match pipeline.image(&uri, want, slot).await {
                    Ok(_) => done.fetch_add(1, Ordering::Relaxed),
                    Err(_) => failed.fetch_add(1, Ordering::Relaxed),
                };
            });
        }
    };
    // The set's copy is made, and every place is taken.
    until(stage.time.max(Duration::from_secs(1))).await;
    let counts = || {
        let stats = engine.stats();
        let reasons = [CloseReason::Full, CloseReason::Linger, CloseReason::Drain];
        let batches: u64 = reasons.map(|reason| stats.batches(reason)).iter().sum();
        (done.load(Ordering::Relaxed), stats.embedding(), stats.images(), batches)
    };
    let (started, first) = (Instant::now(), counts());
    until(stage.time * u32::try_from(stage.rounds)?).await;
    // A batch counts when it is done: with few of them those at the edges would be much.
    // (An engine that is gone makes none.)
    while counts().3 - first.3 < 20 * lanes as u64 && failed.load(Ordering::Relaxed) == 0 {
        until(stage.time).await;
    }
    let (wall, last) = (started.elapsed().as_secs_f64(), counts());
    engine.drain();
    // Whoever has all places knows that all images are done.
    let mut places = Vec::with_capacity(limits.images_in_flight);
    for _ in 0..limits.images_in_flight {
        places.push(pipeline.slot().await);
    }
    engine.close().await;
    let images = last.0 - first.0;
    ensure!(images > 0, "no image came through");
    Ok(Ran {
        rate: images as f64 / wall,
        busy: (last.1 - first.1).as_secs_f64() / (wall * lanes as f64),
        lanes,
        filled: (last.2 - first.2) as f64 / (last.3 - first.3).max(1) as f64,
        done: done.load(Ordering::Relaxed),
        failed: failed.load(Ordering::Relaxed),
    })
}
