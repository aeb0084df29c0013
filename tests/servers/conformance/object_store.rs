//! What every [`ObjectStore`] does.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use angler_core::store::{ETag, Got, Listed, ObjectError, ObjectStore, SMALL_OBJECT_BYTES};
use angler_storage::local::LocalObjects;
use angler_storage::s3::{S3Objects, S3Uri};
use angler_wire::error::Reason;

use super::soon;
use crate::support::{Bucket, s3_client, s3_client_at, var};

/// A store, and a look past it.
pub trait World {
    /// How often writers race. The test server lets the writers of one key wait for each other by
    /// the second, so there it is once; its three worlds are three races.
    const RACES: usize;
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
    const RACES: usize = 20;

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
    const RACES: usize = 1;

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
                what_is_known_is_not_sent_again,
                only_who_knows_the_present_object_replaces_it,
                of_many_who_replace_one_wins,
                of_many_who_replace_nothing_one_wins,
                what_is_not_small_is_refused_whole,
                a_folder_lists_what_lies_directly_in_it,
                a_folder_lists_all_it_has,
            ]
        );
    };
}

object_store!(local, super::Local::new());
object_store!(s3, super::S3::new("some/prefix"));
object_store!(s3_with_a_slash, super::S3::new("some/prefix/"));
object_store!(s3_whole_bucket, super::S3::new(""));

