//! Publishing with confirms, over one connection that is replaced when it is lost.
//!
//! A broker that runs out of memory or disk blocks publishers: that is waited for, however long it
//! takes, on the same connection.
//!
//! Every message is mandatory: without that flag RabbitMQ acks and drops what no queue takes.
//!
//! Confirms are pipelined: each caller waits for its own, all at once. Each message in flight has a
//! channel to itself, though. A message that comes back unroutable bears no delivery tag, and lapin
//! hands it to whichever confirm arrives next, so that on a shared channel a message that nobody has
//! counts as confirmed. Also lapin counts tags and sends frames in two steps, which two publishers
//! may take in different orders. A channel with one message has neither problem.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, Event};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::ask::question;
use super::topology::Topology;
use super::{AmqpError, AmqpOptions, Backoff, close, connect, short};

/// How long a confirm may take before the channel is given up and the message sent again.
const CONFIRM: Duration = Duration::from_secs(30);

/// For so long after a connection was opened, a queue that is missing is only missing yet: a broker
/// that comes back takes publishers before it has found all its queues.
const SETTLING: Duration = Duration::from_secs(5);

/// What a question may take.
const ASK: Duration = Duration::from_secs(2);

/// Messages in flight, and so channels, at most. Brokers allow 2,047 channels a connection unless
/// they are told otherwise, and a confirm takes milliseconds: more would gain nothing.
const IN_FLIGHT: usize = 64;

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// A queue has it.
    Confirmed,
    /// No queue takes it; nobody has it.
    Unroutable,
}

/// Publishes until the broker confirms. Clones of its `Arc` share one connection.
pub struct Publisher {
    options: AmqpOptions,
    /// What it declares on each connection.
    topologies: Vec<Topology>,
    state: Mutex<State>,
    in_flight: Semaphore,
    /// Why the broker takes nothing for now.
    blocked: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct State {
    live: Option<Live>,
    /// Connections so far, so that of many callers who see one fail only the first replaces it.
    opened: u64,
}

type Idle = Arc<std::sync::Mutex<Vec<Channel>>>;

struct Live {
    connection: Connection,
    /// Channels in confirm mode on which nothing is in flight. The last one used is used next, so
    /// that there are as many as messages were ever in flight at once.
    idle: Idle,
    since: Instant,
    _watch: AbortOnDropHandle<()>,
}

/// A channel for one message. One that is not given back, whatever the reason, is closed: what is
/// still in flight on it must not be taken for the next message's confirm.
struct Lease {
    channel: Channel,
    /// Where it goes back to.
    idle: Idle,
    origin: Origin,
}

/// Which connection, and since when there is one.
#[derive(Clone, Copy)]
struct Origin {
    number: u64,
    since: Instant,
}

/// Why a message was not confirmed.
enum Refused {
    /// This channel is of no more use.
    Channel(String),
    /// Nor is the connection.
    Connection(String),
}

impl Publisher {
    /// A publisher that connects when it is first needed, and declares what it publishes to.
    pub fn new(options: AmqpOptions, topology: Topology) -> Self {
        let blocked = watch::Sender::new(None);
        let in_flight = Semaphore::new(IN_FLIGHT);
        let topologies = vec![topology];
        Self { options, topologies, state: Mutex::default(), in_flight, blocked }
    }

    /// Declares the queues around another queue of jobs as well.
    pub fn and(mut self, topology: Topology) -> Self {
        self.topologies.push(topology);
        self
    }

    /// Why the broker takes nothing for now, as it changes.
    pub fn blocked(&self) -> watch::Receiver<Option<String>> {
        self.blocked.subscribe()
    }

