//! Dead letters: jobs given up on, looked at without being taken away, and sent again or removed.
//!
//! A pass ([`DeadLetters`]) gets one message after another and acks only what it is told to remove.
//! A quorum queue puts what is given back to its head, so nothing is given back before the end of
//! the pass: it would come again at once. What is not chosen stays unacked at the broker, of which
//! it keeps a few bytes a message, and its body is dropped here. A pass ends after as many messages
//! as were there at its start, so that jobs that die again meanwhile do not make it endless.
//!
//! At its end it gives them back a few at a time, so that their order stays.
//!
//! Two people at once would each see only what the other does not hold. So a pass takes its turn: a
//! queue named after the dead one, exclusive to its connection, which the broker deletes with it.
//! Whoever is killed in between loses nothing, since the broker gives back what was unacked.

mod letter;

use std::time::Duration;

use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use tokio::time::{Instant, sleep, timeout};

pub use self::letter::DeadLetter;
use super::publisher::{Published, Publisher};
use super::{AmqpError, AmqpOptions, close, connect, put, refused, short};

/// Messages that a pass holds unacked at most. The broker keeps a record of each, and one `get` a
/// message takes a millisecond or two: the pass stays far below the broker's `consumer_timeout`.
const WINDOW: usize = 100_000;
/// What the broker may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long to wait for one's turn, and between two looks.
const TURN: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(100);
/// Messages that are given back at once. A quorum queue forgets the order of more than 32 that come
/// back together (seen on 3.10, also when the channel is just closed).
const AT_ONCE: usize = 16;
/// How long to wait until they are there.
const BACK: Duration = Duration::from_secs(5);
/// What publishing one job may take, reconnecting included.
const PUBLISH: Duration = Duration::from_secs(30);

/// What keeps dead letters from being read or sent again. None of them loses a message.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// The broker cannot be reached, or said no.
    #[error(transparent)]
    Amqp(#[from] AmqpError),
    /// Nothing has declared the queue.
    #[error(
        "there is no queue {0} on this virtual host: no worker has run here yet, or amqp.dead_queue is another"
    )]
    NoQueue(String),
    /// Another pass goes on.
    #[error("somebody else reads {queue} and was not done within {seconds} s: try again later")]
    Busy {
        /// The dead letters' queue.
        queue: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The jobs queue takes nothing.
    #[error("job {job} was not sent again and stays where it is: {reason}")]
    NotPublished {
        /// The job's id.
        job: String,
        /// Why.
        reason: String,
    },
}

/// Which dead letters are meant. Several values of one kind are alternatives; kinds add up.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Reasons, as in `angler-reason`.
    pub reasons: Vec<String>,
    /// Ids of bulk runs.
    pub runs: Vec<String>,
    /// Job ids.
    pub jobs: Vec<String>,
}

impl Filter {
    /// Whether it means every dead letter.
    pub fn is_empty(&self) -> bool {
        self.reasons.is_empty() && self.runs.is_empty() && self.jobs.is_empty()
    }

    /// Whether it means this one.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let among = |wanted: &[String], found: Option<&str>| {
            wanted.is_empty() || found.is_some_and(|found| wanted.iter().any(|w| w == found))
        };
        among(&self.reasons, Some(&letter.reason))
            && among(&self.runs, letter.run.as_deref())
            && among(&self.jobs, Some(&letter.job))
    }
}

/// One pass over the dead letters, from the oldest on.
pub struct DeadLetters {
    connection: Connection,
    channel: Channel,
    queue: String,
    /// Messages that were there at the start and have not been seen yet.
    unseen: u64,
    /// Delivery tags of those that were seen and are to be given back, in the queue's order.
    held: Vec<u64>,
}

impl DeadLetters {
    /// Connects, waits for its turn and counts what is there.
    ///
    /// # Errors
    /// [`DeadError`].
    pub async fn open(options: &AmqpOptions, queue: &str) -> Result<Self, DeadError> {
        let connection = connect(options, "dead").await?;
        match begin(&connection, queue).await {
            Ok((channel, unseen)) => {
                Ok(Self { connection, channel, queue: queue.to_owned(), unseen, held: Vec::new() })
            }
            Err(error) => {
                close(&connection).await;
                Err(error)
            }
        }
    }

    /// The next one; none at the end of the pass. It stays in the queue unless it is removed.
    ///
    /// # Errors
    /// [`DeadError`]; everything that was not removed is still there.
    pub async fn next(&mut self) -> Result<Option<DeadLetter>, DeadError> {
        if self.unseen == 0 || self.held.len() >= WINDOW {
            return Ok(None);
        }
        let by_hand = BasicGetOptions { no_ack: false };
        let got = answer(self.channel.basic_get(short(&self.queue), by_hand)).await?;
        let Some(message) = got else {
            self.unseen = 0; // Somebody took messages by other means.
            return Ok(None);
        };
        self.unseen -= 1;
        self.held.push(message.delivery.delivery_tag);
        Ok(Some(DeadLetter::read(message.delivery)))
    }

