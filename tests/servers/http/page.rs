//! The page at `/` as its reader gets it: a real browser, a real worker that works meanwhile.
//!
//! The browser asks a server of the test's, which hands everything on to the worker and puts the probe
//! into the page; the page's policy is kept, with the probe's digest added.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use base64::Engine;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio_util::task::AbortOnDropHandle;

use super::{SET, World};
use crate::support::browser::{PROBE, Seen, shoot, visit};
use crate::support::{self, Worker, eventually};

/// Milliseconds of the page's clock until it is looked at: it has polled by then.
const LOOKED_AT: u32 = 5_000;

struct Between {
    worker: String,
    probe: String,
    polled: AtomicUsize,
}

/// `http://127.0.0.1:port`, what it counts, and the server.
async fn stand_between(worker: &Worker) -> (String, Arc<Between>, AbortOnDropHandle<()>) {
    let probe = format!("window.lookAfter = {LOOKED_AT};\n{PROBE}");
    let between =
        Arc::new(Between { worker: worker.http.clone(), probe, polled: AtomicUsize::new(0) });
    let routes = Router::new()
        .route("/", get(page))
        .route("/status", get(status))
        .route("/plain", get(plain))
        .route("/1280", get(async || frame(1280)))
        .route("/390", get(async || frame(390)))
        .route("/plain-390", get(async || shown(390)))
        .with_state(Arc::clone(&between));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    (format!("http://{address}"), between, AbortOnDropHandle::new(server))
}

fn frame(width: u32) -> Html<String> {
    Html(format!(
        "<!doctype html><body><iframe src=/ width={width} height=900 frameborder=0></iframe>"
    ))
}

/// For a picture.
fn shown(width: u32) -> Html<String> {
    Html(format!(
        "<!doctype html><body style=margin:0><iframe src=/plain width={width} height=2200 \
         frameborder=0></iframe>"
    ))
}

/// The worker's page and its policy.
async fn asked(url: String) -> (String, String) {
    let asking = tokio::task::spawn_blocking(move || {
        let mut answer = ureq::get(&url).call().unwrap();
        let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
        (answer.body_mut().read_to_string().unwrap(), policy)
    });
    asking.await.unwrap()
}

fn with_policy(page: String, policy: &str) -> Response {
    let mut response = Html(page).into_response();
    let policy = HeaderValue::from_str(policy).unwrap();
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

/// The page with the probe in it.
async fn page(State(between): State<Arc<Between>>) -> Response {
    let (page, policy) = asked(format!("{}/", between.worker)).await;
    let digest = Sha256::digest(between.probe.as_bytes());
    let digest = base64::engine::general_purpose::STANDARD.encode(digest);
    let policy = policy.replacen("script-src ", &format!("script-src 'sha256-{digest}' "), 1);
    let probe = format!("<head><script>{}</script>", between.probe);
    with_policy(page.replacen("<head>", &probe, 1), &policy)
}

/// The page as it is.
async fn plain(State(between): State<Arc<Between>>) -> Response {
    let (page, policy) = asked(format!("{}/", between.worker)).await;
    with_policy(page, &policy)
}

async fn status(State(between): State<Arc<Between>>) -> Response {
    between.polled.fetch_add(1, Ordering::Relaxed);
    let url = format!("{}/status", between.worker);
    let asking = tokio::task::spawn_blocking(move || support::http_get(&url));
    let (_, body) = asking.await.unwrap().unwrap();
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// What is wrong with the page, but for what it is meant to do.
fn faults(seen: &Seen) -> Vec<String> {
    let meant = |fault: &String| {
        fault == "2 scripts, 0 handlers"
            || (fault.starts_with("asked for: http://127.0.0.1:") && fault.ends_with("/status"))
    };
    seen.faults().into_iter().filter(|fault| !meant(fault)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_follows_a_worker_on_a_laptop_and_on_a_phone_in_light_and_dark() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    // What wants to be markup, and to turn what follows it.
    let hostile = "</script><img src=x onerror=alert(1)>\u{202e}gpj";
    let nasty = format!("s3://{}/{hostile}", world.bucket.name);
    let job = json!({"id": "nightly/000017", "images": [nasty], "classes": SET});
    let result = world.job(&client, &mut results, job).await;
    let code = result["images"][0]["error"]["code"].as_str().unwrap().to_owned();
    let bucket = format!("s3://not-there/{}.jpg", "a-long-name-without-a-break".repeat(6));
    for (id, image) in
        [("nightly/000018", bucket.as_str()), ("nightly/000019", "file:///etc/passwd")]
    {
        let job = json!({"id": id, "images": [image], "classes": SET});
        world.job(&client, &mut results, job).await;
    }
    world.put_version("9", b"no class vectors".to_vec()).await;
    world.activate("9").await;
    eventually("a version is refused", async || {
        let status = super::status(&worker);
        status["classes"][0]["refused"].is_object().then_some(())
    })
    .await;

    // Work goes on while the page is looked at.
    let load = async {
        loop {
            let ids = world.jobs(&client, 20).await;
            results.collect(ids.len()).await;
        }
    };
    let (server, between, _server) = stand_between(&worker).await;
    let looks = async {
        for (width, dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
            let before = between.polled.load(Ordering::Relaxed);
            let seen = visit(&format!("{server}/{width}"), dark, LOOKED_AT + 3_000).await;
            assert_eq!((seen.width, seen.dark), (width, dark));
            assert_eq!(faults(&seen), [""; 0], "{width}");
            assert!(between.polled.load(Ordering::Relaxed) > before, "it did not poll");
            let text = &seen.text;
            let unseen = hostile.replace('\u{202e}', "\u{fffd}");
            for expected in [
                "ready",
                "up to date",
                "colours@1",
                "9 was refused",
                &code,
                &unseen,
                "nightly/000017",
            ] {
                assert!(text.contains(expected), "{expected} is not in:\n{text}");
            }
            assert!(text.contains("sets the pace") || text.contains("set the pace"), "{text}");
        }
        // Kept, to be looked at by who changes its style.
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for dark in [false, true] {
            let name = |width| format!("worker-{width}{}.png", if dark { "-dark" } else { "" });
            shoot(&format!("{server}/plain"), (1280, 1400), dark, &kept.join(name(1280))).await;
            shoot(&format!("{server}/plain-390"), (390, 2200), dark, &kept.join(name(390))).await;
        }
    };
    tokio::select! {
        () = load => unreachable!("it never ends"),
        () = looks => {}
    }
}
