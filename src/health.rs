//! What a worker says over HTTP.
//!
//! * `/livez` and `/readyz`: whether the process should be restarted, because work in it is stuck,
//!   and whether it takes work.
//! * `/metrics`: what it counts, for Prometheus ([`metrics`]).
//! * `/status`: what it runs, serves, does and waits for, as JSON ([`status`]).
//! * `/`: the same for people ([`page`]).

mod metrics;
mod page;
mod process;
mod status;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
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

use crate::classes::catalog::Catalog;
use crate::metrics::{Metrics, Window};
use crate::outage::Trouble;
use crate::pipeline::Pipeline;

/// How often the numbers are noted that rates are taken from.
const NOTED: Duration = Duration::from_secs(2);

/// How many connections are answered at once; further ones wait.
const CONNECTIONS: usize = 64;
/// The time of a connection, with its one request: who sends nothing holds a place no longer.
const CONNECTION: Duration = Duration::from_secs(10);
/// The pause when no connection can be accepted.
const REFUSED: Duration = Duration::from_millis(100);

/// What a worker is, once it knows.
#[derive(Debug, Clone)]
pub struct About {
    /// Its name in results.
    pub worker: String,
    /// The queue that its jobs come from.
    pub queue: String,
    /// Fingerprint of the model that runs.
    pub model: String,
    /// The most images in a batch.
    pub max_batch: usize,
}

/// How a queue of jobs is consumed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Consuming {
    Yes,
    /// Not, and why if that is known; not on purpose.
    Lost(String),
    /// Not, for this reason; on purpose, over a connection that is there.
    Paused(&'static str),
}

/// What has to be true for a worker to be ready, and whose state is shown.
#[derive(Default)]
pub struct Readiness {
    metrics: Arc<Metrics>,
    warm: AtomicBool,
    /// How each queue of jobs is consumed.
    queues: Mutex<BTreeMap<String, Consuming>>,
    /// The broker's address that each queue of jobs was last consumed at.
    brokers: Mutex<BTreeMap<String, String>>,
    /// Where work is stuck.
    stalled: Mutex<Option<String>>,
    /// Why the broker does not accept results for now, a sentence.
    blocked: Mutex<Option<String>>,
    catalog: OnceLock<Arc<Catalog>>,
    pipeline: OnceLock<Arc<Pipeline>>,
    about: OnceLock<About>,
}

impl Readiness {
    /// Of the worker that records here.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..Self::default() }
    }

    /// The model has run once and the class sets to preload are loaded.
    pub fn set_warm(&self) {
        self.warm.store(true, Ordering::Release);
    }

    /// Whose class vectors `/status` tells of.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        // There is one catalog a process.
        let _ = self.catalog.set(catalog);
    }

    /// Whose back end and store are shown.
    pub fn set_pipeline(&self, pipeline: Arc<Pipeline>) {
        let _ = self.pipeline.set(pipeline);
    }

    /// What the worker is.
    pub fn set_about(&self, about: About) {
        let _ = self.about.set(about);
    }

    /// The address of the broker that a queue's jobs come from, without user and password.
    pub fn set_broker(&self, queue: &str, address: &str) {
        locked(&self.brokers).insert(queue.to_owned(), address.to_owned());
    }

    /// Jobs are being consumed from a queue.
    pub fn set_consuming(&self, queue: &str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Yes);
    }

    /// No jobs are being consumed from a queue, and there is no connection.
    ///
    /// * `reason`: what the broker or the way to it said; empty if nothing did.
    pub fn set_lost(&self, queue: &str, reason: &str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Lost(reason.to_owned()));
    }

    /// No jobs are being consumed from a queue, on purpose.
    pub fn set_paused(&self, queue: &str, reason: &'static str) {
        locked(&self.queues).insert(queue.to_owned(), Consuming::Paused(reason));
    }

    /// Whether every queue's connection is there, for all that is known; none before the worker
    /// turns to the broker.
    pub(crate) fn connected(&self) -> Option<bool> {
        let queues = locked(&self.queues);
        let lost = |consuming: &Consuming| matches!(consuming, Consuming::Lost(_));
        (!queues.is_empty()).then(|| !queues.values().any(lost))
    }

    /// Work does not move, and where; none once it does.
    pub fn set_stalled(&self, stalled: Option<String>) {
        *locked(&self.stalled) = stalled;
    }

    /// Notes why the broker does not accept results, a sentence; `None` once it does.
    pub fn set_blocked(&self, blocked: Option<String>) {
        *locked(&self.blocked) = blocked;
    }

    /// Returns whether the broker is there and does not accept results.
    fn is_blocked(&self) -> bool {
        locked(&self.blocked).is_some() && self.connected() != Some(false)
    }

    /// Why the store cannot be used, if it cannot.
    fn store_trouble(&self) -> Option<Trouble> {
        self.pipeline.get()?.outage()?.trouble()
    }

    /// Where work is stuck, if it is.
    pub fn stalled(&self) -> Option<String> {
        locked(&self.stalled).clone()
    }

    /// What is missing, or none if the worker is ready.
    pub fn missing(&self) -> Option<String> {
        if !self.warm.load(Ordering::Acquire) {
            return Some("the model is not loaded yet".to_owned());
        }
        if let Some(stalled) = self.stalled() {
            return Some(format!("no progress: {stalled}"));
        }
        let queues = locked(&self.queues);
        let paused = queues.values().find_map(|consuming| match consuming {
            Consuming::Paused(reason) => Some((*reason).to_owned()),
            Consuming::Yes | Consuming::Lost(_) => None,
        });
        let lost: Vec<(&str, &str)> = queues
            .iter()
            .filter_map(|(queue, consuming)| match consuming {
                Consuming::Lost(reason) => Some((queue.as_str(), reason.as_str())),
                Consuming::Yes | Consuming::Paused(_) => None,
            })
            .collect();
        if lost.is_empty() {
            if let Some(blocked) = locked(&self.blocked).as_ref() {
                return Some(blocked.clone());
            }
            if let Some(trouble) = self.store_trouble() {
                return Some(trouble.to_string());
            }
            let nothing = || "no jobs are being consumed".to_owned();
            return paused.or_else(|| queues.is_empty().then(nothing));
        }
        let names: Vec<&str> = lost.iter().map(|(queue, _)| *queue).collect();
        let mut missing = format!("no jobs are being consumed from {}", names.join(", "));
        // They have one broker.
        if let Some((_, reason)) = lost.iter().find(|(_, reason)| !reason.is_empty()) {
            missing.push_str(&format!(": {reason}"));
        }
        Some(missing)
    }
}

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
            let snapshot = self.readiness.metrics.snapshot();
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
