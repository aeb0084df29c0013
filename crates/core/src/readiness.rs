//! Whether a worker is ready, and why not: recorded by its parts, read by its probes and pages.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use angler_metrics::Metrics;

use crate::class_sets::catalog::Catalog;
use crate::outage_detector::Trouble;
use crate::pipeline::Pipeline;

/// What a worker is, once it knows.
#[derive(Debug, Clone)]
pub struct About {
    /// Its name in results.
    pub worker: String,
    /// The queue that its jobs come from.
    pub queue: String,
    /// Fingerprint of the model that runs.
    pub model: String,
    /// The most images in a batch.
    pub max_batch: usize,
}

/// How a queue of jobs is consumed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Consuming {
    Yes,
    /// Not, and why if that is known; not on purpose.
    Lost(String),
    /// Not, for this reason; on purpose, over a connection that is there.
    Paused(&'static str),
}

/// What has to be true for a worker to be ready, and whose state is shown.
#[derive(Default)]
pub struct Readiness {
    metrics: Arc<Metrics>,
    warm: AtomicBool,
    /// How each queue of jobs is consumed.
    queues: Mutex<BTreeMap<String, Consuming>>,
    /// The broker's address that each queue of jobs was last consumed at.
    brokers: Mutex<BTreeMap<String, String>>,
    /// Where work is stuck.
    stalled: Mutex<Option<String>>,
    /// Why the broker does not accept results for now, a sentence.
    blocked: Mutex<Option<String>>,
    catalog: OnceLock<Arc<Catalog>>,
    pipeline: OnceLock<Arc<Pipeline>>,
    about: OnceLock<About>,
}

impl Readiness {
    /// Of the worker that records here.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..Self::default() }
    }

    /// The model has run once and the class sets to preload are loaded.
    pub fn set_warm(&self) {
        self.warm.store(true, Ordering::Release);
    }

    /// Whose class vectors `/status` tells of.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        // There is one catalog a process.
        let _ = self.catalog.set(catalog);
    }

    /// Whose back end and store are shown.
    pub fn set_pipeline(&self, pipeline: Arc<Pipeline>) {
        let _ = self.pipeline.set(pipeline);
    }

    /// What the worker is.
    pub fn set_about(&self, about: About) {
        let _ = self.about.set(about);
    }

    /// The address of the broker that a queue's jobs come from, without user and password.
    pub fn set_broker(&self, queue: &str, address: &str) {
        locked(&self.brokers).insert(queue.to_owned(), address.to_owned());
    }

    /// Jobs are being consumed from a queue.
    pub fn set_consuming(&self, queue: &str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Yes);
    }

    /// No jobs are being consumed from a queue, and there is no connection.
    ///
    /// * `reason`: what the broker or the way to it said; empty if nothing did.
    pub fn set_lost(&self, queue: &str, reason: &str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Lost(reason.to_owned()));
    }

    /// No jobs are being consumed from a queue, on purpose.
    pub fn set_paused(&self, queue: &str, reason: &'static str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Paused(reason));
    }

    /// Whether every queue's connection is there, for all that is known; none before the worker
    /// turns to the broker.
    pub fn connected(&self) -> Option<bool> {
        let queues = locked(&self.queues);
        let lost = |consuming: &Consuming| matches!(consuming, Consuming::Lost(_));
        (!queues.is_empty()).then(|| !queues.values().any(lost))
    }

    /// Work does not move, and where; none once it does.
    pub fn set_stalled(&self, stalled: Option<String>) {
        *locked(&self.stalled) = stalled;
    }

    /// Notes why the broker does not accept results, a sentence; `None` once it does.
    pub fn set_blocked(&self, blocked: Option<String>) {
        *locked(&self.blocked) = blocked;
    }

    /// Returns whether the broker is there and does not accept results.
    pub fn is_blocked(&self) -> bool {
        locked(&self.blocked).is_some() && self.connected() != Some(false)
    }

    /// Why the store cannot be used, if it cannot.
    pub fn store_trouble(&self) -> Option<Trouble> {
        self.pipeline.get()?.outage()?.trouble()
    }

    /// Where the worker records what it does.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// What the worker is; `None` before it knows.
    pub fn about(&self) -> Option<&About> {
        self.about.get()
    }

    /// The class vectors that are served; `None` before the worker has a catalog.
    pub fn catalog(&self) -> Option<&Arc<Catalog>> {
        self.catalog.get()
    }

    /// The way of an image; `None` before the model is loaded.
    pub fn pipeline(&self) -> Option<&Arc<Pipeline>> {
        self.pipeline.get()
    }

    /// The address of the broker that each queue of jobs was last consumed at.
    pub fn brokers(&self) -> BTreeMap<String, String> {
        locked(&self.brokers).clone()
    }

    /// Where work is stuck, if it is.
    pub fn stalled(&self) -> Option<String> {
        locked(&self.stalled).clone()
    }

    /// What is missing, or none if the worker is ready.
    pub fn missing(&self) -> Option<String> {
        if !self.warm.load(Ordering::Acquire) {
            return Some("the model is not loaded yet".to_owned());
        }
        if let Some(stalled) = self.stalled() {
            return Some(format!("no progress: {stalled}"));
        }
        let queues = locked(&self.queues);
        let paused = queues.values().find_map(|consuming| match consuming {
            Consuming::Paused(reason) => Some((*reason).to_owned()),
            Consuming::Yes | Consuming::Lost(_) => None,
        });
        let lost: Vec<(&str, &str)> = queues
            .iter()
            .filter_map(|(queue, consuming)| match consuming {
                Consuming::Lost(reason) => Some((queue.as_str(), reason.as_str())),
                Consuming::Yes | Consuming::Paused(_) => None,
            })
            .collect();
        if lost.is_empty() {
            if let Some(blocked) = locked(&self.blocked).as_ref() {
                return Some(blocked.clone());
            }
            if let Some(trouble) = self.store_trouble() {
                return Some(trouble.to_string());
            }
            let nothing = || "no jobs are being consumed".to_owned();
            return paused.or_else(|| queues.is_empty().then(nothing));
        }
        let names: Vec<&str> = lost.iter().map(|(queue, _)| *queue).collect();
        let mut missing = format!("no jobs are being consumed from {}", names.join(", "));
        // They have one broker.
        if let Some((_, reason)) = lost.iter().find(|(_, reason)| !reason.is_empty()) {
            missing.push_str(&format!(": {reason}"));
        }
        Some(missing)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
