//! Turns at the broker: one connection at a time may do something.
//!
//! A turn is an exclusive queue. The broker deletes it with the connection that declared it, so
//! nobody has to clean up after a process that was killed. A connection that was cut without a word
//! keeps its turn until the broker misses its heartbeats.
//!
//! A turn excludes other connections, not other tasks on the same connection.

use std::time::Duration;

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use tokio::time::{Instant, sleep};

use super::ask::answer;
use super::{AmqpError, put, refused, short};

/// How often to look whether the turn is free.
const LOOK: Duration = Duration::from_millis(50);

/// Why a turn was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// Another connection kept it.
    #[error("another connection holds the turn {queue} and did not end it within {seconds} s")]
    Busy {
        /// The turn's queue.
        queue: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The broker cannot be asked.
    #[error(transparent)]
    Amqp(#[from] AmqpError),
}

/// A turn that is held. It ends with its connection, or by [`Turn::end`].
#[derive(Debug)]
pub struct Turn {
    channel: Channel,
    queue: String,
}

impl Turn {
    /// Takes the turn of the name `queue`, and waits up to `patience` for another connection to end it.
    ///
    /// # Errors
    /// [`TurnError`].
    pub async fn take(
        connection: &Connection,
        queue: &str,
        patience: Duration,
    ) -> Result<Self, TurnError> {
        let end = Instant::now() + patience;
        let mut is_waiting = false;
        loop {
            if let Some(channel) = declare(connection, queue).await? {
                return Ok(Self { channel, queue: queue.to_owned() });
            }
            if Instant::now() >= end {
                let (queue, seconds) = (queue.to_owned(), patience.as_secs());
                return Err(TurnError::Busy { queue, seconds });
            }
            if !is_waiting {
                is_waiting = true;
                tracing::debug!(queue, "waiting for the turn, which another connection holds");
            }
            sleep(LOOK).await;
        }
    }

    /// Lets another connection take the turn.
    ///
    /// # Errors
    /// What the broker said.
    pub async fn end(self) -> Result<(), AmqpError> {
        let deleting = self.channel.queue_delete(short(&self.queue), QueueDeleteOptions::default());
        answer(deleting).await?;
        answer(self.channel.close(200, "done".into())).await
    }
}

/// Declares the turn's queue; `None` if another connection has it.
async fn declare(connection: &Connection, queue: &str) -> Result<Option<Channel>, AmqpError> {
    // A refusal closes the channel, so each try has its own.
    let channel = answer(connection.create_channel()).await?;
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    put(&mut arguments, "x-queue-type", "classic"); // Others cannot be exclusive.
    match answer(channel.queue_declare(short(queue), exclusive, arguments)).await {
        Ok(_) => Ok(Some(channel)),
        Err(AmqpError::Broker(error)) if is_locked(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `true` if another connection has the turn that was asked for.
pub(crate) fn is_locked(error: &lapin::Error) -> bool {
    refused(error).is_some_and(|(kind, _)| kind == AMQPSoftError::RESOURCELOCKED)
}
