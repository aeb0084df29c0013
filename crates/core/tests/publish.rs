//! What becomes active in a folder on disk, and what does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

use ndarray::array;

use angler_core::class_sets::load::version_key;
use angler_core::class_sets::publish::*;
use angler_core::store::ObjectStore;
use angler_storage::local::LocalObjects;
use angler_vectors::active::Active;
use angler_vectors::file::Expected;
use angler_vectors::{Contents, file};

struct Root {
    _folder: tempfile::TempDir,
    store: LocalObjects,
}

async fn root(versions: &[&str]) -> Root {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalObjects::new(folder.path());
    for version in versions {
        let contents = Contents::new(vec![(*version).to_owned()], array![[1.0, 2.0]], "m@1");
        let bytes = file::write(&contents, ("s", version)).unwrap();
        store.create(&version_key("s", version), bytes.into()).await.unwrap();
    }
    Root { _folder: folder, store }
}

impl Root {
    async fn activate(&self, target: Target<'_>, model: &str) -> Result<Published, PublishError> {
        let expected = Expected { model: model.into(), dim: 2 };
        activate(&self.store, "s", target, &expected, 1 << 20, "a@b").await
    }

    async fn active(&self) -> Active {
        read_active(&self.store, "s").await.unwrap().unwrap().0.unwrap()
    }
}

#[tokio::test]
async fn activation_and_rollback_name_what_was_before() {
    let root = root(&["1", "2"]).await;
    let first = root.activate(Target::Version("1"), "m@1").await.unwrap();
    assert_eq!((first.before, first.changed), (None, true));
    let error = root.activate(Target::Previous, "m@1").await.unwrap_err().to_string();
    assert!(error.contains("first that was active"), "{error}");
    let second = root.activate(Target::Version("2"), "m@1").await.unwrap();
    assert_eq!(second.before.as_deref(), Some("1"));
    assert_eq!(second.active.sha256.as_deref(), Some(second.loaded.sha256.as_str()));
    assert!(!root.activate(Target::Version("2"), "m@1").await.unwrap().changed);
    let back = root.activate(Target::Previous, "m@1").await.unwrap();
    assert_eq!((back.active.version.as_str(), back.before.as_deref()), ("1", Some("2")));
    assert_eq!(root.active().await.previous.as_deref(), Some("2"));
    assert_eq!(root.active().await.activated_by.as_deref(), Some("a@b"));
}

#[tokio::test]
async fn what_a_worker_would_refuse_does_not_become_active() {
    let root = root(&["1"]).await;
    root.activate(Target::Version("1"), "m@1").await.unwrap();
    let torn = bytes::Bytes::from_static(b"torn");
    root.store.create(&version_key("s", "2"), torn).await.unwrap();
    for (version, model, words) in
        [("2", "m@1", "not a whole"), ("3", "m@1", "no version"), ("1", "m@9", "m@1")]
    {
        let error = root.activate(Target::Version(version), model).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(root.active().await.version, "1");
}

#[tokio::test]
async fn of_two_operators_at_once_one_learns_who_won() {
    let root = root(&["1", "2", "3"]).await;
    root.activate(Target::Version("1"), "m@1").await.unwrap();
    let both = tokio::join!(
        root.activate(Target::Version("2"), "m@1"),
        root.activate(Target::Version("3"), "m@1")
    );
    let (won, lost) = match both {
        (Ok(won), Err(lost)) | (Err(lost), Ok(won)) => (won, lost.to_string()),
        // One may have been done before the other began to look; the last one stays.
        (Ok(a), Ok(b)) => {
            let last = if a.before.as_deref() == Some("1") { b } else { a };
            assert_eq!(root.active().await, last.active);
            return;
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(root.active().await, won.active);
    assert!(lost.contains(&format!("version {} by a@b", won.active.version)), "{lost}");
}

#[tokio::test]
async fn an_unreadable_active_json_is_mended() {
    let root = root(&["1"]).await;
    root.store.create("s/active.json", bytes::Bytes::from_static(b"{")).await.unwrap();
    assert!(root.activate(Target::Previous, "m@1").await.is_err());
    let published = root.activate(Target::Version("1"), "m@1").await.unwrap();
    assert_eq!((published.before, published.changed), (None, true));
    assert_eq!(root.active().await.version, "1");
}
