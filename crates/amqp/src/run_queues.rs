//! The names of what the broker keeps of a run.
//!
//! A run is told from earlier ones with the same id by its nonce, which it gets when it begins. Every
//! name has an `@`, which no run id can have, so the names of two runs never meet:
//!
//! * `<base>.run.<id>@<nonce>`: the results until they are collected; the jobs name it as `reply_to`.
//! * `<base>.run.<id>@<nonce>.cancelled`: empty. The run is cancelled if the queue exists.
//! * `<base>.run.<id>@<nonce>.taken`: empty. A collector has results of the run in its journal if the queue exists.
//! * `<base>.run.<id>@mark`: the run's mark, where anyone who has the id finds the nonce.
//! * `<base>.run.<id>@reader`, `@sender` and `@collector`: [turns](crate::turn).
//!
//! The base is the first jobs queue without `.jobs`, whichever queue the run's jobs go to.

use lapin::options::{BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Confirmation, Connection};

use angler_wire::job::Run;

use crate::ask::{Queue, answer, look_at, question};
use crate::{AmqpError, put, short};

/// The longest run id: with it a queue's name keeps to 255 bytes, and a job's id, the run's with a
/// number behind it, to 200 characters.
pub const MAX_RUN_BYTES: usize = 128;

/// Hex digits of a nonce.
pub const NONCE_BYTES: usize = 12;

/// The longest base: `<base>.run.<id>@<nonce>.cancelled` keeps to AMQP's 255 bytes.
pub const MAX_BASE_BYTES: usize = 255 - ".run.@.cancelled".len() - MAX_RUN_BYTES - NONCE_BYTES;

/// How long a queue is kept that only says something of a run. By then the run's jobs are gone.
const SAYS: i64 = 7 * 24 * 3600 * 1000; // ms

/// A text that cannot be a run's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be a run's id: 1 to {MAX_RUN_BYTES} of letters, digits, '.', '_', '-' and '/'"
)]
pub struct RunIdError(String);

/// Checks a run id: 1 to 128 of letters, digits, `.`, `_`, `-` and `/`.
///
/// # Errors
/// [`RunIdError`].
pub fn check_run(id: &str) -> Result<(), RunIdError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if (1..=MAX_RUN_BYTES).contains(&id.len()) && id.chars().all(allowed) {
        return Ok(());
    }
    Err(RunIdError(id.chars().take(80).collect()))
}

/// What a fleet's other queues are named after: its first jobs queue.
pub fn base(jobs: &str) -> &str {
    jobs.strip_suffix(".jobs").unwrap_or(jobs)
}

/// The names that belong to a run id. Runs that have the same id use them one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdQueues {
    /// The run's id.
    pub run: String,
    /// Holds the run's mark.
    pub mark: String,
    /// The turn to read the mark.
    pub reader: String,
    /// The turn to send the run's jobs.
    pub sender: String,
    /// The turn to collect the run's results.
    pub collector: String,
}

impl IdQueues {
    /// Names those of `run` in the fleet whose first jobs queue is `jobs`.
    pub fn new(jobs: &str, run: &str) -> Self {
        let name = |what: &str| format!("{}.run.{run}@{what}", base(jobs));
        let (mark, reader) = (name("mark"), name("reader"));
        let (sender, collector) = (name("sender"), name("collector"));
        Self { run: run.to_owned(), mark, reader, sender, collector }
    }
}

/// The queues of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunQueues {
    /// Those that it shares with other runs of its id.
    pub id: IdQueues,
    /// Results.
    pub results: String,
    /// Exists if the run is cancelled.
    pub cancelled: String,
    /// Exists if a collector has taken results.
    pub taken: String,
}

impl RunQueues {
    /// Names those of a run in the fleet whose first jobs queue is `jobs`.
    pub fn new(jobs: &str, run: &str, nonce: &str) -> Self {
        let results = format!("{}.run.{run}@{nonce}", base(jobs));
        let (cancelled, taken) = (format!("{results}.cancelled"), format!("{results}.taken"));
        Self { id: IdQueues::new(jobs, run), results, cancelled, taken }
    }

    /// Names those of the run that a job says it belongs to; `None` if it does not say its nonce.
    pub fn of_job(jobs: &str, run: &Run) -> Option<Self> {
        Some(Self::new(jobs, &run.id, run.nonce.as_deref()?))
    }

