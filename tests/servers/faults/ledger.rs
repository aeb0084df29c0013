//! What came of each job: every one has an outcome, and a second one says the same.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::Results;

/// Results by job id, de-duplicated.
#[derive(Default)]
pub struct Ledger {
    first: BTreeMap<String, Value>,
    pub duplicates: usize,
}

impl Ledger {
    /// Takes results until each of `ids` has one.
    pub async fn collect(&mut self, results: &mut Results, ids: &[String]) {
        while ids.iter().any(|id| !self.first.contains_key(id)) {
            self.take(results.next().await.body);
        }
    }

    /// Takes what else comes within a time.
    pub async fn linger(&mut self, results: &mut Results, wait: Duration) {
        let until = Instant::now() + wait;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            match tokio::time::timeout(left, results.next()).await {
                Ok(result) => self.take(result.body),
                Err(_) => return,
            }
        }
    }

    /// A second result is the same as the first, but for when and by whom.
    fn take(&mut self, result: Value) {
        let id = result["id"].as_str().unwrap().to_owned();
        match self.first.get(&id) {
            Some(first) => {
                self.duplicates += 1;
                assert_eq!(essence(first), essence(&result), "two outcomes of {id}");
            }
            None => drop(self.first.insert(id, result)),
        }
    }

    /// All of them were done, with the right labels. Yields the highest attempt.
    pub fn all_done(&self) -> u64 {
        for result in self.first.values() {
            assert_eq!(result["status"], "done", "{result}");
            let labels = result["images"].as_array().unwrap().iter().map(|image| &image["label"]);
            assert!(labels.eq(&[json!("red"), json!("green"), json!("blue")]), "{result}");
        }
        self.first.values().map(|result| result["attempt"].as_u64().unwrap()).max().unwrap_or(0)
    }

    /// The outcome of a job.
    pub fn of(&self, id: &str) -> &Value {
        &self.first[id]
    }
}

fn essence(result: &Value) -> Value {
    let mut essence = result.clone();
    for key in ["attempt", "worker", "finished_at"] {
        essence.as_object_mut().unwrap().remove(key);
    }
    essence
}
