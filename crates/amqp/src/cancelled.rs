//! Which runs were cancelled, as workers ask before they begin a job.
//!
//! Asked of the broker, once a second for each run whose jobs come: a worker that is started later, or
//! that was away, knows as much as the others.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio::time::Instant;

use angler_core::source::Cancellations;
use angler_wire::job::Run;

use super::run_queues::RunQueues;
use crate::publisher::Publisher;

/// How long an answer counts.
const FRESH: Duration = Duration::from_secs(1);
/// Runs whose answers are kept at most.
const KEPT: usize = 1000;

/// Asks over a worker's publishing connection.
pub struct CancelledRuns {
    publisher: Arc<Publisher>,
    /// The fleet's first queue of jobs.
    jobs: String,
    /// By the queue that is asked for. Held while the broker is asked: of many jobs that come at once,
    /// one asks.
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Clone, Copy)]
struct Known {
    is_cancelled: bool,
    at: Instant,
}

impl CancelledRuns {
    /// * `jobs`: the fleet's first queue of jobs, which the runs' queues are named after.
    pub fn new(publisher: Arc<Publisher>, jobs: String) -> Self {
        Self { publisher, jobs, known: Mutex::default() }
    }
}

#[async_trait]
impl Cancellations for CancelledRuns {
    async fn is_cancelled(&self, run: &Run) -> bool {
        let Some(RunQueues { cancelled: queue, .. }) = RunQueues::of_job(&self.jobs, run) else {
            return false;
        };
        let mut all = self.known.lock().await;
        let before = all.get(&queue).copied();
        if let Some(known) = before
            && known.at.elapsed() < FRESH
        {
            return known.is_cancelled;
        }
        let was_cancelled = before.is_some_and(|known| known.is_cancelled);
        // Without an answer it is what it was: jobs do not wait for a broker that says nothing.
        let is_cancelled = self.publisher.has_queue(&queue).await.unwrap_or(was_cancelled);
        if is_cancelled && !was_cancelled {
            tracing::info!(
                run = run.shown(),
                "run cancelled; failing its jobs without running them"
            );
        }
        if all.len() >= KEPT {
            all.retain(|_, known| known.at.elapsed() < FRESH);
        }
        if all.len() < KEPT {
            all.insert(queue, Known { is_cancelled, at: Instant::now() });
        }
        is_cancelled
    }
}
