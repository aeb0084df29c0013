//! A connection that jobs are consumed on, and what watches it.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer, Event};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::GIVE_BACK;
use super::acks::Acks;
use super::settle::Origin;
use crate::ask::{answer, look_at};
use crate::connect::connect_somewhere;
use crate::losses::Losses;
use crate::topology::Topology;
use crate::turn::{Turn, TurnError, is_locked};
use crate::{AmqpError, AmqpOptions, short};
use angler_core::pace::Pace;

/// How often the queue of suspects is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Jobs that the broker gave up and that are unacked at once.
const UNDELIVERABLE: u16 = 4;

/// Suspects that are unacked at once: one that runs, and those that are looked into.
const SUSPECTS: u16 = 64;

/// The largest frame unless the broker says otherwise.
pub(super) const FRAME_MAX: usize = 128 << 10;

pub(super) struct Live {
    /// The broker's address, for logs.
    pub broker: String,
    pub connection: Connection,
    pub consuming: Consuming,
    /// Of what is consumed.
    pub acks: Acks,
    /// `None` while the source is paused.
    pub consumers: Option<Consumers>,
    /// Where suspects are taken from, one at a time.
    pub suspects: Channel,
    /// Of what came on `suspects`.
    pub suspect_acks: Acks,
    /// The turn to run suspects, while this worker has it.
    pub turn: Option<Turn>,
    /// Cancelled with the connection.
    pub lost: CancellationToken,
    /// Cancels `lost` when the connection reports an error, even while nobody receives.
    _watch: AbortOnDropHandle<()>,
    _look: AbortOnDropHandle<()>,
    _acking: AbortOnDropHandle<()>,
    _acking_suspects: AbortOnDropHandle<()>,
}

impl Live {
    /// Returns how many bytes a frame has at most.
    pub fn frame_max(&self) -> usize {
        match self.connection.configuration().frame_max() {
            0 => FRAME_MAX, // No limit.
            bytes => bytes as usize,
        }
    }
}

/// Connects, declares the topology and consumes. `waiting` tells whether suspects wait.
pub(super) async fn open(
    options: &AmqpOptions,
    topology: &Topology,
    pace: &Pace,
    waiting: Arc<watch::Sender<bool>>,
    losses: &Arc<Losses>,
) -> Result<Live, AmqpError> {
    let (connection, address) = connect_somewhere(options, "consume").await?;
    for mismatch in topology.declare(&connection).await? {
        tracing::warn!("{mismatch}");
    }
    // From here on, since a refused declaration is an error of the connection's too.
    let lost = CancellationToken::new();
    let watch = watch_events(&connection, lost.clone());
    let suspects = connection.create_channel().await?;
    let look = look(connection.create_channel().await?, topology.suspects_queue(), waiting);
    let channel = connection.create_channel().await?;
    let has_undeliverable = look_at(&connection, &topology.undeliverable_queue()).await?.is_some();
    let consuming = Consuming {
        channel: channel.clone(),
        pace: pace.clone(),
        has_undeliverable,
        begun: Arc::default(),
    };
    let consumers = consuming.begin(topology, options).await?;
    // Those of a consumer that ended, and of the next one.
    let unacked = prefetch(pace.most()).saturating_mul(2).saturating_add(UNDELIVERABLE);
    let (acks, acking) = Acks::start(channel.clone(), unacked, Arc::clone(losses));
    let (suspect_acks, acking_suspects) =
        Acks::start(suspects.clone(), SUSPECTS, Arc::clone(losses));
    Ok(Live {
        broker: address.to_string(),
        connection,
        consuming,
        acks,
        consumers: Some(consumers),
        suspects,
        suspect_acks,
        turn: None,
        lost,
        _watch: watch,
        _look: look,
        _acking: acking,
        _acking_suspects: acking_suspects,
    })
}

impl Live {
    /// Asks to be the one worker that runs suspects.
    ///
    /// # Errors
    /// [`TurnError`].
    pub async fn take_turn(&mut self, queue: &str, losses: &Arc<Losses>) -> Result<(), TurnError> {
        if self.turn.is_none() {
            self.turn = Some(Turn::take(&self.connection, queue, Duration::ZERO).await?);
        }
        // It was closed after an answer that did not come.
        if !self.suspects.status().connected() {
            self.suspects = answer(self.connection.create_channel()).await?;
            (self.suspect_acks, self._acking_suspects) =
                Acks::start(self.suspects.clone(), SUSPECTS, Arc::clone(losses));
        }
        Ok(())
    }
}

/// What is consumed, and how.
#[derive(Clone)]
pub(super) struct Consuming {
    channel: Channel,
    /// Says how many jobs to prefetch.
    pace: Pace,
    /// Whether there is a queue of jobs that the broker gave up.
    has_undeliverable: bool,
    /// How often it began.
    begun: Arc<AtomicU64>,
}

impl Consuming {
    /// Begins to consume: acks by hand, competing consumers.
    pub async fn begin(
        &self,
        topology: &Topology,
        options: &AmqpOptions,
    ) -> Result<Consumers, AmqpError> {
        // A tag that was cancelled keeps its prefetch: of a quorum queue's consumers of the same tag, the next one
        // inherits what the one before has not acked, and each ack lets it have one more (seen on 3.10).
        let tag = match self.begun.fetch_add(1, Ordering::Relaxed) {
            0 => options.name.clone(),
            times => format!("{} {}", options.name, times + 1),
        };
        let jobs = self.consume(&topology.jobs, &tag, prefetch(self.pace.now())).await?;
        let undeliverable = match self.has_undeliverable {
            true => {
                let (queue, tag) = (topology.undeliverable_queue(), format!("{tag} undeliverable"));
                Some(self.consume(&queue, &tag, UNDELIVERABLE).await?)
            }
            false => None,
        };
        Ok(Consumers { before: VecDeque::new(), jobs, undeliverable })
    }

