//! What each test has: a broker and a store, perhaps behind proxies; three small images; a model
//! that costs nothing.

use serde_json::{Value, json};

use angler_core::class_sets::load::version_key;

use crate::support::{Broker, Bucket, Client, Setup, Worker, eventually, http_get, tiny, var};

pub struct World {
    pub broker: Broker,
    pub setup: Setup,
    /// A red, a green and a blue one.
    pub images: Vec<String>,
    _root: tempfile::TempDir,
}

impl World {
    /// On the servers that all tests share.
    pub async fn new() -> Self {
        Self::of(Broker::new().await, &var("ANGLER_TEST_S3_ENDPOINT")).await
    }

    /// On this broker, and the store at this address.
    pub async fn of(broker: Broker, store: &str) -> Self {
        let bucket = Bucket::at(store, &crate::support::unique("b")).await;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(version_key("colours", "1"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, tiny::version("colours", "1")).unwrap();
        let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
        setup.set("model.path", tiny::MODEL).set("embedder.backend", "tract");
        setup.set("s3.endpoint", store).set("retry.delays_seconds", "0.5");
        setup.set("classes.preload", "colours@1");
        let images = tiny::images(&bucket).await;
        Self { broker, setup, images, _root: root }
    }

    /// Publishes jobs with all three images each; yields their ids.
    pub async fn jobs(&self, client: &Client, prefix: &str, count: usize) -> Vec<String> {
        let mut ids = Vec::new();
        for number in 0..count {
            let id = format!("{prefix}/{number}");
            client.job(&self.job(&id)).await;
            ids.push(id);
        }
        ids
    }

    pub fn job(&self, id: &str) -> Value {
        json!({"id": id, "images": self.images, "classes": "colours@1"})
    }
}

/// Waits until the worker says that it is not ready, and why.
pub async fn unready(worker: &Worker, reason: &str) {
    eventually(&format!("not ready: {reason}"), async || {
        let (status, text) = http_get(&format!("{}/readyz", worker.http))?;
        (status == 503 && text.contains(reason)).then_some(())
    })
    .await;
    // Nothing is wrong with the process.
    assert_eq!(http_get(&format!("{}/livez", worker.http)).unwrap().0, 200);
}
