//! `angler dead`: look at the jobs that were given up on, send them again, or remove them.

mod list;
mod purge;
mod redrive;
mod show;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};

use angler_amqp::dead::{DeadError, DeadLetters, Filter};
use angler_wire::text::plural;

use super::UsageError;
use crate::app::App;

/// Look at the jobs that were given up on, send them again, or remove them
#[derive(Subcommand)]
pub enum DeadCommand {
    // The commands' own types carry their help.
    List(list::ListCommand),
    Show(show::ShowCommand),
    Redrive(redrive::RedriveCommand),
    Purge(purge::PurgeCommand),
}

impl DeadCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        match self {
            Self::List(command) => command.run(app).await,
            Self::Show(command) => command.run(app).await,
            Self::Redrive(command) => command.run(app).await,
            Self::Purge(command) => command.run(app).await,
        }
    }
}

/// Which dead letters a command means.
#[derive(Args)]
struct Which {
    /// Only those given up for this reason, as `list` shows it; may be repeated
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Only jobs of this bulk run; may be repeated
    #[arg(long, value_name = "RUN")]
    run: Vec<String>,
    /// Only the job with this id; may be repeated
    #[arg(long, value_name = "JOB")]
    id: Vec<String>,
}

impl Which {
    fn filter(&self) -> Filter {
        Filter { reasons: self.reason.clone(), runs: self.run.clone(), jobs: self.id.clone() }
    }
}

/// Which dead letters a command changes: never all of them by accident.
#[derive(Args)]
struct Chosen {
    #[command(flatten)]
    which: Which,
    /// All of them; needed when nothing else says which
    #[arg(long)]
    all: bool,
    /// At most so many, the oldest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

impl Chosen {
    fn filter(&self) -> Result<Filter, UsageError> {
        let filter = self.which.filter();
        if filter.is_empty() && !self.all {
            let which = "say which: --reason, --run, --id, or --all";
            return Err(UsageError(which.to_owned()));
        }
        if !filter.is_empty() && self.all {
            let both = "--all means every dead letter: it does not go with --reason, --run or --id";
            return Err(UsageError(both.to_owned()));
        }
        Ok(filter)
    }
}

/// A bulk run's jobs that were given up on, and why; `command` is part of the connection's name.
pub(super) async fn of_run(app: &App, command: &str, run: &str) -> Result<Vec<(String, String)>> {
    let mut dead = match app.dead_letters(command).await {
        Err(DeadError::NoQueue(_)) => return Ok(Vec::new()), // No worker has run yet.
        dead => dead?,
    };
    let filter = Filter { runs: vec![run.to_owned()], ..Filter::default() };
    let read = async {
        let mut jobs = Vec::new();
        while let Some(letter) = dead.next().await? {
            if filter.matches(&letter) {
                jobs.push((letter.job, letter.reason));
            }
        }
        anyhow::Ok(jobs)
    };
    let jobs = read.await;
    end(dead, jobs).await
}

/// Ends a pass. What went wrong in it comes before what went wrong at its end.
async fn end<T>(dead: DeadLetters, outcome: Result<T>) -> Result<T> {
    let closed = dead.close().await;
    let value = outcome?;
    closed?;
    Ok(value)
}

/// What the pass did not come to, because of --limit or for want of time.
fn rest(not_looked_at: u64) -> String {
    match not_looked_at {
        0 => String::new(),
        n => format!("{n} behind them not looked at\n"),
    }
}

/// The error of a command that found nothing: exit code 1, unless it meant everything there is.
fn nothing(filter: &Filter, matched: u64, queue: &str) -> Result<()> {
    if matched == 0 && !filter.is_empty() {
        return Err(anyhow!(
            "no dead letter in {queue} matches; `angler dead list` shows them all"
        ));
    }
    Ok(())
}

/// `1 dead letter`, `2 dead letters`.
fn letters(count: u64) -> String {
    plural(count, "dead letter")
}
