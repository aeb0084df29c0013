//! Results of a run on disk while it is collected: a line each, as the worker published it.
//!
//! A result is acked only when its line is safe ([`Journal::sync`]), so whoever is killed in between
//! finds each result here or in its queue, or in both, which is noticed: a job counts once.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::job::Run;

/// The results that were collected so far.
pub struct Journal {
    path: PathBuf,
    file: BufWriter<File>,
    have: Have,
}

/// Which jobs of a run there are results of.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Have {
    bits: Vec<u64>,
    count: u64,
    /// How many jobs the run has, as its results say.
    jobs: Option<u64>,
    /// How many of them were sent, if no more will be.
    sent: Option<u64>,
}

impl Have {
    /// Adds a job; false if it was there.
    pub fn insert(&mut self, run: &Run) -> bool {
        self.jobs = Some(self.jobs.unwrap_or(0).max(run.jobs).max(run.index + 1));
        let (word, bit) = ((run.index / 64) as usize, 1 << (run.index % 64));
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.count += u64::from(new);
        new
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many jobs the run has; none as long as nobody said.
    pub fn jobs(&self) -> Option<u64> {
        match (self.jobs, self.sent) {
            (Some(jobs), Some(sent)) => Some(jobs.min(sent)),
            (jobs, sent) => jobs.or(sent),
        }
    }

    /// How many it was to have, whether it was cancelled or not.
    pub fn planned(&self) -> Option<u64> {
        self.jobs
    }

    /// No more than the first `sent` jobs of the run were sent, or will be.
    pub fn only(&mut self, sent: u64) {
        self.sent = Some(sent);
    }

    /// Whoever sent the run says how many jobs it has.
    pub fn expect(&mut self, jobs: u64) {
        self.jobs = Some(self.jobs.unwrap_or(0).max(jobs));
    }

    /// Whether there is a result of each job.
    pub fn is_complete(&self) -> bool {
        self.jobs() == Some(self.count)
    }

    /// The numbers of jobs without a result, as ranges of which the last belongs to it.
    pub fn missing(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for index in 0..self.jobs().unwrap_or(0) {
            let word = self.bits.get((index / 64) as usize).copied().unwrap_or(0);
            if word & (1 << (index % 64)) != 0 {
                continue;
            }
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == index => *last = index,
                _ => ranges.push((index, index)),
            }
        }
        ranges
    }
}

/// The largest number of jobs that is believed: a result that says more cannot make us run out of
/// memory.
pub(super) const MOST_JOBS: u64 = 1 << 32;

/// Which job of which run a result is of. Results of jobs that could not be read have no `run`, but
/// the id that they were given; a `run` that cannot be read is passed over likewise.
pub fn run_of(body: &[u8], run: &str) -> Option<Run> {
    #[derive(Deserialize)]
    struct OnlyRun {
        run: Run,
    }
    #[derive(Deserialize)]
    struct OnlyId {
        id: String,
    }
    let found = match serde_json::from_slice(body) {
        Ok(OnlyRun { run }) => run,
        Err(_) => {
            let only: OnlyId = serde_json::from_slice(body).ok()?;
            let (id, index) = only.id.rsplit_once('/')?;
            Run { id: id.to_owned(), jobs: 0, index: index.parse().ok()?, nonce: None }
        }
    };
    (found.id == run && found.index < MOST_JOBS && found.jobs <= MOST_JOBS).then_some(found)
}

impl Journal {
    /// Where the results of `run` wait until they become `out`.
    pub fn path(out: &Path, run: &str) -> PathBuf {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        out.with_file_name(format!(".{name}.{}.results", run.replace('/', "_")))
    }

