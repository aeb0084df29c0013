//! S3 and what speaks its protocol.
//!
//! Credentials come the AWS way: environment, profile, web identity, instance role. Objects are
//! read without a HEAD first; the size is in the answer's header, and the body is read only once
//! it has its share of the byte budget. Class sets live in `objects`.

mod answers;
mod client;
mod objects;
pub mod probe;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use aws_sdk_s3::error::{DisplayErrorContext, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use bytes::BytesMut;
use tokio::sync::Semaphore;

use angler_core::store::{ByteBudget, Fetched, ImageStore};
use angler_wire::error::{ImageError, ImageErrorCode, StoreFault};

pub use crate::s3::answers::brief;
use crate::s3::answers::image_error;
pub use crate::s3::client::Clients;
pub use crate::s3::objects::S3Objects;

/// How to reach the store: `[s3]`.
#[derive(Debug, Clone, Default)]
pub struct S3Options {
    /// Another server than AWS's, for example `http://127.0.0.1:9000`.
    pub endpoint: Option<String>,
    /// None: as the environment or the profile says, else `us-east-1`.
    pub region: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`.
    pub path_style: bool,
    /// The buckets that images may come from; empty: any.
    pub allowed_buckets: Vec<String>,
    /// Requests at once.
    pub concurrency: usize,
    /// PEM file of authorities that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// A bucket and a key or prefix, out of `s3://bucket/key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Uri {
    /// The bucket.
    pub bucket: String,
    /// Everything behind the bucket's slash, as it is: no percent-decoding. May be empty.
    pub key: String,
}

/// What is wrong with an `s3://` URI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Another scheme, or none.
    #[error("{0:?} is not an s3:// URI")]
    Scheme(String),
    /// No bucket, or not a name of one.
    #[error("{0:?} has no valid bucket name")]
    Bucket(String),
    /// No key, where an object is named.
    #[error("{0:?} names a bucket but no key")]
    NoKey(String),
    /// A key of more bytes than S3 allows.
    #[error("the key has {0} bytes, S3 allows 1024")]
    Key(usize),
}

impl S3Uri {
    /// Reads `s3://bucket/key`.
    ///
    /// # Errors
    /// [`UriError`].
    pub fn parse(uri: &str) -> Result<Self, UriError> {
        let rest = uri.strip_prefix("s3://").ok_or_else(|| UriError::Scheme(uri.to_owned()))?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        // https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, with the
        // upper case and underscores that old buckets and other servers have.
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if bucket.is_empty() || bucket.len() > 255 || !bucket.chars().all(allowed) {
            return Err(UriError::Bucket(uri.to_owned()));
        }
        // S3's own limit on a key, in bytes of UTF-8.
        if key.len() > 1024 {
            return Err(UriError::Key(key.len()));
        }
        Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }

    /// Reads `s3://bucket/key` of one object: the key is not empty.
    ///
    /// # Errors
    /// [`UriError`].
    pub fn object(uri: &str) -> Result<Self, UriError> {
        let parsed = Self::parse(uri)?;
        match parsed.key.is_empty() {
            true => Err(UriError::NoKey(uri.to_owned())),
            false => Ok(parsed),
        }
    }
}

/// Images in S3.
#[derive(Clone)]
pub struct S3Images {
    clients: Clients,
    allowed_buckets: Arc<[String]>,
    requests: Arc<Semaphore>,
}

impl S3Images {
    /// Images through `clients`, within what `options` allow.
    pub fn new(clients: impl Into<Clients>, options: &S3Options) -> Self {
        Self {
            clients: clients.into(),
            allowed_buckets: options.allowed_buckets.clone().into(),
            requests: Arc::new(Semaphore::new(options.concurrency.max(1))),
        }
    }

    /// The keys below a prefix, as URIs, in the store's order.
    ///
    /// # Errors
    /// What the store said.
    pub async fn list(&self, prefix: &S3Uri) -> Result<Vec<String>, ImageError> {
        let mut uris = Vec::new();
        self.each_page(prefix, |page| {
            uris.extend(page);
            true
        })
        .await?;
        Ok(uris)
    }

    /// The same, page by page of up to 1,000, until `seen` says that it is enough.
    ///
    /// # Errors
    /// What the store said.
    pub async fn each_page(
        &self,
        prefix: &S3Uri,
        mut seen: impl FnMut(Vec<String>) -> bool,
    ) -> Result<(), ImageError> {
        let list = self.clients.get().list_objects_v2();
        let list = list.bucket(&prefix.bucket).prefix(&prefix.key);
        let mut pages = list.into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| image_error(&e, &prefix.bucket, &prefix.key))?;
            let keys = page.contents().iter().filter_map(|object| object.key());
            let uris = keys
                .filter(|key| !key.ends_with('/'))
                .map(|key| format!("s3://{}/{key}", prefix.bucket));
            if !seen(uris.collect()) {
                break;
            }
        }
        Ok(())
    }
}