/// All of an object; none if there is none.
async fn whole(store: &dyn ObjectStore, key: &str) -> Option<Vec<u8>> {
    let mut object = soon(key, store.open(key)).await.unwrap()?;
    let mut bytes = Vec::new();
    while let Some(chunk) = soon(key, object.chunks.next()).await {
        let chunk = chunk.unwrap();
        assert!(chunk.len() <= 4 << 20, "{key}: a chunk of {} bytes", chunk.len());
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(object.bytes, bytes.len() as u64, "{key}");
    Some(bytes)
}

/// A small object that is there, and its ETag.
async fn small(store: &dyn ObjectStore, key: &str) -> (Bytes, ETag) {
    match store.get(key, None).await.unwrap() {
        Got::Object { bytes, etag } => (bytes, etag),
        other => panic!("{key}: {other:?}"),
    }
}

fn assert_changed(outcome: Result<ETag, ObjectError>, place: &str) {
    assert!(matches!(&outcome, Err(ObjectError::Changed(p)) if p == place), "{outcome:?}");
}

async fn what_is_not_there_is_none(world: &impl World) {
    let store = world.store();
    assert_eq!(store.get("set/1.safetensors", None).await.unwrap(), Got::Missing);
    store.create("set/2.safetensors", Bytes::from_static(b"2")).await.unwrap();
    let (_, etag) = small(&*store, "set/2.safetensors").await;
    for key in [
        "set/1.safetensors",
        "set/2",
        "set/2.safetensors.",
        "et/2.safetensors",
        "other/2",
        // Folders, and below an object.
        "set",
        "set/2.safetensors/x",
    ] {
        assert_eq!(store.get(key, None).await.unwrap(), Got::Missing, "{key}");
        assert_eq!(store.get(key, Some(&etag)).await.unwrap(), Got::Missing, "{key}");
        assert!(store.open(key).await.unwrap().is_none(), "{key}");
    }
}

async fn what_is_created_is_read_and_lies_where_it_is_said_to(world: &impl World) {
    let store = world.store();
    for (key, size) in [
        ("set/1.safetensors", 3_000_000),
        ("set/2.safetensors", 2 << 20),
        ("set/active.json", 50),
        ("empty", 0),
        ("A-b_c.9/x", 1),
    ] {
        let body: Vec<u8> = (0..size).map(|n: u32| (n % 251) as u8).collect();
        soon(key, store.create(key, body.clone().into())).await.unwrap();
        assert!(whole(&*store, key).await.unwrap() == body, "{key}");
        if size <= 50 {
            assert_eq!(small(&*store, key).await.0, body, "{key}");
        }
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
        assert_eq!(small(&*store, key).await.0, "first");
    }
    store.create("set/2.safetensors", Bytes::from_static(b"another key")).await.unwrap();
}

async fn of_many_creators_one_wins<W: World>(world: &W) {
    const CREATORS: usize = 8;
    let store = world.store();
    for round in 0..W::RACES {
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
        let left = whole(&*store, &key).await.unwrap();
        assert!(left == body(winners[0]), "{key} is not what its creator wrote");
    }
}

async fn a_second_store_over_a_root_sees_the_same(world: &impl World) {
    let one = world.store();
    one.create("set/1", Bytes::from_static(b"1")).await.unwrap();
    let same = world.store();
    let (bytes, etag) = small(&*same, "set/1").await;
    assert_eq!(bytes, "1");
    assert!(matches!(same.create("set/1", Bytes::new()).await, Err(ObjectError::Exists(_))));
    same.replace("set/1", Bytes::from_static(b"2"), Some(&etag)).await.unwrap();
    assert_changed(one.replace("set/1", "3".into(), Some(&etag)).await, &one.place("set/1"));
    assert_eq!(small(&*one, "set/1").await.0, "2");
}

async fn what_is_known_is_not_sent_again(world: &impl World) {
    let store = world.store();
    let key = "set/active.json";
    let first = store.replace(key, Bytes::from_static(b"first"), None).await.unwrap();
    assert_eq!(small(&*store, key).await, ("first".into(), first.clone()));
    assert_eq!(store.get(key, Some(&first)).await.unwrap(), Got::Unchanged);

    let second = store.replace(key, Bytes::from_static(b"second"), Some(&first)).await.unwrap();
    assert_ne!(first, second);
    let got = store.get(key, Some(&first)).await.unwrap();
    assert_eq!(got, Got::Object { bytes: "second".into(), etag: second.clone() });
    assert_eq!(store.get(key, Some(&second)).await.unwrap(), Got::Unchanged);
    assert_eq!(world.read(&store.place(key)).await, b"second");
}

async fn only_who_knows_the_present_object_replaces_it(world: &impl World) {
    let store = world.store();
    let (key, place) = ("set/active.json", store.place("set/active.json"));
    let another = store.replace("set/other.json", "another".into(), None).await.unwrap();
    // There is nothing to replace yet.
    assert_changed(store.replace(key, "x".into(), Some(&another)).await, &place);
    assert_eq!(store.get(key, None).await.unwrap(), Got::Missing);

    store.create(key, Bytes::from_static(b"first")).await.unwrap();
    let (_, first) = small(&*store, key).await;
    let second = store.replace(key, "second".into(), Some(&first)).await.unwrap();
    for expected in [None, Some(&first), Some(&another)] {
        for body in ["third", "second", ""] {
            let outcome = store.replace(key, body.into(), expected).await;
            assert_changed(outcome, &place);
        }
        assert_eq!(small(&*store, key).await, ("second".into(), second.clone()));
    }
    let empty = store.replace(key, Bytes::new(), Some(&second)).await.unwrap();
    assert_eq!(small(&*store, key).await, (Bytes::new(), empty));
}

/// Many writers who all saw the same; yields what the winner wrote, and its ETag.
async fn race(store: &Arc<dyn ObjectStore>, key: &str, seen: Option<&ETag>) -> (String, ETag) {
    const WRITERS: usize = 16;
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, key, seen) = (Arc::clone(store), key.to_owned(), seen.cloned());
        writers.spawn(async move {
            // Not what anybody wrote before: who writes what is there leaves its ETag as it is.
            let body = format!("written by {writer} who saw {seen:?}");
            match store.replace(&key, body.clone().into(), seen.as_ref()).await {
                Ok(etag) => Some((body, etag)),
                Err(ObjectError::Changed(_)) => None,
                Err(error) => panic!("{key}, writer {writer}: {error}"),
            }
        });
    }
    let all = soon("all have tried", writers.join_all()).await;
    let mut winners: Vec<(String, ETag)> = all.into_iter().flatten().collect();
    assert_eq!(winners.len(), 1, "{key} was replaced by {winners:?}");
    let (body, etag) = winners.remove(0);
    assert_eq!(small(&**store, key).await, (body.clone().into(), etag.clone()));
    (body, etag)
}

async fn of_many_who_replace_one_wins<W: World>(world: &W) {
    let store = world.store();
    let key = "set/active.json";
    let mut seen = store.replace(key, Bytes::from_static(b"seen by all"), None).await.unwrap();
    for _ in 0..W::RACES {
        (_, seen) = race(&store, key, Some(&seen)).await;
    }
}

