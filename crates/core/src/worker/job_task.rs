//! The course of one job: admitted image by image, collected, published, settled.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::pipeline::Slot;
use angler_inference::engine::{Scored, SubmitError, Want};
use angler_metrics::Stage;
use angler_vectors::{ClassVectors, ClassesError, Opinion};
use angler_wire::error::{
    Failure, FailureCode, FatalError, ImageError, ImageErrorCode, JobError, Reason, StoreFault,
};
use angler_wire::job::{
    Embedding, ImageEntry, ImageRef, Job, JobResult, Outcome, Provenance, Verdict,
};

use super::core::Core;
use crate::outage_detector::Outage;
use crate::sink::SinkError;
use crate::source::{Delivery, Reply, Settlement};
use crate::worker::job_tracking::JobTracking;

/// Images of a suspect in flight at once. If what ended the worker was too little memory for many
/// large images at once, it now passes.
const SUSPECT_IMAGES: usize = 4;

/// Denials that are looked into at once.
const DENIALS_AT_ONCE: usize = 16;

/// The end of a job that should be tried again and cannot be.
///
/// * `error`: why its last attempt failed.
/// * `reason`: why there is no further one.
fn not_again(attempt: u32, error: &str, reason: &str) -> (Outcome, Settlement) {
    let message = format!("attempt {attempt} failed: {error}; it cannot be tried again: {reason}");
    let failure = Failure::new(FailureCode::RetriesExhausted, message);
    (Outcome::Failed { error: failure.clone() }, Settlement::DeadLetter(failure))
}

/// An image's place among those in flight, and among those of its suspect.
type Place = (Slot, Option<OwnedSemaphorePermit>);

/// A job whose images are all on their way.
struct Admitted {
    classes: Arc<ClassVectors>,
    /// The shadow version, if it is tried on this job.
    candidate: Option<Arc<ClassVectors>>,
    deadline: Instant,
    /// In the job's order, and fewer than it has if its time ran out before the last had a place;
    /// an image whose handle is dropped is given up.
    images: Vec<AbortOnDropHandle<Result<Scored, SubmitError>>>,
}

/// Starts a job, which holds its place until it is settled.
pub(super) async fn start(
    core: &Arc<Core>,
    delivery: Delivery,
    slot: OwnedSemaphorePermit,
    stop: &CancellationToken,
    jobs: &mut JoinSet<Result<(), FatalError>>,
) {
    let job = JobTask { tracking: JobTracking::begin(core, &delivery), core: Arc::clone(core) };
    let recalled = core.recall.subscribe();
    // Class vectors that are not in memory are loaded beside the way: the jobs behind this one
    // do not wait for them.
    if job.must_load(&delivery) {
        let stop = stop.clone();
        jobs.spawn(async move {
            let _slot = slot;
            let admitted = job.admit(&delivery, &stop).await;
            job.finish(delivery, admitted, recalled).await
        });
        return;
    }
    let admitted = job.admit(&delivery, stop).await;
    jobs.spawn(async move {
        let _slot = slot;
        job.finish(delivery, admitted, recalled).await
    });
}

/// One job, from its receipt to its settlement.
struct JobTask {
    core: Arc<Core>,
    tracking: JobTracking,
}

impl JobTask {
    /// Returns whether the job's class vectors are not in memory yet.
    fn must_load(&self, delivery: &Delivery) -> bool {
        delivery.job.as_ref().is_ok_and(|job| self.core.catalog.loaded(&job.classes).is_none())
    }

