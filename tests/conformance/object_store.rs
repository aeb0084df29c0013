//! What every [`ObjectStore`] does.

use std::sync::Arc;

use angler::store::local::LocalObjects;
use angler::store::s3::{S3Objects, S3Uri};
use angler::store::{ObjectError, ObjectStore};
use bytes::Bytes;
use tokio::task::JoinSet;

use super::soon;
use super::support::{Bucket, s3_client};

/// A store, and a look past it.
pub trait World {
    fn store(&self) -> Arc<dyn ObjectStore>;
    /// What lies at a place that [`ObjectStore::place`] named.
    async fn read(&self, place: &str) -> Vec<u8>;
}

struct Local {
    folder: tempfile::TempDir,
}

impl Local {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }
}

impl World for Local {
    fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::new(LocalObjects::new(self.folder.path().join("not/there/yet")))
    }

    async fn read(&self, place: &str) -> Vec<u8> {
        std::fs::read(place).unwrap()
    }
}

struct S3 {
    bucket: Bucket,
    prefix: &'static str,
}

impl S3 {
    async fn new(prefix: &'static str) -> Self {
        Self { bucket: Bucket::new().await, prefix }
    }
}

impl World for S3 {
    fn store(&self) -> Arc<dyn ObjectStore> {
        let root = format!("s3://{}/{}", self.bucket.name, self.prefix);
        Arc::new(S3Objects::new(self.bucket.client.clone(), S3Uri::parse(&root).unwrap()))
    }

    async fn read(&self, place: &str) -> Vec<u8> {
        let (bucket, key) = place.strip_prefix("s3://").unwrap().split_once('/').unwrap();
        let object = self.bucket.client.get_object().bucket(bucket).key(key).send().await.unwrap();
        object.body.collect().await.unwrap().to_vec()
    }
}

macro_rules! object_store {
    ($adapter:ident, $world:expr) => {
        suite!(
            $adapter,
            $world,
            [
                what_is_not_there_is_none,
                what_is_created_is_read_and_lies_where_it_is_said_to,
                what_exists_is_never_overwritten,
                of_many_creators_one_wins,
                a_second_store_over_a_root_sees_the_same,
            ]
        );
    };
}

object_store!(local, super::Local::new());
object_store!(s3, super::S3::new("some/prefix"));
object_store!(s3_with_a_slash, super::S3::new("some/prefix/"));
object_store!(s3_whole_bucket, super::S3::new(""));

async fn what_is_not_there_is_none(world: &impl World) {
    let store = world.store();
    assert_eq!(store.get("set/1.safetensors").await.unwrap(), None);
    store.create("set/2.safetensors", Bytes::from_static(b"2")).await.unwrap();
    for key in ["set/1.safetensors", "set/2", "set/2.safetensors.", "et/2.safetensors", "other/2"] {
        assert_eq!(store.get(key).await.unwrap(), None, "{key}");
    }
}

async fn what_is_created_is_read_and_lies_where_it_is_said_to(world: &impl World) {
    let store = world.store();
    for (key, size) in
        [("set/1.safetensors", 3_000_000), ("set/active.json", 50), ("empty", 0), ("A-b_c.9/x", 1)]
    {
        let body: Vec<u8> = (0..size).map(|n: u32| (n % 251) as u8).collect();
        soon(key, store.create(key, body.clone().into())).await.unwrap();
        assert!(store.get(key).await.unwrap().unwrap() == body, "{key}");
        let place = store.place(key);
        assert!(place.ends_with(&format!("/{key}")) && !place.contains("//A"), "{place}");
        assert!(world.read(&place).await == body, "{place}");
    }
}

async fn what_exists_is_never_overwritten(world: &impl World) {
    let store = world.store();
    let key = "set/1.safetensors";
    store.create(key, Bytes::from_static(b"first")).await.unwrap();
    for body in ["second", "first", ""] {
        match store.create(key, body.into()).await {
            Err(ObjectError::Exists(place)) => assert_eq!(place, store.place(key)),
            other => panic!("{body:?}: {other:?}"),
        }
        assert_eq!(store.get(key).await.unwrap().unwrap(), "first");
    }
    store.create("set/2.safetensors", Bytes::from_static(b"another key")).await.unwrap();
}

/// Few: a test server may serialise the writers of one key by waiting.
const ROUNDS: usize = 3;

async fn of_many_creators_one_wins(world: &impl World) {
    const CREATORS: usize = 8;
    let store = world.store();
    for round in 0..ROUNDS {
        let key = format!("set/{round}.safetensors");
        let body = |creator: usize| vec![b'a' + creator as u8; 200_000 + creator];
        let mut creators = JoinSet::new();
        for creator in 0..CREATORS {
            let (store, key) = (Arc::clone(&store), key.clone());
            creators.spawn(async move {
                match store.create(&key, body(creator).into()).await {
                    Ok(()) => Some(creator),
                    Err(ObjectError::Exists(_)) => None,
                    Err(error) => panic!("{key}, creator {creator}: {error}"),
                }
            });
        }
        let all = soon("all have tried", creators.join_all()).await;
        let winners: Vec<usize> = all.into_iter().flatten().collect();
        assert_eq!(winners.len(), 1, "{key} was created by {winners:?}");
        let left = store.get(&key).await.unwrap().unwrap();
        assert!(left == body(winners[0]), "{key} is not what its creator wrote");
    }
}

async fn a_second_store_over_a_root_sees_the_same(world: &impl World) {
    let one = world.store();
    one.create("set/1", Bytes::from_static(b"1")).await.unwrap();
    let same = world.store();
    assert_eq!(same.get("set/1").await.unwrap().unwrap(), "1");
    assert!(matches!(same.create("set/1", Bytes::new()).await, Err(ObjectError::Exists(_))));
}

#[tokio::test]
async fn a_local_store_leaves_no_litter() {
    let world = Local::new().await;
    of_many_creators_one_wins(&world).await;
    let files = walkdir::WalkDir::new(world.folder.path())
        .into_iter()
        .map(Result::unwrap)
        .filter(|entry| entry.file_type().is_file())
        .count();
    assert_eq!(files, ROUNDS);
}

#[tokio::test]
async fn a_store_that_refuses_is_unavailable_and_not_empty() {
    let bucket = Bucket::new().await;
    let root = S3Uri::parse(&format!("s3://{}/p", bucket.name)).unwrap();
    let refused = S3Objects::new(s3_client("nobody", "nothing"), root);
    for error in
        [refused.get("a").await.unwrap_err(), refused.create("a", Bytes::new()).await.unwrap_err()]
    {
        assert!(matches!(&error, ObjectError::Unavailable(m) if m.contains("403")), "{error}");
    }
    // A bucket that does not exist is a mistake in the settings, not an empty store.
    let root = S3Uri::parse("s3://angler-no-such-bucket/p").unwrap();
    let nowhere = S3Objects::new(bucket.client.clone(), root);
    let error = nowhere.get("a").await.unwrap_err();
    assert!(matches!(&error, ObjectError::Unavailable(m) if m.contains("NoSuchBucket")), "{error}");
}
