//! One set of a catalog: the version that it serves, the swap to the next, and what was refused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use angler_vectors::ClassesError;
use angler_wire::control::{Refused, SetStatus};
use angler_wire::text::chain;

use super::holds;
use crate::class_sets::load::Loaded;
use crate::store::ETag;

/// One set's active version.
pub(super) struct Set {
    pub name: String,
    /// The ETag of the `active.json` that was checked last; locked while another is checked.
    pub checked: AsyncMutex<Option<ETag>>,
    seen: Mutex<Seen>,
    /// When a job asked for it last.
    used: Mutex<Instant>,
    /// Whether it stays in memory without being asked for.
    kept: AtomicBool,
}

#[derive(Default)]
struct Seen {
    serving: Option<Loaded>,
    since: Option<SystemTime>,
    swaps: u64,
    refusals: u64,
    refused: Option<Refused>,
    /// Whether what was refused may pass by itself: the store did not answer.
    passing: bool,
    /// While nothing is served: why, and until when that is taken for granted.
    failure: Option<(ClassesError, Instant)>,
}

impl Set {
    /// Of which nothing is known yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            checked: AsyncMutex::default(),
            seen: Mutex::default(),
            used: Mutex::new(Instant::now()),
            kept: AtomicBool::new(false),
        }
    }

    /// A job asks for it.
    pub fn use_now(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// It stays in memory for as long as the process lives.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// For how long no job has asked for it, and the bytes of the version that is served. `None`
    /// if that is less than `least`, or the version is not to be dropped: preloaded, or in use.
    pub fn idle(&self, least: Duration) -> Option<(Duration, usize)> {
        let idle = self.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        if idle < least || self.kept.load(Ordering::Relaxed) {
            return None;
        }
        let seen = self.seen();
        let classes = &seen.serving.as_ref()?.classes;
        (Arc::strong_count(classes) == 1).then(|| (idle, classes.bytes()))
    }

    /// Drops the version that is served; the next job that asks loads it again.
    pub fn forget(&self) {
        let dropped = self.seen().serving.take();
        if let Some(loaded) = &dropped {
            let (version, bytes) = (loaded.classes.version(), loaded.classes.bytes());
            tracing::info!(
                set = self.name,
                version,
                bytes,
                "dropped class vectors that no job asks for"
            );
        }
    }

    /// Why nothing is served, while that is taken for granted.
    pub fn failure(&self) -> Option<ClassesError> {
        let failure = self.seen().failure.clone().filter(|(_, until)| Instant::now() < *until);
        failure.map(|(error, _)| error)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn serving(&self) -> Option<Loaded> {
        self.seen().serving.clone()
    }

    /// The swap: one pointer.
    pub fn serve(&self, loaded: Loaded) {
        let (version, rows) =
            (loaded.classes.version().to_owned(), loaded.classes.vectors().rows());
        let mut seen = self.seen();
        seen.failure = None;
        if seen.refused.take().is_some() {
            tracing::info!(set = self.name, version, "what is active can be served again");
        }
        let before = match &seen.serving {
            Some(old) if old.sha256 == loaded.sha256 && old.classes.version() == version => return,
            Some(old) => Some(old.classes.version().to_owned()),
            None => None,
        };
        seen.swaps += u64::from(before.is_some());
        seen.since = Some(SystemTime::now());
        let old = seen.serving.replace(loaded);
        drop(seen);
        // Freed outside the lock, if no job holds it.
        drop(old);
        tracing::info!(set = self.name, version, before, rows, "class vectors are served");
    }

    pub fn refuse(&self, version: Option<String>, error: &ClassesError, poll: Duration) {
        let reason = chain(error);
        let mut seen = self.seen();
        match seen.serving.as_ref().map(|s| s.classes.version().to_owned()) {
            Some(serving) => {
                let passing = matches!(error, ClassesError::Unavailable(_));
                let known = seen.refused.as_ref();
                // A version that is wrong stays so while the store is away.
                if known.is_some_and(|r| {
                    (r.version == version && r.reason == reason) || (passing && !seen.passing)
                }) {
                    return;
                }
                seen.refusals += u64::from(!passing);
                seen.passing = passing;
                tracing::error!(
                    set = self.name,
                    version,
                    serving,
                    "refused, the old version goes on serving: {reason}"
                );
            }
            // Each job that asks says so in its result.
            None => {
                seen.failure = Some((error.clone(), Instant::now() + holds(error, poll)));
                return;
            }
        }
        let at = rfc3339(SystemTime::now());
        seen.refused = Some(Refused { version, reason, at });
    }

    /// The store answered that nothing has changed: a failure to ask is over, a version that was
    /// refused is still refused.
    pub fn reachable_again(&self) {
        let mut seen = self.seen();
        if seen.passing && seen.refused.take().is_some() {
            seen.passing = false;
            tracing::info!(set = self.name, "active.json can be followed again");
        }
    }

    pub fn status(&self) -> Option<SetStatus> {
        let seen = self.seen();
        let Loaded { classes, sha256, .. } = seen.serving.as_ref()?;
        Some(SetStatus {
            set: self.name.clone(),
            version: classes.version().to_owned(),
            sha256: sha256.clone(),
            rows: classes.vectors().rows(),
            bytes: classes.bytes(),
            since: seen.since.map(rfc3339).unwrap_or_default(),
            swaps: seen.swaps,
            refusals: seen.refusals,
            refused: seen.refused.clone(),
        })
    }
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
