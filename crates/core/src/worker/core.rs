//! What all jobs of a worker share, and what the worker waits for beside them.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use angler_inference::embed::Backend;
use angler_metrics::Metrics;
use angler_wire::error::{FatalError, Reason};

use super::WorkerOptions;
use crate::class_sets::catalog::Catalog;
use crate::outage_detector::Outage;
use crate::pipeline::Pipeline;
use crate::sink::ResultSink;

/// What every job's task shares.
pub(super) struct Core {
    pub sink: Arc<dyn ResultSink>,
    pub pipeline: Arc<Pipeline>,
    pub catalog: Arc<Catalog>,
    pub options: WorkerOptions,
    /// Whether results have not been accepted for too long.
    pub stuck: Option<watch::Receiver<bool>>,
    /// Changes when all jobs in hand are given back.
    pub recall: watch::Sender<()>,
}

impl Core {
    /// Awaits `work` and looks after the jobs meanwhile; none if the worker is to stop.
    pub async fn meanwhile<T>(
        &self,
        work: impl Future<Output = T>,
        stop: &CancellationToken,
        jobs: &mut JoinSet<Result<(), FatalError>>,
    ) -> Result<Option<T>, FatalError> {
        let engine = self.pipeline.engine();
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(None),
                fatal = engine.broken() => return Err(fatal),
                Some(ended) = jobs.join_next() => settled_or_fatal(ended)?,
                done = &mut work => return Ok(Some(done)),
            }
        }
    }

    /// Jobs in hand at once, at most.
    pub fn places(&self) -> u32 {
        u32::try_from(self.options.jobs_in_flight.max(1)).unwrap_or(u32::MAX)
    }

    /// Waits until no job is in hand; `None` if jobs cannot end because results are not accepted.
    pub async fn all_places(&self, slots: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            biased;
            () = self.is_stuck() => None,
            places = places(slots, self.places()) => Some(places),
        }
    }

    pub async fn is_stuck(&self) {
        // A sink that is gone is not stuck.
        if !self.stuck_is(true).await {
            std::future::pending::<()>().await;
        }
    }

    pub async fn is_no_longer_stuck(&self) {
        self.stuck_is(false).await;
    }

    /// Waits for this state; returns `false` if that can never be.
    pub async fn stuck_is(&self, wanted: bool) -> bool {
        match self.stuck.clone() {
            Some(mut stuck) => stuck.wait_for(|stuck| *stuck == wanted).await.is_ok(),
            None => !wanted,
        }
    }

    pub async fn store_is_away(&self) -> &'static str {
        match self.pipeline.outage() {
            Some(outage) => outage.began().await,
            None => std::future::pending().await,
        }
    }

    pub fn store_is_out(&self) -> bool {
        self.pipeline.outage().is_some_and(Outage::is_on)
    }

    pub async fn store_is_back(&self) {
        if let Some(outage) = self.pipeline.outage() {
            outage.over().await;
        }
    }

    /// Waits for the admitted jobs until the grace period is over.
    pub async fn drain(
        &self,
        jobs: &mut JoinSet<Result<(), FatalError>>,
        until: Instant,
    ) -> Result<(), FatalError> {
        let engine = self.pipeline.engine().clone();
        let all = async {
            loop {
                tokio::select! {
                    biased;
                    fatal = engine.broken() => return Err(fatal),
                    ended = jobs.join_next() => match ended {
                        Some(ended) => settled_or_fatal(ended)?,
                        None => return Ok(()),
                    },
                }
            }
        };
        match timeout_at(until, all).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let seconds = self.options.grace.as_secs();
                Err(FatalError::DrainTimedOut { jobs: jobs.len(), seconds })
            }
        }
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        self.pipeline.metrics()
    }

    pub fn backend(&self) -> Backend {
        self.pipeline.engine().backend()
    }
}

/// Waits for `count` of the places that admitted jobs hold.
pub(super) async fn places(slots: &Arc<Semaphore>, count: u32) -> OwnedSemaphorePermit {
    match Arc::clone(slots).acquire_many_owned(count).await {
        Ok(places) => places,
        Err(_) => std::future::pending().await, // Nobody closes it.
    }
}

/// A job task's own result, or its panic as a fatal error: a job that vanished unsettled would
/// wait for ever on a healthy connection.
fn settled_or_fatal(
    ended: Result<Result<(), FatalError>, tokio::task::JoinError>,
) -> Result<(), FatalError> {
    ended.unwrap_or_else(|e| Err(FatalError::Engine(Reason::new("a job's task panicked", e))))
}
