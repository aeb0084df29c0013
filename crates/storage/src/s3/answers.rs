//! What the store's answers, and requests without one, mean for an image.
//!
//! Status and error codes: <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>.

use std::error::Error;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use angler_tls::STORE;
use angler_wire::error::{ImageError, ImageErrorCode};

/// `true` if the store does not know the credentials, no longer accepts them, or closed their
/// account: then no request succeeds, whatever the object. `AccessDenied` is not such a code.
pub(super) fn rejects_credentials(status: u16, code: &str) -> bool {
    status == 401
        || matches!(
            code,
            "InvalidAccessKeyId"
                | "SignatureDoesNotMatch"
                | "InvalidSignatureException"
                | "ExpiredToken"
                | "ExpiredTokenException"
                | "InvalidToken"
                | "InvalidTokenId" // MinIO
                | "InvalidClientTokenId"
                | "UnrecognizedClientException"
                | "TokenRefreshRequired"
                | "MissingAuthenticationToken"
                | "RequestTimeTooSkewed"
                | "RequestExpired"
                | "InvalidSecurity"
                | "NotSignedUp"
                | "AccountProblem"
                | "UserSuspended" // Ceph
        )
}

/// Why there was nothing to sign a request with, in one line. `None` if that was not the fault.
///
/// The client looks for credentials before it connects. The types of their errors are not public.
pub(super) fn no_credentials<E: Error + 'static>(
    error: &SdkError<E, HttpResponse>,
) -> Option<String> {
    if !matches!(error, SdkError::ConstructionFailure(_) | SdkError::DispatchFailure(_)) {
        return None;
    }
    let mut cause: &(dyn Error + 'static) = error;
    let mut named = false;
    loop {
        let text = cause.to_string();
        named |= text.contains("credential") || text.contains("identity resolver");
        match cause.source() {
            Some(inner) => cause = inner,
            None => {
                return named.then(|| text.lines().map(str::trim).collect::<Vec<_>>().join(" "));
            }
        }
    }
}

/// `true` if the request failed for want of credentials that the store accepts.
pub(super) fn lacks_credentials<E>(error: &SdkError<E, HttpResponse>) -> bool
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let code = answer.err().code().unwrap_or_default();
            rejects_credentials(answer.raw().status().as_u16(), code)
        }
        other => no_credentials(other).is_some(),
    }
}

/// What an S3 error means for an image.
pub(super) fn image_error<E>(
    error: &SdkError<E, HttpResponse>,
    bucket: &str,
    key: &str,
) -> ImageError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    use ImageErrorCode as Code;
    let SdkError::ServiceError(answer) = error else {
        if let Some(cause) = no_credentials(error) {
            return ImageError::credentials(format!("no credentials for the store: {cause}"));
        }
        // Refused connections, timeouts: nothing that is the image's fault.
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
        _ if rejects_credentials(status, code) => ImageError::credentials(format!(
            "the store rejected the worker's credentials: {status} {code} for s3://{bucket}/{key}"
        )),
        (403, _) => ImageError::new(
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
pub fn brief(error: &(dyn Error + 'static)) -> String {
    if let Some(sentence) = STORE.explain(error) {
        return sentence.to_string();
    }
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
