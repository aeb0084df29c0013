//! The acks of one channel: one `basic.ack` for many deliveries where the order allows it.
//!
//! A task a channel takes what is settled and writes it. Nothing waits for company: what comes while
//! it writes is what the next write has. A job's settlement ends when its ack is written, so that a
//! suspect never starts while another job's ack is only on its way.
//!
//! `multiple` acks *everything* up to a tag. A broker numbers the deliveries of a channel 1, 2, 3…,
//! so that may be said of a tag only if each number up to it was settled: a delivery that lies in
//! the client's buffer, or was dropped on the way, is a number that is missing, and from there on
//! each delivery is acked by itself. None is held back until those before it are settled, which may
//! take as long as a job.
//!
//! A delivery that cannot be published anywhere is [handed back](PendingAck::requeue) to the broker or
//! [left to its dead-lettering](PendingAck::reject) instead, and one that is dropped is handed back.
//! That is rare: it is written before the acks that came with it, so that no `multiple` covers it.
//!
//! Tags mean something on their own channel only. A [`PendingAck`] knows its channel's task, which
//! ends with the connection; then the delivery comes back.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::try_join_all;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::losses::{JobCopy, Losses};

/// Hands out the acks of one channel.
#[derive(Clone)]
pub(super) struct Acks {
    settled: mpsc::Sender<Settled>,
    losses: Arc<Losses>,
}

/// The duty to ack one delivery, once it is safe elsewhere. Dropped: the delivery is handed back.
///
/// What comes back to the broker because of this process, whether it was handed back or its channel is
/// gone, is noted: this process lives.
pub(super) struct PendingAck {
    tag: u64,
    acks: Acks,
    /// What it is; `None` once it is settled.
    copy: Option<JobCopy>,
}

struct Settled {
    /// `None` only to learn that all before it is written.
    tag: Option<u64>,
    how: How,
    /// `None` if nobody waits.
    written: Option<oneshot::Sender<()>>,
}

/// What the broker does with a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It forgets the message.
    Ack,
    /// It puts the message back to the head of its queue.
    Requeue,
    /// It dead-letters the message, if the queue has a place for that.
    Reject,
}

impl Acks {
    /// Starts the task of a channel on which at most `prefetch` deliveries are unacked.
    pub fn start(
        channel: Channel,
        prefetch: u16,
        losses: Arc<Losses>,
    ) -> (Self, AbortOnDropHandle<()>) {
        // Each of them is settled once, and one call waits for all.
        let (settled, queue) = mpsc::channel(usize::from(prefetch.max(1)) + 1);
        let task = tokio::spawn(write(channel, queue));
        (Self { settled, losses }, AbortOnDropHandle::new(task))
    }

    /// Returns the ack of the delivery of this tag.
    pub fn pending(&self, tag: u64, copy: JobCopy) -> PendingAck {
        PendingAck { tag, acks: self.clone(), copy: Some(copy) }
    }

    /// Returns once all that was settled is written, or cannot be any more.
    pub async fn flushed(&self) {
        let (written, done) = oneshot::channel();
        let nothing = Settled { tag: None, how: How::Ack, written: Some(written) };
        if self.settled.send(nothing).await.is_ok() {
            let _ = done.await;
        }
    }
}

impl PendingAck {
    /// Returns once the ack is written, or cannot be any more: then the delivery comes back.
    pub async fn ack(self) {
        self.settle(How::Ack).await;
    }

    /// Hands the delivery back to the head of its queue. The broker counts that as one more delivery
    /// and marks it as redelivered.
    pub async fn requeue(self) {
        self.settle(How::Requeue).await;
    }

    /// Hands the delivery to the broker's own dead-lettering. A queue without that drops it.
    pub async fn reject(self) {
        self.settle(How::Reject).await;
    }