/// A key without a character that signatures could go wrong over. It need not exist.
const PLAIN_KEY: &str = "angler-probe";

impl S3Images {
    /// Asks for the object's first byte. That it has none, or is archived, is an answer.
    async fn touch(&self, bucket: &str, key: &str) -> Result<(), ImageError> {
        let asked = Instant::now();
        let get = self.clients.get().get_object().bucket(bucket).key(key).range("bytes=0-0");
        match self.clients.checked(asked, get.send().await).await {
            Err(SdkError::ServiceError(e)) if e.raw().status().as_u16() == 416 => Ok(()),
            Err(SdkError::ServiceError(e)) if e.err().is_invalid_object_state() => Ok(()),
            answer => answer.map(drop).map_err(|e| image_error(&e, bucket, key)),
        }
    }
}

fn parsed(uri: &str) -> Result<S3Uri, ImageError> {
    S3Uri::object(uri).map_err(|e| ImageError::new(ImageErrorCode::BadUri, e.to_string()))
}

#[async_trait]
impl ImageStore for S3Images {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        let S3Uri { bucket, key } = parsed(uri)?;
        if !self.allowed_buckets.is_empty() && !self.allowed_buckets.contains(&bucket) {
            return Err(ImageError::new(
                ImageErrorCode::BucketNotAllowed,
                format!("bucket {bucket} is not in s3.allowed_buckets"),
            ));
        }
        let _turn = budget.waiting(self.requests.acquire()).await.map_err(|_| {
            ImageError::new(ImageErrorCode::Internal, "the store's request limit was closed")
        })?;
        let asked = Instant::now();
        let object = self.clients.get().get_object().bucket(&bucket).key(&key).send().await;
        let object = self.clients.checked(asked, object).await;
        read_body(object.map_err(|e| image_error(&e, &bucket, &key))?, budget).await
    }

    async fn probe(&self, uri: &str, _: &ByteBudget) -> Result<(), ImageError> {
        let S3Uri { bucket, key } = parsed(uri)?;
        let answer = self.touch(&bucket, &key).await;
        if !answer.as_ref().is_err_and(|e| e.fault == StoreFault::Credentials) {
            return answer;
        }
        // Some servers and proxies get the signature of an unusual key wrong: only if a plain key
        // fails as well are the credentials to blame.
        match self.touch(&bucket, PLAIN_KEY).await {
            Err(error) if error.fault == StoreFault::Credentials => Err(error),
            _ => Ok(()),
        }
    }
}

async fn read_body(object: GetObjectOutput, budget: &ByteBudget) -> Result<Fetched, ImageError> {
    // Without a length (chunked answers of some servers) the whole limit is reserved.
    let declared = object.content_length().and_then(|length| u64::try_from(length).ok());
    let permit = budget.reserve(declared.unwrap_or(budget.image_bytes().into())).await?;
    let limit = permit.num_permits();
    let mut body = object.body;
    // A larger object comes in many chunks, and decoders want it in one piece: the one copy on its
    // way, into memory that is reserved once. It takes a hundredth of the time of its decoding.
    let mut bytes = BytesMut::with_capacity(declared.map_or(0, |_| limit));
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|e| {
            let message = format!("the answer broke off: {}", DisplayErrorContext(&e));
            ImageError::new(ImageErrorCode::StorageUnavailable, message)
        })?;
        if bytes.len() + chunk.len() > limit {
            return Err(budget.too_large(&format!("more than {limit}")));
        }
        // Small objects come in one chunk: it is taken as it is.
        if bytes.is_empty() && chunk.len() == limit {
            return Ok(Fetched { bytes: chunk, permit });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Fetched { bytes: bytes.freeze(), permit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_taken_apart_as_they_are() {
        let uri = S3Uri::parse("s3://photos/a b/%20/ü.jpg").unwrap();
        assert_eq!((uri.bucket.as_str(), uri.key.as_str()), ("photos", "a b/%20/ü.jpg"));
        assert_eq!(S3Uri::parse("s3://photos").unwrap().key, "");
        for bad in ["http://a/b", "s3:/a/b", "s3:///key", "s3://a b/k", "S3://a/b", "/etc/passwd"] {
            assert!(S3Uri::parse(bad).is_err(), "{bad}");
        }
        assert!(S3Uri::parse(&format!("s3://b/{}", "k".repeat(1025))).is_err());
    }
}
