//! What the S3 store makes of answers that no healthy server gives.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use angler_core::store::{
    ByteBudget, ETag, Fetched, Got, ImageStore, ObjectError, ObjectStore, SMALL_OBJECT_BYTES,
};
use angler_storage::s3::probe::{ConditionalWrite, Probe, Refusal};
use angler_storage::s3::{S3Images, S3Objects, S3Options, S3Uri};
use angler_wire::error::{ImageError, ImageErrorCode, Reason, StoreFault};

use super::image_store::nobody_holds;
use super::soon;
use crate::support::s3_client_at;

const LIMIT: u32 = 1000;

/// Answers requests with given bytes.
struct Server {
    url: String,
    heads: Arc<Mutex<Vec<String>>>,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    /// Every request has the same answer.
    ///
    /// * `then_close`: whether the connection ends after the answer, or stays open in silence.
    async fn new(answer: Vec<u8>, then_close: bool) -> Self {
        Self::script(vec![answer], then_close).await
    }

    /// An answer a request, the last one for all that follow; an empty one is none.
    async fn script(answers: Vec<Vec<u8>>, then_close: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heads = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&heads);
        let task = tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let head = read_request(&mut stream).await;
                let number = {
                    let mut seen = seen.lock().unwrap();
                    seen.push(head);
                    seen.len() - 1
                };
                let answer = answers.get(number).or(answers.last()).unwrap();
                let _ = stream.write_all(answer).await;
                if !then_close {
                    open.push(stream);
                }
            }
        });
        Self { url, heads, _task: AbortOnDropHandle::new(task) }
    }

    fn requests(&self) -> usize {
        self.heads.lock().unwrap().len()
    }

    /// The methods of the requests, in their order.
    fn methods(&self) -> Vec<String> {
        let heads = self.heads.lock().unwrap();
        heads.iter().map(|head| head.split(' ').next().unwrap().to_owned()).collect()
    }
}

/// Reads a request to its end, so that closing the connection loses nothing; yields its head in
/// lower case, but for the method.
async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let head = request.windows(4).position(|end| end == b"\r\n\r\n");
        if let Some(end) = head {
            let head = String::from_utf8(request[..end].to_vec()).unwrap();
            let (method, rest) = head.split_once(' ').unwrap();
            let head = format!("{method} {}", rest.to_lowercase());
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if request.len() - end - 4 >= length.map_or(0, |length| length.parse().unwrap()) {
                return head;
            }
        }
        match stream.read(&mut piece).await {
            Ok(count) if count > 0 => request.extend_from_slice(&piece[..count]),
            _ => return String::from_utf8_lossy(&request).into_owned(),
        }
    }
}

fn client(endpoint: &str) -> aws_sdk_s3::Client {
    s3_client_at(endpoint, "key", "secret")
}

fn store(endpoint: &str) -> S3Images {
    S3Images::new(client(endpoint), &S3Options { concurrency: 2, ..S3Options::default() })
}

