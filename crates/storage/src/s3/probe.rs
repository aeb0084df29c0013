//! Small questions to a store, a request each, for whoever looks for what is wrong with it. The answers
//! are sorted by what there is to do about them.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;

use super::answers::{brief, no_credentials, rejects_credentials};

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing answers there.
    #[error("the store cannot be reached: {0}")]
    Unreachable(String),
    /// Nothing to sign a request with.
    #[error("there are no credentials: {0}")]
    NoCredentials(String),
    /// The store does not know them, or they do not fit.
    #[error("the store rejected the credentials: {0}")]
    WrongCredentials(String),
    /// Good credentials that may not do this.
    #[error("the credentials may not do this: {0}")]
    Denied(String),
    /// No such bucket.
    #[error("there is no such bucket")]
    NoBucket,
    /// The bucket is in another region, or the store in another than the request was signed for.
    #[error("the bucket is not in this region: {0}")]
    Elsewhere(String),
    /// Anything else.
    #[error("the store answered {0}")]
    Other(String),
}

/// What became of a write under a condition that cannot hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConditionalWrite {
    /// It was refused, as it must be; nothing was written.
    Refused,
    /// The store said that it does not know conditions; nothing was written.
    Unknown(String),
    /// It was written all the same, and taken away again.
    Ignored,
    /// It was written all the same and could not be taken away: what is left, and why.
    Left(String),
}

/// One bucket.
pub struct Probe {
    client: Client,
    bucket: String,
}

impl Probe {
    /// Questions about `bucket`.
    pub fn new(client: Client, bucket: &str) -> Self {
        Self { client, bucket: bucket.to_owned() }
    }

    /// Lists below a prefix; yields the first key, if there is any.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn first_key(&self, prefix: &str) -> Result<Option<String>, Refusal> {
        let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).max_keys(1);
        let page = list.send().await.map_err(|e| refusal(&e))?;
        Ok(page.contents().first().and_then(|object| object.key()).map(str::to_owned))
    }

    /// Reads one byte of an object; yields whether there is one.
    ///
    /// # Errors
    /// [`Refusal`].
    pub async fn read(&self, key: &str) -> Result<bool, Refusal> {
        let get = self.client.get_object().bucket(&self.bucket).key(key).range("bytes=0-0");
        match get.send().await {
            Ok(_) => Ok(true),
            Err(SdkError::ServiceError(e)) if e.err().code() == Some("NoSuchKey") => Ok(false),
            // An empty object has no first byte.
            Err(SdkError::ServiceError(e)) if e.raw().status().as_u16() == 416 => Ok(true),
            Err(error) => Err(refusal(&error)),
        }
    }

    /// Whether the store looks at the condition of a write. `key` must be one that nobody else has.
    ///
    /// The safest way to ask: an empty object is put under a key that does not exist, if it has an
    /// ETag that no object has. A store that looks has nothing to replace and refuses. One that does
    /// not look makes a new object, which harms nobody and is deleted. (`If-None-Match: *` on an
    /// object that exists would ask as well, and a store that does not look would overwrite it.)
    ///
    /// # Errors
    /// [`Refusal`]; nothing was written then.
    pub async fn conditional_write(&self, key: &str) -> Result<ConditionalWrite, Refusal> {
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_match("\"00000000000000000000000000000000\"")
            .body(ByteStream::from_static(b""));
        // Sent once: after a lost answer the object may be there.
        let once = aws_sdk_s3::config::Builder::new().retry_config(RetryConfig::disabled());
        let error = match put.customize().config_override(once).send().await {
            Ok(_) => return Ok(self.take_away(key).await),
            Err(error) => error,
        };
        if let SdkError::ServiceError(answer) = &error {
            let status = answer.raw().status().as_u16();
            match (status, answer.err().code().unwrap_or("without an error code")) {
                (412, _) => return Ok(ConditionalWrite::Refused),
                (404, code) if code != "NoSuchBucket" => return Ok(ConditionalWrite::Refused),
                (501, code) | (400, code @ "NotImplemented") => {
                    return Ok(ConditionalWrite::Unknown(format!("{status} {code}")));
                }
                _ => {}
            }
        }
        // Without an answer, or with a gateway's, it may have been written.
        let was_refused = match &error {
            SdkError::ConstructionFailure(_) => true,
            SdkError::ServiceError(answer) => answer.raw().status().as_u16() < 500,
            _ => false,
        };
        if !was_refused && self.read(key).await == Ok(true) {
            return Ok(self.take_away(key).await);
        }
        Err(refusal(&error))
    }

    async fn take_away(&self, key: &str) -> ConditionalWrite {
        let delete = self.client.delete_object().bucket(&self.bucket).key(key).send().await;
        match delete {
            Ok(_) => ConditionalWrite::Ignored,
            Err(error) => {
                let place = format!("s3://{}/{key}", self.bucket);
                ConditionalWrite::Left(format!("{place}, which is empty: {}", refusal(&error)))
            }
        }
    }
}

/// How many buckets the credentials see: a question for where no bucket is known.
///
/// # Errors
/// [`Refusal`]; many credentials may not ask.
pub async fn buckets(client: &Client) -> Result<usize, Refusal> {
    let answer = client.list_buckets().send().await.map_err(|e| refusal(&e))?;
    Ok(answer.buckets().len())
}

/// Error codes: <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>.
fn refusal<E>(error: &SdkError<E, HttpResponse>) -> Refusal
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let SdkError::ServiceError(answer) = error else {
        return match no_credentials(error) {
            Some(cause) => Refusal::NoCredentials(cause),
            None => Refusal::Unreachable(brief(error)),
        };
    };
    let status = answer.raw().status().as_u16();
    let code = answer.err().code().unwrap_or("without an error code");
    let said = format!("{status} {code}");
    match (status, code) {
        (_, "NoSuchBucket") => Refusal::NoBucket,
        _ if rejects_credentials(status, code) => Refusal::WrongCredentials(said),
        (301 | 307, _)
        | (
            _,
            "PermanentRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException",
        ) => Refusal::Elsewhere(said),
        (403, _) => Refusal::Denied(said),
        _ => Refusal::Other(said),
    }
}
