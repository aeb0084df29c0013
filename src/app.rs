//! The composition root: settings become parts, parts become a [`Worker`]. The only file that
//! names every adapter.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::OnceCell;
use tokio_util::task::AbortOnDropHandle;

use angler_amqp::AmqpOptions;
use angler_amqp::address::{addresses, shown};
use angler_amqp::cancelled::CancelledRuns;
use angler_amqp::control::ControlClient;
use angler_amqp::control_listener::ControlListener;
use angler_amqp::dead::{DeadError, DeadLetters};
use angler_amqp::losses::Losses;
use angler_amqp::publisher::Publisher;
use angler_amqp::sink::AmqpSink;
use angler_amqp::source::AmqpSource;
use angler_core::class_sets::catalog::Catalog;
use angler_core::class_sets::shadow::Shadow;
use angler_core::outage_detector::Outage;
use angler_core::pipeline::Pipeline;
use angler_core::readiness::{About, Readiness};
use angler_core::sink::ResultSink;
use angler_core::source::JobSource;
use angler_core::source::lanes::Lanes;
use angler_core::store::shared::SharedImages;
use angler_core::store::{ImageStore, ObjectStore, Routed};
use angler_core::watchdog;
use angler_core::worker;
use angler_core::worker::{Worker, WorkerOptions};
use angler_inference::embed;
use angler_inference::engine::Engine;
use angler_inference::model::Model;
use angler_metrics::Metrics;
use angler_storage::local::{LocalImages, LocalObjects};
use angler_storage::s3::{Clients, S3Images, S3Objects, S3Uri};
use angler_wire::text::chain;

use crate::builtin_model;
use crate::config::{Lane, Settings};
use crate::telemetry::otlp::{Identity, Otlp};

/// The parts that every command is put together from.
pub struct App {
    /// The settings, all layers.
    pub settings: Settings,
    /// What the engine and all around it record.
    pub metrics: Arc<Metrics>,
    s3: OnceCell<Clients>,
}

