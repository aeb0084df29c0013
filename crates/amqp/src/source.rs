//! Jobs from RabbitMQ.
//!
//! A lost connection ends its consumer; its deliveries can no longer be acked and come back, so
//! their `lost` token is cancelled and work on them stops. Then the loop connects anew.
//!
//! A delivery that came back to the broker before may be of a job that kills the process: see
//! `apart`. What a worker gives back on purpose is published again instead, and does not count.

mod acks;
mod apart;
mod consumer;
mod incoming;
mod settle;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream};
use lapin::types::FieldTable;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use angler_core::pace::{Pace, Rule};
use angler_core::readiness::Readiness;
use angler_core::source::{Delivery, JobSource};
use angler_wire::error::FatalError;
use angler_wire::job::JobLimits;
use angler_wire::text::chain;

use crate::losses::Losses;
use crate::publisher::Publisher;
use crate::source::acks::Acks;
use crate::source::consumer::{Consumers, FRAME_MAX, Live, NotBegun, open};
use crate::source::incoming::Reader;
use crate::source::settle::{Message, Origin};
use crate::topology::Topology;
use crate::turn::TurnError;
use crate::{AmqpError, AmqpOptions, Backoff, close, put};

/// What giving back or moving messages may take when the broker does not answer: what is left
/// comes back with the end of the connection.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// The jobs that a worker holds should be finished within this time. What it holds longer, another worker
/// might have begun, and the broker takes away after its `consumer_timeout`.
const WITHIN: Duration = Duration::from_secs(60);

/// The jobs that their rate is measured over.
const ENDS: u32 = 8;

/// How long the broker may take to answer whether it is this worker's turn. The worker receives nothing
/// meanwhile.
const TURN: Duration = Duration::from_secs(2);

