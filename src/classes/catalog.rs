//! Finds and keeps class vectors: which version is active, and what is loaded.
//!
//! A set's `active.json` is read when the set is first asked for and again after `poll`; a version
//! is loaded and checked before it replaces another, so one that fails validation never replaces
//! one that works. Versions are immutable, so what was loaded is never read twice; what no set has
//! active is kept in a cache bounded in bytes, least recently used out first.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{ClassVectors, ClassesError, file};
use crate::job::{ClassSelector, check_name, hex};
use crate::store::{Got, ObjectError, ObjectStore};

/// The key of a version's file, relative to the root.
pub fn version_key(set: &str, version: &str) -> String {
    format!("{set}/{version}.safetensors")
}

/// The key of the file that names a set's active version, relative to the root.
pub fn active_key(set: &str) -> String {
    format!("{set}/active.json")
}

/// What `active.json` says; fields that are not needed to load the version are not read.
#[derive(Debug, Deserialize)]
struct ActiveFile {
    version: String,
    sha256: Option<String>,
}

/// Resolves `set` and `set@version` to vectors in memory.
pub struct Catalog {
    origin: Origin,
    model: String,
    dim: usize,
    state: Mutex<State>,
}

enum Origin {
    /// One version for everything: what `classify` runs with.
    Fixed(Arc<ClassVectors>),
    /// Files under a root.
    Root { store: Arc<dyn ObjectStore>, poll: Duration, cache_bytes: usize },
}

#[derive(Default)]
struct State {
    active: HashMap<String, Active>,
    /// Pinned versions, the least recently used first.
    pinned: Vec<Arc<ClassVectors>>,
}

struct Active {
    classes: Arc<ClassVectors>,
    checked: Instant,
    /// The last failure to follow `active.json`, so that it is logged once and not at every poll.
    failing: Option<String>,
}

impl Catalog {
    /// A catalog that answers every question with the same vectors.
    ///
    /// # Errors
    /// [`ClassesError`] if they were made with another model.
    pub fn fixed(classes: ClassVectors, model: &str, dim: usize) -> Result<Self, ClassesError> {
        check_model(&classes, model, dim, &classes.id())?;
        let origin = Origin::Fixed(Arc::new(classes));
        Ok(Self { origin, model: model.to_owned(), dim, state: Mutex::default() })
    }

