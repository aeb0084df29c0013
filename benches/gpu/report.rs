//! What was measured beside what is wanted: one table for people, the same as JSON.

use std::fmt::Write;

use anyhow::{Error, Result};
use serde::Serialize;

use crate::stage::Stage;

/// What is wanted, in one place.
pub mod wanted {
    /// Images with the label that the CPU gives them.
    pub const SAME_LABELS: f64 = 0.995;
    /// Cosine of an image's embeddings on both.
    pub const COSINE: f64 = 0.999;
    /// Score in the graph, beside that on the host.
    pub const SCORE: f32 = 1e-4;
    /// Batches scored in the graph, beside one image at a time: of a small model, which a single image
    /// leaves the device idle with, and of one of ResNet-50's size.
    pub const SPEEDUP: f64 = 5.0;
    /// See [`SPEEDUP`].
    pub const SPEEDUP_OF_LARGE: f64 = 2.1;
    /// Scoring in the graph is no slower than on the host; the rest is noise.
    pub const NOT_SLOWER: f64 = 0.95;
    /// Pixels in the host's memory to labels, beside the bare session.
    pub const OF_BARE: f64 = 0.9;
    /// The pipeline, beside whatever limits it: the bare session, or the decoders.
    pub const OF_LIMIT: f64 = 0.8;
    /// Of a session's time, as far as decoding allows it.
    pub const BUSY: f64 = 0.9;
    /// The longest time between two batches while a version is swapped, in median ones.
    pub const SWAP: f64 = 2.0;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Met,
    Missed,
    /// Measured on a CPU, where it says nothing.
    NotOnACpu,
    /// It could not be found out here.
    Unknown,
    /// Nothing is wanted.
    Measured,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "**missed**",
            Self::NotOnACpu => "not judged on a CPU",
            Self::Unknown => "not known",
            Self::Measured => "–",
        }
    }
}

/// Whether what is wanted holds, and where that says anything.
#[derive(Debug, Clone, Copy)]
pub enum Holds {
    Anywhere(bool),
    OnAGpu(bool),
}

#[derive(Debug, Serialize)]
struct Line {
    section: String,
    what: String,
    measured: String,
    wanted: String,
    verdict: Verdict,
    /// The numbers behind `measured`, by name.
    figures: serde_json::Map<String, serde_json::Value>,
}

/// Everything so far.
#[derive(Debug, Serialize)]
pub struct Report {
    device: String,
    backend: String,
    library: String,
    cores: usize,
    rounds: usize,
    seconds: f64,
    quick: bool,
    #[serde(skip)]
    on_a_gpu: bool,
    /// The section that is measured now.
    #[serde(skip)]
    pub section: String,
    lines: Vec<Line>,
}

/// Numbers by name, for the JSON.
pub type Figures<'a> = &'a [(&'a str, f64)];

impl Report {
    pub fn new(stage: &Stage) -> Self {
        Self {
            device: stage.device_name(),
            backend: stage.backend_name(),
            library: stage.library.as_ref().map_or("found".into(), |l| l.display().to_string()),
            cores: stage.cores,
            rounds: stage.rounds,
            seconds: stage.time.as_secs_f64(),
            quick: stage.quick,
            on_a_gpu: stage.on_a_gpu(),
            section: String::new(),
            lines: Vec::new(),
        }
    }

    /// What it runs on, in a line.
    pub fn head(&self) -> String {
        let Self { device, backend, library, cores, rounds, seconds, .. } = self;
        let quick = if self.quick { " A quick run: times are worth little." } else { "" };
        format!(
            "{device}; {cores} cores; {backend}, library {library}. Medians of {rounds} rounds, \
             {seconds} s each.{quick}"
        )
    }

    /// Nothing is wanted of it.
    pub fn note(&mut self, what: impl Into<String>, measured: impl Into<String>, f: Figures<'_>) {
        self.add(what.into(), measured.into(), String::new(), Verdict::Measured, f);
    }

    /// Something is wanted of it.
    pub fn judge(
        &mut self,
        what: impl Into<String>,
        measured: impl Into<String>,
        wanted: impl Into<String>,
        holds: Holds,
        figures: Figures<'_>,
    ) {
        let verdict = match holds {
            Holds::OnAGpu(_) if !self.on_a_gpu => Verdict::NotOnACpu,
            Holds::OnAGpu(true) | Holds::Anywhere(true) => Verdict::Met,
            Holds::OnAGpu(false) | Holds::Anywhere(false) => Verdict::Missed,
        };
        self.add(what.into(), measured.into(), wanted.into(), verdict, figures);
    }

    /// It would have been judged, but could not be measured here, for this reason.
    pub fn unknown(
        &mut self,
        what: impl Into<String>,
        reason: impl Into<String>,
        wanted: impl Into<String>,
    ) {
        self.add(what.into(), reason.into(), wanted.into(), Verdict::Unknown, &[]);
    }

    /// A section ended with an error, which is as good as missed.
    pub fn failed(&mut self, error: &Error) {
        let what = format!("the section {}", self.section);
        let reason = format!("{error:#}").replace('\n', " ");
        self.add(what, reason, "to run to its end".to_owned(), Verdict::Missed, &[]);
    }

    fn add(
        &mut self,
        what: String,
        measured: String,
        wanted: String,
        verdict: Verdict,
        figures: Figures<'_>,
    ) {
        eprintln!("  {what}: {measured} ({})", verdict.text());
        let number = |(name, value): &(&str, f64)| ((*name).to_owned(), (*value).into());
        let figures = figures.iter().map(number).collect();
        let section = self.section.clone();
        self.lines.push(Line { section, what, measured, wanted, verdict, figures });
    }

    /// How much of what is wanted was missed.
    pub fn missed(&self) -> usize {
        self.lines.iter().filter(|line| line.verdict == Verdict::Missed).count()
    }

    /// The table, and what it comes to.
    pub fn table(&self) -> String {
        let mut text = "| what | measured | wanted | verdict |\n|---|---|---|---|\n".to_owned();
        for Line { what, measured, wanted, verdict, .. } in &self.lines {
            let cells = [what, measured, wanted].map(|cell| cell.replace('|', "\\|"));
            // Writing to a string does not fail.
            let _ = writeln!(text, "| {} | {} |", cells.join(" | "), verdict.text());
        }
        let count = |verdict| self.lines.iter().filter(|line| line.verdict == verdict).count();
        let [met, missed, not, unknown] =
            [Verdict::Met, Verdict::Missed, Verdict::NotOnACpu, Verdict::Unknown].map(count);
        let _ = write!(
            text,
            "\n{met} met, {missed} missed, {not} not judged on a CPU, {unknown} not known."
        );
        text
    }

    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