    /// Publishes to a queue and returns once the broker has confirmed or returned the message.
    /// What can pass (a lost connection, a nack, a broker that is down) is waited for; the caller
    /// bounds that by dropping the call.
    pub async fn publish(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Published {
        self.publish_until(queue, properties, body, false).await
    }

    /// Publishes to a queue of the topology, and returns once it has the message: one that was
    /// deleted is declared anew.
    pub async fn publish_to_own(&self, queue: &str, properties: &BasicProperties, body: &[u8]) {
        self.publish_until(queue, properties, body, true).await;
    }

    /// Whether there is a queue of this name; none if the broker does not say so soon.
    pub async fn has_queue(&self, queue: &str) -> Option<bool> {
        let asking = async {
            let _permit = self.in_flight.acquire().await.ok();
            let lease = self.lease().await;
            let sent = self.send(&lease.channel, queue, &question(), &[]).await.ok()?;
            lock(&lease.idle).push(lease.channel);
            Some(sent == Published::Confirmed)
        };
        timeout(ASK, asking).await.ok()?
    }

    async fn publish_until(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
        own: bool,
    ) -> Published {
        let mut backoff = Backoff::default();
        loop {
            let reason = match self.publish_once(queue, properties, body).await {
                // Missing yet, perhaps.
                Ok((Published::Unroutable, from)) if from.since.elapsed() < SETTLING => {
                    tokio::time::sleep(backoff.next()).await;
                    continue;
                }
                Ok((Published::Unroutable, from)) if own => {
                    // The next connection declares it.
                    self.give_up(from.number).await;
                    "there is no such queue".to_owned()
                }
                Ok((published, _)) => return published,
                Err(reason) => reason,
            };
            let first = backoff.is_new();
            let pause = backoff.next();
            // Once a message: it may be refused for hours.
            if first {
                tracing::warn!(queue, "not confirmed, sent until it is: {reason}");
            } else {
                tracing::debug!(queue, ?pause, "not confirmed again: {reason}");
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One attempt; yields also which connection it was made on.
    async fn publish_once(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<(Published, Origin), String> {
        // It is never closed; without a permit it would go on all the same.
        let _permit = self.in_flight.acquire().await.ok();
        let lease = self.lease().await;
        match self.send(&lease.channel, queue, properties, body).await {
            Ok(published) => {
                lock(&lease.idle).push(lease.channel);
                Ok((published, lease.origin))
            }
            // A channel that nacked may do so for ever: after a change of leader on 3.10 it does.
            Err(Refused::Channel(reason)) => Err(reason),
            Err(Refused::Connection(reason)) => {
                self.give_up(lease.origin.number).await;
                Err(reason)
            }
        }
    }

    /// A channel, on a new connection if need be.
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
                    let watch = self.watch(&connection);
                    let (idle, since) = (Idle::default(), Instant::now());
                    state.live = Some(Live { connection, idle, since, _watch: watch });
                    state.opened += 1;
                }
                Err(error) => {
                    let pause = backoff.next();
                    tracing::warn!(
                        pause_seconds = pause.as_secs_f64(),
                        "results cannot be published, the broker is tried again: {error}"
                    );
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn open(&self) -> Result<Connection, AmqpError> {
        let connection = connect(&self.options, "publish").await?;
        for topology in &self.topologies {
            topology.declare(&connection).await?;
        }
        Ok(connection)
    }

    /// Follows what the broker says of this connection.
    fn watch(&self, connection: &Connection) -> AbortOnDropHandle<()> {
        self.blocked.send_replace(None);
        let mut events = Box::pin(connection.events_listener());
        let blocked = self.blocked.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!("the broker blocks publishers, results wait: {reason}");
                        blocked.send_replace(Some(reason.to_string()));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker takes messages again");
                        blocked.send_replace(None);
                    }
                    Event::Error(_) => break, // Whoever publishes meets it.
                    _ => {}
                }
            }
            blocked.send_replace(None);
        }))
    }

    /// Ends the connection of this number, unless another has taken its place.
    async fn give_up(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.opened == number {
            state.shut().await;
        }
    }

    async fn send(
        &self,
        channel: &Channel,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<Published, Refused> {
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirmed = async {
            channel
                .basic_publish("".into(), short(queue), mandatory, body, properties.clone())
                .await?
                .await
        };
        tokio::pin!(confirmed);
        let answer = loop {
            match timeout(CONFIRM, &mut confirmed).await {
                Ok(answer) => break answer,
                Err(_) if self.blocked.borrow().is_some() => {}
                Err(_) => {
                    let reason = format!("no confirm within {} s", CONFIRM.as_secs());
                    return Err(Refused::Connection(reason));
                }
            }
        };
        match answer {
            Ok(Confirmation::Ack(None)) => Ok(Published::Confirmed),
            Ok(Confirmation::Ack(Some(_))) => Ok(Published::Unroutable),
            Ok(Confirmation::Nack(_)) => {
                Err(Refused::Channel("the broker refused it (nack)".to_owned()))
            }
            Ok(Confirmation::NotRequested) => {
                Err(Refused::Channel("confirms are off on this channel".to_owned()))
            }
            Err(error) => Err(Refused::Channel(error.to_string())),
        }
    }

    /// Ends the connection.
    pub async fn close(&self) {
        self.state.lock().await.shut().await;
    }
}

impl State {
    /// A channel of the connection; none without a connection that lives.
    async fn lease(&mut self) -> Result<Option<Lease>, lapin::Error> {
        let number = self.opened;
        let Some(live) = self.live.as_mut().filter(|l| l.connection.status().connected()) else {
            return Ok(None);
        };
        let origin = Origin { number, since: live.since };
        let idle = Arc::clone(&live.idle);
        loop {
            // A statement of its own, so that the lock is free again.
            let Some(channel) = lock(&idle).pop() else { break };
            if channel.status().connected() {
                return Ok(Some(Lease { channel, idle, origin }));
            }
        }
        let channel = live.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Some(Lease { channel, idle, origin }))
    }

    async fn shut(&mut self) {
        if let Some(live) = self.live.take() {
            close(&live.connection).await;
        }
    }
}

/// Nothing panics while it holds the lock.
fn lock(idle: &std::sync::Mutex<Vec<Channel>>) -> MutexGuard<'_, Vec<Channel>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}
