//! Jobs from RabbitMQ.
//!
//! A lost connection ends its consumer; its deliveries can no longer be acked and come back, so
//! their `lost` token is cancelled and work on them stops. Then the loop connects anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;

use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Acker, BasicProperties, Channel, Connection, Consumer, Event};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{Delivery, JobSource, Malformed, Reply, Settle, Settlement};
use crate::amqp::publisher::{Published, Publisher};
use crate::amqp::topology::Topology;
use crate::amqp::{
    AmqpError, AmqpOptions, Backoff, close, connect, number_header, put, short, string_header,
};
use crate::error::FatalError;
use crate::health::Readiness;
use crate::job::{JOB_TYPE, Job, JobLimits, id_of_malformed};

/// Counts attempts across retries; never begins with `x-`, which RabbitMQ keeps for itself.
const ATTEMPT: &str = "angler-attempt";
const ERROR: &str = "angler-error";

/// Consumes the jobs queue.
pub struct AmqpSource {
    options: AmqpOptions,
    topology: Topology,
    prefetch: u16,
    limits: JobLimits,
    publisher: Arc<Publisher>,
    readiness: Arc<Readiness>,
    live: Option<Live>,
    /// The attempt to become live. A task of its own, since calls of `receive` are dropped at any
    /// moment: a consumer that was dropped half-made would keep what was prefetched for it.
    opening: Option<JoinHandle<Result<Live, AmqpError>>>,
    /// Grows while consumers end without having delivered anything.
    backoff: Backoff,
    stopped: bool,
}

struct Live {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
    lost: CancellationToken,
    /// Cancels `lost` when the connection reports an error, even while nobody receives.
    _watch: AbortOnDropHandle<()>,
}

impl AmqpSource {
    /// A source that connects when it is first asked. Retries and dead letters go through
    /// `publisher`; `readiness` is told whether jobs are being consumed.
    pub fn new(
        options: AmqpOptions,
        topology: Topology,
        prefetch: u16,
        limits: JobLimits,
        publisher: Arc<Publisher>,
        readiness: Arc<Readiness>,
    ) -> Self {
        Self {
            options,
            topology,
            prefetch,
            limits,
            publisher,
            readiness,
            live: None,
            opening: None,
            backoff: Backoff::default(),
            stopped: false,
        }
    }

    /// Begins an attempt to connect and consume after a pause.
    fn open_after(&self, pause: Duration) -> JoinHandle<Result<Live, AmqpError>> {
        let (options, topology) = (self.options.clone(), self.topology.clone());
        let prefetch = self.prefetch;
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            open(&options, &topology, prefetch).await
        })
    }

    /// Connects until it works. Dropping the call in between loses nothing.
    async fn live(&mut self) -> &mut Live {
        while self.live.is_none() {
            let opening = match self.opening.take() {
                Some(opening) => opening,
                None => self.open_after(Duration::ZERO),
            };
            let opened = self.opening.insert(opening).await;
            self.opening = None;
            match opened {
                Ok(Ok(live)) => {
                    tracing::info!(
                        queue = self.topology.jobs,
                        prefetch = self.prefetch,
                        "consuming"
                    );
                    self.readiness.set_consuming(true);
                    self.live = Some(live);
                }
                Ok(Err(error)) => self.try_again(&error.to_string()),
                Err(panic) => self.try_again(&panic.to_string()),
            }
        }
        match &mut self.live {
            Some(live) => live,
            None => unreachable!("the loop above ends only with a connection"),
        }
    }

    fn try_again(&mut self, error: &str) {
        let pause = self.backoff.next();
        tracing::warn!(
            pause_seconds = pause.as_secs_f64(),
            "jobs cannot be consumed, the broker is tried again: {error}"
        );
        self.opening = Some(self.open_after(pause));
    }

    fn lose(&mut self, reason: &str) {
        tracing::warn!("the consumer ended and is started anew: {reason}");
        self.readiness.set_consuming(false);
        if let Some(live) = self.live.take() {
            live.lost.cancel();
            // Closed beside the way; a broker that is gone does not answer.
            tokio::spawn(async move { close(&live.connection).await });
        }
        let pause = self.backoff.next();
        self.opening = Some(self.open_after(pause));
    }

    fn delivery(&self, message: lapin::message::Delivery, lost: CancellationToken) -> Delivery {
        let lapin::message::Delivery { properties, data, acker, .. } = message;
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        let message_id = text(properties.message_id());
        let headers = properties.headers().clone().unwrap_or_default();
        let attempt = number_header(&headers, ATTEMPT)
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0)
            .unwrap_or(1);
        let reply = Reply {
            to: text(properties.reply_to()).filter(|q| !q.is_empty()),
            correlation_id: text(properties.correlation_id()),
            traceparent: string_header(&headers, "traceparent"),
        };
        let job = Job::parse(&data, message_id.as_deref(), self.limits).map_err(|failure| {
            Malformed { id: id_of_malformed(&data, message_id.as_deref()), failure }
        });
        let settle = Box::new(AmqpSettle {
            acker,
            publisher: Arc::clone(&self.publisher),
            topology: self.topology.clone(),
            properties,
            headers,
            body: data,
            attempt,
        });
        Delivery { job, attempt, reply, settle, lost }
    }
}

