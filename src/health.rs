//! `/livez` and `/readyz`: whether the process should be restarted, and whether it takes work.
//! `/status`: which class vectors it serves, and which it refused, as JSON.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

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
    consuming: AtomicBool,
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

    /// Whether jobs are being consumed.
    pub fn set_consuming(&self, consuming: bool) {
        self.consuming.store(consuming, Ordering::Release);
    }

    /// What is missing, or none if the worker is ready.
    pub fn missing(&self) -> Option<&'static str> {
        if !self.warm.load(Ordering::Acquire) {
            return Some("the model is not loaded yet");
        }
        (!self.consuming.load(Ordering::Acquire)).then_some("no jobs are being consumed")
    }
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
        .route("/livez", get(async || "alive\n"))
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

async fn ready(State(readiness): State<Arc<Readiness>>) -> (StatusCode, String) {
    match readiness.missing() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    }
}
