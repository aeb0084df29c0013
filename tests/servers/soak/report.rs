//! What a soak comes to, for a person.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter, Result};
use std::time::Duration;

use crate::soak::ledger::Summary;
use crate::soak::world::World;
use crate::soak::{bulk, faults};

/// How many of the slowest recoveries are named.
const SLOWEST: usize = 3;

/// All figures of a soak.
pub struct Report<'a> {
    pub world: &'a World,
    pub broker_version: String,
    pub workers: usize,
    pub faults: &'a faults::Tally,
    pub jobs: Summary,
    pub runs: &'a bulk::Tally,
    /// Dead letters by reason.
    pub dead: BTreeMap<String, u64>,
    /// From the last fault to the last outcome.
    pub quiet: Duration,
    /// The most memory that a worker had, in KiB, and drains that took too long.
    pub fleet: (u64, usize),
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let World { seed, minutes, .. } = self.world;
        writeln!(
            f,
            "\nsoak: seed {seed}, {minutes} minutes, {} workers, RabbitMQ {}",
            self.workers, self.broker_version
        )?;
        self.write_faults(f)?;
        self.write_jobs(f)?;
        self.write_runs(f)?;
        let (peak, slow) = self.fleet;
        writeln!(f, "\nat the end")?;
        writeln!(f, "  last outcome {:.1?} after the last fault; all queues empty", self.quiet)?;
        writeln!(f, "  dead letters: {}", counted(&self.dead))?;
        writeln!(
            f,
            "  peak memory: worker {} MB, command {} MB",
            peak / 1000,
            self.runs.peak_kib / 1000
        )?;
        write!(f, "  drains that took longer than the grace period: {slow}")
    }
}

impl Report<'_> {
    fn write_faults(&self, f: &mut Formatter<'_>) -> Result {
        let faults::Tally { faults, pairs, rounds_with_two, recoveries, restarts } = self.faults;
        let total: usize = faults.values().sum();
        writeln!(f, "\nfaults: {total}, of {} of {} kinds", faults.len(), faults::FAULTS.len())?;
        let mut sorted: Vec<_> = faults.iter().collect();
        sorted.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), **name));
        for (name, count) in sorted {
            writeln!(f, "  {count:>4}  {name}")?;
        }
        writeln!(f, "  two at once: {rounds_with_two} times, {} different pairs", pairs.len())?;
        let times = recoveries.iter().map(|(time, _)| *time).collect();
        writeln!(f, "  to the next result after the end of a fault: {}", spread(times))?;
        let mut slowest: Vec<_> = recoveries.iter().collect();
        slowest.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
        for (time, names) in slowest.iter().take(SLOWEST) {
            writeln!(f, "    {time:.1?}  {names}")?;
        }
        writeln!(f, "  after a restart of the broker alone: {}", spread(restarts.clone()))
    }

    fn write_jobs(&self, f: &mut Formatter<'_>) -> Result {
        let jobs = &self.jobs;
        writeln!(f, "\njobs: {} published, {} answered", jobs.published, jobs.answered)?;
        writeln!(f, "  {:>6}  done", jobs.done)?;
        for (code, count) in &jobs.failed {
            writeln!(f, "  {count:>6}  failed: {code}")?;
        }
        writeln!(
            f,
            "  {:>6}  without a result: direct reply-to of a client whose connection was lost",
            jobs.excused
        )?;
        writeln!(
            f,
            "  duplicates: {} results of {} jobs, at most {} results of one job; highest attempt {}",
            jobs.duplicates, jobs.repeated, jobs.most_results, jobs.highest_attempt
        )
    }

    fn write_runs(&self, f: &mut Formatter<'_>) -> Result {
        let runs = self.runs;
        writeln!(
            f,
            "\nruns: {} complete, {} cancelled; {} images in {} jobs, each once",
            runs.complete, runs.cancelled, runs.images, runs.jobs
        )?;
        writeln!(
            f,
            "  killed: {} senders, {} collectors; of two of a kind at once, gave up: {}",
            runs.senders_killed, runs.collectors_killed, runs.gave_way
        )?;
        writeln!(f, "  lists of runs and dead letters: {}", runs.looks)?;
        writeln!(f, "  results of runs in the common results queue: {}", self.jobs.of_runs)?;
        writeln!(f, "  commands that ended with exit code 1 said:")?;
        let mut said: Vec<_> = runs.said.iter().collect();
        said.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (sentence, count) in said {
            writeln!(f, "  {count:>6}  {sentence}")?;
        }
        Ok(())
    }
}

fn counted(counts: &BTreeMap<String, u64>) -> String {
    let counts: Vec<String> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
    if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
}

/// Median and worst.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort();
    match (times.get(times.len() / 2), times.last()) {
        (Some(median), Some(worst)) => {
            format!("median {median:.1?}, worst {worst:.1?} of {}", times.len())
        }
        _ => "never".to_owned(),
    }
}
