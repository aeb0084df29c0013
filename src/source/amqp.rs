//! Jobs from RabbitMQ.
//!
//! A lost connection ends its consumer; its deliveries can no longer be acked and come back, so
//! their `lost` token is cancelled and work on them stops. Then the loop connects anew.
//!
//! A delivery that came back to the broker before was held by a worker that died or lost its
//! connection, and may be what killed it. After the second time it is moved to a queue of its own,
//! whose jobs run alone ([`JobSource::receive_suspect`]): there the broker counts how often *this* job
//! was held when its worker ended, and no innocent job is ever counted with it. What a worker gives back
//! on purpose is published again instead, and does not count.

mod acks;
mod live;
mod settle;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use lapin::Consumer;
use lapin::options::{BasicCancelOptions, BasicGetOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::acks::{Acks, PendingAck};
use self::live::{Live, consume, open};
use self::settle::{ATTEMPT, Message};
use super::{Delivery, JobSource, Reply, Unworkable};
use crate::amqp::publisher::Publisher;
use crate::amqp::sanitize::UNPARSABLE;
use crate::amqp::topology::Topology;
use crate::amqp::{
    ACQUIRED_COUNT, AmqpError, AmqpOptions, Backoff, DELIVERY_COUNT, close, number_header, put,
    short, string_header,
};
use crate::error::{Failure, FailureCode, FatalError};
use crate::health::Readiness;
use crate::job::{Job, JobLimits, id_of_malformed};

/// How many deliveries of a job among others have to come back before it is set apart. A connection
/// that breaks returns all jobs of its worker, and rarely the same ones twice.
const LOSSES: i64 = 2;

/// How often a suspect runs alone before it is given up. With the runs among others that made it one,
/// a job kills at most five workers.
const SUSPECT_RUNS: i64 = 3;

/// What giving back or moving messages may take when the broker does not answer: what is left
/// comes back with the end of the connection.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// The longest `traceparent` that is read and echoed. The standard's has 55 bytes; later ones may add to it.
const TRACEPARENT_BYTES: usize = 512;

/// Consumes the jobs queue.
pub struct AmqpSource {
    options: AmqpOptions,
    topology: Arc<Topology>,
    prefetch: u16,
    limits: JobLimits,
    publisher: Arc<Publisher>,
    readiness: Arc<Readiness>,
    live: Option<Live>,
    /// The attempt to become live. A task of its own, since calls of `receive` are dropped at any
    /// moment: a consumer that was dropped half-made would keep what was prefetched for it.
    opening: Option<JoinHandle<Result<Live, AmqpError>>>,
    /// The end of a pause, for the same reason.
    resuming: Option<JoinHandle<Result<Consumer, AmqpError>>>,
    /// Whether suspects wait.
    suspects: Arc<watch::Sender<bool>>,
    /// Redelivered messages on their way to the queue of suspects; the prefetch bounds them.
    moving: JoinSet<()>,
    /// Grows while consumers end without having delivered anything.
    backoff: Backoff,
    stopped: bool,
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
        // Not ready before each queue is consumed.
        readiness.set_lost(&topology.jobs, "");
        Self {
            options,
            topology: Arc::new(topology),
            prefetch,
            limits,
            publisher,
            readiness,
            live: None,
            opening: None,
            resuming: None,
            suspects: Arc::new(watch::Sender::new(false)),
            moving: JoinSet::new(),
            backoff: Backoff::default(),
            stopped: false,
        }
    }

    /// Begins an attempt to connect and consume after a pause.
    fn open_after(&self, pause: Duration) -> JoinHandle<Result<Live, AmqpError>> {
        let (options, topology) = (self.options.clone(), Arc::clone(&self.topology));
        let (prefetch, suspects) = (self.prefetch, Arc::clone(&self.suspects));
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            open(&options, &topology, prefetch, suspects).await
        })
    }

    /// Connects and consumes until it works. Dropping the call in between loses nothing.
    async fn consumer(&mut self) -> (&mut Consumer, Acks, CancellationToken) {
        loop {
            self.connected().await;
            let Some(live) = &self.live else { continue };
            if live.consumer.is_some() {
                break;
            }
            let resuming = self.resuming.take().unwrap_or_else(|| {
                let (channel, topology) = (live.channel.clone(), Arc::clone(&self.topology));
                let options = self.options.clone();
                tokio::spawn(async move { consume(&channel, &topology, &options).await })
            });
            let resumed = self.resuming.insert(resuming).await;
            self.resuming = None;
            match (resumed, &mut self.live) {
                (Ok(Ok(consumer)), Some(live)) => {
                    self.readiness.set_consuming(&self.topology.jobs);
                    live.consumer = Some(consumer);
                }
                (Ok(Err(error)), _) => self.lose(&error.to_string()),
                (Err(panic), _) => self.lose(&panic.to_string()),
                (Ok(Ok(_)), None) => {}
            }
        }
        match &mut self.live {
            Some(Live { consumer: Some(consumer), acks, lost, .. }) => {
                (consumer, acks.clone(), lost.clone())
            }
            _ => unreachable!("the loop above ends only with a consumer"),
        }
    }

    async fn connected(&mut self) {
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
                        broker = live.broker,
                        prefetch = self.prefetch,
                        "consuming"
                    );
                    self.readiness.set_broker(&self.topology.jobs, &live.broker);
                    self.readiness.set_consuming(&self.topology.jobs);
                    self.live = Some(live);
                }
                Ok(Err(error)) => self.try_again(&error.to_string()),
                Err(panic) => self.try_again(&panic.to_string()),
            }
        }
    }

    fn try_again(&mut self, error: &str) {
        let pause = self.backoff.next();
        self.readiness.set_lost(&self.topology.jobs, error);
        tracing::warn!(
            pause_seconds = pause.as_secs_f64(),
            "jobs cannot be consumed, the broker is tried again: {error}"
        );
        self.opening = Some(self.open_after(pause));
    }

    fn lose(&mut self, reason: &str) {
        tracing::warn!("the consumer ended and is started anew: {reason}");
        self.readiness.set_lost(&self.topology.jobs, reason);
        self.suspects.send_replace(false);
        if let Some(live) = self.live.take() {
            live.lost.cancel();
            // Closed beside the way; a broker that is gone does not answer.
            tokio::spawn(async move { close(&live.connection).await });
        }
        let pause = self.backoff.next();
        self.opening = Some(self.open_after(pause));
    }

    /// A message with the duty to settle it.
    fn message(
        &self,
        delivery: lapin::message::Delivery,
        ack: PendingAck,
        suspect: bool,
    ) -> Message {
        let lapin::message::Delivery { properties, data, .. } = delivery;
        let headers = properties.headers().as_ref();
        let attempt = headers
            .and_then(|headers| number_header(headers, ATTEMPT))
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0)
            .unwrap_or(1);
        Message {
            ack,
            publisher: Arc::clone(&self.publisher),
            topology: Arc::clone(&self.topology),
            suspect,
            properties,
            body: data,
            attempt,
        }
    }

    fn delivery(&self, message: Message, lost: CancellationToken) -> Delivery {
        let Message { properties, body, attempt, suspect, .. } = &message;
        let headers = properties.headers().as_ref();
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        let message_id = text(properties.message_id());
        let (attempt, suspect) = (*attempt, *suspect);
        let reply = Reply {
            to: text(properties.reply_to()).filter(|q| !q.is_empty()),
            correlation_id: text(properties.correlation_id()),
            traceparent: headers
                .and_then(|headers| string_header(headers, "traceparent"))
                .filter(|text| text.len() <= TRACEPARENT_BYTES),
        };
        let mut job = Job::parse(body, message_id.as_deref(), self.limits).map_err(|failure| {
            Unworkable { id: id_of_malformed(body, message_id.as_deref()), run: None, failure }
        });
        if let Some(problem) = headers.and_then(|headers| string_header(headers, UNPARSABLE)) {
            let (id, run) = job.map_or_else(|job| (job.id, job.run), |job| (job.id, job.run));
            job = Err(Unworkable { id, run, failure: unparsable(&problem) });
        }
        let runs = headers.and_then(|headers| number_header(headers, DELIVERY_COUNT)).unwrap_or(0);
        if suspect && runs >= SUSPECT_RUNS {
            job = job.and_then(|job| {
                Err(Unworkable { id: job.id, run: job.run, failure: given_up(runs) })
            });
        }
        let queue = match suspect {
            true => self.topology.suspects_queue(),
            false => self.topology.jobs.clone(),
        };
        Delivery { job, queue, attempt, suspect, reply, settle: Box::new(message), lost }
    }

    /// Moves a redelivered message to the queue of suspects, beside the way of the others.
    fn set_apart(&mut self, message: Message, lost: CancellationToken) {
        while self.moving.try_join_next().is_some() {}
        tracing::info!(
            job = message.properties.message_id().as_ref().map(ShortString::as_str),
            queue = self.topology.suspects_queue(),
            "delivered again: workers ended while they held this job, which now runs alone"
        );
        self.moving.spawn(async move {
            lost.run_until_cancelled(Box::pin(message.set_apart())).await;
        });
    }

    /// Ends the consumer. What was prefetched but not handed out goes back now, not at the end of
    /// the drain; what cannot be given back in time comes back with the end of the connection.
    async fn end_consumer(&mut self) {
        self.resuming = None;
        let Some(live) = &mut self.live else { return };
        let Some(mut consumer) = live.consumer.take() else { return };
        let cancel = live.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        match timeout(GIVE_BACK, cancel).await {
            Ok(Ok(())) => {}
            _ => return, // The connection is gone, and with it the prefetched jobs.
        }
        let (lost, acks) = (live.lost.clone(), live.acks.clone());
        let mut prefetched = Vec::new();
        while let Ok(Some(Ok(delivery))) = timeout(GIVE_BACK, consumer.next()).await {
            let (is_suspect, ack) = (is_suspect(&delivery), acks.pending(delivery.delivery_tag));
            let message = self.message(delivery, ack, false);
            if is_suspect {
                self.set_apart(message, lost.clone());
            } else {
                prefetched.push(message);
            }
        }
        let give_back = stream::iter(prefetched).for_each_concurrent(None, Message::give_back);
        let _ = timeout(GIVE_BACK, give_back).await;
    }
}

