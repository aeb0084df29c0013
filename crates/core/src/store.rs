//! Where bytes come from: images ([`ImageStore`]), and the files of class sets ([`ObjectStore`]).

pub mod shared;

use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use angler_metrics::stopwatch::Stopwatch;
use angler_wire::error::{ImageError, ImageErrorCode, Reason};

/// Fetches images.
#[async_trait]
pub trait ImageStore: Send + Sync {
    /// The object's bytes, as many as the budget allows.
    ///
    /// # Errors
    /// `not_found`, `access_denied`, `bucket_not_allowed`, `bad_uri`, `too_large`,
    /// `storage_unavailable`.
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError>;

    /// Asks for as little of the object as the store allows, in a request of its own that waits
    /// for no other. Any answer but a refusal of this worker is good, "no such key" included.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    async fn probe(&self, uri: &str, budget: &ByteBudget) -> Result<(), ImageError> {
        self.fetch(uri, budget).await.map(drop)
    }
}

/// An image's encoded bytes and their share of the budget. Clones have the same bytes and the same
/// share, which is given back with the last of them.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The encoded image.
    pub bytes: Bytes,
    /// What the bytes hold of `limits.bytes_in_flight`.
    pub permit: Arc<OwnedSemaphorePermit>,
}

/// Bounds the encoded bytes that are in memory at once, over all jobs.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    bytes: Arc<Semaphore>,
    image_bytes: u32,
    watch: Option<Stopwatch>,
}

impl ByteBudget {
    /// At most `in_flight` bytes at once, at most `image_bytes` for one image. An image may always
    /// use its limit, so `in_flight` is raised to it if it is smaller.
    pub fn new(in_flight: usize, image_bytes: u32) -> Self {
        let in_flight = in_flight.max(image_bytes as usize).min(Semaphore::MAX_PERMITS);
        Self { bytes: Arc::new(Semaphore::new(in_flight)), image_bytes, watch: None }
    }

    /// The same budget, for one image, whose time is taken by `watch`.
    #[must_use]
    pub fn timed_by(&self, watch: &Stopwatch) -> Self {
        Self { watch: Some(watch.clone()), ..self.clone() }
    }

    /// Awaits what only waits for other images: meanwhile this image's time stands still.
    pub async fn waiting<T>(&self, wait: impl Future<Output = T>) -> T {
        match &self.watch {
            Some(watch) => watch.waiting(wait).await,
            None => wait.await,
        }
    }

    /// Awaits work that others share: this image's time runs when that work's does.
    async fn as_runs<T>(&self, work_of: &Stopwatch, work: impl Future<Output = T>) -> T {
        match &self.watch {
            Some(watch) => watch.following(work_of, work).await,
            None => work.await,
        }
    }

    /// Waits until `bytes` more fit. Called before the bytes are read.
    ///
    /// # Errors
    /// `too_large` if one image may not have so many.
    pub async fn reserve(&self, bytes: u64) -> Result<Arc<OwnedSemaphorePermit>, ImageError> {
        let fits = u32::try_from(bytes).ok().filter(|b| *b <= self.image_bytes);
        let Some(bytes) = fits else { return Err(self.too_large(&bytes.to_string())) };
        self.waiting(Arc::clone(&self.bytes).acquire_many_owned(bytes))
            .await
            .map(Arc::new)
            .map_err(|_| ImageError::new(ImageErrorCode::Internal, "the byte budget was closed"))
    }

    /// Whether both are one budget.
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.bytes, &other.bytes) && self.image_bytes == other.image_bytes
    }

    /// The most bytes that one image may have.
    pub fn image_bytes(&self) -> u32 {
        self.image_bytes
    }

    /// The error for an image of this size.
    pub fn too_large(&self, bytes: &str) -> ImageError {
        ImageError::new(
            ImageErrorCode::TooLarge,
            format!(
                "the object has {bytes} bytes, the limit is {} (limits.image_bytes)",
                self.image_bytes
            ),
        )
    }
}

/// The most bytes of an object that is read or replaced in one piece: [`ObjectStore::get`] and
/// [`ObjectStore::replace`].
pub const SMALL_OBJECT_BYTES: u64 = 1 << 20;

/// The folder or bucket prefix that class sets live under. Keys are relative to it and never begin
/// with a slash.
///
/// Two kinds of objects: large ones that are created once and never change, and small ones that
/// point at them and are replaced by compare and swap, so that of two writers who saw the same
/// state one learns that it lost. Nothing is ever overwritten unseen.
#[async_trait]
pub trait ObjectStore: Send + Sync {
    /// The full name of a key, for messages.
    fn place(&self, key: &str) -> String;

    /// A small object whole, of at most [`SMALL_OBJECT_BYTES`]; [`Got::Unchanged`] if its ETag is
    /// `known`.
    ///
    /// # Errors
    /// [`ObjectError::TooLarge`], [`ObjectError::Unavailable`].
    async fn get(&self, key: &str, known: Option<&ETag>) -> Result<Got, ObjectError>;

