//! Notices that the store of the images does not answer at all, so that the worker stops taking
//! jobs instead of spending their attempts, and notices when it is back.
//!
//! One failing bucket, or one host name that does not exist, is no outage: an object that was
//! fetched before is tried first. Only if that fails as well is the store certain to be away. While
//! nothing was ever fetched it is only likely: then a job is let through now and then, and its
//! attempts count. The store is probed with a growing pause.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::error::{ImageError, ImageErrorCode};
use crate::store::{ByteBudget, ImageStore};

/// Fetches in a row, over all jobs, that failed because the store did not answer.
const SUSPICIOUS: u32 = 8;
/// The pause before the first probe, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));

/// Whether the store answers.
pub struct Outage {
    away: watch::Sender<bool>,
    suspicion: Notify,
    failures: AtomicU32,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// The URI that was fetched last.
    good: Option<String>,
    /// The URI that failed last.
    failing: String,
}

impl Default for Outage {
    fn default() -> Self {
        Self {
            away: watch::Sender::new(false),
            suspicion: Notify::new(),
            failures: AtomicU32::new(0),
            known: Mutex::default(),
        }
    }
}

impl Outage {
    /// With an object to probe with until one has been fetched; it need not exist, since "no such
    /// key" is an answer.
    pub fn probing(uri: String) -> Self {
        let outage = Self::default();
        outage.known().good = Some(uri);
        outage
    }

    /// Takes note of how a fetch ended. Every answer counts as one, "no such key" too.
    pub fn note(&self, uri: &str, error: Option<&ImageError>) {
        if error.is_some_and(|e| e.code == ImageErrorCode::StorageUnavailable) {
            if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= SUSPICIOUS {
                uri.clone_into(&mut self.known().failing);
                self.suspicion.notify_one();
            }
            return;
        }
        use ImageErrorCode::{BadUri, BucketNotAllowed};
        if error.is_some_and(|e| matches!(e.code, BadUri | BucketNotAllowed)) {
            return; // The store was not asked.
        }
        self.failures.store(0, Ordering::Relaxed);
        if error.is_none() {
            let mut known = self.known();
            if known.good.as_deref() != Some(uri) {
                known.good = Some(uri.to_owned());
            }
        }
    }

    /// Whether the store is away.
    pub fn is_on(&self) -> bool {
        *self.away.borrow()
    }

    /// Whether the store is away for everything, so that no attempt at an image means anything.
    pub fn is_certain(&self) -> bool {
        self.is_on() && self.known().good.is_some()
    }

    /// Returns once the store is away.
    pub async fn began(&self) {
        // The sender lives as long as `self`.
        let _ = self.away.subscribe().wait_for(|away| *away).await;
    }

    /// Returns once the store is there.
    pub async fn over(&self) {
        let _ = self.away.subscribe().wait_for(|away| !*away).await;
    }

    /// Watches for as long as it is awaited. `budget` bounds what a probe reads.
    pub async fn watch(&self, store: &dyn ImageStore, budget: &ByteBudget) {
        let mut pause = PAUSES.0;
        loop {
            self.suspicion.notified().await;
            if self.failures.load(Ordering::Relaxed) < SUSPICIOUS {
                continue;
            }
            if self.answers(store, budget).await {
                pause = PAUSES.0;
                continue;
            }
            let probe = self.probe();
            tracing::error!(probe, "the store does not answer: no jobs are taken until it does");
            self.away.send_replace(true);
            loop {
                sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
                pause = (2 * pause).min(PAUSES.1);
                if self.answers(store, budget).await {
                    tracing::info!("the store answers again");
                    pause = PAUSES.0;
                    break;
                }
                // What failed may be all that fails: other jobs must not wait for it for ever. One
                // more failure, and the pause goes on.
                if self.known().good.is_none() {
                    self.failures.store(SUSPICIOUS - 1, Ordering::Relaxed);
                    break;
                }
            }
            self.away.send_replace(false);
        }
    }

