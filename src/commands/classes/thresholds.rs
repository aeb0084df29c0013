//! `--min-score` and `--min-scores`: the thresholds that a new version carries.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use angler_vectors::Contents;

use crate::commands::UsageError;

#[derive(Args)]
pub(super) struct Thresholds {
    /// Below it an image is unknown, unless its job says otherwise
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true)]
    min_score: Option<f32>,
    /// Thresholds of single classes, which win over --min-score: a JSON object, label to cosine
    #[arg(long, value_name = "FILE.json")]
    min_scores: Option<PathBuf>,
}

/// Thresholds that were read and lie in [-1, 1].
pub(super) struct Read {
    min_score: Option<f32>,
    min_scores: Option<(PathBuf, BTreeMap<String, f32>)>,
}

impl Thresholds {
    /// Reads and checks them, before work is put into the version that they are for.
    pub(super) fn read(&self) -> Result<Read> {
        let fits = |score: f32| (-1.0..=1.0).contains(&score);
        if self.min_score.is_some_and(|score| !fits(score)) {
            return Err(UsageError("--min-score must lie in [-1, 1]".to_owned()).into());
        }
        let Some(path) = &self.min_scores else {
            return Ok(Read { min_score: self.min_score, min_scores: None });
        };
        let place = path.display();
        let text =
            std::fs::read_to_string(path).with_context(|| format!("--min-scores {place}"))?;
        let scores: BTreeMap<String, f32> = serde_json::from_str(&text).with_context(|| {
            format!("--min-scores {place}: must be a JSON object, {{\"label\": cosine, …}}")
        })?;
        if let Some((label, score)) = scores.iter().find(|(_, score)| !fits(**score)) {
            let message =
                format!("--min-scores {place}: {label:?} has {score}, it must lie in [-1, 1]");
            return Err(UsageError(message).into());
        }
        Ok(Read { min_score: self.min_score, min_scores: Some((path.clone(), scores)) })
    }
}

impl Read {
    /// Refuses thresholds of classes that are none of these: a slip of the pen would else have no
    /// effect and go unseen.
    pub(super) fn check<'a>(
        &self,
        labels: impl Iterator<Item = &'a str>,
    ) -> Result<(), UsageError> {
        let Some((path, scores)) = &self.min_scores else { return Ok(()) };
        let labels: HashSet<&str> = labels.collect();
        match scores.keys().find(|label| !labels.contains(label.as_str())) {
            Some(label) => Err(UsageError(format!(
                "--min-scores {}: there is no class {label:?}",
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Puts them in; what was not given stays as it is.
    pub(super) fn apply(self, contents: &mut Contents) {
        contents.min_score = self.min_score.or(contents.min_score);
        if let Some((_, scores)) = self.min_scores {
            contents.min_scores = scores;
        }
    }
}
