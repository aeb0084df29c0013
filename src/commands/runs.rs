//! `angler runs`: which bulk runs there are, how far one is, and its end before its time.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use lapin::Connection;
use serde::Serialize;

use angler_amqp::ask::look_at;
use angler_amqp::run_queues::{IdQueues, RunQueues, check_run, delete};
use angler_amqp::{close, connect};
use angler_runs::mark::Mark;
use angler_runs::registry;
use angler_runs::registry::{Begun, State};
use angler_wire::text::chain;

use super::UsageError;
use super::collect::missing::{Backlog, backlog};
use super::dead;
use super::tables::{ROWS, end, show, table};
use crate::app::App;

/// The widest run and class set in a table.
const RUN: usize = 30;
const CLASSES: usize = 16;
/// Jobs given up on that are named.
const LETTERS: usize = 10;

/// See which bulk runs there are and how far they are, or cancel one
#[derive(Subcommand)]
pub enum RunsCommand {
    // The commands' own types carry their help.
    List(ListCommand),
    Show(ShowCommand),
    Cancel(CancelCommand),
}

impl RunsCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        match self {
            Self::List(command) => command.run(app).await,
            Self::Show(command) => command.run(app).await,
            Self::Cancel(command) => command.run(app).await,
        }
    }
}

/// List the runs whose results were not collected yet, the latest first
///
/// `results` wait in the run's queue to be collected; what a command that collects has taken is no
/// longer there.
#[derive(Args)]
pub struct ListCommand {
    /// Print a JSON object a run
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    begun: &'a Begun,
    /// Absent if it cannot be told now.
    #[serde(flatten)]
    state: Option<&'a State>,
    /// Why it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    unknown: Option<String>,
}

impl ListCommand {
    async fn run(self, app: &App) -> Result<()> {
        let first = &app.settings.amqp.jobs_queue.first().queue;
        let mut runs = registry::runs(&app.settings.amqp_options("runs"), first).await?;
        runs.reverse();
        if self.json {
            let mut text = String::new();
            for (begun, state) in &runs {
                let unknown = state.as_ref().err().map(|reason| chain(reason));
                let listed = Listed { begun, state: state.as_ref().ok(), unknown };
                let _ = writeln!(text, "{}", serde_json::to_string(&listed)?);
            }
            return Ok(show(&text)?);
        }
        if runs.is_empty() {
            return Ok(show("no run waits to be collected\n")?);
        }
        let rows = runs.iter().take(ROWS).map(|(begun, state)| row(begun, state.as_ref().ok()));
        let headers = ["run", "classes", "", "images", "jobs sent", "results"];
        show(&table("", &headers, 3, rows, runs.len() as u64))?;
        for (begun, state) in &runs {
            if let Err(reason) = state {
                eprintln!("run {}: cannot tell how it is now: {}", begun.run, chain(reason));
            }
        }
        Ok(())
    }
}

fn row(begun: &Begun, state: Option<&State>) -> Vec<String> {
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
    let sent = or_unknown(state.map(|state| state.sent.to_string()));
    vec![
        end(&begun.run, RUN),
        end(&begun.classes, CLASSES),
        state.map_or("unknown", word).to_owned(),
        begun.images.to_string(),
        format!("{sent}/{}", begun.jobs),
        or_unknown(state.map(|state| state.results.to_string())),
    ]
}

/// Tells a run's state in a word.
fn word(state: &State) -> &'static str {
    match state {
        State { is_cancelled: true, .. } => "cancelled",
        State { sent, jobs, .. } if sent < jobs => "sending",
        State { is_collected: true, .. } => "collecting",
        _ => "sent",
    }
}

/// Show how far a run is, and what is known of its jobs
#[derive(Args)]
pub struct ShowCommand {
    /// The run, as `angler enqueue` named it
    #[arg(value_name = "ID")]
    run: String,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    run: &'a str,
    #[serde(flatten)]
    state: State,
    /// Jobs of the run that were given up on, and why.
    dead: Vec<(String, String)>,
    /// Jobs of all runs.
    all_runs: Backlog,
}

impl ShowCommand {
    async fn run(self, app: &App) -> Result<()> {
        let run = self.run.as_str();
        let (state, all_runs) = with_connection(app, run, async |connection, _, state| {
            anyhow::Ok((state, backlog(app, connection).await?))
        })
        .await?;
        let dead = dead::of_run(app, "runs", run).await?;
        let shown = Shown { run, state, dead, all_runs };
        match self.json {
            true => show(&format!("{}\n", serde_json::to_string(&shown)?))?,
            false => show(&shown.text())?,
        }
        Ok(())
    }
}

