//! Makes a version the active one, so that two people cannot overwrite each other unseen.
//!
//! The version is read and checked whole, as a worker would; then `active.json` is replaced only if
//! it is still the one that was looked at before.

use std::time::SystemTime;

use angler_vectors::ClassesError;
use angler_vectors::active::{Active, ActiveError};
use angler_vectors::file::Expected;
use angler_wire::error::Reason;
use angler_wire::text::chain;

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
) -> Result<Option<(Result<Active, ActiveError>, ETag)>, ClassesError> {
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
        reason: Reason::of(e),
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

fn previous(
    set: &str,
    before: Option<&Result<Active, ActiveError>>,
) -> Result<String, PublishError> {
    let none = |reason: &str| PublishError::NoPrevious {
        set: set.to_owned(),
        reason: format!("{reason}; name one: angler classes activate {set}@VERSION"),
    };
    match before {
        None => Err(none("no version is active")),
        Some(Err(error)) => Err(none(&format!("its active.json is {}", chain(error)))),
        Some(Ok(active)) => active
            .previous
            .clone()
            .ok_or_else(|| none(&format!("{} is the first that was active", active.version))),
    }
}
