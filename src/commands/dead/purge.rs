//! `angler dead purge`: jobs that were given up on, removed for good.

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use angler_amqp::dead::{DeadLetters, Filter};

use super::{Chosen, end, letters, nothing, rest};
use crate::app::App;
use crate::commands::UsageError;
use crate::commands::tables::show;

/// Remove jobs that were given up on, for good
///
/// Their producers have had their failed results; what is removed here cannot be sent again. Exit
/// code 1 if none matches.
#[derive(Args)]
pub struct PurgeCommand {
    #[command(flatten)]
    chosen: Chosen,
    /// Really remove them
    #[arg(long)]
    yes: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Outcome<'a> {
    queue: &'a str,
    purged: u64,
    not_looked_at: u64,
}

impl PurgeCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let filter = self.chosen.filter()?;
        if !self.yes {
            let how =
                "what is purged is gone: add --yes (`angler dead list` takes the same filters)";
            return Err(UsageError(how.to_owned()).into());
        }
        let queue = &app.settings.amqp.dead_queue;
        let mut dead = app.dead_letters("dead purge").await?;
        let mut purged = 0;
        let removed = self.remove(&mut dead, &filter, &mut purged).await;
        let not_looked_at = dead.unseen();
        let ended = end(dead, removed).await;
        // Also when it broke off: what is gone is gone.
        if self.json {
            let outcome = Outcome { queue, purged, not_looked_at };
            show(&format!("{}\n", serde_json::to_string(&outcome)?))?;
        } else {
            let rest = rest(not_looked_at);
            show(&format!("{} of {queue} removed\n{rest}", letters(purged)))?;
        }
        ended?;
        nothing(&filter, purged, queue)
    }

    async fn remove(
        &self,
        dead: &mut DeadLetters,
        filter: &Filter,
        purged: &mut u64,
    ) -> Result<()> {
        let limit = self.chosen.limit.unwrap_or(u64::MAX);
        while *purged < limit
            && let Some(letter) = dead.next().await?
        {
            if filter.matches(&letter) {
                dead.remove(letter).await?;
                *purged += 1;
            }
        }
        Ok(())
    }
}