    /// Dropped before it is handed over, it is handed back; dropped later, it is written or not, and
    /// both are right for a delivery that is safe elsewhere.
    async fn settle(mut self, how: How) {
        let Ok(place) = self.acks.settled.reserve().await else { return };
        let (written, done) = oneshot::channel();
        place.send(Settled { tag: Some(self.tag), how, written: Some(written) });
        let Some(copy) = self.copy.take() else { return };
        if how == How::Requeue {
            self.acks.losses.note(copy);
        } else if done.await.is_err() {
            tracing::debug!(
                tag = self.tag,
                ?how,
                "not settled, its channel is gone: it comes back"
            );
            self.acks.losses.note(copy);
        }
    }
}

impl Drop for PendingAck {
    fn drop(&mut self) {
        let Some(copy) = self.copy.take() else { return };
        self.acks.losses.note(copy);
        // Without a channel the broker takes it back by itself.
        let back = Settled { tag: Some(self.tag), how: How::Requeue, written: None };
        let _ = self.acks.settled.try_send(back);
    }
}

/// Writes acks until the channel is gone. What is left in the queue is dropped with it, which tells
/// those who wait.
async fn write(channel: Channel, mut queue: mpsc::Receiver<Settled>) {
    let mut tags = Tags::default();
    let mut batch = Vec::new();
    let most = queue.max_capacity();
    while queue.recv_many(&mut batch, most).await > 0 {
        if let Err(error) = write_batch(&channel, &mut tags, &batch).await {
            // What was only handed back comes back anyway.
            if batch.iter().any(|settled| settled.written.is_some()) {
                tracing::warn!("deliveries could not be acked and come back: {error}");
            }
            return;
        }
        for written in batch.drain(..).filter_map(|settled: Settled| settled.written) {
            let _ = written.send(()); // Nobody may wait any more.
        }
    }
}

async fn write_batch(
    channel: &Channel,
    tags: &mut Tags,
    batch: &[Settled],
) -> Result<(), lapin::Error> {
    let mut acked = Vec::with_capacity(batch.len());
    for Settled { tag, how, .. } in batch {
        match (tag, how) {
            (None, _) => {}
            (Some(tag), How::Ack) => acked.push(*tag),
            (Some(tag), how) => {
                let requeue = *how == How::Requeue;
                channel.basic_nack(*tag, BasicNackOptions { multiple: false, requeue }).await?;
                tags.add(*tag);
            }
        }
    }
    // All in the client's queue before the first is awaited: they leave in one write.
    let written = tags
        .settle(acked)
        .into_iter()
        .map(|Ack { tag, multiple }| channel.basic_ack(tag, BasicAckOptions { multiple }));
    try_join_all(written).await.map(drop)
}

/// One `basic.ack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ack {
    tag: u64,
    /// Also for all tags before it.
    multiple: bool,
}

/// Which tags of a channel are settled.
#[derive(Debug, Default)]
struct Tags {
    /// All up to this one.
    through: u64,
    /// And these ranges beyond, first tag to last. Before each lies a tag that is not settled, which
    /// the broker counts against the prefetch: there are no more ranges than that.
    beyond: BTreeMap<u64, u64>,
}

impl Tags {
    /// The acks for tags that are settled now, each for the first time.
    fn settle(&mut self, mut settled: Vec<u64>) -> Vec<Ack> {
        settled.sort_unstable();
        settled.iter().for_each(|tag| self.add(*tag));
        let (prefix, beyond) =
            settled.split_at(settled.partition_point(|tag| *tag <= self.through));
        // The last of them and not `through`: a tag that is acked already is unknown to the broker,
        // which closes the channel over it.
        let prefix = prefix.last().map(|tag| Ack { tag: *tag, multiple: prefix.len() > 1 });
        let beyond = beyond.iter().map(|tag| Ack { tag: *tag, multiple: false });
        prefix.into_iter().chain(beyond).collect()
    }

