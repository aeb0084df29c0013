//! Class sets under a bucket's prefix.
//!
//! Every write is conditional (`If-None-Match: *` or `If-Match`): of two writers one gets 412.
//! Such a request must not be sent twice: if the first answer is lost, the second is 412 although
//! the object is ours. So the client's own retries are off for writes, and a writer that got no
//! answer reads the object back: if it is byte for byte what was sent, the write took place.

use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::Object as Entry;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{StreamExt, stream};

use angler_core::store::{ETag, Got, Listed, Object, ObjectError, ObjectStore};

use super::{Clients, S3Uri, brief};

/// Bytes a second (2 Mbit/s) that an upload makes at least; slower ones are given up.
const SLOWEST_UPLOAD: u64 = 256 << 10;

/// Class sets under a bucket's prefix.
#[derive(Clone)]
pub struct S3Objects {
    clients: Clients,
    root: S3Uri,
}

/// The answer to a GET.
enum Found {
    /// The object, before its body.
    Object(Box<GetObjectOutput>),
    /// The one whose ETag is known.
    Unchanged,
    Missing,
}

/// What became of a conditional write.
enum Put {
    /// It took place; the ETag is missing if the store gives none.
    Written(Option<ETag>),
    /// The condition did not hold.
    Refused,
    /// Another write of the same key was under way. Nothing was written.
    Conflict,
}

impl S3Objects {
    /// Objects under `root`, with or without a slash at its end.
    pub fn new(clients: impl Into<Clients>, mut root: S3Uri) -> Self {
        if !root.key.is_empty() && !root.key.ends_with('/') {
            root.key.push('/');
        }
        Self { clients: clients.into(), root }
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.root.key)
    }

    async fn find(&self, key: &str, known: Option<&ETag>) -> Result<Found, ObjectError> {
        let asked = Instant::now();
        let get = self.clients.get().get_object().bucket(&self.root.bucket).key(self.key(key));
        let request = get.set_if_none_match(known.map(|etag| etag.as_str().to_owned()));
        match self.clients.checked(asked, request.send().await).await {
            Ok(object) => Ok(Found::Object(Box::new(object))),
            // The client takes every answer but 2xx for an error.
            Err(SdkError::ServiceError(e))
                if known.is_some() && e.raw().status().as_u16() == 304 =>
            {
                Ok(Found::Unchanged)
            }
            Err(SdkError::ServiceError(e)) if e.err().code() == Some("NoSuchKey") => {
                Ok(Found::Missing)
            }
            Err(e) => Err(self.unavailable(key, &reason(&e))),
        }
    }

    /// Writes under a condition: the present ETag, or (none) that there is no object.
    async fn put(
        &self,
        key: &str,
        body: &Bytes,
        expected: Option<&ETag>,
    ) -> Result<Put, ObjectError> {
        let request = self
            .clients
            .get()
            .put_object()
            .bucket(&self.root.bucket)
            .key(self.key(key))
            .body(ByteStream::from(body.clone()));
        let request = match expected {
            Some(etag) => request.if_match(etag.as_str()),
            None => request.if_none_match("*"),
        };
        let error = match request.customize().config_override(once(body.len())).send().await {
            Ok(answer) => return Ok(Put::Written(answer.e_tag().map(ETag::new))),
            Err(error) => error,
        };
        match &error {
            SdkError::ServiceError(answer) => {
                let code = answer.err().code().unwrap_or_default();
                match answer.raw().status().as_u16() {
                    412 => Ok(Put::Refused),
                    // It was deleted.
                    404 if expected.is_some() && code != "NoSuchBucket" => Ok(Put::Refused),
                    409 if code == "ConditionalRequestConflict" => Ok(Put::Conflict),
                    // Also what a gateway says of a server that it lost: the write may have happened.
                    500.. => self.read_back(key, body, &reason(&error)).await,
                    _ => Err(self.unavailable(key, &reason(&error))),
                }
            }
            // Nothing was sent.
            SdkError::ConstructionFailure(_) => Err(self.unavailable(key, &reason(&error))),
            _ => self.read_back(key, body, &reason(&error)).await,
        }
    }

    /// Whether a write without an answer took place: whether its bytes are there.
    async fn read_back(&self, key: &str, body: &Bytes, why: &str) -> Result<Put, ObjectError> {
        let found = match self.holds(key, body).await {
            Ok(Some(written)) => return Ok(written),
            Ok(None) => "what is there now is not what was sent",
            Err(_) => "it could not be read back either, so it may have been written",
        };
        Err(self.unavailable(key, &format!("{why}; {found}: look at it before you try again")))
    }

    async fn holds(&self, key: &str, body: &Bytes) -> Result<Option<Put>, ObjectError> {
        let Found::Object(object) = self.find(key, None).await? else { return Ok(None) };
        if self.length(key, &object)? != body.len() as u64 {
            return Ok(None);
        }
        let etag = object.e_tag().map(ETag::new);
        let mut rest = body.clone();
        let mut found = object.body;
        while let Some(chunk) = found.next().await {
            let chunk = chunk.map_err(|e| self.broke_off(key, &e))?;
            if !rest.starts_with(&chunk) {
                return Ok(None);
            }
            rest.advance(chunk.len());
        }
        Ok(rest.is_empty().then_some(Put::Written(etag)))
    }

    fn length(&self, key: &str, object: &GetObjectOutput) -> Result<u64, ObjectError> {
        let length = object.content_length().and_then(|length| u64::try_from(length).ok());
        length.ok_or_else(|| self.unavailable(key, "the store answered without a Content-Length"))
    }

    /// An entry of a listing by its name below `folder`; none for the folder's own marker, an
    /// object that some tools make.
    fn listed(&self, folder: &str, entry: &Entry) -> Result<Option<Listed>, ObjectError> {
        let modified = entry.last_modified().and_then(|at| SystemTime::try_from(*at).ok());
        let bytes = entry.size().and_then(|bytes| u64::try_from(bytes).ok());
        let (Some(key), Some(bytes), Some(modified)) = (entry.key(), bytes, modified) else {
            let message = "the store listed an object without its key, size or time";
            let reason = format!("s3://{}/{folder}: {message}", self.root.bucket);
            return Err(ObjectError::Unavailable(reason.into()));
        };
        let name = key.strip_prefix(folder).filter(|name| is_listed(name));
        Ok(name.map(|name| Listed::Object { name: name.to_owned(), bytes, modified }))
    }

    fn broke_off(&self, key: &str, error: &(impl std::error::Error + 'static)) -> ObjectError {
        self.unavailable(key, &format!("the answer broke off: {}", DisplayErrorContext(error)))
    }

    fn unavailable(&self, key: &str, reason: &str) -> ObjectError {
        ObjectError::Unavailable(format!("{}: {reason}", self.place(key)).into())
    }
}

