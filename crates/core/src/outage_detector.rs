//! Notices that this worker cannot use the store of the images, so that it stops taking jobs instead
//! of spending their attempts, and notices when it can again.
//!
//! The store may be silent, reject the worker's credentials, or deny access to everything. One
//! failing bucket, one host name that does not exist or one forbidden object is no outage: objects
//! that were read before are tried first. Only if they fail as well is the outage *certain*. While
//! nothing was ever read it is only likely, and attempts count; credentials that are rejected are
//! always certain. The store is probed with a growing pause. Where the probes may be all that fails,
//! the worker takes jobs now and then, on trial: one image that is read ends the outage.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use angler_wire::error::{ImageError, ImageErrorCode, StoreFault};

use crate::store::{ByteBudget, ImageStore};

/// Fetches in a row, over all jobs, that failed for want of an answer or of access.
const SUSPICIOUS: u32 = 8;
/// The pause before the first probe, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// A store that takes longer over a probe is silent.
const PROBE: Duration = Duration::from_secs(20);
/// Objects that are remembered because they were read: one of them may have become forbidden.
const READ: usize = 4;

/// Why the store cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Cause {
    /// It does not answer, or answers that it cannot at present.
    Silent,
    /// It rejects the worker's credentials, or the worker has none.
    Credentials,
    /// It denies access to objects that were read before, or to all that were asked for.
    Denied,
}

impl Cause {
    /// Returns the cause as metrics name it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The cause for a person.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Silent => "the store does not answer",
            Self::Credentials => "the store rejects the worker's credentials",
            Self::Denied => "the store denies the worker access",
        }
    }

    /// What an error is a sign of. `None` if the store answered the question.
    fn of(error: &ImageError) -> Option<Self> {
        match (error.fault, error.code) {
            (StoreFault::Credentials, _) => Some(Self::Credentials),
            (_, ImageErrorCode::StorageUnavailable) => Some(Self::Silent),
            (_, ImageErrorCode::AccessDenied) => Some(Self::Denied),
            _ => None,
        }
    }
}

/// An outage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Why the store cannot be used.
    pub cause: Cause,
    /// `true` if no object can be read, so that no attempt at an image means anything.
    pub certain: bool,
    /// What a probe met with.
    pub detail: String,
    /// Whether jobs are taken all the same, to see what becomes of them.
    trial: bool,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.cause {
            Cause::Silent | Cause::Denied => write!(f, "{}: {}", self.cause.reason(), self.detail),
            Cause::Credentials => f.write_str(&self.detail),
        }
    }
}

/// Whether this worker can use the store.
pub struct Outage {
    trouble: watch::Sender<Option<Trouble>>,
    suspicion: Notify,
    failures: AtomicU32,
    known: Mutex<Known>,
    /// Held during a check; when the last one began, and what it found.
    checks: AsyncMutex<Option<(Instant, Option<Trouble>)>>,
}

#[derive(Default)]
struct Known {
    /// URIs that were read, the last one first.
    read: VecDeque<String>,
    /// A URI that is known to be in the store; there need not be such an object.
    root: Option<String>,
    /// The URI that failed last, and why.
    failing: Option<(String, Cause)>,
}

/// What the store is tried with.
enum Probes {
    /// Objects that were read before.
    Read(Vec<String>),
    /// An object that need not exist and that the worker need not be allowed to read.
    Root(String),
    /// The URI that failed, since nothing better is known.
    Failing(String),
}

impl Default for Outage {
    fn default() -> Self {
        Self {
            trouble: watch::Sender::new(None),
            suspicion: Notify::new(),
            failures: AtomicU32::new(0),
            known: Mutex::default(),
            checks: AsyncMutex::default(),
        }
    }
}

impl Outage {
    /// With a URI to probe until an object has been read; the object need not exist, since "no such
    /// key" is an answer.
    pub fn probing(uri: String) -> Self {
        let outage = Self::default();
        outage.known().root = Some(uri);
        outage
    }

    /// Takes note of how a fetch ended.
    pub fn note(&self, uri: &str, error: Option<&ImageError>) {
        use ImageErrorCode::{BadUri, BucketNotAllowed};
        let Some(error) = error else { return self.note_read(uri) };
        match Cause::of(error) {
            Some(cause) => {
                self.known().failing = Some((uri.to_owned(), cause));
                if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= SUSPICIOUS {
                    self.suspicion.notify_one();
                }
            }
            // The store was not asked.
            None if matches!(error.code, BadUri | BucketNotAllowed) => {}
            None => self.failures.store(0, Ordering::Relaxed),
        }
    }

