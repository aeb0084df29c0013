//! Keeps the results of a run on disk until the run is complete: a line each, as the worker published
//! it, behind a first line that names the run.
//!
//! The collector acks a result only when its line is safe ([`Journal::sync`]). Killed at any instant, it
//! finds each result here, or in its queue, or in both. Only one process at a time has the journal: it
//! holds a lock on the file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use angler_wire::job::Run;

use super::finished_jobs::{Added, Bits, FinishedJobs};
use super::result::{RunKey, RunResult};

/// What a journal's first line calls it.
const FORMAT: &str = "angler.run-journal.v1";

/// The results that were collected so far.
pub struct Journal {
    path: PathBuf,
    file: BufWriter<File>,
    /// Its run; without a nonce as long as the file is empty.
    run: RunKey,
    /// Length of the first line.
    head: u64,
    finished: FinishedJobs,
}

/// Why a journal cannot be used. None of them changes the file.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused something.
    #[error("cannot keep results in {path}")]
    Io {
        /// The journal.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process holds it.
    #[error(
        "another process is collecting into this file (it holds {path}): wait until it ends, or stop it"
    )]
    Locked {
        /// The journal.
        path: PathBuf,
    },
    /// It holds results of another run.
    #[error(
        "{path} keeps results of {other}: choose another --out, or move that file away if its results are not needed"
    )]
    Other {
        /// The journal.
        path: PathBuf,
        /// The other run, for people.
        other: String,
    },
    /// A line is no result of its run.
    #[error(
        "line {line} of {path} is no result of run {run}. Nothing was changed: repair the line or remove it; without it its job has no result"
    )]
    Line {
        /// The journal.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// The run's id.
        run: String,
    },
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    journal: String,
    run: String,
    nonce: String,
}

impl Journal {
    /// Returns where the results of `run` wait until they become `out`. Two runs, or two files, never
    /// share a journal: neither `@` nor `%` is part of a run's id.
    pub fn path(out: &Path, run: &str) -> PathBuf {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        out.with_file_name(format!(".{name}@{}.results", run.replace('/', "%")))
    }

