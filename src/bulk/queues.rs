//! What the broker keeps of a run.
//!
//! * `<base>.run.<id>`: its results, which its jobs name as `reply_to`, until they are collected.
//! * `<base>.run.<id>.sent`: the last job that was sent, and no other: it keeps one message. Each job
//!   is published once and routed to both queues by the broker (header `BCC`, an extension of
//!   RabbitMQ's), in the order of one channel. So what is found here is exactly how far the run came,
//!   wherever its enqueuing was ended.
//! * `<base>.run.<id>.cancelled`: empty. The run is cancelled if it is there.
//!
//! The base is the first queue of jobs without `.jobs`, whichever queue the jobs go to.

use lapin::options::{
    BasicGetOptions, BasicNackOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Confirmation, Connection};

use crate::amqp::ask::{Queue, answer, is_missing, look_at, question};
use crate::amqp::{AmqpError, put, short};
use crate::job::Run;

/// Header of a run's jobs: the digest of its images and of how they are sent.
pub const DIGEST: &str = "angler-run-digest";

/// The longest id of a run: with it a queue's name keeps to 255 bytes, and a job's id, the run's with
/// its number behind it, to 200 characters.
pub const MAX_RUN_BYTES: usize = 128;

/// How long a mark of cancelling is kept while nobody looks at it. By then its jobs are gone.
const MARK: i64 = 7 * 24 * 3600 * 1000; // ms

/// Checks a run's id: 1 to 128 of letters, digits, `.`, `_`, `-` and `/`.
///
/// # Errors
/// A sentence that says what it may consist of.
pub fn check_run(id: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if (1..=MAX_RUN_BYTES).contains(&id.len()) && id.chars().all(allowed) {
        return Ok(());
    }
    let shown: String = id.chars().take(80).collect();
    Err(format!(
        "{shown:?} cannot be a run's id: 1 to {MAX_RUN_BYTES} of letters, digits, '.', '_', '-' and '/'"
    ))
}

/// What a fleet's other queues are named after: its first queue of jobs.
pub(super) fn base(jobs: &str) -> &str {
    jobs.strip_suffix(".jobs").unwrap_or(jobs)
}

/// The names of a run's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunQueues {
    /// Results.
    pub results: String,
    /// The last job that was sent.
    pub sent: String,
    /// There if the run is cancelled.
    pub cancelled: String,
}

/// How far a run came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The last job that was sent.
    pub run: Run,
    /// As [`DIGEST`] says.
    pub digest: String,
}

impl RunQueues {
    /// Those of a run of the fleet whose first queue of jobs is `jobs`.
    pub fn new(jobs: &str, run: &str) -> Self {
        let results = format!("{}.run.{run}", base(jobs));
        let (sent, cancelled) = (format!("{results}.sent"), format!("{results}.cancelled"));
        Self { results, sent, cancelled }
    }

    /// Declares those of results and of what was sent.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn declare(&self, channel: &Channel) -> Result<(), AmqpError> {
        let mut results = FieldTable::default();
        put(&mut results, "x-queue-type", "quorum");
        // Written out: from 4.0 on there is a limit of 20 unless another is declared, and a result
        // is given back each time that its collecting is ended.
        results.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(1_000_000_000));
        declare(channel, &self.results, results).await?;
        declare(channel, &self.sent, only_one()).await
    }

    /// How far the run came; none if no job was sent. Looks and takes nothing.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn sent(&self, connection: &Connection) -> Result<Option<Sent>, AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        let by_hand = BasicGetOptions { no_ack: false };
        let got = match answer(channel.basic_get(short(&self.sent), by_hand)).await {
            Err(error) if is_missing(&error) => return Ok(None),
            got => got?,
        };
        let Some(got) = got else { return Ok(None) };
        let delivery = got.delivery;
        let back = BasicNackOptions { requeue: true, multiple: false };
        answer(channel.basic_nack(delivery.delivery_tag, back)).await?;
        answer(channel.close(200, "done".into())).await?;
        #[derive(serde::Deserialize)]
        struct OnlyRun {
            run: Run,
        }
        let headers = delivery.properties.headers().as_ref();
        let digest = headers.and_then(|headers| crate::amqp::string_header(headers, DIGEST));
        let job: Option<OnlyRun> = serde_json::from_slice(&delivery.data).ok();
        Ok(job.map(|OnlyRun { run }| Sent { run, digest: digest.unwrap_or_default() }))
    }

    /// The results that wait; none if there is no such run.
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
        let mut arguments = only_one();
        arguments.insert(short("x-expires"), AMQPValue::LongLongInt(MARK));
        declare(&channel, &self.cancelled, arguments).await?;
        answer(channel.close(200, "done".into())).await
    }

    /// Whether the run is cancelled. `channel` confirms, and nothing else is in flight on it.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn is_cancelled(&self, channel: &Channel) -> Result<bool, AmqpError> {
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let queue = short(&self.cancelled);
        let asking = async {
            channel.basic_publish("".into(), queue, mandatory, &[], question()).await?.await
        };
        Ok(matches!(answer(asking).await?, Confirmation::Ack(None)))
    }

    /// Deletes all, with what is in them.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn delete(&self, connection: &Connection) -> Result<(), AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        // The results last: as long as they are there, the run is.
        for name in [&self.sent, &self.cancelled, &self.results] {
            answer(channel.queue_delete(short(name), QueueDeleteOptions::default())).await?;
        }
        answer(channel.close(200, "done".into())).await
    }
}

async fn declare(channel: &Channel, name: &str, arguments: FieldTable) -> Result<(), AmqpError> {
    let options = QueueDeclareOptions::durable();
    answer(channel.queue_declare(short(name), options, arguments)).await?;
    Ok(())
}

/// Arguments of a queue that keeps the last message alone.
fn only_one() -> FieldTable {
    let mut arguments = FieldTable::default();
    put(&mut arguments, "x-queue-type", "classic"); // A quorum queue drops its head later.
    arguments.insert(short("x-max-length"), AMQPValue::LongLongInt(1));
    put(&mut arguments, "x-overflow", "drop-head");
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_queues_are_named_after_the_jobs_queue_and_the_run() {
        let queues = RunQueues::new("angler.jobs", "nightly");
        assert_eq!(
            (&*queues.results, &*queues.sent, &*queues.cancelled),
            ("angler.run.nightly", "angler.run.nightly.sent", "angler.run.nightly.cancelled")
        );
        assert_eq!(RunQueues::new("fleet-b", "n").results, "fleet-b.run.n");
    }

    #[test]
    fn ids_that_would_not_fit_or_not_print_are_refused() {
        for good in ["nightly", "2026-11-25T12.00/a_b", &"x".repeat(128)] {
            assert_eq!(check_run(good), Ok(()), "{good}");
        }
        for bad in ["", "a b", "ä", "a*", "a\n", &"x".repeat(129)] {
            assert!(check_run(bad).is_err(), "{bad}");
        }
    }
}