    /// An object of any size, as a stream of chunks; none if there is none. Its size is known
    /// before any of it is read.
    ///
    /// # Errors
    /// [`ObjectError::Unavailable`].
    async fn open(&self, key: &str) -> Result<Option<Object>, ObjectError>;

    /// Writes an object that does not exist yet, whole or not at all.
    ///
    /// # Errors
    /// [`ObjectError::Exists`] if it does, [`ObjectError::Unavailable`].
    async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError>;

    /// Compare and swap of a small object: replaces the one whose ETag is `expected` (none: there
    /// must be none), whole or not at all. Yields the new ETag.
    ///
    /// Writers of the same bytes cannot be told apart, here and in [`create`](Self::create): a
    /// writer whose answer was lost and who finds its bytes in place has succeeded.
    ///
    /// # Errors
    /// [`ObjectError::Changed`] if it is another by now, [`ObjectError::TooLarge`],
    /// [`ObjectError::Unavailable`].
    async fn replace(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&ETag>,
    ) -> Result<ETag, ObjectError>;

    /// Everything directly below a folder's key (empty: the root), sorted by name. Names that begin
    /// with a dot are left out. A folder that does not exist is empty.
    ///
    /// # Errors
    /// [`ObjectError::Unavailable`].
    async fn list(&self, folder: &str) -> Result<Vec<Listed>, ObjectError>;
}

/// Which content an object has, as its store tells it. Opaque: only equality means something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ETag(String);

impl ETag {
    /// The ETag as the store gave it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ETag that a store gave.
    pub fn new(given: impl Into<String>) -> Self {
        Self(given.into())
    }
}

/// What [`ObjectStore::get`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Got {
    /// Nothing.
    Missing,
    /// What the caller knows.
    Unchanged,
    /// The object.
    Object {
        /// All of it.
        bytes: Bytes,
        /// Names this content in the next `get` or `replace`.
        etag: ETag,
    },
}

/// An object that is about to be read.
pub struct Object {
    /// How many bytes the chunks have together.
    pub bytes: u64,
    /// The content. It ends after `bytes` bytes or with an error, [`ObjectError::Unavailable`].
    pub chunks: BoxStream<'static, Result<Bytes, ObjectError>>,
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// An entry of a folder; names are relative to the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listed {
    /// A folder below it.
    Folder {
        /// Without a slash.
        name: String,
    },
    /// An object.
    Object {
        /// The last part of its key.
        name: String,
        /// Its size.
        bytes: u64,
        /// When it was last written.
        modified: SystemTime,
    },
}

impl Listed {
    /// The entry's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Folder { name } | Self::Object { name, .. } => name,
        }
    }
}

/// Why an object could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ObjectError {
    /// It was there already; it is immutable.
    #[error("{0} exists already, and a version is never overwritten: choose another version")]
    Exists(String),
    /// Another writer was faster; nothing was written.
    #[error("{0} was changed by somebody else in between: look at it again, then try again")]
    Changed(String),
    /// It is not one of the small objects.
    #[error("{0} has more than 1 MiB, the most that is read or written of it in one piece")]
    TooLarge(String),
    /// The store refused or did not answer.
    #[error("{0}")]
    Unavailable(#[source] Reason),
}

impl ObjectError {
    /// [`ObjectError::TooLarge`] unless `bytes` are within [`SMALL_OBJECT_BYTES`].
    pub fn unless_small(bytes: u64, place: impl FnOnce() -> String) -> Result<(), Self> {
        if bytes > SMALL_OBJECT_BYTES { Err(Self::TooLarge(place())) } else { Ok(()) }
    }
}

/// Routes `s3://` to one store and everything else to another: what `classify` uses.
pub struct Routed {
    /// For `s3://…`; none while nobody needs it.
    pub s3: Option<Arc<dyn ImageStore>>,
    /// For paths.
    pub local: Arc<dyn ImageStore>,
}

#[async_trait]
impl ImageStore for Routed {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        match &self.s3 {
            Some(s3) if uri.starts_with("s3://") => s3.fetch(uri, budget).await,
            _ => self.local.fetch(uri, budget).await,
        }
    }

    async fn probe(&self, uri: &str, budget: &ByteBudget) -> Result<(), ImageError> {
        match &self.s3 {
            Some(s3) if uri.starts_with("s3://") => s3.probe(uri, budget).await,
            _ => self.local.probe(uri, budget).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_budget_bounds_one_image_and_all_together() {
        let budget = ByteBudget::new(100, 60);
        assert_eq!(budget.reserve(61).await.unwrap_err().code, ImageErrorCode::TooLarge);
        assert_eq!(budget.reserve(u64::MAX).await.unwrap_err().code, ImageErrorCode::TooLarge);
        let first = budget.reserve(60).await.unwrap();
        let second = budget.reserve(41);
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(first);
        drop(second.await.unwrap());
    }
}
