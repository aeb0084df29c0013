//! What does not fit the device: a batch that is too large, and a set that is too large. Neither may
//! end the engine, or cost an image its answer.
//!
//! The device is made small for it: another process takes its memory until little is left.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::stream::{self, StreamExt};
use ndarray::Axis;

use angler_inference::embed::Scoring;
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, Want};
use angler_inference::model::Model;
use angler_vectors::ClassVectors;

use crate::child::Ballast;
use crate::report::{Holds, Report};
use crate::stage::{BATCH, Stage, TOP_K, Wish};

/// What is left of the device: enough for a session and small batches of ResNet-50's size at
/// 299 × 299, where the first layer of [`TOO_MANY`] images alone yields 2.9 GB.
const LEFT: usize = 3 << 30;
const TOO_MANY: usize = 512;

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    beyond_the_budget(stage, report, &runtime)?;
    let too_many = stage.sized(TOO_MANY, 8);
    let ballast = match stage.on_a_gpu() {
        true => Some(Ballast::new(stage, LEFT).context("taking the device's memory")?),
        false => None,
    };
    let left = match &ballast {
        Some(ballast) => format!("{} MiB left", ballast.left >> 20),
        None => "memory not limited".to_owned(),
    };
    if stage.on_a_gpu() || !stage.quick {
        let model = stage.resnet(299, None)?;
        a_large_batch(stage, report, &runtime, (&model, "ResNet-50's size, 299"), too_many, &left)?;
    } else {
        let model = (&stage.default, "EfficientNet-Lite0");
        a_large_batch(stage, report, &runtime, model, too_many, &left)?;
    }
    a_large_set(stage, report, &runtime, &left, ballast.as_ref().map_or(64 << 20, |b| b.left))
}

/// A set that `embedder.graph_bytes` does not allow: no memory is asked for.
fn beyond_the_budget(
    stage: &Stage,
    report: &mut Report,
    runtime: &tokio::runtime::Runtime,
) -> Result<()> {
    let model = &stage.default;
    let classes = stage.random_set(model, 10_000, 1)?;
    let wish = Wish { graph_bytes: Some(1 << 20), ..stage.wish(Scoring::Graph) };
    let images = stage.sized(256, 16);
    let ran = runtime.block_on(async {
        let engine = start(stage, model, wish)?;
        let answered = answered(stage, &engine, model, &classes, images).await?;
        let in_graph = engine.stats().scored_in_graph();
        engine.close().await;
        Ok::<_, anyhow::Error>((answered, in_graph))
    })?;
    report.judge(
        "a set beyond embedder.graph_bytes",
        format!("{} of {images} images answered, {} batches in the graph", ran.0, ran.1),
        "all, scored on the host",
        Holds::Anywhere(ran.0 == images && ran.1 == 0),
        &[("images", images as f64), ("answered", ran.0 as f64)],
    );
    Ok(())
}

fn a_large_batch(
    stage: &Stage,
    report: &mut Report,
    runtime: &tokio::runtime::Runtime,
    (model, name): (&Model, &str),
    max_batch: usize,
    left: &str,
) -> Result<()> {
    let what = format!("embedder.max_batch = {max_batch}, {name}, {left}");
    let limit = "all images answered, then those of small batches too";
    let classes = stage.random_set(model, 1000, 1)?;
    let wish = Wish { max_batch, ..stage.wish(Scoring::Graph) };
    let images = 2 * max_batch;
    let few = max_batch.min(8);
    let ran = runtime.block_on(async {
        let engine = start(stage, model, wish)?;
        let first = answered(stage, &engine, model, &classes, images).await?;
        let then = answered(stage, &engine, model, &classes, few).await?;
        engine.close().await;
        Ok::<_, anyhow::Error>((first, then))
    });
    match ran {
        Ok((first, then)) => report.judge(
            what,
            format!("{first} of {images} answered, then {then} of {few}"),
            limit,
            Holds::OnAGpu(first == images && then == few),
            &[("images", images as f64), ("answered", first as f64)],
        ),
        Err(error) => {
            let reason = format!("{error:#}").replace('\n', " ");
            report.judge(what, reason, limit, Holds::OnAGpu(false), &[]);
        }
    }
    Ok(())
}

fn a_large_set(
    stage: &Stage,
    report: &mut Report,
    runtime: &tokio::runtime::Runtime,
    left: &str,
    bytes: usize,
) -> Result<()> {
    let model = &stage.default;
    // Half as much again as there is room for.
    let bytes = bytes / 2 * 3;
    let what = format!("a set of {} MiB, {left}", bytes >> 20);
    let limit = "all images answered, then a small set in the graph again";
    let (large, small) = (stage.large_set(model, bytes)?, stage.random_set(model, 1000, 1)?);
    let images = stage.sized(2 * BATCH, 8);
    let ran = runtime.block_on(async {
        let engine = start(stage, model, stage.wish(Scoring::Graph))?;
        let first = answered(stage, &engine, model, &large, images).await?;
        let before = engine.stats().scored_in_graph();
        let then = answered(stage, &engine, model, &small, images).await?;
        let in_graph = engine.stats().scored_in_graph() - before;
        engine.close().await;
        Ok::<_, anyhow::Error>((first, before, then, in_graph))
    });
    match ran {
        Ok((first, of_large, then, of_small)) => report.judge(
            what,
            format!(
                "{first} of {images} answered ({of_large} batches in the graph), then {then} \
                 ({of_small} in the graph)"
            ),
            limit,
            Holds::OnAGpu(first == images && then == images && of_small > 0),
            &[("images", images as f64), ("answered", first as f64)],
        ),
        Err(error) => {
            let reason = format!("{error:#}").replace('\n', " ");
            report.judge(what, reason, limit, Holds::OnAGpu(false), &[]);
        }
    }
    Ok(())
}

fn start(stage: &Stage, model: &Model, wish: Wish) -> Result<Engine> {
    let opened = stage.open_all(model, wish)?;
    let policy = BatchPolicy { max_batch: wish.max_batch, linger: Duration::from_millis(50) };
    let size = (model.pixels.width, model.pixels.height);
    Ok(Engine::start(opened.embedders, policy, size, stage.scorer.clone())?)
}

/// How many of so many images have a label. An engine that is gone is an error.
async fn answered(
    stage: &Stage,
    engine: &Engine,
    model: &Model,
    classes: &Arc<ClassVectors>,
    images: usize,
) -> Result<usize> {
    let (pixels, _) = stage.pixels(model, images.min(64))?;
    let submit = async |image: usize| {
        let mut frame = engine.frame().await?;
        let pixels = pixels.index_axis(Axis(0), image % pixels.len_of(Axis(0)));
        frame.pixels_mut().copy_from_slice(pixels.as_slice().unwrap_or_default());
        let classes = Some(Arc::clone(classes));
        engine.submit(frame, Want { classes, top_k: TOP_K, ..Want::default() }).await
    };
    let all = async {
        let answers = stream::iter(0..images).map(submit).buffer_unordered(images);
        answers.filter(|answer| std::future::ready(answer.is_ok())).count().await
    };
    tokio::select! {
        count = all => Ok(count),
        reason = engine.broken() => bail!("the engine broke: {reason}"),
    }
}