    /// Opens it, with what is in it: a line that was cut by a kill is forgotten, since its result was
    /// not acked.
    ///
    /// # Errors
    /// What the system said.
    pub fn open(path: &Path, run: &str) -> std::io::Result<Self> {
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let mut file = options.open(path)?;
        let (mut have, mut whole) = (Have::default(), 0);
        let mut lines = BufReader::with_capacity(1 << 16, &file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = lines.read_until(b'\n', &mut line)?;
            match (line.last(), run_of(&line, run)) {
                (Some(b'\n'), Some(run)) => {
                    have.insert(&run);
                    whole += read as u64;
                }
                (None, _) => break,
                // Cut, or followed by what a full disk left: all of it comes again.
                _ => break,
            }
        }
        file.set_len(whole)?;
        file.seek(SeekFrom::Start(whole))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::with_capacity(1 << 18, file), have })
    }

    /// Appends a result, a line ([`super::result::line_of`]), unless there is one of this job. False if
    /// there was.
    ///
    /// # Errors
    /// What the system said: the disk is full.
    pub fn push(&mut self, run: &Run, body: &[u8]) -> std::io::Result<bool> {
        if !self.have.insert(run) {
            return Ok(false);
        }
        self.file.write_all(body)?;
        self.file.write_all(b"\n")?;
        Ok(true)
    }

    /// Makes all that was appended safe.
    ///
    /// # Errors
    /// What the system said.
    pub fn sync(&mut self) -> std::io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_data()
    }

    /// Which jobs there are results of.
    pub fn have(&self) -> &Have {
        &self.have
    }

    /// Whoever sent the run says how many jobs it has.
    pub fn expect(&mut self, jobs: u64) {
        self.have.expect(jobs);
    }

    /// The run was cancelled after so many jobs.
    pub fn only(&mut self, sent: u64) {
        self.have.only(sent);
    }

    /// Hands each result's JSON to `each`, in the order in which they came.
    ///
    /// # Errors
    /// What the system said, or the first error of `each`.
    pub fn read<E: From<std::io::Error>>(
        &mut self,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.file.flush()?;
        let mut lines = BufReader::with_capacity(1 << 16, File::open(&self.path)?);
        let mut line = Vec::new();
        while {
            line.clear();
            lines.read_until(b'\n', &mut line)? > 0
        } {
            each(line.trim_ascii_end())?;
        }
        Ok(())
    }

    /// Removes it, once its results are elsewhere.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove(self) -> std::io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(index: u64) -> Vec<u8> {
        format!(r#"{{"id":"n/{index}","run":{{"id":"n","jobs":5,"index":{index}}}}}"#).into_bytes()
    }

    fn push(journal: &mut Journal, index: u64) -> bool {
        let body = body(index);
        journal.push(&run_of(&body, "n").unwrap(), &body).unwrap()
    }

    #[test]
    fn a_job_counts_once_and_a_line_that_was_cut_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = Journal::path(&folder.path().join("out.csv"), "n");
        let mut journal = Journal::open(&path, "n").unwrap();
        assert_eq!([3, 0, 3].map(|index| push(&mut journal, index)), [true, true, false]);
        journal.sync().unwrap();
        drop(journal);
        // Killed in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&body(1)[..20]).unwrap();
        let mut journal = Journal::open(&path, "n").unwrap();
        assert_eq!(journal.have().count(), 2);
        assert_eq!(journal.have().missing(), [(1, 2), (4, 4)]);
        assert_eq!([1, 2, 4, 0].map(|index| push(&mut journal, index)), [true, true, true, false]);
        assert!(journal.have().is_complete());
        let mut lines = Vec::new();
        let each = |line: &[u8]| {
            lines.push(run_of(line, "n").unwrap().index);
            Ok::<_, std::io::Error>(())
        };
        journal.read(each).unwrap();
        assert_eq!(lines, [3, 0, 1, 2, 4]);
        journal.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_result_is_of_a_run_by_its_run_or_else_by_its_id() {
        assert_eq!(run_of(&body(2), "n").unwrap().index, 2);
        assert_eq!(run_of(&body(2), "m"), None);
        let unread = br#"{"id":"a/b/17","status":"failed"}"#;
        assert_eq!(run_of(unread, "a/b").unwrap().index, 17);
        for other in [&br#"{"id":"a/x"}"#[..], br#"{"id":"17"}"#, b"{", b""] {
            assert_eq!(run_of(other, "a"), None);
        }
        let huge = br#"{"id":"n/1","run":{"id":"n","jobs":9,"index":99999999999999}}"#;
        assert_eq!(run_of(huge, "n"), None);
    }

    #[test]
    fn what_is_missing_is_told_in_ranges() {
        let mut have = Have::default();
        assert!(!have.is_complete() && have.missing().is_empty());
        have.expect(130);
        assert_eq!(have.missing(), [(0, 129)]);
        for index in (0..130).filter(|index| ![0, 64, 65, 129].contains(index)) {
            have.insert(&Run { id: String::new(), jobs: 130, index, nonce: None });
        }
        assert_eq!(have.missing(), [(0, 0), (64, 65), (129, 129)]);
        assert_eq!(have.count(), 126);
    }
}
