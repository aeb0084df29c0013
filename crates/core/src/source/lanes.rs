//! Several queues of jobs as one source: each has its share, and none waits behind another's backlog.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996): a lane's tag grows by a job's images over
//! the lane's weight, and the job with the smallest start tag is next. A lane that had no job does
//! not save up: its next job starts at the tag of whatever was served last. So a job that comes to an
//! idle lane is the next one that is admitted, however long the others' queues are.

use std::future::poll_fn;
use std::task::Poll;

use async_trait::async_trait;
use futures_util::future::{join_all, select_all};
use tokio::sync::watch;

use angler_wire::error::FatalError;

use super::{Delivery, JobSource};

/// Serves several sources by weight.
pub struct Lanes {
    lanes: Vec<Lane>,
    /// The start tag of the job that was served last.
    now: f64,
}

struct Lane {
    source: Box<dyn JobSource>,
    weight: f64,
    /// Where its next job starts, unless it is idle for longer.
    tag: f64,
    ended: bool,
    /// Whether it is this worker's turn to run the lane's suspects.
    has_turn: bool,
}

impl Lane {
    fn has_suspects(&self) -> bool {
        self.source.suspects().is_some_and(|waiting| *waiting.borrow())
    }
}

impl Lanes {
    /// * `sources`: each with its weight, which is at least 1.
    pub fn new(sources: Vec<(Box<dyn JobSource>, u32)>) -> Self {
        let lane = |(source, weight): (_, u32)| Lane {
            source,
            weight: f64::from(weight.max(1)),
            tag: 0.0,
            ended: false,
            has_turn: false,
        };
        Self { lanes: sources.into_iter().map(lane).collect(), now: 0.0 }
    }

    /// The next job of the lane whose turn it is, among those that have one; none once all ended.
    async fn next(&mut self) -> Result<Option<(usize, Delivery)>, FatalError> {
        loop {
            let mut open: Vec<(usize, &mut Lane)> =
                self.lanes.iter_mut().enumerate().filter(|(_, lane)| !lane.ended).collect();
            if open.is_empty() {
                return Ok(None);
            }
            open.sort_by(|(_, a), (_, b)| a.tag.total_cmp(&b.tag));
            let mut waiting: Vec<_> =
                open.into_iter().map(|(at, lane)| (at, lane.source.receive())).collect();
            // In this order, so that of several lanes that have a job the first one is served. The
            // calls that are dropped lose nothing.
            let (at, received) = poll_fn(|context| {
                for (at, receiving) in &mut waiting {
                    if let Poll::Ready(received) = receiving.as_mut().poll(context) {
                        return Poll::Ready((*at, received));
                    }
                }
                Poll::Pending
            })
            .await;
            drop(waiting);
            match received? {
                Some(delivery) => return Ok(Some((at, delivery))),
                None => self.lanes[at].ended = true,
            }
        }
    }
}