impl App {
    /// Parts by these settings; nothing is opened yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, metrics: Arc::default(), s3: OnceCell::new() }
    }

    /// The one client of the store; its requests are not made yet.
    ///
    /// # Errors
    /// If `s3.ca_file` cannot be used.
    pub async fn s3_client(&self) -> Result<aws_sdk_s3::Client> {
        Ok(self.s3_clients().await?.get())
    }

    /// The one client of the store, replaced when its credentials are rejected.
    async fn s3_clients(&self) -> Result<Clients> {
        let options = self.settings.s3_options();
        Ok(self.s3.get_or_try_init(|| async { Clients::new(&options).await }).await?.clone())
    }

    /// Images in S3.
    ///
    /// # Errors
    /// If `s3.ca_file` cannot be used.
    pub async fn s3_images(&self) -> Result<S3Images> {
        Ok(S3Images::new(self.s3_clients().await?, &self.settings.s3_options()))
    }

    /// The folder or bucket prefix of `classes.root`.
    ///
    /// # Errors
    /// If it is an `s3://` URI without a bucket, or `s3.ca_file` cannot be used.
    pub async fn class_root(&self) -> Result<Arc<dyn ObjectStore>> {
        let root = &self.settings.classes.root;
        if !root.starts_with("s3://") {
            return Ok(Arc::new(LocalObjects::new(root)));
        }
        let uri = S3Uri::parse(root).context("classes.root")?;
        Ok(Arc::new(S3Objects::new(self.s3_clients().await?, uri)))
    }

    /// A bucket's objects.
    ///
    /// # Errors
    /// If `s3.ca_file` cannot be used.
    pub async fn bucket(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let root = S3Uri { bucket: bucket.to_owned(), key: String::new() };
        Ok(Arc::new(S3Objects::new(self.s3_clients().await?, root)))
    }

    /// The model of `model.path`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn model(&self) -> Result<Model> {
        Ok(builtin_model::load(&self.settings.model.path)?)
    }

    /// Opens the back end, warms it and starts the engine; says in one log line what runs and why.
    ///
    /// Must be called on a multi-threaded runtime: loading takes seconds, in which its other
    /// threads go on.
    ///
    /// # Errors
    /// What is missing.
    pub fn engine(&self, model: &Model) -> Result<Engine> {
        tokio::task::block_in_place(|| {
            let opened = embed::open(model, &self.settings.embed_options())?;
            tracing::info!(model = model.fingerprint, "back end {}", opened.reason);
            let size = (model.pixels.width, model.pixels.height);
            let policy = self.settings.batch_policy();
            let on_failure = self.settings.embedder.on_device_failure;
            let scorer = self.settings.scorer();
            let metrics = Arc::clone(&self.metrics);
            Ok(Engine::start_with(opened.embedders, policy, size, scorer, on_failure, metrics)?)
        })
    }

    /// Images from `store` through `engine`.
    pub fn pipeline(
        &self,
        model: &Model,
        engine: Engine,
        store: Arc<dyn ImageStore>,
    ) -> Arc<Pipeline> {
        let limits = self.settings.image_limits();
        Arc::new(Pipeline::new(store, engine, model.pixels.clone(), &limits))
    }

    /// Local files, and S3 if any of `uris` lies there.
    ///
    /// # Errors
    /// If `s3.ca_file` cannot be used.
    pub async fn images_for(
        &self,
        uris: impl Iterator<Item = &str>,
    ) -> Result<Arc<dyn ImageStore>> {
        let mut uris = uris;
        let s3 = if uris.any(|uri| uri.starts_with("s3://")) {
            Some(Arc::new(self.s3_images().await?) as Arc<dyn ImageStore>)
        } else {
            None
        };
        Ok(Arc::new(Routed { s3, local: Arc::new(LocalImages) }))
    }

    /// The versions under `classes.root`, for this model.
    ///
    /// # Errors
    /// If the root cannot be used.
    pub async fn catalog(&self, model: &Model) -> Result<Catalog> {
        let options = self.settings.catalog_options();
        Ok(Catalog::new(self.class_root().await?, &model.fingerprint, model.dim, options))
    }

    /// Notices when the store cannot be used: for certain if class sets are in it, too.
    fn outage(&self) -> Outage {
        let root = &self.settings.classes.root;
        match S3Uri::parse(root) {
            Ok(_) => Outage::probing(format!("{}/probe", root.trim_end_matches('/'))),
            Err(_) => Outage::default(),
        }
    }

    /// Asks workers over the control exchange; `command` is part of its connection's name.
    ///
    /// # Errors
    /// If the broker cannot be reached.
    pub async fn control_client(&self, command: &str) -> Result<ControlClient> {
        let s = &self.settings;
        Ok(ControlClient::connect(&s.amqp_options(command), &s.topology()).await?)
    }

    /// A pass over the dead letters; `command` is part of its connection's name.
    ///
    /// # Errors
    /// [`DeadError`].
    pub async fn dead_letters(&self, command: &str) -> Result<DeadLetters, DeadError> {
        let s = &self.settings;
        DeadLetters::open(&s.amqp_options(command), &s.amqp.dead_queue).await
    }

    /// Publishes jobs for a command; connects when it is first needed.
    pub fn job_publisher(&self, command: &str) -> Publisher {
        let s = &self.settings;
        Publisher::new(s.amqp_options(command), s.topology())
    }

    /// Publishes results, retries and dead letters, of all queues of jobs.
    fn result_publisher(&self, options: &AmqpOptions) -> Publisher {
        let s = &self.settings;
        let publisher = Publisher::new(options.clone(), s.topology());
        let others = s.amqp.jobs_queue.iter().skip(1);
        others.fold(publisher, |publisher, lane| publisher.and(s.topology_of(lane)))
    }

    /// Jobs from the queue, or from several by their weights.
    fn source(
        &self,
        options: &AmqpOptions,
        publisher: &Arc<Publisher>,
        losses: &Arc<Losses>,
        readiness: &Arc<Readiness>,
    ) -> Box<dyn JobSource> {
        let s = &self.settings;
        let of = |lane: &Lane| -> Box<dyn JobSource> {
            let source = AmqpSource::new(
                options.clone(),
                s.topology_of(lane),
                s.amqp.prefetch,
                s.job_limits(),
                Arc::clone(publisher),
                Arc::clone(readiness),
            );
            Box::new(source.with_losses(Arc::clone(losses)))
        };
        let lanes = &s.amqp.jobs_queue;
        match lanes.iter().len() {
            1 => of(lanes.first()),
            _ => Box::new(Lanes::new(lanes.iter().map(|lane| (of(lane), lane.weight)).collect())),
        }
    }

    /// What a worker is told; `jobs_in_flight` bounds admitted jobs.
    pub fn worker_options(
        &self,
        name: &str,
        model: &Model,
        jobs_in_flight: usize,
    ) -> WorkerOptions {
        let s = &self.settings;
        WorkerOptions {
            name: name.to_owned(),
            model: model.fingerprint.clone(),
            jobs_in_flight,
            job_time: Duration::from_secs_f64(s.limits.job_seconds),
            grace: Duration::from_secs(s.shutdown.grace_seconds),
            retry: s.retry_schedule(),
            every_image: false,
            shadow: None,
            cancellations: None,
            traces: None,
        }
    }

    /// The daemon: RabbitMQ on both ends, S3 between, class sets loaded.
    ///
    /// # Errors
    /// What is missing.
    pub async fn daemon(&self, readiness: Arc<Readiness>) -> Result<Daemon> {
        let model = self.model()?;
        let engine = self.engine(&model)?;
        self.daemon_with(readiness, &model, engine).await
    }

    /// The daemon around an engine that was made elsewhere. So a measurement runs the daemon itself
    /// with another back end.
    ///
    /// * `engine`: takes the pixels of `model` and gives its embeddings.
    ///
    /// # Errors
    /// What is missing.
    pub async fn daemon_with(
        &self,
        readiness: Arc<Readiness>,
        model: &Model,
        engine: Engine,
    ) -> Result<Daemon> {
        let s = &self.settings;
        let name = worker_name();
        let catalog = self.catalog(model).await?.uploading_to(engine.class_memories());
        let catalog = Arc::new(catalog);
        readiness.set_catalog(Arc::clone(&catalog));
        readiness.set_about(About {
            worker: name.clone(),
            queue: s.amqp.jobs_queue.names(),
            model: model.fingerprint.clone(),
            max_batch: s.embedder.max_batch,
        });
        for selector in s.preload()? {
            let loaded = catalog.preload(&selector).await;
            loaded.with_context(|| format!("classes.preload: {selector}"))?;
        }
        let shadow = s.shadow()?.map(|selector| Arc::new(Shadow::new(selector)));
        readiness.set_warm();
        let store = Arc::new(SharedImages::new(Arc::new(self.s3_images().await?)));
        let limits = s.image_limits();
        let pipeline = Pipeline::new(store, engine.clone(), model.pixels.clone(), &limits);
        let pipeline = Arc::new(pipeline.watched_by(Arc::new(self.outage())));
        readiness.set_pipeline(Arc::clone(&pipeline));
        let brokers = shown(&addresses(s.amqp.url.as_str())?);
        tracing::info!(broker = brokers, worker = name, "connecting");
        let options = s.amqp_options(&name);
        let publisher = Arc::new(self.result_publisher(&options));
        let losses = Arc::new(Losses::new(options.clone(), s.topology()));
        let source = self.source(&options, &publisher, &losses, &readiness);
        let (results, allowed) = (s.amqp.results_queue.clone(), s.amqp.reply_to_allow.clone());
        let blocked = Duration::from_secs_f64(s.amqp.blocked_seconds);
        let sink = AmqpSink::new(Arc::clone(&publisher), results, allowed)
            .with_runs_of(&s.amqp.jobs_queue.first().queue)
            .stuck_after(blocked);
        let sink: Arc<dyn ResultSink> = Arc::new(sink.counted_by(Arc::clone(engine.metrics())));
        let listener = Arc::new(ControlListener::new(
            s.amqp_options(&name),
            s.topology(),
            Arc::clone(&losses),
            Arc::clone(&catalog),
            shadow.clone(),
        ));
        let (told, publishes) = (Arc::clone(&readiness), Arc::clone(&publisher));
        let blocks = async move { publishes.follow(|reason| told.set_blocked(reason)).await };
        let (watched, watching) = (Arc::clone(&catalog), Arc::clone(&pipeline));
        let stall = Duration::from_secs_f64(s.limits.stall_seconds);
        let stalls = watchdog::watch(pipeline.steps(), stall, move |s| readiness.set_stalled(s));
        let mut followers = vec![
            AbortOnDropHandle::new(tokio::spawn(listener.run())),
            AbortOnDropHandle::new(tokio::spawn(async move { watched.watch().await })),
            AbortOnDropHandle::new(tokio::spawn(async move { watching.watch_store().await })),
            AbortOnDropHandle::new(tokio::spawn(stalls)),
            AbortOnDropHandle::new(tokio::spawn(blocks)),
        ];
        if let Some(shadow) = &shadow {
            let (catalog, shadow) = (Arc::clone(&catalog), Arc::clone(shadow));
            let poll = s.catalog_options().poll;
            let loading = async move { load_shadow(&catalog, &shadow, poll).await };
            followers.push(AbortOnDropHandle::new(tokio::spawn(loading)));
        }
        let jobs = usize::from(s.amqp.prefetch) * s.amqp.jobs_queue.iter().len();
        let mut options = self.worker_options(&name, model, jobs);
        options.shadow = shadow;
        let first = s.amqp.jobs_queue.first().queue.clone();
        let identity = Identity { worker: name, model: model.fingerprint.clone() };
        let otlp = Otlp::start(&s.telemetry, &identity)?;
        options.traces = otlp.as_ref().map(Otlp::traces);
        options.cancellations = Some(Arc::new(CancelledRuns::new(Arc::clone(&publisher), first)));
        let worker = Worker::new(source, sink, pipeline, Arc::clone(&catalog), options);
        let surroundings = Surroundings { engine, publisher, otlp, followers };
        Ok(Daemon { worker, surroundings })
    }
}

