//! A queue read from its oldest message on, without taking anything away.
//!
//! A pass gets one message after another and acks only what it is told to remove. A quorum queue puts
//! what is given back to its head, so nothing is given back before the end of the pass: it would come
//! again at once. What is not chosen stays unacked at the broker, of which it keeps a few bytes a
//! message, and its body is dropped here. A pass ends after as many messages as were there at its
//! start, so that messages that come meanwhile do not make it endless.
//!
//! At its end it gives them back a few at a time, so that their order stays.
//!
//! Two at once would each see only what the other does not hold. So a pass takes its [`Turn`]. A
//! process that is killed in between loses nothing: the broker requeues what it had not acked.

use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::{Channel, Connection};
use tokio::time::{Instant, sleep};

use super::ask::{answer, is_missing, look};
use super::turn::{Turn, TurnError};
use super::{AmqpError, AmqpOptions, close, connect, short};

/// Messages that a pass holds unacked at most. The broker keeps a record of each, and one `get` a
/// message takes a millisecond or two: the pass stays far below the broker's `consumer_timeout`.
const WINDOW: usize = 100_000;
/// How long to wait for the turn.
const TURN: Duration = Duration::from_secs(15);
/// Messages that are given back at once. A quorum queue forgets the order of more than 32 that come
/// back together (seen on 3.10, also when the channel is just closed).
const AT_ONCE: usize = 16;
/// How long to wait until they are there.
const BACK: Duration = Duration::from_secs(5);

/// What keeps a queue from being read. None of it loses a message.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The broker cannot be reached, or said no.
    #[error(transparent)]
    Amqp(#[from] AmqpError),
    /// Nothing has declared the queue.
    #[error("there is no queue {0} on this virtual host")]
    NoQueue(String),
    /// Another pass goes on.
    #[error("somebody else reads {queue} and was not done within {seconds} s: try again later")]
    Busy {
        /// The queue.
        queue: String,
        /// How long was waited.
        seconds: u64,
    },
}

/// One pass over a queue.
pub struct Pass {
    connection: Connection,
    channel: Channel,
    queue: String,
    /// Messages that were there at the start and have not been seen yet.
    unseen: u64,
    /// Delivery tags of those that were seen and are to be given back, in the queue's order.
    held: Vec<u64>,
}

impl Pass {
    /// Connects as `role`, waits for its turn and counts what is there.
    ///
    /// # Errors
    /// [`PassError`].
    pub async fn open(options: &AmqpOptions, role: &str, queue: &str) -> Result<Self, PassError> {
        let connection = connect(options, role).await?;
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

    /// The connection, for other questions.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next message; none at the end of the pass. It stays in the queue unless it is removed.
    ///
    /// # Errors
    /// What the broker said; everything that was not removed is still there.
    pub async fn next(&mut self) -> Result<Option<Delivery>, AmqpError> {
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
        Ok(Some(message.delivery))
    }

    /// Messages that the pass has not come to: those that [`WINDOW`] left out once it has ended.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }

    /// Removes the message with this delivery tag for good.
    ///
    /// # Errors
    /// What the broker said; it is still there then.
    pub async fn remove(&mut self, tag: u64) -> Result<(), AmqpError> {
        let only = BasicAckOptions { multiple: false };
        answer(self.channel.basic_ack(tag, only)).await?;
        // Nearly always the last one.
        if let Some(at) = self.held.iter().rposition(|held| *held == tag) {
            self.held.remove(at);
        }
        Ok(())
    }

    /// Gives back everything that was not removed, and ends the turn.
    ///
    /// # Errors
    /// If the broker did not say that it has what was acked and given back: what was removed may be
    /// there again.
    pub async fn close(self) -> Result<(), AmqpError> {
        let ended = self.give_back().await;
        close(&self.connection).await;
        ended
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
            while waiting && look(&self.channel, &self.queue).await?.ready < given {
                // Somebody may take them by other means: then only the order suffers.
                waiting = Instant::now() < end;
                sleep(Duration::from_millis(1)).await;
            }
        }
        answer(self.channel.close(200, "done".into())).await
    }
}

/// Waits for one's turn; yields the channel of the pass and how many messages are there.
async fn begin(connection: &Connection, queue: &str) -> Result<(Channel, u64), PassError> {
    let channel = answer(connection.create_channel()).await?;
    match look(&channel, queue).await {
        Err(error) if is_missing(&error) => return Err(PassError::NoQueue(queue.to_owned())),
        looked => looked?,
    };
    // Held until the connection ends.
    match Turn::take(connection, &format!("{queue}.reader"), TURN).await {
        Err(TurnError::Busy { seconds, .. }) => {
            return Err(PassError::Busy { queue: queue.to_owned(), seconds });
        }
        Err(TurnError::Amqp(error)) => return Err(error.into()),
        Ok(_) => {}
    }
    let unseen = look(&channel, queue).await?.ready;
    Ok((channel, unseen))
}
