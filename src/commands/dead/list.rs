//! `angler dead list`: what lies among the dead letters, and why.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use angler_amqp::dead::{DeadLetter, DeadLetters, Filter};

use super::{Which, end, letters, nothing, rest};
use crate::app::App;
use crate::commands::tables;
use crate::commands::tables::{one_line, show};

/// The longest error that is kept of a message, in characters; `show` has all of it.
const ERROR: usize = 1_000;
/// The longest reason, and how many different ones are counted: both come from whoever published.
const REASON: usize = 60;
const REASONS: usize = 200;
/// Columns of a terminal.
const WIDTH: usize = 80;

/// List the jobs that were given up on, and count the reasons
///
/// Looks without taking anything away. Exit code 1 if none matches.
#[derive(Args)]
pub struct ListCommand {
    #[command(flatten)]
    which: Which,
    /// Show at most so many, the oldest first; all are counted
    #[arg(long, default_value_t = 100, value_name = "N")]
    limit: usize,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listed<'a> {
    queue: &'a str,
    /// Dead letters that the filters let through.
    matched: u64,
    /// Those behind the part of the queue that was looked at.
    not_looked_at: u64,
    reasons: BTreeMap<String, u64>,
    /// The oldest.
    messages: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    job: String,
    run: Option<String>,
    reason: String,
    attempts: Option<i64>,
    died_at: Option<String>,
    error: Option<String>,
    bytes: usize,
}

impl ListCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let queue = &app.settings.amqp.dead_queue;
        let filter = self.which.filter();
        let mut dead = app.dead_letters("dead list").await?;
        let listed = self.list(&mut dead, queue, &filter).await;
        let listed = end(dead, listed).await?;
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&listed)?))?;
        } else {
            show(&listed.text())?;
        }
        nothing(&filter, listed.matched, queue)
    }

    async fn list<'a>(
        &self,
        dead: &mut DeadLetters,
        queue: &'a str,
        filter: &Filter,
    ) -> Result<Listed<'a>> {
        let (reasons, messages) = (BTreeMap::new(), Vec::new());
        let mut listed = Listed { queue, matched: 0, not_looked_at: 0, reasons, messages };
        while let Some(letter) = dead.next().await? {
            if filter.matches(&letter) {
                listed.add(&letter, self.limit);
            }
        }
        listed.not_looked_at = dead.unseen();
        Ok(listed)
    }
}

impl Listed<'_> {
    fn add(&mut self, letter: &DeadLetter, limit: usize) {
        self.matched += 1;
        let mut reason = tables::start(&letter.reason, REASON);
        if self.reasons.len() >= REASONS && !self.reasons.contains_key(&reason) {
            reason = "(other)".to_owned();
        }
        *self.reasons.entry(reason).or_default() += 1;
        if self.messages.len() < limit {
            self.messages.push(Row::of(letter));
        }
    }

    fn text(&self) -> String {
        if self.matched == 0 {
            return format!("{}: no dead letters\n", self.queue);
        }
        let mut text = String::new();
        if !self.messages.is_empty() {
            // The error has a line of its own: beside the rest there would be no room for it.
            let dated = self.messages.iter().any(|row| row.died_at.is_some());
            let job = if dated { 31 } else { 51 };
            let died = if dated { "  died" } else { "" };
            text += &format!("\n{:<job$}  {:<18}  {:>5}{died}\n", "job", "reason", "tries");
            text += &format!("{}\n", "─".repeat(WIDTH));
            for row in &self.messages {
                text += &row.text(job);
            }
            text.push('\n');
        }
        let reasons: Vec<String> = self
            .reasons
            .iter()
            .map(|(reason, count)| format!("{} {count}", one_line(reason)))
            .collect();
        text += &format!("{}: {}: {}\n", self.queue, letters(self.matched), reasons.join(", "));
        let more = self.matched - self.messages.len() as u64;
        if more > 0 {
            text += &format!(
                "{more} of them not shown: --limit N shows more, --reason, --run and --id fewer\n"
            );
        }
        text += &rest(self.not_looked_at);
        text
    }
}

impl Row {
    fn of(letter: &DeadLetter) -> Self {
        Self {
            job: letter.job.clone(),
            run: letter.run.clone(),
            reason: tables::start(&letter.reason, REASON),
            attempts: letter.attempts,
            died_at: letter.died_at.map(|at| humantime::format_rfc3339_seconds(at).to_string()),
            error: letter.error.as_deref().map(|error| tables::start(error, ERROR)),
            bytes: letter.body.len(),
        }
    }

    fn text(&self, width: usize) -> String {
        // Ids of one run differ at their end.
        let job = tables::end(&one_line(&self.job), width);
        let reason = tables::start(&one_line(&self.reason), 18);
        let attempts = self.attempts.map(|n| n.to_string()).unwrap_or_default();
        let died = self.died_at.as_deref().unwrap_or_default();
        let line = format!("{job:<width$}  {reason:<18}  {attempts:>5}  {died}");
        let error = self.error.as_deref().map(|error| tables::start(&one_line(error), WIDTH - 4));
        let error = error.map(|error| format!("    {error}\n")).unwrap_or_default();
        format!("{}\n{error}", line.trim_end())
    }
}
