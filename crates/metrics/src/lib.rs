//! What a worker counts and times: for `/metrics`, for `/status`, and for the page at `/`.
//!
//! One [`Metrics`] is made where the parts are put together and handed to each of them; there is no
//! global one. Recording is a few atomic operations on numbers that exist from the start: no lock, no
//! allocation, no look-up of a label. Only what fails is also written down, in a short list.
//! docs/metrics.md says what each name means.
//!
//! Nothing here knows the parts that record: they hand over plain numbers, codes and names. Read
//! [`Metrics`] first, then [`trace`] for spans, [`stopwatch`] for an image's own time, and [`progress`]
//! for work that no deadline ends.

mod families;
pub mod progress;
mod recent;
pub mod stopwatch;
pub mod trace;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use prometheus::proto::MetricFamily;
use prometheus::{Counter, Histogram, IntCounter, IntGauge, Registry};
use strum::{EnumCount, EnumDiscriminants, IntoStaticStr, VariantNames};

use families::Families;
pub use recent::{Recent, RecentError};
pub use window::{Latency, Minute, Snapshot, Window};

use angler_wire::error::{Failure, FailureCode, ImageError, ImageErrorCode};

/// A step that an image passes, in that order: the label `step` of `angler_step_seconds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumCount, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Stage {
    /// The store's answer.
    Fetch,
    /// Waiting for a decoder.
    Queue,
    /// Decoding and resizing.
    Decode,
    /// Waiting for a place in a batch, for the batch and for the back end.
    Wait,
    /// Its batch's run of the model.
    Embed,
    /// Its batch's scoring on the host.
    Score,
    /// The publishing of its job's result.
    Publish,
}

/// Why a batch closed: the label `reason` of `angler_batches_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EnumCount, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum CloseReason {
    /// It held as many images as a batch may.
    Full,
    /// The engine was idle and the oldest image had waited long enough.
    Linger,
    /// The engine was idle and no more images were to come.
    Drain,
}

impl CloseReason {
    /// Returns the reason as metrics and spans name it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// How a delivery ended: the label `outcome` of `angler_jobs_total`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, EnumCount, EnumDiscriminants, IntoStaticStr, VariantNames,
)]
#[strum(serialize_all = "snake_case")]
#[strum_discriminants(name(JobOutcome), vis(pub(self)))]
pub enum JobEnd {
    /// Its result is published.
    Done,
    /// Its result is published, and says that the whole job failed.
    Failed,
    /// The same, and it is kept among the dead letters, for this reason.
    DeadLettered(FailureCode),
    /// It is tried again later.
    Retried,
    /// It went back as it came.
    Requeued,
    /// It is gone with its connection.
    Lost,
}

/// What became of an image: the label `outcome` of `angler_images_total`.
#[derive(Debug, Clone, Copy, EnumCount, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum ImageEnd {
    /// It has a label.
    Labelled,
    /// No class is close enough to it.
    Unknown,
    /// It has no score, but an error.
    Failed,
}

/// What was tried again: the label `of` of `angler_retries_total`.
#[derive(Debug, Clone, Copy, EnumCount, VariantNames)]
#[strum(serialize_all = "snake_case")]
enum Retried {
    Job,
    Fetch,
}

/// Upper bounds of the buckets of `angler_step_seconds`.
const STEP_BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];
/// Upper bounds of the buckets of `angler_job_seconds`; percentiles are read off them, too.
const JOB_BUCKETS: [f64; 18] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0,
    300.0, 900.0,
];
const BATCH_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// The numbers of one worker. Every method may be called from any thread.
pub struct Metrics {
    /// Whether anything is recorded: a measurement compares both.
    on: bool,
    started: SystemTime,
    registry: Registry,
    jobs: [IntCounter; JobEnd::COUNT],
    job_failures: [IntCounter; FailureCode::COUNT],
    job_seconds: Histogram,
    images: [IntCounter; ImageEnd::COUNT],
    image_errors: [IntCounter; ImageErrorCode::COUNT],
    steps: [Histogram; Stage::COUNT],
    batches: [IntCounter; CloseReason::COUNT],
    batch_images: Histogram,
    busy_seconds: Counter,
    batch_limit: IntGauge,
    /// What `batch_limit` shows.
    smallest_limit: AtomicUsize,
    out_of_memory: IntCounter,
    jobs_in_flight: IntGauge,
    images_in_flight: IntGauge,
    retries: [IntCounter; Retried::COUNT],
    dead_letters: [IntCounter; FailureCode::COUNT],
    fetched_bytes: IntCounter,
    result_bytes: IntCounter,
    /// Time for which decoders held their place only because there was no frame, in nanoseconds.
    frame_waits: AtomicU64,
    recent: Recent,
}

impl Default for Metrics {
    /// Records.
    fn default() -> Self {
        Self::made(true)
    }
}

impl Metrics {
    /// Records nothing and reads no clock: what recording costs is measured against it.
    pub fn off() -> Self {
        Self::made(false)
    }

