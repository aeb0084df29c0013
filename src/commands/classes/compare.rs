//! `angler classes compare`: what another version changes, on the same embeddings.

mod page;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use angler_inference::engine::Want;
use angler_vectors::ClassVectors;
use angler_vectors::compare::{Comparer, Comparison, Pair, Side, Verdict};
use angler_vectors::statistics::ShiftSummary;

use crate::app::{App, last_component};
use crate::commands::classes::saved_embeddings::{BATCH, Expected, Kept, KeptFile, matrix};
use crate::commands::html;
use crate::commands::run_images::each_image;
use crate::commands::tables::{
    errors, given, label, narrow_address, narrow_given, number, rate, show, table,
};
use crate::commands::{class_set, image_paths};

/// Show what changes for images when version B takes the place of version A
///
/// Both score the same embeddings. Where an image lies in a folder named like a class, the truth is
/// known, and a label that changes is fixed or broken.
#[derive(Args)]
pub struct CompareCommand {
    /// SET[@VERSION] under classes.root, or a class vectors file
    #[arg(value_name = "A")]
    a: String,
    /// The same, of the same model
    #[arg(value_name = "B")]
    b: String,
    #[command(flatten)]
    source: SourceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write the result as an HTML page, with pictures of the images whose label changes
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Images to embed: a folder or s3://bucket/prefix
    #[arg(long, value_name = "FOLDER")]
    images: Option<String>,
    /// Embeddings to use: JSON lines of `angler classify --embeddings --out FILE`, or results of
    /// jobs with "embeddings": true
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report<'a> {
    a: String,
    b: String,
    model: &'a str,
    source: String,
    #[serde(flatten)]
    comparison: Comparison,
}

impl CompareCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        html::check(self.html.as_deref())?;
        let a = class_set::open(app, &self.a).await?;
        let b = class_set::open(app, &self.b).await?;
        // Versions of two models do not share a space, nor do they share embeddings.
        class_set::check_model(&b, a.model(), a.dim())?;
        let (threshold_a, threshold_b) = (class_set::thresholds(&a), class_set::thresholds(&b));
        let (labels_a, labels_b) = (class_set::labels(&a), class_set::labels(&b));
        let comparer = Comparer::new(
            Side { labels: &labels_a, threshold: &threshold_a },
            Side { labels: &labels_b, threshold: &threshold_b },
        );
        let mut scorer = Scorer { a: &a, b: &b, comparer };
        let source = match (&self.source.images, &self.source.results) {
            (Some(folder), None) => {
                images(app, folder, &mut scorer).await?;
                folder.clone()
            }
            (None, Some(path)) => {
                tokio::task::block_in_place(|| results(path, &mut scorer))?;
                path.display().to_string()
            }
            _ => bail!("either --images or --results is needed"), // clap sees to it
        };
        let comparison = scorer.comparer.finish();
        let report = Report { a: a.id(), b: b.id(), model: a.model(), source, comparison };
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&report)?))?;
        } else {
            show(&report.text())?;
        }
        if let Some(path) = &self.html {
            html::write(path, &report.page(app).await)?;
        }
        Ok(())
    }
}

/// Scores batches of embeddings by both versions.
struct Scorer<'a> {
    a: &'a ClassVectors,
    b: &'a ClassVectors,
    comparer: Comparer<'a>,
}

impl Scorer<'_> {
    /// `folder` says in which folder an image lies that may be named like its class.
    fn add(&mut self, batch: &[Kept], folder: impl Fn(&str) -> Option<String>) -> Result<()> {
        let embeddings = matrix(batch, self.a.dim())?;
        let (by_a, by_b) = (self.a.score(embeddings.view(), 2), self.b.score(embeddings.view(), 2));
        let mut scores = by_a.iter().zip(&by_b);
        for kept in batch {
            if let Err(error) = &kept.embedding {
                self.comparer.failed(&kept.uri, error);
                continue;
            }
            let Some((a, b)) = scores.next() else { break };
            let truth = folder(&kept.uri).filter(|folder| self.comparer.has_label(folder));
            self.comparer.add(Pair {
                uri: &kept.uri,
                truth: truth.as_deref(),
                a: &class_set::named(self.a, a),
                b: &class_set::named(self.b, b),
            });
        }
        Ok(())
    }
}

