//! The list of runs: a message each in `<base>.runs`, put there before a run's first job.
//!
//! It is only looked at ([`Pass`]). What it says of a run that was collected is removed by whoever
//! lists the runs next: its queue of results is gone then.

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use serde::{Deserialize, Serialize};

use super::queues::{RunQueues, Sent, base};
use crate::amqp::ask::answer;
use crate::amqp::pass::{Pass, PassError};
use crate::amqp::{AmqpError, AmqpOptions, put, short};

/// The most runs that are listed; the oldest are forgotten.
const MOST: i64 = 10_000;
/// What a message of the list is.
const TYPE: &str = "angler.run.v1";

/// What was said of a run when it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Its id.
    pub run: String,
    /// Jobs that it is to have.
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

/// A run as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// Jobs that were sent.
    pub sent: u64,
    /// Jobs that the run has, as they say.
    pub jobs: Option<u64>,
    /// Results that wait to be collected.
    pub results: u64,
    /// Whether somebody collects them.
    pub is_collected: bool,
    /// Whether it was cancelled.
    pub is_cancelled: bool,
}

/// The name of the list of the fleet whose first queue of jobs is `jobs`.
pub fn list(jobs: &str) -> String {
    format!("{}.runs", base(jobs))
}

/// Adds a run to the list.
///
/// # Errors
/// What the broker said.
pub(super) async fn add(channel: &Channel, jobs: &str, begun: &Begun) -> Result<(), AmqpError> {
    let mut arguments = FieldTable::default();
    put(&mut arguments, "x-queue-type", "quorum");
    arguments.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(1_000_000_000));
    arguments.insert(short("x-max-length"), AMQPValue::LongLongInt(MOST));
    put(&mut arguments, "x-overflow", "drop-head");
    let list = short(&list(jobs));
    let durable = QueueDeclareOptions::durable();
    answer(channel.queue_declare(list.clone(), durable, arguments)).await?;
    answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let body = serde_json::to_vec(begun).unwrap_or_default(); // Strings and numbers: it cannot fail.
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_type(TYPE.into())
        .with_content_type("application/json".into());
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let adding =
        async { channel.basic_publish("".into(), list, mandatory, &body, properties).await?.await };
    match answer(adding).await? {
        Confirmation::Ack(None) => {}
        _ => tracing::warn!("the run is not listed: the broker did not take its message"),
    }
    Ok(())
}

/// All runs that are still there, the oldest first.
///
/// # Errors
/// [`PassError`].
pub async fn runs(options: &AmqpOptions, jobs: &str) -> Result<Vec<(Begun, State)>, PassError> {
    let mut pass = match Pass::open(options, "runs", &list(jobs)).await {
        Err(PassError::NoQueue(_)) => return Ok(Vec::new()),
        pass => pass?,
    };
    let read = read(&mut pass, jobs).await;
    let closed = pass.close().await;
    let runs = read?;
    closed?;
    Ok(runs)
}

async fn read(pass: &mut Pass, jobs: &str) -> Result<Vec<(Begun, State)>, AmqpError> {
    let mut runs: Vec<(Begun, State)> = Vec::new();
    while let Some(message) = pass.next().await? {
        let begun: Option<Begun> = serde_json::from_slice(&message.data).ok();
        // Whoever was killed right after adding it added it again.
        let begun = begun.filter(|new| !runs.iter().any(|(known, _)| known.run == new.run));
        let state = match &begun {
            None => None,
            Some(begun) => state(pass.connection(), jobs, &begun.run).await?,
        };
        match (begun, state) {
            (Some(begun), Some(state)) => runs.push((begun, state)),
            _ => pass.remove(message.delivery_tag).await?,
        }
    }
    Ok(runs)
}

/// How a run is; none if there is no such run.
///
/// # Errors
/// What the broker said.
pub async fn state(
    connection: &Connection,
    jobs: &str,
    run: &str,
) -> Result<Option<State>, AmqpError> {
    let queues = RunQueues::new(jobs, run);
    let Some(results) = queues.waiting(connection).await? else { return Ok(None) };
    let sent = queues.sent(connection).await?;
    let channel = answer(connection.create_channel()).await?;
    answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let is_cancelled = queues.is_cancelled(&channel).await?;
    answer(channel.close(200, "done".into())).await?;
    Ok(Some(State {
        sent: sent.as_ref().map_or(0, |Sent { run, .. }| run.index + 1),
        jobs: sent.map(|sent| sent.run.jobs),
        results: results.ready,
        is_collected: results.consumers > 0,
        is_cancelled,
    }))
}
