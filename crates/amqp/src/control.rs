//! The control exchange: commands ask every worker, and read the replies.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, Consumer};
use tokio::time::{Instant, timeout, timeout_at};

use angler_wire::control::{REQUEST_TYPE, Reply, Request};

use super::ask::look_at;
use super::topology::Topology;
use super::{AmqpError, AmqpOptions, close, connect, put, short};

/// Messages that a queue on the exchange holds at most; the oldest go first.
const QUEUE_LENGTH: i64 = 1000;
/// What the broker may take to answer a command.
const ANSWER: Duration = Duration::from_secs(10);

/// A connection and a channel, with the exchange declared.
pub(crate) struct Open {
    pub connection: Connection,
    pub channel: Channel,
}

pub(crate) async fn open(
    options: &AmqpOptions,
    topology: &Topology,
    role: &str,
) -> Result<Open, AmqpError> {
    let connection = connect(options, role).await?;
    topology.ensure_control(&connection).await?;
    let channel = connection.create_channel().await?;
    Ok(Open { connection, channel })
}

impl Open {
    /// Consumes an exclusive queue, bound to `exchange` unless that is empty; yields its name too.
    pub(crate) async fn consume(&self, exchange: &str) -> Result<(String, Consumer), lapin::Error> {
        let exclusive =
            QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let mut arguments = FieldTable::default();
        // Classic: it is not worth a majority's disks, and dies with its connection.
        put(&mut arguments, "x-queue-type", "classic");
        put(&mut arguments, "x-overflow", "drop-head");
        arguments.insert(short("x-max-length"), AMQPValue::LongLongInt(QUEUE_LENGTH));
        let queue = self.channel.queue_declare("".into(), exclusive, arguments).await?;
        let name = queue.name().clone();
        if !exchange.is_empty() {
            let (options, none) = (QueueBindOptions::default(), FieldTable::default());
            self.channel
                .queue_bind(name.clone(), short(exchange), "".into(), options, none)
                .await?;
        }
        let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consumer = self
            .channel
            .basic_consume(name.clone(), "".into(), no_ack, FieldTable::default())
            .await?;
        Ok((name.to_string(), consumer))
    }
}

/// A command's mouth: asks all workers and reads their replies.
pub struct ControlClient {
    open: Open,
    exchange: String,
    queue: String,
    replies: Consumer,
    requests: u64,
    /// Workers that consume the jobs queue.
    workers: u32,
}

impl ControlClient {
    /// Connects, and counts the workers: the consumers of the jobs queue.
    ///
    /// # Errors
    /// [`AmqpError`].
    pub async fn connect(options: &AmqpOptions, topology: &Topology) -> Result<Self, AmqpError> {
        let connecting = async {
            let open = open(options, topology, "command").await?;
            open.channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let (queue, replies) = open.consume("").await?;
            // Without a jobs queue no worker has ever run here.
            let jobs = look_at(&open.connection, &topology.jobs).await?;
            let workers = jobs.map_or(0, |queue| queue.consumers);
            let exchange = topology.control_exchange.clone();
            Ok(Self { open, exchange, queue, replies, requests: 0, workers })
        };
        let silent = AmqpError::Silent(ANSWER.as_secs());
        timeout(ANSWER, connecting).await.unwrap_or(Err(silent))
    }

    /// Workers that consumed jobs when the client connected.
    pub fn workers(&self) -> usize {
        self.workers as usize
    }

    /// Asks every worker. Replies to an earlier request are no longer read.
    ///
    /// # Errors
    /// [`AmqpError`].
    pub async fn ask(&mut self, request: &Request) -> Result<(), AmqpError> {
        self.requests += 1;
        let body = serde_json::to_vec(request).unwrap_or_default();
        let properties = BasicProperties::default()
            .with_type(REQUEST_TYPE.into())
            .with_content_type("application/json".into())
            .with_reply_to(short(&self.queue))
            .with_correlation_id(short(&self.requests.to_string()));
        let sent = async {
            let options = BasicPublishOptions::default();
            let exchange = short(&self.exchange);
            self.open
                .channel
                .basic_publish(exchange, "".into(), options, &body, properties)
                .await?
                .await
        };
        let silent = AmqpError::Silent(ANSWER.as_secs());
        timeout(ANSWER, sent).await.map_err(|_| silent)?.map_err(AmqpError::from)?;
        Ok(())
    }

    /// The next reply to the request; none when `deadline` is over or the connection is lost.
    pub async fn reply(&mut self, deadline: Instant) -> Option<Reply> {
        let asked = self.requests.to_string();
        loop {
            let message = timeout_at(deadline, self.replies.next()).await.ok()??.ok()?;
            let id = message.properties.correlation_id().as_ref().map(ShortString::as_str);
            let reply = serde_json::from_slice(&message.data);
            // Answers of a kind that this version does not know are passed over.
            if let (Some(id), Ok(reply)) = (id, reply)
                && id == asked
            {
                return Some(reply);
            }
        }
    }

    /// Ends the connection.
    pub async fn close(self) {
        close(&self.open.connection).await;
    }
}
