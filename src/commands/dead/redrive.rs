//! `angler dead redrive`: jobs that were given up on, sent again as new ones.

use anyhow::Result;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use serde::Serialize;

use angler_amqp::dead::{DeadError, DeadLetter, DeadLetters, Filter};
use angler_amqp::publisher::Publisher;
use angler_amqp::topology::Topology;

use super::{Chosen, end, letters, nothing, rest};
use crate::app::App;
use crate::commands::tables::show;

/// Jobs that are sent before the confirm of the first is awaited.
const IN_FLIGHT: usize = 32;

/// Send jobs that were given up on again, as new ones
///
/// Each goes to the queue of jobs that it came from with its first attempt before it, and is removed from the dead
/// letters once the broker has confirmed it there. A job whose cause is not mended dies again. Exit
/// code 1 if none matches, or if not all could be sent.
#[derive(Args)]
pub struct RedriveCommand {
    #[command(flatten)]
    chosen: Chosen,
    /// Count what would be sent, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Outcome<'a> {
    queue: &'a str,
    to: &'a str,
    dry_run: bool,
    matched: u64,
    redriven: u64,
    not_looked_at: u64,
}

impl RedriveCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let filter = self.chosen.filter()?;
        let settings = &app.settings;
        let (queue, to) = (&settings.amqp.dead_queue, &settings.amqp.jobs_queue.names());
        let lanes: Vec<Topology> =
            settings.amqp.jobs_queue.iter().map(|lane| settings.topology_of(lane)).collect();
        let mut outcome =
            Outcome { queue, to, dry_run: self.dry_run, matched: 0, redriven: 0, not_looked_at: 0 };
        let mut dead = app.dead_letters("dead redrive").await?;
        let publisher = app.job_publisher("dead redrive");
        let sent = self.send(&mut dead, &publisher, &filter, &lanes, &mut outcome).await;
        publisher.close().await;
        outcome.not_looked_at = dead.unseen();
        let ended = end(dead, sent).await;
        // Also when it broke off: what was sent is sent.
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&outcome)?))?;
        } else {
            show(&outcome.text())?;
        }
        ended?;
        nothing(&filter, outcome.matched, queue)
    }

    async fn send(
        &self,
        dead: &mut DeadLetters,
        publisher: &Publisher,
        filter: &Filter,
        lanes: &[Topology],
        outcome: &mut Outcome<'_>,
    ) -> Result<()> {
        let mut sending = FuturesOrdered::new();
        let (mut failed, mut more) = (None, true);
        loop {
            while more && sending.len() < IN_FLIGHT {
                match self.choose(dead, filter, outcome).await {
                    Ok(Some(letter)) if !self.dry_run => {
                        let to = came_from(&letter, lanes);
                        sending.push_back(letter.send_again(publisher, to));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => more = false,
                    Err(error) => (failed, more) = (Some(error), false),
                }
            }
            // Also after a failure: what was sent meanwhile has to go.
            let sent = match sending.next().await {
                None => break,
                Some(Ok(letter)) => dead.remove(letter).await,
                Some(Err(error)) => Err(error),
            };
            match sent {
                Ok(()) => outcome.redriven += 1,
                Err(error) => (failed, more) = (failed.or(Some(error)), false),
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// The next dead letter that is meant; `None` if there are no more, or enough.
    async fn choose(
        &self,
        dead: &mut DeadLetters,
        filter: &Filter,
        outcome: &mut Outcome<'_>,
    ) -> Result<Option<DeadLetter>, DeadError> {
        if outcome.matched >= self.chosen.limit.unwrap_or(u64::MAX) {
            return Ok(None);
        }
        while let Some(letter) = dead.next().await? {
            if filter.matches(&letter) {
                outcome.matched += 1;
                return Ok(Some(letter));
            }
        }
        Ok(None)
    }
}

/// The queue of jobs that it came from, or the first one.
fn came_from<'a>(letter: &DeadLetter, lanes: &'a [Topology]) -> &'a str {
    let queue = letter.queue.as_deref().unwrap_or_default();
    let its = |lane: &&Topology| lane.jobs == queue || lane.suspects_queue() == queue;
    let lane = lanes.iter().find(its).or(lanes.first());
    lane.map_or("", |lane| lane.jobs.as_str()) // There is at least one.
}

impl Outcome<'_> {
    fn text(&self) -> String {
        let Self { queue, to, .. } = self;
        let rest = rest(self.not_looked_at);
        match self.dry_run {
            true => format!("{} of {queue} would be sent to {to}\n{rest}", letters(self.matched)),
            false => format!("{} of {queue} sent to {to}\n{rest}", letters(self.redriven)),
        }
    }
}
