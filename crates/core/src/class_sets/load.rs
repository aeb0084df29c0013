//! Reads one version from where class sets live: as a stream, straight into its final place.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use angler_vectors::file;
use angler_vectors::file::{Expected, Reader};
use angler_vectors::{ClassVectors, ClassesError};
use angler_wire::error::Reason;
use angler_wire::job::hex;

use crate::store::{ObjectError, ObjectStore};

/// How long the store may keep silent before a load is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(30);

/// The key of a version's file, relative to the root.
pub fn version_key(set: &str, version: &str) -> String {
    format!("{set}/{version}.safetensors")
}

/// The key of the file that names a set's active version, relative to the root.
pub fn active_key(set: &str) -> String {
    format!("{set}/active.json")
}

/// A version in memory, and what its file was.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The version.
    pub classes: Arc<ClassVectors>,
    /// SHA-256 of the file, lower-case hex.
    pub sha256: String,
    /// Length of the file.
    pub file_bytes: u64,
}

/// Reads and checks a version: format, shape, finite values, norms, labels, and where given the
/// model and the file's SHA-256.
///
/// * `max_bytes`: a larger file is refused before it is read.
///
/// # Errors
/// [`ClassesError`], which says what is wrong and where.
pub async fn load(
    store: &dyn ObjectStore,
    (set, version): (&str, &str),
    expected: Option<&Expected>,
    sha256: Option<&str>,
    max_bytes: u64,
) -> Result<Loaded, ClassesError> {
    let key = version_key(set, version);
    let place = store.place(&key);
    let silent = || {
        let seconds = SILENCE.as_secs();
        ClassesError::Unavailable(format!("{place}: the store was silent for {seconds} s").into())
    };
    let object = timeout(SILENCE, store.open(&key)).await.map_err(|_| silent())?;
    let object = object.map_err(unavailable)?.ok_or_else(|| ClassesError::UnknownVersion {
        set: set.to_owned(),
        version: version.to_owned(),
        reason: format!("{place} does not exist"),
    })?;
    let invalid =
        |reason: String| ClassesError::Invalid { place: place.clone(), reason: reason.into() };
    let file_bytes = object.bytes;
    if file_bytes > max_bytes {
        return Err(invalid(format!(
            "it has {file_bytes} bytes, the limit is {max_bytes} (classes.version_bytes)"
        )));
    }
    let mut reader = Reader::new(&place, file_bytes, expected.cloned());
    let mut hash = Sha256::new();
    let mut chunks = object.chunks;
    while let Some(chunk) = timeout(SILENCE, chunks.next()).await.map_err(|_| silent())? {
        let chunk = chunk.map_err(unavailable)?;
        hash.update(&chunk);
        reader.push(&chunk)?;
    }
    let contents = reader.finish()?;
    let found = hex(&hash.finalize());
    if let Some(wanted) = sha256.filter(|wanted| !wanted.eq_ignore_ascii_case(&found)) {
        return Err(invalid(format!("its sha256 is {found}, but active.json says {wanted}")));
    }
    let (set, version, at) = (set.to_owned(), version.to_owned(), place.clone());
    // Every row is looked at, which takes seconds for a large set: not on the threads that move
    // jobs.
    let checked = tokio::task::spawn_blocking(move || file::check(contents, (&set, &version), &at));
    let classes = checked.await.map_err(|e| ClassesError::Unavailable(Reason::of(e)))??;
    Ok(Loaded { classes: Arc::new(classes), sha256: found, file_bytes })
}

/// The store's error, as one that may pass, unless it is the object's own fault.
pub(super) fn unavailable(error: ObjectError) -> ClassesError {
    match error {
        ObjectError::TooLarge(place) => {
            ClassesError::Invalid { place, reason: "it has more than 1 MiB".into() }
        }
        other => ClassesError::Unavailable(Reason::of(other)),
    }
}