async fn open(
    options: &AmqpOptions,
    topology: &Topology,
    prefetch: u16,
) -> Result<Live, AmqpError> {
    let connection = connect(options, "consume").await?;
    for mismatch in topology.declare(&connection).await? {
        tracing::warn!("{mismatch}");
    }
    // From here on, since a refused declaration is an error of the connection's too.
    let lost = CancellationToken::new();
    let watch = watch(&connection, lost.clone());
    let channel = connection.create_channel().await?;
    // Unacked deliveries at once; the worker holds no more jobs than that.
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let consumer = channel
        .basic_consume(
            short(&topology.jobs),
            short(&options.name),
            BasicConsumeOptions::default(), // acks by hand, competing consumers
            FieldTable::default(),
        )
        .await?;
    Ok(Live { connection, channel, consumer, lost, _watch: watch })
}

/// Watches a connection's events and cancels `lost` when it ends.
fn watch(connection: &Connection, lost: CancellationToken) -> AbortOnDropHandle<()> {
    let mut events = Box::pin(connection.events_listener());
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                Event::Error(error) => {
                    tracing::warn!("the consuming connection is lost: {error}");
                    break;
                }
                Event::ConnectionBlocked(reason) => {
                    tracing::warn!("the broker blocks publishers: {reason}");
                }
                Event::ConnectionUnblocked => tracing::info!("the broker unblocked publishers"),
                _ => {}
            }
        }
        lost.cancel();
    }))
}

#[async_trait]
impl JobSource for AmqpSource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        if self.stopped {
            return Ok(None);
        }
        loop {
            let live = self.live().await;
            let lost = live.lost.clone();
            let next = tokio::select! {
                next = live.consumer.next() => next,
                () = lost.cancelled() => None,
            };
            match next {
                Some(Ok(message)) => {
                    self.backoff.reset();
                    return Ok(Some(self.delivery(message, lost)));
                }
                Some(Err(error)) => self.lose(&error.to_string()),
                None => self.lose("cancelled by the broker, or its connection is gone"),
            }
        }
    }

    async fn stop(&mut self) {
        self.stopped = true;
        self.readiness.set_consuming(false);
        if let Some(opening) = self.opening.take() {
            // Not aborted: a consumer that is half-made must be closed to give back what it has.
            tokio::spawn(async move {
                if let Ok(Ok(live)) = opening.await {
                    close(&live.connection).await;
                }
            });
        }
        let Some(live) = &mut self.live else { return };
        let cancel = live.channel.basic_cancel(live.consumer.tag(), BasicCancelOptions::default());
        let give_back = async {
            if cancel.await.is_err() {
                return; // The connection is gone, and with it the prefetched jobs.
            }
            // What was prefetched but not handed out goes back now, not at the end of the drain.
            while let Some(Ok(message)) = live.consumer.next().await {
                let requeue = BasicNackOptions { requeue: true, multiple: false };
                if message.acker.nack(requeue).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), give_back).await;
    }

    async fn close(&mut self) {
        if let Some(live) = self.live.take() {
            close(&live.connection).await;
        }
    }
}

struct AmqpSettle {
    acker: Acker,
    publisher: Arc<Publisher>,
    topology: Topology,
    properties: BasicProperties,
    headers: FieldTable,
    body: Vec<u8>,
    attempt: u32,
}

impl AmqpSettle {
    /// The message again, with our headers and without the broker's record of dead-lettering,
    /// which RabbitMQ before 4.0 would read as a cycle and drop the message.
    fn copy(&self, own: &[(&str, AMQPValue)]) -> BasicProperties {
        let stripped = |key: &str| {
            key == "x-death"
                || key.starts_with("x-first-death-")
                || key.starts_with("x-last-death-")
        };
        let kept: BTreeMap<ShortString, AMQPValue> = self
            .headers
            .inner()
            .iter()
            .filter(|(key, _)| !stripped(key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .chain(own.iter().map(|(key, value)| (short(key), value.clone())))
            .collect();
        self.properties
            .clone()
            .with_headers(FieldTable::from(kept))
            .with_delivery_mode(2)
            .with_type(JOB_TYPE.into())
    }

    async fn republish(&self, queue: &str, own: &[(&str, AMQPValue)]) -> bool {
        let published = self.publisher.publish(queue, &self.copy(own), &self.body).await;
        if published == Published::Unroutable {
            tracing::error!(queue, "the queue does not exist: the job goes back to its own");
        }
        published == Published::Confirmed
    }
}

#[async_trait]
impl Settle for AmqpSettle {
    async fn settle(self: Box<Self>, settlement: Settlement) {
        let text = |t: &str| AMQPValue::LongString(t.into());
        let done = match settlement {
            Settlement::Ack => true,
            Settlement::Requeue => false,
            Settlement::Retry { delay, error } => {
                let queue = self.topology.retry_queue(delay);
                let attempt = AMQPValue::LongUInt(self.attempt.saturating_add(1));
                self.republish(&queue, &[(ATTEMPT, attempt), (ERROR, text(&error))]).await
            }
            Settlement::DeadLetter(failure) => {
                let own = [
                    ("angler-reason", text(failure.code.as_str())),
                    ("angler-attempts", AMQPValue::LongUInt(self.attempt)),
                    (ERROR, text(&failure.message)),
                ];
                self.republish(&self.topology.dead, &own).await
            }
        };
        let settled = if done {
            self.acker.ack(BasicAckOptions::default()).await
        } else {
            self.acker.nack(BasicNackOptions { requeue: true, multiple: false }).await
        };
        if let Err(error) = settled {
            tracing::warn!("a delivery could not be settled and comes back: {error}");
        }
    }
}

/// A header table of string pairs.
pub(crate) fn headers<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in pairs {
        put(&mut table, key, value);
    }
    table
}