/// Loads the candidate that is tried. It may not be there yet, and nothing waits for it.
async fn load_shadow(catalog: &Catalog, shadow: &Shadow, poll: Duration) {
    let mut failing = String::new();
    loop {
        match catalog.resolve(shadow.selector()).await {
            Ok(classes) => {
                tracing::info!(candidate = classes.id(), "tried beside what is served");
                return shadow.set_candidate(classes);
            }
            Err(error) => {
                let error = chain(&error);
                if error != failing {
                    tracing::warn!("classes.shadow cannot be tried yet: {error}");
                    failing = error;
                }
            }
        }
        tokio::time::sleep(poll).await;
    }
}

/// What the end of a worker's surroundings may take: of the publisher's connection 5 s, of the model's threads
/// 5 s, of the traces that are not sent yet 3 s.
const CLOSING: Duration = Duration::from_secs(8);
/// From the end of a drain to the end of the process, at most: SIGKILL must not come before.
pub const AFTER_DRAIN: Duration = worker::CLOSING.saturating_add(CLOSING);

/// A worker, and what it runs in.
pub struct Daemon {
    /// Not started yet.
    pub worker: Worker,
    /// To be closed once it has run.
    pub surroundings: Surroundings,
}

/// What a worker runs in.
pub struct Surroundings {
    /// Runs the model.
    pub engine: Engine,
    /// Publishes results, retries and dead letters.
    publisher: Arc<Publisher>,
    /// Sends traces, if that is wanted.
    otlp: Option<Otlp>,
    /// Follow the active versions, the store and the watchdog until they are dropped.
    followers: Vec<AbortOnDropHandle<()>>,
}

impl Surroundings {
    /// Ends it all, within a deadline.
    pub async fn close(self) {
        drop(self.followers);
        let work = async {
            self.engine.close().await;
            // Its last batches are spans, too.
            if let Some(otlp) = self.otlp {
                otlp.close().await;
            }
        };
        let closed = async { tokio::join!(self.publisher.close(), work) };
        let _ = tokio::time::timeout(CLOSING, closed).await;
    }
}

/// The host's name: in a container it is the container's or the pod's.
fn worker_name() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

/// Whether a path or URI lies in S3.
pub fn is_s3(place: &str) -> bool {
    place.starts_with("s3://")
}

/// The last component of a path or URI, for names.
pub fn last_component(place: &str) -> String {
    let trimmed = place.trim_end_matches('/');
    let name = Path::new(trimmed).file_name().map(|n| n.to_string_lossy().into_owned());
    name.unwrap_or_default()
}
