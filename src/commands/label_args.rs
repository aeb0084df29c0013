//! The arguments that `classify` and `classes rescore` share: how images get labels, and where they go.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use angler_wire::job::MAX_TOP_K;

use super::UsageError;
use super::output::{self, Output};

#[derive(Args)]
pub(super) struct LabelArgs {
    /// Write JSON lines to this file, which appears when it is complete; - is standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How many of the best classes to list for each image, 1 to 100
    #[arg(long, default_value_t = 1, value_name = "K")]
    pub(super) top_k: usize,
    /// Below this cosine similarity an image is unknown [default: the set's own threshold]
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true)]
    pub(super) min_score: Option<f32>,
}

impl LabelArgs {
    /// Checks the values and whether the file can be written, before there is anything to write.
    pub(super) fn check(&self) -> Result<(), UsageError> {
        if !(1..=MAX_TOP_K).contains(&self.top_k) {
            return Err(UsageError(format!("--top-k must be 1 to {MAX_TOP_K}")));
        }
        if self.min_score.is_some_and(|s| !(-1.0..=1.0).contains(&s)) {
            return Err(UsageError("--min-score must lie in [-1, 1]".to_owned()));
        }
        output::check("--out", self.out.as_deref())
    }

    pub(super) fn open(&self) -> Result<Output> {
        Output::open(self.out.as_deref())
    }

    /// Names the file of results, if there is one.
    pub(super) fn say_where(&self) {
        if let Some(out) = self.out.as_deref().filter(|out| *out != Path::new("-")) {
            eprintln!("results in {}", out.display());
        }
    }
}
