//! `angler report`: what the results of a run come to, and a page to look at them.

mod collect;
mod page;
mod pictures;
mod read;
mod sample;
mod summary;
mod text;

use std::fs::File;
use std::io::{BufReader, stdin};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use collect::Collector;
use pictures::Pictures;
use summary::{Faulty, Summary};

use angler_wire::text::plural;

use super::html;
use super::tables::{one_line, show};
use crate::app::App;

/// Bytes that are read at once.
const BUFFER: usize = 1 << 18;

/// Show what the results of a run come to, as a summary and as a page with pictures
///
/// Reads the JSON lines of `angler classify --out FILE` and whole results of jobs as workers publish them,
/// one a line; both may stand in one file. Millions of lines need no more memory than a few. A line that is
/// no result is counted and passed over; the exit code is 1 only if there is no result at all.
#[derive(Args)]
pub struct ReportCommand {
    /// JSON lines; - is standard input
    #[arg(value_name = "FILE")]
    results: PathBuf,
    /// Write an HTML page that needs nothing beside it
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// With --html: show so many images of each class, 1 to 240, and fewer if there are more than 20 classes
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=240))]
    per_class: u64,
    /// With --html: tables instead of pictures; no image is fetched
    #[arg(long)]
    no_thumbnails: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report {
    source: String,
    #[serde(flatten)]
    summary: Summary,
}

impl ReportCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        html::check(self.html.as_deref())?;
        let source = match self.results.as_path() {
            path if path == Path::new("-") => "standard input".to_owned(),
            path => path.display().to_string(),
        };
        let summary = tokio::task::block_in_place(|| self.read())
            .with_context(|| format!("{source} cannot be read"))?;
        let report = Report { source, summary };
        report.check()?;
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&report)?))?;
        } else {
            show(&report.text())?;
        }
        if let Some(path) = &self.html {
            let pictures = match self.no_thumbnails {
                true => None,
                false => Some(Pictures::fetch(app, &report.summary).await),
            };
            if let Some(missing) = pictures.as_ref().and_then(Pictures::missing) {
                eprintln!("{}", one_line(&missing));
            }
            html::write(path, &report.page(pictures.as_ref()))?;
        }
        Ok(())
    }

    fn read(&self) -> std::io::Result<Summary> {
        let mut collector = Collector::new(usize::try_from(self.per_class).unwrap_or(1));
        let take = |number, line| collector.add(number, line);
        if self.results == Path::new("-") {
            read::lines(&mut BufReader::with_capacity(BUFFER, stdin().lock()), take)?;
        } else {
            let file = File::open(&self.results)?;
            read::lines(&mut BufReader::with_capacity(BUFFER, file), take)?;
        }
        Ok(collector.finish())
    }
}

impl Report {
    /// Says what could not be read.
    ///
    /// # Errors
    /// If nothing could.
    fn check(&self) -> Result<()> {
        let (source, s) = (&self.source, &self.summary);
        let first = s.unreadable.first.as_ref().map(|Faulty { line, message }| {
            format!("the first is line {line}: {}", one_line(message))
        });
        match first {
            None if s.lines == 0 => bail!("{source} holds no results: it is empty"),
            Some(first) if s.unreadable.lines == s.lines => {
                bail!(
                    "{source} holds no results: {} cannot be read; {first}",
                    plural(s.lines, "line")
                )
            }
            Some(first) => {
                eprintln!(
                    "{source}: {} of {} could not be read; {first}",
                    s.unreadable.lines,
                    plural(s.lines, "line")
                );
            }
            None => {}
        }
        Ok(())
    }
}
