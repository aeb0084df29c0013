//! The list of runs: a message each in `<base>.runs`, put there before a run's first job.
//!
//! It is only looked at ([`Pass`]). The command that lists the runs next removes the message of a run
//! that was collected: its mark is gone then.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::AMQPValue;
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use angler_amqp::ask::{answer, look_at};
use angler_amqp::queue_scan::{Pass, PassError};
use angler_amqp::run_queues::{IdQueues, base, declare, kept};
use angler_amqp::{AmqpError, AmqpOptions, close, connect, put, short};
use angler_wire::error::Reason;

use super::mark::{self, Mark, MarkError};

/// The most runs that are listed; the oldest are forgotten.
const MOST: i64 = 10_000;
/// AMQP property `type` of a message of the list.
const TYPE: &str = "angler.run.v1";
/// Runs that are looked at in parallel, and how long one may take.
const LOOKS: usize = 8;
const LOOK: Duration = Duration::from_secs(10);

/// What is said of a run when it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Its id.
    pub run: String,
    /// Tells it from earlier runs with the same id.
    #[serde(default)]
    pub nonce: String,
    /// Jobs that it has.
    pub jobs: u64,
    /// Images in them.
    pub images: u64,
    /// `set` or `set@version`.
    pub classes: String,
    /// The queue that its jobs go to.
    pub queue: String,
    /// When, RFC 3339.
    pub at: String,
}

/// How a run is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// Jobs that are known to be sent.
    pub sent: u64,
    /// Jobs that the run has.
    pub jobs: u64,
    /// Results that wait to be collected.
    pub results: u64,
    /// `true` if a command collects them.
    pub is_collected: bool,
    /// `true` if it was cancelled.
    pub is_cancelled: bool,
}

/// A run of the list, and how it is or why that cannot be told now.
pub type Listed = (Begun, Result<State, Reason>);

/// The name of the list of the fleet whose first jobs queue is `jobs`.
pub fn list(jobs: &str) -> String {
    format!("{}.runs", base(jobs))
}

/// Adds a run to the list; `false` if the broker did not take it.
///
/// # Errors
/// What the broker said.
pub(super) async fn add(channel: &Channel, jobs: &str, begun: &Begun) -> Result<bool, AmqpError> {
    let list = list(jobs);
    let mut arguments = kept();
    arguments.insert(short("x-max-length"), AMQPValue::LongLongInt(MOST));
    put(&mut arguments, "x-overflow", "drop-head");
    declare(channel, &list, arguments).await?;
    answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let body = serde_json::to_vec(begun).unwrap_or_default(); // Strings and numbers: it cannot fail.
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_type(TYPE.into())
        .with_content_type("application/json".into());
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let adding = async {
        channel.basic_publish("".into(), short(&list), mandatory, &body, properties).await?.await
    };
    Ok(matches!(answer(adding).await?, Confirmation::Ack(None)))
}

/// Returns what the list still says of the last run with this id; `None` also if it cannot be read now.
pub(super) async fn last_of(options: &AmqpOptions, jobs: &str, run: &str) -> Option<Begun> {
    let looking = async {
        let mut pass = Pass::open(options, "enqueue", &list(jobs)).await.ok()?;
        let mut last = None;
        while let Ok(Some(message)) = pass.next().await {
            let begun: Option<Begun> = serde_json::from_slice(&message.data).ok();
            last = begun.filter(|begun| begun.run == run).or(last);
        }
        let _ = pass.close().await; // What it holds goes back in any case.
        last
    };
    timeout(LOOK, looking).await.ok().flatten()
}

/// Lists all runs that were not collected yet, the oldest first.
///
/// # Errors
/// [`PassError`].
pub async fn runs(options: &AmqpOptions, jobs: &str) -> Result<Vec<Listed>, PassError> {
    let mut pass = match Pass::open(options, "runs", &list(jobs)).await {
        Err(PassError::NoQueue(_)) => return Ok(Vec::new()),
        pass => pass?,
    };
    let read = read(&mut pass, options, jobs).await;
    let closed = pass.close().await;
    let runs = read?;
    closed?;
    Ok(runs)
}

async fn read(
    pass: &mut Pass,
    options: &AmqpOptions,
    jobs: &str,
) -> Result<Vec<Listed>, AmqpError> {
    let mut all: Vec<(u64, Begun)> = Vec::new();
    while let Some(message) = pass.next().await? {
        let begun: Option<Begun> = serde_json::from_slice(&message.data).ok();
        // A sender that was killed right after adding its run adds it again.
        let is_same = |begun: &Begun, (_, known): &(u64, Begun)| {
            (&begun.run, &begun.nonce) == (&known.run, &known.nonce)
        };
        match begun.filter(|begun| !all.iter().any(|known| is_same(begun, known))) {
            Some(begun) => all.push((message.delivery_tag, begun)),
            None => pass.remove(message.delivery_tag).await?,
        }
    }
    let looks = all.into_iter().map(async |(tag, begun)| {
        let state = look(options, jobs, &begun).await;
        (tag, begun, state)
    });
    let mut looks = stream::iter(looks).buffered(LOOKS);
    let mut runs = Vec::new();
    while let Some((tag, begun, state)) = looks.next().await {
        match state {
            Ok(Some(state)) => runs.push((begun, Ok(state))),
            Ok(None) => pass.remove(tag).await?,
            Err(reason) => runs.push((begun, Err(reason))),
        }
    }
    Ok(runs)
}

/// Looks at a run over a connection of its own, which a queue that cannot be reached may cost.
async fn look(options: &AmqpOptions, jobs: &str, begun: &Begun) -> Result<Option<State>, Reason> {
    let looking = async {
        let connection = connect(options, "runs").await?;
        let found = state(&connection, jobs, &begun.run).await;
        close(&connection).await;
        found
    };
    match timeout(LOOK, looking).await {
        Ok(Ok(found)) => Ok(found.filter(|(mark, _)| mark.nonce == begun.nonce).map(|(_, s)| s)),
        Ok(Err(error)) => Err(Reason::of(error)),
        Err(_) => Err(format!("the broker did not answer within {} s", LOOK.as_secs()).into()),
    }
}

/// Looks at a run; `None` if no run has this id.
///
/// # Errors
/// [`MarkError`].
pub async fn state(
    connection: &Connection,
    jobs: &str,
    run: &str,
) -> Result<Option<(Mark, State)>, MarkError> {
    let names = IdQueues::new(jobs, run);
    let Some(mark) = mark::read(connection, &names).await? else { return Ok(None) };
    let queues = mark.queues(jobs);
    let results = queues.waiting(connection).await?;
    // Not by a message: a broker that blocks publishers still says how its queues are.
    let is_cancelled = look_at(connection, &queues.cancelled).await?.is_some();
    let state = State {
        sent: mark.sent,
        jobs: mark.jobs,
        results: results.map_or(0, |queue| queue.ready),
        is_collected: results.is_some_and(|queue| queue.consumers > 0),
        is_cancelled,
    };
    Ok(Some((mark, state)))
}
