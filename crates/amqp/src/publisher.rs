//! Publishing with confirms, over one connection that is replaced when it is lost.
//!
//! A broker that runs out of memory or disk blocks publishers. The publisher waits for that to end,
//! however long it takes, on the same connection.
//!
//! Every message is mandatory: without that flag RabbitMQ acks and drops what no queue takes. Only a
//! direct reply is not, because RabbitMQ returns it even when it delivers it.
//!
//! Confirms are pipelined: each caller waits for its own, all at once. Each message in flight has a
//! channel to itself, though. A message that comes back unroutable bears no delivery tag, and lapin
//! hands it to whichever confirm arrives next, so that on a shared channel a message that nobody has
//! counts as confirmed. Also lapin counts tags and sends frames in two steps, which two publishers
//! may take in different orders. A channel with one message has neither problem.
//!
//! What befalls the connection is waited for; what the broker says of one message is an answer. A
//! message for a queue of the worker's own is then sent again until it is confirmed, since nothing
//! may be lost. A message for another's queue is the caller's to give up ([`Publisher::offer`]).

mod answers;
mod blocked;
mod channels;
mod missing;
mod waiting;

use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Channel, Connection};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use self::answers::Failed;
use self::blocked::Blocked;
use self::channels::{Lease, State};
use self::missing::Missing;
use self::waiting::Waiting;
use angler_wire::text::chain;

use super::ask::{is_missing, look, question};
use super::topology::Topology;
use super::{AmqpError, AmqpOptions, Backoff, connect, is_direct_reply, short};

/// How long a confirm may take before the message is sent again on another channel.
const CONFIRM: Duration = Duration::from_secs(30);

/// How long a question may take.
const ASK: Duration = Duration::from_secs(2);

/// How often missing queues are declared again, at most.
const REDECLARE: Duration = Duration::from_secs(2);

/// How long declaring all queues again may take.
const DECLARE: Duration = Duration::from_secs(15);

/// How often [`Publisher::follow`] looks.
const LOOK: Duration = Duration::from_secs(1);

/// Messages in flight, and so channels, at most. Brokers allow 2,047 channels per connection unless
/// they are told otherwise, and a confirm takes milliseconds: more would gain nothing.
const IN_FLIGHT: usize = 64;

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// A queue has it.
    Confirmed,
    /// There is no such queue; nobody has it.
    Unroutable,
    /// No queue of this broker accepts it; nobody has it.
    TooLarge(TooLarge),
}

/// A message is above the broker's `max_message_size`. No further attempt can succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TooLarge(pub String);

/// Why a queue did not accept a message this time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

/// Why a message for a queue of the worker's own was given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unpublished {
    /// No further attempt can succeed.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The queue refused it for as long as the caller was willing to wait, or is missing.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Publishes until the broker confirms. Clones of its `Arc` share one connection.
pub struct Publisher {
    options: AmqpOptions,
    /// What it declares on each connection.
    topologies: Vec<Topology>,
    state: Mutex<State>,
    in_flight: Semaphore,
    /// Why the broker takes nothing for now.
    blocked: Blocked,
    /// Why there is no connection.
    unreachable: StdMutex<Option<String>>,
    missing: Missing,
    waiting: Waiting,
}

/// A message and where it goes.
#[derive(Clone, Copy)]
struct Outgoing<'a> {
    queue: &'a str,
    properties: &'a BasicProperties,
    body: &'a [u8],
}

impl Publisher {
    /// Creates a publisher that connects when it is first needed, and declares what it publishes to.
    pub fn new(options: AmqpOptions, topology: Topology) -> Self {
        Self {
            options,
            topologies: vec![topology],
            state: Mutex::default(),
            in_flight: Semaphore::new(IN_FLIGHT),
            blocked: Blocked::default(),
            missing: Missing::default(),
            unreachable: StdMutex::default(),
            waiting: Waiting::default(),
        }
    }

    /// Declares the queues around another queue of jobs as well.
    pub fn and(mut self, topology: Topology) -> Self {
        self.topologies.push(topology);
        self
    }

    /// Tells what keeps the worker from publishing, each time that it may have changed, and logs when
    /// it begins and ends. Never returns.
    pub async fn follow(&self, tell: impl Fn(Option<String>)) {
        let mut blocked = self.blocked.subscribe();
        let mut was_waiting = false;
        loop {
            // The sender is this publisher's own and cannot be gone.
            let _ = timeout(LOOK, blocked.changed()).await;
            let blocked = blocked.borrow_and_update().clone();
            if let Some(reason) = blocked {
                tell(Some(format!("the broker blocks publishers: {reason}")));
                continue;
            }
            let unreachable = self.unreachable();
            let waits = self.waiting.longest(unreachable.as_deref());
            match &waits {
                Some(waits) if !was_waiting => tracing::warn!("waiting for a confirm: {waits}"),
                None if was_waiting => tracing::info!("the broker confirms messages again"),
                _ => {}
            }
            was_waiting = waits.is_some();
            tell(waits);
        }
    }

