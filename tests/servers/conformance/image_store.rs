//! What every [`ImageStore`] does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::JoinSet;

use angler_core::store::shared::SharedImages;
use angler_core::store::{ByteBudget, ImageStore, Routed};
use angler_storage::local::LocalImages;
use angler_storage::s3::{S3Images, S3Options};
use angler_wire::error::{ImageErrorCode, StoreFault};

use super::soon;
use crate::support::{Bucket, s3_client, unique, var};

/// A store, and the way into it.
pub trait World {
    fn store(&self) -> Arc<dyn ImageStore>;
    /// Puts an object there; yields its URI.
    async fn put(&self, name: &str, body: &[u8]) -> String;
    /// URIs of nothing.
    fn missing(&self) -> Vec<String>;
    /// URIs of another kind than the store's.
    fn bad(&self) -> Vec<String>;
}

struct Local {
    folder: tempfile::TempDir,
}

impl Local {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

impl World for Local {
    fn store(&self) -> Arc<dyn ImageStore> {
        Arc::new(LocalImages)
    }

    async fn put(&self, name: &str, body: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, body).unwrap();
        path
    }

    fn missing(&self) -> Vec<String> {
        std::fs::write(self.path("file"), b"").unwrap();
        vec![
            self.path("none.jpg"),
            self.path("no-folder/a.jpg"),
            self.path("file/a.jpg"),
            String::new(),
        ]
    }

    fn bad(&self) -> Vec<String> {
        vec![self.path(""), "a\0b.jpg".into(), self.path(&"n".repeat(300))]
    }
}

struct S3 {
    bucket: Bucket,
}

impl S3 {
    async fn new() -> Self {
        Self { bucket: Bucket::new().await }
    }

    fn with(&self, options: &S3Options) -> S3Images {
        S3Images::new(self.bucket.client.clone(), options)
    }
}

impl World for S3 {
    fn store(&self) -> Arc<dyn ImageStore> {
        Arc::new(self.with(&S3Options { concurrency: 4, ..S3Options::default() }))
    }

    async fn put(&self, name: &str, body: &[u8]) -> String {
        self.bucket.put(name, body).await
    }

    fn missing(&self) -> Vec<String> {
        vec![
            format!("s3://{}/none.jpg", self.bucket.name),
            format!("s3://{}/no/folder/a.jpg", self.bucket.name),
            format!("s3://{}/a.jpg", unique("nobucket")),
        ]
    }

    fn bad(&self) -> Vec<String> {
        vec![
            "s3://bucket-without-key".into(),
            "s3://bucket-without-key/".into(),
            "s3:///key".into(),
            "s3://no bucket/key".into(),
            "http://example.com/a.jpg".into(),
            "/etc/hostname".into(),
            String::new(),
            format!("s3://{}/{}", self.bucket.name, "k".repeat(1025)),
        ]
    }
}

/// Half of it lies here, half of it there.
struct Both {
    local: Local,
    s3: S3,
    puts: AtomicUsize,
}

impl Both {
    async fn new() -> Self {
        Self { local: Local::new().await, s3: S3::new().await, puts: AtomicUsize::new(0) }
    }
}

impl World for Both {
    fn store(&self) -> Arc<dyn ImageStore> {
        Arc::new(Routed { s3: Some(self.s3.store()), local: self.local.store() })
    }

    async fn put(&self, name: &str, body: &[u8]) -> String {
        match self.puts.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => self.local.put(name, body).await,
            _ => self.s3.put(name, body).await,
        }
    }

    fn missing(&self) -> Vec<String> {
        [self.local.missing(), self.s3.missing()].concat()
    }

    fn bad(&self) -> Vec<String> {
        let mut bad = self.local.bad();
        bad.extend(self.s3.bad().into_iter().filter(|uri| uri.starts_with("s3://")));
        bad
    }
}

/// Both, behind what shares their requests.
struct Shared {
    both: Both,
}

impl Shared {
    async fn new() -> Self {
        Self { both: Both::new().await }
    }
}

impl World for Shared {
    fn store(&self) -> Arc<dyn ImageStore> {
        Arc::new(SharedImages::new(self.both.store()))
    }