/// Consumes the jobs queue.
pub struct AmqpSource {
    options: AmqpOptions,
    topology: Arc<Topology>,
    /// How many jobs to prefetch.
    pace: Pace,
    reader: Reader,
    losses: Arc<Losses>,
    readiness: Arc<Readiness>,
    live: Option<Live>,
    /// The attempt to become live. A task of its own, since calls of `receive` are dropped at any
    /// moment: a consumer that was dropped half-made would keep what was prefetched for it.
    opening: Option<JoinHandle<Result<Live, AmqpError>>>,
    /// The end of a pause, or a change of the prefetch, for the same reason.
    resuming: Option<JoinHandle<Result<Consumers, NotBegun>>>,
    /// Whether the resumed consumers prefetch less than the ones before, whose deliveries then go back.
    shrinking: bool,
    /// Whether suspects wait.
    suspects: Arc<watch::Sender<bool>>,
    /// Messages that came back and are looked into, each of which may be handed out then. The prefetch
    /// and [`live::SUSPECTS`] bound them.
    judging: JoinSet<Option<Delivery>>,
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
        let losses = Arc::new(Losses::new(options.clone(), topology.clone()));
        let topology = Arc::new(topology);
        let most = usize::from(prefetch.max(1));
        let pace = Pace::new(Rule { within: WITHIN, least: 1, most, ends: ENDS });
        Self {
            options,
            reader: Reader {
                publisher,
                topology: Arc::clone(&topology),
                limits,
                frame_max: FRAME_MAX,
                pace: pace.clone(),
            },
            topology,
            pace,
            losses,
            readiness,
            live: None,
            opening: None,
            resuming: None,
            shrinking: false,
            suspects: Arc::new(watch::Sender::new(false)),
            judging: JoinSet::new(),
            backoff: Backoff::default(),
            stopped: false,
        }
    }

    /// Remembers the deliveries that it loses in `losses`, and not for itself alone.
    #[must_use]
    pub fn with_losses(mut self, losses: Arc<Losses>) -> Self {
        self.losses = losses;
        self
    }

    /// Begins an attempt to connect and consume after a pause.
    fn open_after(&self, pause: Duration) -> JoinHandle<Result<Live, AmqpError>> {
        let (options, topology) = (self.options.clone(), Arc::clone(&self.topology));
        let (pace, suspects) = (self.pace.clone(), Arc::clone(&self.suspects));
        let losses = Arc::clone(&self.losses);
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            open(&options, &topology, &pace, suspects, &losses).await
        })
    }

    /// Connects and consumes until it works. Dropping the call in between loses nothing.
    async fn consuming(&mut self) {
        loop {
            self.connected().await;
            let Some(live) = &self.live else { continue };
            if live.consumers.is_some() {
                return;
            }
            let resuming = self.resuming.take().unwrap_or_else(|| {
                let (consuming, topology) = (live.consuming.clone(), Arc::clone(&self.topology));
                let options = self.options.clone();
                tokio::spawn(async move { Ok(consuming.begin(&topology, &options).await?) })
            });
            let resumed = self.resuming.insert(resuming).await;
            self.resuming = None;
            match (resumed, &mut self.live) {
                (Ok(Ok(consumers)), Some(live)) => {
                    self.readiness.set_consuming(&self.topology.jobs);
                    live.consumers = Some(consumers);
                }
                (Ok(Err(NotBegun { error, old })), live) => {
                    if let Some(live) = live {
                        live.consumers = old;
                    }
                    self.lose(&error.to_string());
                }
                (Err(panic), _) => self.lose(&panic.to_string()),
                (Ok(Ok(_)), None) => {}
            }
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
                        prefetch = self.pace.now(),
                        "consuming"
                    );
                    self.readiness.set_broker(&self.topology.jobs, &live.broker);
                    self.readiness.set_consuming(&self.topology.jobs);
                    self.reader.frame_max = live.frame_max();
                    self.live = Some(live);
                }
                Ok(Err(error)) => self.try_again(&chain(&error)),
                Err(panic) => self.try_again(&panic.to_string()),
            }
        }
    }

    fn try_again(&mut self, error: &str) {
        let pause = self.backoff.pause();
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
        self.shrinking = false;
        if let Some(mut live) = self.live.take() {
            live.lost.cancel();
            // What was prefetched is lost as well, and noted.
            let consumers = live.consumers.as_mut();
            let buffered = consumers.into_iter().flat_map(|consumers| {
                std::iter::from_fn(|| consumers.next().now_or_never().flatten()?.ok())
            });
            for (origin, delivery) in buffered {
                drop(self.reader.read(origin, delivery, &live.acks, live.lost.clone()));
            }
            // Closed beside the way; a broker that is gone does not answer.
            tokio::spawn(async move { close(&live.connection).await });
        }
        let pause = self.backoff.pause();
        self.opening = Some(self.open_after(pause));
    }

    /// Begins to consume with another prefetch if the rate of jobs says so, and returns whether it does.
    fn follow_rate(&mut self) -> bool {
        let Some(live) = self.live.as_mut().filter(|live| live.consumers.is_some()) else {
            return false;
        };
        let Some((before, now)) = self.pace.change() else { return false };
        tracing::info!(
            queue = self.topology.jobs,
            before,
            prefetch = now,
            seconds_per_job = self.pace.seconds_each(),
            "the prefetch follows the rate of jobs"
        );
        self.shrinking = now < before;
        let (consuming, consumers) = (live.consuming.clone(), live.consumers.take());
        let (topology, options) = (Arc::clone(&self.topology), self.options.clone());
        self.resuming = consumers.map(|old| {
            tokio::spawn(async move { consuming.begin_again(old, &topology, &options).await })
        });
        true
    }

    /// Gives back the jobs of a prefetch that was larger.
    fn give_back_surplus(&mut self) {
        let Some(live) = self.live.as_mut().filter(|_| std::mem::take(&mut self.shrinking)) else {
            return;
        };
        let (acks, lost) = (live.acks.clone(), live.lost.clone());
        let surplus = live.consumers.as_mut().map(Consumers::take_before).unwrap_or_default();
        let surplus = self.not_begun(surplus, &acks, &lost);
        self.judging.spawn(async move {
            give_back(surplus).await;
            None
        });
    }

    /// Returns the messages that go back as they came. Suspicious ones are looked into instead.
    fn not_begun(
        &mut self,
        prefetched: impl IntoIterator<Item = (Origin, lapin::message::Delivery)>,
        acks: &Acks,
        lost: &CancellationToken,
    ) -> Vec<Message> {
        let mut unsuspicious = Vec::new();
        for (origin, delivery) in prefetched {
            let incoming = self.reader.read(origin, delivery, acks, lost.clone());
            if self.is_suspicious(&incoming) {
                self.look_into(incoming);
            } else {
                unsuspicious.push(incoming.message);
            }
        }
        unsuspicious
    }

    /// Ends the consumer. What was prefetched but not handed out goes back now, not at the end of
    /// the drain; what cannot be given back in time comes back with the end of the connection.
    async fn end_consumer(&mut self) {
        let resuming = self.resuming.take();
        let Some(live) = &mut self.live else { return };
        // Consumers that are half-made would keep what was prefetched for them.
        if let Some(resuming) = resuming
            && let Ok(Ok(Ok(consumers))) = timeout(GIVE_BACK, resuming).await
        {
            live.consumers = Some(consumers);
        }
        let Some(mut consumers) = live.consumers.take() else { return };
        match timeout(GIVE_BACK, live.consuming.end(&consumers)).await {
            Ok(Ok(())) => {}
            _ => return, // The connection is gone, and with it the prefetched jobs.
        }
        let (lost, acks) = (live.lost.clone(), live.acks.clone());
        let prefetched = self.not_begun(consumers.rest().await, &acks, &lost);
        give_back(prefetched).await;
    }
}

