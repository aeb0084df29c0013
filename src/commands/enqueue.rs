//! `angler enqueue`: many images as the jobs of one run.

mod images;

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use angler_amqp::run_queues::check_run;
use angler_amqp::topology::Topology;
use angler_core::class_sets::load::version_key;
use angler_core::class_sets::publish::read_active;
use angler_runs::enqueuer::{Plan, Step, Target, enqueue};
use angler_runs::manifest::Format;
use angler_runs::spool::Images;
use angler_wire::job::{ClassSelector, MAX_TOP_K};

use super::UsageError;
use super::collect::files::Files;
use super::collect::{Collecting, Limits};
use super::progress::{RunBar, bars};
use super::tables::show;
use crate::app::App;
use crate::shutdown;

/// How a list is written, as `--format` names it.
#[derive(Clone, Copy, ValueEnum)]
enum ListFormat {
    /// A URI a line; empty lines and those that begin with # are left out
    Text,
    /// With a header, a column `uri` and perhaps one `id`; other columns are left out
    Csv,
    /// A URI or an object with `uri` and perhaps `id` a line, as `angler classify` writes it
    Jsonl,
    /// With a column `uri` of strings and perhaps one `id`; other columns are left out
    Parquet,
}

impl From<ListFormat> for Format {
    fn from(format: ListFormat) -> Self {
        match format {
            ListFormat::Text => Self::Text,
            ListFormat::Csv => Self::Csv,
            ListFormat::Jsonl => Self::Jsonl,
            ListFormat::Parquet => Self::Parquet,
        }
    }
}

/// Send the images of an S3 prefix or of a list as the jobs of one run
///
/// The jobs go to the first queue of amqp.jobs_queue, and their results to a queue of the run's own,
/// for `angler collect`. However it was interrupted, the same command with the same --run continues behind
/// the last job that the broker is known to have. After a kill or a lost connection a few jobs may be sent
/// twice; `angler collect` counts each once.
#[derive(Args)]
pub struct Enqueue {
    /// s3://bucket/prefix, a list of s3:// URIs (.txt, .csv, .jsonl, .parquet; a file or in S3), or - for a
    /// list on standard input
    #[arg(value_name = "s3://BUCKET/PREFIX|LIST|-")]
    source: String,
    /// What to compare with; without a version each job takes the one that is active then
    #[arg(long, value_name = "SET[@VERSION]")]
    classes: String,
    /// The run's id [default: the set and the time]
    #[arg(long, value_name = "ID")]
    run: Option<String>,
    /// Which queue of amqp.jobs_queue the jobs go to [default: the first]
    #[arg(long, value_name = "QUEUE")]
    queue: Option<String>,
    /// Images in a job
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1000))]
    per_job: u16,
    /// How many of the best classes to list for each image, 1 to 100
    #[arg(long, default_value_t = 1, value_name = "K", value_parser = top_k)]
    top_k: usize,
    /// Below this cosine similarity an image is unknown [default: the set's own threshold]
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true, value_parser = cosine)]
    min_score: Option<f32>,
    /// Add each image's normalised embedding
    #[arg(long)]
    embeddings: bool,
    /// Of a prefix only keys that match, such as "2026/**/*.jpg", below the prefix; may be repeated.
    /// Without it all whose ending is an image's
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
    /// Of a prefix no keys that match; may be repeated
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// How the list is written [default: by its ending; text on standard input]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<ListFormat>,
    /// Send nothing while this many jobs wait in the queue
    #[arg(long, value_name = "JOBS", value_parser = clap::value_parser!(u64).range(1..))]
    max_queued: Option<u64>,
    /// Give up when the broker accepts no job for this long; the same command continues later
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    patience: u64,
    /// Send nothing: count, and show the first images and what the version is
    #[arg(long)]
    dry_run: bool,
    /// Collect the results as well, until the run is complete
    #[arg(long, requires = "out", conflicts_with = "dry_run")]
    wait: bool,
    /// With --wait: where results go, .jsonl, .csv or .parquet
    #[arg(long, value_name = "FILE", requires = "wait")]
    out: Option<PathBuf>,
    /// With --wait: write the embeddings as well, as `angler collect` does; implies --embeddings
    #[arg(long, value_name = "FILE.npy", requires = "wait")]
    embeddings_out: Option<PathBuf>,
    #[command(flatten)]
    limits: Limits,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