    async fn put(&self, name: &str, body: &[u8]) -> String {
        self.both.put(name, body).await
    }

    fn missing(&self) -> Vec<String> {
        self.both.missing()
    }

    fn bad(&self) -> Vec<String> {
        self.both.bad()
    }
}

macro_rules! image_store {
    ($adapter:ident, $world:expr) => {
        suite!(
            $adapter,
            $world,
            [
                objects_come_back_byte_for_byte,
                what_is_not_there_is_not_found,
                what_is_no_uri_of_this_store_is_told_so,
                an_object_over_the_limit_is_refused_unread,
                names_are_taken_as_they_are,
                many_share_a_small_budget,
            ]
        );
    };
}

image_store!(local, super::Local::new());
image_store!(s3, super::S3::new());
image_store!(routed, super::Both::new());
image_store!(shared, super::Shared::new());

/// Bytes in which a loss, a repetition or a swap shows.
fn bytes(count: usize) -> Vec<u8> {
    (0..count as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// A budget that one image of the largest size fills.
fn budget(image_bytes: u32) -> ByteBudget {
    ByteBudget::new(0, image_bytes)
}

/// Fails if anybody still holds a part of the budget.
pub async fn nobody_holds(budget: &ByteBudget) {
    let all = budget.reserve(budget.image_bytes().into());
    drop(soon("the budget is whole again", all).await.unwrap());
}

async fn objects_come_back_byte_for_byte(world: &impl World) {
    let (store, budget) = (world.store(), budget(4_000_000));
    for size in [0, 1, 100_000, 3_000_000, 4_000_000] {
        let body = bytes(size);
        // Twice, for a world of two halves.
        for half in ["a", "b"] {
            let uri = world.put(&format!("{half}-{size}.bin"), &body).await;
            let fetched = soon(&uri, store.fetch(&uri, &budget)).await.unwrap();
            assert!(fetched.bytes == body, "{uri}: {} bytes, wanted {size}", fetched.bytes.len());
            assert_eq!(fetched.permit.num_permits(), size, "{uri}");
            if size > 0 {
                let all = budget.reserve(4_000_000);
                tokio::pin!(all);
                assert!(futures_util::poll!(all).is_pending(), "{uri} holds nothing");
            }
            drop(fetched);
            nobody_holds(&budget).await;
        }
    }
}

async fn what_is_not_there_is_not_found(world: &impl World) {
    let (store, budget) = (world.store(), budget(1000));
    for uri in world.missing() {
        let error = soon(&uri, store.fetch(&uri, &budget)).await.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::NotFound, "{uri:?}: {error}");
        assert!(!error.is_transient());
        nobody_holds(&budget).await;
    }
}

async fn what_is_no_uri_of_this_store_is_told_so(world: &impl World) {
    let (store, budget) = (world.store(), budget(1000));
    for uri in world.bad() {
        let error = soon(&uri, store.fetch(&uri, &budget)).await.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::BadUri, "{uri:?}: {error}");
        nobody_holds(&budget).await;
    }
}

async fn an_object_over_the_limit_is_refused_unread(world: &impl World) {
    let (store, budget) = (world.store(), budget(1_000_000));
    // Somebody holds nearly all: who asks for more than the limit does not even wait.
    let held = budget.reserve(999_999).await.unwrap();
    for (name, size) in [("a", 1_000_001), ("b", 1_000_001), ("c", 3_000_000), ("d", 3_000_000)] {
        let uri = world.put(name, &bytes(size)).await;
        let error = soon(&uri, store.fetch(&uri, &budget)).await.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::TooLarge, "{uri}: {error}");
        let message = &error.message;
        assert!(message.contains(&size.to_string()) && message.contains("1000000"), "{message}");
    }
    drop(held);
    nobody_holds(&budget).await;
    // The limit itself is allowed.
    for name in ["e", "f"] {
        let uri = world.put(name, &bytes(1_000_000)).await;
        assert_eq!(soon(&uri, store.fetch(&uri, &budget)).await.unwrap().bytes.len(), 1_000_000);
    }
}