    /// Messages that the pass has not come to: those that [`WINDOW`] left out once it has ended.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }

    /// Removes it for good.
    ///
    /// # Errors
    /// [`DeadError`]; it is still there then.
    pub async fn remove(&mut self, letter: DeadLetter) -> Result<(), DeadError> {
        let only = BasicAckOptions { multiple: false };
        answer(self.channel.basic_ack(letter.tag, only)).await?;
        // Nearly always the last one.
        if let Some(at) = self.held.iter().rposition(|tag| *tag == letter.tag) {
            self.held.remove(at);
        }
        Ok(())
    }

    /// Sends it to the queue `jobs` as a new job, and removes it here once the broker has confirmed
    /// it there. If the connection breaks in between, the job is in both.
    ///
    /// # Errors
    /// [`DeadError`]; it is still here then.
    pub async fn redrive(
        &mut self,
        letter: DeadLetter,
        publisher: &Publisher,
        jobs: &str,
    ) -> Result<(), DeadError> {
        let properties = letter.properties_again();
        let publishing = publisher.publish(jobs, &properties, &letter.body);
        let failed = match timeout(PUBLISH, publishing).await {
            Ok(Published::Confirmed) => return self.remove(letter).await,
            Ok(Published::Unroutable) => format!("the queue {jobs} does not exist"),
            Err(_) => format!("{jobs} did not confirm it within {} s", PUBLISH.as_secs()),
        };
        Err(DeadError::NotPublished { job: letter.job, reason: failed })
    }

    /// Gives back everything that was not removed, and ends the turn.
    ///
    /// # Errors
    /// [`DeadError`] if the broker did not say that it has what was acked and given back: what was
    /// removed may be there again.
    pub async fn close(self) -> Result<(), DeadError> {
        let ended = self.give_back().await;
        close(&self.connection).await;
        Ok(ended?)
    }

    async fn give_back(&self) -> Result<(), AmqpError> {
        let all_before = BasicNackOptions { multiple: true, requeue: true };
        let mut given = 0;
        // The queue takes them back in its own time, and whoever has the next turn must find them.
        let mut waiting = true;
        for part in self.held.chunks(AT_ONCE) {
            let Some(last) = part.last() else { continue };
            answer(self.channel.basic_nack(*last, all_before)).await?;
            given += part.len() as u64;
            let end = Instant::now() + BACK;
            while waiting && ready(&self.channel, &self.queue).await? < given {
                // Somebody may take them by other means: then only the order suffers.
                waiting = Instant::now() < end;
                sleep(Duration::from_millis(1)).await;
            }
        }
        answer(self.channel.close(200, "done".into())).await
    }
}

/// Waits for one's turn; yields the channel of the pass and how many messages are there.
async fn begin(connection: &Connection, queue: &str) -> Result<(Channel, u64), DeadError> {
    let channel = answer(connection.create_channel()).await?;
    match ready(&channel, queue).await {
        Err(AmqpError::Broker(error))
            if refused(&error).is_some_and(|r| r.0 == AMQPSoftError::NOTFOUND) =>
        {
            return Err(DeadError::NoQueue(queue.to_owned()));
        }
        counted => counted?,
    };
    let is_locked =
        |error: &lapin::Error| refused(error).is_some_and(|r| r.0 == AMQPSoftError::RESOURCELOCKED);
    let turn = format!("{queue}.reader");
    let end = Instant::now() + TURN;
    loop {
        // A refusal closes the channel, so each try has its own.
        let trying = answer(connection.create_channel()).await?;
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        put(&mut arguments, "x-queue-type", "classic"); // Others cannot be exclusive.
        match answer(trying.queue_declare(short(&turn), exclusive, arguments)).await {
            Ok(_) => break,
            Err(AmqpError::Broker(error)) if is_locked(&error) && Instant::now() < end => {}
            Err(AmqpError::Broker(error)) if is_locked(&error) => {
                let (queue, seconds) = (queue.to_owned(), TURN.as_secs());
                return Err(DeadError::Busy { queue, seconds });
            }
            Err(error) => return Err(error.into()),
        }
        sleep(LOOK).await;
    }
    let unseen = ready(&channel, queue).await?;
    Ok((channel, unseen))
}

/// Messages of the queue that nobody holds.
async fn ready(channel: &Channel, queue: &str) -> Result<u64, AmqpError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(short(queue), passive, FieldTable::default());
    Ok(answer(declared).await?.message_count().into())
}

async fn answer<T>(call: impl Future<Output = Result<T, lapin::Error>>) -> Result<T, AmqpError> {
    let silent = AmqpError::Silent(ANSWER.as_secs());
    timeout(ANSWER, call).await.map_err(|_| silent)?.map_err(AmqpError::from)
}
