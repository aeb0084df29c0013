//! Publishing with confirms, over one connection that is replaced when it is lost.
//!
//! A broker that runs out of memory or disk blocks publishers: that is waited for, however long it
//! takes, on the same connection.
//!
//! Every message is mandatory: without that flag RabbitMQ acks and drops what no queue takes.
//! Confirms are pipelined: each caller waits for its own, all at once.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, Event};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::topology::Topology;
use super::{AmqpError, AmqpOptions, Backoff, close, connect, short};

/// How long a confirm may take before the channel is given up and the message sent again.
const CONFIRM: Duration = Duration::from_secs(30);

/// For so long after a connection was opened, a queue that is missing is only missing yet: a broker
/// that comes back takes publishers before it has found all its queues.
const SETTLING: Duration = Duration::from_secs(5);

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
    topology: Topology,
    state: Mutex<State>,
    /// Why the broker takes nothing for now.
    blocked: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct State {
    live: Option<Live>,
    /// Channels so far, so that of many callers who see one fail only the first replaces it.
    opened: u64,
}

struct Live {
    connection: Connection,
    channel: Channel,
    since: Instant,
    _watch: AbortOnDropHandle<()>,
}

impl Publisher {
    /// A publisher that connects when it is first needed, and declares what it publishes to.
    pub fn new(options: AmqpOptions, topology: Topology) -> Self {
        let blocked = watch::Sender::new(None);
        Self { options, topology, state: Mutex::default(), blocked }
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

    async fn publish_until(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
        own: bool,
    ) -> Published {
        let mut backoff = Backoff::default();
        loop {
            let (channel, number, since) = self.channel().await;
            let sent = match self.send(&channel, queue, properties, body).await {
                Ok(Published::Unroutable) if since.elapsed() < SETTLING => {
                    tokio::time::sleep(backoff.next()).await;
                    continue;
                }
                Ok(Published::Unroutable) if own => Err("there is no such queue".to_owned()),
                sent => sent,
            };
            match sent {
                Ok(published) => return published,
                Err(reason) => {
                    let first = backoff.is_new();
                    let pause = backoff.next();
                    // Once a message: it may be refused for hours.
                    if first {
                        tracing::warn!(queue, "not confirmed, sent until it is: {reason}");
                    } else {
                        tracing::debug!(queue, ?pause, "not confirmed again: {reason}");
                    }
                    // A channel that nacked or stayed silent may do so for ever: after a change of
                    // leader on 3.10 it does.
                    self.give_up(number).await;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn channel(&self) -> (Channel, u64, Instant) {
        let mut state = self.state.lock().await;
        if let Some(live) = state.live.as_ref().filter(|l| l.channel.status().connected()) {
            return (live.channel.clone(), state.opened, live.since);
        }
        // What is left of the old connection goes first.
        state.shut().await;
        let mut backoff = Backoff::default();
        loop {
            match self.open().await {
                Ok((connection, channel)) => {
                    let (watch, since) = (self.watch(&connection), Instant::now());
                    let live = Live { connection, channel: channel.clone(), since, _watch: watch };
                    state.live = Some(live);
                    state.opened += 1;
                    return (channel, state.opened, since);
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

    async fn open(&self) -> Result<(Connection, Channel), AmqpError> {
        let connection = connect(&self.options, "publish").await?;
        self.topology.declare(&connection).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
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
    ) -> Result<Published, String> {
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
                Err(_) => return Err(format!("no confirm within {} s", CONFIRM.as_secs())),
            }
        };
        match answer {
            Ok(Confirmation::Ack(None)) => Ok(Published::Confirmed),
            Ok(Confirmation::Ack(Some(_))) => Ok(Published::Unroutable),
            Ok(Confirmation::Nack(_)) => Err("the broker refused it (nack)".to_owned()),
            Ok(Confirmation::NotRequested) => Err("confirms are off on this channel".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends the connection.
    pub async fn close(&self) {
        self.state.lock().await.shut().await;
    }
}

impl State {
    async fn shut(&mut self) {
        if let Some(live) = self.live.take() {
            close(&live.connection).await;
        }
    }
}