    /// Chooses the version and starts every image, each as soon as there is a place for it.
    async fn admit(
        &self,
        delivery: &Delivery,
        stop: &CancellationToken,
    ) -> Result<Admitted, JobError> {
        let _step = self.tracking.step("admit");
        let job = delivery.job.as_ref().map_err(|unworkable| unworkable.failure.clone())?;
        let classes = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(JobError::Abandoned("the worker is stopping")),
            () = delivery.lost.cancelled() => return Err(JobError::Abandoned("its connection is gone")),
            classes = self.resolve(job) => classes?,
        };
        let candidate =
            self.core.options.shadow.as_ref().and_then(|shadow| shadow.beside(&classes));
        let deadline = Instant::now() + self.core.options.job_time;
        let mut images = Vec::with_capacity(job.images.len());
        let few = delivery.suspect.then(|| Arc::new(Semaphore::new(SUSPECT_IMAGES)));
        for ImageRef { uri, .. } in &job.images {
            let slot = tokio::select! {
                biased;
                () = stop.cancelled() => return Err(JobError::Abandoned("the worker is stopping")),
                () = delivery.lost.cancelled() => return Err(JobError::Abandoned("its connection is gone")),
                // Jobs that wait behind this one must not wait for ever.
                () = sleep_until(deadline) => break,
                slot = self.place(few.as_ref()) => slot,
            };
            let want = Want {
                classes: Some(Arc::clone(&classes)),
                // The margin needs the runner-up.
                top_k: job.top_k.max(2),
                embedding: job.embeddings,
                shadow: candidate.clone(),
                trace: self.tracking.sent_trace(),
                watch: None,
            };
            images.push(self.start_image(uri.clone(), want, slot));
        }
        Ok(Admitted { classes, candidate, deadline, images })
    }

    /// The version that a job is scored against, unless its run was cancelled.
    async fn resolve(&self, job: &Job) -> Result<Arc<ClassVectors>, JobError> {
        if let (Some(run), Some(cancellations)) = (&job.run, &self.core.options.cancellations)
            && cancellations.is_cancelled(run).await
        {
            let reason = format!("run {} was cancelled", run.id);
            return Err(Failure::new(FailureCode::Cancelled, reason).into());
        }
        let classes = self.core.catalog.resolve(&job.classes).await;
        if matches!(classes, Err(ClassesError::Unavailable(_))) {
            self.core.pipeline.suspect_store().await;
        }
        Ok(classes?)
    }

    /// A place for an image among those in flight, and among the `few` of a suspect.
    async fn place(&self, few: Option<&Arc<Semaphore>>) -> Place {
        let few = match few {
            // It is never closed; without a permit the image would only run beside more others.
            Some(few) => Arc::clone(few).acquire_owned().await.ok(),
            None => None,
        };
        (self.core.pipeline.slot().await, few)
    }

    fn start_image(
        &self,
        uri: String,
        want: Want,
        (slot, few): Place,
    ) -> AbortOnDropHandle<Result<Scored, SubmitError>> {
        let pipeline = Arc::clone(&self.core.pipeline);
        let image = async move {
            let _few = few;
            pipeline.image(&uri, want, slot).await
        };
        AbortOnDropHandle::new(tokio::spawn(image))
    }

    /// Collects, publishes, settles. A delivery that is lost on the way is let go: it comes back. One that
    /// is recalled is handed back, since it is dropped.
    async fn finish(
        &self,
        delivery: Delivery,
        admitted: Result<Admitted, JobError>,
        mut recalled: watch::Receiver<()>,
    ) -> Result<(), FatalError> {
        let lost = delivery.lost.clone();
        let JobTracking { id, run, .. } = &self.tracking;
        tokio::select! {
            // First: what is lost is not given back as well.
            biased;
            () = lost.cancelled() => {
                self.tracking.lost();
                let trace_id = self.tracking.trace_id();
                tracing::info!(job = id, run, trace_id, "let go: its connection is gone, so it is delivered again");
                Ok(())
            }
            _ = recalled.changed() => {
                self.tracking.settled(&Settlement::Requeue, false);
                let trace_id = self.tracking.trace_id();
                tracing::info!(job = id, run, trace_id, "handed back: its result is not accepted");
                Ok(())
            }
            done = self.conclude(delivery, admitted) => done,
        }
    }

    async fn conclude(
        &self,
        delivery: Delivery,
        admitted: Result<Admitted, JobError>,
    ) -> Result<(), FatalError> {
        let Delivery { mut job, attempt, reply, mut settle, .. } = delivery;
        let outcome = match (&mut job, admitted) {
            (Ok(job), Ok(admitted)) => self.collect(job, admitted, attempt).await,
            (_, Err(error)) => Err(error),
            (Err(unworkable), Ok(_)) => Err(unworkable.failure.clone().into()),
        };
        let (id, run) = match job {
            Ok(job) => (job.id, job.run),
            Err(unworkable) => (unworkable.id, unworkable.run),
        };
        let (outcome, settlement) = match self.judge(outcome, attempt) {
            Ok(terminal) => terminal,
            Err((settlement, reason)) => {
                let (run, trace_id) = (&self.tracking.run, self.tracking.trace_id());
                tracing::info!(
                    job = id,
                    run,
                    trace_id,
                    attempt,
                    ?settlement,
                    "job not finished: {reason}"
                );
                if matches!(settlement, Settlement::Retry { .. }) {
                    self.tracking.failed("transient", &reason);
                }
                match settle.settle(settlement.clone()).await {
                    None => {
                        self.tracking.settled(&settlement, false);
                        return Ok(());
                    }
                    Some(unsettled) => {
                        settle = unsettled.settle;
                        not_again(attempt, &reason, &unsettled.reason)
                    }
                }
            }
        };
        let images = match &outcome {
            Outcome::Done { images, .. } => images.len(),
            Outcome::Failed { .. } => 1,
        };
        let finished_at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let worker = self.core.options.name.clone();
        let mut result = JobResult { id, outcome, run, attempt, worker, finished_at };
        let clock = self.core.metrics().clock();
        let step = self.tracking.step("publish");
        self.publish(&mut result, &reply).await?;
        self.core.metrics().step_of(Stage::Publish, clock.spent(), images);
        drop(step);
        let failed = matches!(result.outcome, Outcome::Failed { .. });
        // Now that the broker has its result: one that is lost before that fails anew elsewhere.
        if let Outcome::Failed { error } = &result.outcome {
            self.core.metrics().job_failed(&result.id, error);
            self.tracking.failed(error.code.as_str(), &error.message);
            let (job, run, trace_id) = (&result.id, &self.tracking.run, self.tracking.trace_id());
            // Of a run that was cancelled there may be thousands; that it was is said once.
            match error.code {
                FailureCode::Cancelled => tracing::debug!(job, run, trace_id, "{error}"),
                code => {
                    tracing::warn!(job, run, trace_id, attempt, %code, "job failed: {error}");
                }
            }
        }
        // Only a retry could be impossible.
        settle.settle(settlement.clone()).await;
        self.tracking.settled(&settlement, failed);
        Ok(())
    }

    /// Publishes a result. If that is too large, the result becomes a small failure that says so.
    async fn publish(&self, result: &mut JobResult, reply: &Reply) -> Result<(), FatalError> {
        let too_large = match self.core.sink.publish(result, reply).await {
            Ok(()) => return Ok(()),
            Err(SinkError::Fatal(error)) => return Err(error),
            Err(error @ SinkError::TooLarge { .. }) => error,
        };
        let message = format!(
            "{too_large}; send fewer images per job, a smaller top_k, or \"embeddings\": false, or raise \
             the broker's max_message_size"
        );
        let error = Failure::new(FailureCode::ResultTooLarge, message);
        result.outcome = Outcome::Failed { error };
        match self.core.sink.publish(result, reply).await {
            Ok(()) => Ok(()),
            Err(SinkError::Fatal(error)) => Err(error),
            // No result at all fits.
            Err(error @ SinkError::TooLarge { .. }) => Err(FatalError::Sink(Reason::of(error))),
        }
    }

    /// Every image's entry, in the job's order. The job's own list becomes theirs.
    async fn collect(
        &self,
        job: &mut Job,
        admitted: Admitted,
        attempt: u32,
    ) -> Result<Outcome, JobError> {
        let _step = self.tracking.step("collect");
        let Admitted { classes, candidate, deadline, images } = admitted;
        let mut entries = Vec::with_capacity(images.len());
        let mut failed = 0;
        let mut images = images.into_iter();
        for ImageRef { uri, id } in std::mem::take(&mut job.images) {
            let outcome = match images.next() {
                Some(image) => self.image_outcome(image, deadline).await?,
                None => Err(self.out_of_time()),
            };
            let verdict = match outcome {
                Ok(scored) => {
                    if let (Some(shadow), Some(candidate)) = (&self.core.options.shadow, &candidate)
                    {
                        let now = Opinion::of(&classes, &scored.top, job.min_score);
                        let then = Opinion::of(candidate, &scored.shadow, job.min_score);
                        shadow.count(&uri, &classes.id(), now, then);
                    }
                    let mut classified = classes.classified(&scored.top, job.top_k, job.min_score);
                    self.core.metrics().classified(classified.label.is_some());
                    classified.embedding = scored.embedding.map(Embedding);
                    Verdict::Labelled(classified)
                }
                Err(error) => {
                    failed += 1;
                    let (run, trace_id) = (&self.tracking.run, self.tracking.trace_id());
                    let code = &error.code;
                    tracing::debug!(job = job.id, run, trace_id, uri, %code, "image failed: {error}");
                    self.core.metrics().image_failed(&job.id, &uri, &error);
                    Verdict::Failed { error }
                }
            };
            entries.push(ImageEntry { uri, id, verdict });
        }
        self.tracking.scored(&classes.id(), failed);
        self.tell_unless_transient(&mut entries, attempt).await?;
        let provenance = Provenance {
            classes: classes.id(),
            model: self.core.options.model.clone(),
            backend: self.core.backend().as_str().to_owned(),
        };
        Ok(Outcome::Done { provenance, images: entries })
    }

    /// Decides whether the outcomes are told now. Those of an outage are not, and others only after the last attempt,
    /// since the store may be back later. A job of which nothing is known then fails as a whole, unless
    /// every image is to have its entry.
    async fn tell_unless_transient(
        &self,
        entries: &mut [ImageEntry],
        attempt: u32,
    ) -> Result<(), JobError> {
        let images = entries.len();
        self.confirm_denials(entries).await;
        let errors: Vec<&ImageError> = entries
            .iter()
            .filter_map(|entry| match &entry.verdict {
                Verdict::Failed { error } if error.is_transient() => Some(error),
                _ => None,
            })
            .collect();
        if errors.iter().any(|e| e.fault == StoreFault::Outage) {
            return Err(JobError::Abandoned("the store cannot be used"));
        }
        let Some(first) = errors.first() else { return Ok(()) };
        let again = self.core.options.retry.delay_after(attempt).is_some();
        let unavailable = |e: &&ImageError| e.code == ImageErrorCode::StorageUnavailable;
        let nothing_known = errors.len() == images && errors.iter().all(unavailable);
        if again || (nothing_known && !self.core.options.every_image) {
            return Err(JobError::transient(first.message.as_str()));
        }
        Ok(())
    }

    /// Explains the denials that could not be told from a missing grant. By now an image may have been
    /// read, and then they can.
    async fn confirm_denials(&self, entries: &mut [ImageEntry]) {
        let mut unconfirmed = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Verdict::Failed { error } = &entry.verdict
                && error.fault == StoreFault::Unconfirmed
            {
                let (pipeline, uri) = (Arc::clone(&self.core.pipeline), entry.uri.clone());
                let error = error.clone();
                unconfirmed.push(async move { (index, pipeline.explain(&uri, error).await) });
            }
        }
        let mut confirming = stream::iter(unconfirmed).buffer_unordered(DENIALS_AT_ONCE);
        while let Some((index, error)) = confirming.next().await {
            entries[index].verdict = Verdict::Failed { error };
        }
    }

    async fn image_outcome(
        &self,
        image: AbortOnDropHandle<Result<Scored, SubmitError>>,
        deadline: Instant,
    ) -> Result<Result<Scored, ImageError>, JobError> {
        match timeout_at(deadline, image).await {
            Ok(Ok(Ok(scored))) => Ok(Ok(scored)),
            Ok(Ok(Err(SubmitError::Image(error)))) => Ok(Err(error)),
            Ok(Ok(Err(SubmitError::Gone))) => {
                Err(JobError::Abandoned("the back end stopped working"))
            }
            Ok(Err(panic)) => Ok(Err(ImageError::new(
                ImageErrorCode::Internal,
                format!("the image's task ended early: {panic}"),
            ))),
            Err(_) => Ok(Err(self.out_of_time())),
        }
    }

    /// The error of an image whose job's time is over.
    fn out_of_time(&self) -> ImageError {
        ImageError::new(
            ImageErrorCode::Timeout,
            format!(
                "its job was not finished within {} s (limits.job_seconds)",
                self.core.options.job_time.as_secs_f64()
            ),
        )
    }

    /// What is published and how the delivery settles; or, without a result, how it settles and
    /// why.
    fn judge(
        &self,
        outcome: Result<Outcome, JobError>,
        attempt: u32,
    ) -> Result<(Outcome, Settlement), (Settlement, String)> {
        let failure = match outcome {
            Ok(outcome) => return Ok((outcome, Settlement::Ack)),
            Err(JobError::Abandoned(reason)) => {
                return Err((Settlement::Requeue, reason.to_owned()));
            }
            // The attempt was none: it could not have ended otherwise.
            Err(JobError::Transient(error))
                if self.core.pipeline.outage().is_some_and(Outage::is_certain) =>
            {
                return Err((Settlement::Requeue, error));
            }
            Err(JobError::Transient(error)) => match self.core.options.retry.delay_after(attempt) {
                Some(delay) => {
                    return Err((Settlement::Retry { delay, error: error.clone() }, error));
                }
                None => Failure::new(
                    FailureCode::RetriesExhausted,
                    format!("attempt {attempt} was the last: {error}"),
                ),
            },
            Err(JobError::Failed(failure)) => failure,
        };
        // The producer has its answer for all of these; what a person must look at is kept too.
        let settlement = match failure.code {
            FailureCode::MalformedJob | FailureCode::RetriesExhausted => {
                Settlement::DeadLetter(failure.clone())
            }
            _ => Settlement::Ack,
        };
        Ok((Outcome::Failed { error: failure }, settlement))
    }
}
