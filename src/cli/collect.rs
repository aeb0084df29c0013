//! `angler collect`: the results of a run in one file.

pub(super) mod files;
pub(super) mod missing;
mod summary;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use self::files::{Files, Written, no_embeddings};
use self::missing::{known, missing};
use self::summary::Summary;
use super::UsageError;
use super::progress::{RunBar, bars};
use super::tables::show;
use crate::amqp::connect;
use crate::app::App;
use crate::bulk::collector::{CollectError, Ended, Until, collect};
use crate::bulk::embeddings::ids_path;
use crate::bulk::journal::Journal;
use crate::bulk::mark::{self, Mark};
use crate::bulk::queues::{IdQueues, RunQueues, check_run};
use crate::bulk::result::RunResult;
use crate::shutdown;

/// Collect the results of a run into one file
///
/// The file appears when there is a result of each job, each image exactly once; until then results
/// are kept beside it, in a file that begins with a dot, and in the run's queue. Interrupted or
/// killed, the same command goes on. At the end the run's queues are deleted. A job that failed whole
/// is a row with its id and error. So is a result that cannot be read (unreadable_result), which is kept
/// as it came in NAME.unreadable.jsonl beside the file. The exit code is 0 only if the run is complete.
#[derive(Args)]
pub struct Collect {
    /// The run, as `angler enqueue` named it
    #[arg(long, value_name = "ID")]
    run: String,
    /// Where results go, a row an image: .jsonl (as `angler classify` writes it), .csv or .parquet
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write the embeddings as well, float32 [rows, dim], with each row's id, or else URI, in FILE.ids.txt
    /// beside it: what `angler classes rescore` reads
    #[arg(long, value_name = "FILE.npy", alias = "embeddings")]
    embeddings_out: Option<PathBuf>,
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
        let files = Files { out: &self.out, embeddings: self.embeddings_out.as_deref() };
        files.check()?;
        let stop = shutdown::on_signals("stopping").context("signals cannot be caught")?;
        let (run, limits, bar) =
            (self.run.as_str(), &self.limits, RunBar::new(&bars(), None, "done"));
        let collecting = Collecting { app, run, files, expected: None, limits, bar };
        collecting.run(&stop).await?.tell(self.json)
    }
}

/// A run that is being collected.
pub(super) struct Collecting<'a> {
    pub app: &'a App,
    pub run: &'a str,
    pub files: Files<'a>,
    /// How many jobs and images it has, if that is known.
    pub expected: Option<(u64, u64)>,
    pub limits: &'a Limits,
    pub bar: RunBar,
}

impl<'a> Collecting<'a> {
    /// Collects while `sending` sends the run, from when it has `begun`.
    pub(super) async fn beside<T, E>(
        self,
        sending: impl Future<Output = Result<T, E>>,
        begun: oneshot::Receiver<Mark>,
        stop: &CancellationToken,
    ) -> (Result<T, E>, Result<Collected<'a>>) {
        // Ends the collecting when the sending failed: then the run will not be complete.
        let end = stop.child_token();
        let sending = async {
            let sent = sending.await;
            if sent.is_err() {
                end.cancel();
            }
            sent
        };
        let collecting = async {
            // Without it there is nothing to collect, and the sending says why.
            let mark = begun.await.context("the run was not begun")?;
            self.take(Some(mark), &end).await
        };
        tokio::join!(sending, collecting)
    }

    fn names(&self) -> IdQueues {
        IdQueues::new(&self.app.settings.amqp.jobs_queue.first().queue, self.run)
    }