impl Shown<'_> {
    fn text(&self) -> String {
        let State { sent, jobs, results, is_collected, .. } = self.state;
        let mut text = format!("run      {}, {}\n", self.run, word(&self.state));
        let _ = writeln!(text, "jobs     {sent} of {jobs} sent");
        let taken = if is_collected { "; somebody collects them" } else { "" };
        let _ = writeln!(text, "results  {results} wait to be collected{taken}");
        for (at, (job, reason)) in self.dead.iter().take(LETTERS).enumerate() {
            let title = if at == 0 { "dead     " } else { "         " };
            let _ = writeln!(text, "{title}{job} ({reason})");
        }
        if self.dead.len() > LETTERS {
            let _ = writeln!(text, "         and {} more", self.dead.len() - LETTERS);
        }
        let Backlog { queued, suspects, retrying } = self.all_runs;
        let _ = writeln!(
            text,
            "queues   {queued} jobs of all runs wait, {suspects} to be run alone, {retrying} for a retry"
        );
        text
    }
}

/// Cancel a run: no more of its jobs are sent, and workers drop those that wait
///
/// Within seconds its jobs come back as failed ones (`cancelled`), those that wait for a retry when
/// their time comes; images that are in work are finished. Whoever enqueues the run stops.
/// `angler collect` then writes what there is of it, and exits 1.
#[derive(Args)]
pub struct CancelCommand {
    /// The run, as `angler enqueue` named it
    #[arg(value_name = "ID")]
    run: String,
    /// Delete the run's queues as well, with the results in them. This also frees the id of a run whose
    /// queues the broker lost in a crash
    #[arg(long)]
    delete: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

impl CancelCommand {
    async fn run(self, app: &App) -> Result<()> {
        let run = self.run.as_str();
        check_run(run).map_err(|e| UsageError(format!("run: {e}")))?;
        if self.delete {
            return self.delete(app).await;
        }
        let first = &app.settings.amqp.jobs_queue.first().queue;
        let state = with_connection(app, run, async |connection, mark, state| {
            mark.queues(first).cancel(connection).await?;
            anyhow::Ok(state)
        })
        .await?;
        if self.json {
            let outcome = serde_json::json!({"run": run, "sent": state.sent, "jobs": state.jobs});
            return Ok(show(&format!("{outcome}\n"))?);
        }
        let State { sent, jobs, .. } = state;
        Ok(show(&format!(
            "run {run} is cancelled: {sent} of its {jobs} jobs had been sent, and those that wait end as failed\nresults: angler collect --run {run} --out results.csv\n"
        ))?)
    }
}

impl CancelCommand {
    /// Deletes what the broker has of the run, whether or not its mark can be read.
    async fn delete(&self, app: &App) -> Result<()> {
        let (run, options) = (self.run.as_str(), app.settings.amqp_options("runs"));
        let first = &app.settings.amqp.jobs_queue.first().queue;
        // The mark would name one nonce; the list has those of earlier runs that were left behind, too.
        let listed = registry::runs(&options, first).await?;
        let of_run = listed.iter().filter(|(begun, _)| begun.run == run);
        let runs: Vec<_> =
            of_run.map(|(begun, _)| RunQueues::new(first, run, &begun.nonce)).collect();
        let mark = IdQueues::new(first, run).mark;
        let connection = connect(&options, "runs").await?;
        let deleting = async {
            if runs.is_empty() && look_at(&connection, &mark).await?.is_none() {
                bail!(no_run(run));
            }
            for queues in &runs {
                // Before its jobs come back: workers drop those that wait.
                queues.cancel(&connection).await?;
                delete(&connection, &[&queues.results, &queues.taken]).await?;
            }
            Ok(delete(&connection, &[&mark]).await?)
        };
        let deleted = deleting.await;
        close(&connection).await;
        deleted?;
        match self.json {
            true => show(&format!("{}\n", serde_json::json!({"run": run, "deleted": true})))?,
            false => show(&format!(
                "run {run} is deleted with the results that waited; its jobs that wait end as failed in {}\n",
                app.settings.amqp.results_queue
            ))?,
        }
        Ok(())
    }
}

fn no_run(run: &str) -> String {
    format!(
        "there is no run {run} (angler runs list): it was never enqueued here, or it was collected"
    )
}

/// Does something with a run that is there.
async fn with_connection<T>(
    app: &App,
    run: &str,
    work: impl AsyncFnOnce(&Connection, Mark, State) -> Result<T>,
) -> Result<T> {
    check_run(run).map_err(|e| UsageError(format!("run: {e}")))?;
    let first = &app.settings.amqp.jobs_queue.first().queue;
    let connection = connect(&app.settings.amqp_options("runs"), "runs").await?;
    let working = async {
        match registry::state(&connection, first, run).await? {
            Some((mark, state)) => work(&connection, mark, state).await,
            None => bail!(no_run(run)),
        }
    };
    let outcome = working.await;
    close(&connection).await;
    outcome
}
