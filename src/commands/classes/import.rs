//! `angler classes import`: vectors that another tool made.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use angler_inference::model::Model;
use angler_vectors::Contents;
use angler_vectors::rows::Precision;

use super::formats::{Foreign, Format};
use super::thresholds::Thresholds;
use super::{Target, distinct};
use crate::app::App;

/// Make a version out of vectors that another tool made
///
/// Writes them under classes.root, marked as made with the configured model. Only directions count:
/// vectors need not have unit length.
#[derive(Args)]
pub struct ImportCommand {
    /// Vectors, [rows, dim]: .npy, .npz or .safetensors (the array `vectors`, or the only matrix;
    /// f16, f32, f64, bf16), or .csv (a label and its values a line, or with --labels values alone;
    /// a header is passed over)
    #[arg(long, value_name = "FILE")]
    vectors: PathBuf,
    /// Labels: .json (an array of strings) or .txt (one a line); a repeated label has several
    /// vectors. Needed unless the vectors file has them
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Store 16 bits a value: half the size, cosines change by about 1e-4
    #[arg(long)]
    f16: bool,
    #[command(flatten)]
    thresholds: Thresholds,
    #[command(flatten)]
    target: Target,
}

impl ImportCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        self.target.check()?;
        let thresholds = self.thresholds.read()?;
        let format = Format::of("--vectors", &self.vectors)?;
        self.target.check_free(app).await?;
        let model = app.model()?;
        // Gigabytes, on this thread's own time.
        let mut contents = tokio::task::block_in_place(|| self.read(format, &model))?;
        thresholds.check(contents.labels.iter().map(String::as_str))?;
        thresholds.apply(&mut contents);
        let place = self.target.write(app, &contents).await?;
        let (rows, classes) = (contents.vectors.rows(), distinct(&contents.labels));
        if self.target.json {
            let report = json!({
                "classes": self.target.id(), "place": place, "labels": classes, "rows": rows,
                "precision": contents.vectors.precision(), "model": model.fingerprint,
            });
            println!("{report}");
        } else {
            let id = self.target.id();
            println!("{id}: {classes} classes, {rows} vectors, model {}", model.fingerprint);
            println!("{}", self.target.next_step(&place));
        }
        Ok(())
    }

    fn read(&self, format: Format, model: &Model) -> Result<Contents> {
        let place = self.vectors.display();
        let foreign = format.read(&self.vectors, self.labels.is_some())?;
        let Foreign { mut vectors, labels, model: made_with, min_score, min_scores } = foreign;
        if let Some(made_with) = made_with.filter(|made_with| *made_with != model.fingerprint) {
            bail!(
                "{place}: it was made with model {made_with}, but model {} is configured: choose \
                 that one by --model, or make the vectors anew with this one",
                model.fingerprint
            );
        }
        if vectors.dim() != model.dim {
            bail!(
                "{place}: its vectors have {} values, those of model {} have {}: import vectors of \
                 this model, or choose another by --model",
                vectors.dim(),
                model.fingerprint,
                model.dim
            );
        }
        let (labels, labels_place) = match (&self.labels, labels) {
            (Some(path), _) => (read_labels(path)?, path.display()),
            (None, Some(labels)) => (labels, self.vectors.display()),
            (None, None) => bail!("{place}: it has no labels: name a file of them by --labels"),
        };
        if labels.len() != vectors.rows() {
            bail!(
                "{labels_place}: {} labels for {} rows of {place}: there must be one label a row",
                labels.len(),
                vectors.rows()
            );
        }
        if vectors.rows() == 0 {
            bail!("{place}: it has no vectors: its shape is [0, {}]", vectors.dim());
        }
        if let Err((row, what)) = vectors.check() {
            bail!("{place}: row {row} ({:?}) {what}: repair it or leave it out", labels[row]);
        }
        let precision = if self.f16 { Precision::F16 } else { Precision::F32 };
        if vectors.precision() != precision {
            vectors = vectors.to_precision(precision);
        }
        let mut contents = Contents::new(labels, vectors, &model.fingerprint);
        contents.min_score = min_score;
        contents.min_scores = min_scores;
        contents.source = Some(format!("angler classes import {place}"));
        Ok(contents)
    }
}

fn read_labels(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) {
        return serde_json::from_str(&text)
            .with_context(|| format!("{}: must be a JSON array of strings", path.display()));
    }
    // `lines` takes a carriage return off each line's end.
    Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
}
