//! What is known of jobs that have no result.

use std::fmt::Write as _;

use anyhow::Result;

use crate::amqp::connect;
use crate::amqp::dead::Filter;
use crate::app::App;
use crate::bulk::journal::Journal;
use crate::bulk::queues::ready;

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
    let topology = app.settings.topology();
    let connection = connect(&app.settings.amqp_options("collect"), "collect").await?;
    let asking = async {
        let queued = ready(&connection, &topology.jobs).await?.unwrap_or(0);
        let apart = ready(&connection, &topology.suspects_queue()).await?.unwrap_or(0);
        let mut retrying = 0;
        for delay in &topology.retry_delays {
            retrying += ready(&connection, &topology.retry_queue(*delay)).await?.unwrap_or(0);
        }
        anyhow::Ok((queued, apart, retrying))
    };
    let (queued, apart, retrying) = asking.await?;
    crate::amqp::close(&connection).await;
    let mut dead = app.dead_letters("collect").await?;
    let filter = Filter { runs: vec![run.to_owned()], ..Filter::default() };
    let mut letters = Vec::new();
    while let Some(letter) = dead.next().await? {
        if filter.matches(&letter) && letters.len() < RANGES {
            letters.push(format!("{} ({})", letter.job, letter.reason));
        }
    }
    dead.close().await?;
    let mut text = format!(
        "Of all runs {queued} jobs wait in {}, {apart} in {}, {retrying} for a retry",
        topology.jobs,
        topology.suspects_queue()
    );
    if !letters.is_empty() {
        let _ = write!(text, "; of this one given up: {}", letters.join(", "));
    }
    Ok(text)
}
