//! `angler classify`: the worker without a broker, over files.

pub(super) mod report;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use report::Report;

use angler_core::class_sets::catalog::Catalog;
use angler_core::pipeline::Pipeline;
use angler_core::retry::RetrySchedule;
use angler_core::sink::ResultSink;
use angler_core::sink::jsonl::JsonLinesSink;
use angler_core::source::folder::{FolderSource, IMAGES_PER_JOB};
use angler_core::worker::Worker;
use angler_inference::model::Model;
use angler_vectors::{ClassVectors, Contents};
use angler_wire::job::{ClassSelector, Job, Run, hex};

use super::class_set::{ClassesOrigin, folder_name, read_file};
use super::label_args::LabelArgs;
use super::progress::{build_with_progress, progress_bar, report_failed};
use crate::app::App;
use crate::commands::image_paths;
use crate::shutdown;

/// Classify images in folders, files or S3: no broker needed
///
/// On a terminal: a table and a summary. In a pipe, or with --out: one JSON line an image, with
/// `uri`, `label`, `score` and `top` or `error`, and `classes`, `model` and `backend` beside them.
/// An image that cannot be read is a row with an error; the exit code stays 0.
#[derive(Args)]
pub struct Classify {
    /// Folders, image files, or s3://bucket/prefix
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// SET[@VERSION] under classes.root, a class vectors FILE, or a FOLDER with one sub-folder of
    /// reference images a class
    #[arg(long, value_name = "SET[@VERSION]|FOLDER|FILE")]
    classes: String,
    #[command(flatten)]
    labels: LabelArgs,
    /// Add each image's normalised embedding, base64 of little-endian f32
    #[arg(long)]
    embeddings: bool,
}

impl Classify {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        self.labels.check()?;
        let origin = ClassesOrigin::parse(&self.classes)?;
        let images = image_paths::images(app, &self.paths).await?;
        let references = match &origin {
            ClassesOrigin::Folder(folder) => image_paths::references(app, folder).await?,
            _ => Vec::new(),
        };
        let model = app.model()?;
        let uris = images.iter().chain(references.iter().map(|r| &r.uri)).map(String::as_str);
        let store = app.images_for(uris).await?;
        let engine = app.engine(&model)?;
        let pipeline = app.pipeline(&model, engine.clone(), Arc::clone(&store));
        let (catalog, selector) = match origin {
            ClassesOrigin::Set(selector) => (app.catalog(&model).await?, selector),
            ClassesOrigin::File(path) => fixed(read_file(&path)?, &model)?,
            ClassesOrigin::Folder(folder) => {
                let built = build_with_progress(&pipeline, references).await?;
                report_failed(&built.failed);
                let name = folder_name(&folder);
                let version = {
                    let mut hash = Sha256::new();
                    built.labels.iter().for_each(|label| hash.update(label));
                    built.vectors.iter().for_each(|x| hash.update(x.to_le_bytes()));
                    hex(&hash.finalize())[..12].to_owned()
                };
                let (labels, vectors) = (built.labels, built.vectors);
                let contents = Contents::new(labels, vectors, &model.fingerprint);
                let classes = ClassVectors::new((&name, &version), contents)?;
                fixed(classes, &model)?
            }
        };
        let classes = catalog.resolve(&selector).await?;
        // Another version that becomes active meanwhile is not for this run.
        let selector = ClassSelector { version: Some(classes.version().to_owned()), ..selector };
        let outcome =
            self.classify(app, &model, pipeline, catalog, selector, &classes, images).await;
        engine.close().await;
        outcome
    }

    #[allow(clippy::too_many_arguments)] // One call, each part named once.
    async fn classify(
        &self,
        app: &App,
        model: &Model,
        pipeline: Arc<Pipeline>,
        catalog: Catalog,
        selector: ClassSelector,
        classes: &ClassVectors,
        images: Vec<String>,
    ) -> Result<()> {
        let jobs = images.len().div_ceil(IMAGES_PER_JOB) as u64;
        let total = images.len();
        let template = Job {
            id: "classify".to_owned(),
            images: Vec::new(),
            classes: selector,
            top_k: self.labels.top_k,
            min_score: self.labels.min_score,
            embeddings: self.embeddings,
            run: Some(Run { id: "classify".to_owned(), jobs, index: 0, nonce: None }),
        };
        let output = self.labels.open()?;
        let bar = progress_bar(total, "images");
        let table = output.is_table();
        let report = Arc::new(Mutex::new(Report::new(classes)));
        let (seen, ticking) = (Arc::clone(&report), bar.clone());
        let observer = Box::new(move |entry: &_| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).add(entry);
            ticking.inc(1);
        });
        let (writer, finish) = output.split()?;
        let sink = Arc::new(JsonLinesSink::new(writer, observer));
        let mut options = app.worker_options(
            "classify",
            model,
            2 + total.min(app.settings.limits.images_in_flight) / IMAGES_PER_JOB,
        );
        // A list has no queue for a later attempt: an image that fails for a passing reason is told.
        options.retry = RetrySchedule::never();
        options.every_image = true;
        let worker = Worker::new(
            Box::new(FolderSource::new(template, images)),
            Arc::clone(&sink) as Arc<dyn ResultSink>,
            Arc::clone(&pipeline),
            Arc::new(catalog),
            options,
        );
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let started = Instant::now();
        // There is nothing to drain: half a result file is of no use, and it can be made again.
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => Err(anyhow!("interrupted: the results are not complete")),
            outcome = worker.run(CancellationToken::new()) => outcome.map_err(Into::into),
        };
        let elapsed = started.elapsed();
        bar.finish_and_clear();
        outcome?;
        sink.flush().context("results cannot be written")?;
        drop(sink);
        finish.complete()?;
        let report = report.lock().unwrap_or_else(PoisonError::into_inner);
        if table {
            print!("{}", report.table());
        }
        eprint!("{}", report.summary(elapsed, classes, model, pipeline.engine()));
        self.labels.say_where();
        Ok(())
    }
}

/// A catalog of one version, and the selector that names it.
fn fixed(classes: ClassVectors, model: &Model) -> Result<(Catalog, ClassSelector)> {
    let selector = ClassSelector {
        set: classes.set().to_owned(),
        version: Some(classes.version().to_owned()),
    };
    Ok((Catalog::fixed(classes, &model.fingerprint, model.dim)?, selector))
}