    fn add(&mut self, tag: u64) {
        let last = self.beyond.remove(&(tag + 1)).unwrap_or(tag);
        if tag == self.through + 1 {
            self.through = last;
            return;
        }
        match self.beyond.range_mut(..tag).next_back() {
            Some((_, end)) if *end + 1 == tag => *end = last,
            _ => {
                self.beyond.insert(tag, last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn one(tag: u64) -> Ack {
        Ack { tag, multiple: false }
    }

    fn up_to(tag: u64) -> Ack {
        Ack { tag, multiple: true }
    }

    #[test]
    fn what_has_nothing_unsettled_before_it_is_acked_together_and_the_rest_singly() {
        let mut tags = Tags::default();
        assert_eq!(tags.settle(vec![1]), [one(1)]);
        assert_eq!(tags.settle(vec![4, 2, 3]), [up_to(4)]);
        assert_eq!(tags.settle(vec![6, 8]), [one(6), one(8)]);
        // 5 and 7 fill the gaps; 8, the last of all, is acked already.
        assert_eq!(tags.settle(vec![7, 5]), [up_to(7)]);
        assert_eq!(tags.settle(vec![9, 11, 10, 13]), [up_to(11), one(13)]);
        assert_eq!(tags.settle(vec![]), []);
    }

    #[test]
    fn what_was_handed_back_fills_its_gap_and_is_never_the_tag_of_an_ack() {
        let mut tags = Tags::default();
        tags.add(1);
        assert_eq!(tags.settle(vec![]), []);
        tags.add(4);
        assert_eq!(tags.settle(vec![3, 2]), [up_to(3)]);
        assert_eq!(tags.settle(vec![5]), [one(5)]);
    }

    #[test]
    fn a_tag_that_never_comes_makes_all_behind_it_single_and_takes_no_memory() {
        let mut tags = Tags::default();
        for tag in (2..10_000).step_by(2) {
            assert_eq!(tags.settle(vec![tag + 1, tag]), [one(tag), one(tag + 1)]);
        }
        assert_eq!((tags.through, tags.beyond.len()), (0, 1));
    }

    /// A broker's own books: it knows the deliveries that are unacked, refuses an ack for any other,
    /// and takes `multiple` at its word.
    struct Broker {
        unacked: BTreeSet<u64>,
        acked: BTreeSet<u64>,
    }

    impl Broker {
        fn ack(&mut self, Ack { tag, multiple }: Ack) {
            assert!(self.unacked.contains(&tag), "{tag} is unknown: the channel is closed");
            let acked = match multiple {
                true => self.unacked.iter().copied().take_while(|t| *t <= tag).collect(),
                false => BTreeSet::from([tag]),
            };
            self.unacked.retain(|t| !acked.contains(t));
            self.acked.extend(acked);
        }
    }

    #[test]
    fn whatever_the_order_exactly_what_is_settled_is_acked() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let prefetch = random.usize(1..40);
            let mut broker = Broker { unacked: BTreeSet::new(), acked: BTreeSet::new() };
            let mut tags = Tags::default();
            let (mut delivered, mut working, mut settled) = (0, Vec::new(), BTreeSet::new());
            let mut frames = 0;
            for _ in 0..300 {
                while broker.unacked.len() < prefetch {
                    delivered += 1;
                    broker.unacked.insert(delivered);
                    // Now and then one is dropped on the way, and stays unacked to the end.
                    if seed % 3 != 0 || random.u32(0..500) > 0 {
                        working.push(delivered);
                    }
                }
                random.shuffle(&mut working);
                let batch: Vec<u64> = working.split_off(random.usize(0..=working.len()));
                settled.extend(&batch);
                let acks = tags.settle(batch);
                frames += acks.len();
                acks.into_iter().for_each(|ack| broker.ack(ack));
                assert_eq!(broker.acked, settled, "seed {seed}");
                assert!(tags.beyond.len() <= prefetch, "seed {seed}: {tags:?}");
            }
            assert!(frames <= settled.len());
            let rest = std::mem::take(&mut working);
            settled.extend(&rest);
            tags.settle(rest).into_iter().for_each(|ack| broker.ack(ack));
            assert_eq!(broker.acked, settled, "seed {seed}");
        }
    }
}