    fn note_read(&self, uri: &str) {
        self.failures.store(0, Ordering::Relaxed);
        {
            let mut known = self.known();
            if known.read.front().is_none_or(|last| last != uri) {
                known.read.retain(|known| known != uri);
                known.read.truncate(READ - 1);
                known.read.push_front(uri.to_owned());
            }
        }
        if self.is_on() {
            self.suspicion.notify_one(); // It may be over.
        }
    }

    /// Decides what an image's error means: its own fault, or that of an outage, which is then
    /// certain. A denial that cannot be told apart yet is [`StoreFault::Unconfirmed`].
    ///
    /// A denial is the object's own fault only if it is repeated after the store was found usable: the first
    /// one may be of an outage that has ended since. If it is not repeated, the error becomes
    /// `storage_unavailable`, and another attempt will read the object.
    pub async fn explain(
        &self,
        uri: &str,
        error: ImageError,
        store: &dyn ImageStore,
        budget: &ByteBudget,
    ) -> ImageError {
        let certain = |trouble: &Option<Trouble>| trouble.as_ref().is_some_and(|t| t.certain);
        let cause = Cause::of(&error);
        let nothing_read = self.known().read.is_empty();
        let trouble = match cause {
            None => return error,
            Some(Cause::Silent) => self.trouble(),
            Some(Cause::Denied) if nothing_read => self.trouble(),
            Some(Cause::Credentials | Cause::Denied) => self.check(store, budget).await,
        };
        match cause {
            _ if certain(&trouble) => error.with(StoreFault::Outage),
            Some(Cause::Denied) if nothing_read => error.with(StoreFault::Unconfirmed),
            Some(Cause::Denied) if self.is_denied(uri, store, budget).await => {
                error.with(StoreFault::None)
            }
            Some(Cause::Denied) => ImageError::new(
                ImageErrorCode::StorageUnavailable,
                format!("the store denied access to {uri} during an outage"),
            ),
            _ => error,
        }
    }

    /// Returns whether the store denies access to this object now.
    async fn is_denied(&self, uri: &str, store: &dyn ImageStore, budget: &ByteBudget) -> bool {
        let answer = timeout(PROBE, store.probe(uri, budget)).await;
        answer
            .is_ok_and(|answer| answer.is_err_and(|error| Cause::of(&error) == Some(Cause::Denied)))
    }

    /// Looks whether the store can be used now; yields why not. Those who ask while a check is
    /// under way share the next one.
    pub async fn check(&self, store: &dyn ImageStore, budget: &ByteBudget) -> Option<Trouble> {
        let asked = Instant::now();
        let mut last = self.checks.lock().await;
        if let Some((began, found)) = &*last
            && *began > asked
        {
            return found.clone();
        }
        let began = Instant::now();
        let found = self.ask(store, budget).await;
        *last = Some((began, found.clone()));
        self.found(found.clone());
        found
    }

