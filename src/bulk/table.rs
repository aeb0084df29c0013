//! A run's results as a file that people know how to open: a row an image.
//!
//! A job that failed whole names no images: it is a row of its own, with its id and its error.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::error::Failure;
use crate::job::{ImageEntry, JobResult, LabelScore, Outcome, Provenance, Verdict};
use crate::sink::jsonl::Line;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A JSON object a line, as `angler classify` writes it.
    Jsonl,
    /// A table; the classes beyond the best are JSON in its column `top`.
    Csv,
}

impl Format {
    /// By a file's ending.
    ///
    /// # Errors
    /// A sentence that says which endings there are.
    pub fn of(path: &Path) -> Result<Self, String> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("jsonl" | "ndjson") => Ok(Self::Jsonl),
            Some("csv") => Ok(Self::Csv),
            _ => Err(format!("{}: results are written as .jsonl or .csv", path.display())),
        }
    }
}

/// A row of a table.
#[derive(Serialize)]
struct Row<'a> {
    uri: Option<&'a str>,
    id: Option<&'a str>,
    label: Option<&'a str>,
    score: Option<f32>,
    margin: Option<f32>,
    error: Option<String>,
    message: Option<&'a str>,
    top: Option<String>,
    job: &'a str,
    classes: Option<&'a str>,
    model: Option<&'a str>,
    backend: Option<&'a str>,
}

/// Writes rows.
pub enum Rows<W: Write> {
    /// [`Format::Jsonl`].
    Jsonl(W),
    /// [`Format::Csv`].
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write> Rows<W> {
    /// Rows to `writer`.
    pub fn new(format: Format, writer: W) -> Self {
        match format {
            Format::Jsonl => Self::Jsonl(writer),
            Format::Csv => Self::Csv(Box::new(csv::Writer::from_writer(writer))),
        }
    }

    /// Writes the rows of one result.
    ///
    /// # Errors
    /// What the system said.
    pub fn write(&mut self, result: &JobResult) -> std::io::Result<()> {
        match &result.outcome {
            Outcome::Done { provenance, images } => {
                images.iter().try_for_each(|entry| self.image(&result.id, provenance, entry))
            }
            Outcome::Failed { error } => self.failed(&result.id, error),
        }
    }

    fn image(
        &mut self,
        job: &str,
        provenance: &Provenance,
        entry: &ImageEntry,
    ) -> std::io::Result<()> {
        let csv = match self {
            Self::Jsonl(writer) => return Line { entry, provenance }.write(writer),
            Self::Csv(csv) => csv,
        };
        let Provenance { classes, model, backend } = provenance;
        let mut row = Row {
            uri: Some(&entry.uri),
            id: entry.id.as_deref(),
            classes: Some(classes),
            model: Some(model),
            backend: Some(backend),
            ..Row::of(job)
        };
        match &entry.verdict {
            Verdict::Labelled(classified) => {
                row.label = classified.label.as_deref();
                row.score = Some(classified.score);
                row.margin = classified.margin;
                row.top = Some(top(&classified.top)?);
            }
            Verdict::Failed { error } => {
                row.error = Some(error.code.to_string());
                row.message = Some(&error.message);
            }
        }
        csv.serialize(row).map_err(std::io::Error::other)
    }

    fn failed(&mut self, job: &str, error: &Failure) -> std::io::Result<()> {
        #[derive(Serialize)]
        struct Failed<'a> {
            job: &'a str,
            error: &'a Failure,
        }
        match self {
            Self::Jsonl(writer) => {
                serde_json::to_writer(&mut *writer, &Failed { job, error })?;
                writer.write_all(b"\n")
            }
            Self::Csv(csv) => {
                let (code, message) = (error.code.to_string(), error.message.as_str());
                let row = Row { error: Some(code), message: Some(message), ..Row::of(job) };
                csv.serialize(row).map_err(std::io::Error::other)
            }
        }
    }

    /// All rows are written.
    ///
    /// # Errors
    /// What the system said.
    pub fn finish(self) -> std::io::Result<W> {
        match self {
            Self::Jsonl(mut writer) => writer.flush().map(|()| writer),
            Self::Csv(csv) => csv.into_inner().map_err(|e| std::io::Error::other(e.to_string())),
        }
    }
}

impl<'a> Row<'a> {
    fn of(job: &'a str) -> Self {
        Self {
            uri: None,
            id: None,
            label: None,
            score: None,
            margin: None,
            error: None,
            message: None,
            top: None,
            job,
            classes: None,
            model: None,
            backend: None,
        }
    }
}

fn top(top: &[LabelScore]) -> std::io::Result<String> {
    Ok(serde_json::to_string(top)?)
}
