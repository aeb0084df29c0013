//! `angler classes activate` and `rollback`: another version for every worker, at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use angler_amqp::control::ControlClient;
use angler_core::class_sets::publish::{Published, Target, activate};
use angler_vectors::file::Expected;
use angler_wire::control::{Answer, Request, SetStatus};
use angler_wire::job::{ClassSelector, check_name};
use angler_wire::text::plural;

use crate::app::App;
use crate::commands::UsageError;
use crate::commands::tables::show;

/// How long a worker may keep silent before it is asked again: it may have been about to connect.
const AGAIN: Duration = Duration::from_secs(2);

/// Make a version the active one, on every worker at once
///
/// Checks the version as a worker would, writes active.json (of two people at once one is told who
/// won), announces it and waits until the workers have swapped. Jobs that are under way finish with
/// the version they began with. Exit code 1 if the version is refused, or if a worker did not
/// confirm.
#[derive(Args)]
pub struct ActivateCommand {
    /// The version, as SET@VERSION
    #[arg(value_name = "SET@VERSION")]
    version: String,
    #[command(flatten)]
    announcing: Announcing,
}

/// Go back to the version that was active before
///
/// The same as activating it by name; a second rollback undoes the first.
#[derive(Args)]
pub struct RollbackCommand {
    /// The class set
    set: String,
    #[command(flatten)]
    announcing: Announcing,
}

#[derive(Args)]
struct Announcing {
    /// How long to wait for the workers' confirmations
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    wait: f64,
    /// Write active.json without a broker; workers follow within classes.poll_seconds
    #[arg(long)]
    no_announce: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Outcome<'a> {
    set: &'a str,
    version: &'a str,
    previous: Option<&'a str>,
    /// Whether active.json was written; not if the version was active already.
    changed: bool,
    sha256: &'a str,
    rows: usize,
    model: &'a str,
    /// From the announcement to the last confirmation.
    seconds: Option<f64>,
    workers: Option<Workers>,
}

/// What the workers said.
#[derive(Debug, Default, Serialize)]
struct Workers {
    /// Consumers of the jobs queue.
    live: usize,
    /// They serve the version.
    confirmed: Vec<Who>,
    /// They have not been asked for the set yet, and will read what is active then.
    idle: Vec<Who>,
    /// They heard of it and do not serve it.
    missing: Vec<Missing>,
    /// How many said nothing.
    silent: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Who {
    worker: String,
    instance: String,
}

#[derive(Debug, Serialize)]
struct Missing {
    #[serde(flatten)]
    who: Who,
    reason: String,
}

impl ActivateCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let selector = ClassSelector::parse(&self.version).map_err(UsageError::of)?;
        let Some(version) = &selector.version else {
            let message = format!("{0} names no version; write {0}@VERSION", self.version);
            return Err(UsageError(message).into());
        };
        self.announcing.run(app, &selector.set, Target::Version(version)).await
    }
}

impl RollbackCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        check_name(&self.set).map_err(UsageError::of)?;
        self.announcing.run(app, &self.set, Target::Previous).await
    }
}

impl Announcing {
    async fn run(&self, app: &App, set: &str, target: Target<'_>) -> Result<()> {
        if !(0.0..=3600.0).contains(&self.wait) {
            return Err(UsageError("--wait must be 0 to 3600 seconds".to_owned()).into());
        }
        let model = app.model()?;
        let expected = Expected { model: model.fingerprint.clone(), dim: model.dim };
        let store = app.class_root().await?;
        // Before anything is written: a version that the workers are not told of is not what was
        // asked for.
        let mut client = match self.no_announce {
            true => None,
            false => Some(app.control_client("classes activate").await.context(
                "the broker cannot be reached, so nothing was changed; --no-announce activates \
                 without it, and workers follow within classes.poll_seconds",
            )?),
        };
        let limit = app.settings.classes.version_bytes;
        let published =
            activate(store.as_ref(), set, target, &expected, limit, &operator()).await?;
        let announced = Instant::now();
        let workers = match &mut client {
            Some(client) => {
                let deadline = announced + Duration::from_secs_f64(self.wait);
                Some(confirmations(client, set, &published, deadline).await?)
            }
            None => None,
        };
        let seconds = workers.as_ref().map(|_| announced.elapsed().as_secs_f64());
        if let Some(client) = client {
            client.close().await;
        }
        self.report(set, &published, workers, seconds)
    }