    async fn answers(&self, store: &dyn ImageStore, budget: &ByteBudget) -> bool {
        let fetched = store.fetch(&self.probe(), budget).await;
        let silent = fetched.is_err_and(|e| e.code == ImageErrorCode::StorageUnavailable);
        if !silent {
            self.failures.store(0, Ordering::Relaxed);
        }
        !silent
    }

    /// What the store is tried with.
    fn probe(&self) -> String {
        let known = self.known();
        known.good.clone().unwrap_or_else(|| known.failing.clone())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Arc;

    use crate::store::Fetched;
    use async_trait::async_trait;
    use bytes::Bytes;
    use tokio::time::Instant;
    use tokio_util::task::AbortOnDropHandle;

    /// Answers for every URI but those that are away.
    #[derive(Default)]
    struct Store {
        away: Mutex<HashSet<&'static str>>,
        probes: AtomicU32,
    }

    #[async_trait]
    impl ImageStore for Store {
        async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
            self.probes.fetch_add(1, Ordering::Relaxed);
            if self.away.lock().unwrap().contains(uri) {
                return Err(silence());
            }
            Ok(Fetched { bytes: Bytes::new(), permit: budget.reserve(0).await? })
        }
    }

    fn silence() -> ImageError {
        ImageError::new(ImageErrorCode::StorageUnavailable, "away")
    }

    fn watched() -> (Arc<Outage>, Arc<Store>, AbortOnDropHandle<()>) {
        let (outage, store) = (Arc::new(Outage::default()), Arc::new(Store::default()));
        let (watched, probed) = (Arc::clone(&outage), Arc::clone(&store));
        let watch = async move { watched.watch(&*probed, &ByteBudget::new(10, 10)).await };
        (outage, store, AbortOnDropHandle::new(tokio::spawn(watch)))
    }

    fn fail(outage: &Outage, uri: &str, times: u32) {
        (0..times).for_each(|_| outage.note(uri, Some(&silence())));
    }

    /// Long enough for any number of probes.
    const LONG: Duration = Duration::from_secs(600);

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_are_an_outage_until_the_store_answers_again() {
        let (outage, store, _watch) = watched();
        outage.note("good", None);
        store.away.lock().unwrap().extend(["good", "bad"]);
        fail(&outage, "bad", SUSPICIOUS - 1);
        outage.note("missing", Some(&ImageError::new(ImageErrorCode::NotFound, "an answer")));
        fail(&outage, "bad", SUSPICIOUS - 1);
        assert!(tokio::time::timeout(LONG, outage.began()).await.is_err(), "never 8 in a row");
        fail(&outage, "bad", 1);
        outage.began().await;
        let probes = store.probes.load(Ordering::Relaxed);
        assert!(tokio::time::timeout(LONG, outage.over()).await.is_err());
        let more = store.probes.load(Ordering::Relaxed) - probes;
        assert!((30..=70).contains(&more), "{more} probes in ten minutes");
        store.away.lock().unwrap().clear();
        let back = Instant::now();
        outage.over().await;
        assert!(back.elapsed() < 2 * PAUSES.1, "{:?}", back.elapsed());
        fail(&outage, "bad", SUSPICIOUS - 1);
        assert!(!outage.is_on(), "counted anew");
    }

    #[tokio::test(start_paused = true)]
    async fn one_bucket_that_fails_is_no_outage_while_another_answers() {
        let (outage, store, _watch) = watched();
        outage.note("good", None);
        store.away.lock().unwrap().insert("bad");
        fail(&outage, "bad", 100);
        assert!(tokio::time::timeout(LONG, outage.began()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn while_nothing_is_known_to_be_good_jobs_are_let_through_now_and_then() {
        let (outage, store, _watch) = watched();
        store.away.lock().unwrap().insert("bad");
        fail(&outage, "bad", SUSPICIOUS);
        for _ in 0..5 {
            outage.began().await;
            outage.over().await;
            fail(&outage, "bad", 1); // the job that was let through
        }
        // Another one finds an image, and from then on that is what counts.
        outage.began().await;
        outage.over().await;
        outage.note("good", None);
        fail(&outage, "bad", 100);
        assert!(tokio::time::timeout(LONG, outage.began()).await.is_err());
    }
}
