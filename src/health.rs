//! `/livez` and `/readyz`: whether the process should be restarted, because work in it is stuck,
//! and whether it takes work.
//! `/status`: which class vectors it serves, and which it refused, as JSON.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::routing::get;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::classes::catalog::Catalog;

/// What has to be true for a worker to be ready.
#[derive(Default)]
pub struct Readiness {
    warm: AtomicBool,
    /// Whether jobs come from each queue.
    consuming: Mutex<BTreeMap<String, bool>>,
    /// Why nothing is consumed although the broker is there.
    paused: Mutex<Option<&'static str>>,
    /// Where work is stuck.
    stalled: Mutex<Option<String>>,
    /// Why the broker takes no results for now.
    blocked: Mutex<Option<String>>,
    catalog: OnceLock<Arc<Catalog>>,
}

impl Readiness {
    /// The model has run once and the class sets to preload are loaded.
    pub fn set_warm(&self) {
        self.warm.store(true, Ordering::Release);
    }

    /// Whose class vectors `/status` tells of.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) {
        // There is one catalog a process.
        let _ = self.catalog.set(catalog);
    }

    /// Whether jobs are being consumed from a queue.
    pub fn set_consuming(&self, queue: &str, consuming: bool) {
        *locked(&self.paused) = None;
        locked(&self.consuming).insert(queue.to_owned(), consuming);
    }

    /// No jobs are being consumed from a queue, on purpose.
    pub fn set_paused(&self, queue: &str, reason: &'static str) {
        self.set_consuming(queue, false);
        *locked(&self.paused) = Some(reason);
    }

    /// Work does not move, and where; none once it does.
    pub fn set_stalled(&self, stalled: Option<String>) {
        *locked(&self.stalled) = stalled;
    }

    /// The broker takes no results, and why; none once it does.
    pub fn set_blocked(&self, blocked: Option<String>) {
        *locked(&self.blocked) = blocked;
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
        if let Some(blocked) = locked(&self.blocked).as_ref() {
            return Some(format!("the broker blocks publishers: {blocked}"));
        }
        let silent = {
            let queues = locked(&self.consuming);
            let silent = queues.iter().filter(|(_, consuming)| !**consuming);
            let silent: Vec<&str> = silent.map(|(queue, _)| queue.as_str()).collect();
            if silent.is_empty() && !queues.is_empty() {
                return None;
            }
            match silent.is_empty() {
                true => String::new(),
                false => format!(" from {}", silent.join(", ")),
            }
        };
        match *locked(&self.paused) {
            Some(reason) => Some(reason.to_owned()),
            None => Some(format!("no jobs are being consumed{silent}")),
        }
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
    let routes = Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .with_state(readiness);
    let server = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!("the HTTP server ended: {error}");
        }
    });
    Ok((address, AbortOnDropHandle::new(server)))
}

async fn status(
    State(readiness): State<Arc<Readiness>>,
) -> ([(HeaderName, &'static str); 1], String) {
    let classes = readiness.catalog.get().map(|catalog| catalog.status()).unwrap_or_default();
    let missing = readiness.missing();
    let status = json!({ "ready": missing.is_none(), "missing": missing, "classes": classes });
    ([(header::CONTENT_TYPE, "application/json")], format!("{status}\n"))
}

async fn live(State(readiness): State<Arc<Readiness>>) -> (StatusCode, String) {
    match readiness.stalled() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(stalled) => (StatusCode::SERVICE_UNAVAILABLE, format!("no progress: {stalled}\n")),
    }
}

async fn ready(State(readiness): State<Arc<Readiness>>) -> (StatusCode, String) {
    match readiness.missing() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[tokio::test]
    async fn stuck_work_turns_both_red_and_a_blocked_broker_only_readiness() {
        let readiness = Arc::new(Readiness::default());
        let (address, _server) = serve("127.0.0.1:0", Arc::clone(&readiness)).await.unwrap();
        readiness.set_warm();
        readiness.set_consuming("jobs", true);
        let both = async || (get(address, "/livez").await, get(address, "/readyz").await);
        assert_eq!(both().await, ((200, "alive\n".into()), (200, "ready\n".into())));

        readiness.set_stalled(Some("1 image(s) being decoded".into()));
        let (live, ready) = both().await;
        assert_eq!(live, (503, "no progress: 1 image(s) being decoded\n".into()));
        assert_eq!(ready, (503, "not ready: no progress: 1 image(s) being decoded\n".into()));
        readiness.set_stalled(None);

        readiness.set_blocked(Some("low on memory".into()));
        let (live, ready) = both().await;
        assert_eq!((live.0, ready.0), (200, 503));
        assert!(ready.1.contains("blocks publishers: low on memory"), "{}", ready.1);
        readiness.set_blocked(None);

        readiness.set_paused("jobs", "the store does not answer");
        let (live, ready) = both().await;
        assert_eq!((live.0, ready), (200, (503, "not ready: the store does not answer\n".into())));
        readiness.set_consuming("jobs", true);
        assert_eq!(both().await.1.0, 200);
    }
}
