use super::*;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use ndarray::array;
use sha2::{Digest, Sha256};

use angler_vectors::{Contents, file};
use angler_wire::job::hex;

use crate::store::{Listed, Object, ObjectError};

/// A folder whose reads are counted. A catalog only reads.
struct Counted {
    folder: PathBuf,
    gets: AtomicUsize,
    opens: AtomicUsize,
    away: std::sync::atomic::AtomicBool,
}

impl Counted {
    fn read(&self, key: &str) -> Option<Bytes> {
        std::fs::read(self.folder.join(key)).ok().map(Bytes::from)
    }
}

#[async_trait]
impl ObjectStore for Counted {
    fn place(&self, key: &str) -> String {
        self.folder.join(key).display().to_string()
    }

    async fn get(&self, key: &str, known: Option<&ETag>) -> Result<Got, ObjectError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        if self.away.load(Ordering::SeqCst) {
            return Err(ObjectError::Unavailable("the store is away".into()));
        }
        let Some(bytes) = self.read(key) else { return Ok(Got::Missing) };
        let etag = ETag::new(hex(&Sha256::digest(&bytes)));
        Ok(if known == Some(&etag) { Got::Unchanged } else { Got::Object { bytes, etag } })
    }

    async fn open(&self, key: &str) -> Result<Option<Object>, ObjectError> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        let object = self.read(key).map(|bytes| Object {
            bytes: bytes.len() as u64,
            chunks: stream::once(async { Ok(bytes) }).boxed(),
        });
        Ok(object)
    }

    async fn create(&self, _: &str, _: Bytes) -> Result<(), ObjectError> {
        unreachable!("a catalog only reads")
    }

    async fn replace(&self, _: &str, _: Bytes, _: Option<&ETag>) -> Result<ETag, ObjectError> {
        unreachable!("a catalog only reads")
    }

    async fn list(&self, _: &str) -> Result<Vec<Listed>, ObjectError> {
        unreachable!("a catalog only reads")
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
            folder: folder.path().to_owned(),
            gets: AtomicUsize::new(0),
            opens: AtomicUsize::new(0),
            away: false.into(),
        });
        let options = CatalogOptions { poll: POLL, cache_bytes, version_bytes: 4096 };
        let catalog = Catalog::new(Arc::clone(&store) as Arc<dyn ObjectStore>, "m@1", 2, options);
        Self { folder, store, catalog: Arc::new(catalog) }
    }

    fn put(&self, key: &str, body: &[u8]) {
        let path = self.folder.path().join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, body).unwrap();
    }

    fn version(&self, set: &str, version: &str, model: &str) -> Vec<u8> {
        let contents = Contents::new(vec![format!("{set}-{version}")], array![[1.0, 0.0]], model);
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
    assert_eq!(*uploads, expected.map(|(id, served)| (id.to_owned(), served.map(str::to_owned))));
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
    let names =
        || -> Vec<String> { root.catalog.status().into_iter().map(|status| status.set).collect() };
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
