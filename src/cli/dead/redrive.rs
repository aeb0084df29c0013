//! `angler dead redrive`: jobs that were given up on, sent again as new ones.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{Chosen, end, letters, nothing, rest};
use crate::amqp::dead::{DeadLetters, Filter};
use crate::amqp::publisher::Publisher;
use crate::app::App;
use crate::cli::tables::show;

/// Send jobs that were given up on again, as new ones
///
/// Each goes to the jobs queue with its first attempt before it, and is removed from the dead
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
        let (queue, to) = (&app.settings.amqp.dead_queue, &app.settings.amqp.jobs_queue);
        let mut outcome =
            Outcome { queue, to, dry_run: self.dry_run, matched: 0, redriven: 0, not_looked_at: 0 };
        let mut dead = app.dead_letters("dead redrive").await?;
        let publisher = app.job_publisher("dead redrive");
        let sent = self.send(&mut dead, &publisher, &filter, &mut outcome).await;
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
        outcome: &mut Outcome<'_>,
    ) -> Result<()> {
        let limit = self.chosen.limit.unwrap_or(u64::MAX);
        while outcome.matched < limit
            && let Some(letter) = dead.next().await?
        {
            if !filter.matches(&letter) {
                continue;
            }
            outcome.matched += 1;
            if !self.dry_run {
                dead.redrive(letter, publisher, outcome.to).await?;
                outcome.redriven += 1;
            }
        }
        Ok(())
    }
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
