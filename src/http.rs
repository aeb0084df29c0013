//! What a worker says over HTTP.
//!
//! * `/livez` and `/readyz`: whether the process should be restarted, because work in it is stuck,
//!   and whether it takes work.
//! * `/metrics`: what it counts, for Prometheus (`metrics`).
//! * `/status`: what it runs, serves, does and waits for, as JSON (`status`).
//! * `/`: the same for people (`page`).

mod metrics;
mod page;
mod process;
mod status;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use angler_core::readiness::Readiness;
use angler_metrics::Window;

/// How often the numbers are noted that rates are taken from.
const NOTED: Duration = Duration::from_secs(2);

/// How many connections are answered at once; further ones wait.
const CONNECTIONS: usize = 64;
/// The time of a connection, with its one request: who sends nothing holds a place no longer.
const CONNECTION: Duration = Duration::from_secs(10);
/// The pause when no connection can be accepted.
const REFUSED: Duration = Duration::from_millis(100);

/// Nothing panics while it holds one of these.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers on `listen` until the handle is dropped; yields the address that was bound.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(
    listen: &str,
    readiness: Arc<Readiness>,
) -> std::io::Result<(SocketAddr, AbortOnDropHandle<()>)> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let shown = Arc::new(Shown { readiness, sets: Mutex::default(), window: Mutex::default() });
    let routes = Router::new()
        .route("/", get(page))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Arc::clone(&shown));
    let server = tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, TowerToHyperService::new(routes)) => {}
            () = shown.note() => {}
        }
    });
    Ok((address, AbortOnDropHandle::new(server)))
}

/// Answers one request a connection, of [`CONNECTIONS`] at once, for as long as it lives.
async fn accept(listener: TcpListener, routes: TowerToHyperService<Router>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut answering = JoinSet::new();
    loop {
        // It is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        while answering.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of files, mostly, until something is closed.
                tracing::debug!("an HTTP connection could not be accepted: {error}");
                tokio::time::sleep(REFUSED).await;
                continue;
            }
        };
        let routes = routes.clone();
        answering.spawn(async move {
            let _place = place;
            let answered = http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), routes);
            // Who asks wrongly, or goes away, misses an answer.
            let _ = timeout(CONNECTION, answered).await;
        });
    }
}

/// What is shown: a worker's state, and what it was a minute ago.
struct Shown {
    readiness: Arc<Readiness>,
    /// The sets that metrics name.
    sets: Mutex<metrics::Named>,
    window: Mutex<Window>,
}

impl Shown {
    /// Notes the numbers again and again.
    async fn note(&self) {
        loop {
            let snapshot = self.readiness.metrics().snapshot();
            locked(&self.window).add(Instant::now(), snapshot);
            tokio::time::sleep(NOTED).await;
        }
    }
}

type Answer<const N: usize> = ([(HeaderName, &'static str); N], String);
/// What was true a moment ago is not to be kept.
const FRESH: (HeaderName, &str) = (header::CACHE_CONTROL, "no-store");

async fn page(State(shown): State<Arc<Shown>>) -> Answer<4> {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, page::policy()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        FRESH,
    ];
    (headers, page::html(&status::of(&shown)))
}

async fn metrics(State(shown): State<Arc<Shown>>) -> Answer<2> {
    let text = metrics::text(&shown);
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT), FRESH], text)
}

async fn status(State(shown): State<Arc<Shown>>) -> Answer<2> {
    let status = status::of(&shown);
    ([(header::CONTENT_TYPE, "application/json"), FRESH], format!("{status}\n"))
}

async fn live(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    match shown.readiness.stalled() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(stalled) => (StatusCode::SERVICE_UNAVAILABLE, format!("no progress: {stalled}\n")),
    }
}

async fn ready(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    match shown.readiness.missing() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let url = format!("http://{address}{path}");
        let asked = tokio::task::spawn_blocking(move || {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().http_status_as_error(false).build().into();
            let mut answer = agent.get(&url).call().unwrap();
            (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
        });
        asked.await.unwrap()
    }

    /// What came on a connection until it was closed, after this was sent.
    async fn exchanged(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test(start_paused = true)]
    async fn who_sends_nothing_holds_a_place_for_a_while_and_nobody_up_for_ever() {
        let readiness = Arc::new(Readiness::default());
        let (address, _server) = serve("127.0.0.1:0", readiness).await.unwrap();
        let began = tokio::time::Instant::now();
        let asked = exchanged(address, "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(asked.starts_with("HTTP/1.1 200 ") && asked.ends_with("alive\n"), "{asked}");
        assert!(began.elapsed() < CONNECTION);
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let asked = exchanged(address, "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(asked.starts_with("HTTP/1.1 200 "), "{asked}");
        assert!(began.elapsed() < 2 * CONNECTION, "{:?}", began.elapsed());
        assert_eq!(exchanged(address, "GET /livez HTTP/1.1\r\nHo").await, "");
    }

    #[tokio::test]
    async fn stuck_work_turns_both_red_and_a_blocked_broker_only_readiness() {
        let readiness = Arc::new(Readiness::default());
        let (address, _server) = serve("127.0.0.1:0", Arc::clone(&readiness)).await.unwrap();
        readiness.set_warm();
        assert_eq!(readiness.connected(), None);
        readiness.set_consuming("jobs");
        let both = async || (get(address, "/livez").await, get(address, "/readyz").await);
        assert_eq!(both().await, ((200, "alive\n".into()), (200, "ready\n".into())));

        readiness.set_stalled(Some("1 image(s) being decoded".into()));
        let (live, ready) = both().await;
        assert_eq!(live, (503, "no progress: 1 image(s) being decoded\n".into()));
        assert_eq!(ready, (503, "not ready: no progress: 1 image(s) being decoded\n".into()));
        readiness.set_stalled(None);

        readiness.set_blocked(Some("the broker blocks publishers: low on memory".into()));
        let (live, ready) = both().await;
        assert_eq!((live.0, ready.0), (200, 503));
        assert!(ready.1.contains("blocks publishers: low on memory"), "{}", ready.1);
        readiness.set_blocked(None);

        readiness.set_paused("jobs", "the store does not answer");
        let (live, ready) = both().await;
        assert_eq!((live.0, ready), (200, (503, "not ready: the store does not answer\n".into())));
        readiness.set_consuming("jobs");
        assert_eq!(both().await.1.0, 200);

        assert_eq!(readiness.connected(), Some(true));
        readiness.set_lost("jobs", "connection refused");
        readiness.set_lost("more", "");
        assert_eq!(readiness.connected(), Some(false));
        let (live, ready) = both().await;
        let said = "not ready: no jobs are being consumed from jobs, more: connection refused\n";
        assert_eq!((live.0, ready), (200, (503, said.into())));
    }
}