/// Returns whether a delivery came back so often that its job has to run alone.
fn is_suspect(delivery: &lapin::message::Delivery) -> bool {
    if !delivery.redelivered {
        return false;
    }
    let headers = delivery.properties.headers().as_ref();
    let count = |key| headers.and_then(|headers| number_header(headers, key));
    match (count(DELIVERY_COUNT), count(ACQUIRED_COUNT)) {
        (Some(losses), _) => losses >= LOSSES,
        // From 4.0 on: it was only handed back.
        (None, Some(_)) => false,
        // A classic queue does not count.
        (None, None) => true,
    }
}

/// Why a suspect is not run again.
fn given_up(runs: i64) -> Failure {
    Failure::new(
        FailureCode::RetriesExhausted,
        format!(
            "a worker ended each time that it worked on this job: among others, and then {runs} times \
             alone. An image of it may be what kills the process; the workers' logs and the system's \
             (out of memory?) say more"
        ),
    )
}

/// Why a message is not worked on whose properties [`crate::amqp::sanitize`] had to rewrite.
fn unparsable(problem: &str) -> Failure {
    let message = format!("the message's properties cannot be parsed: {problem}");
    Failure::new(FailureCode::MalformedJob, message)
}

#[async_trait]
impl JobSource for AmqpSource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        if self.stopped {
            return Ok(None);
        }
        loop {
            let (consumer, acks, lost) = self.consumer().await;
            let next = tokio::select! {
                next = consumer.next() => next,
                () = lost.cancelled() => None,
            };
            match next {
                Some(Ok(delivery)) => {
                    self.backoff.reset();
                    let is_suspect = is_suspect(&delivery);
                    let ack = acks.pending(delivery.delivery_tag);
                    let message = self.message(delivery, ack, false);
                    if is_suspect {
                        self.set_apart(message, lost);
                        continue;
                    }
                    return Ok(Some(self.delivery(message, lost)));
                }
                Some(Err(error)) => self.lose(&error.to_string()),
                None => self.lose("cancelled by the broker, or its connection is gone"),
            }
        }
    }

    fn suspects(&self) -> Option<watch::Receiver<bool>> {
        Some(self.suspects.subscribe())
    }

    async fn receive_suspect(&mut self) -> Result<Option<Delivery>, FatalError> {
        let queue = self.topology.suspects_queue();
        let Some(live) = self.live.as_ref().filter(|_| !self.stopped) else {
            self.suspects.send_replace(false);
            return Ok(None);
        };
        let by_hand = BasicGetOptions::default();
        let got = timeout(GIVE_BACK, live.suspects.basic_get(short(&queue), by_hand)).await;
        let Ok(Ok(Some(got))) = got else {
            // None left; or the connection is gone, which its watch says.
            self.suspects.send_replace(false);
            return Ok(None);
        };
        let lost = live.lost.clone();
        let ack = live.suspect_acks.pending(got.delivery.delivery_tag);
        let message = self.message(got.delivery, ack, true);
        Ok(Some(self.delivery(message, lost)))
    }

    async fn pause(&mut self, reason: &'static str) {
        self.readiness.set_paused(&self.topology.jobs, reason);
        self.end_consumer().await;
    }

    async fn stop(&mut self) {
        self.stopped = true;
        if self.live.is_some() {
            self.readiness.set_paused(&self.topology.jobs, "the worker is stopping");
        }
        if let Some(opening) = self.opening.take() {
            // Not aborted: a consumer that is half-made must be closed to give back what it has.
            tokio::spawn(async move {
                if let Ok(Ok(live)) = opening.await {
                    close(&live.connection).await;
                }
            });
        }
        self.end_consumer().await;
    }

    async fn close(&mut self) {
        let moved = async { while self.moving.join_next().await.is_some() {} };
        let _ = timeout(GIVE_BACK, moved).await;
        self.moving.shutdown().await;
        if let Some(live) = self.live.take() {
            // Also what was settled by a job that was dropped before it heard of its ack.
            let flushed = async { tokio::join!(live.acks.flushed(), live.suspect_acks.flushed()) };
            let _ = timeout(GIVE_BACK, flushed).await;
            close(&live.connection).await;
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
