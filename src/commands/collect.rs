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

use angler_amqp::run_queues::{IdQueues, RunQueues, check_run};
use angler_amqp::{AmqpOptions, close, connect};
use angler_runs::collector::{CollectError, Ended, Until, collect};
use angler_runs::embeddings::ids_path;
use angler_runs::finished_jobs::Added;
use angler_runs::journal::{Journal, JournalError};
use angler_runs::mark;
use angler_runs::mark::Mark;
use angler_wire::error::FailureCode;
use angler_wire::text::chain;

use super::UsageError;
use super::progress::{RunBar, bars};
use super::tables::show;
use crate::app::App;
use crate::commands::collect::files::{Files, Written, no_embeddings};
use crate::commands::collect::missing::{known, missing};
use crate::commands::collect::summary::Summary;
use crate::shutdown;

/// Collect the results of a run into one file
///
/// The file appears when each job has a result, and holds each image exactly once. Until then results are
/// in the run's queue, and in a journal next to the file: a hidden file, without which they are lost.
/// Interrupted or killed, the same command continues. At the end it deletes the run's queues and the
/// journal. A job that failed whole is a row with its id and error. So is a result that cannot be read
/// (unreadable_result), which NAME.unreadable.jsonl next to the file keeps as it came. The exit code is 0
/// only if the run is complete.
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
    /// Write the results that there are now, say which jobs have none, and exit 1 unless the run is
    /// complete. The run's queues and the journal stay, so that a later command continues
    #[arg(long)]
    partial: bool,
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
    /// Stop when no result comes for this long
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
        let bar = RunBar::new(&bars(), None, "done");
        let mut collecting = Collecting::open(app, &self.run, files, &self.limits, bar)?;
        collecting.partial = self.partial;
        collecting.run(Begun::Before, &stop).await?.tell(self.json)
    }
}

/// When the run was begun.
enum Begun {
    /// By this command, with this mark.
    Now(Mark),
    /// By another command.
    Before,
}

/// A run that is being collected. Its journal is locked.
pub(super) struct Collecting<'a> {
    app: &'a App,
    files: Files<'a>,
    limits: &'a Limits,
    bar: RunBar,
    journal: Journal,
    summary: Summary,
    /// Writes what there is.
    partial: bool,
}

impl<'a> Collecting<'a> {
    /// Locks the journal of `files`, before anything else is touched, and reads it.
    pub(super) fn open(
        app: &'a App,
        run: &str,
        files: Files<'a>,
        limits: &'a Limits,
        bar: RunBar,
    ) -> Result<Self> {
        let mut journal = Journal::open(&Journal::path(files.out, run), run)?;
        let mut summary = Summary::of(run);
        journal.read(|index, result, _| {
            summary.add(index, result, Added::First);
            Ok::<_, std::io::Error>(())
        })?;
        Ok(Self { app, files, limits, bar, journal, summary, partial: false })
    }

