//! A worker and all that surrounds it, made to be held, counted and broken.

use std::io::Cursor;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ndarray::{Array2, ArrayView4, array};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, yield_now};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use angler_core::class_sets::catalog::{Catalog, CatalogOptions};
use angler_core::outage_detector::Outage;
use angler_core::pipeline::{ImageLimits, Pipeline};
use angler_core::retry::RetrySchedule;
use angler_core::sink::{ResultSink, SinkError};
use angler_core::source::memory::MemoryQueue;
use angler_core::source::{JobSource, Reply, Settlement};
use angler_core::store::{ByteBudget, Fetched, ImageStore};
use angler_core::worker::{Worker, WorkerOptions};
use angler_inference::embed::fake::FakeEmbedder;
use angler_inference::embed::{Backend, EmbedError, Embedder};
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, EngineStats};
use angler_metrics::CloseReason;
use angler_pixels::{Filter, PixelSpec, Resize};
use angler_vectors::score::Scorer;
use angler_vectors::{ClassVectors, Contents};
use angler_wire::error::{FatalError, ImageError, ImageErrorCode};
use angler_wire::job::{Classified, ImageEntry, JobLimits, JobResult, Outcome, Verdict};

/// The fingerprint that everything in these tests agrees on.
pub const MODEL: &str = "fake@000000000000";
/// What a job may be.
pub const JOB_LIMITS: JobLimits = JobLimits { images: 100, message_bytes: 100_000 };
/// An hour: what must not pass while the clock stands still.
pub const LONG: Duration = Duration::from_secs(3600);

/// While it lives, tokio's paused clock moves only by [`tokio::time::advance`].
///
/// A paused clock jumps to the next timer as soon as the runtime has nothing to do, and it does
/// not know that the engine's thread is at work: every deadline would pass at once. Tokio lets no
/// clock jump while a blocking task runs, so here is one that does nothing.
pub struct Frozen(#[expect(dead_code, reason = "held for its drop")] SyncSender<()>);

impl Frozen {
    pub fn clock() -> Self {
        let (hold, held) = sync_channel::<()>(1);
        tokio::task::spawn_blocking(move || held.recv());
        Self(hold)
    }
}

/// While it lives, tokio's paused clock moves a millisecond at a time whenever every task waits for
/// it: fast, but not past a deadline while the engine's thread works.
pub fn ticking() -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async {
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }))
}

/// Waits for a condition while the clock stands still.
pub async fn until(what: &str, check: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        yield_now().await;
    }
}

/// Lets every task go as far as it can without the clock.
pub async fn quiet() {
    for _ in 0..500 {
        yield_now().await;
    }
}

/// Lets blocking threads finish short work, too: each round waits for one of them.
pub async fn settled() {
    for _ in 0..200 {
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        quiet().await;
    }
}

/// How many are inside something, now and at most.
#[derive(Default)]
pub struct Count {
    now: AtomicUsize,
    peak: AtomicUsize,
    started: AtomicUsize,
}

impl Count {
    fn enter(&self) -> impl Drop + '_ {
        struct Inside<'a>(&'a Count);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.now.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.started.fetch_add(1, Ordering::SeqCst);
        self.peak.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Inside(self)
    }

    pub fn now(&self) -> usize {
        self.now.load(Ordering::SeqCst)
    }

    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }

    pub fn started(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }
}

/// A gate that lets everybody through, until it is shut.
pub struct Gate {
    permits: Semaphore,
    shut: std::sync::atomic::AtomicBool,
}

impl Default for Gate {
    fn default() -> Self {
        Self { permits: Semaphore::new(0), shut: false.into() }
    }
}

impl Gate {
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    /// Lets this many through.
    pub fn let_pass(&self, count: usize) {
        self.permits.add_permits(count);
    }

    pub fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
        self.permits.add_permits(10_000);
    }

    async fn pass(&self) {
        if self.shut.load(Ordering::SeqCst) {
            self.permits.acquire().await.unwrap().forget();
        }
    }
}