/// Fetches from a server that answers so; nobody may hold a part of the budget afterwards.
async fn fetch(answer: Vec<u8>, then_close: bool) -> (Result<Fetched, ImageError>, usize) {
    let server = Server::new(answer, then_close).await;
    let budget = ByteBudget::new(0, LIMIT);
    let fetched = soon("an answer", store(&server.url).fetch("s3://b/k", &budget)).await;
    if fetched.is_err() {
        nobody_holds(&budget).await;
    }
    (fetched, server.requests())
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
async fn answers_that_reject_the_credentials_are_told_from_those_that_deny_one_object() {
    use ImageErrorCode::{AccessDenied, StorageUnavailable};
    use StoreFault::{Credentials, None};
    for (status, code, told) in [
        ("403 Forbidden", "InvalidAccessKeyId", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "SignatureDoesNotMatch", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "RequestTimeTooSkewed", (StorageUnavailable, Credentials)),
        ("400 Bad Request", "ExpiredToken", (StorageUnavailable, Credentials)),
        ("400 Bad Request", "InvalidToken", (StorageUnavailable, Credentials)),
        ("400 Bad Request", "TokenRefreshRequired", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "InvalidTokenId", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "InvalidSecurity", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "NotSignedUp", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "AccountProblem", (StorageUnavailable, Credentials)),
        ("403 Forbidden", "UserSuspended", (StorageUnavailable, Credentials)),
        ("401 Unauthorized", "Unauthorized", (StorageUnavailable, Credentials)),
        // The region of one bucket, or a key that is no key.
        ("400 Bad Request", "AuthorizationHeaderMalformed", (StorageUnavailable, None)),
        ("403 Forbidden", "AccessDenied", (AccessDenied, None)),
        ("403 Forbidden", "AllAccessDisabled", (AccessDenied, None)),
        ("403 Forbidden", "InvalidObjectState", (AccessDenied, None)),
    ] {
        let (fetched, _) = fetch(refusal(status, code), true).await;
        let error = fetched.unwrap_err();
        assert_eq!((error.code, error.fault), told, "{code}: {error}");
        assert!(error.message.contains(code), "{error}");
    }
}

#[tokio::test]
async fn a_key_whose_signature_goes_wrong_does_not_speak_for_the_credentials() {
    let wrong = || refusal("403 Forbidden", "SignatureDoesNotMatch");
    let missing = refusal("404 Not Found", "NoSuchKey");
    let denied = refusal("403 Forbidden", "AccessDenied");
    for (answers, credentials) in [
        (vec![wrong(), missing], false),
        (vec![wrong(), denied], false),
        (vec![wrong(), wrong()], true),
    ] {
        let server = Server::script(answers, true).await;
        let budget = ByteBudget::new(0, LIMIT);
        let probed = soon("an answer", store(&server.url).probe("s3://b/k+", &budget)).await;
        assert_eq!(probed.is_err_and(|e| e.fault == StoreFault::Credentials), credentials);
        assert!(server.heads.lock().unwrap()[1].starts_with("GET /b/angler-probe"));
    }
}

#[tokio::test]
async fn an_archived_object_is_an_answer_to_a_probe() {
    let server = Server::new(refusal("403 Forbidden", "InvalidObjectState"), true).await;
    let budget = ByteBudget::new(0, LIMIT);
    soon("an answer", store(&server.url).probe("s3://b/k", &budget)).await.unwrap();
    assert!(server.heads.lock().unwrap()[0].contains("\r\nrange: bytes=0-0"));
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
    assert_eq!(server.requests(), 4);
}

fn objects(server: &Server) -> S3Objects {
    S3Objects::new(client(&server.url), S3Uri::parse("s3://b/p").unwrap())
}

/// An object, with an ETag.
fn object(body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nETag: \"now\"\r\nContent-Length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn refusal(status: &str, code: &str) -> Vec<u8> {
    let body = format!("<Error><Code>{code}</Code></Error>");
    [head(status, body.len()), body.into_bytes()].concat()
}

/// What became of a write, shortened to what a caller tells apart.
fn told<T>(outcome: Result<T, ObjectError>) -> &'static str {
    match outcome {
        Ok(_) => "written",
        Err(ObjectError::Exists(place)) if place == "s3://b/p/k" => "exists",
        Err(ObjectError::Changed(place)) if place == "s3://b/p/k" => "changed",
        Err(ObjectError::Unavailable(m)) if m.to_string().starts_with("s3://b/p/k: ") => {
            "unavailable"
        }
        Err(other) => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_write_is_sent_once_and_what_is_there_decides() {
    let lost = Vec::new;
    let busy = || refusal("503 Slow Down", "SlowDown");
    let conflict = || refusal("409 Conflict", "ConditionalRequestConflict");
    let missing = || refusal("404 Not Found", "NoSuchKey");
    let nowhere = || refusal("404 Not Found", "NoSuchBucket");
    let refused = || refusal("412 Precondition Failed", "PreconditionFailed");
    let denied = || refusal("403 Forbidden", "AccessDenied");
    let (put, looked) = (["PUT"].as_slice(), ["PUT", "GET"].as_slice());
    // The answers to the PUT and what follows, the requests, and what is told of creating an
    // object, and of replacing one.
    for (case, answers, requests, of_create, of_replace) in [
        ("ours", vec![lost(), object(b"ours")], looked, "written", "written"),
        ("another", vec![lost(), object(b"them")], looked, "unavailable", "unavailable"),
        ("longer", vec![lost(), object(b"ours?")], looked, "unavailable", "unavailable"),
        ("shorter", vec![lost(), object(b"our")], looked, "unavailable", "unavailable"),
        ("nothing", vec![lost(), missing()], looked, "unavailable", "unavailable"),
        ("may not look", vec![lost(), denied()], looked, "unavailable", "unavailable"),
        ("busy, ours", vec![busy(), object(b"ours")], looked, "written", "written"),
        ("busy, nothing", vec![busy(), missing()], looked, "unavailable", "unavailable"),
        ("refused", vec![refused()], put, "exists", "changed"),
        ("denied", vec![denied()], put, "unavailable", "unavailable"),
        ("nowhere", vec![nowhere()], put, "unavailable", "unavailable"),
    ] {
        let server = Server::script(answers.clone(), true).await;
        let created = soon(case, objects(&server).create("k", Bytes::from_static(b"ours"))).await;
        assert_eq!(told(created), of_create, "create: {case}");
        assert_eq!(server.methods(), requests, "create: {case}");
        let head = server.heads.lock().unwrap()[0].clone();
        assert!(head.contains("\r\nif-none-match: *") && !head.contains("if-match"), "{head}");

        for expected in [None, Some(ETag::new("\"seen\""))] {
            let server = Server::script(answers.clone(), true).await;
            let store = objects(&server);
            let replaced = soon(case, store.replace("k", "ours".into(), expected.as_ref())).await;
            if let Ok(etag) = &replaced {
                assert_eq!(*etag, ETag::new("\"now\""));
            }
            assert_eq!(told(replaced), of_replace, "replace: {case}");
            assert_eq!(server.methods(), requests, "replace: {case}");
            let head = server.heads.lock().unwrap()[0].clone();
            match expected {
                Some(_) => assert!(head.contains("\r\nif-match: \"seen\""), "{head}"),
                None => assert!(head.contains("\r\nif-none-match: *"), "{head}"),
            }
        }
    }
    // Somebody else is writing. Whether that makes an object, a creator has to see.
    for (there, of_create) in [(object(b"them"), "exists"), (missing(), "unavailable")] {
        let server = Server::script(vec![conflict(), there], true).await;
        let created = soon("create", objects(&server).create("k", "ours".into())).await;
        assert_eq!(
            (told(created), server.methods()),
            (of_create, vec!["PUT".into(), "GET".into()])
        );
    }
    // Who replaces has to look again anyway; so if what it knew is gone.
    for answer in [conflict(), missing()] {
        let server = Server::new(answer, true).await;
        let seen = ETag::new("\"seen\"");
        let replaced = soon("it", objects(&server).replace("k", "ours".into(), Some(&seen))).await;
        assert_eq!((told(replaced), server.methods()), ("changed", vec!["PUT".into()]));
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_ends_in_an_error() {
    let mut answer = head("200 OK", 900);
    answer.extend_from_slice(&[7; 400]);
    let server = Server::new(answer, true).await;
    let object = soon("head", objects(&server).open("k")).await.unwrap().unwrap();
    assert_eq!(object.bytes, 900);
    let chunks: Vec<_> = soon("the end", object.chunks.collect()).await;
    let read: usize = chunks.iter().flatten().map(Bytes::len).sum();
    assert!(read <= 400);
    let error = chunks.last().unwrap().as_ref().unwrap_err();
    let expected =
        matches!(error, ObjectError::Unavailable(m) if m.to_string().starts_with("s3://b/p/k: "));
    assert!(expected, "{error:?}");
}

#[tokio::test]
async fn an_object_without_a_length_is_not_opened() {
    let server = Server::new(chunked(&[10]), true).await;
    let error = soon("head", objects(&server).open("k")).await.unwrap_err();
    let expected = matches!(&error, ObjectError::Unavailable(m)
        if m.to_string().starts_with("s3://b/p/k: ") && has(m, "Content-Length"));
    assert!(expected, "{error:?}");
}

#[tokio::test]
async fn a_small_object_is_small_whatever_the_server_says() {
    // The body never comes: who waits for it waits for ever.
    let head = "HTTP/1.1 200 OK\r\nETag: \"now\"\r\n";
    let announced = format!("{head}Content-Length: {}\r\n\r\n", SMALL_OBJECT_BYTES + 1);
    let chunk = SMALL_OBJECT_BYTES as usize / 2;
    let (fits, grows) = (chunked(&[chunk, chunk]), chunked(&[chunk, chunk, 1]));
    let with_etag = |answer: Vec<u8>| {
        let rest = answer.strip_prefix(b"HTTP/1.1 200 OK\r\n").unwrap().to_vec();
        [head.as_bytes().to_vec(), rest].concat()
    };
    for answer in [announced.into_bytes(), with_etag(grows)] {
        let server = Server::new(answer, false).await;
        let error = soon("an answer", objects(&server).get("k", None)).await.unwrap_err();
        assert!(matches!(&error, ObjectError::TooLarge(p) if p == "s3://b/p/k"), "{error:?}");
    }
    let server = Server::new(with_etag(fits.clone()), true).await;
    let got = soon("an answer", objects(&server).get("k", None)).await.unwrap();
    assert!(matches!(got, Got::Object { bytes, .. } if bytes.len() == 2 * chunk));
    // Without an ETag there is no compare and swap.
    let server = Server::new(fits, true).await;
    let error = soon("an answer", objects(&server).get("k", None)).await.unwrap_err();
    assert!(matches!(&error, ObjectError::Unavailable(m) if has(m, "ETag")), "{error:?}");
}

#[tokio::test]
async fn what_is_known_is_asked_for_once() {
    let server = Server::new(b"HTTP/1.1 304 Not Modified\r\n\r\n".to_vec(), true).await;
    let seen = ETag::new("\"seen\"");
    let got = soon("an answer", objects(&server).get("k", Some(&seen))).await.unwrap();
    assert_eq!((got, server.requests()), (Got::Unchanged, 1));
    let head = server.heads.lock().unwrap()[0].clone();
    assert!(head.contains("\r\nif-none-match: \"seen\""), "{head}");
}

#[tokio::test]
async fn a_store_that_passes_over_conditions_is_found_out_and_left_as_it_was() {
    let ask = async |answers: Vec<&str>| {
        let answers = answers.into_iter().map(|answer| answer.as_bytes().to_vec()).collect();
        let server = Server::script(answers, true).await;
        let probe = Probe::new(client(&server.url), "b");
        let answer = soon("an answer", probe.conditional_write("classes/.probe")).await;
        let head = server.heads.lock().unwrap()[0].clone();
        assert!(head.starts_with("PUT ") && head.contains("\r\nif-match: "), "{head}");
        (answer, server.methods())
    };
    let empty = |status: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    };
    let (written, gone) = (empty("200 OK"), empty("204 No Content"));
    let (answer, methods) = ask(vec![&written, &gone]).await;
    assert_eq!(answer, Ok(ConditionalWrite::Ignored));
    assert_eq!(methods, ["PUT", "DELETE"]);
    // The answer is a gateway's, and the write took place.
    let (answer, methods) = ask(vec![&empty("502 Bad Gateway"), &written, &gone]).await;
    assert_eq!(answer, Ok(ConditionalWrite::Ignored));
    assert_eq!(methods, ["PUT", "GET", "DELETE"]);
    let denied = empty("403 Forbidden");
    let (answer, _) = ask(vec![&written, &denied]).await;
    let Ok(ConditionalWrite::Left(what)) = answer else { panic!("{answer:?}") };
    assert!(what.contains("s3://b/classes/.probe"), "{what}");
    for (status, wanted) in [
        ("412 Precondition Failed", Ok(ConditionalWrite::Refused)),
        (
            "501 Not Implemented",
            Ok(ConditionalWrite::Unknown("501 without an error code".to_owned())),
        ),
        ("403 Forbidden", Err(Refusal::Denied("403 without an error code".to_owned()))),
    ] {
        let (answer, methods) = ask(vec![&empty(status)]).await;
        assert_eq!(answer, wanted, "{status}");
        // Sent once, whatever the answer.
        assert_eq!(methods, ["PUT"], "{status}");
    }
}

fn has(reason: &Reason, words: &str) -> bool {
    angler_wire::text::chain(reason).contains(words)
}