    /// A catalog over the files under a root, for the model of this fingerprint and dimension.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        model: &str,
        dim: usize,
        poll: Duration,
        cache_bytes: usize,
    ) -> Self {
        let origin = Origin::Root { store, poll, cache_bytes };
        Self { origin, model: model.to_owned(), dim, state: Mutex::default() }
    }

    /// The vectors that a job is scored against.
    ///
    /// # Errors
    /// [`ClassesError`]; [`ClassesError::Unavailable`] is the only one that may pass by itself.
    pub async fn resolve(
        &self,
        selector: &ClassSelector,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        let (store, poll, cache_bytes) = match &self.origin {
            Origin::Fixed(classes) => return Ok(Arc::clone(classes)),
            Origin::Root { store, poll, cache_bytes } => (store, *poll, *cache_bytes),
        };
        // One lock for look-up and load: whoever asks for what is being loaded waits for that load.
        let mut state = self.state.lock().await;
        match &selector.version {
            Some(version) => {
                self.pinned(store.as_ref(), cache_bytes, &mut state, &selector.set, version).await
            }
            None => self.active(store.as_ref(), poll, &mut state, &selector.set).await,
        }
    }

    async fn pinned(
        &self,
        store: &dyn ObjectStore,
        cache_bytes: usize,
        state: &mut State,
        set: &str,
        version: &str,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        if let Some(active) = state.active.get(set).filter(|a| a.classes.version() == version) {
            return Ok(Arc::clone(&active.classes));
        }
        let known = |c: &Arc<ClassVectors>| c.set() == set && c.version() == version;
        let classes = match state.pinned.iter().position(known) {
            Some(at) => state.pinned.remove(at),
            None => Arc::new(self.load(store, set, version, None).await?),
        };
        state.pinned.push(Arc::clone(&classes));
        // The newest stays even if it alone is over the bound: its job needs it anyway.
        while state.pinned.len() > 1
            && state.pinned.iter().map(|c| c.bytes()).sum::<usize>() > cache_bytes
        {
            state.pinned.remove(0);
        }
        Ok(classes)
    }

    async fn active(
        &self,
        store: &dyn ObjectStore,
        poll: Duration,
        state: &mut State,
        set: &str,
    ) -> Result<Arc<ClassVectors>, ClassesError> {
        let known = state.active.get(set);
        if let Some(active) = known.filter(|a| a.checked.elapsed() < poll) {
            return Ok(Arc::clone(&active.classes));
        }
        let current = known.map(|a| Arc::clone(&a.classes));
        let found = self.follow(store, set, current.as_deref()).await;
        let checked = Instant::now();
        match (found, state.active.get_mut(set)) {
            // A version that fails never replaces one that works.
            (Err(error), Some(active)) => {
                let message = error.to_string();
                if active.failing.as_ref() != Some(&message) {
                    tracing::error!(
                        set,
                        serving = active.classes.version(),
                        "the active version cannot be followed, the old one goes on serving: {message}"
                    );
                }
                active.failing = Some(message);
                active.checked = checked;
                Ok(Arc::clone(&active.classes))
            }
            (Err(error), None) => Err(error),
            (Ok(None), Some(active)) => {
                active.failing = None;
                active.checked = checked;
                Ok(Arc::clone(&active.classes))
            }
            (Ok(None), None) => Err(ClassesError::UnknownSet {
                set: set.to_owned(),
                reason: "it was neither loaded nor found".to_owned(),
            }),
            (Ok(Some(classes)), _) => {
                let classes = Arc::new(classes);
                tracing::info!(
                    set,
                    version = classes.version(),
                    rows = classes.vectors().rows(),
                    "class vectors are served"
                );
                let active = Active { classes: Arc::clone(&classes), checked, failing: None };
                state.active.insert(set.to_owned(), active);
                Ok(classes)
            }
        }
    }

    /// Reads `active.json` and loads what it names; none if that is `current`.
    async fn follow(
        &self,
        store: &dyn ObjectStore,
        set: &str,
        current: Option<&ClassVectors>,
    ) -> Result<Option<ClassVectors>, ClassesError> {
        let key = active_key(set);
        let Got::Object { bytes, .. } = store.get(&key, None).await.map_err(unavailable)? else {
            return Err(ClassesError::UnknownSet {
                set: set.to_owned(),
                reason: format!(
                    "{} does not exist, so no version is active (a job can pin one: {set}@VERSION)",
                    store.place(&key)
                ),
            });
        };
        let invalid = |reason: String| ClassesError::Invalid { place: store.place(&key), reason };
        let active: ActiveFile =
            serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
        check_name(&active.version).map_err(|e| invalid(format!("version: {e}")))?;
        if current.is_some_and(|c| c.version() == active.version) {
            return Ok(None);
        }
        self.load(store, set, &active.version, active.sha256.as_deref()).await.map(Some)
    }

    async fn load(
        &self,
        store: &dyn ObjectStore,
        set: &str,
        version: &str,
        sha256: Option<&str>,
    ) -> Result<ClassVectors, ClassesError> {
        let key = version_key(set, version);
        let place = store.place(&key);
        let bytes = read(store, &key).await?.ok_or_else(|| ClassesError::UnknownVersion {
            set: set.to_owned(),
            version: version.to_owned(),
            reason: format!("{place} does not exist"),
        })?;
        let (name, sha256) = ((set.to_owned(), version.to_owned()), sha256.map(str::to_owned));
        let (model, dim) = (self.model.clone(), self.dim);
        // Hashing and normalising a large set takes seconds: not on the threads that move jobs.
        let unavailable = |e: tokio::task::JoinError| ClassesError::Unavailable(e.to_string());
        tokio::task::spawn_blocking(move || {
            if let Some(wanted) = sha256 {
                let found = hex(&Sha256::digest(&bytes));
                if !found.eq_ignore_ascii_case(&wanted) {
                    let reason = format!("its sha256 is {found}, but active.json says {wanted}");
                    return Err(ClassesError::Invalid { place, reason });
                }
            }
            let classes = file::read(&bytes, (&name.0, &name.1), &place)?;
            check_model(&classes, &model, dim, &place)?;
            Ok(classes)
        })
        .await
        .map_err(unavailable)?
    }
}

/// All of an object of any size.
async fn read(store: &dyn ObjectStore, key: &str) -> Result<Option<Bytes>, ClassesError> {
    let Some(mut object) = store.open(key).await.map_err(unavailable)? else { return Ok(None) };
    let mut bytes = BytesMut::new();
    while let Some(chunk) = object.chunks.next().await {
        bytes.extend_from_slice(&chunk.map_err(unavailable)?);
    }
    Ok(Some(bytes.freeze()))
}

fn unavailable(error: ObjectError) -> ClassesError {
    ClassesError::Unavailable(error.to_string())
}

