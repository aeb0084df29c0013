//! How far a run was sent: a small record in a queue of its own.
//!
//! The record is written before anything else of a run, so anyone who has the run's id finds its
//! nonce here, and again after the broker confirmed more jobs. It never says more than the broker
//! has. A sender that is killed has sent a few jobs more than it says; another sends those again.
//!
//! The sender publishes the new record, waits for the confirm and only then takes the older one away:
//! the queue is never empty. A reader looks at all records, uses the one with the most jobs sent and
//! requeues them. Readers take turns, since each would find nothing while another holds the
//! records. A queue without a record is therefore no answer: look again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use angler_amqp::ask::{answer, is_missing, is_unserved, look_at};
use angler_amqp::run_queues::{IdQueues, NONCE_BYTES, RunQueues, declare, kept};
use angler_amqp::turn::{Turn, TurnError};
use angler_amqp::{AmqpError, short};
use angler_wire::error::Reason;

/// AMQP property `type` of a record.
const TYPE: &str = "angler.run.mark.v1";
/// How long to wait for the turn to read.
const TURN: Duration = Duration::from_secs(15);
/// How long a record may be out of its queue: requeuing takes the broker milliseconds.
const REQUEUED: Duration = Duration::from_secs(5);
/// How often to look for it.
const LOOK: Duration = Duration::from_millis(50);
/// Records that are looked at in one queue. There are one or two.
const RECORDS: usize = 1000;

/// What the broker knows of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The run's id.
    pub run: String,
    /// Tells it from earlier runs with the same id.
    pub nonce: String,
    /// Jobs that the run has.
    pub jobs: u64,
    /// Images in them.
    pub images: u64,
    /// Of the jobs the first `sent` are known to be sent; a few more may be.
    pub sent: u64,
    /// What the run's images and options are recognised by.
    pub digest: String,
    /// The process that sends the run, for people.
    pub sender: String,
}

impl Mark {
    /// Names the run's queues.
    pub fn queues(&self, jobs: &str) -> RunQueues {
        RunQueues::new(jobs, &self.run, &self.nonce)
    }
}

/// Makes a nonce.
pub fn new_nonce() -> String {
    // The standard library's keys of hash tables come from the system's random numbers.
    let random = RandomState::new().hash_one(std::process::id());
    format!("{random:016x}")[..NONCE_BYTES].to_owned()
}

/// Why a mark cannot be read. None of it says that there is no run.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// Another command reads it.
    #[error("cannot read how far run {run} was sent: another command is reading it; try again")]
    Busy {
        /// The run's id.
        run: String,
    },
    /// The queue exists and holds no record.
    #[error("cannot read how far run {run} was sent: queue {queue} is empty; try again")]
    Empty {
        /// The run's id.
        run: String,
        /// The mark's queue.
        queue: String,
    },
    /// The queue exists, and the broker cannot read it. It has no leader: most of its nodes are down, or
    /// the broker lost the queue's content in a crash.
    #[error(
        "cannot read how far run {run} was sent: queue {queue} exists, but the broker cannot read it ({reason}); if all nodes of the broker are up, it lost the queue in a crash, and `angler runs cancel --delete {run}` frees the run's id"
    )]
    Lost {
        /// The run's id.
        run: String,
        /// The mark's queue.
        queue: String,
        /// What the broker said.
        #[source]
        reason: Reason,
    },
    /// What the queue holds is no mark.
    #[error(
        "cannot read how far run {run} was sent: queue {queue} holds no record that this version of angler reads"
    )]
    Unreadable {
        /// The run's id.
        run: String,
        /// The mark's queue.
        queue: String,
    },
    /// The broker cannot be asked.
    #[error(transparent)]
    Amqp(#[from] AmqpError),
}

/// What a mark's queue showed.
#[derive(Debug)]
pub(super) enum Look {
    /// There is no queue: no run has this id.
    Missing,
    /// There is a queue without a record.
    Empty,
    /// There are records, and none can be read.
    Unreadable,
    /// The record with the most jobs sent.
    Found(Mark),
}

/// Reads a run's mark; `None` if no run has this id.
///
/// # Errors
/// [`MarkError`].
pub async fn read(connection: &Connection, names: &IdQueues) -> Result<Option<Mark>, MarkError> {
    let of = || (names.run.clone(), names.mark.clone());
    match look(connection, names).await? {
        Look::Missing => Ok(None),
        Look::Found(mark) => Ok(Some(mark)),
        Look::Empty => {
            let (run, queue) = of();
            Err(MarkError::Empty { run, queue })
        }
        Look::Unreadable => {
            let (run, queue) = of();
            Err(MarkError::Unreadable { run, queue })
        }
    }
}