async fn images(app: &App, folder: &str, scorer: &mut Scorer<'_>) -> Result<()> {
    let uris = image_paths::images(app, &[folder.to_owned()]).await?;
    let model = app.model()?;
    class_set::check_model(scorer.a, &model.fingerprint, model.dim)?;
    let engine = app.engine(&model)?;
    let store = app.images_for(uris.iter().map(String::as_str)).await?;
    let pipeline = app.pipeline(&model, engine.clone(), store);
    let below = format!("{}/", folder.trim_end_matches('/'));
    let first_folder = |uri: &str| {
        let (first, _) = uri.strip_prefix(&below)?.split_once('/')?;
        Some(first.to_owned())
    };
    let mut batch = Vec::with_capacity(BATCH);
    let want = Want { top_k: 1, embedding: true, ..Want::default() };
    let outcome = each_image(&pipeline, &uris, want, |index, scored| {
        let embedding = scored.map(|scored| scored.embedding.unwrap_or_default());
        batch.push(Kept { uri: uris[index].clone(), id: None, backend: None, embedding });
        if batch.len() == BATCH {
            tokio::task::block_in_place(|| scorer.add(&batch, first_folder))?;
            batch.clear();
        }
        Ok(())
    })
    .await;
    engine.close().await;
    outcome?;
    scorer.add(&batch, first_folder)
}

fn results(path: &Path, scorer: &mut Scorer<'_>) -> Result<()> {
    let expected = Expected {
        classes: scorer.a.id(),
        model: scorer.a.model().to_owned(),
        dim: scorer.a.dim(),
    };
    let mut kept = KeptFile::open(path, None, expected)?;
    let parent = |uri: &str| uri.rsplit_once('/').map(|(folder, _)| last_component(folder));
    let mut images = 0;
    loop {
        let batch = kept.next_batch()?;
        if batch.is_empty() {
            break;
        }
        images += batch.len();
        scorer.add(&batch, parent)?;
    }
    if images == 0 {
        bail!("{} holds no image", path.display());
    }
    kept.remarks();
    Ok(())
}

impl Report<'_> {
    fn text(&self) -> String {
        let c = &self.comparison;
        let mut text = format!(
            "A {}\nB {}\nmodel {}\n{} images of {}\n",
            self.a, self.b, self.model, c.images, self.source
        );
        for (labels, side) in [(&c.only_in_a, "A"), (&c.only_in_b, "B")] {
            if !labels.is_empty() {
                let shown: Vec<String> = labels.iter().take(10).map(|l| label(l)).collect();
                let more = labels.len().saturating_sub(10);
                let more = if more > 0 { format!(" … and {more} more") } else { String::new() };
                text += &format!("labels only in {side}: {}{more}\n", shown.join(", "));
            }
        }
        let mut rows = vec![
            ("same label", &c.agreement),
            ("same nearest class", &c.nearest_agreement),
            ("unknown by A", &c.unknown_a),
            ("unknown by B", &c.unknown_b),
        ];
        if c.truth.right_a.of > 0 {
            rows.push(("right by A", &c.truth.right_a));
            rows.push(("right by B", &c.truth.right_b));
        }
        let cells = rows.iter().map(|(name, measured)| {
            let mut row = vec![(*name).to_owned()];
            row.extend(rate(measured));
            row
        });
        text += &table("", &["", "images", "share", "95% interval"], 1, cells, rows.len() as u64);
        if c.truth.right_a.of > 0 {
            let (fixed, broken) = (c.truth.fixed, c.truth.broken);
            text += &format!("B fixes {fixed} and breaks {broken} of those whose class is known\n");
        }
        text += &shifts(c);
        text += &table(
            "labels that change",
            &["from A's", "to B's", "images"],
            2,
            c.transitions.first.iter().map(|t| {
                vec![given(t.from.as_deref()), given(t.to.as_deref()), t.count.to_string()]
            }),
            c.transitions.total,
        );
        text += &table(
            "images whose label changes",
            &["image", "A", "", "B", "", ""],
            6,
            c.flips.first.iter().map(|flip| {
                let side = |v: &Verdict| [narrow_given(v.label.as_deref()), number(Some(v.score))];
                let effect = flip.effect.map(|effect| effect.to_string());
                let mut row = vec![narrow_address(&flip.uri)];
                row.extend(side(&flip.a));
                row.extend(side(&flip.b));
                row.push(effect.unwrap_or_default());
                row
            }),
            c.flips.total,
        );
        text += &errors(&c.errors);
        text
    }
}

fn shifts(c: &Comparison) -> String {
    let row = |name: &str, shift: &Option<ShiftSummary>| {
        let signed = |value: f64| format!("{value:+.3}");
        shift.map(|s| {
            vec![
                name.to_owned(),
                signed(s.mean),
                signed(f64::from(s.median)),
                signed(f64::from(s.p5)),
                signed(f64::from(s.p95)),
            ]
        })
    };
    let rows = [row("best score", &c.score_shift), row("margin", &c.margin_shift)];
    let headers = ["from A to B", "mean", "median", "5%", "95%"];
    table("", &headers, 1, rows.into_iter().flatten(), 0)
}
