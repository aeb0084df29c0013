//! What is known of jobs that have no result.

use std::fmt::Write as _;

use anyhow::Result;
use lapin::Connection;
use serde::Serialize;

use crate::amqp::ask::look_at;
use crate::amqp::connect;
use crate::app::App;
use crate::bulk::journal::Journal;
use crate::cli::dead;

/// Ranges of missing jobs, and dead letters, that are named.
const RANGES: usize = 10;

/// Which they are.
pub(super) fn missing(journal: &Journal) -> String {
    let have = journal.have();
    let Some(jobs) = have.jobs() else { return "no result has come yet".to_owned() };
    let ranges = have.missing();
    let mut text = format!("{} of {jobs} jobs have no result, numbers ", jobs - have.count());
    for (at, (first, last)) in ranges.iter().take(RANGES).enumerate() {
        let comma = if at == 0 { "" } else { ", " };
        let _ = match first == last {
            true => write!(text, "{comma}{first}"),
            false => write!(text, "{comma}{first}-{last}"),
        };
    }
    if ranges.len() > RANGES {
        let _ = write!(text, " and {} ranges more", ranges.len() - RANGES);
    }
    text
}

/// What the broker knows of them.
pub(super) async fn known(app: &App, run: &str) -> Result<String> {
    let connection = connect(&app.settings.amqp_options("collect"), "collect").await?;
    let backlog = backlog(app, &connection).await;
    crate::amqp::close(&connection).await;
    let Backlog { queued, suspects, retrying } = backlog?;
    let dead = dead::of_run(app, "collect", run).await?;
    let mut text = format!(
        "Of all runs {queued} jobs wait in {}, {suspects} to be run alone, {retrying} for a retry",
        app.settings.amqp.jobs_queue.names()
    );
    let letters = dead.iter().take(RANGES).map(|(job, reason)| format!("{job} ({reason})"));
    let letters: Vec<String> = letters.collect();
    if !letters.is_empty() {
        let _ = write!(text, "; of this one given up: {}", letters.join(", "));
    }
    Ok(text)
}

/// Jobs of all runs that wait somewhere.
#[derive(Debug, Default, Serialize)]
pub(in crate::cli) struct Backlog {
    /// For a worker.
    pub queued: u64,
    /// To be run alone, because a worker ended while it held them.
    pub suspects: u64,
    /// For their next attempt.
    pub retrying: u64,
}

/// Counts the jobs that wait.
pub(in crate::cli) async fn backlog(app: &App, connection: &Connection) -> Result<Backlog> {
    let mut all = Backlog::default();
    let ready = async |queue: &str| {
        anyhow::Ok(look_at(connection, queue).await?.map_or(0, |queue| queue.ready))
    };
    for lane in &app.settings.amqp.jobs_queue {
        let lane = app.settings.topology_of(lane);
        all.queued += ready(&lane.jobs).await?;
        all.suspects += ready(&lane.suspects_queue()).await?;
        for delay in &lane.retry_delays {
            all.retrying += ready(&lane.retry_queue(*delay)).await?;
        }
    }
    Ok(all)
}
