//! What must come of each job, and what came.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::{Value, json};

/// More results of one job than faults explain.
const LOOP: usize = 20;

/// The most characters that are told of one thing: results may be long.
const MOST_CHARS: usize = 800;

/// How a job is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// By one result at least.
    Certain,
    /// By a result, or not at all: its client is gone.
    Possible,
}

/// The jobs that were published one by one. (Those of bulk runs are counted in the runs' files.)
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    expected: BTreeMap<String, Expected>,
    /// The first result of each job, and how many came.
    results: BTreeMap<String, (Value, usize)>,
    /// Results of runs that arrived in the common queue.
    of_runs: usize,
    wrong: Vec<String>,
    last: Option<Instant>,
}

struct Expected {
    /// Labels and error codes, or the code of the whole.
    outcome: Value,
    answer: Answer,
}

/// What the ledger comes to.
#[derive(Debug, Default)]
pub struct Summary {
    pub published: usize,
    pub answered: usize,
    /// Jobs that did not have to be answered and were not.
    pub excused: usize,
    pub done: usize,
    /// Failed jobs by code.
    pub failed: BTreeMap<String, usize>,
    /// Jobs with more than one result, and the results beyond the first.
    pub repeated: usize,
    pub duplicates: usize,
    pub most_results: usize,
    pub of_runs: usize,
    pub highest_attempt: u64,
}

impl Ledger {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Notes a job before it is published.
    pub fn expect(&self, job: &str, outcome: Value, answer: Answer) {
        self.state().expected.insert(job.to_owned(), Expected { outcome, answer });
    }

    /// Nobody waits for this job's result any more.
    pub fn excuse(&self, job: &str) {
        if let Some(expected) = self.state().expected.get_mut(job) {
            expected.answer = Answer::Possible;
        }
    }

    pub fn has(&self, job: &str) -> bool {
        self.state().results.contains_key(job)
    }

    /// When the last result came.
    pub fn last(&self) -> Option<Instant> {
        self.state().last
    }

    /// Jobs that must be answered and are not.
    pub fn missing(&self) -> Vec<String> {
        let state = self.state();
        let open = |(job, expected): &(&String, &Expected)| {
            expected.answer == Answer::Certain && !state.results.contains_key(*job)
        };
        state.expected.iter().filter(open).map(|(job, _)| job.clone()).collect()
    }

    /// Notes something that must not be.
    pub fn wrong(&self, what: String) {
        let what: String = what.chars().take(MOST_CHARS).collect();
        eprintln!("WRONG: {what}");
        self.state().wrong.push(what);
    }

    pub fn all_wrong(&self) -> Vec<String> {
        self.state().wrong.clone()
    }

    /// Notes a result.
    pub fn take(&self, result: Value) {
        let taken = self.state().take(result);
        if let Err(wrong) = taken {
            self.wrong(wrong);
        }
    }

    pub fn summary(&self) -> Summary {
        let state = self.state();
        let mut summary = Summary {
            published: state.expected.len(),
            answered: state.results.len(),
            excused: state.expected.len().saturating_sub(state.results.len()),
            of_runs: state.of_runs,
            ..Summary::default()
        };
        for (result, count) in state.results.values() {
            match result["error"]["code"].as_str() {
                None => summary.done += 1,
                Some(code) => *summary.failed.entry(code.to_owned()).or_default() += 1,
            }
            summary.repeated += usize::from(*count > 1);
            summary.duplicates += count - 1;
            summary.most_results = summary.most_results.max(*count);
            let attempt = result["attempt"].as_u64().unwrap_or(0);
            summary.highest_attempt = summary.highest_attempt.max(attempt);
        }
        summary
    }
}

impl State {
    fn take(&mut self, result: Value) -> Result<(), String> {
        self.last = Some(Instant::now());
        if !result["run"].is_null() {
            self.of_runs += 1;
            return Ok(());
        }
        let job = result["id"].as_str().unwrap_or_default().to_owned();
        let Some(expected) = self.expected.get(&job) else {
            return Err(format!("a result of no job: {result}"));
        };
        let fits = outcome_of(&result) == expected.outcome;
        let mut wrong = (!fits).then(|| format!("{result} instead of {}", expected.outcome));
        match self.results.get_mut(&job) {
            None => drop(self.results.insert(job, (result, 1))),
            Some((first, count)) => {
                *count += 1;
                if essence(first) != essence(&result) {
                    wrong.get_or_insert_with(|| format!("{first}, and then {result}"));
                }
                if *count == LOOP {
                    wrong.get_or_insert_with(|| format!("the {LOOP}th result of {job}: {result}"));
                }
            }
        }
        wrong.map_or(Ok(()), Err)
    }
}

/// Labels or error codes, or the code of the whole.
fn outcome_of(result: &Value) -> Value {
    let Some(images) = result["images"].as_array() else { return result["error"]["code"].clone() };
    let verdict = |image: &Value| match image["label"].as_str() {
        Some(label) => json!(label),
        None => image["error"]["code"].clone(),
    };
    images.iter().map(verdict).collect()
}

/// What two results of one job have in common: all but when, where and how often it was tried.
fn essence(result: &Value) -> Value {
    let mut essence = result.clone();
    for key in ["attempt", "worker", "finished_at"] {
        essence.as_object_mut().unwrap().remove(key);
    }
    essence
}
