//! Where bytes come from: images ([`ImageStore`]), and the files of class sets ([`ObjectStore`]).

pub mod local;
pub mod s3;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ImageError, ImageErrorCode};

/// Fetches images.
#[async_trait]
pub trait ImageStore: Send + Sync {
    /// The object's bytes, as many as the budget allows.
    ///
    /// # Errors
    /// `not_found`, `access_denied`, `bucket_not_allowed`, `bad_uri`, `too_large`,
    /// `storage_unavailable`.
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError>;
}

/// An image's encoded bytes and their share of the budget, which is given back on drop.
#[derive(Debug)]
pub struct Fetched {
    /// The encoded image.
    pub bytes: Bytes,
    /// What the bytes hold of `limits.bytes_in_flight`.
    pub permit: OwnedSemaphorePermit,
}

/// Bounds the encoded bytes that are in memory at once, over all jobs.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    bytes: Arc<Semaphore>,
    image_bytes: u32,
}

impl ByteBudget {
    /// At most `in_flight` bytes at once, at most `image_bytes` for one image. An image may always
    /// use its limit, so `in_flight` is raised to it if it is smaller.
    pub fn new(in_flight: usize, image_bytes: u32) -> Self {
        let in_flight = in_flight.max(image_bytes as usize).min(Semaphore::MAX_PERMITS);
        Self { bytes: Arc::new(Semaphore::new(in_flight)), image_bytes }
    }

    /// Waits until `bytes` more fit. Called before the bytes are read.
    ///
    /// # Errors
    /// `too_large` if one image may not have so many.
    pub async fn reserve(&self, bytes: u64) -> Result<OwnedSemaphorePermit, ImageError> {
        let fits = u32::try_from(bytes).ok().filter(|b| *b <= self.image_bytes);
        let Some(bytes) = fits else { return Err(self.too_large(&bytes.to_string())) };
        Arc::clone(&self.bytes)
            .acquire_many_owned(bytes)
            .await
            .map_err(|_| ImageError::new(ImageErrorCode::Internal, "the byte budget was closed"))
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

/// The folder or bucket prefix that class sets live under. Keys are relative to it and never begin
/// with a slash.
#[async_trait]
pub trait ObjectStore: Send + Sync {
    /// The full name of a key, for messages.
    fn place(&self, key: &str) -> String;

    /// The object, or none if there is none.
    ///
    /// # Errors
    /// [`ObjectError::Unavailable`].
    async fn get(&self, key: &str) -> Result<Option<Bytes>, ObjectError>;

    /// Writes an object that does not exist yet, whole or not at all.
    ///
    /// # Errors
    /// [`ObjectError::Exists`] if it does, [`ObjectError::Unavailable`].
    async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError>;
}

/// Why an object could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ObjectError {
    /// It was there already; it is immutable.
    #[error("{0} exists already, and a version is never overwritten: choose another version")]
    Exists(String),
    /// The store refused or did not answer.
    #[error("{0}")]
    Unavailable(String),
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
