//! `angler classes`: make versions of class vectors, measure and compare them.

mod compare;
mod evaluate;
mod html;
mod kept;
mod npy;
mod rescore;
mod tables;
mod thumbnails;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use ndarray::Array2;
use ndarray_npy::ReadNpyExt;

use super::progress::{build_with_progress, report_failed};
use super::{UsageError, gather};
use crate::app::App;
use crate::classes::catalog::version_key;
use crate::classes::{Contents, file};
use crate::job::check_name;
use crate::store::ObjectError;

/// Make versions of class vectors, measure and compare them
#[derive(Subcommand)]
pub enum ClassesCommand {
    // The commands' own types carry their help.
    Build(BuildCommand),
    Import(ImportCommand),
    Evaluate(evaluate::EvaluateCommand),
    Compare(compare::CompareCommand),
    Rescore(rescore::RescoreCommand),
}

#[derive(Args)]
struct Target {
    /// Name of the class set
    #[arg(long, value_name = "NAME")]
    set: String,
    /// The new version; an existing one is never overwritten
    #[arg(long, value_name = "VERSION")]
    version: String,
    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

/// Make a version out of images: one folder a class
///
/// Embeds every image and writes the mean of each class's normalised embeddings under
/// classes.root. Images that cannot be read are listed; a class without any is an error.
#[derive(Args)]
pub struct BuildCommand {
    /// A folder or s3://bucket/prefix with one sub-folder a class
    source: String,
    #[command(flatten)]
    target: Target,
}

/// Make a version out of vectors that another tool made
///
/// Writes them under classes.root, marked as made with the configured model.
#[derive(Args)]
pub struct ImportCommand {
    /// Vectors: .npy, f32 or f64, [rows, dim]
    #[arg(long, value_name = "FILE.npy")]
    vectors: PathBuf,
    /// Labels: .json (an array of strings) or .txt (one a line); a repeated label has several vectors
    #[arg(long, value_name = "FILE")]
    labels: PathBuf,
    /// Below it an image is unknown, unless its job says otherwise
    #[arg(long, value_name = "COSINE")]
    min_score: Option<f32>,
    #[command(flatten)]
    target: Target,
}

impl ClassesCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        match self {
            Self::Build(command) => command.run(app).await,
            Self::Import(command) => command.run(app).await,
            Self::Evaluate(command) => command.run(app).await,
            Self::Compare(command) => command.run(app).await,
            Self::Rescore(command) => command.run(app).await,
        }
    }
}

impl BuildCommand {
    async fn run(self, app: &App) -> Result<()> {
        self.target.check()?;
        let references = gather::references(app, &self.source).await?;
        let model = app.model()?;
        let engine = app.engine(&model)?;
        let store = app.images_for(references.iter().map(|r| r.uri.as_str())).await;
        let pipeline = app.pipeline(&model, engine.clone(), store);
        let built = build_with_progress(&pipeline, references).await;
        engine.close().await;
        let built = built?;
        report_failed(&built);
        let source = Some(format!("angler classes build {}", self.source));
        let place = self.target.write(app, &built.contents(&model.fingerprint, source)).await?;
        let images: usize = built.images.iter().sum();
        self.target.report(
            &place,
            built.labels.len(),
            built.labels.len(),
            images,
            &model.fingerprint,
        );
        Ok(())
    }
}

impl ImportCommand {
    async fn run(self, app: &App) -> Result<()> {
        self.target.check()?;
        let model = app.model()?;
        let vectors = read_npy(&self.vectors)?;
        if vectors.ncols() != model.dim {
            bail!(
                "{}: its vectors have {} values, those of model {} have {}",
                self.vectors.display(),
                vectors.ncols(),
                model.fingerprint,
                model.dim
            );
        }
        let labels = read_labels(&self.labels)?;
        let mut distinct = labels.clone();
        distinct.sort();
        distinct.dedup();
        let rows = vectors.nrows();
        let mut contents = Contents::new(labels, vectors, &model.fingerprint);
        contents.min_score = self.min_score;
        contents.source = Some(format!("angler classes import {}", self.vectors.display()));
        let place = self.target.write(app, &contents).await?;
        self.target.report(&place, distinct.len(), rows, 0, &model.fingerprint);
        Ok(())
    }
}

impl Target {
    fn check(&self) -> Result<(), UsageError> {
        check_name(&self.set).map_err(|e| UsageError(format!("--set: {e}")))?;
        check_name(&self.version).map_err(|e| UsageError(format!("--version: {e}")))
    }

    async fn write(&self, app: &App, contents: &Contents) -> Result<String> {
        let bytes = file::write(contents, (&self.set, &self.version))?;
        let root = app.class_root().await?;
        let key = version_key(&self.set, &self.version);
        match root.create(&key, bytes.into()).await {
            Ok(()) => Ok(root.place(&key)),
            Err(ObjectError::Exists(place)) => {
                bail!(ObjectError::Exists(place))
            }
            Err(error) => Err(error).context("class vectors cannot be written"),
        }
    }

    fn report(&self, place: &str, classes: usize, rows: usize, images: usize, model: &str) {
        let id = format!("{}@{}", self.set, self.version);
        if self.json {
            let report = serde_json::json!({
                "classes": id, "place": place, "labels": classes, "rows": rows,
                "images": images, "model": model,
            });
            println!("{report}");
            return;
        }
        let of = if images > 0 { format!(" of {images} images") } else { String::new() };
        println!("{id}: {classes} classes, {rows} vectors{of}, model {model}");
        println!("written to {place}; jobs and `angler classify` name it {id}");
    }
}

fn read_npy(path: &PathBuf) -> Result<Array2<f32>> {
    let open = || std::fs::File::open(path).with_context(|| path.display().to_string());
    if let Ok(vectors) = Array2::<f32>::read_npy(open()?) {
        return Ok(vectors.as_standard_layout().into_owned());
    }
    // numpy's own default is f64.
    let wide = Array2::<f64>::read_npy(open()?).with_context(|| {
        format!("{}: must be a .npy file of f32 or f64, [rows, dim]", path.display())
    })?;
    Ok(wide.as_standard_layout().mapv(|x| x as f32))
}

fn read_labels(path: &PathBuf) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    if path.extension().is_some_and(|e| e == "json") {
        return serde_json::from_str(&text)
            .with_context(|| format!("{}: must be a JSON array of strings", path.display()));
    }
    Ok(text
        .lines()
        .map(|line| line.trim_end_matches('\r').to_owned())
        .filter(|l| !l.is_empty())
        .collect())
}
