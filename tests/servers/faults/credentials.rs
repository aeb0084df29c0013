//! The store answers, and refuses this worker: its credentials are rejected or missing, or it may
//! not read what it could read before.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use angler_core::class_sets::load::version_key;

use crate::faults::ledger::Ledger;
use crate::faults::world::{World, unready};
use crate::support::servers::Server;
use crate::support::{Broker, Bucket, Worker, eventually, http_get, s3_client_at, tiny};

/// A store of the test's own, whose identities change while it runs.
struct Store {
    server: Server,
    endpoint: String,
}

impl Store {
    fn start() -> Self {
        let server = Server::seaweedfs();
        let endpoint = server.var("ANGLER_TEST_S3_ENDPOINT");
        Self { server, endpoint }
    }

    /// From now on there is one identity, with this key and secret, and it may do this.
    async fn only(&self, key: &str, secret: &str, actions: &[&str]) {
        let identities = json!({"identities": [
            {"name": "all", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        ]});
        let path = self.server.folder().join("s3.json");
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, identities.to_string()).unwrap();
        assert_ne!(before, identities.to_string(), "nothing changes");
        self.server.signal("HUP");
        // It has taken note once the identity may do something, or exists.
        let client = s3_client_at(&self.endpoint, key, secret);
        let read_anything = actions.contains(&"Read");
        eventually("the store knows its identities", async || {
            let answer = client.get_object().bucket("no-such-bucket").key("k").send().await;
            let error = answer.unwrap_err().into_service_error();
            let code = aws_sdk_s3::error::ProvideErrorMetadata::code(&error).unwrap().to_owned();
            (code == if read_anything { "NoSuchBucket" } else { "AccessDenied" }).then_some(())
        })
        .await;
    }

    async fn all(&self) {
        self.only("testkey", "testsecret", &["Admin", "Read", "Write", "List"]).await;
    }

    async fn world(&self) -> World {
        World::of(Broker::new().await, &self.endpoint).await
    }
}

/// A profile file in place of credentials in the environment.
fn profile(world: &mut World, path: &Path) {
    let env = &mut world.setup.env;
    env.remove("AWS_ACCESS_KEY_ID");
    env.remove("AWS_SECRET_ACCESS_KEY");
    let path = path.to_str().unwrap();
    env.insert("AWS_SHARED_CREDENTIALS_FILE".into(), path.into());
    env.insert("AWS_CONFIG_FILE".into(), format!("{path}.none"));
}

fn write_profile(path: &PathBuf, key: &str, secret: &str) {
    let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n");
    std::fs::write(path, text).unwrap();
}

/// All jobs of the queue wait, given back for others to take.
async fn all_wait(world: &World, count: u64) {
    eventually("all jobs wait", async || {
        let queue = world.broker.queue("angler.jobs");
        let retried = world.broker.depth("angler.retry.500ms").unwrap_or(0);
        (queue["messages_ready"].as_u64()? + retried == count).then_some(())
    })
    .await;
}

