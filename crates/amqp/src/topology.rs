//! The queues, and why each of their arguments is as it is.
//!
//! Everything is declared at the start of a worker and by whoever publishes first; declaring is
//! idempotent. All of it works on RabbitMQ 3.10 and on 4.x.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

use super::ask::{answer, is_missing, look_at};
use super::{AmqpError, put, refused, short};

/// How many deliveries of a job may come back before the broker gives the job up.
///
/// The last resort: workers set a job apart much earlier. Connections that break and jobs that are handed
/// back count as well, so a low limit would take innocent jobs. Before 4.0 quorum queues have no limit
/// unless one is declared, from 4.0 on they have one of 20.
const DELIVERY_LIMIT: i64 = 100;

/// The same for the queues that keep messages: never.
///
/// From 4.0 on a quorum queue without a limit has one of 20 and drops what reaches it. Whoever looks
/// at a message and gives it back is counted, so listing the dead letters 20 times would delete
/// them. Written out, because -1, which is how 4.0 says "none", makes 3.10 drop a message when it
/// comes back for the first time.
const NEVER: i64 = 1_000_000_000;

/// The names in `[amqp]`, and the delays that need a retry queue.
#[derive(Debug, Clone)]
pub struct Topology {
    /// Work.
    pub jobs: String,
    /// Results of jobs without `reply_to`.
    pub results: String,
    /// Jobs given up on.
    pub dead: String,
    /// Announcements of new active versions.
    pub control_exchange: String,
    /// One retry queue each.
    pub retry_delays: Vec<Duration>,
}

impl Topology {
    /// The retry queue of a delay. It is named after the jobs queue, because it leads back there:
    /// two fleets on one broker must not share one.
    pub fn retry_queue(&self, delay: Duration) -> String {
        let delay = humantime::format_duration(delay).to_string().replace(' ', "");
        format!("{}.retry.{delay}", self.base())
    }

    /// Where jobs wait that workers held when they died. Named after the jobs queue, as the retry queues
    /// are.
    pub fn suspects_queue(&self) -> String {
        format!("{}.suspects", self.base())
    }

    /// Where the broker moves jobs that it gives up. Workers publish their results, and move them to the
    /// dead letters.
    pub fn undeliverable_queue(&self) -> String {
        format!("{}.undeliverable", self.base())
    }

    /// The turn to run suspects, which one worker of the fleet has.
    pub(crate) fn suspects_turn(&self) -> String {
        format!("{}.turn", self.suspects_queue())
    }

    fn base(&self) -> &str {
        self.jobs.strip_suffix(".jobs").unwrap_or(&self.jobs)
    }

