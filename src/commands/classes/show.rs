//! `angler classes show`: what is in one version.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use angler_vectors::ClassVectors;
use angler_vectors::neighbours::{Neighbours, neighbours};
use angler_vectors::rows::{Norms, Precision};

use super::list::size;
use crate::app::App;
use crate::commands::class_set;
use crate::commands::tables::{label, number, show, table};

/// Pairs of classes that are shown.
const PAIRS: usize = 10;

/// Show one version: classes, vectors, norms, and the classes that are easily confused
#[derive(Args)]
pub struct ShowCommand {
    /// SET (its active version), SET@VERSION, or a class vectors file
    #[arg(value_name = "SET[@VERSION]|FILE")]
    classes: String,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    classes: String,
    labels: usize,
    rows: usize,
    dim: usize,
    precision: Precision,
    model: &'a str,
    bytes: usize,
    min_score: Option<f32>,
    min_scores: std::collections::BTreeMap<String, f32>,
    created_at: Option<&'a str>,
    source: Option<&'a str>,
    /// Lengths of the vectors as the file has them.
    norms: Norms,
    #[serde(flatten)]
    neighbours: Neighbours,
}

impl ShowCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let classes = class_set::open(app, &self.classes).await?;
        let scorer = app.settings.scorer();
        let neighbours = tokio::task::block_in_place(|| neighbours(&classes, &scorer, PAIRS));
        let shown = Shown::of(&classes, neighbours);
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&shown)?))?;
        } else {
            show(&shown.text())?;
        }
        Ok(())
    }
}

impl<'a> Shown<'a> {
    fn of(classes: &'a ClassVectors, neighbours: Neighbours) -> Self {
        Self {
            classes: classes.id(),
            labels: classes.labels().len(),
            rows: classes.vectors().rows(),
            dim: classes.dim(),
            precision: classes.precision(),
            model: classes.model(),
            bytes: classes.bytes(),
            min_score: classes.min_score(),
            min_scores: classes.min_scores(),
            created_at: classes.created_at(),
            source: classes.source(),
            norms: classes.norms(),
            neighbours,
        }
    }

    fn text(&self) -> String {
        let threshold = match (self.min_score, self.min_scores.len()) {
            (None, 0) => "none".to_owned(),
            (Some(score), 0) => score.to_string(),
            (None, n) => format!("{n} classes have one of their own"),
            (Some(score), n) => format!("{score}, and {n} classes have one of their own"),
        };
        let Norms { min, mean, max, .. } = self.norms;
        let mut text = format!(
            "{}\n  classes    {}\n  vectors    {} × {} {}, {} in memory\n  model      {}\n  \
             threshold  {threshold}\n  norms      {min:.3} to {max:.3}, mean {mean:.3}\n",
            self.classes,
            self.labels,
            self.rows,
            self.dim,
            self.precision,
            size(self.bytes as u64),
            self.model,
        );
        for (name, value) in [("made", self.created_at), ("source", self.source)] {
            if let Some(value) = value {
                text += &format!("  {name:<10} {value}\n");
            }
        }
        let Neighbours { pairs, looked_at, mean_nearest } = &self.neighbours;
        if pairs.is_empty() {
            return text;
        }
        text += &format!("  nearest other class, mean cosine: {mean_nearest:.3}\n");
        let rows = pairs.iter().map(|p| vec![label(&p.a), label(&p.b), number(Some(p.score))]);
        let sample = match *looked_at < self.rows {
            true => format!(" (among {looked_at} of {} vectors)", self.rows),
            false => String::new(),
        };
        let title = format!("the nearest pairs of classes, easily confused{sample}\n");
        text += &table(&title, &["class", "class", "cosine"], 2, rows, pairs.len() as u64);
        text
    }
}
