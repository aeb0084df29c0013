//! A consumer that delivers a number of messages and no more, all of them unacked.
//!
//! That number is its prefetch. Once all are held, it is cancelled, which leaves them unacked, and the
//! next one on the same channel delivers what is behind them. The broker sends a window without being
//! asked for each message: tens of thousands per second, where `basic.get` manages some hundreds.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::{Instant, timeout};

use crate::ask::{answer, look};
use crate::{AmqpError, short};

/// The fewest messages of a window, also while their size is not known, and the most.
const FEWEST: usize = 16;
const MOST: usize = 512;
/// What the bodies of a window may take together, if they are no larger than those before.
const BYTES: usize = 32 << 20;
/// After this time without a message, look whether the queue is empty.
const LOOK: Duration = Duration::from_secs(1);
/// After this time without a message of a queue that is not empty, give up.
const SILENT: Duration = Duration::from_secs(15);

pub(super) struct Window {
    channel: Channel,
    queue: String,
    consumer: Consumer,
    size: usize,
    held: usize,
}

impl Window {
    /// Begins to consume; `largest` is the largest body so far.
    pub(super) async fn open(
        channel: &Channel,
        queue: &str,
        largest: Option<usize>,
    ) -> Result<Self, AmqpError> {
        let size = largest.map_or(FEWEST, |bytes| (BYTES / bytes.max(1)).clamp(FEWEST, MOST));
        answer(channel.basic_qos(size as u16, BasicQosOptions::default())).await?;
        let (by_hand, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(short(queue), "".into(), by_hand, none);
        let consumer = answer(consuming).await?;
        Ok(Self { channel: channel.clone(), queue: queue.to_owned(), consumer, size, held: 0 })
    }

    /// `true` if all its messages are held.
    pub(super) fn is_full(&self) -> bool {
        self.held >= self.size
    }

    /// One message was acked, so the broker sends another one.
    pub(super) fn make_room(&mut self) {
        self.held = self.held.saturating_sub(1);
    }

    /// The next message; `None` if the queue is empty.
    pub(super) async fn next(&mut self) -> Result<Option<Delivery>, AmqpError> {
        let end = Instant::now() + SILENT;
        loop {
            let next = timeout(LOOK, self.consumer.next()).await;
            if let Ok(Some(delivery)) = next {
                self.held += 1;
                return Ok(Some(delivery?));
            }
            // Also if the consumer has ended: then the queue or the channel is gone, which this says.
            if look(&self.channel, &self.queue).await?.ready == 0 {
                return Ok(None);
            }
            if next.is_ok() || Instant::now() >= end {
                return Err(AmqpError::Silent(SILENT.as_secs()));
            }
        }
    }

    /// Ends the consumer; yields the delivery tags of messages that were delivered and not read.
    pub(super) async fn close(mut self) -> Result<Vec<u64>, AmqpError> {
        let cancelling =
            self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        answer(cancelling).await?;
        let mut not_read = Vec::new();
        while let Ok(Some(delivery)) = timeout(LOOK, self.consumer.next()).await {
            not_read.push(delivery?.delivery_tag);
        }
        Ok(not_read)
    }
}
