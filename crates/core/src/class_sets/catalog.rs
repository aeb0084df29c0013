//! Finds and keeps class vectors: which version of a set is served, and what is loaded.
//!
//! A set is loaded when it is first asked for. From then on it is followed in the background:
//! [`Catalog::refresh`] when its change is announced, [`Catalog::watch`] by polling `active.json`
//! with its ETag. A new version is read and checked off the jobs' way, then one pointer is swapped:
//! jobs that were admitted before keep the old version, whose memory is freed with the last of
//! them. A version that fails validation never replaces one that works; it is refused, logged once,
//! counted, and part of the status.
//!
//! Pinned versions are loaded on demand, one load for all who wait for it. They are kept in a cache
//! bounded in bytes, together with the versions of sets that no job has asked for lately
//! (`IDLE`): the least recently used are dropped first, and none that a job uses.

mod set;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep, timeout};

use angler_inference::embed::ClassMemory;
use angler_vectors::active::Active;
use angler_vectors::file::Expected;
use angler_vectors::{ClassVectors, ClassesError};
use angler_wire::control::SetStatus;
use angler_wire::error::Reason;
use angler_wire::job::ClassSelector;

use super::load::{self, Loaded, SILENCE, unavailable};
use crate::class_sets::catalog::set::Set;
use crate::store::{ETag, Got, ObjectStore};

pub use super::load::{active_key, version_key};

/// Sets and pinned versions that are remembered although nothing is loaded for them, at most: jobs
/// can name what does not exist as often as they like.
const REMEMBERED: usize = 1024;
/// How long it is remembered that a version or a set does not exist: it may be made any moment.
const ABSENCE: Duration = Duration::from_secs(1);
/// Sets that are polled at once.
const POLLS: usize = 8;

/// A set that no job has asked for in this time counts towards the cache and may be dropped.
const IDLE: Duration = Duration::from_secs(600);

/// How long a version's way to a device is waited for.
const UPLOAD: Duration = Duration::from_secs(30);

/// Resolves `set` and `set@version` to vectors in memory.
pub struct Catalog {
    origin: Origin,
    expected: Expected,
    memories: Vec<Arc<dyn ClassMemory>>,
}

/// How a catalog over a root behaves.
#[derive(Debug, Clone, Copy)]
pub struct CatalogOptions {
    /// How often `active.json` is looked at without an announcement, and for how long a version
    /// that was refused is not tried again.
    pub poll: Duration,
    /// What pinned versions and those of idle sets may take in memory, in bytes.
    pub cache_bytes: usize,
    /// The largest file of a version, in bytes.
    pub version_bytes: u64,
}

enum Origin {
    /// One version for everything: what `classify` runs with.
    Fixed(Arc<ClassVectors>),
    /// Files under a root.
    Root(Root),
}

struct Root {
    store: Arc<dyn ObjectStore>,
    options: CatalogOptions,
    state: Mutex<State>,
    /// One pinned version is loaded at a time, so that many do not fill the memory at once.
    pinned_loads: AsyncMutex<()>,
}

#[derive(Default)]
struct State {
    sets: HashMap<String, Arc<Set>>,
    /// The least recently used first.
    pinned: Vec<Arc<Pinned>>,
}

/// One pinned version.
struct Pinned {
    set: String,
    version: String,
    /// Held by whoever loads it; the failure of the last who tried, and until when it holds.
    failure: AsyncMutex<Option<(ClassesError, Instant)>>,
    loaded: OnceLock<Loaded>,
}

impl Catalog {
    /// A catalog that answers every question with the same vectors.
    ///
    /// # Errors
    /// [`ClassesError`] if they were made with another model.
    pub fn fixed(classes: ClassVectors, model: &str, dim: usize) -> Result<Self, ClassesError> {
        let expected = Expected { model: model.to_owned(), dim };
        expected.check(&classes.id(), classes.model(), classes.dim())?;
        Ok(Self { origin: Origin::Fixed(Arc::new(classes)), expected, memories: Vec::new() })
    }