    /// Consumes with the prefetch of now. What the old consumers have is left to the new ones.
    ///
    /// A broker applies another prefetch to new consumers only, and one for the whole channel is not for
    /// quorum queues.
    ///
    /// # Errors
    /// If the connection or the queue is gone.
    pub async fn begin_again(
        &self,
        mut old: Consumers,
        topology: &Topology,
        options: &AmqpOptions,
    ) -> Result<Consumers, NotBegun> {
        if let Err(error) = self.end(&old).await {
            return Err(NotBegun { error, old: Some(old) });
        }
        old.before = old.rest().await;
        match self.begin(topology, options).await {
            Ok(new) => Ok(Consumers { before: old.before, ..new }),
            Err(error) => Err(NotBegun { error, old: Some(old) }),
        }
    }

    async fn consume(&self, queue: &str, tag: &str, prefetch: u16) -> Result<Consumer, AmqpError> {
        // Unacked deliveries at once, of the next consumer; the worker holds no more jobs than that.
        self.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let (by_hand, none) = (BasicConsumeOptions::default(), FieldTable::default());
        Ok(self.channel.basic_consume(short(queue), short(tag), by_hand, none).await?)
    }

    /// Ends what [`Self::begin`] began. Deliveries that came before are still in `consumers`.
    ///
    /// # Errors
    /// If the connection is gone.
    pub async fn end(&self, consumers: &Consumers) -> Result<(), AmqpError> {
        let Consumers { jobs, undeliverable, .. } = consumers;
        for consumer in std::iter::once(jobs).chain(undeliverable) {
            answer(self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()))
                .await?;
        }
        Ok(())
    }
}

/// Consumers that could not begin.
pub(super) struct NotBegun {
    pub error: AmqpError,
    /// With the deliveries that came before.
    pub old: Option<Consumers>,
}

impl From<AmqpError> for NotBegun {
    fn from(error: AmqpError) -> Self {
        Self { error, old: None }
    }
}

/// Consumers of jobs, and of jobs that the broker gave up.
pub(super) struct Consumers {
    /// Deliveries to the consumers before these.
    before: VecDeque<(Origin, Delivery)>,
    jobs: Consumer,
    undeliverable: Option<Consumer>,
}

impl Consumers {
    /// Returns the next delivery, and where it is from; `None` if the consumer of jobs has ended.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<(Origin, Delivery), lapin::Error>> {
        let Self { before, jobs, undeliverable } = self;
        if let Some(delivery) = before.pop_front() {
            return Some(Ok(delivery));
        }
        let given_up = async {
            match undeliverable {
                Some(consumer) => consumer.next().await,
                None => pending().await,
            }
        };
        let (origin, next) = tokio::select! {
            next = jobs.next() => (Origin::Jobs, next),
            next = given_up => (Origin::Undeliverable, next),
        };
        Some(next?.map(|delivery| (origin, delivery)))
    }

    /// Takes the deliveries to the consumers before these.
    pub fn take_before(&mut self) -> VecDeque<(Origin, Delivery)> {
        std::mem::take(&mut self.before)
    }

    /// Returns the deliveries that came before the consumers were cancelled, as far as they come soon.
    pub async fn rest(&mut self) -> VecDeque<(Origin, Delivery)> {
        let mut rest = self.take_before();
        let all = async {
            while let Some(Ok(delivery)) = self.jobs.next().await {
                rest.push_back((Origin::Jobs, delivery));
            }
            let Some(consumer) = &mut self.undeliverable else { return };
            while let Some(Ok(delivery)) = consumer.next().await {
                rest.push_back((Origin::Undeliverable, delivery));
            }
        };
        let _ = timeout(GIVE_BACK, all).await;
        rest
    }
}

/// Returns a prefetch. The setting is one, so the number fits.
fn prefetch(jobs: usize) -> u16 {
    u16::try_from(jobs).unwrap_or(u16::MAX)
}

/// Watches a connection's events and cancels `lost` when it ends.
fn watch_events(connection: &Connection, lost: CancellationToken) -> AbortOnDropHandle<()> {
    let mut events = Box::pin(connection.events_listener());
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(event) = events.next().await {
            if let Event::Error(error) = event {
                // Another worker has the turn.
                if is_locked(&error) {
                    continue;
                }
                tracing::warn!("the consuming connection is lost: {error}");
                break;
            }
        }
        lost.cancel();
    }))
}

/// Tells whether suspects wait. An error here is the connection's too, and ends it.
fn look(
    channel: Channel,
    queue: String,
    waiting: Arc<watch::Sender<bool>>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let looked = channel.queue_declare(short(&queue), passive, FieldTable::default()).await;
            let Ok(queue) = looked else { return };
            waiting.send_if_modified(|known| {
                let now = queue.message_count() > 0;
                std::mem::replace(known, now) != now
            });
            tokio::time::sleep(LOOK).await;
        }
    }))
}