    /// Opens the journal of the run `id` and locks it, or creates an empty one.
    ///
    /// A last line without a line break was cut off by a kill; its result was not acked, so the line is
    /// removed. Nothing else is ever removed.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(path: &Path, id: &str) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io { path: path.to_owned(), source };
        let file = lock(path)?;
        let run = RunKey { id: id.to_owned(), nonce: String::new() };
        let mut lines = BufReader::with_capacity(1 << 16, &file);
        let mut reading =
            Reading { path, run, head: 0, whole: 0, finished: FinishedJobs::default() };
        reading.all(&mut lines)?;
        let Reading { run, head, whole, finished, .. } = reading;
        if file.metadata().map_err(failed)?.len() > whole {
            file.set_len(whole).map_err(failed)?;
        }
        let mut file = BufWriter::with_capacity(1 << 18, file);
        file.seek(SeekFrom::Start(whole)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, run, head, finished })
    }

    /// Names the run in an empty journal. A journal that is not empty must be this run's.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn claim(&mut self, nonce: &str) -> Result<(), JournalError> {
        if !self.is_empty() {
            return match self.run.nonce == nonce {
                true => Ok(()),
                false => {
                    let other = format!("an earlier run {}", self.run.id);
                    Err(JournalError::Other { path: self.path.clone(), other })
                }
            };
        }
        self.run.nonce = nonce.to_owned();
        self.begin().map_err(|source| JournalError::Io { path: self.path.clone(), source })
    }

    /// Writes the first line, and makes sure that the file is still in its folder after a power loss.
    fn begin(&mut self) -> io::Result<()> {
        let RunKey { id: run, nonce } = self.run.clone();
        let mut line = serde_json::to_vec(&Head { journal: FORMAT.to_owned(), run, nonce })?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.head = line.len() as u64;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Where it is.
    pub fn file(&self) -> &Path {
        &self.path
    }

    /// `true` if it belongs to no run yet.
    pub fn is_empty(&self) -> bool {
        self.head == 0
    }

    /// The run whose results these are.
    pub fn run(&self) -> &RunKey {
        &self.run
    }

    /// Appends a result as a line ([`super::result::line_of`]), if it adds anything.
    ///
    /// # Errors
    /// The system refused it: the disk is full.
    pub fn push(&mut self, run: &Run, is_done: bool, line: &[u8]) -> Result<Added, JournalError> {
        let added = self.finished.insert(run, is_done);
        if added != Added::Nothing {
            let write = |file: &mut BufWriter<File>| {
                file.write_all(line)?;
                file.write_all(b"\n")
            };
            let written = write(&mut self.file);
            written.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        }
        Ok(added)
    }

    /// Makes everything that was appended safe.
    ///
    /// # Errors
    /// The system refused it.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_data());
        synced.map_err(|source| JournalError::Io { path: self.path.clone(), source })
    }

    /// The jobs that have a result.
    pub fn finished(&self) -> &FinishedJobs {
        &self.finished
    }

    /// Notes how many jobs the run has.
    pub fn expect(&mut self, jobs: u64) {
        self.finished.expect(jobs);
    }

    /// Notes that the run was cancelled after its first `sent` jobs.
    pub fn only(&mut self, sent: u64) {
        self.finished.only(sent);
    }

    /// Hands the result that counts of each job to `each`, with the job's number and its line, in the
    /// order in which they came.
    ///
    /// # Errors
    /// The system refused it, or the first error of `each`.
    pub fn read<E: From<io::Error>>(
        &mut self,
        mut each: impl FnMut(u64, RunResult, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.file.flush()?;
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.head))?;
        let mut lines = BufReader::with_capacity(1 << 16, file);
        let (mut line, mut told) = (Vec::new(), Bits::default());
        while {
            line.clear();
            lines.read_until(b'\n', &mut line)? > 0
        } {
            let line = line.trim_ascii_end();
            let Some(Run { index, .. }) = self.run.job_of(line) else { continue };
            let result = RunResult::read(line, &self.run);
            if result.is_done() == self.finished.is_done(index) && told.insert(index) {
                each(index, result, line)?;
            }
        }
        Ok(())
    }

    /// Removes it. Its results are elsewhere by then.
    ///
    /// # Errors
    /// The system refused it.
    pub fn remove(self) -> Result<(), JournalError> {
        let Self { path, .. } = self;
        std::fs::remove_file(&path).map_err(|source| JournalError::Io { path, source })
    }
}

/// Opens the file and locks it.
fn lock(path: &Path) -> Result<File, JournalError> {
    let failed = |source| JournalError::Io { path: path.to_owned(), source };
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
    loop {
        let file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) if is_at(&file, path) => return Ok(file),
            // The process that had it removed the file when it was done.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::Locked { path: path.to_owned() });
            }
            // Some network file systems have no locks. There the run's turn at the broker must do.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("cannot lock {}: {e}", path.display());
                return Ok(file);
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
    }
}

/// `true` if the path still leads to this file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let (here, there) = (file.metadata().map(place), std::fs::metadata(path).map(place));
    matches!((here, there), (Ok(here), Ok(there)) if here == there)
}

/// `true`: a file that is open cannot be removed.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// Reads a journal from its beginning.
struct Reading<'a> {
    path: &'a Path,
    run: RunKey,
    head: u64,
    /// Bytes of whole lines.
    whole: u64,
    finished: FinishedJobs,
}

