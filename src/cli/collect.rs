//! `angler collect`: the results of a run in one file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use indicatif::ProgressBar;
use lapin::Connection;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::UsageError;
use super::output;
use super::progress::progress_bar;
use super::tables::show;
use crate::amqp::ask::look_at;
use crate::amqp::connect;
use crate::amqp::dead::Filter;
use crate::app::App;
use crate::bulk::collector::{CollectError, Ended, Until, collect};
use crate::bulk::journal::Journal;
use crate::bulk::queues::{RunQueues, check_run};
use crate::bulk::table::{Format, Rows};
use crate::job::{JobResult, Outcome, Verdict};
use crate::shutdown;

/// Labels that a summary shows.
const LABELS: usize = 10;
/// Ranges of missing jobs that are named.
const RANGES: usize = 10;

/// Collect the results of a run into one file
///
/// The file appears when there is a result of each job, each image exactly once; until then results
/// are kept beside it, in a file that begins with a dot, and in the run's queue. Interrupted or
/// killed, the same command goes on. At the end the run's queues are deleted. A job that failed whole
/// is a row with its id and error. The exit code is 0 only if the run is complete.
#[derive(Args)]
pub struct Collect {
    /// The run, as `angler enqueue` named it
    #[arg(long, value_name = "ID")]
    run: String,
    /// Where results go, .jsonl (a line an image, as `angler classify` writes it) or .csv
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    limits: Limits,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// When collecting ends although the run is not complete.
#[derive(Args)]
pub(super) struct Limits {
    /// Stop when more than this share of the images, or of whole jobs, failed, 0 to 1
    #[arg(long, value_name = "SHARE", value_parser = share)]
    max_failure_rate: Option<f64>,
    /// Stop when no result comes for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    silence: u64,
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    (0.0..=1.0).contains(&share).then_some(share).ok_or_else(|| "must be 0 to 1".to_owned())
}

impl Collect {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        check_run(&self.run).map_err(|e| UsageError(format!("--run: {e}")))?;
        output::check("--out", Some(&self.out))?;
        Format::of(&self.out).map_err(UsageError)?;
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let queues = RunQueues::new(&app.settings.amqp.jobs_queue.first().queue, &self.run);
        let bar = progress_bar(0, "done");
        bar.unset_length();
        let (run, out, limits) = (self.run.as_str(), self.out.as_path(), &self.limits);
        let collecting = Collecting { app, run, queues: &queues, out, jobs: None, limits, bar };
        collecting.run(&stop).await?.tell(self.json)
    }
}

/// A run that is being collected.
pub(super) struct Collecting<'a> {
    pub app: &'a App,
    pub run: &'a str,
    pub queues: &'a RunQueues,
    pub out: &'a Path,
    /// How many jobs it has, if that is known.
    pub jobs: Option<u64>,
    pub limits: &'a Limits,
    pub bar: ProgressBar,
}

impl Collecting<'_> {
    /// Collects while `sending` goes on.
    pub(super) async fn beside<T, E>(
        self,
        sending: impl Future<Output = Result<T, E>>,
        stop: &CancellationToken,
    ) -> (Result<T, E>, Result<Collected>) {
        // Ends the collecting when the sending failed: then the run will not be complete.
        let end = stop.child_token();
        let sending = async {
            let sent = sending.await;
            if sent.is_err() {
                end.cancel();
            }
            sent
        };
        // The run's queues are declared by the sender as well; declaring is idempotent.
        let collecting = async {
            self.declare().await?;
            self.run(&end).await
        };
        tokio::join!(sending, collecting)
    }

    async fn declare(&self) -> Result<()> {
        let connection = connect(&self.app.settings.amqp_options("collect"), "collect").await?;
        let channel = connection.create_channel().await?;
        let declared = self.queues.declare(&channel).await;
        crate::amqp::close(&connection).await;
        Ok(declared?)
    }

    pub(super) async fn run(self, stop: &CancellationToken) -> Result<Collected> {
        let Self { app, run, queues, out, jobs, limits, bar } = self;
        let options = app.settings.amqp_options("collect");
        let path = Journal::path(out, run);
        let mut journal = Journal::open(&path, run).with_context(|| path.display().to_string())?;
        let mut summary = Summary::default();
        tokio::task::block_in_place(|| {
            journal.read(|line| {
                summary.add(line);
                Ok::<_, std::io::Error>(())
            })
        })?;
        let connection = connect(&options, "collect").await?;
        let sent = queues.sent(&connection).await;
        crate::amqp::close(&connection).await;
        if let Some(jobs) = jobs.or(sent?.map(|sent| sent.run.jobs)) {
            journal.expect(jobs);
        }
        bar.set_position(summary.images);
        bar.reset_elapsed();
        let started = Instant::now();
        let before = summary.images;
        let until = Until { stop, silence: Duration::from_secs(limits.silence) };
        let most = limits.max_failure_rate;
        let ended = collect(&options, queues, run, &mut journal, until, |body| {
            summary.add(body);
            bar.set_position(summary.images);
            if summary.failures() > 0 {
                bar.set_message(format!("{} errors", summary.failures()));
            }
            most.is_none_or(|most| !summary.exceeds(most))
        });
        let ended = match ended.await {
            // Everything was written by a command that was ended before it could say so.
            Err(CollectError::NoRun { .. }) if journal.have().is_complete() => Ended::Complete,
            // Nothing of this run was ever here: leave nothing behind.
            Err(error @ CollectError::NoRun { .. }) if journal.have().count() == 0 => {
                journal.remove()?;
                return Err(error.into());
            }
            ended => ended?,
        };
        bar.finish_and_clear();
        summary.rate = (summary.images - before) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        (summary.run, summary.jobs, summary.complete) =
            (run.to_owned(), journal.have().count(), ended == Ended::Complete);
        if !matches!(ended, Ended::Complete | Ended::Cancelled) {
            let known = known(app, run)
                .await
                .unwrap_or_else(|e| format!("(the broker cannot be asked: {e})"));
            let reason = reason(ended, limits);
            let missing = missing(&journal);
            journal.sync()?;
            return Ok(Collected {
                summary,
                out: None,
                incomplete: Some(format!("{reason}: {missing}. {known}. The same command goes on")),
            });
        }
        let journal_planned = journal.have().planned().unwrap_or(0);
        tokio::task::block_in_place(|| write(&mut journal, out))?;
        let connection = connect(&options, "collect").await?;
        let deleted = queues.delete(&connection).await;
        crate::amqp::close(&connection).await;
        deleted?;
        journal.remove()?;
        let planned = journal_planned;
        let incomplete = (ended == Ended::Cancelled).then(|| {
            format!("it was cancelled when {} of its {planned} jobs had been sent", summary.jobs)
        });
        Ok(Collected { summary, out: Some(out.to_owned()), incomplete })
    }
}

