//! Scoring alone: a full batch of embeddings against sets of more and more classes, on the threads that
//! score in the pipeline. Sets from a million rows on are f16, as one would keep them.

use std::sync::Arc;

use anyhow::Result;

use angler_vectors::ClassVectors;
use angler_vectors::rows::Precision;

use super::figures::Samples;
use crate::commands::bench::fixture::{SET, Stage, blocking, contents, embeddings, on_threads};

/// Rows from which on a set is f16.
const F16_FROM: usize = 1_000_000;
/// The pipeline asks for the runner-up, too.
pub(super) const TOP_K: usize = 2;

/// How many classes, and how their vectors are stored.
pub(super) type Key = (usize, Precision);

/// Sets that are too large, and what they would take, in bytes.
pub(super) type Skipped = Vec<(usize, u64)>;

fn precision(rows: usize) -> Precision {
    if rows >= F16_FROM { Precision::F16 } else { Precision::F32 }
}

pub(super) async fn measure(
    stage: &Stage,
    samples: &mut Samples<Key>,
    skipped: &mut Skipped,
) -> Result<()> {
    for rows in stage.plan.class_counts.iter().copied() {
        let precision = precision(rows);
        let bytes = (rows * stage.model.dim * precision.bytes()) as u64;
        if bytes > stage.memory {
            if !skipped.contains(&(rows, bytes)) {
                skipped.push((rows, bytes));
            }
            continue;
        }
        let (model, scorer) = (Arc::clone(&stage.model), stage.app.settings.scorer());
        let (batch, time) = (stage.app.settings.embedder.max_batch, stage.plan.time);
        let measured = blocking(move || {
            let classes = ClassVectors::new(SET, contents(&model, rows, precision))?;
            let embeddings = embeddings(batch, model.dim);
            let score = |_| {
                classes.score_with(&scorer, embeddings.view(), TOP_K);
                Ok(batch as u64)
            };
            score(0)?; // its threads start
            on_threads(1, time, score)
        });
        samples.add((rows, precision), measured.await?);
    }
    Ok(())
}
