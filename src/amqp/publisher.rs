//! Publishing with confirms, over one connection that is replaced when it is lost.
//!
//! Every message is mandatory: without that flag RabbitMQ acks and drops what no queue takes.
//! Confirms are pipelined: each caller waits for its own, all at once.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::topology::Topology;
use super::{AmqpError, AmqpOptions, Backoff, close, connect, short};

/// How long a confirm may take before the channel is given up and the message sent again.
const CONFIRM: Duration = Duration::from_secs(30);

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
}

impl Publisher {
    /// A publisher that connects when it is first needed, and declares what it publishes to.
    pub fn new(options: AmqpOptions, topology: Topology) -> Self {
        Self { options, topology, state: Mutex::default() }
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
        let mut backoff = Backoff::default();
        loop {
            let (channel, number) = self.channel().await;
            match send(&channel, queue, properties, body).await {
                Ok(published) => return published,
                Err(reason) => {
                    let pause = backoff.next();
                    tracing::warn!(
                        queue,
                        pause_seconds = pause.as_secs_f64(),
                        "a message was not confirmed and is sent again: {reason}"
                    );
                    // A channel that nacked or stayed silent may do so for ever: after a change of
                    // leader on 3.10 it does.
                    self.give_up(number).await;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn channel(&self) -> (Channel, u64) {
        let mut state = self.state.lock().await;
        if let Some(live) = state.live.as_ref().filter(|l| l.channel.status().connected()) {
            return (live.channel.clone(), state.opened);
        }
        // What is left of the old connection goes first.
        state.shut().await;
        let mut backoff = Backoff::default();
        loop {
            match self.open().await {
                Ok((connection, channel)) => {
                    state.live = Some(Live { connection, channel: channel.clone() });
                    state.opened += 1;
                    return (channel, state.opened);
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

    async fn give_up(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.opened == number {
            state.shut().await;
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

async fn send(
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
    match timeout(CONFIRM, confirmed).await {
        Ok(Ok(Confirmation::Ack(None))) => Ok(Published::Confirmed),
        Ok(Ok(Confirmation::Ack(Some(_)))) => Ok(Published::Unroutable),
        Ok(Ok(Confirmation::Nack(_))) => Err("the broker refused it (nack)".to_owned()),
        Ok(Ok(Confirmation::NotRequested)) => Err("confirms are off on this channel".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no confirm within {} s", CONFIRM.as_secs())),
    }
}