fn metric(worker: &Worker, line: &str) -> bool {
    let (_, text) = http_get(&format!("{}/metrics", worker.http)).unwrap();
    text.lines().any(|found| found == line)
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_stop_working_spend_no_attempt_and_no_job() {
    let store = Store::start();
    let world = store.world().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let everything = ["Admin", "Read", "Write", "List"];
    for (case, key, secret, actions, reason, cause) in [
        ("secret", "testkey", "other", &everything[..], "403 SignatureDoesNotMatch", "credentials"),
        ("key", "another", "testsecret", &everything, "403 InvalidAccessKeyId", "credentials"),
        ("grant", "testkey", "testsecret", &["Read:else"], "403 AccessDenied", "denied"),
    ] {
        let ids = world.jobs(&client, case, 60).await;
        ledger.collect(&mut results, &ids[..5]).await;
        store.only(key, secret, actions).await;
        unready(&worker, reason).await;
        assert!(metric(&worker, "angler_store_away 1"), "{case}");
        assert!(metric(&worker, &format!("angler_store_outage{{cause=\"{cause}\"}} 1")), "{case}");
        // For longer than the retries would take.
        ledger.linger(&mut results, Duration::from_secs(3)).await;
        store.all().await;
        ledger.collect(&mut results, &ids).await;
        worker.ready().await;
        assert_eq!(ledger.all_done(), 1, "{case}: an attempt was spent");
    }
    assert_eq!(ledger.duplicates, 0);
    assert!(client.get("angler.dead").await.is_none());
    let log = worker.log();
    assert_eq!(log.matches("taking no jobs until the store can be used").count(), 3, "{log}");
    assert_eq!(log.matches("the store can be used again").count(), 3, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_in_a_file_are_read_again_when_they_are_rejected_or_missing() {
    let store = Store::start();
    let mut world = store.world().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("credentials");
    profile(&mut world, &path);
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let mut ids = world.jobs(&client, "none", 20).await;
    unready(&worker, "no credentials for the store").await;
    all_wait(&world, 20).await;
    write_profile(&path, "testkey", "testsecret");
    ledger.collect(&mut results, &ids).await;
    // Rotated at the store first, in the file later.
    store.only("testkey", "rotated", &["Admin", "Read", "Write", "List"]).await;
    ids = world.jobs(&client, "rotated", 20).await;
    unready(&worker, "rejected the worker's credentials").await;
    write_profile(&path, "testkey", "rotated");
    ledger.collect(&mut results, &ids).await;
    worker.ready().await;
    assert_eq!(ledger.all_done(), 1, "an attempt was spent");
}

#[tokio::test(flavor = "multi_thread")]
async fn class_sets_that_cannot_be_read_for_want_of_credentials_spend_no_attempt() {
    let store = Store::start();
    let mut world = store.world().await;
    let bucket = Bucket::at(&store.endpoint, "class-sets").await;
    bucket.put(&version_key("colours", "1"), tiny::version("colours", "1")).await;
    world.setup.set.remove("classes.preload");
    world.setup.set("classes.root", "s3://class-sets");
    // The images' buckets do not name it.
    let images = world.images[0].split('/').nth(2).unwrap().to_owned();
    world.setup.set("s3.allowed_buckets", &images);
    store.only("testkey", "other", &["Admin", "Read", "Write", "List"]).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut ledger = Ledger::default();
    let ids = world.jobs(&client, "a", 20).await;
    unready(&worker, "403 SignatureDoesNotMatch").await;
    all_wait(&world, 20).await;
    store.all().await;
    ledger.collect(&mut results, &ids).await;
    assert_eq!(ledger.all_done(), 1, "an attempt was spent");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_may_never_read_is_denied_at_once_while_it_reads_other_things() {
    let store = Store::start();
    let mut world = store.world().await;
    let forbidden = Bucket::at(&store.endpoint, "forbidden").await;
    let forbidden = forbidden.put("a.png", "nobody sees it").await;
    world.setup.set("retry.max_attempts", "2");
    let bucket = world.images[0].split('/').nth(2).unwrap();
    store.only("testkey", "testsecret", &[&format!("Read:{bucket}")]).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let job =
        |id: &str, images: Vec<&str>| json!({"id": id, "images": images, "classes": "colours@1"});
    let codes = |result: &Value| -> Vec<String> {
        let images = result["images"].as_array().unwrap().iter();
        images.map(|image| image["error"]["code"].as_str().unwrap_or("none").to_owned()).collect()
    };
    // While nothing was read yet, it may be that nothing can be.
    client.job(&job("unknown", vec![&forbidden, &forbidden])).await;
    let unknown = results.next().await.body;
    assert_eq!((unknown["status"].as_str(), unknown["attempt"].as_u64()), (Some("done"), Some(2)));
    assert_eq!(codes(&unknown), ["access_denied"; 2]);
    // Told apart by the image beside it, then by what was read before.
    for (id, images) in
        [("beside", vec![&*forbidden, &*world.images[0]]), ("alone", vec![&*forbidden; 40])]
    {
        client.job(&job(id, images)).await;
        let result = results.next().await.body;
        assert_eq!((result["id"].as_str(), result["attempt"].as_u64()), (Some(id), Some(1)));
        assert_eq!(codes(&result)[0], "access_denied", "{result}");
    }
    let ids = world.jobs(&client, "good", 5).await;
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &ids).await;
    assert_eq!(ledger.all_done(), 1);
    worker.ready().await;
    assert!(!worker.log().contains("taking no jobs"), "{}", worker.log());
}