async fn names_are_taken_as_they_are(world: &impl World) {
    let (store, budget) = (world.store(), budget(1000));
    let names = [
        "a b.jpg",
        "a%20b.jpg",
        "a+b.jpg",
        "a%2Fb.jpg",
        "100%.jpg",
        "%zz.jpg",
        "ñ.jpg",
        "größe 日本語 🦀.jpg",
        "u\u{308}.jpg", // not the same as ü
        "ü.jpg",
        "what?v=1&w=2#top.jpg",
        "it's (1) [2] {3} ~!$*,;=@:.jpg",
        "\"quoted\" & <tagged>.jpg",
        ".hidden",
        "no-ending",
        " leading and trailing ",
    ];
    let mut uris = Vec::new();
    // Twice, for a world of two halves: an odd number in between.
    for round in ["1", "2"] {
        for name in names {
            let uri = world.put(name, format!("{round}{name}").as_bytes()).await;
            uris.push((uri, format!("{round}{name}")));
        }
        world.put("odd", b"").await;
    }
    // Read after all are written: two names for one object would show. The later round wins where
    // both went to one place.
    let last: std::collections::BTreeMap<_, _> = uris.into_iter().collect();
    for (uri, body) in last {
        let fetched = soon(&uri, store.fetch(&uri, &budget)).await;
        let fetched = fetched.unwrap_or_else(|e| panic!("{uri:?}: {}: {e}", e.code));
        assert_eq!(String::from_utf8_lossy(&fetched.bytes), body, "{uri:?}");
    }
}

async fn many_share_a_small_budget(world: &impl World) {
    const SIZE: usize = 100_000;
    let store = world.store();
    let budget = ByteBudget::new(250_000, 120_000);
    let mut uris = Vec::new();
    for number in 0..40 {
        let size = if number % 10 == 9 { 120_001 } else { SIZE + number };
        uris.push((world.put(&format!("{number}.bin"), &bytes(size)).await, size));
    }
    uris.extend(world.missing().into_iter().map(|uri| (uri, 0)));
    let (held, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut fetches = JoinSet::new();
    for (uri, size) in uris {
        let (store, budget) = (Arc::clone(&store), budget.clone());
        let (held, peak) = (Arc::clone(&held), Arc::clone(&peak));
        fetches.spawn(async move {
            match store.fetch(&uri, &budget).await {
                Ok(fetched) => {
                    assert!(fetched.bytes == bytes(size), "{uri} came back as something else");
                    let now = held.fetch_add(size, Ordering::SeqCst) + size;
                    peak.fetch_max(now, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    held.fetch_sub(size, Ordering::SeqCst);
                    true
                }
                Err(error) => {
                    let expected =
                        if size == 0 { ImageErrorCode::NotFound } else { ImageErrorCode::TooLarge };
                    assert_eq!(error.code, expected, "{uri}: {error}");
                    false
                }
            }
        });
    }
    let fetched = soon("all are fetched", fetches.join_all()).await;
    assert_eq!(fetched.into_iter().filter(|fetched| *fetched).count(), 36);
    let peak = peak.load(Ordering::SeqCst);
    assert!((SIZE..=250_000).contains(&peak), "{peak} bytes at once");
    let mut all = Vec::new();
    for part in [120_000, 120_000, 10_000] {
        all.push(soon("the budget is whole again", budget.reserve(part)).await.unwrap());
    }
}

#[tokio::test]
async fn a_fetch_that_is_given_up_gives_its_share_back() {
    let world = Shared::new().await;
    for store in [world.both.store(), world.store()] {
        give_up_fetches(&world, store.as_ref()).await;
    }
}

async fn give_up_fetches(world: &impl World, store: &dyn ImageStore) {
    let budget = budget(3_000_000);
    for name in ["a", "b"] {
        let uri = world.put(name, &bytes(3_000_000)).await;
        for polls in 0..40 {
            let fetch = store.fetch(&uri, &budget);
            tokio::pin!(fetch);
            for _ in 0..polls {
                if futures_util::poll!(fetch.as_mut()).is_ready() {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_micros(300)).await;
            }
        }
        nobody_holds(&budget).await;
        assert!(soon(&uri, store.fetch(&uri, &budget)).await.is_ok(), "{uri}");
    }
}

#[tokio::test]
async fn a_file_that_no_disk_could_hold_is_refused_at_once() {
    let world = Local::new().await;
    let path = world.path("sparse");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let error = soon("refused", LocalImages.fetch(&path, &budget(1000))).await.unwrap_err();
    assert_eq!(error.code, ImageErrorCode::TooLarge);
}

#[tokio::test]
async fn without_s3_a_routed_store_still_serves_paths() {
    let world = Local::new().await;
    let uri = world.put("a", b"a").await;
    let store = Routed { s3: None, local: Arc::new(LocalImages) };
    assert_eq!(store.fetch(&uri, &budget(10)).await.unwrap().bytes, "a");
}

#[tokio::test]
async fn buckets_that_are_not_allowed_are_not_even_asked() {
    let world = S3::new().await;
    let uri = world.put("a", b"a").await;
    let budget = budget(10);
    let allowed = |buckets: &[&str]| {
        let allowed_buckets = buckets.iter().map(|b| (*b).to_owned()).collect();
        world.with(&S3Options { allowed_buckets, concurrency: 1, ..S3Options::default() })
    };
    let own = world.bucket.name.as_str();
    assert!(allowed(&["other", own]).fetch(&uri, &budget).await.is_ok());
    for buckets in [&["other"][..], &[&own[1..]], &["*"]] {
        let error = allowed(buckets).fetch(&uri, &budget).await.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::BucketNotAllowed, "{buckets:?}");
        // A bucket that does not exist is no different: nothing is learnt about it.
        let error = allowed(buckets).fetch("s3://none/a", &budget).await.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::BucketNotAllowed, "{buckets:?}");
    }
}