async fn of_many_who_replace_nothing_one_wins<W: World>(world: &W) {
    let store = world.store();
    for round in 0..W::RACES {
        race(&store, &format!("set-{round}/active.json"), None).await;
    }
}

async fn what_is_not_small_is_refused_whole(world: &impl World) {
    let store = world.store();
    let is_too_large = |error: ObjectError, key: &str| {
        let place = store.place(key);
        assert!(matches!(&error, ObjectError::TooLarge(p) if *p == place), "{error:?}");
    };
    let most = Bytes::from(vec![b'm'; SMALL_OBJECT_BYTES as usize]);
    let more = Bytes::from(vec![b'm'; SMALL_OBJECT_BYTES as usize + 1]);
    let etag = store.replace("most", most.clone(), None).await.unwrap();
    assert!(small(&*store, "most").await == (most.clone(), etag.clone()));
    is_too_large(store.replace("most", more.clone(), Some(&etag)).await.unwrap_err(), "most");
    assert!(small(&*store, "most").await.0 == most);
    is_too_large(store.replace("more", more.clone(), None).await.unwrap_err(), "more");
    assert_eq!(store.get("more", None).await.unwrap(), Got::Missing);

    store.create("more", more.clone()).await.unwrap();
    is_too_large(store.get("more", None).await.unwrap_err(), "more");
    is_too_large(store.get("more", Some(&etag)).await.unwrap_err(), "more");
    // And it is not what anybody expects who has seen a small object.
    assert_changed(store.replace("more", "x".into(), Some(&etag)).await, &store.place("more"));
    assert_changed(store.replace("more", "x".into(), None).await, &store.place("more"));
    assert!(whole(&*store, "more").await.unwrap() == more);
}

async fn a_folder_lists_what_lies_directly_in_it(world: &impl World) {
    let store = world.store();
    for folder in ["", "set", "not/there"] {
        assert_eq!(store.list(folder).await.unwrap(), [], "{folder:?} is empty");
    }
    let before = SystemTime::now();
    for (key, body) in [
        ("set/b.safetensors", "bb"),
        ("set/10.safetensors", "ten"),
        ("set/active.json", ""),
        ("set/B", "upper case comes first"),
        ("set/deeper/x/y", "y"),
        ("set/deep/z", "z"),
        ("set/.hidden", "h"),
        ("set/.folder/x", "h"),
        ("sett/other", "its name only begins alike"),
        ("top", "1"),
    ] {
        store.create(key, Bytes::from_static(body.as_bytes())).await.unwrap();
    }
    let described = |listed: Vec<Listed>| -> Vec<String> {
        let describe = |entry: &Listed| match entry {
            Listed::Folder { name } => format!("{name}/"),
            Listed::Object { name, bytes, modified } => {
                // A server's clock is its own, and may count whole seconds.
                let age = modified.duration_since(before - Duration::from_secs(5));
                assert!(age.is_ok_and(|age| age < Duration::from_secs(60)), "{name}: {modified:?}");
                format!("{name} {bytes}")
            }
        };
        listed.iter().map(describe).collect()
    };
    let in_set = described(store.list("set").await.unwrap());
    assert_eq!(
        in_set,
        ["10.safetensors 3", "B 22", "active.json 0", "b.safetensors 2", "deep/", "deeper/"]
    );
    assert_eq!(described(store.list("set/").await.unwrap()), in_set);
    assert_eq!(described(store.list("").await.unwrap()), ["set/", "sett/", "top 1"]);
    assert_eq!(described(store.list("set/deeper").await.unwrap()), ["x/"]);
    for nothing in ["se", "set/dee", "set/b.safetensors", "top", "nowhere"] {
        assert_eq!(store.list(nothing).await.unwrap(), [], "{nothing}");
    }
}