    /// A catalog over the files under a root, for the model of this fingerprint and dimension.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        model: &str,
        dim: usize,
        options: CatalogOptions,
    ) -> Self {
        let root =
            Root { store, options, state: Mutex::default(), pinned_loads: AsyncMutex::default() };
        let expected = Expected { model: model.to_owned(), dim };
        Self { origin: Origin::Root(root), expected, memories: Vec::new() }
    }

    /// Uploads each version there before it is served.
    #[must_use]
    pub fn uploading_to(mut self, memories: &[Arc<dyn ClassMemory>]) -> Self {
        self.memories = memories.to_vec();
        self
    }

    /// The vectors that a job is scored against, if they are in memory.
    pub fn loaded(&self, selector: &ClassSelector) -> Option<Arc<ClassVectors>> {
        let root = match &self.origin {
            Origin::Fixed(classes) => return Some(Arc::clone(classes)),
            Origin::Root(root) => root,
        };
        let mut state = root.state();
        let serving = state.sets.get(&selector.set).and_then(|set| set.serving());
        match &selector.version {
            None => {
                if let Some(set) = state.sets.get(&selector.set) {
                    set.use_now();
                }
                serving.map(|loaded| loaded.classes)
            }
            Some(version) => serving
                .filter(|loaded| loaded.classes.version() == version)
                .or_else(|| state.use_pinned(&selector.set, version)?.loaded.get().cloned())
                .map(|loaded| loaded.classes),
        }
    }

    /// The vectors that a job is scored against, loaded if need be.
    ///
    /// # Errors
    /// [`ClassesError`]; [`ClassesError::Unavailable`] is the only one that may pass by itself.
    pub async fn resolve(
        &self,
        selector: &ClassSelector,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        if let Some(classes) = self.loaded(selector) {
            return Ok(classes);
        }
        let Origin::Root(root) = &self.origin else { unreachable!("`loaded` answers for it") };
        match &selector.version {
            None => self.first(root, &root.set(&selector.set)).await,
            Some(version) => self.pin(root, &root.pinned(&selector.set, version)).await,
        }
    }

    /// The same, for a set that is kept in memory for as long as the process lives.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub async fn preload(
        &self,
        selector: &ClassSelector,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        let classes = self.resolve(selector).await?;
        if let Origin::Root(root) = &self.origin
            && selector.version.is_none()
        {
            root.set(&selector.set).keep();
        }
        Ok(classes)
    }

    /// Looks at a set's `active.json` now and follows it; none if the set is not served here.
    pub async fn refresh(&self, set: &str) -> Option<SetStatus> {
        let Origin::Root(root) = &self.origin else { return None };
        let set = root.state().sets.get(set).cloned()?;
        let mut checked = set.checked.lock().await;
        set.serving()?;
        // What comes of it is in the status.
        let _ = self.follow(root, &set, &mut checked).await;
        set.status()
    }

    /// Follows every set that is served, by polling, for as long as it is awaited.
    pub async fn watch(&self) {
        let Origin::Root(root) = &self.origin else { return std::future::pending().await };
        loop {
            // With jitter, so that a fleet does not ask all at once.
            sleep(root.options.poll.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
            self.refresh_all().await;
            root.state().trim(root.options.cache_bytes);
        }
    }

    /// Looks at the `active.json` of every set that is served: after announcements may have been
    /// missed.
    pub async fn refresh_all(&self) {
        let Origin::Root(root) = &self.origin else { return };
        let sets: Vec<String> = root.state().sets.keys().cloned().collect();
        let refreshed = stream::iter(sets).map(async |set| self.refresh(&set).await);
        refreshed.buffer_unordered(POLLS).collect::<Vec<_>>().await;
    }

    /// What is served, by set.
    pub fn status(&self) -> Vec<SetStatus> {
        let Origin::Root(root) = &self.origin else { return Vec::new() };
        let mut status: Vec<SetStatus> =
            root.state().sets.values().filter_map(|set| set.status()).collect();
        status.sort_by(|a, b| a.set.cmp(&b.set));
        status
    }

    /// A set that is not served yet.
    async fn first(&self, root: &Root, set: &Arc<Set>) -> Result<Arc<ClassVectors>, ClassesError> {
        let mut checked = set.checked.lock().await;
        // Whoever waited takes what the one before it brought, good or bad.
        if let Some(loaded) = set.serving() {
            return Ok(loaded.classes);
        }
        if let Some(error) = set.failure() {
            return Err(error);
        }
        let classes = self.follow(root, set, &mut checked).await;
        root.state().trim(root.options.cache_bytes);
        classes
    }

    /// Reads `active.json`; if it names another version than the one served, loads and serves it.
    async fn follow(
        &self,
        root: &Root,
        set: &Set,
        checked: &mut Option<ETag>,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        let serving = set.serving();
        // An ETag is of use only beside what was made of it.
        let known = checked.clone().filter(|_| serving.is_some());
        let key = active_key(&set.name);
        let answer = timeout(SILENCE, root.store.get(&key, known.as_ref())).await;
        let got = match answer {
            Ok(got) => got.map_err(unavailable),
            Err(_) => {
                let (place, seconds) = (root.store.place(&key), SILENCE.as_secs());
                let reason = format!("{place}: the store was silent for {seconds} s");
                Err(ClassesError::Unavailable(reason.into()))
            }
        };
        let mut version = None;
        let found = match got {
            Ok(Got::Unchanged) => match serving {
                Some(loaded) => {
                    set.reachable_again();
                    return Ok(loaded.classes);
                }
                None => Err(ClassesError::Unavailable("no ETag was sent, and none fits".into())),
            },
            Ok(Got::Missing) => {
                *checked = None;
                Err(ClassesError::UnknownSet {
                    set: set.name.clone(),
                    reason: format!(
                        "{} does not exist, so no version is active (a job can pin one: {}@VERSION)",
                        root.store.place(&key),
                        set.name
                    ),
                })
            }
            Ok(Got::Object { bytes, etag }) => {
                let found = match Active::parse(&bytes) {
                    Ok(active) => {
                        version = Some(active.version.clone());
                        self.active(root, set, serving.as_ref(), &active).await
                    }
                    Err(error) => {
                        let reason = Reason::of(error);
                        Err(ClassesError::Invalid { place: root.store.place(&key), reason })
                    }
                };
                // What can pass by itself is tried again at the next look.
                if !matches!(found, Err(ClassesError::Unavailable(_))) {
                    *checked = Some(etag);
                }
                found
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(loaded) => {
                set.serve(loaded.clone());
                Ok(loaded.classes)
            }
            Err(error) => {
                set.refuse(version, &error, root.options.poll);
                Err(error)
            }
        }
    }

    /// The version that is active, from memory if it is there.
    async fn active(
        &self,
        root: &Root,
        set: &Set,
        serving: Option<&Loaded>,
        active: &Active,
    ) -> Result<Loaded, ClassesError> {
        let same = |loaded: &&Loaded| {
            let sum = |wanted: &String| wanted.eq_ignore_ascii_case(&loaded.sha256);
            loaded.classes.version() == active.version && active.sha256.as_ref().is_none_or(sum)
        };
        if let Some(loaded) = serving.filter(same) {
            return Ok(loaded.clone());
        }
        let pinned = root.state().use_pinned(&set.name, &active.version);
        if let Some(loaded) = pinned.as_ref().and_then(|p| p.loaded.get()).filter(same) {
            return Ok(loaded.clone());
        }
        let name = (set.name.as_str(), active.version.as_str());
        self.load(root, name, active.sha256.as_deref()).await
    }

    /// A pinned version that is not in memory yet.
    async fn pin(&self, root: &Root, pinned: &Pinned) -> Result<Arc<ClassVectors>, ClassesError> {
        let mut failure = pinned.failure.lock().await;
        if let Some(loaded) = pinned.loaded.get() {
            return Ok(Arc::clone(&loaded.classes));
        }
        if let Some((error, _)) = failure.clone().filter(|f| Instant::now() < f.1) {
            return Err(error);
        }
        let loaded = {
            let _one = root.pinned_loads.lock().await;
            self.load(root, (&pinned.set, &pinned.version), None).await
        };
        let loaded = loaded.inspect_err(|error| {
            *failure = Some((error.clone(), Instant::now() + holds(error, root.options.poll)));
        })?;
        let loaded = pinned.loaded.get_or_init(|| loaded);
        root.state().trim(root.options.cache_bytes);
        Ok(Arc::clone(&loaded.classes))
    }

    async fn load(
        &self,
        root: &Root,
        name: (&str, &str),
        sha256: Option<&str>,
    ) -> Result<Loaded, ClassesError> {
        let (store, limit) = (root.store.as_ref(), root.options.version_bytes);
        let loaded = load::load(store, name, Some(&self.expected), sha256, limit).await?;
        if !self.memories.is_empty() {
            self.upload(&loaded.classes).await;
        }
        Ok(loaded)
    }

    async fn upload(&self, classes: &Arc<ClassVectors>) {
        let (memories, version) = (self.memories.clone(), Arc::clone(classes));
        let uploading = tokio::task::spawn_blocking(move || {
            memories.iter().for_each(|memory| memory.upload(&version));
        });
        // Whatever comes of it, the version can be served: what is not there is scored on the host.
        if tokio::time::timeout(UPLOAD, uploading).await.is_err() {
            let seconds = UPLOAD.as_secs();
            tracing::warn!(classes = classes.id(), "not on its device after {seconds} s");
        }
    }
}

impl Root {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, name: &str) -> Arc<Set> {
        let mut state = self.state();
        if state.sets.len() >= REMEMBERED {
            state.sets.retain(|_, set| set.serving().is_some());
        }
        let set = state.sets.entry(name.to_owned());
        Arc::clone(set.or_insert_with(|| Arc::new(Set::new(name))))
    }

    fn pinned(&self, set: &str, version: &str) -> Arc<Pinned> {
        let mut state = self.state();
        if let Some(known) = state.use_pinned(set, version) {
            return known;
        }
        let new = Arc::new(Pinned {
            set: set.to_owned(),
            version: version.to_owned(),
            failure: AsyncMutex::default(),
            loaded: OnceLock::new(),
        });
        state.pinned.push(Arc::clone(&new));
        state.trim(self.options.cache_bytes);
        new
    }
}