/// Looks for a run's mark, in turn with other readers, until there is a record or none can be on its
/// way back.
pub(super) async fn look(connection: &Connection, names: &IdQueues) -> Result<Look, MarkError> {
    if look_at(connection, &names.mark).await?.is_none() {
        return Ok(Look::Missing);
    }
    let turn = match Turn::take(connection, &names.reader, TURN).await {
        Ok(turn) => turn,
        Err(TurnError::Busy { .. }) => return Err(MarkError::Busy { run: names.run.clone() }),
        Err(TurnError::Amqp(error)) => return Err(error.into()),
    };
    let end = Instant::now() + REQUEUED;
    let found = loop {
        match look_once(connection, names).await {
            Ok(Look::Empty) if Instant::now() < end => sleep(LOOK).await,
            found => break found,
        }
    };
    let ended = turn.end().await;
    let found = found?;
    ended?;
    Ok(found)
}

async fn look_once(connection: &Connection, names: &IdQueues) -> Result<Look, MarkError> {
    let channel = answer(connection.create_channel()).await?;
    let (mut best, mut seen): (Option<Mark>, usize) = (None, 0);
    while seen < RECORDS {
        let by_hand = BasicGetOptions { no_ack: false };
        let message = match answer(channel.basic_get(short(&names.mark), by_hand)).await {
            Err(error) if is_missing(&error, &names.mark) => return Ok(Look::Missing),
            Err(error) if is_unserved(&error) => {
                let (run, queue) = (names.run.clone(), names.mark.clone());
                return Err(MarkError::Lost { run, queue, reason: Reason::of(error) });
            }
            message => message?,
        };
        let Some(message) = message else { break };
        seen += 1;
        let mark: Option<Mark> = serde_json::from_slice(&message.delivery.data).ok();
        best = match (best, mark) {
            (Some(best), Some(mark)) if best.sent > mark.sent => Some(best),
            (best, mark) => mark.or(best),
        };
    }
    // What a channel holds goes back when it is closed.
    answer(channel.close(200, "done".into())).await?;
    Ok(match (best, seen) {
        (Some(mark), _) => Look::Found(mark),
        (None, 0) => Look::Empty,
        (None, _) => Look::Unreadable,
    })
}

/// What became of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// The broker has it.
    Kept,
    /// The broker refused it for now.
    Refused,
    /// There is no queue for it: the run was collected or deleted.
    Gone,
}

/// Writes marks. There is one at a time, the sender's.
pub(super) struct Marker {
    /// Confirms, and has one message in flight.
    channel: Channel,
    queue: String,
}

impl Marker {
    /// Opens a channel to a run's mark.
    pub(super) async fn open(connection: &Connection, names: &IdQueues) -> Result<Self, AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        answer(channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(Self { channel, queue: names.mark.clone() })
    }

    /// Declares the queue.
    pub(super) async fn declare(&self) -> Result<(), AmqpError> {
        declare(&self.channel, &self.queue, kept()).await
    }

    /// Replaces the record by one that says at least as much.
    pub(super) async fn write(
        &self,
        connection: &Connection,
        mark: &Mark,
    ) -> Result<Written, AmqpError> {
        let body = serde_json::to_vec(mark).unwrap_or_default(); // Strings and numbers: it cannot fail.
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_type(TYPE.into())
            .with_content_type("application/json".into());
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let queue = short(&self.queue);
        let writing = async {
            self.channel.basic_publish("".into(), queue, mandatory, &body, properties).await?.await
        };
        match answer(writing).await? {
            Confirmation::Ack(None) => {}
            // Also returned while the queue's leader changes, or its node is down.
            Confirmation::Ack(Some(_)) => {
                let found = look_at(connection, &self.queue).await?;
                return Ok(if found.is_none() { Written::Gone } else { Written::Refused });
            }
            _ => return Ok(Written::Refused),
        }
        self.remove_older(mark).await?;
        Ok(Written::Kept)
    }

    /// Takes away what `mark` replaces, except what a reader holds: that goes with the next one.
    async fn remove_older(&self, mark: &Mark) -> Result<(), AmqpError> {
        loop {
            let by_hand = BasicGetOptions { no_ack: false };
            let got = answer(self.channel.basic_get(short(&self.queue), by_hand)).await?;
            let Some(message) = got else { return Ok(()) };
            let tag = message.delivery.delivery_tag;
            if serde_json::from_slice::<Mark>(&message.delivery.data).is_ok_and(|m| m == *mark) {
                let back = BasicNackOptions { requeue: true, multiple: false };
                return answer(self.channel.basic_nack(tag, back)).await;
            }
            answer(self.channel.basic_ack(tag, BasicAckOptions::default())).await?;
            // The oldest comes first, so the last one is the one that was just written.
            if message.message_count <= 1 {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonces_differ_and_fit_a_queues_name() {
        let nonces: std::collections::BTreeSet<String> = (0..1000).map(|_| new_nonce()).collect();
        assert_eq!(nonces.len(), 1000);
        assert!(nonces.iter().all(|nonce| nonce.len() == NONCE_BYTES));
        assert!(nonces.iter().all(|n| n.chars().all(|c| c.is_ascii_hexdigit())));
    }
}