/// Serves what a URI says:
/// * `r,g,b`: a PNG of one pixel; `r,g,b+9ms`: the same, later;
/// * `garbage`: bytes that are no image;
/// * `stuck`: never; `panics`: what it says;
/// * the name of an error code: that error.
#[derive(Default)]
pub struct TestStore {
    pub fetching: Count,
    pub gate: Gate,
    /// Whether it answers nothing but `storage_unavailable`.
    pub away: AtomicBool,
    /// What it answers to everything, if anything.
    pub refusal: Mutex<Option<ImageError>>,
}

#[async_trait]
impl ImageStore for TestStore {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        let _inside = self.fetching.enter();
        self.gate.pass().await;
        if self.away.load(Ordering::SeqCst) {
            return Err(ImageError::new(ImageErrorCode::StorageUnavailable, "away, as told"));
        }
        if let Some(error) = self.refusal.lock().unwrap().clone() {
            return Err(error);
        }
        let (what, delay) = uri.split_once('+').unwrap_or((uri, "0ms"));
        tokio::time::sleep(humantime::parse_duration(delay).unwrap()).await;
        let bytes = match what {
            "stuck" => std::future::pending().await,
            "panics" => panic!("the store panicked, as it was told to"),
            "garbage" => b"no image at all".to_vec(),
            _ => match serde_json::from_value::<ImageErrorCode>(json!(what)) {
                Ok(code) => return Err(ImageError::new(code, format!("as told: {what}"))),
                Err(_) => png(what),
            },
        };
        let permit = budget.reserve(bytes.len() as u64).await?;
        Ok(Fetched { bytes: bytes.into(), permit })
    }
}