    /// Collects while `sending` sends the run, from when it has `begun`: until then its id may be another
    /// run's, whose results are not this command's to take.
    pub(super) async fn alongside<T, E>(
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
            match begun.await {
                Ok(mark) => self.run(Begun::Now(mark), &end).await,
                Err(_) => {
                    self.leave()?;
                    bail!("the run did not begin")
                }
            }
        };
        tokio::join!(sending, collecting)
    }

    async fn run(mut self, begun: Begun, stop: &CancellationToken) -> Result<Collected<'a>> {
        match self.take(begun, stop).await {
            Ok(Ended::Complete { cancelled }) => self.finish(true, cancelled).await,
            Ok(Ended::Cancelled) => self.finish(false, true).await,
            Ok(ended) => self.interrupt(ended).await,
            Err(error) => {
                self.leave()?;
                Err(error)
            }
        }
    }

    /// Leaves no journal behind that has no result.
    fn leave(self) -> Result<()> {
        match self.journal.finished().count() {
            0 => Ok(self.journal.remove()?),
            _ => Ok(()),
        }
    }

    /// Takes the run's results until it ends.
    async fn take(&mut self, begun: Begun, stop: &CancellationToken) -> Result<Ended> {
        self.check_embeddings()?;
        let (started, before) = (Instant::now(), self.summary.images);
        let taken = self.take_from_broker(begun, stop).await;
        self.bar.clear();
        self.journal.sync()?;
        let ended = taken.or_else(|error| self.without_broker(error))?;
        self.check_embeddings()?;
        let finished = self.journal.finished();
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        self.summary.rate = (self.summary.images - before) as f64 / seconds;
        self.summary.jobs = finished.count();
        self.summary.missing_jobs = finished.lacking();
        Ok(ended)
    }

    /// Notices results without the embeddings that were asked for now, and not after the last one.
    fn check_embeddings(&self) -> Result<()> {
        match lack_embeddings(&self.files, &self.summary) {
            true => bail!("{}", no_embeddings()),
            false => Ok(()),
        }
    }

    async fn take_from_broker(&mut self, begun: Begun, stop: &CancellationToken) -> Result<Ended> {
        let Self { app, files, limits, bar, journal, summary, partial } = self;
        let (names, options) =
            (names(app, &journal.run().id), app.settings.amqp_options("collect"));
        let mark = match begun {
            Begun::Now(mark) => Some(mark),
            Begun::Before => mark_of(&options, &names).await?,
        };
        let Some(mark) = mark else {
            return Err(CollectError::NoRun { run: names.run, queue: names.mark }.into());
        };
        journal.claim(&mark.nonce)?;
        journal.expect(mark.jobs);
        let told = |summary: &Summary| {
            bar.set(summary.images, Some(summary.without_failed(mark.images)), &summary.worst());
        };
        bar.begin(summary.images);
        told(summary);
        let until = Until { stop, silence: Duration::from_secs(limits.silence), empty: *partial };
        let most = limits.max_failure_rate;
        let queues = mark.queues(first_queue(app));
        let ended = collect(&options, &queues, journal, until, |index, result, added| {
            summary.add(index, result, added);
            told(summary);
            most.is_none_or(|most| !summary.exceeds(most)) && !lack_embeddings(files, summary)
        });
        Ok(ended.await?)
    }

    /// Decides what the journal is good for when the run's queue cannot be collected.
    fn without_broker(&self, error: anyhow::Error) -> Result<Ended> {
        let finished = self.journal.finished();
        let is_gone = match error.downcast_ref() {
            Some(CollectError::NoRun { .. }) => true,
            Some(
                CollectError::Busy { .. }
                | CollectError::Denied { .. }
                | CollectError::Elsewhere { .. }
                | CollectError::Journal(_),
            ) => return Err(error),
            None if error.is::<JournalError>() => return Err(error),
            Some(CollectError::Mark(_)) | None => false,
        };
        if is_gone && finished.is_whole() {
            // A command that had written everything was killed before it could say so.
            return Ok(Ended::Complete { cancelled: false });
        }
        if finished.count() == 0 {
            return Err(error);
        }
        if self.partial {
            tracing::warn!("writing what was collected before: {}", chain(error.as_ref()));
            return Ok(Ended::Empty);
        }
        let (kept, path) = (finished.count(), self.journal.file().display());
        Err(error
            .context(format!("{path} keeps the results of {kept} jobs; --partial writes them")))
    }

    /// Writes the files, then deletes the run's queues, then the journal.
    ///
    /// * `whole`: each job of the run has a result.
    async fn finish(mut self, whole: bool, cancelled: bool) -> Result<Collected<'a>> {
        let dropped = self.summary.failed_with(FailureCode::Cancelled.as_str());
        self.summary.complete = whole && dropped == 0;
        let written = self.write()?;
        let Self { app, files, journal, summary, .. } = self;
        let (run, planned) = (journal.run().clone(), journal.finished().planned().unwrap_or(0));
        let queues = RunQueues::new(first_queue(app), &run.id, &run.nonce);
        let connection = connect(&app.settings.amqp_options("collect"), "collect").await?;
        let deleted = queues.delete(&connection).await;
        close(&connection).await;
        deleted?;
        journal.remove()?;
        let (id, sent) = (&run.id, summary.jobs);
        let (note, problem) = match (summary.complete, cancelled) {
            (true, true) => (Some(format!("run {id} had finished before it was cancelled")), None),
            (true, false) => (None, None),
            (false, _) => {
                let jobs = format!("{sent} of its {planned} jobs had been sent");
                let problem = format!("run {id} is not complete: it was cancelled when {jobs}");
                (None, Some(problem))
            }
        };
        Ok(Collected { summary, files, written: Some(written), note, problem })
    }

    /// Leaves everything to the command that continues, and writes what there is if that is wanted.
    async fn interrupt(mut self, ended: Ended) -> Result<Collected<'a>> {
        let id = self.journal.run().id.clone();
        let writes = self.partial && self.journal.finished().count() > 0;
        let written = if writes { Some(self.write()?) } else { None };
        let known = known(self.app, &id).await;
        let known = known
            .unwrap_or_else(|e| format!("(the broker cannot be asked: {})", chain(e.as_ref())));
        let (reason, missing) = (reason(ended, self.limits), missing(self.journal.finished()));
        let problem = Some(format!(
            "run {id} is not complete: {reason}{missing}. {known}. To continue, run `angler collect --run {id}` with the same --out"
        ));
        let (summary, files) = (std::mem::take(&mut self.summary), self.files);
        self.leave()?;
        Ok(Collected { summary, files, written, note: None, problem })
    }

    fn write(&mut self) -> Result<Written> {
        let Self { files, journal, summary, partial, .. } = self;
        if *partial && summary.embeddings.rows == 0 {
            files.embeddings = None; // No image was classified yet.
        }
        tokio::task::block_in_place(|| files.write(journal, summary))
    }
}