impl State {
    /// A pinned version that is known, which becomes the most recently used.
    fn use_pinned(&mut self, set: &str, version: &str) -> Option<Arc<Pinned>> {
        let at = self.pinned.iter().position(|p| p.set == set && p.version == version)?;
        let known = self.pinned.remove(at);
        self.pinned.push(Arc::clone(&known));
        Some(known)
    }

    /// Drops versions of idle sets, then pinned ones, the least recently used first, until the rest
    /// is within the bound. The newest pinned one stays even if it alone is over it: its job needs
    /// it anyway.
    fn trim(&mut self, bytes: usize) {
        let size = |p: &Arc<Pinned>| p.loaded.get().map_or(0, |loaded| loaded.classes.bytes());
        let mut idle: Vec<(Duration, usize, &Arc<Set>)> =
            self.sets.values().filter_map(|set| set.idle(IDLE).map(|(i, b)| (i, b, set))).collect();
        let mut total: usize = self.pinned.iter().map(size).sum();
        total += idle.iter().map(|(_, bytes, _)| bytes).sum::<usize>();
        idle.sort_by_key(|(idle, ..)| *idle);
        while total > bytes
            && let Some((_, bytes, set)) = idle.pop()
        {
            set.forget();
            total -= bytes;
        }
        while self.pinned.len() > 1 && (total > bytes || self.pinned.len() > REMEMBERED) {
            total -= size(&self.pinned.remove(0));
        }
    }
}

/// For how long a failure is taken for granted: a file that is wrong stays wrong, and reading it
/// again for each of many jobs would cost what a good one costs.
fn holds(error: &ClassesError, poll: Duration) -> Duration {
    match error {
        ClassesError::Invalid { .. } | ClassesError::ModelMismatch { .. } => poll,
        ClassesError::UnknownSet { .. } | ClassesError::UnknownVersion { .. } => ABSENCE.min(poll),
        ClassesError::Unavailable(_) => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests;
