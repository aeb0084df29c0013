//! The control exchange: workers listen ([`ControlListener`]), commands ask ([`ControlClient`]).
//!
//! Each worker has an exclusive queue of its own, bound to the fanout exchange; it is gone with the
//! worker's connection. Requests may be lost with it, so on every new connection the worker looks
//! at everything it would have been told.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, Consumer};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use angler_core::class_sets::catalog::Catalog;
use angler_core::class_sets::shadow::Shadow;
use angler_wire::control::{Answer, MAX_REQUEST_BYTES, REPLY_TYPE, REQUEST_TYPE, Reply, Request};

use super::ask::look_at;
use super::losses::{JobCopy, Losses};
use super::topology::Topology;
use super::{AmqpError, AmqpOptions, Backoff, close, connect, put, short};

/// Messages that a queue on the exchange holds at most; the oldest go first.
const QUEUE_LENGTH: i64 = 1000;
/// Requests that a worker answers at once.
const AT_ONCE: usize = 16;
/// What publishing a reply may take. Under a memory or disk alarm the broker accepts none, but still
/// delivers requests: those must not wait for replies.
const REPLY: Duration = Duration::from_secs(2);
/// What the broker may take to answer a command.
const ANSWER: Duration = Duration::from_secs(10);

/// Listens on the control exchange.
pub struct ControlListener {
    options: AmqpOptions,
    topology: Topology,
    losses: Arc<Losses>,
    catalog: Arc<Catalog>,
    shadow: Option<Arc<Shadow>>,
}

impl ControlListener {
    /// A listener that connects when it is run.
    pub fn new(
        options: AmqpOptions,
        topology: Topology,
        losses: Arc<Losses>,
        catalog: Arc<Catalog>,
        shadow: Option<Arc<Shadow>>,
    ) -> Self {
        Self { options, topology, losses, catalog, shadow }
    }

    /// Listens until the call is dropped; a connection that is lost is replaced.
    pub async fn run(self: Arc<Self>) {
        let mut backoff = Backoff::default();
        loop {
            let reason = match open(&self.options, &self.topology, "control").await {
                Ok(open) => {
                    let reason = self.listen(&open, &mut backoff).await;
                    close(&open.connection).await;
                    reason
                }
                Err(error) => error.to_string(),
            };
            let pause = backoff.pause();
            tracing::warn!(
                exchange = self.topology.control_exchange,
                pause_seconds = pause.as_secs_f64(),
                "announcements are not heard, polling goes on: {reason}"
            );
            sleep(pause).await;
        }
    }

    /// Answers until the consumer ends; yields why it did.
    async fn listen(self: &Arc<Self>, open: &Open, backoff: &mut Backoff) -> String {
        let mut requests = match open.consume(&self.topology.control_exchange).await {
            Ok((_, consumer)) => consumer,
            Err(error) => return error.to_string(),
        };
        backoff.reset();
        // What was announced while nobody listened.
        self.catalog.refresh_all().await;
        let mut answers = JoinSet::new();
        loop {
            let next = tokio::select! {
                next = requests.next() => next,
                Some(_) = answers.join_next() => continue,
            };
            let message = match next {
                Some(Ok(message)) => message,
                Some(Err(error)) => return error.to_string(),
                None => return "the consumer was cancelled, or its connection is gone".to_owned(),
            };
            while answers.len() >= AT_ONCE {
                answers.join_next().await;
            }
            let (listener, channel) = (Arc::clone(self), open.channel.clone());
            answers.spawn(async move { listener.answer(&channel, message).await });
        }
    }

    async fn answer(&self, channel: &Channel, message: lapin::message::Delivery) {
        let kind = message.properties.kind().as_ref().map(ShortString::as_str);
        let request = match serde_json::from_slice(&message.data) {
            Ok(request)
                if message.data.len() <= MAX_REQUEST_BYTES && kind == Some(REQUEST_TYPE) =>
            {
                request
            }
            Ok(_) | Err(_) => {
                tracing::debug!(kind, "a control message that is not understood is passed over");
                return;
            }
        };
        let reply = |answer| self.reply(channel, &message.properties, answer);
        match request {
            Request::Activated { set, .. } => {
                // The version is loaded whether or not anyone can be told.
                let ((), set) = tokio::join!(reply(Answer::Heard), self.catalog.refresh(&set));
                reply(Answer::Serving { set }).await;
            }
            Request::Status => reply(Answer::Status { sets: self.catalog.status() }).await,
            Request::Shadow => {
                let report = self.shadow.as_ref().map(|shadow| Box::new(shadow.report()));
                reply(Answer::Shadow { report }).await;
            }
            Request::Losses { job, stamp } => {
                let count = self.losses.of(&JobCopy { job, stamp });
                reply(Answer::Losses { count }).await;
            }
        }
    }

    /// A reply that is lost is asked for again, or not: nothing depends on it.
    async fn reply(&self, channel: &Channel, request: &BasicProperties, answer: Answer) {
        let Some(to) = request.reply_to() else { return };
        let worker = self.options.name.clone();
        let reply = Reply { worker, instance: self.losses.instance().to_owned(), answer };
        let Ok(body) = serde_json::to_vec(&reply) else { return };
        let mut properties = BasicProperties::default()
            .with_type(REPLY_TYPE.into())
            .with_content_type("application/json".into());
        if let Some(id) = request.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        let options = BasicPublishOptions::default();
        let sending = channel.basic_publish("".into(), to.clone(), options, &body, properties);
        match timeout(REPLY, sending).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!("lost a reply to a control request: {error}"),
            Err(_) => tracing::debug!("lost a reply to a control request: the broker blocks"),
        }
    }
}

/// A connection and a channel, with the exchange declared.
struct Open {
    connection: Connection,
    channel: Channel,
}

async fn open(options: &AmqpOptions, topology: &Topology, role: &str) -> Result<Open, AmqpError> {
    let connection = connect(options, role).await?;
    topology.ensure_control(&connection).await?;
    let channel = connection.create_channel().await?;
    Ok(Open { connection, channel })
}

impl Open {
    /// Consumes an exclusive queue, bound to `exchange` unless that is empty; yields its name too.
    async fn consume(&self, exchange: &str) -> Result<(String, Consumer), lapin::Error> {
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
