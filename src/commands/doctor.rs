//! `angler doctor`: looks at everything that a worker needs, says what is wrong and what to do.
//!
//! Sections are looked at side by side, each question with a deadline of its own, so that a broker
//! that hangs does not hide what is wrong with the store. Nothing is changed anywhere.

mod backends;
mod broker;
mod classes;
mod collector;
mod devices;
mod listen;
mod model;
mod report;
mod settings;
mod store;

use std::future::Future;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::Said;
use super::tables::show;
use crate::app::App;
use crate::commands::doctor::report::{Check, Report};

/// What one question may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Check what a worker needs: settings, broker, store, model, back ends, class sets
///
/// A line for everything that was looked at: ok, warning or problem, and what to do. Nothing is
/// changed: no queue, exchange or object is made or removed.
///
/// The broker: reached, logged in to, version, virtual host; queues that differ from what a worker would
/// declare. The store: reached, credentials, buckets of s3.allowed_buckets and classes.root, conditional
/// writes. The model: its folder; each back end that is here, with one image, and whether they agree. Class
/// sets: what is active loads and fits the model; classes.preload and classes.shadow are there. Settings that
/// contradict each other; whether http.listen is free, and whether a collector of traces takes any.
///
/// Each question has 10 s, loading a model or a class set 60 s. Exit codes: 0 no problem (warnings do not
/// count), 1 a problem, 2 wrong usage or settings that cannot be used, which is told as a problem.
///
/// Keys of --json: checks (each section, name, state, message, remedy), problems, warnings.
#[derive(Args)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// `file`: what `--config` named.
    pub(super) async fn run(&self, app: &App, file: Option<&Path>) -> Result<()> {
        let settings = &app.settings;
        let broker = Box::pin(broker::check(settings));
        let store = Box::pin(store::check(app));
        let model = Box::pin(async {
            let (folder, model) = model::check(settings).await;
            let (back_ends, sets) = tokio::join!(
                Box::pin(backends::check(app, model.as_ref())),
                Box::pin(classes::check(app, model.as_deref()))
            );
            (folder, back_ends, sets)
        });
        let listen = listen::check(&settings.http.listen);
        let collector = collector::check(&settings.telemetry);
        let (broker, store, (folder, back_ends, sets), listen, collector) =
            tokio::join!(broker, store, model, listen, collector);
        let mut report = Report::default();
        let mut checks = settings::check(settings, file);
        checks.extend([listen, collector]);
        report.add("settings", checks);
        report.add("broker", broker);
        report.add("store", store);
        report.add("model", vec![folder]);
        report.add("back ends", back_ends);
        report.add("class sets", sets);
        self.print(&report)?;
        match report.problems {
            0 => Ok(()),
            _ => Err(Said(1).into()),
        }
    }

    /// Settings that cannot be used: nothing else can be looked at.
    pub(super) fn unusable(&self, reason: &str) -> anyhow::Error {
        let remedy =
            "Correct it; angler default-settings prints every setting, with what it means.";
        let reason = reason.trim_start_matches("settings: ");
        let mut report = Report::default();
        report.add("settings", vec![Check::problem("settings", reason, remedy)]);
        self.print(&report).err().unwrap_or_else(|| Said(2).into())
    }

    fn print(&self, report: &Report) -> Result<()> {
        let text = if self.json {
            format!("{}\n", serde_json::to_string_pretty(report)?)
        } else {
            let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            report.text(colours)
        };
        Ok(show(&text)?)
    }
}

/// There was no answer within this many seconds.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0} s")]
struct Silent(u64);

/// The answer, or that there was none in time.
fn within<T>(question: impl Future<Output = T>) -> impl Future<Output = Result<T, Silent>> {
    within_time(DEADLINE, question)
}

fn within_time<T>(
    time: Duration,
    question: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Silent>> {
    // A client's call holds kilobytes of state, which need not be moved about.
    let question = Box::pin(question);
    async move {
        let silent = |_| Silent(time.as_secs());
        tokio::time::timeout(time, question).await.map_err(silent)
    }
}