    /// Returns whether the broker has blocked publishers for longer than `limit`, as that changes.
    pub fn blocked_for(&self, limit: Duration) -> watch::Receiver<bool> {
        self.blocked.longer_than(limit)
    }

    /// Publishes to a queue and returns once the broker has confirmed or returned the message, or has
    /// refused it for good. What can pass (a lost connection, a nack, a broker that is down) is waited
    /// for; the caller bounds that by dropping the call. Meanwhile [`Self::follow`] says what the message
    /// waits for.
    pub async fn publish(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Published {
        let wait = self.waiting.begin(queue);
        let mut backoff = Backoff::default();
        loop {
            match self.offer(queue, properties, body, CONFIRM).await {
                Ok(published) => return published,
                Err(refusal) => {
                    wait.because(&refusal.0);
                    tracing::debug!(queue, "refused, and sent again: {refusal}");
                    sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// Publishes to a queue of the topology, and returns once the queue has the message. A queue that
    /// was deleted is declared again. Meanwhile [`Self::follow`] says what the message waits for.
    ///
    /// # Errors
    /// [`TooLarge`] if the queue can never have it.
    pub async fn publish_to_own(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<(), TooLarge> {
        match self.insist(Outgoing { queue, properties, body }, None).await {
            Ok(()) => Ok(()),
            Err(Unpublished::TooLarge(error)) => Err(error),
            Err(Unpublished::Refused(_)) => unreachable!("it is patient without a bound"),
        }
    }

    /// Does the same, but gives up a message that the queue has refused for `patience`. Time without a
    /// connection does not count.
    ///
    /// # Errors
    /// [`Unpublished`].
    pub async fn publish_to_own_within(
        &self,
        patience: Duration,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<(), Unpublished> {
        self.insist(Outgoing { queue, properties, body }, Some(patience)).await
    }

    async fn insist(
        &self,
        message: Outgoing<'_>,
        patience: Option<Duration>,
    ) -> Result<(), Unpublished> {
        let wait = self.waiting.begin(message.queue);
        let confirm = patience.unwrap_or(CONFIRM).min(CONFIRM);
        let mut backoff = Backoff::default();
        let mut first = None;
        loop {
            let Outgoing { queue, properties, body } = message;
            let refusal = match self.offer(queue, properties, body, confirm).await {
                Ok(Published::Confirmed) => return Ok(()),
                Ok(Published::TooLarge(error)) => return Err(error.into()),
                Ok(Published::Unroutable) => {
                    self.redeclare().await;
                    Refusal("there is no such queue".to_owned())
                }
                Err(refusal) => refusal,
            };
            let first = *first.get_or_insert_with(Instant::now);
            if patience.is_some_and(|patience| first.elapsed() >= patience) {
                return Err(refusal.into());
            }
            wait.because(&refusal.0);
            let pause = backoff.pause();
            tracing::debug!(queue, ?pause, "not confirmed, and sent again: {refusal}");
            sleep(pause).await;
        }
    }

    /// Offers a message to a queue and returns what the broker answers. Waits for a connection, and
    /// sends the message again if that is lost before the answer.
    ///
    /// * `confirm`: how long the answer may take; time in which the broker blocks does not count.
    ///
    /// # Errors
    /// [`Refusal`] if the queue did not accept the message, but may the next time.
    pub async fn offer(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
        confirm: Duration,
    ) -> Result<Published, Refusal> {
        let message = Outgoing { queue, properties, body };
        let mut backoff = Backoff::default();
        loop {
            let reason = match self.attempt(message, confirm).await {
                Ok(Published::Unroutable) if !self.lacks(queue).await => {
                    let reason = "the broker returned it as unroutable, and does not say that the queue is missing";
                    return Err(Refusal(reason.to_owned()));
                }
                Ok(published) => return Ok(published),
                Err(Failed::Queue(refusal)) => return Err(refusal),
                Err(Failed::Channel(reason)) => chain(&reason),
                Err(Failed::Silent(waited)) => format!("no answer within {} s", waited.as_secs()),
            };
            let pause = backoff.pause();
            tracing::debug!(queue, ?pause, "sent again: {reason}");
            sleep(pause).await;
        }
    }

    /// Returns whether there is a queue of this name, or `None` if the broker does not say so soon.
    pub async fn has_queue(&self, queue: &str) -> Option<bool> {
        let asking = async {
            let message = Outgoing { queue, properties: &question(), body: &[] };
            Some(self.attempt(message, CONFIRM).await.ok()? == Published::Confirmed)
        };
        timeout(ASK, asking).await.ok()?
    }

    /// Returns whether the broker says that there is no queue of this name, for which it returned a message.
    /// It returns messages for queues that exist, too: while their leader changes, their node is down or
    /// the broker starts.
    async fn lacks(&self, queue: &str) -> bool {
        if self.missing.knows(queue) {
            return true;
        }
        let asking = async {
            let channel = {
                let state = self.state.lock().await;
                state.live.as_ref()?.connection.create_channel().await.ok()?
            };
            look(&channel, queue).await.err()
        };
        let error = timeout(ASK, asking).await.ok().flatten();
        let is_missing = error.is_some_and(|error| is_missing(&error, queue));
        if is_missing {
            self.missing.note(queue);
        }
        is_missing
    }

    /// Makes one attempt.
    async fn attempt(&self, message: Outgoing<'_>, confirm: Duration) -> Result<Published, Failed> {
        // The semaphore is never closed; without a permit the attempt would be made all the same.
        let _permit = self.in_flight.acquire().await.ok();
        let lease = self.lease().await;
        let number = lease.number;
        match self.send(&lease.channel, message, confirm).await {
            // The broker closed its channel.
            Ok(Published::TooLarge(error)) => Ok(Published::TooLarge(error)),
            Ok(published) => {
                lease.reuse();
                Ok(published)
            }
            // A queue without a majority, or on a node that is down, while all others are fine.
            Err(Failed::Silent(waited)) if self.answers(number).await => {
                let reason = format!("no confirm within {} s", waited.as_secs());
                Err(Failed::Queue(Refusal(reason)))
            }
            Err(Failed::Silent(waited)) => {
                self.give_up(number).await;
                Err(Failed::Silent(waited))
            }
            // A channel that nacked may do so forever: after a change of leader on 3.10 it does.
            Err(failed) => Err(failed),
        }
    }

    /// Returns whether the broker answers anything on the connection of this number.
    async fn answers(&self, number: u64) -> bool {
        let state = self.state.lock().await;
        let Some(live) = state.live.as_ref().filter(|_| state.opened == number) else {
            return false;
        };
        matches!(timeout(ASK, live.connection.create_channel()).await, Ok(Ok(_)))
    }

    /// Returns a channel, on a new connection if need be.
    async fn lease(&self) -> Lease {
        let mut state = self.state.lock().await;
        let mut backoff = Backoff::default();
        loop {
            match state.lease().await {
                Ok(Some(lease)) => return lease,
                Ok(None) => {}
                Err(error) => tracing::debug!("no channel on the publishing connection: {error}"),
            }
            // What is left of the old connection goes first.
            state.shut().await;
            match self.open().await {
                Ok(connection) => {
                    self.set_unreachable(None);
                    let watch = self.blocked.watch(&connection);
                    state.set_live(connection, watch);
                }
                Err(error) => {
                    let error = chain(&error);
                    self.set_unreachable(Some(error.clone()));
                    let pause = backoff.pause();
                    tracing::warn!(
                        pause_seconds = pause.as_secs_f64(),
                        "results cannot be published, the broker is tried again: {error}"
                    );
                    sleep(pause).await;
                }
            }
        }
    }

    async fn open(&self) -> Result<Connection, AmqpError> {
        let connection = connect(&self.options, "publish").await?;
        self.declare(&connection).await?;
        Ok(connection)
    }

    /// Declares all queues. One that cannot be declared keeps no message from the others.
    async fn declare(&self, connection: &Connection) -> Result<(), AmqpError> {
        for topology in &self.topologies {
            match topology.declare(connection).await {
                Ok(_) => {}
                Err(error) if connection.status().connected() => {
                    tracing::warn!("publishing without all queues: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Declares the queues again, one of which is missing, on the connection that is there.
    async fn redeclare(&self) {
        let mut state = self.state.lock().await;
        let Some(live) = &mut state.live else { return };
        // Of many who miss it the first has declared it.
        if live.declared.elapsed() < REDECLARE {
            return;
        }
        live.declared = Instant::now();
        let declared = timeout(DECLARE, self.declare(&live.connection)).await;
        if !matches!(declared, Ok(Ok(()))) {
            state.shut().await;
        }
    }

    /// Ends the connection of this number, unless another has replaced it.
    async fn give_up(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.opened == number {
            state.shut().await;
        }
    }

    async fn send(
        &self,
        channel: &Channel,
        message: Outgoing<'_>,
        confirm: Duration,
    ) -> Result<Published, Failed> {
        let Outgoing { queue, properties, body } = message;
        let options = BasicPublishOptions {
            mandatory: !is_direct_reply(queue),
            ..BasicPublishOptions::default()
        };
        let confirmed = async {
            channel
                .basic_publish("".into(), short(queue), options, body, properties.clone())
                .await?
                .await
        };
        tokio::pin!(confirmed);
        let mut blocked = self.blocked.subscribe();
        let answer = loop {
            match timeout(confirm, &mut confirmed).await {
                Ok(answer) => break answer,
                Err(_) => {
                    let changed = blocked.has_changed().unwrap_or(false);
                    if !changed && blocked.borrow_and_update().is_none() {
                        return Err(Failed::Silent(confirm));
                    }
                    blocked.mark_unchanged();
                }
            }
        };
        answers::read(answer, body.len())
    }

    /// Ends the connection.
    pub async fn close(&self) {
        self.state.lock().await.shut().await;
    }

    fn unreachable(&self) -> Option<String> {
        self.unreachable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_unreachable(&self, reason: Option<String>) {
        *self.unreachable.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}
