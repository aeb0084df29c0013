//! `angler dead show`: everything that one dead letter holds.

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};

use angler_amqp::dead::{DeadLetter, DeadLetters, Filter};

use super::{end, nothing};
use crate::app::App;
use crate::commands::tables;
use crate::commands::tables::{plain, show};

/// What people are shown of a body, in characters; --json has all of it.
const BODY: usize = 20_000;
/// The most messages of one job that are shown.
const MOST: usize = 10;

/// Show one job that was given up on: headers, error and body
///
/// A job that died more than once is shown as often, up to 10 times. Exit code 1 if there is none.
#[derive(Args)]
pub struct ShowCommand {
    /// The job's id, as `angler dead list` shows it
    #[arg(value_name = "JOB")]
    job: String,
    /// Print all of it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    queue: &'a str,
    messages: Vec<Whole>,
}

#[derive(Serialize)]
struct Whole {
    job: String,
    run: Option<String>,
    reason: String,
    attempts: Option<i64>,
    died_at: Option<String>,
    error: Option<String>,
    bytes: usize,
    properties: Map<String, Value>,
    headers: Map<String, Value>,
    #[serde(flatten)]
    body: Body,
}

/// What the message's body is.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Body {
    /// It is JSON.
    Body(Value),
    /// It is not; what is no text is shown as `U+FFFD`.
    BodyText(String),
}

impl ShowCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let queue = &app.settings.amqp.dead_queue;
        let filter = Filter { jobs: vec![self.job], ..Filter::default() };
        let mut dead = app.dead_letters("dead show").await?;
        let found = find(&mut dead, &filter).await;
        let messages = end(dead, found).await?;
        let found = messages.len() as u64;
        let shown = Shown { queue, messages };
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&shown)?))?;
        } else {
            for message in &shown.messages {
                show(&message.text()?)?;
            }
        }
        nothing(&filter, found, queue)
    }
}

async fn find(dead: &mut DeadLetters, filter: &Filter) -> Result<Vec<Whole>> {
    let mut found = Vec::new();
    while found.len() < MOST
        && let Some(letter) = dead.next().await?
    {
        if filter.matches(&letter) {
            found.push(Whole::of(letter));
        }
    }
    Ok(found)
}

impl Whole {
    fn of(letter: DeadLetter) -> Self {
        Self {
            properties: letter.properties_json(),
            headers: letter.headers_json(),
            bytes: letter.body.len(),
            died_at: letter.died_at.map(|at| humantime::format_rfc3339_seconds(at).to_string()),
            body: match serde_json::from_slice(&letter.body) {
                Ok(value) => Body::Body(value),
                Err(_) => Body::BodyText(String::from_utf8_lossy(&letter.body).into_owned()),
            },
            job: letter.job,
            run: letter.run,
            reason: letter.reason,
            attempts: letter.attempts,
            error: letter.error,
        }
    }

    fn text(&self) -> Result<String> {
        let mut text = format!("\njob       {}\n", plain(&self.job));
        let mut line = |name: &str, value: Option<&str>| {
            if let Some(value) = value {
                text += &format!("{name:<8}  {}\n", plain(value));
            }
        };
        line("run", self.run.as_deref());
        line("reason", Some(&self.reason));
        line("attempts", self.attempts.map(|n| n.to_string()).as_deref());
        line("died", self.died_at.as_deref());
        line("error", self.error.as_deref());
        for (title, values) in [("properties", &self.properties), ("headers", &self.headers)] {
            if !values.is_empty() {
                text += &format!("\n{title}\n");
            }
            for (name, value) in values {
                let value = match value {
                    Value::String(value) => value.clone(),
                    other => other.to_string(),
                };
                text += &format!("  {}: {}\n", plain(name), plain(&value));
            }
        }
        let (kind, body) = match &self.body {
            Body::Body(value) => ("JSON", serde_json::to_string_pretty(value)?),
            Body::BodyText(lossy) => ("not JSON", lossy.clone()),
        };
        let cut = tables::start(&plain(&body), BODY);
        text += &format!("\nbody, {} bytes, {kind}\n{cut}\n", self.bytes);
        if body.chars().nth(BODY).is_some() {
            text += "(cut; --json prints all of it)\n";
        }
        Ok(text)
    }
}
