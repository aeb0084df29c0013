//! What a run's results come to: what is shown on a terminal, on a page and as JSON.

use serde::Serialize;

use angler_vectors::statistics::{Examples, Histogram};

/// What stands for those that there is no room for.
pub(super) const OTHER: &str = "(other)";

/// What results come to, in the words of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    /// Lines that are not blank.
    pub(super) lines: u64,
    pub(super) images: u64,
    /// Images with a label.
    pub(super) classified: u64,
    /// Images that are like no class.
    pub(super) unknown: u64,
    /// Images without a score.
    pub(super) failed: u64,
    /// Whole jobs that failed; their images are in none of the counts.
    pub(super) failed_jobs: u64,
    /// Scores of the images with a label.
    pub(super) scores: Option<Spread>,
    pub(super) margins: Option<Spread>,
    /// Scores of the unknown ones.
    pub(super) unknown_scores: Option<Spread>,
    /// Sets and models that answered, the busiest first.
    pub(super) answered: Vec<Answered>,
    /// By images, the most first.
    pub(super) classes: Vec<Class>,
    /// Images of classes that are not counted by name.
    pub(super) other_classes: u64,
    /// By images, the most first.
    pub(super) errors: Vec<Failures>,
    pub(super) job_errors: Vec<Failures>,
    /// Images with a label: the smallest margins, then the lowest scores of those without.
    pub(super) least_certain: Examples<Example>,
    /// Those nearest to a label first.
    pub(super) unknown_images: Examples<Example>,
    pub(super) unreadable: Unreadable,
}

/// What answered, and for how many images.
#[derive(Debug, Serialize)]
pub(super) struct Answered {
    pub(super) classes: String,
    pub(super) model: String,
    pub(super) backend: String,
    pub(super) images: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Class {
    pub(super) label: String,
    pub(super) images: u64,
    pub(super) scores: Option<Spread>,
    pub(super) margins: Option<Spread>,
    /// Drawn by lot, the surest first.
    #[serde(skip)]
    pub(super) sample: Vec<Example>,
}

/// How values are spread. Percentiles are right to the width of a bin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f32,
    pub(super) p5: f32,
    pub(super) p95: f32,
    pub(super) lowest: f32,
    pub(super) highest: f32,
    pub(super) histogram: Histogram,
}

/// Errors of one code.
#[derive(Debug, Serialize)]
pub(super) struct Failures {
    pub(super) code: String,
    pub(super) count: u64,
    /// The first.
    pub(super) examples: Vec<Failed>,
}

#[derive(Debug, Serialize)]
pub(super) struct Failed {
    /// The image's URI, or the job's id.
    pub(super) name: String,
    pub(super) message: String,
}

/// An image to look at.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Example {
    pub(super) uri: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    pub(super) label: Option<String>,
    pub(super) score: f32,
    pub(super) margin: Option<f32>,
    /// The best class of an image that is unknown, if it is listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) nearest: Option<String>,
    pub(super) runner_up: Option<String>,
}

/// Lines that are no results.
#[derive(Debug, Default, Serialize)]
pub(super) struct Unreadable {
    pub(super) lines: u64,
    /// The first of them.
    pub(super) first: Option<Faulty>,
}

/// A line that is no result.
#[derive(Debug, Serialize)]
pub(super) struct Faulty {
    /// Its number, from 1.
    pub(super) line: u64,
    pub(super) message: String,
}