    fn made(on: bool) -> Self {
        let families = Families::default();
        let batch_limit =
            families.gauge("angler_batch_limit", "Images that the most limited session takes.");
        Self {
            on,
            started: SystemTime::now(),
            jobs: families.counters::<JobEnd, _>(
                "angler_jobs_total",
                "Deliveries of jobs, by how each ended.",
                "outcome",
            ),
            job_failures: families.counters::<FailureCode, _>(
                "angler_job_failures_total",
                "Results that say that the whole job failed, by code.",
                "code",
            ),
            job_seconds: families.histogram(
                "angler_job_seconds",
                "From the receipt of a job to its settlement, if it ended with a result.",
                &JOB_BUCKETS,
            ),
            images: families.counters::<ImageEnd, _>(
                "angler_images_total",
                "Images, by what became of them.",
                "outcome",
            ),
            image_errors: families.counters::<ImageErrorCode, _>(
                "angler_image_errors_total",
                "Images that failed, by code.",
                "code",
            ),
            steps: families.histograms::<Stage, _>(
                "angler_step_seconds",
                "Time that an image spends in each step of its way.",
                "step",
                &STEP_BUCKETS,
            ),
            batches: families.counters::<CloseReason, _>(
                "angler_batches_total",
                "Batches, by why they closed.",
                "reason",
            ),
            batch_images: families.histogram(
                "angler_batch_images",
                "Images in a batch.",
                &BATCH_BUCKETS,
            ),
            busy_seconds: families.seconds(
                "angler_embedder_busy_seconds_total",
                "Time that the sessions of the model worked, all together.",
            ),
            batch_limit,
            smallest_limit: AtomicUsize::new(usize::MAX),
            out_of_memory: families.counter(
                "angler_out_of_memory_total",
                "Runs of the model for which a device had no memory.",
            ),
            jobs_in_flight: families
                .gauge("angler_jobs_in_flight", "Jobs that were received and are not settled."),
            images_in_flight: families
                .gauge("angler_images_in_flight", "Images between admission and score."),
            retries: families.counters::<Retried, _>(
                "angler_retries_total",
                "Second and further tries of jobs, and of fetches within an image's time.",
                "of",
            ),
            dead_letters: families.counters::<FailureCode, _>(
                "angler_dead_letters_total",
                "Jobs kept among the dead letters, by why.",
                "reason",
            ),
            fetched_bytes: families.counter(
                "angler_fetched_bytes_total",
                "Encoded bytes of the images that were fetched.",
            ),
            result_bytes: families
                .counter("angler_result_bytes_total", "Bytes of the results that were published."),
            frame_waits: AtomicU64::new(0),
            recent: Recent::default(),
            registry: families.registry(),
        }
    }

    /// A clock that tells how long something takes; it does not run if nothing is recorded.
    pub fn clock(&self) -> Clock {
        Clock(self.on.then(Instant::now))
    }

    /// When the process started, nearly.
    pub fn started(&self) -> SystemTime {
        self.started
    }

    /// A job was received. It is in flight until the guard is dropped.
    pub fn job(self: &Arc<Self>) -> JobInFlight {
        if self.on {
            self.jobs_in_flight.inc();
        }
        JobInFlight { clock: self.clock(), metrics: Arc::clone(self) }
    }

