//! What a person sees while work goes on: a bar on a terminal, and what could not be used.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::classes::build::{Built, Failed, Keep, Reference, build, embed};
use crate::classes::embedded::Embedded;
use crate::pipeline::Pipeline;

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

/// The progress of a run: images, rate, time left, and a few words; never wider than the terminal. An
/// earlier command may have done a part, which counts as done but not for the rate.
pub(super) struct RunBar {
    bar: ProgressBar,
    before: Arc<AtomicU64>,
}

impl RunBar {
    /// Of so many images, if that is known.
    pub(super) fn new(total: Option<u64>, what: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(8));
        let before = Arc::new(AtomicU64::new(0));
        let base = before.clone();
        // What does not fit is cut from the words.
        let template = format!("{{bar:16}} {{count}} {what}{{rate}}  {{wide_msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            let style = style.with_key("count", count).with_key(
                "rate",
                move |state: &ProgressState, w: &mut dyn std::fmt::Write| {
                    rate(state, base.load(Ordering::Relaxed), w);
                },
            );
            bar.set_style(style.progress_chars("█▌ "));
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, before }
    }

    /// One of several bars, under each other.
    pub(super) fn among(self, bars: &MultiProgress) -> Self {
        Self { bar: bars.add(self.bar), before: self.before }
    }

    /// Now it begins; so many were done before.
    pub(super) fn begin(&self, before: u64) {
        self.before.store(before, Ordering::Relaxed);
        self.bar.reset_elapsed();
        self.bar.set_position(before);
    }

    /// So many are done, of so many as far as that is known.
    pub(super) fn set(&self, done: u64, total: Option<u64>, words: String) {
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
        self.bar.set_message(words);
    }

    /// It is over: nothing of it stays on the screen.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn count(state: &ProgressState, w: &mut dyn std::fmt::Write) {
    let _ = match state.len() {
        Some(all) => write!(w, "{}/{all}", state.pos()),
        None => write!(w, "{}", state.pos()),
    };
}

fn rate(state: &ProgressState, before: u64, w: &mut dyn std::fmt::Write) {
    let done = state.pos().saturating_sub(before) as f64;
    let rate = done / state.elapsed().as_secs_f64().max(1e-9);
    if done > 0.0 {
        let _ = write!(w, "  {rate:.0}/s");
    }
    if let Some(all) = state.len() {
        let left = all.saturating_sub(state.pos()) as f64 / rate;
        if left.is_finite() {
            let left = indicatif::HumanDuration(Duration::from_secs_f64(left.ceil()));
            let _ = write!(w, ", {left:#} left");
        }
    }
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