    fn report(
        &self,
        set: &str,
        published: &Published,
        workers: Option<Workers>,
        seconds: Option<f64>,
    ) -> Result<()> {
        let Published { active, before, changed, loaded } = published;
        let behind = workers.as_ref().map_or(0, |w| w.missing.len() + w.silent);
        let outcome = Outcome {
            set,
            version: &active.version,
            previous: before.as_deref(),
            changed: *changed,
            sha256: &loaded.sha256,
            rows: loaded.classes.vectors().rows(),
            model: loaded.classes.model(),
            seconds,
            workers,
        };
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&outcome)?))?;
        } else {
            show(&outcome.text(loaded.classes.labels().len()))?;
        }
        if behind > 0 {
            bail!(
                "{set}@{} is active, but not every worker confirmed it: {behind} did not",
                active.version
            );
        }
        Ok(())
    }
}

impl Outcome<'_> {
    fn text(&self, labels: usize) -> String {
        let id = format!("{}@{}", self.set, self.version);
        let mut text = match (self.changed, self.previous) {
            (false, _) => format!("{id} was active already"),
            (true, Some(previous)) => format!("{id} is active; before it: {previous}"),
            (true, None) => format!("{id} is active, the first of its set"),
        };
        let _ = std::fmt::Write::write_fmt(
            &mut text,
            format_args!("\n  {labels} classes, {} vectors, model {}\n", self.rows, self.model),
        );
        let Some(workers) = &self.workers else {
            return text + "  not announced: workers follow within classes.poll_seconds\n";
        };
        let said = workers.confirmed.len() + workers.idle.len();
        let total = said + workers.missing.len() + workers.silent;
        if total == 0 {
            return text + "  no worker runs; the next one will serve it\n";
        }
        text += &format!(
            "  {} of {} serving it after {:.0} ms\n",
            workers.confirmed.len(),
            plural(total, "worker"),
            1000.0 * self.seconds.unwrap_or_default()
        );
        if !workers.idle.is_empty() {
            text += &format!(
                "  {} not asked for {} yet: it will be read with the first job\n",
                workers.idle.len(),
                self.set
            );
        }
        for Missing { who, reason } in &workers.missing {
            text += &format!("  not on {}: {reason}\n", who.worker);
        }
        if workers.silent > 0 {
            text += &format!("  {} did not answer: they follow by polling\n", workers.silent);
        }
        text
    }
}

/// Announces the version and waits until every worker has said what it serves.
async fn confirmations(
    client: &mut ControlClient,
    set: &str,
    published: &Published,
    deadline: Instant,
) -> Result<Workers> {
    let request =
        Request::Activated { set: set.to_owned(), version: published.active.version.clone() };
    let mut heard = BTreeSet::new();
    let mut said: BTreeMap<Who, Option<SetStatus>> = BTreeMap::new();
    let live = client.workers();
    while Instant::now() < deadline && said.len() < live.max(heard.len()) {
        client.ask(&request).await.context("the announcement could not be sent")?;
        let round = deadline.min(Instant::now() + AGAIN);
        while said.len() < live.max(heard.len()) {
            let Some(reply) = client.reply(round).await else { break };
            let who = Who { worker: reply.worker, instance: reply.instance };
            heard.insert(who.clone());
            if let Answer::Serving { set } = reply.answer {
                said.insert(who, set);
            }
        }
    }
    let mut workers = Workers { live, ..Workers::default() };
    workers.silent = live.saturating_sub(heard.len());
    for who in heard {
        match said.remove(&who) {
            None => {
                let reason = "it heard of it, and is still loading".to_owned();
                workers.missing.push(Missing { who, reason });
            }
            Some(None) => workers.idle.push(who),
            Some(Some(status)) if serves(&status, published) => workers.confirmed.push(who),
            Some(Some(status)) => {
                let refused = status.refused.map(|r| format!(": {}", r.reason)).unwrap_or_default();
                let reason = format!("it serves {}{refused}", status.version);
                workers.missing.push(Missing { who, reason });
            }
        }
    }
    Ok(workers)
}

fn serves(status: &SetStatus, published: &Published) -> bool {
    status.version == published.active.version && status.sha256 == published.loaded.sha256
}

/// Who activates, for people: user and host.
fn operator() -> String {
    let user = ["USER", "LOGNAME", "USERNAME"].iter().find_map(|name| std::env::var(name).ok());
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    format!("{}@{host}", user.unwrap_or_else(|| "somebody".to_owned()))
}