    /// An image was admitted. It is in flight until the guard is dropped.
    pub fn image(&self) -> ImageInFlight<'_> {
        if self.on {
            self.images_in_flight.inc();
        }
        ImageInFlight(self)
    }

    /// An image is in a step until the guard is dropped, also if it is given up there.
    pub fn timed(&self, stage: Stage) -> Timed<'_> {
        Timed { metrics: self, stage, clock: self.clock() }
    }

    /// So much time of an image went by in a step.
    pub fn step(&self, stage: Stage, spent: Duration) {
        self.step_of(stage, spent, 1);
    }

    /// The same, of so many images that go through it together.
    pub fn step_of(&self, stage: Stage, spent: Duration, images: usize) {
        if self.on {
            let (histogram, seconds) = (&self.steps[stage as usize], spent.as_secs_f64());
            (0..images).for_each(|_| histogram.observe(seconds));
        }
    }

    /// An image came from the store.
    pub fn fetched(&self, bytes: usize) {
        if self.on {
            self.fetched_bytes.inc_by(bytes as u64);
        }
    }

    /// A fetch that failed is tried again at once.
    pub fn fetch_retried(&self) {
        if self.on {
            count(&self.retries, Retried::Fetch as usize);
        }
    }

    /// A decoder waited for a frame.
    pub fn frame_waited(&self, waited: Duration) {
        if self.on {
            let nanos = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
            self.frame_waits.fetch_add(nanos, Ordering::Relaxed);
        }
    }

    /// A batch closed.
    pub fn batch_closed(&self, reason: CloseReason, images: usize) {
        if self.on {
            count(&self.batches, reason as usize);
            self.batch_images.observe(images as f64);
        }
    }

    /// A session worked on a batch.
    pub fn embedded(&self, spent: Duration, answered: usize) {
        if self.on {
            self.busy_seconds.inc_by(spent.as_secs_f64());
            self.step_of(Stage::Embed, spent, answered);
        }
    }

    /// A session takes at most so many images at once; the smallest number is shown.
    pub fn limit_batches(&self, images: usize) {
        let smallest = self.smallest_limit.fetch_min(images, Ordering::Relaxed).min(images);
        self.batch_limit.set(i64::try_from(smallest).unwrap_or(i64::MAX));
    }

    /// A device had no memory for a run.
    pub fn out_of_memory(&self) {
        self.out_of_memory.inc();
    }

    /// An image was scored, and has a label or is unknown.
    pub fn classified(&self, labelled: bool) {
        if self.on {
            let end = if labelled { ImageEnd::Labelled } else { ImageEnd::Unknown };
            count(&self.images, end as usize);
        }
    }

    /// An image of a job failed.
    pub fn image_failed(&self, job: &str, uri: &str, error: &ImageError) {
        if self.on {
            count(&self.images, ImageEnd::Failed as usize);
            count(&self.image_errors, error.code as usize);
            self.recent.add(job, Some(uri), error.code.as_str(), &error.message);
        }
    }

    /// A whole job failed, and its result says so.
    pub fn job_failed(&self, job: &str, failure: &Failure) {
        if self.on {
            count(&self.job_failures, failure.code as usize);
            // A run that somebody cancelled is no error, and has many jobs.
            if failure.code != FailureCode::Cancelled {
                self.recent.add(job, None, failure.code.as_str(), &failure.message);
            }
        }
    }

    /// A result was published.
    pub fn result(&self, bytes: usize) {
        if self.on {
            self.result_bytes.inc_by(bytes as u64);
        }
    }

    /// What failed last.
    pub fn recent(&self) -> Vec<RecentError> {
        self.recent.newest_first()
    }

    /// All numbers that are recorded, for an encoder.
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// Images and jobs in flight.
    pub fn in_flight(&self) -> (i64, i64) {
        (self.images_in_flight.get(), self.jobs_in_flight.get())
    }

    /// The most images that the most limited session takes at once.
    pub fn batch_limit(&self) -> i64 {
        self.batch_limit.get()
    }

    /// The numbers of now, to be compared with those of later.
    pub fn snapshot(&self) -> Snapshot {
        let histogram = prometheus::core::Metric::metric(&self.job_seconds);
        let buckets = histogram.get_histogram().get_bucket();
        Snapshot {
            jobs: self.jobs.each_ref().map(IntCounter::get),
            images: self.images.each_ref().map(IntCounter::get),
            batches: self.batches.each_ref().map(IntCounter::get),
            batch_images: self.batch_images.get_sample_sum(),
            steps: self.steps.each_ref().map(Histogram::get_sample_sum),
            frame_waits: Duration::from_nanos(self.frame_waits.load(Ordering::Relaxed)),
            busy_seconds: self.busy_seconds.get(),
            job_buckets: buckets.iter().map(|b| (b.upper_bound(), b.cumulative_count())).collect(),
            ended_jobs: histogram.get_histogram().get_sample_count(),
            fetched_bytes: self.fetched_bytes.get(),
        }
    }
}

/// Time that goes by, if anything is recorded.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Option<Instant>);

impl Clock {
    /// How long it has run.
    pub fn spent(self) -> Duration {
        self.0.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// How long it had run at that moment.
    pub fn spent_at(self, now: Instant) -> Duration {
        self.0.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// An image that is in a step.
pub struct Timed<'a> {
    metrics: &'a Metrics,
    stage: Stage,
    clock: Clock,
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.metrics.step(self.stage, self.clock.spent());
    }
}

/// A job that is in flight.
pub struct JobInFlight {
    metrics: Arc<Metrics>,
    clock: Clock,
}

impl JobInFlight {
    /// Records how the delivery ended, and returns its name.
    pub fn ended(&self, end: JobEnd) -> &'static str {
        let metrics = &self.metrics;
        if metrics.on {
            count(&metrics.jobs, JobOutcome::from(end) as usize);
            match end {
                JobEnd::DeadLettered(code) => count(&metrics.dead_letters, code as usize),
                JobEnd::Retried => count(&metrics.retries, Retried::Job as usize),
                JobEnd::Done | JobEnd::Failed | JobEnd::Requeued | JobEnd::Lost => {}
            }
            if matches!(end, JobEnd::Done | JobEnd::Failed | JobEnd::DeadLettered(_)) {
                metrics.job_seconds.observe(self.clock.spent().as_secs_f64());
            }
        }
        end.into()
    }
}

impl Drop for JobInFlight {
    fn drop(&mut self) {
        if self.metrics.on {
            self.metrics.jobs_in_flight.dec();
        }
    }
}

/// An image that is in flight.
pub struct ImageInFlight<'m>(&'m Metrics);

impl Drop for ImageInFlight<'_> {
    fn drop(&mut self) {
        if self.0.on {
            self.0.images_in_flight.dec();
        }
    }
}

/// Adds one to the counter of the variant with this discriminant.
fn count(counters: &[IntCounter], place: usize) {
    if let Some(counter) = counters.get(place) {
        counter.inc();
    }
}

#[cfg(test)]
mod tests;
