//! What `angler classify` and `angler classes rescore` tell a person: a table of images, and a
//! summary.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use angler_inference::engine::Engine;
use angler_inference::model::Model;
use angler_vectors::ClassVectors;
use angler_wire::error::ImageErrorCode;
use angler_wire::job::{ImageEntry, Verdict};
use angler_wire::text::plural;

/// The most rows that a table shows; the rest is counted.
const ROWS: usize = 200;

/// Counts, and the first rows.
pub(in crate::commands) struct Report {
    total: usize,
    rows: Vec<(String, String, String)>,
    labels: BTreeMap<String, usize>,
    unknown: usize,
    errors: BTreeMap<ImageErrorCode, usize>,
    /// The class labels, to recognise folders that are named like them.
    known: std::collections::BTreeSet<String>,
    in_class_folders: usize,
    agree: usize,
}

impl Report {
    pub(in crate::commands) fn new(classes: &ClassVectors) -> Self {
        Self {
            total: 0,
            rows: Vec::new(),
            labels: BTreeMap::new(),
            unknown: 0,
            errors: BTreeMap::new(),
            known: classes.labels().iter().map(str::to_owned).collect(),
            in_class_folders: 0,
            agree: 0,
        }
    }

    pub(in crate::commands) fn add(&mut self, entry: &ImageEntry) {
        self.total += 1;
        let (label, score) = match &entry.verdict {
            Verdict::Labelled(image) => {
                match &image.label {
                    Some(label) => *self.labels.entry(label.clone()).or_default() += 1,
                    None => self.unknown += 1,
                }
                let best = image.top.first().map(|t| t.label.as_str()).unwrap_or_default();
                let label = image.label.clone().unwrap_or_else(|| format!("unknown ({best}?)"));
                (label, format!("{:.3}", image.score))
            }
            Verdict::Failed { error } => {
                *self.errors.entry(error.code).or_default() += 1;
                (format!("error: {}", error.code), String::new())
            }
        };
        let folder = Path::new(&entry.uri)
            .parent()
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned());
        if let Some(folder) = folder.filter(|folder| self.known.contains(folder)) {
            self.in_class_folders += 1;
            if matches!(&entry.verdict, Verdict::Labelled(i) if i.label.as_ref() == Some(&folder)) {
                self.agree += 1;
            }
        }
        if self.rows.len() < ROWS {
            self.rows.push((entry.uri.clone(), label, score));
        }
    }

    /// The images, one a row.
    pub(in crate::commands) fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(TableStyle::new().header_separator(LineStyle::none().fill('─')))
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(vec!["image", "label", "score"]);
        for (uri, label, score) in &self.rows {
            table.add_row(vec![uri, label, score]);
        }
        if let Some(column) = table.column_mut(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = format!("{table}\n");
        if self.total > self.rows.len() {
            let more = self.total - self.rows.len();
            let _ = writeln!(text, "… and {more} more; --out FILE writes them all");
        }
        text
    }

    /// How many images there were.
    pub(in crate::commands) fn total(&self) -> usize {
        self.total
    }

    /// The counts, the rate, and what classified.
    pub(in crate::commands) fn summary(
        &self,
        elapsed: Duration,
        classes: &ClassVectors,
        model: &Model,
        engine: &Engine,
    ) -> String {
        let mut text = String::new();
        let seconds = elapsed.as_secs_f64();
        let _ = writeln!(
            text,
            "{} in {seconds:.1} s: {:.1} images/s",
            plural(self.total, "image"),
            self.total as f64 / seconds.max(1e-9)
        );
        let _ = writeln!(
            text,
            "  classes  {}, {}",
            classes.id(),
            plural(classes.labels().len(), "label")
        );
        let _ = writeln!(text, "  model    {}", model.fingerprint);
        let _ = writeln!(text, "  back end {}", engine.backend());
        let _ = writeln!(text, "  batches  {}", engine.stats().describe());
        text.push_str(&self.counts());
        text
    }

    /// How many images got which label, or none, or failed.
    pub(in crate::commands) fn counts(&self) -> String {
        let mut text = String::new();
        let mut labels: Vec<(&String, &usize)> = self.labels.iter().collect();
        labels.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        if !labels.is_empty() {
            let shown: Vec<String> =
                labels.iter().take(12).map(|(label, count)| format!("{label} {count}")).collect();
            let more = if labels.len() > 12 { ", …" } else { "" };
            let _ = writeln!(text, "  labels   {}{more}", shown.join(", "));
        }
        if self.unknown > 0 {
            let _ = writeln!(text, "  unknown  {}", self.unknown);
        }
        if !self.errors.is_empty() {
            let total: usize = self.errors.values().sum();
            let codes: Vec<String> =
                self.errors.iter().map(|(code, count)| format!("{code} {count}")).collect();
            let _ = writeln!(text, "  errors   {total} ({})", codes.join(", "));
        }
        if self.in_class_folders > 0 {
            let share = 100.0 * self.agree as f64 / self.in_class_folders as f64;
            let _ = writeln!(
                text,
                "{} of {} images in folders named like a class have that class ({share:.1}%)",
                self.agree, self.in_class_folders
            );
        }
        text
    }
}