    /// The outage, if there is one.
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble.borrow().clone()
    }

    /// `true` during an outage.
    pub fn is_on(&self) -> bool {
        self.trouble.borrow().is_some()
    }

    /// `true` during a certain outage: no attempt at an image means anything.
    pub fn is_certain(&self) -> bool {
        self.trouble.borrow().as_ref().is_some_and(|trouble| trouble.certain)
    }

    /// Whether class sets are in the store as well.
    pub fn has_root(&self) -> bool {
        self.known().root.is_some()
    }

    /// Returns once no more jobs are to be taken, with the reason.
    pub async fn began(&self) -> &'static str {
        let mut seen = self.trouble.subscribe();
        // The sender lives as long as `self`.
        let trouble = seen.wait_for(|t| t.as_ref().is_some_and(|t| !t.trial)).await;
        let cause = trouble.ok().and_then(|t| t.as_ref().map(|t| t.cause));
        cause.unwrap_or(Cause::Silent).reason()
    }

    /// Returns once jobs are to be taken.
    pub async fn over(&self) {
        let mut seen = self.trouble.subscribe();
        let _ = seen.wait_for(|t| t.as_ref().is_none_or(|t| t.trial)).await;
    }

    /// Watches for as long as it is awaited. `budget` bounds what a probe reads.
    pub async fn watch(&self, store: &dyn ImageStore, budget: &ByteBudget) {
        loop {
            self.suspicion.notified().await;
            if !self.is_on() && self.failures.load(Ordering::Relaxed) >= SUSPICIOUS {
                self.check(store, budget).await;
            }
            self.until_usable(store, budget).await;
        }
    }

    async fn until_usable(&self, store: &dyn ImageStore, budget: &ByteBudget) {
        let mut pause = PAUSES.0;
        while self.is_on() {
            sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
            pause = (2 * pause).min(PAUSES.1);
            let Some(trouble) = self.check(store, budget).await else { return };
            if trouble.certain && trouble.cause != Cause::Denied {
                continue;
            }
            // The objects that were probed may be all that fail. The next failure counts.
            self.failures.store(SUSPICIOUS - 1, Ordering::Relaxed);
            let _ = self.suspicion.notified().now_or_never();
            self.set_trial(true);
            if timeout(pause, self.suspicion.notified()).await.is_ok()
                && self.check(store, budget).await.is_some()
            {
                self.set_trial(false);
            }
        }
    }

    fn set_trial(&self, trial: bool) {
        self.trouble.send_if_modified(|trouble| match trouble {
            Some(trouble) => std::mem::replace(&mut trouble.trial, trial) != trial,
            None => false,
        });
    }

    async fn ask(&self, store: &dyn ImageStore, budget: &ByteBudget) -> Option<Trouble> {
        let (uris, read, root) = match self.probes()? {
            Probes::Read(uris) => (uris, true, false),
            Probes::Root(uri) => (vec![uri], false, true),
            Probes::Failing(uri) => (vec![uri], false, false),
        };
        let mut denied = None;
        for uri in uris {
            let error = match timeout(PROBE, store.probe(&uri, budget)).await {
                Ok(answer) => answer.err()?,
                Err(_) => {
                    let message = format!("no answer for {uri} within {} s", PROBE.as_secs());
                    ImageError::new(ImageErrorCode::StorageUnavailable, message)
                }
            };
            let cause = Cause::of(&error)?;
            let certain = read || root || cause == Cause::Credentials;
            let found = Trouble { cause, certain, detail: error.message, trial: false };
            match cause {
                Cause::Denied if root => return None,
                Cause::Denied => denied = denied.or(Some(found)),
                Cause::Silent | Cause::Credentials => return Some(found),
            }
        }
        denied
    }

    fn probes(&self) -> Option<Probes> {
        let known = self.known();
        if !known.read.is_empty() {
            return Some(Probes::Read(known.read.iter().cloned().collect()));
        }
        match (&known.root, &known.failing) {
            // That class sets can be read says nothing of images.
            (_, Some((uri, Cause::Denied))) => Some(Probes::Failing(uri.clone())),
            (Some(root), _) => Some(Probes::Root(root.clone())),
            (None, Some((uri, _))) => Some(Probes::Failing(uri.clone())),
            (None, None) => None,
        }
    }

    fn found(&self, found: Option<Trouble>) {
        if found.is_none() {
            self.failures.store(0, Ordering::Relaxed);
        }
        let mut began = false;
        self.trouble.send_if_modified(|now| {
            match (&mut *now, found) {
                (None, None) => return false,
                (Some(_), None) => {
                    tracing::info!("the store can be used again");
                    *now = None;
                }
                (None, Some(trouble)) => {
                    let cause = trouble.cause.as_str();
                    tracing::error!(cause, "taking no jobs until the store can be used: {trouble}");
                    *now = Some(trouble);
                    began = true;
                }
                (Some(old), Some(new)) => {
                    if old.cause != new.cause {
                        let cause = new.cause.as_str();
                        tracing::error!(cause, "the store still cannot be used: {new}");
                    }
                    *now = Some(new); // Whatever was on trial has failed.
                }
            }
            true
        });
        if began {
            self.suspicion.notify_one(); // Whoever watches sees it to its end.
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;
    use std::collections::HashMap;
    use std::sync::Arc;

    use crate::store::Fetched;
    use async_trait::async_trait;
    use bytes::Bytes;
    use tokio_util::task::AbortOnDropHandle;

    /// Reads every URI but those that fail.
    #[derive(Default)]
    struct Store {
        failing: Mutex<HashMap<&'static str, Cause>>,
        probes: AtomicU32,
    }

    impl Store {
        fn fail(&self, uris: &[&'static str], cause: Cause) {
            self.failing.lock().unwrap().extend(uris.iter().map(|uri| (*uri, cause)));
        }

        fn mend(&self) {
            self.failing.lock().unwrap().clear();
        }

        fn probes(&self) -> u32 {
            self.probes.load(Ordering::Relaxed)
        }
    }

    #[async_trait]
    impl ImageStore for Store {
        async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
            self.probes.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(1)).await;
            if let Some(cause) = self.failing.lock().unwrap().get(uri) {
                return Err(error(*cause));
            }
            Ok(Fetched { bytes: Bytes::new(), permit: budget.reserve(0).await? })
        }
    }

    fn error(cause: Cause) -> ImageError {
        match cause {
            Cause::Silent => ImageError::new(ImageErrorCode::StorageUnavailable, "away"),
            Cause::Credentials => ImageError::credentials("a wrong key"),
            Cause::Denied => ImageError::new(ImageErrorCode::AccessDenied, "no grant"),
        }
    }

    struct World {
        outage: Arc<Outage>,
        store: Arc<Store>,
        budget: ByteBudget,
        _watch: AbortOnDropHandle<()>,
    }

    impl World {
        fn of(outage: Outage) -> Self {
            let (outage, store) = (Arc::new(outage), Arc::new(Store::default()));
            let budget = ByteBudget::new(10, 10);
            let (watched, probed, bytes) = (outage.clone(), store.clone(), budget.clone());
            let watch = async move { watched.watch(&*probed, &bytes).await };
            let _watch = AbortOnDropHandle::new(tokio::spawn(watch));
            Self { outage, store, budget, _watch }
        }

        fn new() -> Self {
            Self::of(Outage::default())
        }

        /// Images that fail, one after another; yields what the last one's error means.
        async fn fail(&self, uri: &str, cause: Cause, times: u32) -> StoreFault {
            let mut fault = StoreFault::None;
            for _ in 0..times {
                self.outage.note(uri, Some(&error(cause)));
                let explained =
                    self.outage.explain(uri, error(cause), &*self.store, &self.budget).await;
                fault = explained.fault;
            }
            fault
        }

        async fn never_begins(&self) -> bool {
            timeout(LONG, self.outage.began()).await.is_err()
        }

        async fn never_ends(&self) -> bool {
            timeout(LONG, self.outage.over()).await.is_err()
        }
    }

    /// Long enough for any number of probes.
    const LONG: Duration = Duration::from_secs(600);

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_are_an_outage_until_the_store_answers_again() {
        let world = World::new();
        let World { outage, store, .. } = &world;
        outage.note("good", None);
        store.fail(&["good", "bad"], Cause::Silent);
        world.fail("bad", Cause::Silent, SUSPICIOUS - 1).await;
        outage.note("missing", Some(&ImageError::new(ImageErrorCode::NotFound, "an answer")));
        world.fail("bad", Cause::Silent, SUSPICIOUS - 1).await;
        assert!(world.never_begins().await, "never 8 in a row");
        world.fail("bad", Cause::Silent, 1).await;
        assert_eq!(outage.began().await, "the store does not answer");
        assert_eq!(outage.trouble().unwrap().to_string(), "the store does not answer: away");
        assert_eq!(world.fail("bad", Cause::Silent, 1).await, StoreFault::Outage);
        let probes = store.probes();
        assert!(world.never_ends().await);
        let more = store.probes() - probes;
        assert!((30..=70).contains(&more), "{more} probes in ten minutes");
        store.mend();
        let back = Instant::now();
        outage.over().await;
        assert!(back.elapsed() < 2 * PAUSES.1, "{:?}", back.elapsed());
        world.fail("bad", Cause::Silent, SUSPICIOUS - 1).await;
        assert!(!outage.is_on(), "counted from zero");
    }

    #[tokio::test(start_paused = true)]
    async fn one_bucket_that_fails_is_no_outage_while_another_answers() {
        for &cause in Cause::VARIANTS {
            let world = World::new();
            world.outage.note("good", None);
            world.store.fail(&["bad"], cause);
            assert_ne!(world.fail("bad", cause, 100).await, StoreFault::Outage, "{cause:?}");
            assert!(world.never_begins().await, "{cause:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn while_nothing_was_read_jobs_are_let_through_now_and_then() {
        for cause in [Cause::Silent, Cause::Denied] {
            let world = World::new();
            let World { outage, store, .. } = &world;
            store.fail(&["bad"], cause);
            world.fail("bad", cause, SUSPICIOUS).await;
            for _ in 0..5 {
                assert_eq!(outage.began().await, cause.reason());
                outage.over().await;
                // The job that was let through: its attempt counts.
                assert_ne!(world.fail("bad", cause, 1).await, StoreFault::Outage);
            }
            assert!(outage.is_on() && !outage.is_certain());
            // Another one finds an image, and from then on that is what counts.
            outage.began().await;
            outage.over().await;
            outage.note("good", None);
            world.fail("bad", cause, 100).await;
            assert!(world.never_begins().await);
            assert!(!outage.is_on());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_without_a_job_ends_when_the_store_is_mended() {
        let world = World::new();
        let World { outage, store, .. } = &world;
        store.fail(&["bad"], Cause::Silent);
        world.fail("bad", Cause::Silent, SUSPICIOUS).await;
        outage.began().await;
        sleep(LONG).await;
        assert!(outage.is_on());
        store.mend();
        sleep(LONG).await;
        assert!(!outage.is_on());
    }

    #[tokio::test(start_paused = true)]
    async fn one_rejection_is_an_outage_if_the_credentials_are_rejected_for_all() {
        for outage in [Outage::default(), Outage::probing("root".into())] {
            let world = World::of(outage);
            let World { outage, store, .. } = &world;
            store.fail(&["a", "root"], Cause::Credentials);
            // Although nothing was ever read.
            assert_eq!(world.fail("a", Cause::Credentials, 1).await, StoreFault::Outage);
            assert_eq!(outage.began().await, "the store rejects the worker's credentials");
            assert!(outage.is_certain() && world.never_ends().await);
            store.mend();
            outage.over().await;
            assert!(!outage.is_on());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_denial_is_an_outage_if_all_that_was_read_before_is_denied_too() {
        let world = World::new();
        let World { outage, store, .. } = &world;
        assert_eq!(world.fail("x", Cause::Denied, 1).await, StoreFault::Unconfirmed);
        outage.note("a", None);
        outage.note("b", None);
        store.fail(&["x", "b"], Cause::Denied);
        assert_eq!(world.fail("x", Cause::Denied, 1).await, StoreFault::None, "a can be read");
        store.fail(&["a"], Cause::Denied);
        assert_eq!(world.fail("x", Cause::Denied, 1).await, StoreFault::Outage);
        assert_eq!(outage.began().await, "the store denies the worker access");
        // Other objects may be readable: jobs are taken on trial, and no attempt is spent on it.
        for _ in 0..3 {
            outage.over().await;
            assert!(outage.is_on() && outage.is_certain());
            assert_eq!(world.fail("x", Cause::Denied, 1).await, StoreFault::Outage);
            outage.began().await;
        }
        outage.over().await;
        outage.note("c", None);
        sleep(PAUSES.0).await;
        assert!(!outage.is_on(), "an image was read");
    }

    #[tokio::test(start_paused = true)]
    async fn a_denial_is_the_objects_own_only_if_it_is_repeated_once_the_store_is_usable() {
        let World { outage, store, budget, .. } = &World::new();
        outage.note("a", None);
        // Refused in an outage that has ended before anybody looks.
        let denied = error(Cause::Denied);
        let explained = outage.explain("x", denied.clone(), &**store, budget).await;
        assert_eq!(explained.code, ImageErrorCode::StorageUnavailable, "{explained}");
        assert!(explained.message.contains('x'), "{explained}");
        store.fail(&["x"], Cause::Denied);
        assert_eq!(outage.explain("x", denied.clone(), &**store, budget).await, denied);
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_ask_at_once_share_a_check() {
        let world = World::new();
        let World { outage, store, budget, .. } = &world;
        outage.note("a", None);
        store.fail(&["x"], Cause::Denied);
        let asking = (0..100).map(|_| async {
            outage.explain("x", error(Cause::Denied), &**store, budget).await.fault
        });
        let faults = futures_util::future::join_all(asking).await;
        assert!(faults.into_iter().all(|fault| fault == StoreFault::None));
        let own = 100; // Each looks whether its denial is repeated.
        assert_eq!(store.probes() - own, 2, "the first's, and one that began after all had asked");
    }
}
