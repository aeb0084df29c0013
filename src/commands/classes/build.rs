//! `angler classes build`: class vectors out of reference images, and which of them look wrong.

use std::fmt::Write;

use anyhow::Result;
use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use serde_json::{Value, json};

use angler_core::class_sets::build::Failed;
use angler_vectors::Contents;
use angler_vectors::outliers;
use angler_vectors::outliers::Outliers;
use angler_vectors::reference_embeddings::{PerClass, Representatives};
use angler_vectors::rows::Precision;
use angler_vectors::score::Scorer;
use angler_wire::text::plural;

use super::Target;
use super::thresholds::Thresholds;
use crate::app::App;
use crate::commands::image_paths;
use crate::commands::progress::{embed_with_progress, report_failed};

/// Outliers in the table.
const TABLE_ROWS: usize = 20;

/// Outliers, and images that failed, in `--json`; all are counted.
const JSON_ROWS: usize = 1000;

/// Make a version out of images: one folder a class
///
/// Embeds every image and writes what --per-class says under classes.root. Images that cannot be
/// read are listed; a class without any is an error. Images that look mislabelled are listed too,
/// and stay in: nearer to another class's centre than to that of their own class without them, or,
/// in a class of five images or more, far below its other images.
///
/// Meanwhile the embeddings of all images are in memory as f16, 2 bytes a value: 2.5 GB for a
/// million images of 1,280 values. What `all` and `medoids:N` store has been rounded so.
#[derive(Args)]
pub struct BuildCommand {
    /// A folder or s3://bucket/prefix with one sub-folder a class
    source: String,
    /// The vectors of a class: mean (the normalised mean of its embeddings), all (every image's
    /// embedding), or medoids:N (those of its N most representative images; of a class of more than
    /// 4096 images an even selection of 4096 takes part)
    #[arg(long, value_name = "mean|all|medoids:N", default_value = "mean")]
    per_class: PerClass,
    /// Store 16 bits a value: half the size, cosines change by about 1e-4
    #[arg(long)]
    f16: bool,
    #[command(flatten)]
    thresholds: Thresholds,
    #[command(flatten)]
    target: Target,
}

/// What is told of a build.
struct Report<'a> {
    target: &'a Target,
    place: &'a str,
    model: &'a str,
    images: usize,
    classes: usize,
    rows: usize,
    precision: Precision,
    sampled: &'a [(String, usize, usize)],
    failed: &'a Failed,
    outliers: &'a Outliers,
}

impl BuildCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        self.target.check()?;
        let thresholds = self.thresholds.read()?;
        self.target.check_free(app).await?;
        let references = image_paths::references(app, &self.source).await?;
        thresholds.check(references.iter().map(|r| r.label.as_str()))?;
        let model = app.model()?;
        let engine = app.engine(&model)?;
        let store = app.images_for(references.iter().map(|r| r.uri.as_str())).await?;
        let pipeline = app.pipeline(&model, engine.clone(), store);
        let embedded = embed_with_progress(&pipeline, references).await;
        engine.close().await;
        let (embedded, failed) = embedded?;
        report_failed(&failed);

        let precision = if self.f16 { Precision::F16 } else { Precision::F32 };
        // Seconds to minutes of arithmetic for large sets.
        let (found, outliers) = tokio::task::block_in_place(|| -> Result<_> {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let found = embedded.representatives(self.per_class, precision)?;
            Ok((found, outliers::find(&embedded, &Scorer::new(cores))?))
        })?;
        let (images, classes) = (embedded.images.len(), embedded.classes.len());
        drop(embedded);
        let Representatives { labels, vectors, sampled } = found;
        let rows = vectors.rows();
        let mut contents = Contents::new(labels, vectors, &model.fingerprint);
        contents.source = Some(format!("angler classes build {}", self.source));
        thresholds.apply(&mut contents);
        let place = self.target.write(app, &contents).await?;
        let report = Report {
            target: &self.target,
            place: &place,
            model: &model.fingerprint,
            images,
            classes,
            rows,
            precision,
            sampled: &sampled,
            failed: &failed,
            outliers: &outliers,
        };
        match self.target.json {
            true => println!("{}", report.json()),
            false => print!("{}", report.text()),
        }
        Ok(())
    }
}

impl Report<'_> {
    fn json(&self) -> Value {
        let failed = self.failed.iter().take(JSON_ROWS).map(|(reference, error)| {
            json!({
                "uri": reference.uri, "label": reference.label,
                "error": {"code": error.code, "message": error.message},
            })
        });
        let sampled = self
            .sampled
            .iter()
            .map(|(label, images, used)| json!({"label": label, "images": images, "used": used}));
        let shown = self.outliers.found.len().min(JSON_ROWS);
        json!({
            "classes": self.target.id(), "place": self.place, "labels": self.classes,
            "rows": self.rows, "precision": self.precision, "images": self.images,
            "model": self.model, "sampled": sampled.collect::<Vec<_>>(),
            "failed": {"count": self.failed.len(), "images": failed.collect::<Vec<_>>()},
            "outliers": {
                "count": self.outliers.found.len(), "alone": self.outliers.alone,
                "images": self.outliers.found[..shown],
            },
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (label, images, used) in self.sampled {
            let _ = writeln!(
                text,
                "{label}: an even selection of {used} of its {images} images took part in the search \
                 for representative ones"
            );
        }
        let (id, classes) = (self.target.id(), self.classes);
        let (rows, images, model) = (self.rows, self.images, self.model);
        text += &outlier_table(self.outliers);
        let _ = writeln!(
            text,
            "{id}: {classes} classes, {rows} vectors of {images} images, model {model}"
        );
        let _ = writeln!(text, "{}", self.target.next_step(self.place));
        text
    }
}

/// The worst, and how many there are; nothing if there are none.
fn outlier_table(outliers: &Outliers) -> String {
    let found = &outliers.found;
    if found.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table
        .load_style(TableStyle::new().header_separator(LineStyle::none().fill('─')))
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(vec!["image", "class", "cosine", "nearest other", "cosine"]);
    for outlier in found.iter().take(TABLE_ROWS) {
        table.add_row(vec![
            outlier.uri.clone(),
            outlier.label.clone(),
            format!("{:.3}", outlier.own),
            outlier.nearest.clone().unwrap_or_default(),
            outlier.nearest_score.map(|score| format!("{score:.3}")).unwrap_or_default(),
        ]);
    }
    for column in [2, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = format!(
        "{} may be in the wrong folder, used all the same (cosine: to its class without it):\n{table}\n",
        plural(found.len(), "image")
    );
    if found.len() > TABLE_ROWS {
        let more = found.len() - TABLE_ROWS;
        let _ = writeln!(text, "… and {more} more; --json lists up to {JSON_ROWS}");
    }
    text
}