impl Reading<'_> {
    fn all(&mut self, lines: &mut impl BufRead) -> Result<(), JournalError> {
        let (mut line, mut number) = (Vec::new(), 0);
        loop {
            line.clear();
            let read = lines.read_until(b'\n', &mut line);
            let read =
                read.map_err(|source| JournalError::Io { path: self.path.to_owned(), source })?;
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            number += 1;
            self.line(number, &line)?;
            self.whole += read as u64;
            if number == 1 {
                self.head = self.whole;
            }
        }
    }

    fn line(&mut self, number: u64, line: &[u8]) -> Result<(), JournalError> {
        if number == 1 {
            return self.first(line);
        }
        let Some(of) = self.run.job_of(line) else {
            let (path, run) = (self.path.to_owned(), self.run.id.clone());
            return Err(JournalError::Line { path, line: number, run });
        };
        self.finished.insert(&of, RunResult::read(line, &self.run).is_done());
        Ok(())
    }

    fn first(&mut self, line: &[u8]) -> Result<(), JournalError> {
        let other = match serde_json::from_slice(line) {
            Ok(Head { journal, run, nonce }) if journal == FORMAT && run == self.run.id => {
                self.run.nonce = nonce;
                return Ok(());
            }
            Ok(Head { journal, run, .. }) if journal == FORMAT => format!("run {run}"),
            _ => "something else, or of another version of angler".to_owned(),
        };
        Err(JournalError::Other { path: self.path.to_owned(), other })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> PathBuf {
            Journal::path(&self.0.path().join("out.csv"), "n")
        }

        fn open(&self) -> Result<Journal, JournalError> {
            let mut journal = Journal::open(&self.path(), "n")?;
            journal.claim("x")?;
            Ok(journal)
        }

        fn text(&self) -> String {
            std::fs::read_to_string(self.path()).unwrap()
        }

        fn append(&self, bytes: &[u8]) {
            OpenOptions::new().append(true).open(self.path()).unwrap().write_all(bytes).unwrap();
        }
    }

    fn body(index: u64, status: &str) -> String {
        let rest = match status {
            "done" => r#""classes":"c@1","model":"m","backend":"b","images":[]"#,
            _ => r#""error":{"code":"retries_exhausted","message":"x"}"#,
        };
        format!(
            r#"{{"id":"n/{index}","status":"{status}",{rest},"run":{{"id":"n","jobs":5,"index":{index},"nonce":"x"}}}}"#
        )
    }

    fn push(journal: &mut Journal, index: u64, status: &str) -> Added {
        let body = body(index, status);
        let run = journal.run().job_of(body.as_bytes()).unwrap();
        journal.push(&run, status == "done", body.as_bytes()).unwrap()
    }

    fn read(journal: &mut Journal) -> Vec<(u64, bool)> {
        let mut all = Vec::new();
        let each = |index, result: RunResult, _: &[u8]| {
            all.push((index, result.is_done()));
            Ok::<_, io::Error>(())
        };
        journal.read(each).unwrap();
        all
    }

    #[test]
    fn a_job_counts_once_and_a_line_that_was_cut_off_not_at_all() {
        let folder = Folder::new();
        let mut journal = folder.open().unwrap();
        let added = [3, 0, 3].map(|index| push(&mut journal, index, "done"));
        assert_eq!(added, [Added::First, Added::First, Added::Nothing]);
        journal.sync().unwrap();
        drop(journal);
        folder.append(&body(1, "done").as_bytes()[..20]); // Killed in the middle of a line.
        let mut journal = folder.open().unwrap();
        assert_eq!(journal.finished().count(), 2);
        assert_eq!(journal.finished().missing(9).0, [(1, 2), (4, 4)]);
        let added = [1, 2, 4, 0].map(|index| push(&mut journal, index, "done"));
        assert_eq!(added, [Added::First, Added::First, Added::First, Added::Nothing]);
        assert!(journal.finished().is_complete());
        assert_eq!(read(&mut journal), [3, 0, 1, 2, 4].map(|index| (index, true)));
        journal.remove().unwrap();
        assert!(!folder.path().exists());
    }

    #[test]
    fn a_done_result_replaces_a_failed_one_also_after_a_restart() {
        let folder = Folder::new();
        let mut journal = folder.open().unwrap();
        let both = [(1, "failed"), (0, "failed"), (1, "done"), (1, "failed"), (0, "failed")];
        let added = both.map(|(index, status)| push(&mut journal, index, status));
        let [first, nothing] = [Added::First, Added::Nothing];
        assert_eq!(added, [first, first, Added::Better, nothing, nothing]);
        for _ in 0..2 {
            assert_eq!((journal.finished().count(), journal.finished().is_done(1)), (2, true));
            assert_eq!(read(&mut journal), [(0, false), (1, true)]);
            journal.sync().unwrap();
            drop(journal);
            journal = folder.open().unwrap();
        }
        assert_eq!(push(&mut journal, 0, "done"), Added::Better);
        assert_eq!(read(&mut journal), [(1, true), (0, true)]);
    }

    #[test]
    fn garbage_in_the_middle_is_an_error_that_changes_nothing() {
        let folder = Folder::new();
        let mut journal = folder.open().unwrap();
        push(&mut journal, 0, "done");
        drop(journal);
        let good = folder.text();
        let foreign = body(2, "done").replace(r#""nonce":"x""#, r#""nonce":"y""#);
        for garbage in ["\0\0\0", "", r#"{"id":"n/"#, &foreign] {
            folder.append(format!("{garbage}\n{}\n{}", body(1, "done"), "{\"id\"").as_bytes());
            let before = folder.text();
            let error = folder.open().err().unwrap();
            assert!(matches!(error, JournalError::Line { line: 3, .. }), "{garbage}: {error}");
            let path = folder.path();
            assert!(
                error.to_string().contains(&format!("line 3 of {}", path.display())),
                "{error}"
            );
            assert_eq!(folder.text(), before);
            std::fs::write(path, &good).unwrap();
        }
        assert_eq!(folder.open().unwrap().finished().count(), 1);
    }

    #[test]
    fn one_process_at_a_time_has_it() {
        let folder = Folder::new();
        let mut journal = folder.open().unwrap();
        push(&mut journal, 0, "done");
        journal.sync().unwrap();
        folder.append(b"{\"half");
        let before = folder.text();
        let error = folder.open().err().unwrap();
        assert!(matches!(error, JournalError::Locked { .. }), "{error}");
        assert_eq!(folder.text(), before);
        drop(journal);
        assert_eq!(folder.open().unwrap().finished().count(), 1);
    }

    #[test]
    fn another_runs_journal_is_refused_and_kept() {
        let folder = Folder::new();
        drop(folder.open().unwrap());
        let mut later = Journal::open(&folder.path(), "n").unwrap();
        assert_eq!((later.is_empty(), &*later.run().nonce), (false, "x"));
        let error = later.claim("y").err().unwrap();
        assert!(error.to_string().contains("keeps results of an earlier run n:"), "{error}");
        drop(later);
        let error = Journal::open(&folder.path(), "m").err().unwrap();
        assert!(error.to_string().contains("keeps results of run n:"), "{error}");
        // Not ours at all.
        for text in ["a,b\n1,2\n", "\n", "{}\n", &format!("{}\n", body(0, "done"))] {
            std::fs::write(folder.path(), text).unwrap();
            let error = folder.open().err().unwrap();
            assert!(matches!(error, JournalError::Other { .. }), "{text}: {error}");
            assert_eq!(folder.text(), text);
        }
    }

    #[test]
    fn no_two_runs_and_files_share_a_journal() {
        let paths = [
            ("out.csv", "a/b"),
            ("out.csv", "a_b"),
            ("out.csv", "a.b"),
            ("out.csv@a", "b"),
            ("out.csv", "b"),
            ("out.csv.a", "b"),
        ];
        let paths = paths.map(|(out, run)| Journal::path(Path::new(out), run));
        let different: std::collections::BTreeSet<_> = paths.iter().collect();
        assert_eq!(different.len(), paths.len(), "{paths:?}");
        assert_eq!(paths[0], Path::new(".out.csv@a%b.results"));
    }
}
