//! `angler bench`: where this machine's time goes, and how close the pipeline is to its ceiling.
//!
//! Each part of an image's way is measured alone, as wide as the machine allows; out of that comes the
//! most that the whole could do. Then the whole is measured. Both are done in turn, round after round,
//! so that a machine that gets slower meanwhile does so for both.

mod baselines;
mod broker;
mod ceiling;
mod decode;
mod embed;
mod fetch;
mod figures;
mod fixture;
mod layout;
mod local;
mod meter;
mod page;
mod photos;
mod plan;
mod publish;
mod remote;
mod report;
mod score;
mod text;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget};
use tokio_util::sync::CancellationToken;

use angler_storage::s3::S3Uri;
use angler_vectors::rows::Precision;
use angler_vectors::{ClassVectors, file};

use super::{UsageError, output};
use crate::app::{App, is_s3};
use crate::commands::bench::ceiling::Ceiling;
use crate::commands::bench::fixture::{SET, Set, Stage, blocking, contents, pixels, write};
use crate::commands::bench::photos::{CAMERA, ONLY_DECODED, Photos, SMALL};
use crate::commands::bench::plan::{IMAGES_PER_JOB, Plan, Section};
use crate::commands::bench::remote::{Remote, with_own_queues};
use crate::commands::bench::report::{Machine, Measured, Path, Report};
use crate::commands::image_paths;
use crate::config::Settings;
use crate::shutdown;

/// The most images of one measurement of the whole.
const MOST_IMAGES: f64 = 100_000.0;
/// The most names that the images of a kind get.
const MOST_NAMES: usize = 4096;
/// What class vectors may take unless --memory says so, in bytes: a million of the default model's fit.
const MEMORY: u64 = 4_000_000_000;

/// Measure where this machine's time goes, and how close the pipeline is to its ceiling
///
/// First each part alone, on all cores: fetch, decode, embed, score, publish. From these follows the
/// ceiling, the most images a second that the slowest resource allows. Then the whole pipeline, and the
/// ratio. At last three ways without a pipeline: one by one, batched, and batched with the cosine in the
/// model's graph. Medians of the rounds.
///
/// Images are made in memory, the same every time, unless --images names some. With --amqp the whole
/// runs through the broker of amqp.url and the store as well, on queues and objects of its own, which are
/// removed at the end.
///
/// Run it on a machine that does nothing else. --quick only shows what there is to see.
///
/// Keys of --json: machine, model, settings, images, fetch, decode, embed, embed_skipped, score,
/// score_skipped, publish, whole (each with its parts, ceiling and ratio), ways, fused. Every figure is
/// images_per_second, ms_per_image, core_ms_per_image (the whole machine's) and own_core_ms_per_image.
#[derive(Args)]
pub struct Bench {
    /// Folders or image files to measure with, instead of made ones
    #[arg(long, value_name = "FOLDER|FILE", num_args = 1..)]
    images: Vec<String>,
    /// Measure only these
    #[arg(long, value_name = "SECTION", value_delimiter = ',')]
    only: Vec<Section>,
    /// A short run, to see what there is: the figures are worth little
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 3, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: Option<u16>,
    /// How long a part is measured each time; the whole takes ten times as long [default: 1, with --quick 0.2]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<f64>,
    /// Classes of the set that the whole is measured with
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    class_count: u32,
    /// What the class vectors of one measurement may take, in GB; larger sets are skipped
    /// [default: 4, or half of what the machine has left]
    #[arg(long, value_name = "GB")]
    memory: Option<f64>,
    /// Where images may be put for the while, to measure fetching from S3
    #[arg(long, value_name = "s3://BUCKET/PREFIX")]
    bucket: Option<String>,
    /// Also through the broker of amqp.url and the store
    #[arg(long, requires = "bucket")]
    amqp: bool,
    /// Print one JSON object instead of the report
    #[arg(long)]
    json: bool,
    /// Write the report as a page with charts
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    let possible = (0.01..=600.0).contains(&seconds);
    possible.then_some(seconds).ok_or_else(|| "must be 0.01 to 600".to_owned())
}

/// What a run is not to be interrupted in, and what it tells meanwhile.
struct Conduct {
    stop: CancellationToken,
    bar: ProgressBar,
    round: String,
}

impl Conduct {
    /// Does one step, unless the run is interrupted.
    async fn step<T>(&self, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.say(what);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(anyhow!("interrupted")),
            done = Box::pin(work) => done.with_context(|| what.to_owned()),
        }
    }

    fn say(&self, what: &str) {
        self.bar.set_message(format!("{}{what}", self.round));
    }
}

