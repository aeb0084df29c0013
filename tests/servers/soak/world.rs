//! The servers, the ways to them, and what all parts of the soak share.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use angler_core::class_sets::load::version_key;

use crate::soak::ledger::Ledger;
use crate::support::proxy::Proxy;
use crate::support::servers::Server;
use crate::support::{Broker, Bucket, Setup, tiny};

/// How long the broker waits for an ack: shorter than many faults.
pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(15);
/// The broker's largest message, in bytes.
pub const MESSAGE_BYTES: usize = 32 << 10;
/// The queue that some jobs want their results in.
pub const REPLIES: &str = "soak.replies";
/// An object that exists, in a bucket that the workers may not read.
pub const FORBIDDEN: &str = "s3://forbidden/image.png";

const KEY: &str = "workerkey";
const SECRET: &str = "workersecret";

/// How the store judges the workers' credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credentials {
    Good,
    /// 403 `SignatureDoesNotMatch`.
    WrongSecret,
    /// 403 `InvalidAccessKeyId`.
    UnknownKey,
    /// 403 `AccessDenied`, for every object.
    NoGrant,
}

/// Everything but the workers.
pub struct World {
    pub seed: u64,
    pub minutes: f64,
    pub rabbitmq: Server,
    pub seaweedfs: Server,
    pub broker: Broker,
    pub to_broker: Proxy,
    /// In front of that, for commands only.
    pub commands_to_broker: Proxy,
    pub to_store: Proxy,
    /// What workers are started with.
    pub setup: Setup,
    /// What commands are started with.
    pub commands: Setup,
    /// One image of each of [`tiny::LABELS`].
    pub images: Vec<String>,
    pub ledger: Ledger,
    /// Lists, results and logs of commands.
    pub folder: PathBuf,
}

impl World {
    pub async fn new(seed: u64, minutes: f64) -> Self {
        let rabbitmq = Server::rabbitmq(&format!(
            "heartbeat = 3\nconsumer_timeout = {}\nmax_message_size = {MESSAGE_BYTES}\n",
            CONSUMER_TIMEOUT.as_millis()
        ));
        let seaweedfs = Server::unstarted("seaweedfs.sh");
        write_identities(&seaweedfs, Credentials::Good);
        seaweedfs.start();
        let (broker, endpoint) = (Broker::of(&rabbitmq), seaweedfs.var("ANGLER_TEST_S3_ENDPOINT"));
        let bucket = Bucket::at(&endpoint, "soak").await;
        let version = tiny::version("colours", "1");
        bucket.put(&format!("classes/{}", version_key("colours", "1")), version).await;
        bucket.put("classes/colours/active.json", r#"{"version":"1"}"#).await;
        let images = tiny::images(&bucket).await;
        Bucket::at(&endpoint, "forbidden").await.put("image.png", *b"secret").await;

        let to_broker = Proxy::new(&broker.address()).await;
        let commands_to_broker = Proxy::new(&to_broker.address()).await;
        let to_store = Proxy::new(endpoint.trim_start_matches("http://")).await;
        let mut setup = Setup::worker(&broker, "s3://soak/classes");
        setup.env.insert("ANGLER__AMQP__URL".into(), broker.url_through(&to_broker.address(), 3));
        setup.credentials(KEY, SECRET);
        setup.set("model.path", tiny::MODEL).set("embedder.backend", "tract");
        setup.set("s3.endpoint", &format!("http://{}", to_store.address()));
        // Longer than any fault, so that each job's outcome is known beforehand.
        setup.set("retry.delays_seconds", "0.5,1,2").set("retry.max_attempts", "100");
        setup.set("limits.image_seconds", "600").set("limits.job_seconds", "1200");
        setup.set("shutdown.grace_seconds", "10");
        let mut commands = setup.clone();
        let url = broker.url_through(&commands_to_broker.address(), 3);
        commands.env.insert("ANGLER__AMQP__URL".into(), url);
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("soak-{seed}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let ledger = Ledger::default();
        Self {
            seed,
            minutes,
            rabbitmq,
            seaweedfs,
            broker,
            to_broker,
            commands_to_broker,
            to_store,
            setup,
            commands,
            images,
            ledger,
            folder,
        }
    }

    /// `true` for the soak that is part of the ordinary tests.
    pub fn is_quick(&self) -> bool {
        self.minutes < 1.0
    }

    /// Makes the store judge the workers' credentials so from now on.
    pub fn judge(&self, credentials: Credentials) {
        write_identities(&self.seaweedfs, credentials);
        self.seaweedfs.signal("HUP");
    }

    /// RabbitMQ's version.
    pub async fn broker_version(&self) -> String {
        let overview = self.broker.insist("GET", "overview", None).await;
        overview["rabbitmq_version"].as_str().unwrap_or("?").to_owned()
    }

    /// Each queue with its messages, ready and unacked.
    pub async fn queues(&self) -> Vec<(String, u64)> {
        let path = format!("queues/{}", self.broker.vhost);
        let queues = self.broker.insist("GET", &path, None).await;
        let of = |queue: &Value| {
            let name = queue["name"].as_str().unwrap_or_default().to_owned();
            (name, queue["messages"].as_u64().unwrap_or(0))
        };
        queues.as_array().map(|queues| queues.iter().map(of).collect()).unwrap_or_default()
    }
}

/// SeaweedFS merges what it reads with what it knows, by name: an identity can be changed, not removed.
fn write_identities(store: &Server, credentials: Credentials) {
    let (key, secret, bucket) = match credentials {
        Credentials::Good => (KEY, SECRET, "soak"),
        Credentials::WrongSecret => (KEY, "another", "soak"),
        Credentials::UnknownKey => ("anotherkey", SECRET, "soak"),
        Credentials::NoGrant => (KEY, SECRET, "elsewhere"),
    };
    let identities = json!({"identities": [
        {"name": "all", "credentials": [{"accessKey": "testkey", "secretKey": "testsecret"}],
         "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
        {"name": "worker", "credentials": [{"accessKey": key, "secretKey": secret}],
         "actions": [format!("Read:{bucket}"), format!("List:{bucket}")]},
    ]});
    // It must never be read half written.
    let (new, file) = (store.folder().join("s3.json.new"), store.folder().join("s3.json"));
    std::fs::write(&new, identities.to_string()).unwrap();
    std::fs::rename(new, file).unwrap();
}