    pub(super) async fn run(self, stop: &CancellationToken) -> Result<Collected<'a>> {
        let connection = connect(&self.app.settings.amqp_options("collect"), "collect").await?;
        let mark = mark::read(&connection, &self.names()).await;
        crate::amqp::close(&connection).await;
        self.take(mark?, stop).await
    }

    async fn take(self, mark: Option<Mark>, stop: &CancellationToken) -> Result<Collected<'a>> {
        let names = self.names();
        let Self { app, run, files, expected, limits, bar } = self;
        let queues = mark.as_ref().map(|mark| {
            RunQueues::new(&app.settings.amqp.jobs_queue.first().queue, run, &mark.nonce)
        });
        let options = app.settings.amqp_options("collect");
        let path = Journal::path(files.out, run);
        let mut journal = Journal::open(&path, run).with_context(|| path.display().to_string())?;
        let mut summary = Summary::default();
        tokio::task::block_in_place(|| {
            journal.read(|line| {
                summary.add(RunResult::read(line, run));
                Ok::<_, std::io::Error>(())
            })
        })?;
        let jobs = expected.map(|(jobs, _)| jobs).or(mark.map(|mark| mark.jobs));
        if let Some(jobs) = jobs {
            journal.expect(jobs);
        }
        let told = |summary: &Summary| {
            let all = expected.map(|(_, images)| summary.without_failed(images));
            bar.set(summary.images, all.or(summary.expected()), &summary.worst());
        };
        // The embeddings that were asked for must be there: noticed now, and not after the last result.
        let lacking = |summary: &Summary| {
            let looked_at = summary.classified() > 0 && summary.embeddings.rows == 0;
            files.embeddings.is_some() && looked_at
        };
        bar.begin(summary.images);
        told(&summary);
        if lacking(&summary) {
            bar.clear();
            bail!("{}", no_embeddings());
        }
        let started = Instant::now();
        let before = summary.images;
        let until = Until { stop, silence: Duration::from_secs(limits.silence) };
        let most = limits.max_failure_rate;
        let ended = match &queues {
            Some(queues) => {
                let seen = |line: &[u8]| {
                    summary.add(RunResult::read(line, run));
                    told(&summary);
                    most.is_none_or(|most| !summary.exceeds(most)) && !lacking(&summary)
                };
                collect(&options, queues, run, &mut journal, until, seen).await
            }
            None => Err(CollectError::NoRun { run: run.to_owned(), queue: names.mark }),
        };
        let ended = match ended {
            // Everything was written by a command that was ended before it could say so.
            Err(CollectError::NoRun { .. }) if journal.have().is_complete() => Ended::Complete,
            // Nothing of this run was ever here: leave nothing behind.
            Err(error @ CollectError::NoRun { .. }) if journal.have().count() == 0 => {
                journal.remove()?;
                return Err(error.into());
            }
            ended => ended?,
        };
        bar.clear();
        summary.rate = (summary.images - before) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        (summary.run, summary.jobs, summary.complete) =
            (run.to_owned(), journal.have().count(), ended == Ended::Complete);
        if lacking(&summary) {
            journal.sync()?;
            bail!("{}", no_embeddings());
        }
        if !matches!(ended, Ended::Complete | Ended::Cancelled) {
            let known = known(app, run)
                .await
                .unwrap_or_else(|e| format!("(the broker cannot be asked: {e})"));
            let incomplete = format!("{}: {}. {known}", reason(ended, limits), missing(&journal));
            journal.sync()?;
            let written = Err(incomplete);
            return Ok(Collected { summary, files, written, cancelled: None });
        }
        let planned = journal.have().planned().unwrap_or(0);
        let written = tokio::task::block_in_place(|| files.write(&mut journal, run, &summary))?;
        if let Some(queues) = queues {
            let connection = connect(&options, "collect").await?;
            let deleted = queues.delete(&connection).await;
            crate::amqp::close(&connection).await;
            deleted?;
        }
        journal.remove()?;
        let cancelled = (ended == Ended::Cancelled).then_some(planned);
        Ok(Collected { summary, files, written: Ok(written), cancelled })
    }
}

fn reason(ended: Ended, limits: &Limits) -> String {
    match ended {
        Ended::Complete | Ended::Cancelled => String::new(),
        Ended::Stopped => "interrupted".to_owned(),
        Ended::Failing => "too many failures (--max-failure-rate)".to_owned(),
        Ended::Silent => format!("no result for {} s", limits.silence),
    }
}

/// What came of a run.
pub(super) struct Collected<'a> {
    summary: Summary,
    files: Files<'a>,
    /// What was written, or why the run is not complete.
    written: Result<Written, String>,
    /// How many jobs it was to have, if it was cancelled.
    cancelled: Option<u64>,
}

impl Collected<'_> {
    /// Tells a person or a program; an error if the run is not complete.
    pub(super) fn tell(self, as_json: bool) -> Result<()> {
        let Self { summary, files, written, cancelled } = self;
        if as_json {
            show(&format!("{}\n", serde_json::to_string(&summary)?))?;
        } else {
            eprint!("{}", summary.text());
        }
        let written = match written {
            Ok(written) => written,
            Err(reason) => {
                bail!(
                    "run {run} is not complete: {reason}. The same command with --run {run} goes on",
                    run = summary.run
                )
            }
        };
        if let Some((job, reason)) = &summary.unreadable {
            let kept = written.unreadable.unwrap_or_default();
            let (count, kept) = (summary.unread(), kept.display());
            tracing::warn!(
                count,
                job,
                "results could not be read, perhaps of a newer angler; they lie in {kept} as they came. The first: {reason}"
            );
        }
        if let Some(path) = files.embeddings {
            let (rows, dim) = (summary.embeddings.rows, summary.embeddings.dim);
            let (path, ids) = (path.display(), ids_path(path));
            eprintln!("embeddings in {path}, [{rows}, {dim}], their ids in {}", ids.display());
        }
        eprintln!("results in {}", files.out.display());
        match cancelled {
            None => Ok(()),
            Some(planned) => bail!(
                "run {} is not complete: it was cancelled when {} of its {planned} jobs had been sent",
                summary.run,
                summary.jobs
            ),
        }
    }
}