impl Bench {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let bucket = self.check()?;
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
        bar.enable_steady_tick(Duration::from_millis(250));
        let conduct = Conduct { stop, bar: bar.clone(), round: String::new() };
        let mut settings = app.settings.clone();
        with_own_queues(&mut settings);
        let remote = match bucket {
            Some(bucket) => Some(Arc::new(Remote::new(settings.clone(), bucket, self.amqp).await?)),
            None => None,
        };
        let outcome = Box::pin(self.measure(app, settings, remote.clone(), conduct)).await;
        bar.finish_and_clear();
        // However it ended.
        let cleared = match &remote {
            Some(remote) => remote.clear().await,
            None => Ok(()),
        };
        let report = outcome?;
        if let Some(path) = &self.html {
            tokio::task::block_in_place(|| angler_report::write(path, &report.page()))?;
            eprintln!("page in {}", path.display());
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.text());
        }
        cleared
    }

    fn check(&self) -> Result<Option<S3Uri>, UsageError> {
        if let Some(path) = self.images.iter().find(|path| is_s3(path)) {
            return Err(UsageError(format!("--images {path}: name local files or folders")));
        }
        if self.memory.is_some_and(|memory| !(memory > 0.0 && memory.is_finite())) {
            return Err(UsageError("--memory must be above 0".to_owned()));
        }
        if self.html.as_deref() == Some(std::path::Path::new("-")) {
            return Err(UsageError("--html -: a page goes to a file".to_owned()));
        }
        output::check("--html", self.html.as_deref())?;
        let parse =
            |uri: &String| S3Uri::parse(uri).map_err(|e| UsageError(format!("--bucket: {e}")));
        self.bucket.as_ref().map(parse).transpose()
    }

    async fn measure(
        &self,
        app: &App,
        settings: Settings,
        remote: Option<Arc<Remote>>,
        mut conduct: Conduct,
    ) -> Result<Report> {
        let setting = self.stage(app, settings, remote);
        let stage = conduct.step("making images", setting).await?;
        let machine = conduct.step("looking at the machine", machine(&stage)).await?;
        let mut measured = Measured::default();
        for round in 1..=stage.plan.rounds {
            conduct.round = format!("round {round} of {}: ", stage.plan.rounds);
            parts(&stage, &mut measured, &conduct).await?;
            if stage.plan.shows(Section::Whole) {
                whole(&stage, &mut measured, &conduct).await?;
            }
            if stage.plan.shows(Section::Ways) {
                let measuring = baselines::measure(&stage, &mut measured.ways);
                conduct.step("three ways", measuring).await?;
            }
        }
        Ok(Report::new(&stage, machine, &measured))
    }

    /// Makes all that the measurements share.
    async fn stage(
        &self,
        app: &App,
        mut settings: Settings,
        remote: Option<Arc<Remote>>,
    ) -> Result<Stage> {
        let running = (settings.embedder.max_batch, self.class_count as usize);
        let timing = (self.rounds.map(usize::from), self.seconds);
        let plan = Plan::new(&self.only, self.quick, timing, running);
        let memory = match self.memory {
            Some(memory) => (memory * 1e9) as u64,
            None => meter::available_memory().map_or(MEMORY, |left| MEMORY.min(left / 2)),
        };
        let own = match self.images.is_empty() {
            true => Vec::new(),
            false => image_paths::images(app, &self.images).await?,
        };
        let model = Arc::new(app.model()?);
        let folder = tempfile::Builder::new().prefix("angler-bench-").tempdir()?;
        settings.classes.root = folder.path().join("classes").to_string_lossy().into_owned();
        settings.classes.preload = vec![format!("{}@{}", SET.0, SET.1)];
        settings.classes.shadow = String::new();
        // The person at the keyboard chose the bucket.
        settings.s3.allowed_buckets = Vec::new();
        let limits = angler_pixels::PixelLimits { max_pixels: settings.limits.image_pixels };
        let names = if plan.quick {
            IMAGES_PER_JOB
        } else {
            settings.limits.images_in_flight + IMAGES_PER_JOB
        };
        let names = names.min(MOST_NAMES);
        let largest = plan.batches.iter().copied().max().unwrap_or(1);
        let rows = self.class_count as usize;
        let needed = (rows * model.dim * Precision::F32.bytes()) as u64;
        if needed > memory {
            let wrong = format!(
                "--class-count {rows}: they take {}, --memory allows {}",
                layout::bytes(needed),
                layout::bytes(memory)
            );
            return Err(UsageError(wrong).into());
        }
        let made = {
            let (plan, model) = (plan.clone(), Arc::clone(&model));
            let root = folder.path().to_owned();
            blocking(move || {
                let count =
                    |r: &photos::Recipe| plan.distinct(u64::from(r.width) * u64::from(r.height));
                let make = |r: photos::Recipe| Photos::make(r, count(&r)).map(Arc::new);
                let piped = match own.is_empty() {
                    true => vec![make(SMALL)?, make(CAMERA)?],
                    false => vec![Arc::new(Photos::read(&own)?)],
                };
                let others = own.is_empty() && plan.shows(Section::Decode);
                let others: Vec<Arc<Photos>> =
                    ONLY_DECODED.into_iter().filter(|_| others).map(make).collect::<Result<_>>()?;
                let pixels = pixels(&model, &piped[0], limits, largest)?;
                let local: Vec<Vec<String>> = piped
                    .iter()
                    .map(|photos| write(&root, photos, names))
                    .collect::<Result<_>>()?;
                let contents = contents(&model, rows, Precision::F32);
                let version = root.join("classes").join(SET.0);
                std::fs::create_dir_all(&version)?;
                let path = version.join(format!("{}.safetensors", SET.1));
                std::fs::write(path, file::write(&contents, SET)?)?;
                Ok((piped, others, pixels, local, ClassVectors::new(SET, contents)?))
            })
            .await?
        };
        let (piped, only_decoded, pixels, local, classes) = made;
        let mut sets = Vec::new();
        for (photos, local) in piped.into_iter().zip(local) {
            let remote = match &remote {
                Some(remote) => remote.upload(&photos, local.len()).await?,
                None => Vec::new(),
            };
            sets.push(Set { photos, local: local.into(), remote: remote.into() });
        }
        Ok(Stage {
            app: App::new(settings),
            model,
            plan,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            sets,
            only_decoded,
            pixels: Arc::new(pixels),
            classes: Arc::new(classes),
            memory,
            remote,
            _folder: folder,
        })
    }
}

