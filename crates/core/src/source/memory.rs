//! A queue in memory that behaves as a broker does: what is not settled is delivered again.
//!
//! For tests: of the worker, and of every real source against the same rules.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use angler_wire::error::FatalError;
use angler_wire::job::{Job, JobLimits, id_of_malformed};

use super::{Delivery, JobSource, Reply, Settle, Settlement, Unsettled, Unworkable};

/// How often a message is dropped unsettled before it is a suspect.
const LOSSES: u32 = 2;

/// A shared queue; clones see the same messages.
#[derive(Clone, Default)]
pub struct MemoryQueue {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    /// Whether suspects wait; `None` if there are none: what is dropped unsettled just comes again.
    suspects: Option<Arc<watch::Sender<bool>>>,
    /// Whether a consumer has the turn to run suspects.
    turn: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Message>,
    suspects: VecDeque<Message>,
    unsettled: usize,
    settled: Vec<(Vec<u8>, Settlement)>,
    ended: bool,
}

#[derive(Debug, Clone)]
struct Message {
    body: Vec<u8>,
    attempt: u32,
    /// How often it was dropped unsettled.
    losses: u32,
    suspect: bool,
}

impl MemoryQueue {
    /// A queue that sets apart what was dropped unsettled twice, as the jobs queue of a broker does.
    pub fn with_suspects() -> Self {
        Self { suspects: Some(Arc::new(watch::Sender::new(false))), ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message at the end.
    pub fn push(&self, body: impl Into<Vec<u8>>) {
        let message = Message { body: body.into(), attempt: 1, losses: 0, suspect: false };
        self.state().waiting.push_back(message);
        self.changed.notify_waiters();
    }

    /// Puts back what was dropped unsettled.
    fn lose(&self, state: &mut State, mut message: Message) {
        message.losses += 1;
        message.suspect |= message.losses >= LOSSES;
        self.put_back(state, message);
    }

    fn put_back(&self, state: &mut State, message: Message) {
        match &self.suspects {
            Some(waiting) if message.suspect => {
                state.suspects.push_back(message);
                waiting.send_replace(true);
            }
            _ => state.waiting.push_front(message),
        }
    }

    /// No more messages will be pushed: a source ends once all are settled.
    pub fn end(&self) {
        self.state().ended = true;
        self.changed.notify_waiters();
    }

    /// How deliveries were settled so far, with the message of each.
    pub fn settled(&self) -> Vec<(Vec<u8>, Settlement)> {
        self.state().settled.clone()
    }

    /// Messages that wait or are delivered and unsettled.
    pub fn depth(&self) -> (usize, usize) {
        let state = self.state();
        (state.waiting.len() + state.suspects.len(), state.unsettled)
    }

    /// A consumer of this queue.
    pub fn source(&self, limits: JobLimits) -> MemorySource {
        MemorySource { queue: self.clone(), limits, stopped: false, has_turn: false }
    }
}

/// One consumer of a [`MemoryQueue`].
pub struct MemorySource {
    queue: MemoryQueue,
    limits: JobLimits,
    stopped: bool,
    has_turn: bool,
}

impl MemorySource {
    fn release(&mut self) {
        if std::mem::take(&mut self.has_turn) {
            self.queue.turn.store(false, Ordering::SeqCst);
        }
    }
}

impl Drop for MemorySource {
    fn drop(&mut self) {
        self.release();
    }
}

#[async_trait]
impl JobSource for MemorySource {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        loop {
            let changed = self.queue.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that a push in between is not missed.
            changed.as_mut().enable();
            {
                let mut state = self.queue.state();
                let empty = state.waiting.is_empty() && state.suspects.is_empty();
                if self.stopped || (state.ended && empty && state.unsettled == 0) {
                    return Ok(None);
                }
                if let Some(message) = state.waiting.pop_front() {
                    state.unsettled += 1;
                    return Ok(Some(self.delivery(message)));
                }
            }
            changed.await;
        }
    }

    fn suspects(&self) -> Option<watch::Receiver<bool>> {
        self.queue.suspects.as_ref().map(|suspects| suspects.subscribe())
    }

    async fn take_turn(&mut self) -> bool {
        self.has_turn = self.has_turn || !self.queue.turn.swap(true, Ordering::SeqCst);
        self.has_turn
    }

    async fn end_turn(&mut self) {
        self.release();
    }

    async fn receive_suspect(&mut self) -> Result<Option<Delivery>, FatalError> {
        let mut state = self.queue.state();
        let suspect = state.suspects.pop_front();
        state.unsettled += usize::from(suspect.is_some());
        if let Some(waiting) = &self.queue.suspects {
            waiting.send_replace(!state.suspects.is_empty());
        }
        drop(state);
        Ok(suspect.map(|message| self.delivery(message)))
    }

    async fn stop(&mut self) {
        self.stopped = true;
    }

    async fn close(&mut self) {}
}

impl MemorySource {
    fn delivery(&self, message: Message) -> Delivery {
        let job = Job::parse(&message.body, None, self.limits).map_err(|failure| Unworkable {
            id: id_of_malformed(&message.body, None),
            run: None,
            failure,
        });
        Delivery {
            job,
            queue: "memory".to_owned(),
            attempt: message.attempt,
            suspect: message.suspect,
            reply: Reply::default(),
            lost: CancellationToken::new(),
            settle: Box::new(MemorySettle { queue: self.queue.clone(), message: Some(message) }),
        }
    }
}

struct MemorySettle {
    queue: MemoryQueue,
    message: Option<Message>,
}

#[async_trait]
impl Settle for MemorySettle {
    async fn settle(mut self: Box<Self>, settlement: Settlement) -> Option<Unsettled> {
        let mut message = self.message.take()?;
        let mut state = self.queue.state();
        state.unsettled -= 1;
        state.settled.push((message.body.clone(), settlement.clone()));
        match settlement {
            Settlement::Ack | Settlement::DeadLetter(_) => {}
            Settlement::Requeue => self.queue.put_back(&mut state, message),
            Settlement::Retry { .. } => {
                (message.suspect, message.losses) = (false, 0);
                message.attempt += 1;
                state.waiting.push_back(message);
            }
        }
        drop(state);
        self.queue.changed.notify_waiters();
        None
    }
}

impl Drop for MemorySettle {
    /// Dropped unsettled, as when a worker dies: delivered again.
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            let mut state = self.queue.state();
            state.unsettled -= 1;
            self.queue.lose(&mut state, message);
            drop(state);
            self.queue.changed.notify_waiters();
        }
    }
}
