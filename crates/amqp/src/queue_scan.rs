//! A queue read from its oldest message on, without taking anything away.
//!
//! A pass acks only what it is told to remove. A quorum queue puts what is given back to its head, so
//! nothing is given back before the end of the pass: it would come again at once. What is not removed
//! stays unacked at the broker, which keeps some bytes per message; here it is a delivery tag. A pass
//! ends after as many messages as were there at its start, so that messages that arrive meanwhile do
//! not make it endless.
//!
//! Messages arrive in windows (`Window`), so that only one window of bodies is in memory, however
//! long the queue is.
//!
//! The broker closes a channel on which a message is unacked for longer than its `consumer_timeout`,
//! 30 minutes by default. A pass ends before that; what it has not come to is still in the queue.
//!
//! At its end it gives the messages back a few at a time, so that their order stays.
//!
//! Two at once would each see only what the other does not hold. So a pass takes its [`Turn`]. A
//! process that is killed in between loses nothing: the broker requeues what it had not acked.

mod window;

use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use lapin::{Channel, Connection};
use tokio::time::{Instant, sleep};

use super::ask::{answer, is_missing, look};
use super::turn::{Turn, TurnError};
use super::{AmqpError, AmqpOptions, close, connect};
use crate::queue_scan::window::Window;

/// How long a pass reads: the broker's default `consumer_timeout` less the time to give back what is
/// held.
const READING: Duration = Duration::from_secs(20 * 60);
/// How long to wait for the turn.
const TURN: Duration = Duration::from_secs(15);
/// Messages that one command gives back. A quorum queue forgets the order of more than 32 that come
/// back together (seen on 3.10, also when the channel is just closed).
const AT_ONCE: usize = 32;
/// Commands before the next wait for the queue. With more than 32 under way, the broker joins several
/// into one.
const COMMANDS: usize = 16;
/// How long to wait until the queue has what was given back.
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
    /// Messages that were delivered and not removed, in the queue's order.
    held: Vec<Held>,
    /// The window that delivers.
    window: Option<Window>,
    /// Windows so far.
    windows: u32,
    /// The largest body so far.
    largest: usize,
    until: Instant,
}

struct Held {
    tag: u64,
    /// The number of the window that it came in.
    window: u32,
}

impl Pass {
    /// Connects as `role`, waits for its turn and counts what is there.
    ///
    /// # Errors
    /// [`PassError`].
    pub async fn open(options: &AmqpOptions, role: &str, queue: &str) -> Result<Self, PassError> {
        let connection = connect(options, role).await?;
        match begin(&connection, queue).await {
            Ok((channel, unseen)) => Ok(Self {
                connection,
                channel,
                queue: queue.to_owned(),
                unseen,
                held: Vec::new(),
                window: None,
                windows: 0,
                largest: 0,
                until: Instant::now() + READING,
            }),
            Err(error) => {
                close(&connection).await;
                Err(error)
            }
        }
    }

    /// Ends the pass after this time from now on, instead of 20 minutes.
    #[must_use]
    pub fn within(mut self, time: Duration) -> Self {
        self.until = Instant::now() + time;
        self
    }

    /// The connection, for other questions.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next message; `None` at the end of the pass. It stays in the queue unless it is removed.
    ///
    /// # Errors
    /// What the broker said; everything that was not removed is still there.
    pub async fn next(&mut self) -> Result<Option<Delivery>, AmqpError> {
        if self.unseen == 0 {
            return Ok(None);
        }
        if Instant::now() >= self.until {
            tracing::warn!(
                queue = self.queue,
                not_looked_at = self.unseen,
                "stopped reading before the broker's consumer_timeout; run the command again for the rest"
            );
            return Ok(None);
        }
        let Some(delivery) = self.window().await?.next().await? else {
            self.unseen = 0; // Another client took messages.
            return Ok(None);
        };
        self.unseen -= 1;
        self.largest = self.largest.max(delivery.data.len());
        self.held.push(Held { tag: delivery.delivery_tag, window: self.windows });
        Ok(Some(delivery))
    }

    /// The window that delivers, or a new one if that is full.
    async fn window(&mut self) -> Result<&mut Window, AmqpError> {
        match self.window.take() {
            Some(window) if !window.is_full() => Ok(self.window.insert(window)),
            full => {
                self.end(full).await?;
                let largest = (self.windows > 0).then_some(self.largest);
                let window = Window::open(&self.channel, &self.queue, largest).await?;
                self.windows += 1;
                Ok(self.window.insert(window))
            }
        }
    }

    /// Ends a window. Nothing of it is delivered afterwards.
    async fn end(&mut self, window: Option<Window>) -> Result<(), AmqpError> {
        let Some(window) = window else { return Ok(()) };
        let not_read = window.close().await?;
        self.held.extend(not_read.into_iter().map(|tag| Held { tag, window: self.windows }));
        Ok(())
    }

    /// Messages that the pass has not come to.
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
        let Some(at) = self.held.iter().rposition(|held| held.tag == tag) else { return Ok(()) };
        let removed = self.held.remove(at);
        if let Some(window) = self.window.as_mut().filter(|_| removed.window == self.windows) {
            window.make_room();
        }
        Ok(())
    }

    /// Gives back everything that was not removed, and ends the turn.
    ///
    /// # Errors
    /// If the broker did not say that it has what was acked and given back: what was removed may be
    /// there again.
    pub async fn close(mut self) -> Result<(), AmqpError> {
        let ended = self.give_back().await;
        close(&self.connection).await;
        ended
    }

    async fn give_back(&mut self) -> Result<(), AmqpError> {
        let window = self.window.take();
        self.end(window).await?;
        let all_before = BasicNackOptions { multiple: true, requeue: true };
        let mut expected = look(&self.channel, &self.queue).await?.ready;
        let mut waiting = true;
        // The broker sorts what it gets back by consumer first.
        let windows = self.held.chunk_by(|a, b| a.window == b.window);
        let parts: Vec<&[Held]> = windows.flat_map(|window| window.chunks(AT_ONCE)).collect();
        for commands in parts.chunks(COMMANDS) {
            for part in commands {
                let Some(last) = part.last() else { continue };
                answer(self.channel.basic_nack(last.tag, all_before)).await?;
                expected += part.len() as u64;
            }
            // The queue takes them back in its own time, and the next reader must find them. Another
            // client may take them: then only the order suffers.
            waiting = waiting && self.has(expected).await?;
        }
        answer(self.channel.close(200, "done".into())).await
    }

    /// Waits until the queue has this many messages; `false` if it has not in time.
    async fn has(&self, expected: u64) -> Result<bool, AmqpError> {
        let end = Instant::now() + BACK;
        while look(&self.channel, &self.queue).await?.ready < expected {
            if Instant::now() >= end {
                return Ok(false);
            }
            sleep(Duration::from_millis(1)).await;
        }
        Ok(true)
    }
}

/// Waits for one's turn; yields the channel of the pass and how many messages are there.
async fn begin(connection: &Connection, queue: &str) -> Result<(Channel, u64), PassError> {
    let channel = answer(connection.create_channel()).await?;
    match look(&channel, queue).await {
        Err(error) if is_missing(&error, queue) => {
            return Err(PassError::NoQueue(queue.to_owned()));
        }
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
