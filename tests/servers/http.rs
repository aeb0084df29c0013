//! What a worker says over HTTP, of real work: `/metrics` beside docs/metrics.md and under promtool,
//! `/status`, and the page at `/` in a real browser; and what it sends to a collector of traces.

mod collector;
mod exposed;
mod metrics;
mod page;
mod traces;

use crate::support::{Broker, Bucket, Client, Results, Setup, Worker, http_get, tiny};
use serde_json::{Value, json};

/// The class set of every test.
const SET: &str = "colours";

/// A broker, a bucket with three images and one version, a model of three values.
struct World {
    broker: Broker,
    bucket: Bucket,
    setup: Setup,
    images: Vec<String>,
}

impl World {
    async fn new() -> Self {
        let (broker, bucket) = (Broker::new().await, Bucket::new().await);
        let mut setup = Setup::worker(&broker, &format!("s3://{}/classes", bucket.name));
        setup.set("model.path", tiny::MODEL).set("classes.poll_seconds", "0.1");
        let images = tiny::images(&bucket).await;
        let world = Self { broker, bucket, setup, images };
        world.put_version("1", tiny::version(SET, "1")).await;
        world.activate("1").await;
        world
    }

    async fn put_version(&self, version: &str, file: Vec<u8>) {
        self.bucket.put(&format!("classes/{SET}/{version}.safetensors"), file).await;
    }

    /// As an operator's tool other than angler would: nothing is announced.
    async fn activate(&self, version: &str) {
        let active = json!({ "version": version }).to_string();
        self.bucket.put(&format!("classes/{SET}/active.json"), active).await;
    }

    /// Publishes so many jobs of all three images; yields their ids.
    async fn jobs(&self, client: &Client, count: usize) -> Vec<String> {
        let mut ids = Vec::new();
        for _ in 0..count {
            let id = crate::support::unique("job");
            client.job(&json!({"id": id, "images": self.images, "classes": SET})).await;
            ids.push(id);
        }
        ids
    }

    /// One job of these images; yields its result.
    async fn job(&self, client: &Client, results: &mut Results, job: Value) -> Value {
        client.job(&job).await;
        let result = results.next().await.body;
        assert_eq!(result["id"], job["id"], "{result}");
        result
    }
}

fn get(worker: &Worker, path: &str) -> String {
    let (code, body) = http_get(&format!("{}{path}", worker.http)).unwrap();
    assert_eq!(code, 200, "{path}: {body}");
    body
}

fn status(worker: &Worker) -> Value {
    serde_json::from_str(&get(worker, "/status")).unwrap()
}