fn top_k(text: &str) -> Result<usize, String> {
    let k: usize = text.parse().map_err(|_| "not a number".to_owned())?;
    (1..=MAX_TOP_K).contains(&k).then_some(k).ok_or_else(|| format!("must be 1 to {MAX_TOP_K}"))
}

fn cosine(text: &str) -> Result<f32, String> {
    let score: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    (-1.0..=1.0).contains(&score).then_some(score).ok_or_else(|| "must lie in [-1, 1]".to_owned())
}

impl Enqueue {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let selector = ClassSelector::parse(&self.classes).map_err(UsageError::of)?;
        let run = self.run_id(&selector)?;
        let topology = self.topology(app)?;
        if let Some(files) = self.files() {
            files.check()?;
        }
        // Before the first job, and before a million keys are listed.
        let version = resolve(app, &selector).await?;
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let images = tokio::select! {
            biased;
            () = stop.cancelled() => bail!("interrupted: no job was sent"),
            images = self.images(app) => images?,
        };
        if images.is_empty() {
            bail!("{} holds no image", self.source);
        }
        let plan = Plan {
            run,
            per_job: self.per_job.into(),
            classes: selector,
            top_k: self.top_k,
            min_score: self.min_score,
            embeddings: self.embeddings || self.embeddings_out.is_some(),
            max_queued: self.max_queued,
            patience: Duration::from_secs(self.patience),
        };
        match self.dry_run {
            true => self.show_plan(&plan, &images, &version),
            false => Box::pin(self.send(app, &topology, &plan, &images, &stop)).await,
        }
    }

    fn files(&self) -> Option<Files<'_>> {
        let out = self.out.as_deref()?;
        Some(Files { out, embeddings: self.embeddings_out.as_deref() })
    }

    fn run_id(&self, selector: &ClassSelector) -> Result<String, UsageError> {
        let run = match &self.run {
            Some(run) => run.clone(),
            None => {
                let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
                format!("{}-{}", selector.set, now.replace([':', 'Z'], ""))
            }
        };
        check_run(&run).map_err(|e| UsageError(format!("--run: {e}")))?;
        Ok(run)
    }

    /// The queues around the one that the jobs go to.
    fn topology(&self, app: &App) -> Result<Topology, UsageError> {
        let lanes = &app.settings.amqp.jobs_queue;
        let lane = match &self.queue {
            None => Some(lanes.first()),
            Some(queue) => lanes.iter().find(|lane| lane.queue == *queue),
        };
        let wrong = || UsageError(format!("--queue: amqp.jobs_queue has only {}", lanes.names()));
        Ok(app.settings.topology_of(lane.ok_or_else(wrong)?))
    }

    fn show_plan(&self, plan: &Plan, images: &Images, version: &str) -> Result<()> {
        let jobs = plan.jobs(images.len());
        if self.json {
            let first: Vec<&str> = images.first().iter().map(|i| i.uri.as_str()).collect();
            let all = json!({"run": plan.run, "images": images.len(), "jobs": jobs, "classes": version, "first": first});
            return Ok(show(&format!("{all:#}\n"))?);
        }
        let mut text = format!(
            "run      {}\nimages   {}, {jobs} job(s) of {}\nclasses  {version}\n",
            plan.run,
            images.len(),
            plan.per_job
        );
        for (at, image) in images.first().iter().enumerate() {
            text += &format!("{}{}\n", if at == 0 { "first    " } else { "         " }, image.uri);
        }
        text += "nothing was sent (--dry-run)\n";
        Ok(show(&text)?)
    }

    async fn send(
        &self,
        app: &App,
        topology: &Topology,
        plan: &Plan,
        images: &Images,
        stop: &CancellationToken,
    ) -> Result<()> {
        let total = images.len();
        let jobs = plan.jobs(total);
        let bars = bars();
        let bar = RunBar::new(&bars, Some(total), "sent");
        // Before the first job is sent: its journal may be in use.
        let collecting = self.files().map(|files| {
            let done = RunBar::new(&bars, Some(total), "done");
            Collecting::open(app, &plan.run, files, &self.limits, done)
        });
        let collecting = collecting.transpose()?;
        let (started, mut skipped, mut is_cancelled) = (Instant::now(), None, false);
        let per_job = plan.per_job as u64;
        // Until the last was sent: results may be waited for much longer.
        let (mut images_sent, mut seconds) = (0, Duration::ZERO);
        let (begun, run_begun) = oneshot::channel();
        let mut begun = Some(begun);
        let step = |step: Step| match step {
            Step::Begun(mark) => {
                if let Some(begun) = begun.take() {
                    let _ = begun.send(mark); // Nobody waits for it without --wait.
                }
            }
            Step::Sent(sent) => {
                images_sent = (sent * per_job).min(total);
                if skipped.is_none() {
                    // What was sent by an earlier command is no work of this one.
                    skipped = Some(sent);
                    bar.begin(images_sent);
                }
                seconds = started.elapsed();
                bar.set(images_sent, None, &[]);
            }
            Step::Full { queued } => bar.set(images_sent, None, &[format!("{queued} jobs wait")]),
            Step::Refused => bar.set(images_sent, None, &["the queue refuses jobs".to_owned()]),
            Step::Cancelled => is_cancelled = true,
        };
        let options = app.settings.amqp_options("enqueue");
        let first = app.settings.amqp.jobs_queue.first().queue.as_str();
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let sender = format!("process {} on {host}", std::process::id());
        let target = Target { options: &options, topology, first, sender: &sender };
        let sending = enqueue(target, plan, images, stop, step);
        let (sent, collected) = match collecting {
            None => (sending.await, None),
            Some(collecting) => {
                let all = Box::pin(collecting.alongside(sending, run_begun, stop)).await;
                (all.0, Some(all.1))
            }
        };
        bar.clear();
        let sent = sent?;
        let new = sent - skipped.unwrap_or(0).min(sent);
        if sent < jobs && is_cancelled {
            if let Some(collected) = collected {
                return collected?.tell(self.json);
            }
            bail!(
                "run {run} was cancelled when {sent} of {jobs} jobs had been sent; angler collect --run {run} --out FILE fetches their results",
                run = plan.run
            );
        }
        if sent < jobs {
            bail!(
                "interrupted: {sent} of {jobs} jobs of run {run} were sent; the same command with --run {run} goes on",
                run = plan.run
            );
        }
        if self.json && collected.is_none() {
            let rate = (new * per_job).min(total) as f64 / seconds.as_secs_f64().max(1e-9);
            let all = json!({"run": plan.run, "images": total, "jobs": jobs, "sent": new, "images_per_second": rate});
            show(&format!("{all}\n"))?;
        } else {
            eprintln!("{}", told(plan, total, jobs, new, seconds));
        }
        match collected {
            None if !self.json => {
                eprintln!("results: angler collect --run {} --out results.csv", plan.run);
                Ok(())
            }
            None => Ok(()),
            Some(collected) => collected?.tell(self.json),
        }
    }
}

