//! A run's results as a file that people know how to open: a row an image.
//!
//! A job that failed whole names no images: it is a row of its own, with its id and its error. So is a
//! result that cannot be read.

mod columns;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use angler_wire::job::{LabelScore, Provenance};

use super::result::{Embeddings, Entry, Outcome, RunError, RunResult, UNREADABLE, Verdict};
use crate::table::columns::Columns;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A JSON object a line, as `angler classify` writes it.
    Jsonl,
    /// A table; the classes beyond the best are JSON in its column `top`.
    Csv,
    /// The same columns with types of their own, and embeddings where there are any.
    Parquet,
}

/// The formats' endings, as a sentence names them.
pub const ENDINGS: &str = ".jsonl, .csv or .parquet";

/// A file whose ending names no format.
#[derive(Debug, thiserror::Error)]
#[error("{}: results are written as {ENDINGS}", .0.display())]
pub struct UnknownEnding(PathBuf);

impl Format {
    /// By a file's ending.
    ///
    /// # Errors
    /// [`UnknownEnding`].
    pub fn of(path: &Path) -> Result<Self, UnknownEnding> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("jsonl" | "ndjson") => Ok(Self::Jsonl),
            Some("csv") => Ok(Self::Csv),
            Some("parquet") => Ok(Self::Parquet),
            _ => Err(UnknownEnding(path.to_owned())),
        }
    }
}

/// A row of a table; the fields are its columns, in their order.
#[derive(Default, Serialize)]
struct Row<'a> {
    uri: Option<&'a str>,
    id: Option<&'a str>,
    label: Option<&'a str>,
    score: Option<f32>,
    margin: Option<f32>,
    error: Option<&'a str>,
    message: Option<&'a str>,
    #[serde(serialize_with = "as_json")]
    top: Option<&'a [LabelScore]>,
    job: &'a str,
    classes: Option<&'a str>,
    model: Option<&'a str>,
    backend: Option<&'a str>,
    /// Not in CSV: it would be most of the file, and no program reads it there.
    #[serde(skip)]
    embedding: Option<&'a [f32]>,
}

impl<'a> Row<'a> {
    fn of_image(job: &'a str, provenance: &'a Provenance, entry: &'a Entry) -> Self {
        let Provenance { classes, model, backend } = provenance;
        let mut row = Self {
            uri: Some(&entry.uri),
            id: entry.id.as_deref(),
            job,
            classes: Some(classes),
            model: Some(model),
            backend: Some(backend),
            embedding: entry.embedding(),
            ..Self::default()
        };
        match &entry.verdict {
            Verdict::Labelled(classified) => {
                row.label = classified.label.as_deref();
                row.score = Some(classified.score);
                row.margin = classified.margin;
                row.top = Some(&classified.top);
            }
            Verdict::Failed { error } => {
                row.error = Some(&error.code);
                row.message = Some(&error.message);
            }
        }
        row
    }

    fn of_job(job: &'a str, error: &'a RunError) -> Self {
        Self { job, error: Some(&error.code), message: Some(&error.message), ..Self::default() }
    }
}

fn as_json<S: Serializer>(top: &Option<&[LabelScore]>, serializer: S) -> Result<S::Ok, S::Error> {
    match top {
        None => serializer.serialize_none(),
        Some(top) => {
            let text = serde_json::to_string(top).map_err(serde::ser::Error::custom)?;
            serializer.serialize_str(&text)
        }
    }
}

/// A line of an image, as `angler classify` writes it.
#[derive(Serialize)]
struct ImageLine<'a> {
    #[serde(flatten)]
    entry: &'a Entry,
    #[serde(flatten)]
    provenance: &'a Provenance,
}

/// A line of a job without images.
#[derive(Serialize)]
struct JobLine<'a> {
    job: &'a str,
    error: &'a RunError,
}

/// Writes rows.
pub enum Rows<W: Write + Send> {
    /// [`Format::Jsonl`].
    Jsonl(W),
    /// [`Format::Csv`].
    Csv(Box<csv::Writer<W>>),
    /// [`Format::Parquet`].
    Parquet(Box<Columns<W>>),
}

impl<W: Write + Send> Rows<W> {
    /// Rows to `writer`, among which are these embeddings.
    ///
    /// # Errors
    /// What the system said.
    pub fn new(format: Format, embeddings: &Embeddings, writer: W) -> std::io::Result<Self> {
        Ok(match format {
            Format::Jsonl => Self::Jsonl(writer),
            Format::Csv => Self::Csv(Box::new(csv::Writer::from_writer(writer))),
            Format::Parquet => Self::Parquet(Box::new(Columns::new(embeddings, writer)?)),
        })
    }

    /// Writes the rows of one result.
    ///
    /// # Errors
    /// What the system said.
    pub fn write(&mut self, result: &RunResult) -> std::io::Result<()> {
        let job = result.job.as_str();
        match &result.outcome {
            Outcome::Done { provenance, images } => images.iter().try_for_each(|entry| {
                let row = Row::of_image(job, provenance, entry);
                self.put(&ImageLine { entry, provenance }, &row)
            }),
            Outcome::Failed { error } => {
                self.put(&JobLine { job, error }, &Row::of_job(job, error))
            }
            Outcome::Unreadable { reason } => {
                let error = &RunError { code: UNREADABLE.to_owned(), message: reason.clone() };
                self.put(&JobLine { job, error }, &Row::of_job(job, error))
            }
        }
    }

    /// What is one line or one row.
    fn put(&mut self, line: &impl Serialize, row: &Row<'_>) -> std::io::Result<()> {
        match self {
            Self::Jsonl(writer) => {
                serde_json::to_writer(&mut *writer, line)?;
                writer.write_all(b"\n")
            }
            Self::Csv(csv) => csv.serialize(row).map_err(std::io::Error::other),
            Self::Parquet(columns) => columns.push(row),
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
            Self::Parquet(columns) => columns.finish(),
        }
    }
}