/// The journal's results as the file that was asked for, whole or not at all.
fn write(journal: &mut Journal, out: &Path) -> Result<()> {
    let format = Format::of(out).map_err(UsageError)?;
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let temporary = tempfile::Builder::new()
        .prefix(".angler-")
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .with_context(|| format!("--out {}", out.display()))?;
    let mut rows = Rows::new(format, BufWriter::new(temporary));
    journal.read(|line| {
        let result: JobResult = serde_json::from_slice(line)?;
        rows.write(&result)?;
        anyhow::Ok(())
    })?;
    let temporary = rows.finish()?.into_inner().map_err(|e| anyhow!("{e}"))?;
    temporary.as_file().sync_all()?;
    temporary.persist(out).with_context(|| format!("--out {}", out.display()))?;
    Ok(())
}

fn reason(ended: Ended, limits: &Limits) -> String {
    match ended {
        Ended::Complete | Ended::Cancelled => String::new(),
        Ended::Stopped => "interrupted".to_owned(),
        Ended::Failing => "too many failures (--max-failure-rate)".to_owned(),
        Ended::Silent => format!("no result for {} s", limits.silence),
    }
}

fn missing(journal: &Journal) -> String {
    let have = journal.have();
    let Some(jobs) = have.jobs() else { return "no result has come yet".to_owned() };
    let ranges = have.missing();
    let mut text = format!("{} of {jobs} jobs have no result, numbers ", jobs - have.count());
    for (at, (first, last)) in ranges.iter().take(RANGES).enumerate() {
        let comma = if at == 0 { "" } else { ", " };
        let _ = match first == last {
            true => write!(text, "{comma}{first}"),
            false => write!(text, "{comma}{first}-{last}"),
        };
    }
    if ranges.len() > RANGES {
        let _ = write!(text, " and {} ranges more", ranges.len() - RANGES);
    }
    text
}

/// What the broker knows of jobs that have no result.
async fn known(app: &App, run: &str) -> Result<String> {
    let connection = connect(&app.settings.amqp_options("collect"), "collect").await?;
    let backlog = backlog(app, &connection).await;
    crate::amqp::close(&connection).await;
    let Backlog { queued, suspects, retrying } = backlog?;
    let mut dead = app.dead_letters("collect").await?;
    let filter = Filter { runs: vec![run.to_owned()], ..Filter::default() };
    let mut letters = Vec::new();
    while let Some(letter) = dead.next().await? {
        if filter.matches(&letter) && letters.len() < RANGES {
            letters.push(format!("{} ({})", letter.job, letter.reason));
        }
    }
    dead.close().await?;
    let mut text = format!(
        "Of all runs {queued} jobs wait in {}, {suspects} to be run alone, {retrying} for a retry",
        app.settings.amqp.jobs_queue.names()
    );
    if !letters.is_empty() {
        let _ = write!(text, "; of this one given up: {}", letters.join(", "));
    }
    Ok(text)
}