fn told(plan: &Plan, images: u64, jobs: u64, new: u64, time: Duration) -> String {
    let run = &plan.run;
    match new {
        0 => format!("run {run}: all {jobs} jobs had been sent before"),
        _ => {
            let rate =
                (new * plan.per_job as u64).min(images) as f64 / time.as_secs_f64().max(1e-9);
            let before = match jobs - new {
                0 => String::new(),
                before => format!(", {before} before"),
            };
            format!(
                "run {run}: {images} images in {jobs} jobs, {new} sent now{before}, {rate:.0} images/s"
            )
        }
    }
}

/// The version that a job would be scored against now, which must be there.
async fn resolve(app: &App, selector: &ClassSelector) -> Result<String> {
    let root = app.class_root().await?;
    let set = &selector.set;
    let version = match &selector.version {
        Some(version) => version.clone(),
        None => match read_active(root.as_ref(), set).await? {
            Some((active, _)) => active.with_context(|| format!("class set {set}"))?.version,
            None => bail!(
                "there is no class set {set} with an active version in {} (angler classes list)",
                app.settings.classes.root
            ),
        },
    };
    let key = version_key(set, &version);
    if root.open(&key).await?.is_none() {
        bail!("{} does not exist: angler classes list shows what there is", root.place(&key));
    }
    Ok(format!("{set}@{version}"))
}
