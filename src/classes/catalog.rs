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
//! ([`IDLE`]): the least recently used are dropped first, and none that a job uses.

mod set;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::Mutex as Turn;
use tokio::time::{Instant, sleep, timeout};

use self::set::Set;
use super::active::Active;
use super::file::Expected;
use super::load::{self, Loaded, SILENCE, unavailable};
use super::{ClassVectors, ClassesError};
use crate::control::SetStatus;
use crate::embed::ClassMemory;
use crate::job::ClassSelector;
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
    pinned_loads: Turn<()>,
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
    turn: Turn<Option<(ClassesError, Instant)>>,
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
        let root = Root { store, options, state: Mutex::default(), pinned_loads: Turn::default() };
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
        let mut dealt_with = set.turn.lock().await;
        set.serving()?;
        // What comes of it is in the status.
        let _ = self.follow(root, &set, &mut dealt_with).await;
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
        let mut dealt_with = set.turn.lock().await;
        // Whoever waited takes what the one before it brought, good or bad.
        if let Some(loaded) = set.serving() {
            return Ok(loaded.classes);
        }
        if let Some(error) = set.failure() {
            return Err(error);
        }
        let classes = self.follow(root, set, &mut dealt_with).await;
        root.state().trim(root.options.cache_bytes);
        classes
    }

    /// Reads `active.json`; if it names another version than the one served, loads and serves it.
    async fn follow(
        &self,
        root: &Root,
        set: &Set,
        dealt_with: &mut Option<ETag>,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        let serving = set.serving();
        // An ETag is of use only beside what was made of it.
        let known = dealt_with.clone().filter(|_| serving.is_some());
        let key = active_key(&set.name);
        let answer = timeout(SILENCE, root.store.get(&key, known.as_ref())).await;
        let got = match answer {
            Ok(got) => got.map_err(unavailable),
            Err(_) => Err(ClassesError::Unavailable(format!(
                "{}: the store was silent for {} s",
                root.store.place(&key),
                SILENCE.as_secs()
            ))),
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
                *dealt_with = None;
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
                    Err(reason) => {
                        Err(ClassesError::Invalid { place: root.store.place(&key), reason })
                    }
                };
                // What can pass by itself is tried again at the next look.
                if !matches!(found, Err(ClassesError::Unavailable(_))) {
                    *dealt_with = Some(etag);
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
        let mut failure = pinned.turn.lock().await;
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
            turn: Turn::default(),
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
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::classes::{Contents, file};
    use crate::job::hex;
    use crate::store::local::LocalObjects;
    use crate::store::{Listed, Object, ObjectError};
    use async_trait::async_trait;
    use bytes::Bytes;
    use ndarray::array;
    use sha2::{Digest, Sha256};

    /// A folder whose reads are counted.
    struct Counted {
        folder: LocalObjects,
        gets: AtomicUsize,
        opens: AtomicUsize,
        away: std::sync::atomic::AtomicBool,
    }

    #[async_trait]
    impl ObjectStore for Counted {
        fn place(&self, key: &str) -> String {
            self.folder.place(key)
        }

        async fn get(&self, key: &str, known: Option<&ETag>) -> Result<Got, ObjectError> {
            self.gets.fetch_add(1, Ordering::SeqCst);
            if self.away.load(Ordering::SeqCst) {
                return Err(ObjectError::Unavailable("the store is away".into()));
            }
            self.folder.get(key, known).await
        }

        async fn open(&self, key: &str) -> Result<Option<Object>, ObjectError> {
            self.opens.fetch_add(1, Ordering::SeqCst);
            self.folder.open(key).await
        }

        async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError> {
            self.folder.create(key, body).await
        }

        async fn replace(
            &self,
            key: &str,
            body: Bytes,
            expected: Option<&ETag>,
        ) -> Result<ETag, ObjectError> {
            self.folder.replace(key, body, expected).await
        }

        async fn list(&self, folder: &str) -> Result<Vec<Listed>, ObjectError> {
            self.folder.list(folder).await
        }
    }

    struct Root {
        folder: tempfile::TempDir,
        store: Arc<Counted>,
        catalog: Arc<Catalog>,
    }

    const POLL: Duration = Duration::from_secs(60);

    impl Root {
        fn new(cache_bytes: usize) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Arc::new(Counted {
                folder: LocalObjects::new(folder.path()),
                gets: AtomicUsize::new(0),
                opens: AtomicUsize::new(0),
                away: false.into(),
            });
            let options = CatalogOptions { poll: POLL, cache_bytes, version_bytes: 4096 };
            let catalog =
                Catalog::new(Arc::clone(&store) as Arc<dyn ObjectStore>, "m@1", 2, options);
            Self { folder, store, catalog: Arc::new(catalog) }
        }

        fn put(&self, key: &str, body: &[u8]) {
            let path = self.folder.path().join(key);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, body).unwrap();
        }

        fn version(&self, set: &str, version: &str, model: &str) -> Vec<u8> {
            let contents =
                Contents::new(vec![format!("{set}-{version}")], array![[1.0, 0.0]], model);
            let bytes = file::write(&contents, (set, version)).unwrap();
            self.put(&version_key(set, version), &bytes);
            bytes
        }

        fn activate(&self, set: &str, version: &str) {
            self.put(&active_key(set), format!("{{\"version\":\"{version}\"}}").as_bytes());
        }

        async fn ask(&self, selector: &str) -> Result<String, ClassesError> {
            let selector = ClassSelector::parse(selector).unwrap();
            self.catalog.resolve(&selector).await.map(|c| c.id())
        }

        fn opens(&self) -> usize {
            self.store.opens.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn a_pinned_and_an_active_version_are_found() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.version("s", "2", "m@1");
        root.activate("s", "2");
        assert_eq!(root.ask("s@1").await.unwrap(), "s@1");
        assert_eq!(root.ask("s").await.unwrap(), "s@2");
        // What is active is not loaded a second time for being pinned, nor the other way round.
        assert_eq!(root.ask("s@2").await.unwrap(), "s@2");
        root.activate("s", "1");
        root.catalog.refresh("s").await.unwrap();
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        assert_eq!(root.opens(), 2);
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        assert!(matches!(root.ask("s").await, Err(ClassesError::UnknownSet { .. })));
        assert!(matches!(root.ask("s@9").await, Err(ClassesError::UnknownVersion { .. })));
        root.version("other", "1", "another@2");
        assert!(matches!(root.ask("other@1").await, Err(ClassesError::ModelMismatch { .. })));
        root.put(&version_key("huge", "1"), &[0; 5000]);
        let message = root.ask("huge@1").await.unwrap_err().to_string();
        assert!(message.contains("classes.version_bytes"), "{message}");
        assert!(root.catalog.status().is_empty());
    }

    #[tokio::test]
    async fn many_who_wait_share_one_load_and_one_failure() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.activate("s", "1");
        root.put(&version_key("torn", "1"), b"torn");
        root.put(&active_key("torn"), b"{\"version\":\"1\"}");
        for (selector, good) in [("s@1", true), ("s", true), ("torn@1", false), ("torn", false)] {
            let before = root.opens();
            let asking: Vec<_> = (0..20).map(|_| root.ask(selector)).collect();
            for answer in futures_util::future::join_all(asking).await {
                assert_eq!(answer.is_ok(), good, "{selector}: {answer:?}");
            }
            // An active version that is pinned too is in memory already.
            let loads = usize::from(selector != "s");
            assert_eq!(root.opens() - before, loads, "{selector}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_active_version_is_seen_by_polling() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.version("s", "2", "m@1");
        root.activate("s", "1");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        let catalog = Arc::clone(&root.catalog);
        let watching = tokio::spawn(async move { catalog.watch().await });
        tokio::time::sleep(POLL * 3).await;
        // Nothing changed: asked by ETag, nothing loaded, the same pointer.
        assert!(root.store.gets.load(Ordering::SeqCst) >= 3);
        assert_eq!((root.opens(), root.catalog.status()[0].swaps), (1, 0));
        root.activate("s", "2");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        tokio::time::sleep(POLL * 2).await;
        assert_eq!(root.ask("s").await.unwrap(), "s@2");
        assert_eq!(root.catalog.status()[0].swaps, 1);
        watching.abort();
    }

    /// A device's memory that sees what is served while a version is on its way.
    #[derive(Default)]
    struct Device {
        catalog: std::sync::OnceLock<Arc<Catalog>>,
        uploads: Mutex<Vec<(String, Option<String>)>>,
    }

    impl ClassMemory for Device {
        fn upload(&self, classes: &Arc<ClassVectors>) {
            let active = ClassSelector::parse("s").unwrap();
            let serving = self.catalog.get().unwrap().loaded(&active).map(|served| served.id());
            self.uploads.lock().unwrap().push((classes.id(), serving));
        }
    }

    #[tokio::test]
    async fn a_version_is_on_its_device_before_it_is_served_and_the_old_one_is_served_meanwhile() {
        let mut root = Root::new(1 << 20);
        for version in ["1", "2"] {
            root.version("s", version, "m@1");
        }
        root.activate("s", "1");
        let device = Arc::new(Device::default());
        let Ok(catalog) = Arc::try_unwrap(root.catalog) else { panic!("it is shared") };
        root.catalog = Arc::new(catalog.uploading_to(&[Arc::clone(&device) as _]));
        assert!(device.catalog.set(Arc::clone(&root.catalog)).is_ok());
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        root.activate("s", "2");
        assert_eq!(root.catalog.refresh("s").await.unwrap().version, "2");
        let uploads = device.uploads.lock().unwrap();
        let expected = [("s@1", None), ("s@2", Some("s@1"))];
        assert_eq!(
            *uploads,
            expected.map(|(id, served)| (id.to_owned(), served.map(str::to_owned)))
        );
    }

    #[tokio::test]
    async fn the_old_version_lives_as_long_as_its_last_job() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.version("s", "2", "m@1");
        root.activate("s", "1");
        let job = root.catalog.resolve(&ClassSelector::parse("s").unwrap()).await.unwrap();
        let old = Arc::downgrade(&job);
        root.activate("s", "2");
        assert_eq!(root.catalog.refresh("s").await.unwrap().version, "2");
        assert_eq!(job.id(), "s@1");
        drop(job);
        assert!(old.upgrade().is_none(), "somebody keeps the old version");
    }

    #[tokio::test]
    async fn a_set_that_nobody_asked_for_is_not_loaded_by_an_announcement() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.activate("s", "1");
        assert_eq!(root.catalog.refresh("s").await, None);
        assert_eq!(root.opens(), 0);
    }

    #[tokio::test]
    async fn a_version_that_fails_never_replaces_one_that_works() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.activate("s", "1");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        let good = root.version("s", "2", "m@1");
        root.version("s", "3", "another@2");
        root.put(&version_key("s", "4"), &good[..good.len() - 1]);
        let data = good.len() - 8;
        let with = |values: [f32; 2]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            [&good[..data], &bytes[..]].concat()
        };
        root.put(&version_key("s", "6"), &with([f32::NAN, 0.0]));
        root.put(&version_key("s", "7"), &with([0.0, 0.0]));
        let wide = Contents::new(vec!["a".into()], array![[1.0, 0.0, 0.0]], "m@1");
        root.put(&version_key("s", "8"), &file::write(&wide, ("s", "8")).unwrap());
        let text = String::from_utf8_lossy(&good[8..data]).replace("s-2", "a\\\",\\\"b");
        let mut labels = (text.len() as u64).to_le_bytes().to_vec();
        labels.extend_from_slice(text.as_bytes());
        labels.extend_from_slice(&good[data..]);
        root.put(&version_key("s", "9"), &labels);
        let wrong_sum = format!("{{\"version\":\"2\",\"sha256\":\"{}\"}}", "0".repeat(64));
        for (count, (active, version, words)) in [
            (wrong_sum.as_str(), Some("2"), "sha256"),
            ("{\"version\":\"3\"}", Some("3"), "another@2"),
            ("{\"version\":\"4\"}", Some("4"), "not a whole safetensors file"),
            ("{\"version\":\"5\"}", Some("5"), "does not exist"),
            ("{\"version\":\"6\"}", Some("6"), "row 0 (\"s-2\") holds NaN"),
            ("{\"version\":\"7\"}", Some("7"), "row 0 (\"s-2\") is zero"),
            ("{\"version\":\"8\"}", Some("8"), "3 values, the model's 2"),
            ("{\"version\":\"9\"}", Some("9"), "2 labels for 1 rows"),
            ("{\"version\":\"../s/1\"}", None, "active.json"),
            ("{", None, "active.json"),
        ]
        .into_iter()
        .enumerate()
        {
            root.put(&active_key("s"), active.as_bytes());
            // Looked at twice: refused and counted once.
            root.catalog.refresh("s").await.unwrap();
            let status = root.catalog.refresh("s").await.unwrap();
            assert_eq!(root.ask("s").await.unwrap(), "s@1", "{active}");
            let refused = status.refused.unwrap();
            assert_eq!(refused.version.as_deref(), version, "{active}");
            assert!(refused.reason.contains(words), "{active}: {}", refused.reason);
            assert_eq!(status.refusals, count as u64 + 1, "{active}");
        }
        std::fs::remove_file(root.folder.path().join(active_key("s"))).unwrap();
        assert!(root.catalog.refresh("s").await.unwrap().refused.is_some());
        let sum = hex(&Sha256::digest(&good));
        let right = format!("{{\"version\":\"2\",\"sha256\":\"{sum}\"}}");
        root.put(&active_key("s"), right.as_bytes());
        let status = root.catalog.refresh("s").await.unwrap();
        assert_eq!((status.version.as_str(), status.refused), ("2", None));
    }

    #[tokio::test]
    async fn a_store_that_is_away_is_no_reason_to_forget_or_to_count() {
        let root = Root::new(1 << 20);
        root.version("s", "1", "m@1");
        root.activate("s", "1");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        root.store.away.store(true, Ordering::SeqCst);
        let status = root.catalog.refresh("s").await.unwrap();
        assert!(status.refused.unwrap().reason.contains("away"));
        assert_eq!((status.version.as_str(), status.refusals), ("1", 0));
        root.store.away.store(false, Ordering::SeqCst);
        assert_eq!(root.catalog.refresh("s").await.unwrap().refused, None);
        // A version that was refused stays refused while the store is away and when it is back.
        root.activate("s", "9");
        root.catalog.refresh("s").await.unwrap();
        root.store.away.store(true, Ordering::SeqCst);
        root.catalog.refresh("s").await.unwrap();
        root.store.away.store(false, Ordering::SeqCst);
        let refused = root.catalog.refresh("s").await.unwrap().refused.unwrap();
        assert_eq!(refused.version.as_deref(), Some("9"));
    }

    #[tokio::test]
    async fn pinned_versions_stay_within_the_bound_and_the_least_used_goes_first() {
        let root = Root::new(100);
        for version in 1..=8 {
            root.version("s", &version.to_string(), "m@1");
        }
        root.ask("s@1").await.unwrap();
        let bytes = root.catalog.loaded(&ClassSelector::parse("s@1").unwrap()).unwrap().bytes();
        assert!(3 * bytes <= 100 && 100 < 5 * bytes, "the test counts on it: {bytes}");
        for version in [2, 3, 1, 4, 1, 5] {
            root.ask(&format!("s@{version}")).await.unwrap();
        }
        let Origin::Root(inner) = &root.catalog.origin else { panic!("a root") };
        let kept: Vec<String> = inner.state().pinned.iter().map(|p| p.version.clone()).collect();
        assert!(kept.len() * bytes <= 100, "{kept:?}");
        assert_eq!(kept[kept.len() - 2..], ["1", "5"]);
    }

    #[tokio::test(start_paused = true)]
    async fn sets_that_nobody_asks_for_are_dropped_and_the_least_used_goes_first() {
        let root = Root::new(100);
        for set in 0..6 {
            root.version(&format!("s{set}"), "1", "m@1");
            root.activate(&format!("s{set}"), "1");
        }
        let of = |set: &str| ClassSelector::parse(set).unwrap();
        let used = root.catalog.preload(&of("s0")).await.unwrap();
        let bytes = used.bytes();
        assert!(3 * bytes <= 100 && 100 < 5 * bytes, "the test counts on it: {bytes}");
        drop(used);
        let used = root.catalog.resolve(&of("s1")).await.unwrap();
        for set in 2..6 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            root.ask(&format!("s{set}")).await.unwrap();
        }
        let names = || -> Vec<String> {
            root.catalog.status().into_iter().map(|status| status.set).collect()
        };
        let Origin::Root(inner) = &root.catalog.origin else { panic!("a root") };
        inner.state().trim(100);
        assert_eq!(names().len(), 6, "all were asked for lately");
        tokio::time::sleep(IDLE).await;
        root.ask("s2").await.unwrap();
        inner.state().trim(2 * bytes);
        // s0 is preloaded, a job uses s1, and s2 was asked for again.
        assert_eq!(names(), ["s0", "s1", "s2", "s4", "s5"]);
        inner.state().trim(0);
        assert_eq!(names(), ["s0", "s1", "s2"]);
        drop(used);
        inner.state().trim(0);
        assert_eq!(names(), ["s0", "s2"]);
        // And it is loaded again when it is asked for.
        assert_eq!(root.ask("s1").await.unwrap(), "s1@1");
    }

    #[tokio::test]
    async fn names_that_do_not_exist_do_not_fill_the_memory() {
        let root = Root::new(1 << 20);
        for n in 0..REMEMBERED + 50 {
            assert!(root.ask(&format!("s{n}")).await.is_err());
            assert!(root.ask(&format!("s@{n}")).await.is_err());
        }
        let Origin::Root(inner) = &root.catalog.origin else { panic!("a root") };
        let state = inner.state();
        assert!(state.sets.len() <= REMEMBERED && state.pinned.len() <= REMEMBERED);
    }
}
