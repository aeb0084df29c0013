//! What the S3 store makes of answers that no healthy server gives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use angler::error::{ImageError, ImageErrorCode};
use angler::store::s3::{S3Images, S3Options};
use angler::store::{ByteBudget, Fetched, ImageStore};
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use super::image_store::nobody_holds;
use super::soon;

const LIMIT: u32 = 1000;

/// Answers every request with the same bytes.
struct Server {
    url: String,
    requests: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    /// * `then_close`: whether the connection ends after the answer, or stays open in silence.
    async fn new(answer: Vec<u8>, then_close: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut piece = [0; 1024];
                    let count = stream.read(&mut piece).await.unwrap_or(0);
                    if count == 0 {
                        break;
                    }
                    request.extend_from_slice(&piece[..count]);
                }
                count.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(&answer).await;
                if !then_close {
                    open.push(stream);
                }
            }
        });
        Self { url, requests, _task: AbortOnDropHandle::new(task) }
    }
}

fn store(endpoint: &str) -> S3Images {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .credentials_provider(Credentials::new("key", "secret", None, None, "test"))
        .build();
    let client = aws_sdk_s3::Client::from_conf(config);
    S3Images::new(client, &S3Options { concurrency: 2, ..S3Options::default() })
}

/// Fetches from a server that answers so; nobody may hold a part of the budget afterwards.
async fn fetch(answer: Vec<u8>, then_close: bool) -> (Result<Fetched, ImageError>, usize) {
    let server = Server::new(answer, then_close).await;
    let budget = ByteBudget::new(0, LIMIT);
    let fetched = soon("an answer", store(&server.url).fetch("s3://b/k", &budget)).await;
    if fetched.is_err() {
        nobody_holds(&budget).await;
    }
    (fetched, server.requests.load(Ordering::SeqCst))
}

fn head(status: &str, length: usize) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n").into_bytes()
}

fn chunked(sizes: &[usize]) -> Vec<u8> {
    let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for size in sizes {
        answer.extend_from_slice(format!("{size:x}\r\n{}\r\n", "x".repeat(*size)).as_bytes());
    }
    answer.extend_from_slice(b"0\r\n\r\n");
    answer
}

#[tokio::test]
async fn a_size_over_the_limit_is_refused_before_a_byte_of_the_body_came() {
    // The body never comes: who waits for it waits for ever.
    let (fetched, requests) = fetch(head("200 OK", 1 << 40), false).await;
    assert_eq!(fetched.unwrap_err().code, ImageErrorCode::TooLarge);
    assert_eq!(requests, 1);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_the_stores_fault() {
    let mut answer = head("200 OK", 900);
    answer.extend_from_slice(&[7; 400]);
    let (fetched, _) = fetch(answer, true).await;
    let error = fetched.unwrap_err();
    assert_eq!(error.code, ImageErrorCode::StorageUnavailable, "{error}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn without_a_length_the_limit_holds_all_the_same() {
    let (fetched, _) = fetch(chunked(&[600, 400]), true).await;
    let fetched = fetched.unwrap();
    assert_eq!((fetched.bytes.len(), fetched.permit.num_permits()), (1000, 1000));
    let (fetched, _) = fetch(chunked(&[600, 401]), true).await;
    assert_eq!(fetched.unwrap_err().code, ImageErrorCode::TooLarge);
}

#[tokio::test]
async fn a_server_that_cannot_is_asked_again_and_then_said_to_be_away() {
    for status in ["503 Slow Down", "500 Internal Server Error"] {
        let (fetched, requests) = fetch(head(status, 0), true).await;
        let error = fetched.unwrap_err();
        assert_eq!(error.code, ImageErrorCode::StorageUnavailable, "{status}: {error}");
        assert!(requests > 1, "{status} was not tried again");
    }
}

#[tokio::test]
async fn a_refusal_is_not_asked_again() {
    for (status, code) in [
        ("403 Forbidden", ImageErrorCode::AccessDenied),
        ("404 Not Found", ImageErrorCode::NotFound),
    ] {
        let (fetched, requests) = fetch(head(status, 0), true).await;
        let error = fetched.unwrap_err();
        assert_eq!((error.code, requests), (code, 1), "{status}: {error}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let budget = ByteBudget::new(0, LIMIT);
    let error = soon("an answer", store(&endpoint).fetch("s3://b/k", &budget)).await.unwrap_err();
    assert_eq!(error.code, ImageErrorCode::StorageUnavailable, "{error}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn a_fetch_that_waits_for_a_silent_server_can_be_given_up() {
    let server = Server::new(head("200 OK", 900), false).await;
    let (budget, store) = (ByteBudget::new(0, LIMIT), store(&server.url));
    // As many at once as the store allows, all given up: neither places nor bytes stay taken.
    for _ in 0..2 {
        let fetches =
            futures_util::future::join_all((0..2).map(|_| store.fetch("s3://b/k", &budget)));
        let given_up = tokio::time::timeout(Duration::from_millis(300), fetches).await;
        assert!(given_up.is_err());
    }
    nobody_holds(&budget).await;
    assert_eq!(server.requests.load(Ordering::SeqCst), 4);
}
