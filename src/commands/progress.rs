//! What a person sees while work goes on: a bar on a terminal, and what could not be used.

mod run;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use angler_core::class_sets::build::{Built, Failed, Keep, Reference, build, embed};
use angler_core::pipeline::Pipeline;
use angler_vectors::reference_embeddings::Embedded;

pub(super) use crate::commands::progress::run::{RunBar, bars};

/// A bar with rate and time left, on a terminal and for work that takes a while; else nothing.
pub(super) fn progress_bar(total: usize, what: &'static str) -> ProgressBar {
    let bar =
        ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr_with_hz(8));
    let template = format!("{{bar:24}} {{pos}}/{{len}} {what}  {{rate}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        let style = style.with_key(
            "rate",
            // Since the start: results come 32 at a time, and indicatif's own estimate takes half a
            // minute to believe a rate.
            |state: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
                let rate = state.pos() as f64 / state.elapsed().as_secs_f64().max(1e-9);
                let left = state.len().unwrap_or(0).saturating_sub(state.pos()) as f64 / rate;
                if left.is_finite() {
                    let left = indicatif::HumanDuration(Duration::from_secs_f64(left.ceil()));
                    let _ = write!(w, "{rate:.0}/s, {left:#} left");
                }
            },
        );
        bar.set_style(style.progress_chars("█▌ "));
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// Builds class vectors with a progress bar on a terminal.
pub(super) async fn build_with_progress(
    pipeline: &Arc<Pipeline>,
    references: Vec<Reference>,
) -> Result<Built> {
    let bar = progress_bar(references.len(), "references");
    let built = build(pipeline, references, || bar.inc(1)).await;
    bar.finish_and_clear();
    Ok(built?)
}

/// Embeds reference images, and keeps them, with a progress bar on a terminal.
pub(super) async fn embed_with_progress(
    pipeline: &Arc<Pipeline>,
    references: Vec<Reference>,
) -> Result<(Embedded, Failed)> {
    let bar = progress_bar(references.len(), "references");
    let embedded = embed(pipeline, references, Keep::Embeddings, || bar.inc(1)).await;
    bar.finish_and_clear();
    Ok(embedded?)
}

/// Reference images that could not be used, on standard error.
pub(super) fn report_failed(failed: &Failed) {
    for (reference, error) in failed {
        eprintln!("not used: {}: {} ({})", reference.uri, error, error.code);
    }
}
