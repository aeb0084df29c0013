//! The whole without a broker: what `angler classify` runs, over the images as files.

use std::sync::Arc;

use anyhow::{Result, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use angler_core::class_sets::catalog::Catalog;
use angler_core::pipeline::Pipeline;
use angler_core::sink::ResultSink;
use angler_core::sink::jsonl::JsonLinesSink;
use angler_core::source::folder::{FolderSource, IMAGES_PER_JOB};
use angler_core::worker::Worker;
use angler_inference::engine::Want;
use angler_storage::local::LocalImages;
use angler_vectors::ClassVectors;
use angler_wire::job::{ClassSelector, Job, Run, Verdict};

use super::figures::Sample;
use super::meter::Meter;
use super::score::TOP_K;
use crate::commands::bench::fixture::{SET, Set, Stage};

/// Classifies so many images, once the pipeline is warm.
pub(super) async fn measure(stage: &Stage, set: &Set, images: usize) -> Result<Sample> {
    let engine = stage.app.engine(&stage.model)?;
    let pipeline = stage.app.pipeline(&stage.model, engine.clone(), Arc::new(LocalImages));
    let outcome = async {
        warm(&pipeline, set, &stage.classes, 2 * stage.app.settings.embedder.max_batch).await?;
        classify(stage, set, Arc::clone(&pipeline), images).await
    };
    let outcome = outcome.await;
    engine.close().await;
    outcome
}

/// Some images through every part. Not by a worker: the end of its run would end the engine's lingering.
async fn warm(
    pipeline: &Arc<Pipeline>,
    set: &Set,
    classes: &Arc<ClassVectors>,
    images: usize,
) -> Result<()> {
    let image = |uri: String| async move {
        let classes = Some(Arc::clone(classes));
        let want = Want { classes, top_k: TOP_K, ..Want::default() };
        let slot = pipeline.slot().await;
        pipeline.image(&uri, want, slot).await
    };
    let uris = set.local.iter().cycle().take(images).cloned();
    stream::iter(uris.map(image))
        .buffer_unordered(images.max(1))
        .try_for_each(async |_| Ok(()))
        .await?;
    Ok(())
}

async fn classify(
    stage: &Stage,
    set: &Set,
    pipeline: Arc<Pipeline>,
    images: usize,
) -> Result<Sample> {
    let uris: Vec<String> = set.local.iter().cycle().take(images).cloned().collect();
    let template = Job {
        id: "bench".to_owned(),
        images: Vec::new(),
        classes: ClassSelector { set: SET.0.to_owned(), version: Some(SET.1.to_owned()) },
        top_k: 1,
        min_score: None,
        embeddings: false,
        run: Some(Run {
            id: "bench".to_owned(),
            jobs: images.div_ceil(IMAGES_PER_JOB) as u64,
            index: 0,
            nonce: None,
        }),
    };
    let failed = Arc::new(std::sync::Mutex::new(None));
    let seen = Arc::clone(&failed);
    let observer = Box::new(move |entry: &angler_wire::job::ImageEntry| {
        if let Verdict::Failed { error } = &entry.verdict {
            let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            seen.get_or_insert_with(|| format!("{}: {error}", entry.uri));
        }
    });
    let sink: Arc<dyn ResultSink> =
        Arc::new(JsonLinesSink::new(Some(Box::new(std::io::sink())), observer));
    let in_flight = images.min(stage.app.settings.limits.images_in_flight);
    let options = stage.app.worker_options("bench", &stage.model, 2 + in_flight / IMAGES_PER_JOB);
    let (fingerprint, dim) = (&stage.model.fingerprint, stage.model.dim);
    let classes = ClassVectors::new(SET, stage.classes.contents())?;
    let catalog = Arc::new(Catalog::fixed(classes, fingerprint, dim)?);
    let source = Box::new(FolderSource::new(template, uris));
    let worker = Worker::new(source, sink, pipeline, catalog, options);
    let meter = Meter::start();
    worker.run(CancellationToken::new()).await?;
    let sample = meter.stop(images as u64);
    if let Some(error) = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        bail!("an image was not classified: {error}");
    }
    Ok(sample)
}
