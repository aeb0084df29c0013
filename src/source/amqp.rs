//! Jobs from RabbitMQ.
//!
//! A lost connection ends its consumer; its deliveries can no longer be acked and come back, so
//! their `lost` token is cancelled and work on them stops. Then the loop connects anew.
//!
//! A delivery that came back to the broker before may be of a job that kills the process: see
//! [`apart`]. What a worker gives back on purpose is published again instead, and does not count.

mod acks;
mod apart;
mod incoming;
mod live;
mod settle;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream};
use lapin::types::FieldTable;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use self::incoming::Reader;
use self::live::{Consumers, FRAME_MAX, Live, open};
use self::settle::Message;
use super::{Delivery, JobSource};
use crate::amqp::losses::Losses;
use crate::amqp::publisher::Publisher;
use crate::amqp::topology::Topology;
use crate::amqp::turn::TurnError;
use crate::amqp::{AmqpError, AmqpOptions, Backoff, close, put};
use crate::error::FatalError;
use crate::health::Readiness;
use crate::job::JobLimits;

/// What giving back or moving messages may take when the broker does not answer: what is left
/// comes back with the end of the connection.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// How long the broker may take to answer whether it is this worker's turn. The worker receives nothing
/// meanwhile.
const TURN: Duration = Duration::from_secs(2);

/// Consumes the jobs queue.
pub struct AmqpSource {
    options: AmqpOptions,
    topology: Arc<Topology>,
    prefetch: u16,
    reader: Reader,
    losses: Arc<Losses>,
    readiness: Arc<Readiness>,
    live: Option<Live>,
    /// The attempt to become live. A task of its own, since calls of `receive` are dropped at any
    /// moment: a consumer that was dropped half-made would keep what was prefetched for it.
    opening: Option<JoinHandle<Result<Live, AmqpError>>>,
    /// The end of a pause, for the same reason.
    resuming: Option<JoinHandle<Result<Consumers, AmqpError>>>,
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
        Self {
            options,
            reader: Reader {
                publisher,
                topology: Arc::clone(&topology),
                limits,
                frame_max: FRAME_MAX,
            },
            topology,
            prefetch,
            losses,
            readiness,
            live: None,
            opening: None,
            resuming: None,
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
        let (prefetch, suspects) = (self.prefetch, Arc::clone(&self.suspects));
        let losses = Arc::clone(&self.losses);
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            open(&options, &topology, prefetch, suspects, &losses).await
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
                tokio::spawn(async move { consuming.begin(&topology, &options).await })
            });
            let resumed = self.resuming.insert(resuming).await;
            self.resuming = None;
            match (resumed, &mut self.live) {
                (Ok(Ok(consumers)), Some(live)) => {
                    self.readiness.set_consuming(&self.topology.jobs);
                    live.consumers = Some(consumers);
                }
                (Ok(Err(error)), _) => self.lose(&error.to_string()),
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
                        prefetch = self.prefetch,
                        "consuming"
                    );
                    self.readiness.set_broker(&self.topology.jobs, &live.broker);
                    self.readiness.set_consuming(&self.topology.jobs);
                    self.reader.frame_max = live.frame_max();
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
        let pause = self.backoff.next();
        self.opening = Some(self.open_after(pause));
    }

    /// Ends the consumer. What was prefetched but not handed out goes back now, not at the end of
    /// the drain; what cannot be given back in time comes back with the end of the connection.
    async fn end_consumer(&mut self) {
        self.resuming = None;
        let Some(live) = &mut self.live else { return };
        let Some(consumers) = live.consumers.take() else { return };
        match timeout(GIVE_BACK, live.consuming.end(&consumers)).await {
            Ok(Ok(())) => {}
            _ => return, // The connection is gone, and with it the prefetched jobs.
        }
        let (lost, acks) = (live.lost.clone(), live.acks.clone());
        let mut prefetched = Vec::new();
        let rest = timeout(GIVE_BACK, consumers.rest()).await.unwrap_or_default();
        for (origin, delivery) in rest {
            let incoming = self.reader.read(origin, delivery, &acks, lost.clone());
            if self.is_suspicious(&incoming) {
                self.look_into(incoming);
            } else {
                prefetched.push(incoming.message);
            }
        }
        let give_back = stream::iter(prefetched).for_each_concurrent(None, Message::give_back);
        let _ = timeout(GIVE_BACK, give_back).await;
    }
}

#[async_trait]
impl JobSource for AmqpSource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        if self.stopped {
            return Ok(None);
        }
        loop {
            self.consuming().await;
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