/// Gives messages back. What takes too long is dropped, which hands it back to the head of its queue.
async fn give_back(messages: Vec<Message>) {
    let all = stream::iter(messages).for_each_concurrent(None, Message::give_back);
    let _ = timeout(GIVE_BACK, all).await;
}

#[async_trait]
impl JobSource for AmqpSource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        if self.stopped {
            return Ok(None);
        }
        loop {
            self.consuming().await;
            self.give_back_surplus();
            if self.follow_rate() {
                continue;
            }
            let Self { live: Some(live), judging, .. } = self else { continue };
            let Live { consumers: Some(consumers), acks, lost, .. } = live else { continue };
            let (acks, lost) = (acks.clone(), lost.clone());
            let next = tokio::select! {
                Some(judged) = judging.join_next() => match judged {
                    Ok(Some(delivery)) if !delivery.lost.is_cancelled() => return Ok(Some(delivery)),
                    _ => continue,
                },
                next = consumers.next() => next,
                () = lost.cancelled() => None,
            };
            match next {
                Some(Ok((origin, delivery))) => {
                    self.backoff.reset();
                    let incoming = self.reader.read(origin, delivery, &acks, lost);
                    if let Some(delivery) = self.consider(incoming) {
                        return Ok(Some(delivery));
                    }
                }
                Some(Err(error)) => self.lose(&error.to_string()),
                None => self.lose("cancelled by the broker, or its connection is gone"),
            }
        }
    }

    fn suspects(&self) -> Option<watch::Receiver<bool>> {
        Some(self.suspects.subscribe())
    }

    async fn take_turn(&mut self) -> bool {
        let Some(live) = self.live.as_mut().filter(|_| !self.stopped) else { return false };
        let queue = self.topology.suspects_turn();
        match timeout(TURN, live.take_turn(&queue, &self.losses)).await {
            Ok(Ok(())) => true,
            Ok(Err(TurnError::Busy { .. })) => false,
            Ok(Err(TurnError::Amqp(error))) => {
                tracing::debug!(queue, "suspects wait: {error}");
                false
            }
            Err(_) => {
                tracing::debug!(queue, "suspects wait: the broker does not answer");
                false
            }
        }
    }

    async fn end_turn(&mut self) {
        let Some(turn) = self.live.as_mut().and_then(|live| live.turn.take()) else { return };
        // Beside the way: it ends with the connection at the latest.
        tokio::spawn(async move {
            if let Err(error) = turn.end().await {
                tracing::debug!("the turn to run suspects was not ended: {error}");
            }
        });
    }

    async fn receive_suspect(&mut self) -> Result<Option<Delivery>, FatalError> {
        let suspect = match self.stopped {
            true => None,
            false => self.next_suspect().await,
        };
        if suspect.is_none() {
            // None left; or the connection is gone, which its watch says.
            self.suspects.send_replace(false);
        }
        Ok(suspect)
    }

    async fn pause(&mut self, reason: &'static str) {
        self.readiness.set_paused(&self.topology.jobs, reason);
        self.end_consumer().await;
        // Looked into again when it is delivered again.
        self.judging.shutdown().await;
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
        let judged = async { while self.judging.join_next().await.is_some() {} };
        let _ = timeout(GIVE_BACK, judged).await;
        self.judging.shutdown().await;
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