fn check_model(
    classes: &ClassVectors,
    model: &str,
    dim: usize,
    place: &str,
) -> Result<(), ClassesError> {
    if classes.model() != model {
        return Err(ClassesError::ModelMismatch {
            place: place.to_owned(),
            made_with: classes.model().to_owned(),
            running: model.to_owned(),
        });
    }
    if classes.dim() != dim {
        return Err(ClassesError::Invalid {
            place: place.to_owned(),
            reason: format!("its vectors have {} values, the model's {dim}", classes.dim()),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classes::Contents;
    use crate::store::local::LocalObjects;
    use ndarray::array;

    struct Root {
        folder: tempfile::TempDir,
        catalog: Catalog,
    }

    impl Root {
        fn new(poll: Duration, cache_bytes: usize) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Arc::new(LocalObjects::new(folder.path()));
            Self { catalog: Catalog::new(store, "m@1", 2, poll, cache_bytes), folder }
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
    }

    const NOW: Duration = Duration::ZERO;
    const LATER: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_pinned_and_an_active_version_are_found() {
        let root = Root::new(NOW, 1 << 20);
        root.version("s", "1", "m@1");
        root.version("s", "2", "m@1");
        root.activate("s", "2");
        assert_eq!(root.ask("s@1").await.unwrap(), "s@1");
        assert_eq!(root.ask("s").await.unwrap(), "s@2");
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let root = Root::new(NOW, 1 << 20);
        root.version("s", "1", "m@1");
        assert!(matches!(root.ask("s").await, Err(ClassesError::UnknownSet { .. })));
        assert!(matches!(root.ask("s@9").await, Err(ClassesError::UnknownVersion { .. })));
        root.version("other", "1", "another@2");
        assert!(matches!(root.ask("other@1").await, Err(ClassesError::ModelMismatch { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_active_version_is_seen_after_the_poll_time() {
        let root = Root::new(LATER, 1 << 20);
        root.version("s", "1", "m@1");
        root.version("s", "2", "m@1");
        root.activate("s", "1");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        root.activate("s", "2");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        tokio::time::advance(LATER).await;
        assert_eq!(root.ask("s").await.unwrap(), "s@2");
    }

    #[tokio::test]
    async fn a_version_that_fails_never_replaces_one_that_works() {
        let root = Root::new(NOW, 1 << 20);
        root.version("s", "1", "m@1");
        root.activate("s", "1");
        assert_eq!(root.ask("s").await.unwrap(), "s@1");
        let good = root.version("s", "2", "m@1");
        root.version("s", "3", "another@2");
        root.put(&version_key("s", "4"), &good[..good.len() - 1]);
        let wrong_sum = format!("{{\"version\":\"2\",\"sha256\":\"{}\"}}", "0".repeat(64));
        for active in [
            wrong_sum.as_str(),
            "{\"version\":\"3\"}",
            "{\"version\":\"4\"}",
            "{\"version\":\"5\"}",
            "{\"version\":\"../s/1\"}",
            "{",
        ] {
            root.put(&active_key("s"), active.as_bytes());
            assert_eq!(root.ask("s").await.unwrap(), "s@1", "{active}");
        }
        let sum = hex(&Sha256::digest(&good));
        let right = format!("{{\"version\":\"2\",\"sha256\":\"{sum}\"}}");
        root.put(&active_key("s"), right.as_bytes());
        assert_eq!(root.ask("s").await.unwrap(), "s@2");
    }

    #[tokio::test]
    async fn pinned_versions_stay_within_the_bound_and_the_least_used_goes_first() {
        let root = Root::new(NOW, 100);
        for version in ["1", "2", "3"] {
            root.version("s", version, "m@1");
        }
        let bytes =
            root.catalog.resolve(&ClassSelector::parse("s@1").unwrap()).await.unwrap().bytes();
        assert!(3 * bytes <= 100 && 100 < 6 * bytes, "the test counts on it: {bytes}");
        for version in 1..=3 {
            root.ask(&format!("s@{version}")).await.unwrap();
        }
        let kept = root.catalog.state.lock().await.pinned.len();
        assert_eq!(kept, 3);
        for version in 4..=8 {
            root.version("s", &version.to_string(), "m@1");
            root.ask(&format!("s@{version}")).await.unwrap();
        }
        let state = root.catalog.state.lock().await;
        let versions: Vec<&str> = state.pinned.iter().map(|c| c.version()).collect();
        assert_eq!(versions.last(), Some(&"8"));
        assert!(!versions.contains(&"1"), "{versions:?}");
    }
}
