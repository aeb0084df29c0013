//! The publishing connection and its channels, one for each message in flight.

use std::sync::{Arc, MutexGuard, PoisonError};

use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::close;

/// The connection that is there, if one is.
#[derive(Default)]
pub(super) struct State {
    pub live: Option<Live>,
    /// Connections so far: of many callers who see one fail only the first replaces it.
    pub opened: u64,
}

type Idle = Arc<std::sync::Mutex<Vec<Channel>>>;

pub(super) struct Live {
    pub connection: Connection,
    /// Channels in confirm mode on which nothing is in flight. The last one used is used next, so
    /// that there are only as many as messages were ever in flight at once.
    idle: Idle,
    /// When the queues were last declared.
    pub declared: Instant,
    _watch: AbortOnDropHandle<()>,
}

/// A channel for one message. It is closed unless it is [given back](Lease::reuse): what is still in
/// flight on it must not be taken for the next message's confirm.
pub(super) struct Lease {
    pub channel: Channel,
    /// Where it returns to.
    idle: Idle,
    /// Which connection it is of.
    pub number: u64,
}

impl Lease {
    /// Keeps the channel for the next message. Nothing is in flight on it.
    pub fn reuse(self) {
        lock(&self.idle).push(self.channel);
    }
}

impl State {
    /// Takes a connection into use, whose queues were just declared.
    pub fn set_live(&mut self, connection: Connection, watch: AbortOnDropHandle<()>) {
        let (idle, declared) = (Idle::default(), Instant::now());
        self.live = Some(Live { connection, idle, declared, _watch: watch });
        self.opened += 1;
    }

    /// Returns a channel of the connection, or `None` without a connection that lives.
    pub async fn lease(&mut self) -> Result<Option<Lease>, lapin::Error> {
        let number = self.opened;
        let Some(live) = self.live.as_mut().filter(|l| l.connection.status().connected()) else {
            return Ok(None);
        };
        let idle = Arc::clone(&live.idle);
        loop {
            // A statement of its own, so that the lock is free again.
            let Some(channel) = lock(&idle).pop() else { break };
            if channel.status().connected() {
                return Ok(Some(Lease { channel, idle, number }));
            }
        }
        let channel = live.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Some(Lease { channel, idle, number }))
    }

    /// Ends the connection.
    pub async fn shut(&mut self) {
        if let Some(live) = self.live.take() {
            close(&live.connection).await;
        }
    }
}

/// Nothing panics while it holds the lock.
fn lock(idle: &std::sync::Mutex<Vec<Channel>>) -> MutexGuard<'_, Vec<Channel>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}
