//! What the results of a run come to: counts while they come, and words at the end.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use angler_runs::finished_jobs::Added;
use angler_runs::result::{Embeddings, Outcome, RunResult, UNREADABLE, Verdict};

/// Labels that are shown.
const LABELS: usize = 10;
/// Codes that a progress bar shows.
const CODES: usize = 3;
/// Columns of the text.
const WIDTH: usize = 80;
/// Columns before a list.
const INDENT: usize = 16;

/// Counts over results.
#[derive(Default, Serialize)]
pub(super) struct Summary {
    pub(super) run: String,
    pub(super) complete: bool,
    /// Jobs with a result.
    pub(super) jobs: u64,
    /// Jobs without one; `None` if nothing says how many jobs the run has.
    pub(super) missing_jobs: Option<u64>,
    pub(super) images: u64,
    unknown: u64,
    labels: BTreeMap<String, u64>,
    /// Images that failed, by code.
    errors: BTreeMap<String, u64>,
    /// Jobs that failed whole, by code.
    failed_jobs: BTreeMap<String, u64>,
    /// The code of each of them, by the job's number.
    #[serde(skip)]
    codes: BTreeMap<u64, Box<str>>,
    /// Images that each version, model and back end classified.
    classified_by: BTreeMap<String, u64>,
    #[serde(rename = "images_per_second")]
    pub(super) rate: f64,
    #[serde(skip)]
    pub(super) embeddings: Embeddings,
    /// Images in a job: all jobs have as many, but for the last.
    #[serde(skip)]
    per_job: u64,
    /// The first result that could not be read: its job, and why.
    #[serde(skip)]
    pub(super) unreadable: Option<(String, String)>,
}

impl Summary {
    pub(super) fn of(run: &str) -> Self {
        Self { run: run.to_owned(), ..Self::default() }
    }

    /// Counts the result of job number `index`. A better one takes the place of the one before.
    pub(super) fn add(&mut self, index: u64, result: RunResult, added: Added) {
        if added == Added::Better {
            self.forget_failure(index);
        }
        self.embeddings.add(&result);
        let images = result.images().len() as u64;
        let (provenance, entries) = match result.outcome {
            Outcome::Done { provenance, images } => (provenance, images),
            Outcome::Failed { error } => return self.add_failure(index, error.code),
            Outcome::Unreadable { reason } => {
                self.unreadable.get_or_insert((result.job, reason));
                return self.add_failure(index, UNREADABLE.to_owned());
            }
        };
        let by = format!("{} {} {}", provenance.classes, provenance.model, provenance.backend);
        *self.classified_by.entry(by).or_default() += images;
        self.images += images;
        self.per_job = self.per_job.max(images);
        for entry in entries {
            match entry.verdict {
                Verdict::Labelled(classified) => match classified.label {
                    Some(label) => *self.labels.entry(label).or_default() += 1,
                    None => self.unknown += 1,
                },
                Verdict::Failed { error } => *self.errors.entry(error.code).or_default() += 1,
            }
        }
    }

    fn add_failure(&mut self, index: u64, code: String) {
        self.codes.insert(index, code.as_str().into());
        *self.failed_jobs.entry(code).or_default() += 1;
    }

    fn forget_failure(&mut self, index: u64) {
        let Some(code) = self.codes.remove(&index) else { return };
        if let Some(count) = self.failed_jobs.get_mut(&*code) {
            *count -= 1;
        }
        self.failed_jobs.retain(|_, count| *count > 0);
    }

    /// How many jobs failed with this code.
    pub(super) fn failed_with(&self, code: &str) -> u64 {
        self.failed_jobs.get(code).copied().unwrap_or(0)
    }

    /// Returns how many of the run's `images` images will have entries: those of jobs that failed whole
    /// have none.
    pub(super) fn without_failed(&self, images: u64) -> u64 {
        let failed = self.whole_jobs().saturating_mul(self.per_job);
        images.saturating_sub(failed).max(self.images)
    }

    /// How many results could not be read.
    pub(super) fn unread(&self) -> u64 {
        self.failed_with(UNREADABLE)
    }

    /// Images that have a label or are unknown.
    pub(super) fn classified(&self) -> u64 {
        self.labels.values().sum::<u64>() + self.unknown
    }

    fn whole_jobs(&self) -> u64 {
        self.failed_jobs.values().sum()
    }

    fn failures(&self) -> u64 {
        self.errors.values().sum::<u64>() + self.whole_jobs()
    }

    /// Whether too many failed: of at least a hundred, so that the first one does not decide.
    pub(super) fn exceeds(&self, most: f64) -> bool {
        let all = self.images + self.whole_jobs();
        all >= 100 && self.failures() as f64 > most * all as f64
    }

