//! The data path: receive a job, admit it image by image, fetch, decode, embed and score each,
//! collect, publish the result, settle the delivery.
//!
//! `angler classify` and `angler worker` run this same [`Worker`]; only the ports differ.
//!
//! * **Admission is by image and in job order, before the next receive.** A permit a job would let
//!   all admitted jobs interleave, and none would end soon. There is a limit on jobs too: finished
//!   jobs that wait for a slow sink hold no image permits.
//! * **Ack last.** A delivery is settled only after its result is confirmed.
//! * **One version a job**: chosen at admission, kept to the end.
//! * **Suspects run alone**, on one worker of the fleet: a job that workers held when they died may be
//!   what killed them.
//! * **No jobs while the store cannot be used**: they would only spend their attempts.

mod core;
mod job_task;
mod job_tracking;
mod suspect_schedule;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use angler_metrics::trace::Traces;
use angler_wire::error::FatalError;

use self::core::{Core, places};
use crate::class_sets::catalog::Catalog;
use crate::class_sets::shadow::Shadow;
use crate::pipeline::Pipeline;
use crate::retry::RetrySchedule;
use crate::sink::ResultSink;
use crate::source::{Cancellations, Delivery, JobSource};
use crate::worker::suspect_schedule::Suspects;

/// What the end of the source's connections may take, after the drain.
pub const CLOSING: Duration = Duration::from_secs(5);

/// What a worker is told, beside its ports.
#[derive(Clone)]
pub struct WorkerOptions {
    /// Its name in results.
    pub name: String,
    /// Fingerprint of the model that runs.
    pub model: String,
    /// Jobs admitted and not settled, at most.
    pub jobs_in_flight: usize,
    /// The time of one job, from admission to its last image.
    pub job_time: Duration,
    /// How long a drain may take.
    pub grace: Duration,
    /// When failed jobs are tried again.
    pub retry: RetrySchedule,
    /// Whether every image has its own entry, even if the store answers for none of its job. Otherwise such a job fails
    /// as a whole.
    pub every_image: bool,
    /// A version that is tried beside the one that is served.
    pub shadow: Option<Arc<Shadow>>,
    /// Which runs were cancelled; none: no run can be.
    pub cancellations: Option<Arc<dyn Cancellations>>,
    /// Where spans are made; none: there are none.
    pub traces: Option<Arc<Traces>>,
}

/// Takes jobs from a source, classifies their images and hands results to a sink.
pub struct Worker {
    source: Box<dyn JobSource>,
    core: Arc<Core>,
}

/// What the worker does next.
enum Next {
    /// A job and its place, or `None` if there will be no more.
    Job(Option<(Box<Delivery>, OwnedSemaphorePermit)>),
    /// Suspects wait, and it is time to ask for the turn.
    Suspects,
    /// The store cannot be used, and why.
    Outage(&'static str),
    /// Results have not been accepted for too long.
    Stuck,
}

impl Worker {
    /// A worker over these ports.
    pub fn new(
        source: Box<dyn JobSource>,
        sink: Arc<dyn ResultSink>,
        pipeline: Arc<Pipeline>,
        catalog: Arc<Catalog>,
        options: WorkerOptions,
    ) -> Self {
        let (stuck, recall) = (sink.stuck(), watch::Sender::new(()));
        Self { source, core: Arc::new(Core { sink, pipeline, catalog, options, stuck, recall }) }
    }

    /// Works until the source has no more jobs or `stop` is cancelled, then finishes what is
    /// admitted.
    ///
    /// # Errors
    /// [`FatalError`] if it cannot go on or the drain takes longer than the grace period. What is
    /// not settled then comes back to another worker. To close the source takes [`CLOSING`] more
    /// at most.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), FatalError> {
        let mut jobs: JoinSet<Result<(), FatalError>> = JoinSet::new();
        let slots = Arc::new(Semaphore::new(self.core.options.jobs_in_flight.max(1)));
        let outcome = self.receive_until_stopped(&stop, &slots, &mut jobs).await;
        let until = Instant::now() + self.core.options.grace;
        // A broker that hangs has no more of the grace period than a drain: what is not given back
        // comes back with the end of the connection.
        let _ = timeout_at(until, self.source.stop()).await;
        self.core.pipeline.engine().drain();
        let outcome = match outcome {
            Ok(()) => self.core.drain(&mut jobs, until).await,
            fatal => fatal,
        };
        // Jobs that are left are dropped unsettled, before their connection is.
        jobs.shutdown().await;
        let _ = timeout(CLOSING, self.source.close()).await;
        outcome
    }

