//! What the broker keeps of a run.
//!
//! * `<base>.run.<id>`: its results, which its jobs name as `reply_to`, until they are collected.
//! * `<base>.run.<id>.sent`: the last job that was sent, and no other: it keeps one message. Each job
//!   is published once and routed to both queues by the broker (header `BCC`, an extension of
//!   RabbitMQ's), in the order of one channel. So what is found here is exactly how far the run came,
//!   wherever its enqueuing was ended.

use std::time::Duration;

use lapin::options::{BasicGetOptions, BasicNackOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};
use tokio::time::timeout;

use crate::amqp::{AmqpError, put, refused, short};
use crate::job::Run;

/// Header of a run's jobs: the digest of its images and of how they are sent.
pub const DIGEST: &str = "angler-run-digest";

/// What the broker may take to answer.
const ANSWER: Duration = Duration::from_secs(15);

/// The longest id of a run: with it a queue's name keeps to 255 bytes, and a job's id, the run's with
/// its number behind it, to 200 characters.
pub const MAX_RUN_BYTES: usize = 128;

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

/// The names of a run's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunQueues {
    /// Results.
    pub results: String,
    /// The last job that was sent.
    pub sent: String,
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
    /// Those of a run whose jobs go to the queue `jobs`.
    pub fn new(jobs: &str, run: &str) -> Self {
        let base = jobs.strip_suffix(".jobs").unwrap_or(jobs);
        let results = format!("{base}.run.{run}");
        Self { sent: format!("{results}.sent"), results }
    }

    /// Declares both.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn declare(&self, channel: &Channel) -> Result<(), AmqpError> {
        let mut results = FieldTable::default();
        put(&mut results, "x-queue-type", "quorum");
        // Written out: from 4.0 on there is a limit of 20 unless another is declared, and a result
        // is given back each time that its collecting is ended.
        results.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(1_000_000_000));
        let mut sent = FieldTable::default();
        put(&mut sent, "x-queue-type", "classic"); // A quorum queue drops its head later.
        sent.insert(short("x-max-length"), AMQPValue::LongLongInt(1));
        put(&mut sent, "x-overflow", "drop-head");
        for (name, arguments) in [(&self.results, results), (&self.sent, sent)] {
            let options = QueueDeclareOptions::durable();
            answer(channel.queue_declare(short(name), options, arguments)).await?;
        }
        Ok(())
    }

    /// How far the run came; none if no job was sent. Looks and takes nothing.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn sent(&self, connection: &Connection) -> Result<Option<Sent>, AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        let by_hand = BasicGetOptions { no_ack: false };
        let got = match answer(channel.basic_get(short(&self.sent), by_hand)).await {
            Err(AmqpError::Broker(error))
                if refused(&error).is_some_and(|r| r.0 == AMQPSoftError::NOTFOUND) =>
            {
                return Ok(None);
            }
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

    /// How many results wait; none if there is no such queue.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn waiting(&self, connection: &Connection) -> Result<Option<u64>, AmqpError> {
        ready(connection, &self.results).await
    }

    /// Deletes both, with what is in them.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn delete(&self, connection: &Connection) -> Result<(), AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        // The results last: as long as they are there, the run is.
        for name in [&self.sent, &self.results] {
            answer(channel.queue_delete(short(name), QueueDeleteOptions::default())).await?;
        }
        answer(channel.close(200, "done".into())).await
    }
}

/// Messages in a queue that nobody holds; none if there is no such queue.
///
/// # Errors
/// What the broker said.
pub async fn ready(connection: &Connection, queue: &str) -> Result<Option<u64>, AmqpError> {
    // A refusal closes the channel, so each question has its own.
    let channel = answer(connection.create_channel()).await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match answer(channel.queue_declare(short(queue), passive, FieldTable::default())).await {
        Ok(queue) => {
            answer(channel.close(200, "done".into())).await?;
            Ok(Some(queue.message_count().into()))
        }
        Err(AmqpError::Broker(error))
            if refused(&error).is_some_and(|r| r.0 == AMQPSoftError::NOTFOUND) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

pub(super) async fn answer<T>(
    call: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, AmqpError> {
    let silent = AmqpError::Silent(ANSWER.as_secs());
    timeout(ANSWER, call).await.map_err(|_| silent)?.map_err(AmqpError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_queues_are_named_after_the_jobs_queue_and_the_run() {
        let queues = RunQueues::new("angler.jobs", "nightly");
        assert_eq!(
            (&*queues.results, &*queues.sent),
            ("angler.run.nightly", "angler.run.nightly.sent")
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