    /// The most frequent errors, of images and of jobs, for a line of progress.
    pub(super) fn worst(&self) -> Vec<String> {
        let mut codes = self.errors.clone();
        for (code, count) in &self.failed_jobs {
            *codes.entry(code.clone()).or_default() += count;
        }
        by_count(&codes).iter().take(CODES).map(counted).collect()
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("run {}: {} jobs, {} images", self.run, self.jobs, self.images);
        if self.rate >= 1.0 {
            let _ = write!(text, ", {:.0} images/s", self.rate);
        }
        text.push('\n');
        let labels = by_count(&self.labels);
        let mut shown: Vec<String> = labels.iter().take(LABELS).map(counted).collect();
        if labels.len() > LABELS {
            shown.push(format!("{} more", labels.len() - LABELS));
        }
        if self.unknown > 0 {
            shown.push(format!("unknown {}", self.unknown));
        }
        let list = |counts| by_count(counts).iter().map(counted).collect();
        for (what, list) in [
            ("labels", shown),
            ("errors", list(&self.errors)),
            ("failed jobs", list(&self.failed_jobs)),
            ("classified by", list(&self.classified_by)),
        ] {
            if !list.is_empty() {
                let _ = writeln!(text, "  {what:<width$}{}", folded(&list), width = INDENT - 2);
            }
        }
        text
    }
}

/// The most frequent first.
fn by_count(counts: &BTreeMap<String, u64>) -> Vec<(&String, &u64)> {
    let mut all: Vec<_> = counts.iter().collect();
    all.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    all
}

fn counted((what, count): &(&String, &u64)) -> String {
    format!("{what} {count}")
}

/// A list in as many lines as it needs; an entry is never broken.
fn folded(list: &[String]) -> String {
    let mut text = String::new();
    let mut column = INDENT;
    for (at, entry) in list.iter().enumerate() {
        let comma = if at + 1 < list.len() { "," } else { "" };
        let width = entry.chars().count() + comma.len();
        if at > 0 && column + 1 + width > WIDTH {
            let _ = write!(text, "\n{:INDENT$}", "");
            column = INDENT;
        } else if at > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(entry);
        text.push_str(comma);
        column += width;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    use angler_runs::result::RunKey;

    fn read(body: &str) -> RunResult {
        let run = RunKey { id: "n".to_owned(), nonce: "x".to_owned() };
        RunResult::read(body.as_bytes(), &run)
    }

    fn done(index: u64, labels: &[Option<&str>], failed: &[&str]) -> RunResult {
        let labelled =
            labels.iter().map(|label| json!({"uri": "u", "label": label, "score": 0.5, "top": []}));
        let failed =
            failed.iter().map(|code| json!({"uri": "u", "error": {"code": code, "message": "x"}}));
        let images: Vec<_> = labelled.chain(failed).collect();
        let result = json!({
            "id": format!("n/{index}"), "status": "done", "classes": "s@1", "model": "m",
            "backend": "b", "images": images, "run": {"id": "n", "jobs": 4, "index": index},
        });
        read(&result.to_string())
    }

    #[test]
    fn results_are_counted() {
        let mut summary = Summary::of("n");
        assert_eq!((summary.without_failed(13), summary.worst()), (13, Vec::new()));
        summary.add(1, done(1, &[Some("a"), Some("b"), None], &["timeout"]), Added::First);
        summary.add(3, done(3, &[Some("b")], &[]), Added::First);
        assert_eq!((summary.without_failed(13), summary.classified()), (13, 4));
        summary.add(0, read(r#"{"id":"n/0"}"#), Added::First);
        assert_eq!((summary.without_failed(13), summary.unread()), (9, 1));
        assert_eq!(summary.unreadable.as_ref().unwrap().0, "n/0");
        summary.add(2, done(2, &[], &["timeout", "not_found", "x", "y"]), Added::First);
        assert_eq!((summary.images, summary.without_failed(13)), (9, 9));
        assert_eq!(summary.worst(), ["timeout 2", "not_found 1", "unreadable_result 1"]);
        summary.jobs = 4;
        assert_eq!(
            summary.text(),
            "run n: 4 jobs, 9 images\n  labels        b 2, a 1, unknown 1\n  errors        timeout 2, not_found 1, x 1, y 1\n  failed jobs   unreadable_result 1\n  classified by s@1 m b 9\n"
        );
    }

    #[test]
    fn a_better_result_takes_the_place_of_a_failure() {
        let failed = |code: &str| {
            let error = json!({"code": code, "message": "x"});
            read(&json!({"id": "n/1", "status": "failed", "error": error}).to_string())
        };
        let mut summary = Summary::default();
        for (index, code) in [(0, "cancelled"), (1, "retries_exhausted"), (2, "cancelled")] {
            summary.add(index, failed(code), Added::First);
        }
        summary.add(1, done(1, &[Some("a")], &[]), Added::Better);
        summary.add(2, done(2, &[Some("a")], &[]), Added::Better);
        assert_eq!((summary.failed_with("cancelled"), summary.whole_jobs()), (1, 1));
        assert_eq!(summary.failed_jobs.keys().collect::<Vec<_>>(), ["cancelled"]);
        assert_eq!((summary.images, summary.classified()), (2, 2));
    }

    #[test]
    fn no_line_is_wider_than_a_terminal() {
        let mut summary = Summary::default();
        let labels: Vec<String> = (0..30).map(|n| format!("a-rather-long-label-{n}")).collect();
        let labels: Vec<Option<&str>> = labels.iter().map(|label| Some(label.as_str())).collect();
        summary.add(0, done(0, &labels, &[]), Added::First);
        let text = summary.text();
        assert!(text.contains("20 more"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.lines().count() > 4, "{text}");
    }
}