#[async_trait]
impl ObjectStore for S3Objects {
    fn place(&self, key: &str) -> String {
        format!("s3://{}/{}{key}", self.root.bucket, self.root.key)
    }

    async fn get(&self, key: &str, known: Option<&ETag>) -> Result<Got, ObjectError> {
        let object = match self.find(key, known).await? {
            Found::Object(object) => object,
            Found::Unchanged => return Ok(Got::Unchanged),
            Found::Missing => return Ok(Got::Missing),
        };
        let etag = object.e_tag().map(ETag::new);
        let etag = etag.ok_or_else(|| self.unavailable(key, NO_ETAG))?;
        // Before the body is read; without a length, while it is.
        let length = object.content_length().and_then(|length| u64::try_from(length).ok());
        ObjectError::unless_small(length.unwrap_or(0), || self.place(key))?;
        let mut bytes = BytesMut::new();
        let mut body = object.body;
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|e| self.broke_off(key, &e))?;
            ObjectError::unless_small((bytes.len() + chunk.len()) as u64, || self.place(key))?;
            bytes.extend_from_slice(&chunk);
        }
        Ok(Got::Object { bytes: bytes.freeze(), etag })
    }

    async fn open(&self, key: &str) -> Result<Option<Object>, ObjectError> {
        let Found::Object(object) = self.find(key, None).await? else { return Ok(None) };
        let bytes = self.length(key, &object)?;
        let (store, key) = (self.clone(), key.to_owned());
        // The HTTP client sees to it that the body has the length that was declared.
        let chunks =
            stream::try_unfold((object.body, store, key), |(mut body, store, key)| async {
                match body.next().await {
                    Some(Ok(chunk)) => Ok(Some((chunk, (body, store, key)))),
                    Some(Err(e)) => Err(store.broke_off(&key, &e)),
                    None => Ok(None),
                }
            });
        Ok(Some(Object { bytes, chunks: chunks.boxed() }))
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<(), ObjectError> {
        match self.put(key, &body, None).await? {
            Put::Written(_) => Ok(()),
            Put::Refused => Err(ObjectError::Exists(self.place(key))),
            // The other write may be a deletion, or fail.
            Put::Conflict => match self.find(key, None).await? {
                Found::Object(_) => Err(ObjectError::Exists(self.place(key))),
                _ => Err(self.unavailable(key, "it is being written by another: try again")),
            },
        }
    }

    async fn replace(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&ETag>,
    ) -> Result<ETag, ObjectError> {
        ObjectError::unless_small(body.len() as u64, || self.place(key))?;
        match self.put(key, &body, expected).await? {
            Put::Written(etag) => etag.ok_or_else(|| self.unavailable(key, NO_ETAG)),
            Put::Refused | Put::Conflict => Err(ObjectError::Changed(self.place(key))),
        }
    }

    async fn list(&self, folder: &str) -> Result<Vec<Listed>, ObjectError> {
        let mut prefix = self.key(folder);
        if !prefix.is_empty() && !prefix.ends_with('/') {
            prefix.push('/');
        }
        let mut pages = self
            .clients
            .get()
            .list_objects_v2()
            .bucket(&self.root.bucket)
            .prefix(&prefix)
            .delimiter("/")
            .into_paginator()
            .send();
        let mut listed = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| self.unavailable(folder, &reason(&e)))?;
            for entry in page.contents() {
                listed.extend(self.listed(&prefix, entry)?);
            }
            let folders = page.common_prefixes().iter().filter_map(|folder| folder.prefix());
            let names = folders.filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix('/'));
            listed.extend(
                names
                    .filter(|name| is_listed(name))
                    .map(|name| Listed::Folder { name: name.to_owned() }),
            );
        }
        listed.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(listed)
    }
}

/// Such a store cannot compare and swap.
const NO_ETAG: &str = "the store answered without an ETag";

fn is_listed(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.')
}

/// Settings of a write: tried once, with time for its body. The client's own limits are for
/// requests without one.
fn once(bytes: usize) -> aws_sdk_s3::config::Builder {
    let upload = Duration::from_secs(bytes as u64 / SLOWEST_UPLOAD);
    let timeouts = TimeoutConfig::builder()
        .read_timeout(Duration::from_secs(20) + upload)
        .operation_timeout(Duration::from_secs(60) + upload)
        .build();
    aws_sdk_s3::config::Builder::new()
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
}

fn reason<E>(error: &SdkError<E, HttpResponse>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match error {
        SdkError::ServiceError(answer) => format!(
            "the store answered {} {}",
            answer.raw().status().as_u16(),
            answer.err().code().unwrap_or("without an error code")
        ),
        other => brief(other),
    }
}
