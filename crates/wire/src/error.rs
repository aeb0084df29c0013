//! The errors that a user can meet, as closed sets.
//!
//! * [`ImageError`] belongs to one image and goes into the job's result.
//! * [`JobError`] belongs to one job and decides how its delivery settles.
//! * [`FatalError`] ends the worker, with its deliveries unacked.
//!
//! The codes are part of the wire contract: producers branch on them, so none is ever renamed.

use std::error::Error;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strum::{EnumCount, IntoStaticStr, VariantNames};

use crate::text::cut;

/// Why something failed or was refused: a sentence for a person, and the error behind it, if there is
/// one. It is for reasons that no caller tells apart.
#[derive(Debug, Clone)]
pub struct Reason {
    text: String,
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// By hand, so that the cause and not the `Arc` around it is the source: it can be told by its type.
impl Error for Reason {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl Reason {
    /// A sentence, without the text of its cause, which [`chain`](crate::text::chain) appends.
    pub fn new(text: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { text: text.into(), cause: Some(cause.into().into()) }
    }

    /// An error that needs no other words than its own.
    pub fn of(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let error = error.into();
        Self::new(error.to_string(), error)
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self { text, cause: None }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// Why one image has no label. Written in snake case into the result's `error.code`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    strum::Display,
    EnumCount,
    IntoStaticStr,
    VariantNames,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ImageErrorCode {
    /// The bucket or the key does not exist.
    NotFound,
    /// The store denied the worker, whose credentials it accepts, access to this object.
    AccessDenied,
    /// The bucket is not in `s3.allowed_buckets`.
    BucketNotAllowed,
    /// Not a URI that this worker fetches.
    BadUri,
    /// More bytes or pixels than the limits allow.
    TooLarge,
    /// Not an image, or of a format that angler does not decode.
    UnsupportedFormat,
    /// An image of a known format that cannot be decoded.
    CorruptImage,
    /// The store did not answer, answered that it cannot at present, or rejected the worker's
    /// credentials.
    StorageUnavailable,
    /// The image was not ready within `limits.image_seconds`.
    Timeout,
    /// A fault of angler's own.
    Internal,
}

impl ImageErrorCode {
    /// Returns the code as results name it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// One image's failure: it fails no neighbour in the batch and no other job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ImageError {
    /// What kind of failure, from a closed set.
    pub code: ImageErrorCode,
    /// What was wrong and where, for a person.
    pub message: String,
    /// What the error says about the store. Not part of a result.
    #[serde(skip)]
    pub fault: StoreFault,
}

/// What an image's error says about the store as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StoreFault {
    /// Nothing.
    #[default]
    None,
    /// The store rejected the worker's credentials, or the worker has none.
    Credentials,
    /// The store denied access to this object, and this worker has not read any object yet: the
    /// worker may lack a grant for all of them.
    Unconfirmed,
    /// The worker could not read any object at the time, so the attempt does not count.
    Outage,
}

impl ImageError {
    /// An error of this kind with a message for a person, of which at most 1,000 characters are kept.
    pub fn new(code: ImageErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: bounded(message.into()), fault: StoreFault::None }
    }

    /// The error of a request whose credentials were rejected or missing.
    pub fn credentials(message: impl Into<String>) -> Self {
        Self::new(ImageErrorCode::StorageUnavailable, message).with(StoreFault::Credentials)
    }

    /// The same error, saying this about the store.
    #[must_use]
    pub fn with(self, fault: StoreFault) -> Self {
        Self { fault, ..self }
    }

    /// `true` if another attempt at the same image may succeed, because the fault may lie with the
    /// store and not with the image.
    pub fn is_transient(&self) -> bool {
        self.code == ImageErrorCode::StorageUnavailable || self.fault != StoreFault::None
    }
}

/// The most characters of a message. It may quote what it complains of, which may be megabytes long,
/// and goes into a header of one frame, log lines and spans.
const MESSAGE_CHARS: usize = 1000;

fn bounded(message: String) -> String {
    if message.len() <= MESSAGE_CHARS { message } else { cut(&message, MESSAGE_CHARS) }
}

/// Why a whole job failed. Written in snake case into the result's `error.code`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    strum::Display,
    EnumCount,
    IntoStaticStr,
    VariantNames,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum FailureCode {
    /// The message is not a job.
    MalformedJob,
    /// No such class set, or it has no active version.
    UnknownClassSet,
    /// The class set has no such version.
    UnknownVersion,
    /// The class vectors were made with another model than the one that runs.
    ModelMismatch,
    /// More images than `limits.images_per_job`.
    TooManyImages,
    /// Every attempt failed for a reason that looked temporary.
    RetriesExhausted,
    /// The bulk run that it belongs to was cancelled.
    Cancelled,
    /// The broker accepts no message as large as its result.
    ResultTooLarge,
}

impl FailureCode {
    /// Returns the code as results and the header `angler-reason` name it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// A whole job's terminal failure, as it stands in a result with `"status": "failed"`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure, from a closed set.
    pub code: FailureCode,
    /// What was wrong and what to do, for a person.
    pub message: String,
}

impl Failure {
    /// A failure of this kind with a message for a person, of which at most 1,000 characters are kept.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: bounded(message.into()) }
    }
}

/// Why a job did not end with a label for each image: decides how its delivery settles.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// No further attempt can help: a `failed` result is published and the delivery acked.
    #[error("{0}")]
    Failed(#[from] Failure),
    /// A later attempt may help: the job goes to a retry queue. Made by [`JobError::transient`].
    #[error("{0}")]
    Transient(String),
    /// The worker stops or has lost the delivery: it is given back as it came.
    #[error("given back: {0}")]
    Abandoned(&'static str),
}

impl JobError {
    /// A failure that may pass, for this reason, of which at most 1,000 characters are kept.
    pub fn transient(reason: impl Into<String>) -> Self {
        Self::Transient(bounded(reason.into()))
    }
}

/// The worker cannot go on. It exits non-zero and its deliveries stay unacked, so that another
/// worker gets them.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FatalError {
    /// The back end is broken for good, or its thread is gone.
    #[error("the embedding back end stopped working: {0}")]
    Engine(#[source] Reason),
    /// Results can no longer be written.
    #[error("results cannot be written: {0}")]
    Sink(#[source] Reason),
    /// What was admitted was not finished in time; it stays unacked.
    #[error(
        "{jobs} admitted jobs were not finished within the {seconds} s of shutdown.grace_seconds; they are delivered again to another worker"
    )]
    DrainTimedOut {
        /// Jobs still in flight.
        jobs: usize,
        /// The grace period.
        seconds: u64,
    },
}