#[tokio::test]
async fn credentials_that_may_not_read_a_bucket_are_denied() {
    let world = S3::new().await;
    let uri = world.put("a", b"a").await;
    let public = Bucket::named("public").await;
    let name = unique("conformance");
    let open = public.put(&name, "b").await;
    let client = s3_client(&var("ANGLER_TEST_S3_RO_KEY"), &var("ANGLER_TEST_S3_RO_SECRET"));
    let store = S3Images::new(client, &S3Options { concurrency: 1, ..S3Options::default() });
    let budget = budget(10);
    let error = store.fetch(&uri, &budget).await.unwrap_err();
    assert_eq!(error.code, ImageErrorCode::AccessDenied, "{error}");
    assert_eq!(store.fetch(&open, &budget).await.unwrap().bytes, "b");
    assert_eq!(store.probe(&uri, &budget).await.unwrap_err().code, ImageErrorCode::AccessDenied);
    let missing = format!("s3://public/{name}-missing");
    assert_eq!(store.probe(&missing, &budget).await.unwrap_err().code, ImageErrorCode::NotFound);
    let empty = public.put(&unique("conformance"), "").await;
    for uri in [&open, &empty] {
        store.probe(uri, &budget).await.unwrap();
    }
}

#[tokio::test]
async fn credentials_that_the_store_does_not_know_are_not_the_images_fault() {
    let world = S3::new().await;
    let uri = world.put("a", b"a").await;
    for (client, code) in [
        (s3_client("nobody", "nothing"), "403 InvalidAccessKeyId"),
        (s3_client(&var("ANGLER_TEST_S3_KEY"), "wrong"), "403 SignatureDoesNotMatch"),
    ] {
        let store = S3Images::new(client, &S3Options { concurrency: 1, ..S3Options::default() });
        let budget = budget(10);
        for error in [
            store.fetch(&uri, &budget).await.unwrap_err(),
            store.probe(&uri, &budget).await.unwrap_err(),
        ] {
            let told = (error.code, error.fault);
            assert_eq!(told, (ImageErrorCode::StorageUnavailable, StoreFault::Credentials));
            assert!(error.is_transient() && error.message.contains(code), "{error}");
        }
    }
}