#[async_trait]
impl JobSource for Lanes {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        let Some((at, delivery)) = self.next().await? else { return Ok(None) };
        let images = delivery.job.as_ref().map_or(1, |job| job.images.len());
        let lane = &mut self.lanes[at];
        self.now = lane.tag.max(self.now);
        lane.tag = self.now + images as f64 / lane.weight;
        Ok(Some(delivery))
    }

    fn suspects(&self) -> Option<watch::Receiver<bool>> {
        let mut lanes: Vec<_> =
            self.lanes.iter().filter_map(|lane| lane.source.suspects()).collect();
        if lanes.is_empty() {
            return None;
        }
        let (any, told) = watch::channel(false);
        tokio::spawn(async move {
            while !lanes.is_empty() {
                let waiting = lanes.iter_mut().map(|lane| *lane.borrow_and_update());
                let waiting = waiting.fold(false, |any, one| any | one);
                any.send_if_modified(|known| std::mem::replace(known, waiting) != waiting);
                let changed = select_all(lanes.iter_mut().map(|lane| Box::pin(lane.changed())));
                let (changed, at) = tokio::select! {
                    (changed, at, _) = changed => (changed, at),
                    () = any.closed() => return,
                };
                if changed.is_err() {
                    lanes.swap_remove(at); // That source is gone.
                }
            }
        });
        Some(told)
    }

    async fn take_turn(&mut self) -> bool {
        for lane in &mut self.lanes {
            lane.has_turn = lane.has_suspects() && lane.source.take_turn().await;
        }
        self.lanes.iter().any(|lane| lane.has_turn)
    }

    async fn end_turn(&mut self) {
        for lane in &mut self.lanes {
            if std::mem::take(&mut lane.has_turn) {
                lane.source.end_turn().await;
            }
        }
    }

    async fn receive_suspect(&mut self) -> Result<Option<Delivery>, FatalError> {
        for lane in &mut self.lanes {
            if lane.has_turn
                && lane.has_suspects()
                && let Some(delivery) = lane.source.receive_suspect().await?
            {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    async fn pause(&mut self, reason: &'static str) {
        join_all(self.lanes.iter_mut().map(|lane| lane.source.pause(reason))).await;
    }

    async fn stop(&mut self) {
        join_all(self.lanes.iter_mut().map(|lane| lane.source.stop())).await;
    }

    async fn close(&mut self) {
        join_all(self.lanes.iter_mut().map(|lane| lane.source.close())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;
    use tokio::time::timeout;

    use angler_wire::job::JobLimits;

    use super::*;
    use crate::source::memory::MemoryQueue;
    use crate::source::{Delivery, Settlement};

    const LIMITS: JobLimits = JobLimits { images: 100, message_bytes: 100_000 };

    fn lanes(queues: &[(&MemoryQueue, u32)]) -> Lanes {
        let source = |(queue, weight): &(&MemoryQueue, u32)| -> (Box<dyn JobSource>, u32) {
            (Box::new(queue.source(LIMITS)), *weight)
        };
        Lanes::new(queues.iter().map(source).collect())
    }

    fn push(queue: &MemoryQueue, id: &str, images: usize) {
        let images = vec![r#"{"uri": "s3://b/k"}"#; images].join(",");
        queue.push(format!(r#"{{"id": "{id}", "classes": "s", "images": [{images}]}}"#));
    }

    async fn next(lanes: &mut Lanes) -> Delivery {
        lanes.receive().await.unwrap().unwrap()
    }

    async fn next_id(lanes: &mut Lanes) -> String {
        let delivery = next(lanes).await;
        let id = delivery.job.as_ref().unwrap().id.clone();
        delivery.settle.settle(Settlement::Ack).await;
        id
    }

    #[tokio::test]
    async fn images_are_shared_by_weight_whatever_the_jobs_sizes() {
        let (small, large) = (MemoryQueue::default(), MemoryQueue::default());
        for _ in 0..400 {
            push(&small, "small", 1);
            push(&large, "large", 10);
        }
        let mut lanes = lanes(&[(&small, 3), (&large, 1)]);
        let mut images = [0_i32, 0];
        for _ in 0..260 {
            match next_id(&mut lanes).await.as_str() {
                "small" => images[0] += 1,
                _ => images[1] += 10,
            }
        }
        // To within one large job.
        assert!((images[0] - 3 * images[1]).abs() <= 30, "three to one: {images:?}");
    }

    #[tokio::test]
    async fn a_job_in_a_lane_that_was_idle_is_the_next_and_brings_no_credit() {
        let (quick, long) = (MemoryQueue::default(), MemoryQueue::default());
        (0..100).for_each(|_| push(&long, "long", 50));
        let mut lanes = lanes(&[(&long, 1), (&quick, 1)]);
        for _ in 0..20 {
            assert_eq!(next_id(&mut lanes).await, "long");
        }
        (0..10).for_each(|_| push(&quick, "quick", 50));
        let mut ids = Vec::new();
        for _ in 0..6 {
            ids.push(next_id(&mut lanes).await);
        }
        // At once, and then in turn: the thousand images of before are not made up for.
        assert_eq!(ids, ["quick", "long", "quick", "long", "quick", "long"]);
    }

    #[tokio::test]
    async fn a_lane_that_ends_leaves_the_others_and_a_dropped_call_loses_nothing() {
        let (a, b) = (MemoryQueue::default(), MemoryQueue::default());
        let mut lanes = lanes(&[(&a, 1), (&b, 1)]);
        a.end();
        assert!(timeout(Duration::from_millis(10), lanes.receive()).await.is_err());
        push(&b, "b", 1);
        assert_eq!(next_id(&mut lanes).await, "b");
        b.end();
        assert!(lanes.receive().await.unwrap().is_none());
        lanes.stop().await;
        lanes.close().await;
    }

    #[tokio::test]
    async fn suspects_of_any_lane_are_told_and_taken() {
        let (a, b) = (MemoryQueue::with_suspects(), MemoryQueue::with_suspects());
        let mut lanes = lanes(&[(&a, 1), (&b, 1)]);
        let mut waiting = lanes.suspects().unwrap();
        assert!(!*waiting.borrow_and_update());
        push(&b, "guilty", 1);
        for _ in 0..2 {
            drop(next(&mut lanes).await); // as if the worker had died
        }
        waiting.wait_for(|waiting| *waiting).await.unwrap();
        assert!(lanes.receive_suspect().await.unwrap().is_none(), "it is not its turn");
        assert!(lanes.take_turn().await);
        let mut others = Lanes::new(vec![(Box::new(b.source(LIMITS)), 1)]);
        assert!(!others.take_turn().await, "only one has the turn");
        let suspect = lanes.receive_suspect().await.unwrap().unwrap();
        assert!(suspect.suspect);
        suspect.settle.settle(Settlement::Ack).await;
        waiting.wait_for(|waiting| !*waiting).await.unwrap();
        assert!(lanes.receive_suspect().await.unwrap().is_none());
        lanes.end_turn().await;
        assert!(b.source(LIMITS).take_turn().await, "it is free again");
    }
}
