//! S3 and what speaks its protocol.
//!
//! Credentials come the AWS way: environment, profile, web identity, instance role. Objects are
//! read without a HEAD first; the size is in the answer's header, and the body is read only once
//! it has its share of the byte budget. Class sets live in `objects`.

mod objects;
pub mod probe;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Region, SharedHttpClient};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use bytes::BytesMut;
use tokio::sync::Semaphore;

pub use self::objects::S3Objects;
use super::{ByteBudget, Fetched, ImageStore};
use crate::error::{ImageError, ImageErrorCode};
use crate::tls::{STORE, TlsError, system_has_authorities};

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

impl S3Uri {
    /// Reads `s3://bucket/key`.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(uri: &str) -> Result<Self, String> {
        let rest =
            uri.strip_prefix("s3://").ok_or_else(|| format!("{uri:?} is not an s3:// URI"))?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        // https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, with the
        // upper case and underscores that old buckets and other servers have.
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if bucket.is_empty() || bucket.len() > 255 || !bucket.chars().all(allowed) {
            return Err(format!("{uri:?} has no valid bucket name"));
        }
        // S3's own limit on a key, in bytes of UTF-8.
        if key.len() > 1024 {
            return Err(format!("the key has {} bytes, S3 allows 1024", key.len()));
        }
        Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }
}

/// A client that reconnects, retries and times out on its own.
///
/// Throttling and 5xx answers are tried again with a short backoff, three times in all, before an
/// error reaches the caller, which knows how long there is to wait.
///
/// # Errors
/// If `ca_file` cannot be used.
pub async fn client(options: &S3Options) -> Result<Client, TlsError> {
    let chain = RegionProviderChain::first_try(options.region.clone().map(Region::new));
    // Another server than AWS's has no instance metadata to ask, and asking takes seconds.
    let chain = match options.endpoint {
        Some(_) => chain.or_else(EnvironmentVariableRegionProvider::new()),
        None => chain.or_default_provider(),
    };
    let chain = chain.or_else(Region::from_static("us-east-1"));
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(5))
        .read_timeout(Duration::from_secs(20))
        .operation_timeout(Duration::from_secs(60))
        .build();
    let retries = RetryConfig::standard()
        .with_max_attempts(3)
        .with_initial_backoff(Duration::from_millis(200));
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
    if let Some(path) = &options.ca_file {
        // For whoever hands out credentials as well.
        loader = loader.http_client(http_client(path)?);
    }
    let shared = loader.region(chain).timeout_config(timeouts).retry_config(retries).load().await;
    let mut config =
        aws_sdk_s3::config::Builder::from(&shared).force_path_style(options.path_style);
    if let Some(endpoint) = &options.endpoint {
        config = config.endpoint_url(endpoint);
    }
    Ok(Client::from_conf(config.build()))
}

/// The SDK's own HTTP client, proxies from the environment included, with more authorities.
fn http_client(ca_file: &Path) -> Result<SharedHttpClient, TlsError> {
    // Checked here: the client panics at what it cannot read.
    let (pem, _) = STORE.authorities(ca_file)?;
    let trusted =
        TrustStore::empty().with_native_roots(system_has_authorities()).with_pem_certificate(pem);
    let context = TlsContext::builder().with_trust_store(trusted).build();
    let context = context.map_err(|e| STORE.refused(ca_file, &e.to_string()))?;
    Ok(Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = ConnectorBuilder::default()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .tls_context(context.clone())
            .proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector.build()
    }))
}

/// Images in S3.
#[derive(Clone)]
pub struct S3Images {
    client: Client,
    allowed_buckets: Arc<[String]>,
    requests: Arc<Semaphore>,
}

impl S3Images {
    /// Images through `client`, within what `options` allow.
    pub fn new(client: Client, options: &S3Options) -> Self {
        Self {
            client,
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
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(&prefix.bucket)
            .prefix(&prefix.key)
            .into_paginator()
            .send();
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

#[async_trait]
impl ImageStore for S3Images {
    async fn fetch(&self, uri: &str, budget: &ByteBudget) -> Result<Fetched, ImageError> {
        let S3Uri { bucket, key } =
            S3Uri::parse(uri).map_err(|e| ImageError::new(ImageErrorCode::BadUri, e))?;
        if key.is_empty() {
            let message = format!("{uri:?} names a bucket but no key");
            return Err(ImageError::new(ImageErrorCode::BadUri, message));
        }
        if !self.allowed_buckets.is_empty() && !self.allowed_buckets.contains(&bucket) {
            return Err(ImageError::new(
                ImageErrorCode::BucketNotAllowed,
                format!("bucket {bucket} is not in s3.allowed_buckets"),
            ));
        }
        let _turn = self.requests.acquire().await.map_err(|_| {
            ImageError::new(ImageErrorCode::Internal, "the store's request limit was closed")
        })?;
        let object = self.client.get_object().bucket(&bucket).key(&key).send().await;
        let object = object.map_err(|e| image_error(&e, &bucket, &key))?;
        read_body(object, budget).await
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

/// What an S3 error means for an image. Status and error codes:
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>.
fn image_error<E>(
    error: &SdkError<E, aws_sdk_s3::config::http::HttpResponse>,
    bucket: &str,
    key: &str,
) -> ImageError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    use ImageErrorCode as Code;
    let SdkError::ServiceError(answer) = error else {
        // Refused connections, timeouts, missing credentials: nothing that is the image's fault.
        return ImageError::new(
            Code::StorageUnavailable,
            format!("bucket {bucket} cannot be reached: {}", brief(error)),
        );
    };
    let status = answer.raw().status().as_u16();
    let code = answer.err().code().unwrap_or("no error code");
    match (status, code) {
        (_, "NoSuchBucket") => ImageError::new(Code::NotFound, format!("no such bucket: {bucket}")),
        (404, _) | (_, "NoSuchKey") => {
            ImageError::new(Code::NotFound, format!("no such key in bucket {bucket}"))
        }
        (401 | 403, _) => ImageError::new(
            Code::AccessDenied,
            format!("the store refused s3://{bucket}/{key} ({status} {code})"),
        ),
        (400, "KeyTooLongError" | "InvalidURI" | "InvalidBucketName") => {
            ImageError::new(Code::BadUri, format!("s3://{bucket}/{key}: {code}"))
        }
        _ => ImageError::new(
            Code::StorageUnavailable,
            format!("the store answered {status} {code} for s3://{bucket}/{key}"),
        ),
    }
}

/// The innermost cause: the outer layers only say that a request failed.
pub(crate) fn brief(error: &(dyn std::error::Error + 'static)) -> String {
    if let Some(sentence) = STORE.explain(error) {
        return sentence;
    }
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
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