    async fn receive_until_stopped(
        &mut self,
        stop: &CancellationToken,
        slots: &Arc<Semaphore>,
        jobs: &mut JoinSet<Result<(), FatalError>>,
    ) -> Result<(), FatalError> {
        let core = Arc::clone(&self.core);
        let mut suspects = Suspects::new(self.source.suspects());
        loop {
            let next = self.next(&mut suspects, slots);
            let Some(next) = core.meanwhile(next, stop, jobs).await? else { return Ok(()) };
            match next? {
                Next::Job(None) => return Ok(()),
                Next::Job(Some((delivery, slot))) => {
                    job_task::start(&core, *delivery, slot, stop, jobs).await
                }
                Next::Outage(reason) => {
                    self.source.pause(reason).await;
                    let over = async {
                        tokio::select! {
                            () = core.store_is_back() => {}
                            () = core.is_stuck() => {}
                        }
                    };
                    let Some(()) = core.meanwhile(over, stop, jobs).await? else { return Ok(()) };
                }
                Next::Stuck => {
                    self.source.pause("the broker has blocked publishers for too long").await;
                    // After the pause, so that they do not come back here.
                    core.recall.send_replace(());
                    let over = core.is_no_longer_stuck();
                    let Some(()) = core.meanwhile(over, stop, jobs).await? else { return Ok(()) };
                    tracing::info!("the broker takes results again, and this worker takes jobs");
                }
                Next::Suspects => {
                    let ran = self.run_suspects(&mut suspects, slots, stop, jobs).await?;
                    let Some(()) = ran else { return Ok(()) };
                }
            }
        }
    }

    /// Cancel-safe, as `receive` is.
    async fn next(
        &mut self,
        suspects: &mut Suspects,
        slots: &Arc<Semaphore>,
    ) -> Result<Next, FatalError> {
        // Capacity before work: a job that cannot be started is left to another worker.
        let slot = tokio::select! {
            biased;
            () = self.core.is_stuck() => return Ok(Next::Stuck),
            slot = places(slots, 1) => slot,
        };
        let idle = places(slots, self.core.places() - 1);
        tokio::select! {
            biased;
            () = self.core.is_stuck() => Ok(Next::Stuck),
            reason = self.core.store_is_away() => Ok(Next::Outage(reason)),
            () = suspects.due(idle) => Ok(Next::Suspects),
            delivery = self.source.receive() => {
                Ok(Next::Job(delivery?.map(|delivery| (Box::new(delivery), slot))))
            }
        }
    }

    /// Runs suspects one at a time, each alone, for a stretch, if no other worker does; `None` if the
    /// worker is to stop.
    async fn run_suspects(
        &mut self,
        suspects: &mut Suspects,
        slots: &Arc<Semaphore>,
        stop: &CancellationToken,
        jobs: &mut JoinSet<Result<(), FatalError>>,
    ) -> Result<Option<()>, FatalError> {
        let core = Arc::clone(&self.core);
        if !self.source.take_turn().await {
            suspects.taken();
            return Ok(Some(()));
        }
        // Other jobs first end, but not at any price: one may wait for something that never comes.
        let alone = timeout(suspects.patience(), core.all_places(slots));
        let Some(alone) = core.meanwhile(alone, stop, jobs).await? else { return Ok(None) };
        let Ok(Some(mut alone)) = alone else {
            tracing::info!("jobs in hand take long: suspects wait until later");
            suspects.given_up();
            self.source.end_turn().await;
            return Ok(Some(()));
        };
        let end = Instant::now() + suspect_schedule::STRETCH;
        while Instant::now() < end && !core.store_is_out() {
            let suspect = self.source.receive_suspect();
            let Some(suspect) = core.meanwhile(suspect, stop, jobs).await? else { return Ok(None) };
            let Some(delivery) = suspect? else {
                suspects.none_left();
                self.source.end_turn().await;
                return Ok(Some(()));
            };
            job_task::start(&core, delivery, alone, stop, jobs).await;
            // Until it is settled.
            let again = core.meanwhile(core.all_places(slots), stop, jobs).await?;
            let Some(again) = again else { return Ok(None) };
            let Some(again) = again else { break };
            alone = again;
        }
        suspects.had_their_turn();
        self.source.end_turn().await;
        Ok(Some(()))
    }
}