/// Jobs of all runs that wait somewhere.
#[derive(Debug, Default, Serialize)]
pub(super) struct Backlog {
    /// For a worker.
    pub queued: u64,
    /// To be run alone, because a worker ended while it held them.
    pub suspects: u64,
    /// For their next attempt.
    pub retrying: u64,
}

/// Counts the jobs that wait.
pub(super) async fn backlog(app: &App, connection: &Connection) -> Result<Backlog> {
    let mut all = Backlog::default();
    let ready = async |queue: &str| {
        anyhow::Ok(look_at(connection, queue).await?.map_or(0, |queue| queue.ready))
    };
    for lane in &app.settings.amqp.jobs_queue {
        let lane = app.settings.topology_of(lane);
        all.queued += ready(&lane.jobs).await?;
        all.suspects += ready(&lane.suspects_queue()).await?;
        for delay in &lane.retry_delays {
            all.retrying += ready(&lane.retry_queue(*delay)).await?;
        }
    }
    Ok(all)
}

/// What came of a run.
pub(super) struct Collected {
    summary: Summary,
    out: Option<PathBuf>,
    incomplete: Option<String>,
}

impl Collected {
    /// Tells a person or a program; an error if the run is not complete.
    pub(super) fn tell(self, as_json: bool) -> Result<()> {
        let Self { summary, out, incomplete } = self;
        if as_json {
            show(&format!("{}\n", serde_json::to_string(&summary)?))?;
        } else {
            eprint!("{}", summary.text());
        }
        if let Some(out) = out {
            eprintln!("results in {}", out.display());
        }
        match incomplete {
            Some(reason) => {
                bail!("run {} is not complete: {reason}", summary.run)
            }
            None => Ok(()),
        }
    }
}

/// Counts over results.
#[derive(Default, Serialize)]
struct Summary {
    run: String,
    complete: bool,
    /// Jobs with a result.
    jobs: u64,
    images: u64,
    unknown: u64,
    labels: BTreeMap<String, u64>,
    /// Images that failed, by code.
    errors: BTreeMap<String, u64>,
    /// Jobs that failed whole, by code.
    failed_jobs: BTreeMap<String, u64>,
    /// Images that each version, model and back end classified.
    classified_by: BTreeMap<String, u64>,
    #[serde(rename = "images_per_second")]
    rate: f64,
}

impl Summary {
    fn add(&mut self, body: &[u8]) {
        let Ok(result) = serde_json::from_slice::<JobResult>(body) else {
            *self.failed_jobs.entry("unreadable".to_owned()).or_default() += 1;
            return;
        };
        let (provenance, images) = match result.outcome {
            Outcome::Done { provenance, images } => (provenance, images),
            Outcome::Failed { error } => {
                *self.failed_jobs.entry(error.code.to_string()).or_default() += 1;
                return;
            }
        };
        let by = format!("{} {} {}", provenance.classes, provenance.model, provenance.backend);
        *self.classified_by.entry(by).or_default() += images.len() as u64;
        self.images += images.len() as u64;
        for entry in images {
            match entry.verdict {
                Verdict::Labelled(classified) => match classified.label {
                    Some(label) => *self.labels.entry(label).or_default() += 1,
                    None => self.unknown += 1,
                },
                Verdict::Failed { error } => {
                    *self.errors.entry(error.code.to_string()).or_default() += 1;
                }
            }
        }
    }

    fn failures(&self) -> u64 {
        self.errors.values().sum::<u64>() + self.failed_jobs.values().sum::<u64>()
    }

    /// Whether too many failed: of at least a hundred, so that the first one does not decide.
    fn exceeds(&self, most: f64) -> bool {
        let all = self.images + self.failed_jobs.values().sum::<u64>();
        all >= 100 && self.failures() as f64 > most * all as f64
    }

    fn text(&self) -> String {
        let mut text = format!("run {}: {} jobs, {} images", self.run, self.jobs, self.images);
        if self.rate >= 1.0 {
            let _ = write!(text, ", {:.0} images/s", self.rate);
        }
        text.push('\n');
        let mut labels: Vec<(&String, &u64)> = self.labels.iter().collect();
        labels.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        let rest = labels.len().saturating_sub(LABELS);
        let mut shown: Vec<String> =
            labels.iter().take(LABELS).map(|(label, count)| format!("{label} {count}")).collect();
        if rest > 0 {
            shown.push(format!("{rest} more"));
        }
        if self.unknown > 0 {
            shown.push(format!("unknown {}", self.unknown));
        }
        let list = |counts: &BTreeMap<String, u64>| {
            counts.iter().map(|(code, count)| format!("{code} {count}")).collect::<Vec<_>>()
        };
        for (what, list) in [
            ("labels", shown),
            ("errors", list(&self.errors)),
            ("failed jobs", list(&self.failed_jobs)),
            ("classified by", list(&self.classified_by)),
        ] {
            if !list.is_empty() {
                let _ = writeln!(text, "  {what:<14}{}", list.join(", "));
            }
        }
        text
    }
}