    /// Every queue with the arguments that it is declared with, those that others lead to first.
    pub(super) fn queues(&self) -> Vec<(String, FieldTable)> {
        let dead_letters_to = |target: &str| {
            let mut arguments = quorum();
            // The default exchange routes by queue name.
            put(&mut arguments, "x-dead-letter-exchange", "");
            put(&mut arguments, "x-dead-letter-routing-key", target);
            // At-most-once, the default, loses a message when the broker fails in between;
            // at-least-once demands that a full queue refuses rather than drops.
            put(&mut arguments, "x-dead-letter-strategy", "at-least-once");
            put(&mut arguments, "x-overflow", "reject-publish");
            arguments
        };
        // The dead queue first: a missing dead-letter target is retried only after minutes.
        let mut queues = vec![(self.dead.clone(), quorum()), (self.results.clone(), quorum())];
        let undeliverable = self.undeliverable_queue();
        queues.push((undeliverable.clone(), dead_letters_to(&self.dead)));
        let mut jobs = dead_letters_to(&undeliverable);
        jobs.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(DELIVERY_LIMIT));
        queues.push((self.jobs.clone(), jobs.clone()));
        queues.push((self.suspects_queue(), jobs));
        let mut delays = self.retry_delays.clone();
        delays.sort();
        delays.dedup();
        for delay in delays {
            let mut retry = dead_letters_to(&self.jobs);
            let millis = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            retry.insert(short("x-message-ttl"), AMQPValue::LongLongInt(millis));
            queues.push((self.retry_queue(delay), retry));
        }
        queues
    }

    /// The names of all queues.
    pub fn queue_names(&self) -> Vec<String> {
        self.queues().into_iter().map(|(name, _)| name).collect()
    }

    /// Declares everything. Returns a sentence for each queue that exists and was not declared as
    /// wanted: with other arguments, or because the user may not declare it. Such a queue is used
    /// unchanged.
    ///
    /// # Errors
    /// [`AmqpError::Undeclared`] if something is missing and the user may not declare it; everything
    /// else is declared then. Any other error of the broker's.
    pub async fn declare(&self, connection: &Connection) -> Result<Vec<String>, AmqpError> {
        let mut notes = Vec::new();
        let mut missing: Vec<String> = Vec::new();
        let mut refusal = String::new();
        for (name, arguments) in self.queues() {
            // A refusal closes the channel, so each declaration has its own.
            let channel = answer(connection.create_channel()).await?;
            let durable = QueueDeclareOptions::durable();
            let declaring = channel.queue_declare(short(&name), durable, arguments);
            let Err(error) = answer(declaring).await else { continue };
            match unwanted(&name, error)? {
                Unwanted::Different(note) => notes.push(note),
                Unwanted::Forbidden(words) => match look_at(connection, &name).await? {
                    Some(_) => notes.push(unchanged(&name, &words)),
                    None if name == self.undeliverable_queue() => {
                        notes.push(without_results(&name, &words));
                    }
                    None => {
                        missing.push(name);
                        refusal = words;
                    }
                },
            }
        }
        match self.ensure_control(connection).await {
            Ok(note) => notes.extend(note),
            Err(AmqpError::Undeclared { names, refusal: words }) => {
                missing.push(names);
                refusal = words;
            }
            Err(error) => return Err(error),
        }
        match missing.is_empty() {
            true => Ok(notes),
            false => Err(AmqpError::Undeclared { names: missing.join(", "), refusal }),
        }
    }

    /// Declares the control exchange. Returns a sentence if it exists and is another, or if the user
    /// may not declare it; it is used unchanged.
    ///
    /// # Errors
    /// As [`Self::declare`].
    pub async fn ensure_control(
        &self,
        connection: &Connection,
    ) -> Result<Option<String>, AmqpError> {
        let channel = answer(connection.create_channel()).await?;
        let Err(error) = answer(self.declare_control(&channel)).await else { return Ok(None) };
        let name = &self.control_exchange;
        let words = match unwanted(name, error)? {
            Unwanted::Different(note) => return Ok(Some(note)),
            Unwanted::Forbidden(words) => words,
        };
        let channel = answer(connection.create_channel()).await?;
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let (kind, none) = (ExchangeKind::Fanout, FieldTable::default());
        match answer(channel.exchange_declare(short(name), kind, passive, none)).await {
            Ok(()) => Ok(Some(unchanged(name, &words))),
            Err(error) if is_missing(&error, name) => {
                Err(AmqpError::Undeclared { names: name.clone(), refusal: words })
            }
            Err(error) => Err(error),
        }
    }

    /// Declares the control exchange.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn declare_control(&self, channel: &Channel) -> Result<(), lapin::Error> {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(
                short(&self.control_exchange),
                ExchangeKind::Fanout,
                durable,
                FieldTable::default(),
            )
            .await
    }
}

/// Replicated, durable, and settled by a majority: the only kind that survives the loss of a node.
/// It keeps what is looked at and given back.
fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    put(&mut arguments, "x-queue-type", "quorum");
    arguments.insert(short("x-delivery-limit"), AMQPValue::LongLongInt(NEVER));
    arguments
}

/// Why a queue or an exchange could not be declared, while the connection lives.
enum Unwanted {
    /// It exists with other arguments, as this sentence says.
    Different(String),
    /// The user may not declare it, in the broker's words. Whether it exists is not known.
    Forbidden(String),
}

/// Reads why a declaration was refused. Any other error is passed on.
fn unwanted(name: &str, error: AmqpError) -> Result<Unwanted, AmqpError> {
    let AmqpError::Broker(broker) = &error else { return Err(error) };
    match refused(broker) {
        Some((AMQPSoftError::PRECONDITIONFAILED, words)) => Ok(Unwanted::Different(format!(
            "{name} exists with other arguments and is used unchanged: {words}"
        ))),
        Some((AMQPSoftError::ACCESSREFUSED, words)) => Ok(Unwanted::Forbidden(words.to_owned())),
        _ => Err(error),
    }
}

/// The sentence for a missing queue of jobs that the broker gives up: the others work without it.
fn without_results(name: &str, words: &str) -> String {
    format!(
        "there is no {name}, and this user may not declare it: jobs that the broker gives up have no result ({words})"
    )
}

fn unchanged(name: &str, words: &str) -> String {
    format!("{name} exists and is used unchanged; this user may not declare it: {words}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_queues_are_named_after_their_jobs_queue_and_delay() {
        let topology = |jobs: &str| Topology {
            jobs: jobs.into(),
            results: "r".into(),
            dead: "d".into(),
            control_exchange: "c".into(),
            retry_delays: vec![],
        };
        let name = |jobs, millis| topology(jobs).retry_queue(Duration::from_millis(millis));
        assert_eq!(name("angler.jobs", 5_000), "angler.retry.5s");
        assert_eq!(name("angler.jobs", 300_000), "angler.retry.5m");
        assert_eq!(name("angler.jobs", 90_500), "angler.retry.1m30s500ms");
        assert_eq!(name("fleet-b", 5_000), "fleet-b.retry.5s");
    }
}
