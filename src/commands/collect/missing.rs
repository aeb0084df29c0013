//! What is known of jobs that have no result.

use std::fmt::Write as _;

use anyhow::Result;
use lapin::Connection;
use serde::Serialize;

use angler_amqp::ask::look_at;
use angler_amqp::connect;
use angler_runs::finished_jobs::FinishedJobs;

use crate::app::App;
use crate::commands::dead;

/// Ranges of missing jobs, and dead letters, that are named.
const RANGES: usize = 10;

/// Says which jobs have no result.
pub(super) fn missing(finished: &FinishedJobs) -> String {
    let (Some(jobs), Some(lacking)) = (finished.jobs(), finished.lacking()) else {
        return match finished.count() {
            0 => "no result has come yet".to_owned(),
            count => format!("{count} jobs have a result, and how many the run has is unknown"),
        };
    };
    if lacking == 0 {
        return format!("all {jobs} jobs have a result");
    }
    let (ranges, more) = finished.missing(RANGES);
    let ranges: Vec<String> = ranges
        .iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    let more = if more > 0 { format!(" and {more} more ranges") } else { String::new() };
    format!("{lacking} of {jobs} jobs have no result, numbers {}{more}", ranges.join(", "))
}

/// What the broker knows of them.
pub(super) async fn known(app: &App, run: &str) -> Result<String> {
    let connection = connect(&app.settings.amqp_options("collect"), "collect").await?;
    let backlog = backlog(app, &connection).await;
    angler_amqp::close(&connection).await;
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
pub(in crate::commands) struct Backlog {
    /// For a worker.
    pub queued: u64,
    /// To be run alone, because a worker ended while it held them.
    pub suspects: u64,
    /// For their next attempt.
    pub retrying: u64,
}

/// Counts the jobs that wait.
pub(in crate::commands) async fn backlog(app: &App, connection: &Connection) -> Result<Backlog> {
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

#[cfg(test)]
mod tests {
    use angler_wire::job::Run;

    use super::*;

    #[test]
    fn what_is_missing_is_said_as_far_as_it_is_known() {
        let mut finished = FinishedJobs::default();
        assert_eq!(missing(&finished), "no result has come yet");
        finished.expect(3);
        assert_eq!(missing(&finished), "3 of 3 jobs have no result, numbers 0-2");
        for index in [0, 2, 1] {
            let run = Run { id: "n".to_owned(), jobs: 3, index, nonce: None };
            finished.insert(&run, true);
            finished.only(0); // Its mark is gone.
            assert!(!missing(&finished).contains("of 0"), "{}", missing(&finished));
        }
        assert_eq!(missing(&finished), "all 3 jobs have a result");
        finished.expect(100);
        assert_eq!(missing(&finished), "all 3 jobs have a result");
    }
}