async fn a_folder_lists_all_it_has(world: &impl World) {
    // More than a page of S3's, which has 1,000 entries.
    const OBJECTS: usize = 1_010;
    let store = world.store();
    let names: Arc<[String]> = (0..OBJECTS).map(|n| format!("{n:04}")).collect();
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let (store, names) = (Arc::clone(&store), Arc::clone(&names));
        writers.spawn(async move {
            for name in names.iter().skip(writer).step_by(16) {
                // Folders and objects share the pages.
                let below = if name.ends_with('7') { "/x" } else { "" };
                store.create(&format!("set/{name}{below}"), Bytes::new()).await.unwrap();
            }
        });
    }
    soon("all are written", writers.join_all()).await;
    let listed = soon("a list", store.list("set")).await.unwrap();
    let listed_names: Vec<&str> = listed.iter().map(Listed::name).collect();
    assert_eq!(listed_names, names.iter().collect::<Vec<_>>());
    let folders = listed.iter().filter(|entry| matches!(entry, Listed::Folder { .. })).count();
    assert_eq!(folders, OBJECTS / 10);
}

#[tokio::test]
async fn a_local_store_leaves_no_litter_but_its_locks() {
    let world = Local::new().await;
    let files = || {
        walkdir::WalkDir::new(world.folder.path())
            .into_iter()
            .map(Result::unwrap)
            .filter(|entry| entry.file_type().is_file())
            .map(|entry| entry.file_name().to_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    of_many_creators_one_wins(&world).await;
    assert_eq!(files().len(), Local::RACES);
    of_many_who_replace_one_wins(&world).await;
    only_who_knows_the_present_object_replaces_it(&Local::new().await).await;
    let mut replaced = files();
    replaced.retain(|name| !name.ends_with(".safetensors"));
    replaced.sort();
    assert_eq!(replaced, [".active.json.lock", "active.json"]);
}

#[tokio::test]
async fn a_local_writer_waits_for_the_lock_and_not_for_ever() {
    let world = Local::new().await;
    let store = world.store();
    let key = "set/active.json";
    let seen = store.replace(key, "1".into(), None).await.unwrap();
    let lock = File::open(store.place("set/.active.json.lock")).unwrap();
    lock.lock().unwrap();
    // It is still held when the writer gives up; the clock does not have to run for that.
    tokio::time::pause();
    let error = store.replace(key, "2".into(), Some(&seen)).await.unwrap_err();
    assert!(
        matches!(&error, ObjectError::Unavailable(m) if has(m, &store.place(key)) && has(m, "lock")),
        "{error}"
    );
    tokio::time::resume();
    assert_eq!(small(&*store, key).await, ("1".into(), seen.clone()));

    let (waits, expected) = (Arc::clone(&store), seen.clone());
    let waiting =
        tokio::spawn(async move { waits.replace(key, "2".into(), Some(&expected)).await });
    // Another key's lock is another.
    store.replace("other/active.json", "1".into(), None).await.unwrap();
    assert!(!waiting.is_finished());
    lock.unlock().unwrap();
    soon("the lock is free", waiting).await.unwrap().unwrap();
    assert_eq!(small(&*store, key).await.0, "2");
}

#[tokio::test]
async fn a_local_file_that_changes_its_length_while_it_is_read_is_no_object() {
    let world = Local::new().await;
    let store = world.store();
    for size in [0, 10, 1 << 20, 3_000_000] {
        for to in BTreeSet::from([0, size / 2, size, size + 1, 3 * size + 1]) {
            let key = format!("set/{size}-{to}");
            store.create(&key, vec![7; size as usize].into()).await.unwrap();
            let object = store.open(&key).await.unwrap().unwrap();
            let file = File::options().write(true).open(store.place(&key)).unwrap();
            file.set_len(to).unwrap();
            let chunks: Vec<_> = soon(&key, object.chunks.collect()).await;
            let read: u64 = chunks.iter().flatten().map(|chunk| chunk.len() as u64).sum();
            let place = store.place(&key);
            match chunks.last() {
                _ if to == size => assert_eq!(read, size, "{key}"),
                Some(Err(ObjectError::Unavailable(m))) => assert!(has(m, &place), "{m}"),
                other => panic!("{key}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_store_that_refuses_is_unavailable_and_not_empty() {
    let bucket = Bucket::new().await;
    let root = S3Uri::parse(&format!("s3://{}/p", bucket.name)).unwrap();
    let refused = S3Objects::new(s3_client("nobody", "nothing"), root);
    let mut errors = all_errors(&refused).await;
    let seen = ETag::new("\"seen\"");
    errors.push(refused.replace("a", Bytes::new(), Some(&seen)).await.unwrap_err());
    for error in errors {
        assert!(matches!(&error, ObjectError::Unavailable(m) if has(m, "403")), "{error}");
    }
    // A bucket that does not exist is a mistake in the settings, not an empty store.
    let root = S3Uri::parse("s3://angler-no-such-bucket/p").unwrap();
    let nowhere = S3Objects::new(bucket.client.clone(), root);
    for error in all_errors(&nowhere).await {
        let unavailable = matches!(&error, ObjectError::Unavailable(m) if has(m, "NoSuchBucket"));
        assert!(unavailable, "{error:?}");
    }
    // Nor is a folder that may not be read.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("name"), "a file").unwrap();
    let blocked = LocalObjects::new(folder.path().join("name"));
    for error in [
        blocked.create("a", Bytes::new()).await.unwrap_err(),
        blocked.replace("a", Bytes::new(), None).await.unwrap_err(),
    ] {
        assert!(matches!(&error, ObjectError::Unavailable(m) if has(m, "name/a")), "{error}");
    }
}

async fn all_errors(store: &S3Objects) -> Vec<ObjectError> {
    vec![
        store.get("a", None).await.unwrap_err(),
        store.open("a").await.unwrap_err(),
        store.create("a", Bytes::new()).await.unwrap_err(),
        store.replace("a", Bytes::new(), None).await.unwrap_err(),
        store.list("").await.unwrap_err(),
    ]
}

/// Stands before the test store and loses the answer to the first request; yields its URL.
async fn lossy_proxy() -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let behind = var("ANGLER_TEST_S3_ENDPOINT").strip_prefix("http://").unwrap().to_owned();
    let task = tokio::spawn(async move {
        let mut lost = false;
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&behind).await.unwrap();
            if lost {
                tokio::spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
                continue;
            }
            let (mut from_client, _keep) = client.split();
            let (mut from_server, mut to_server) = server.split();
            let mut answer = [0];
            tokio::select! {
                _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
                // It answers, so it has done what it was asked to.
                read = from_server.read(&mut answer) => lost = read.unwrap() > 0,
            }
            let _ = to_server.shutdown().await;
        }
    });
    (url, AbortOnDropHandle::new(task))
}

#[tokio::test]
async fn a_writer_whose_answer_is_lost_looks_what_is_there() {
    let bucket = Bucket::new().await;
    let root = S3Uri::parse(&format!("s3://{}/p", bucket.name)).unwrap();
    let direct = S3Objects::new(bucket.client.clone(), root.clone());
    let large = Bytes::from(vec![b'v'; 3_000_000]);
    let seen = direct.replace("seen", "1".into(), None).await.unwrap();
    direct.create("taken", "by another".into()).await.unwrap();

    let lossy = async || {
        let (url, proxy) = lossy_proxy().await;
        let client = s3_client_at(&url, &var("ANGLER_TEST_S3_KEY"), &var("ANGLER_TEST_S3_SECRET"));
        (S3Objects::new(client, root.clone()), proxy)
    };
    let (store, _proxy) = lossy().await;
    soon("large", store.create("large", large.clone())).await.unwrap();
    assert!(whole(&direct, "large").await.unwrap() == large);

    let (store, _proxy) = lossy().await;
    let etag = soon("new", store.replace("new", "1".into(), None)).await.unwrap();
    assert_eq!(small(&direct, "new").await, ("1".into(), etag));

    let (store, _proxy) = lossy().await;
    let etag = soon("seen", store.replace("seen", "2".into(), Some(&seen))).await.unwrap();
    assert_eq!(small(&direct, "seen").await, ("2".into(), etag));

    // What was lost is a refusal: the writer cannot know, and does not claim success.
    let (store, _proxy) = lossy().await;
    let error = soon("taken", store.create("taken", "by mistake".into())).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Unavailable(m) if has(m, "/p/taken")), "{error}");
    let (store, _proxy) = lossy().await;
    let error = soon("stale", store.replace("seen", "3".into(), Some(&seen))).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Unavailable(m) if has(m, "/p/seen")), "{error}");
    assert_eq!(small(&direct, "taken").await.0, "by another");
    assert_eq!(small(&direct, "seen").await.0, "2");
}

fn has(reason: &Reason, words: &str) -> bool {
    angler_wire::text::chain(reason).contains(words)
}
