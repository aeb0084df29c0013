//! Makes a version the active one, so that two people cannot overwrite each other unseen.
//!
//! The version is read and checked whole, as a worker would; then `active.json` is replaced only if
//! it is still the one that was looked at before.

use std::time::SystemTime;

use super::ClassesError;
use super::active::Active;
use super::file::Expected;
use super::load::{Loaded, active_key, load, unavailable};
use crate::store::{ETag, Got, ObjectError, ObjectStore};

/// Why a version did not become active.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The version is not fit to be served; nothing was changed.
    #[error(transparent)]
    Classes(#[from] ClassesError),
    /// Somebody else was faster.
    #[error(
        "another version of {set} became active meanwhile, and nothing was changed by this command: {now}",
        now = winner.as_ref().map_or_else(|| "active.json is not readable".to_owned(), describe)
    )]
    Lost {
        /// The set.
        set: String,
        /// What is active now, if it can be read.
        winner: Option<Box<Active>>,
    },
    /// There is no version to go back to.
    #[error("{set} has no version to go back to: {reason}")]
    NoPrevious {
        /// The set.
        set: String,
        /// Why not.
        reason: String,
    },
}

fn describe(active: impl AsRef<Active>) -> String {
    let active = active.as_ref();
    let by = active.activated_by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
    let at = active.activated_at.as_ref().map(|at| format!(" at {at}")).unwrap_or_default();
    format!("version {}{by}{at}", active.version)
}

impl AsRef<Active> for Active {
    fn as_ref(&self) -> &Active {
        self
    }
}

/// What became active.
#[derive(Debug)]
pub struct Published {
    /// What `active.json` says now.
    pub active: Active,
    /// The version that was active before; none: none was.
    pub before: Option<String>,
    /// Whether `active.json` was written; not if the version was active already.
    pub changed: bool,
    /// The version.
    pub loaded: Loaded,
}

/// Which version is to become active.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// This one.
    Version(&'a str),
    /// The one that was active before.
    Previous,
}

/// What a set's `active.json` says, with its ETag; none if there is none.
///
/// # Errors
/// [`ClassesError::Unavailable`]. A file that cannot be understood is `Err` inside.
#[allow(clippy::type_complexity)] // Three questions: is it there, which one, and can it be read.
pub async fn read_active(
    store: &dyn ObjectStore,
    set: &str,
) -> Result<Option<(Result<Active, String>, ETag)>, ClassesError> {
    match store.get(&active_key(set), None).await.map_err(unavailable)? {
        Got::Object { bytes, etag } => Ok(Some((Active::parse(&bytes), etag))),
        Got::Missing | Got::Unchanged => Ok(None),
    }
}

/// Checks a version and makes it the active one.
///
/// * `by`: who does it, for people.
/// * `max_bytes`: the largest file that is read.
///
/// # Errors
/// [`PublishError`]; nothing was changed then.
pub async fn activate(
    store: &dyn ObjectStore,
    set: &str,
    target: Target<'_>,
    expected: &Expected,
    max_bytes: u64,
    by: &str,
) -> Result<Published, PublishError> {
    // Before the check, which may take a while: whoever writes in between has won.
    let (before, etag) = match read_active(store, set).await? {
        Some((before, etag)) => (Some(before), Some(etag)),
        None => (None, None),
    };
    let version = match target {
        Target::Version(version) => version.to_owned(),
        Target::Previous => previous(set, before.as_ref())?,
    };
    // An `active.json` that nobody can read is mended by the next activation.
    let before = before.and_then(Result::ok);
    let loaded = load(store, (set, &version), Some(expected), None, max_bytes).await?;
    let same =
        |a: &Active| a.version == version && a.sha256.as_ref().is_some_and(|s| *s == loaded.sha256);
    if let Some(active) = before.as_ref().filter(|a| same(a)) {
        let before = active.previous.clone();
        return Ok(Published { active: active.clone(), before, changed: false, loaded });
    }
    let active = Active {
        sha256: Some(loaded.sha256.clone()),
        previous: match &before {
            // The same version, now with its sum: what was before it stays.
            Some(active) if active.version == version => active.previous.clone(),
            Some(active) => Some(active.version.clone()),
            None => None,
        },
        activated_at: Some(humantime::format_rfc3339_millis(SystemTime::now()).to_string()),
        activated_by: Some(by.to_owned()),
        version,
    };
    let body = serde_json::to_vec(&active).map_err(|e| ClassesError::Invalid {
        place: store.place(&active_key(set)),
        reason: e.to_string(),
    })?;
    match store.replace(&active_key(set), body.into(), etag.as_ref()).await {
        Ok(_) => {
            let before = before.map(|before| before.version);
            Ok(Published { active, before, changed: true, loaded })
        }
        Err(ObjectError::Changed(_) | ObjectError::Exists(_)) => {
            let now = read_active(store, set).await?;
            let winner = now.and_then(|(active, _)| active.ok()).map(Box::new);
            Err(PublishError::Lost { set: set.to_owned(), winner })
        }
        Err(error) => Err(unavailable(error).into()),
    }
}

fn previous(set: &str, before: Option<&Result<Active, String>>) -> Result<String, PublishError> {
    let none = |reason: &str| PublishError::NoPrevious {
        set: set.to_owned(),
        reason: format!("{reason}; name one: angler classes activate {set}@VERSION"),
    };
    match before {
        None => Err(none("no version is active")),
        Some(Err(reason)) => Err(none(&format!("its active.json is {reason}"))),
        Some(Ok(active)) => active
            .previous
            .clone()
            .ok_or_else(|| none(&format!("{} is the first that was active", active.version))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classes::{Contents, file, load::version_key};
    use crate::store::local::LocalObjects;
    use ndarray::array;

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
        async fn activate(
            &self,
            target: Target<'_>,
            model: &str,
        ) -> Result<Published, PublishError> {
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
}
