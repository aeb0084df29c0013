//! Why the broker takes no messages for now: it is short of memory or disk.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::{Connection, Event};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::refused;

/// The reason for which the broker blocks publishers, as long as it does.
pub(super) struct Blocked(watch::Sender<Option<String>>);

impl Default for Blocked {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Blocked {
    pub fn subscribe(&self) -> watch::Receiver<Option<String>> {
        self.0.subscribe()
    }

    /// Follows what the broker says of this connection, which is new.
    pub fn watch(&self, connection: &Connection) -> AbortOnDropHandle<()> {
        self.0.send_replace(None);
        let mut events = Box::pin(connection.events_listener());
        let blocked = self.0.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!("the broker blocks publishers, results wait: {reason}");
                        blocked.send_replace(Some(reason.to_string()));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker takes messages again");
                        blocked.send_replace(None);
                    }
                    // Of a channel; the connection lives.
                    Event::Error(error) if refused(&error).is_some() => {}
                    Event::Error(_) => break, // Anyone who publishes meets it.
                    _ => {}
                }
            }
            blocked.send_replace(None);
        }))
    }

    /// Returns whether there has been a reason for longer than `limit`, as that changes.
    pub fn longer_than(&self, limit: Duration) -> watch::Receiver<bool> {
        let (blocked, (told, long)) = (self.0.subscribe(), watch::channel(false));
        tokio::spawn(async move {
            tokio::select! {
                () = tell_long_blocks(blocked, &told, limit) => {}
                () = told.closed() => {}
            }
        });
        long
    }
}

/// Tells whether `blocked` has had a reason for longer than `limit`, until the publisher is gone.
async fn tell_long_blocks(
    mut blocked: watch::Receiver<Option<String>>,
    told: &watch::Sender<bool>,
    limit: Duration,
) {
    while blocked.wait_for(Option::is_some).await.is_ok() {
        if timeout(limit, blocked.wait_for(Option::is_none)).await.is_ok() {
            continue;
        }
        told.send_replace(true);
        let _ = blocked.wait_for(Option::is_none).await;
        told.send_replace(false);
    }
}