fn png(rgb: &str) -> Vec<u8> {
    let values: Vec<u8> = rgb.split(',').map(|v| v.parse().unwrap()).collect();
    let pixel = image::Rgb(values.try_into().unwrap());
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_pixel(1, 1, pixel).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Keeps what is published.
#[derive(Default)]
pub struct TestSink {
    pub publishing: Count,
    pub gate: Gate,
    pub broken: bool,
    pub stuck: watch::Sender<bool>,
    results: Mutex<Vec<JobResult>>,
}

impl TestSink {
    pub fn results(&self) -> Vec<JobResult> {
        self.results.lock().unwrap().clone()
    }

    /// The ids of what was published, in that order.
    pub fn ids(&self) -> Vec<String> {
        self.results().into_iter().map(|result| result.id).collect()
    }
}

#[async_trait]
impl ResultSink for TestSink {
    fn stuck(&self) -> Option<watch::Receiver<bool>> {
        Some(self.stuck.subscribe())
    }

    async fn publish(&self, result: &JobResult, _: &Reply) -> Result<(), SinkError> {
        let _inside = self.publishing.enter();
        self.gate.pass().await;
        if self.broken {
            return Err(FatalError::Sink("as it was told to".into()).into());
        }
        self.results.lock().unwrap().push(result.clone());
        Ok(())
    }
}

/// The fake, with a record of its batches, and held in the first one on demand.
struct Recorded {
    inner: FakeEmbedder,
    warm: bool,
    batches: Arc<Mutex<Vec<usize>>>,
    held: Option<Receiver<()>>,
}

impl Embedder for Recorded {
    fn backend(&self) -> Backend {
        self.inner.backend()
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        // The engine's own warm-up is not counted.
        if std::mem::replace(&mut self.warm, true) {
            self.batches.lock().unwrap().push(pixels.dim().0);
            if let Some(held) = self.held.take() {
                let _ = held.recv();
            }
        }
        self.inner.embed(pixels)
    }
}

/// What a test may choose before the worker starts.
pub struct Rig {
    pub embedder: FakeEmbedder,
    pub policy: BatchPolicy,
    pub limits: ImageLimits,
    pub options: WorkerOptions,
    pub catalog: Catalog,
    pub sink: TestSink,
    pub queue: MemoryQueue,
    /// Whether an outage of the store is noticed.
    pub outage: Option<Arc<Outage>>,
    held: Option<Receiver<()>>,
}

impl Default for Rig {
    /// Everything is far away: time, memory, the limits. A batch closes as soon as it can.
    fn default() -> Self {
        Self {
            embedder: FakeEmbedder::new(3),
            policy: BatchPolicy { max_batch: 8, linger: Duration::ZERO },
            limits: ImageLimits {
                image_bytes: 1 << 20,
                image_pixels: 1 << 20,
                images_in_flight: 64,
                images_at_least: 64,
                bytes_in_flight: 64 << 20,
                image_time: LONG,
                wait_time: LONG,
                decoders: 2,
            },
            options: WorkerOptions {
                name: "rig".into(),
                model: MODEL.into(),
                jobs_in_flight: 16,
                job_time: LONG,
                grace: LONG,
                retry: RetrySchedule {
                    delays: vec![Duration::from_secs(5), Duration::from_secs(60)],
                    max_attempts: 3,
                },
                every_image: false,
                shadow: None,
                cancellations: None,
                traces: None,
            },
            catalog: fixed(None),
            sink: TestSink::default(),
            queue: MemoryQueue::default(),
            outage: None,
            held: None,
        }
    }
}

/// A catalog over a root, left alone.
pub const CATALOG: CatalogOptions =
    CatalogOptions { poll: LONG, cache_bytes: 1 << 20, version_bytes: 1 << 20 };

/// A catalog that holds red, green and blue under every name: the fake's embedding of a pixel is
/// its colour.
pub fn fixed(min_score: Option<f32>) -> Catalog {
    let labels = ["red", "green", "blue"].map(str::to_owned).to_vec();
    let vectors = array![[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    let name = ("colours", "1");
    let mut contents = Contents::new(labels, vectors, MODEL);
    contents.min_score = min_score;
    let classes = ClassVectors::new(name, contents).unwrap();
    Catalog::fixed(classes, MODEL, 3).unwrap()
}

impl Rig {
    /// The engine is held in its first batch until what this yields is dropped.
    pub fn hold_engine(&mut self) -> SyncSender<()> {
        let (hold, held) = sync_channel(1);
        self.held = Some(held);
        hold
    }

    pub fn start(self) -> Running {
        self.start_with(|source| source)
    }

    /// With something between the queue and the worker.
    pub fn start_with(
        self,
        wrap: impl FnOnce(Box<dyn JobSource>) -> Box<dyn JobSource>,
    ) -> Running {
        let batches = Arc::new(Mutex::new(Vec::new()));
        let embedder = Recorded {
            inner: self.embedder,
            warm: false,
            batches: Arc::clone(&batches),
            held: self.held,
        };
        let engine =
            Engine::start(vec![Box::new(embedder)], self.policy, (1, 1), Scorer::default())
                .unwrap();
        let store = Arc::new(TestStore::default());
        let sink = Arc::new(self.sink);
        let spec =
            PixelSpec { width: 1, height: 1, resize: Resize::Exact, filter: Filter::Bilinear };
        let images: Arc<dyn ImageStore> = store.clone();
        let mut pipeline = Pipeline::new(images, engine.clone(), spec, &self.limits);
        if let Some(outage) = self.outage {
            pipeline = pipeline.watched_by(outage);
        }
        let pipeline = Arc::new(pipeline);
        let watched = Arc::clone(&pipeline);
        let watch =
            AbortOnDropHandle::new(tokio::spawn(async move { watched.watch_store().await }));
        let queue = self.queue;
        let source = queue.source(JOB_LIMITS);
        let results: Arc<dyn ResultSink> = sink.clone();
        let worker = Worker::new(
            wrap(Box::new(source)),
            results,
            pipeline,
            Arc::new(self.catalog),
            self.options,
        );
        let stop = CancellationToken::new();
        let worker = tokio::spawn(worker.run(stop.clone()));
        Running { queue, store, sink, engine, batches, stop, worker, _watch: watch }
    }
}

/// A worker at work.
pub struct Running {
    pub queue: MemoryQueue,
    pub store: Arc<TestStore>,
    pub sink: Arc<TestSink>,
    pub engine: Engine,
    pub stop: CancellationToken,
    batches: Arc<Mutex<Vec<usize>>>,
    worker: JoinHandle<Result<(), FatalError>>,
    _watch: AbortOnDropHandle<()>,
}

impl Running {
    /// Queues a job over these images.
    pub fn job(&self, id: &str, images: &[&str]) {
        self.push(json!({"id": id, "images": images, "classes": "colours"}));
    }

    pub fn push(&self, job: Value) {
        self.queue.push(job.to_string());
    }

    /// The sizes of the embedder's batches so far.
    pub fn batches(&self) -> Vec<usize> {
        self.batches.lock().unwrap().clone()
    }

    /// How many images' time in a step was recorded.
    pub fn timed(&self, step: &str) -> u64 {
        let families = self.engine.metrics().gather();
        let text = prometheus::TextEncoder::new().encode_to_string(&families).unwrap();
        let line = format!("angler_step_seconds_count{{step=\"{step}\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&line)).unwrap().parse().unwrap()
    }

    /// How many batches closed as full, by lingering, by draining.
    pub fn closed(&self) -> [u64; 3] {
        let stats: &EngineStats = self.engine.stats();
        [CloseReason::Full, CloseReason::Linger, CloseReason::Drain].map(|r| stats.batches(r))
    }

    /// How deliveries were settled so far, by job id.
    pub fn settled(&self) -> Vec<(String, Settlement)> {
        let id = |body: Vec<u8>| match serde_json::from_slice::<Value>(&body) {
            Ok(job) => job["id"].as_str().unwrap_or_default().to_owned(),
            Err(_) => String::new(),
        };
        self.queue.settled().into_iter().map(|(body, how)| (id(body), how)).collect()
    }

    /// The outcome of the worker's run, which must come by itself.
    pub async fn ended(&mut self) -> Result<(), FatalError> {
        (&mut self.worker).await.expect("the worker panicked")
    }

    /// The worker's end once every job is settled for good.
    pub async fn finished(&mut self) {
        self.queue.end();
        self.ended().await.expect("the worker failed");
        assert_eq!(self.queue.depth(), (0, 0), "a job was left");
    }

    /// The one result, after [`Self::finished`].
    pub async fn only_result(&mut self) -> JobResult {
        self.finished().await;
        let mut results = self.sink.results();
        assert_eq!(results.len(), 1, "{results:?}");
        results.remove(0)
    }

    /// The result of a job.
    pub fn result(&self, id: &str) -> JobResult {
        let mut of_job: Vec<JobResult> =
            self.sink.results().into_iter().filter(|r| r.id == id).collect();
        assert_eq!(of_job.len(), 1, "results of {id}: {of_job:?}");
        of_job.remove(0)
    }
}

/// The entries of a job that is done.
pub fn entries(result: &JobResult) -> &[ImageEntry] {
    match &result.outcome {
        Outcome::Done { images, .. } => images,
        Outcome::Failed { error } => panic!("{} failed: {}: {error}", result.id, error.code),
    }
}

/// `code: message` of a failed job.
pub fn failure(result: &JobResult) -> String {
    match &result.outcome {
        Outcome::Done { .. } => panic!("{} did not fail", result.id),
        Outcome::Failed { error } => format!("{}: {error}", error.code),
    }
}

/// The classification of an image that has one.
pub fn classified(entry: &ImageEntry) -> &Classified {
    match &entry.verdict {
        Verdict::Labelled(classified) => classified,
        Verdict::Failed { error } => panic!("{} failed: {}: {error}", entry.uri, error.code),
    }
}

/// Each image's label (`-` for null), or the code of its error.
pub fn verdicts(result: &JobResult) -> Vec<String> {
    let verdict = |entry: &ImageEntry| match &entry.verdict {
        Verdict::Labelled(classified) => classified.label.clone().unwrap_or_else(|| "-".into()),
        Verdict::Failed { error } => error.code.to_string(),
    };
    entries(result).iter().map(verdict).collect()
}

/// The message of an image's error.
pub fn message(entry: &ImageEntry) -> &str {
    match &entry.verdict {
        Verdict::Failed { error } => &error.message,
        Verdict::Labelled(classified) => panic!("{} has {classified:?}", entry.uri),
    }
}