/// The queue that a fleet's other queues are named after.
fn first_queue(app: &App) -> &str {
    &app.settings.amqp.jobs_queue.first().queue
}

fn names(app: &App, run: &str) -> IdQueues {
    IdQueues::new(first_queue(app), run)
}

/// Reads a run's mark. `None` if the broker has no such run.
async fn mark_of(options: &AmqpOptions, names: &IdQueues) -> Result<Option<Mark>> {
    let connection = connect(options, "collect").await?;
    let mark = mark::read(&connection, names).await;
    close(&connection).await;
    Ok(mark.map_err(|error| CollectError::of_mark(&names.run, error))?)
}

/// `true` if embeddings were asked for, and images were classified without.
fn lack_embeddings(files: &Files<'_>, summary: &Summary) -> bool {
    files.embeddings.is_some() && summary.classified() > 0 && summary.embeddings.rows == 0
}

fn reason(ended: Ended, limits: &Limits) -> String {
    match ended {
        Ended::Complete { .. } | Ended::Cancelled | Ended::Empty => String::new(),
        Ended::Stopped => "interrupted: ".to_owned(),
        Ended::Failing => "too many failures (--max-failure-rate): ".to_owned(),
        Ended::Silent => format!("no result for {} s: ", limits.silence),
    }
}

/// What came of a run.
pub(super) struct Collected<'a> {
    summary: Summary,
    files: Files<'a>,
    /// What was written next to the results; `None` if nothing was.
    written: Option<Written>,
    /// Something worth knowing of a run that is complete.
    note: Option<String>,
    /// Why the run is not complete.
    problem: Option<String>,
}

impl Collected<'_> {
    /// Tells a person or a program; an error if the run is not complete.
    pub(super) fn tell(self, as_json: bool) -> Result<()> {
        let Self { summary, files, written, note, problem } = self;
        if as_json {
            show(&format!("{}\n", serde_json::to_string(&summary)?))?;
        } else {
            eprint!("{}", summary.text());
        }
        if let Some(written) = written {
            tell_files(&summary, &files, written);
        }
        if let Some(note) = note {
            eprintln!("{note}");
        }
        match problem {
            None => Ok(()),
            Some(problem) => bail!("{problem}"),
        }
    }
}

fn tell_files(summary: &Summary, files: &Files<'_>, written: Written) {
    if let (Some((job, reason)), Some(kept)) = (&summary.unreadable, written.unreadable) {
        let (count, kept) = (summary.unread(), kept.display());
        tracing::warn!(
            count,
            job,
            "results could not be read, perhaps of a newer angler; {kept} keeps them as they came. The first: {reason}"
        );
    }
    if let Some(path) = files.embeddings {
        let (rows, dim) = (summary.embeddings.rows, summary.embeddings.dim);
        let (path, ids) = (path.display(), ids_path(path));
        eprintln!("embeddings in {path}, [{rows}, {dim}], their ids in {}", ids.display());
    }
    eprintln!("results in {}", files.out.display());
}