/// What the machine is, and whether it was quiet before the start.
async fn machine(stage: &Stage) -> Result<Machine> {
    let look = Duration::from_millis(if stage.plan.quick { 200 } else { 1_000 });
    let busy = meter::busy_cores(look).await;
    Ok(Machine {
        cores: stage.cores,
        processors: meter::processors(),
        busy_cores_before: busy,
        // A twentieth of all cores.
        quiet: busy.map(|busy| busy <= 0.05 * stage.cores as f64),
    })
}

/// Each part alone.
async fn parts(stage: &Stage, measured: &mut Measured, conduct: &Conduct) -> Result<()> {
    let plan = &stage.plan;
    if plan.measures(Section::Fetch) {
        let measuring = fetch::measure(stage, &mut measured.fetch);
        conduct.step("fetch", measuring).await?;
    }
    if plan.measures(Section::Decode) {
        let all = plan.shows(Section::Decode);
        let measuring = decode::measure(stage, &mut measured.decode, all);
        conduct.step("decode", measuring).await?;
    }
    if plan.measures(Section::Embed) {
        let measuring = embed::measure(stage, &mut measured.embed, &mut measured.embed_skipped);
        conduct.step("embed", measuring).await?;
    }
    if plan.measures(Section::Score) {
        let measuring = score::measure(stage, &mut measured.score, &mut measured.score_skipped);
        conduct.step("score", measuring).await?;
    }
    if plan.measures(Section::Publish) {
        let measuring = publish::measure(stage, &mut measured.publish);
        conduct.step("publish", measuring).await?;
    }
    Ok(())
}

/// The pipeline, over each kind of images and each way that there is.
async fn whole(stage: &Stage, measured: &mut Measured, conduct: &Conduct) -> Result<()> {
    let with_broker = stage.remote.as_ref().is_some_and(|remote| remote.has_queues());
    for set in &stage.sets {
        let kind = &set.photos.kind;
        let count = enough(stage, measured, Path::Folder, kind);
        let measuring = local::measure(stage, set, count);
        let sample = conduct.step(&format!("the whole, {kind}"), measuring).await?;
        measured.whole.add((Path::Folder, kind.clone()), sample);
        if with_broker {
            let what = format!("the whole with broker and store, {kind}");
            conduct.say(&what);
            let count = enough(stage, measured, Path::Broker, kind);
            // Not a step: it ends in order when the run is interrupted.
            let sample = Box::pin(broker::measure(stage, set, count, &conduct.stop)).await;
            measured.whole.add((Path::Broker, kind.clone()), sample.context(what)?);
        }
    }
    Ok(())
}

/// As many images as the ceiling would let through in the time that the plan gives, in full jobs.
fn enough(stage: &Stage, measured: &Measured, path: Path, kind: &str) -> usize {
    let running = (stage.app.settings.embedder.max_batch, stage.classes.labels().len());
    let steps = measured.steps(path, kind, running);
    let rate = Ceiling::of(stage.cores, &steps).map_or(0.0, |ceiling| ceiling.images_per_second);
    let images = rate * stage.plan.whole_time().as_secs_f64();
    // `as` carries what is outside to the ends.
    (images.clamp(1.0, MOST_IMAGES) as usize).next_multiple_of(IMAGES_PER_JOB)
}