    /// Declares the results queue.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn declare_results(&self, channel: &Channel) -> Result<(), AmqpError> {
        declare(channel, &self.results, kept()).await
    }

    /// Returns how many results wait and who consumes them; `None` if there is no results queue.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn waiting(&self, connection: &Connection) -> Result<Option<Queue>, AmqpError> {
        look_at(connection, &self.results).await
    }

    /// Marks the run as cancelled.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn cancel(&self, connection: &Connection) -> Result<(), AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        say(&channel, &self.cancelled).await?;
        answer(channel.close(200, "done".into())).await
    }

    /// Marks results of the run as taken. Nothing is published, so a broker that blocks publishers does it as well.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn mark_taken(&self, channel: &Channel) -> Result<(), AmqpError> {
        say(channel, &self.taken).await
    }

    /// `true` if the run is cancelled. `channel` confirms, and nothing else is in flight on it.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn is_cancelled(&self, channel: &Channel) -> Result<bool, AmqpError> {
        answer(self.ask_cancelled(channel)).await
    }

    /// Asks the same without a deadline: a broker that blocks publishers does not answer.
    pub async fn ask_cancelled(&self, channel: &Channel) -> Result<bool, lapin::Error> {
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let queue = short(&self.cancelled);
        let sent = channel.basic_publish("".into(), queue, mandatory, &[], question()).await?;
        // Only a queue that exists refuses a message.
        Ok(matches!(sent.await?, Confirmation::Ack(None) | Confirmation::Nack(None)))
    }

    /// Deletes all queues of the run, with what is in them.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn delete(&self, connection: &Connection) -> Result<(), AmqpError> {
        // The mark last: as long as it is there, the id is taken.
        delete(connection, &[&self.results, &self.cancelled, &self.taken, &self.id.mark]).await
    }
}

/// Deletes queues with what is in them, even those whose content the broker lost.
///
/// # Errors
/// What the broker said.
pub async fn delete(connection: &Connection, names: &[&str]) -> Result<(), AmqpError> {
    let channel = answer(connection.create_channel()).await?;
    for name in names {
        answer(channel.queue_delete(short(name), QueueDeleteOptions::default())).await?;
    }
    answer(channel.close(200, "done".into())).await
}

/// Declares a durable queue.
///
/// # Errors
/// What the broker said.
pub async fn declare(
    channel: &Channel,
    name: &str,
    arguments: FieldTable,
) -> Result<(), AmqpError> {
    let options = QueueDeclareOptions::durable();
    answer(channel.queue_declare(short(name), options, arguments)).await?;
    Ok(())
}

/// Declares a queue whose existence says something.
async fn say(channel: &Channel, name: &str) -> Result<(), AmqpError> {
    let mut arguments = kept();
    arguments.insert(short("x-expires"), AMQPValue::LongLongInt(SAYS));
    declare(channel, name, arguments).await
}

/// Arguments of a queue that loses nothing when a node does.
pub fn kept() -> FieldTable {
    let mut arguments = FieldTable::default();
    put(&mut arguments, "x-queue-type", "quorum");
    // Written out: from 4.0 on there is a limit of 20 unless another is declared, and a message is
    // requeued each time that somebody looks at it.
    arguments.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(1_000_000_000));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_two_runs_never_meet() {
        let queues = RunQueues::new("angler.jobs", "nightly", "4f1d09a3c2be");
        assert_eq!(queues.results, "angler.run.nightly@4f1d09a3c2be");
        assert_eq!(queues.cancelled, "angler.run.nightly@4f1d09a3c2be.cancelled");
        let names = IdQueues::new("angler.jobs", "nightly");
        assert_eq!(queues.id, names);
        assert_eq!(names.mark, "angler.run.nightly@mark");
        assert_eq!(names.sender, "angler.run.nightly@sender");
        // Whatever an id ends in, it has no `@`.
        let other = RunQueues::new("angler.jobs", "nightly.cancelled", "4f1d09a3c2be");
        assert_eq!(other.results, "angler.run.nightly.cancelled@4f1d09a3c2be");
        assert!(check_run("nightly@4f1d09a3c2be").is_err());
        assert_eq!(IdQueues::new("fleet-b", "n").mark, "fleet-b.run.n@mark");
    }

    #[test]
    fn ids_that_would_not_fit_or_not_print_are_refused() {
        for good in ["nightly", "2026-11-25T12.00/a_b", &"x".repeat(128)] {
            assert_eq!(check_run(good), Ok(()), "{good}");
        }
        for bad in ["", "a b", "ä", "a*", "a\n", "a@b", &"x".repeat(129)] {
            assert!(check_run(bad).is_err(), "{bad}");
        }
    }
}
