//! What the tests against real servers share: a virtual host and a bucket for each test, workers as
//! processes, a client that publishes jobs and collects results.
//!
//! `tests/run.sh` starts the servers and says where they are; `eval "$(tests/services.sh up)"` does
//! the same for a shell.

#![allow(dead_code)] // Each test binary uses its own part.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

pub mod browser;
pub mod proxy;
pub mod raw;
pub mod servers;
pub mod tiny;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::Value;

/// How long anything may take before a test gives up.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A variable that `tests/run.sh` sets.
pub fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: this test needs the servers of tests/run.sh \
             (or: eval \"$(tests/services.sh up)\")"
        )
    })
}

/// A name that no other test has.
pub fn unique(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let nanos = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    format!("{prefix}-{}-{count}-{nanos}", std::process::id())
}

/// A path inside the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Files below a folder, sorted.
pub fn files(folder: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = walkdir::WalkDir::new(repository(folder))
        .into_iter()
        .map(Result::unwrap)
        .filter(|e| e.file_type().is_file())
        .map(walkdir::DirEntry::into_path)
        .collect();
    found.sort();
    found
}

/// Waits until `check` yields something, looking again every 20 ms.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A virtual host of the test's own, with the queues that workers declare there.
pub struct Broker {
    pub vhost: String,
    pub url: String,
    management: String,
}

impl Broker {
    pub async fn new() -> Self {
        Self::at(&var("ANGLER_TEST_AMQP_URL"), &var("ANGLER_TEST_AMQP_MANAGEMENT"))
    }

    /// Of a broker of the test's own.
    pub fn of(server: &servers::Server) -> Self {
        Self::at(&server.var("ANGLER_TEST_AMQP_URL"), &server.var("ANGLER_TEST_AMQP_MANAGEMENT"))
    }

    fn at(url: &str, management: &str) -> Self {
        let vhost = unique("angler");
        let (server, _) = url.rsplit_once('/').unwrap();
        let broker =
            Self { url: format!("{server}/{vhost}"), vhost, management: management.to_owned() };
        broker.manage("PUT", &format!("vhosts/{}", broker.vhost), None);
        let permissions = r#"{"configure":".*","write":".*","read":".*"}"#;
        let guest = format!("permissions/{}/guest", broker.vhost);
        broker.manage("PUT", &guest, Some(permissions));
        broker
    }

    /// One call of the management API; yields the answer's JSON, or null.
    pub fn manage(&self, method: &str, path: &str, body: Option<&str>) -> Value {
        call(&self.management, method, path, body).unwrap()
    }

    /// The same, repeated until the broker does it: it may be down.
    pub async fn insist(&self, method: &str, path: &str, body: Option<&str>) -> Value {
        eventually(&format!("{method} {path}"), async || {
            match status_of_call(&self.management, method, path, body) {
                Ok((200..300, answer)) => Some(answer),
                _ => None,
            }
        })
        .await
    }

    /// `host:port` of its AMQP listener.
    pub fn address(&self) -> String {
        let (_, rest) = self.url.rsplit_once('@').unwrap();
        rest.split('/').next().unwrap().to_owned()
    }

    /// The URL through a proxy, with a heartbeat of so many seconds.
    pub fn url_through(&self, address: &str, heartbeat: u32) -> String {
        format!("{}?heartbeat={heartbeat}", self.url.replace(&self.address(), address))
    }

    pub async fn connect(&self) -> Client {
        Client::new(&self.url).await
    }

    /// Ready and unacked messages of a queue, as the management API counts them.
    pub fn depth(&self, queue: &str) -> Option<u64> {
        let answer = self.manage("GET", &format!("queues/{}/{queue}", self.vhost), None);
        answer.get("messages").and_then(Value::as_u64)
    }

    /// Messages in each queue of this virtual host, ready and not acked.
    pub fn depths(&self) -> Vec<String> {
        let queues = self.manage("GET", &format!("queues/{}", self.vhost), None);
        let of = |q: &Value| {
            format!("{}: {} + {}", q["name"], q["messages_ready"], q["messages_unacknowledged"])
        };
        queues.as_array().map(|queues| queues.iter().map(of).collect()).unwrap_or_default()
    }

    /// What the management API says of a queue.
    pub fn queue(&self, queue: &str) -> Value {
        self.manage("GET", &format!("queues/{}/{queue}", self.vhost), None)
    }

    /// The names of this virtual host's connections.
    pub fn connections(&self) -> Vec<(String, String)> {
        let all = self.manage("GET", &format!("vhosts/{}/connections", self.vhost), None);
        let name = |c: &Value| {
            let own = c["user_provided_name"].as_str().unwrap_or_default();
            (c["name"].as_str().unwrap_or_default().to_owned(), own.to_owned())
        };
        all.as_array().map(|list| list.iter().map(name).collect()).unwrap_or_default()
    }

    /// Makes the broker drop a connection.
    pub fn cut(&self, connection: &str) {
        let name = connection.replace(' ', "%20").replace(':', "%3A").replace('>', "%3E");
        self.manage("DELETE", &format!("connections/{name}"), None);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A broker of the test's own may be down by now.
        let _ = call(&self.management, "DELETE", &format!("vhosts/{}", self.vhost), None);
    }
}

/// One call of the management API; yields the answer's JSON, or null.
pub fn management(method: &str, path: &str, body: Option<&str>) -> Value {
    call(&var("ANGLER_TEST_AMQP_MANAGEMENT"), method, path, body).unwrap()
}

/// The same at another broker's.
pub fn management_at(base: &str, method: &str, path: &str, body: Option<&str>) -> Value {
    call(base, method, path, body).unwrap()
}

/// The same, where the broker may be down.
pub fn call(
    base: &str,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> Result<Value, ureq::Error> {
    status_of_call(base, method, path, body).map(|(_, answer)| answer)
}

fn status_of_call(
    base: &str,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> Result<(u16, Value), ureq::Error> {
    let url = format!("{base}/api/{path}");
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .header("authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
        .header("content-type", "application/json")
        .body(body.unwrap_or_default().to_owned())
        .unwrap();
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(20)))
        .allow_non_standard_methods(true)
        .build()
        .into();
    let mut answer = agent.run(request)?;
    let text = answer.body_mut().read_to_string().unwrap_or_default();
    Ok((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or_default()))
}

/// Status and body of a GET.
pub fn http_get(url: &str) -> Option<(u16, String)> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(5)))
        .build()
        .into();
    let mut answer = agent.get(url).call().ok()?;
    let status = answer.status().as_u16();
    Some((status, answer.body_mut().read_to_string().unwrap_or_default()))
}

/// An AMQP client as a producer would write it: nothing of angler's is used.
pub struct Client {
    connection: Connection,
    pub channel: Channel,
}

/// A message as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    pub properties: BasicProperties,
    pub body: Value,
    pub raw: Vec<u8>,
}

impl Received {
    pub fn header(&self, key: &str) -> Option<String> {
        let headers = self.properties.headers().as_ref()?;
        headers.inner().get(key).map(|v| match v {
            lapin::types::AMQPValue::LongString(s) => s.to_string(),
            other => format!("{other:?}"),
        })
    }
}

impl Client {
    pub async fn new(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, channel }
    }

    /// Publishes to a queue and waits for the confirm.
    pub async fn publish(&self, queue: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let confirm = self
            .channel
            .basic_publish("".into(), queue.into(), options, body, properties)
            .await
            .unwrap()
            .await
            .unwrap();
        assert!(
            matches!(confirm, lapin::Confirmation::Ack(None)),
            "{queue} did not take the message: {confirm:?}"
        );
    }

    /// Publishes a job to `angler.jobs`.
    pub async fn job(&self, job: &Value) {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type("classify.v1".into())
            .with_delivery_mode(2);
        self.publish("angler.jobs", job.to_string().as_bytes(), properties).await;
    }

    /// Takes one message of a queue, if there is one.
    pub async fn get(&self, queue: &str) -> Option<Received> {
        let message =
            self.channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap()?;
        message.delivery.acker.ack(BasicAckOptions::default()).await.unwrap();
        Some(received(message.delivery))
    }

    /// A queue of the client's own.
    pub async fn private_queue(&self, name: &str) {
        self.channel
            .queue_declare(name.into(), QueueDeclareOptions::default(), FieldTable::default())
            .await
            .unwrap();
    }

    pub async fn consume(&self, queue: &str) -> Results {
        let consumer = self
            .channel
            .basic_consume(
                queue.into(),
                unique("test").as_str().into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        Results { consumer }
    }

    pub async fn close(self) {
        let _ = self.connection.close(200, "done".into()).await;
    }
}

fn received(delivery: lapin::message::Delivery) -> Received {
    let body = serde_json::from_slice(&delivery.data).unwrap_or_default();
    Received { properties: delivery.properties, body, raw: delivery.data }
}

/// Results as they arrive.
pub struct Results {
    consumer: Consumer,
}

impl Results {
    pub async fn next(&mut self) -> Received {
        let next = tokio::time::timeout(DEADLINE, self.consumer.next()).await;
        let delivery = next.expect("no result in time").unwrap().unwrap();
        delivery.acker.ack(BasicAckOptions::default()).await.unwrap();
        received(delivery)
    }

    /// The next `count` results, by job id; a second result of one job fails the test.
    pub async fn collect(&mut self, count: usize) -> BTreeMap<String, Received> {
        let mut all = BTreeMap::new();
        for _ in 0..count {
            let result = self.next().await;
            let id = result.body["id"].as_str().unwrap().to_owned();
            assert!(all.insert(id.clone(), result).is_none(), "a second result of {id}");
        }
        all
    }

    /// Results until every one of `ids` was seen; yields how many more there were.
    pub async fn until_all(&mut self, ids: impl IntoIterator<Item = String>) -> usize {
        let mut missing: std::collections::BTreeSet<String> = ids.into_iter().collect();
        let mut duplicates = 0;
        while !missing.is_empty() {
            let result = self.next().await;
            if !missing.remove(result.body["id"].as_str().unwrap()) {
                duplicates += 1;
            }
        }
        duplicates
    }
}

/// A bucket of the test's own.
pub struct Bucket {
    pub name: String,
    pub client: aws_sdk_s3::Client,
}

/// A client of the test store with these keys.
pub fn s3_client(key: &str, secret: &str) -> aws_sdk_s3::Client {
    s3_client_at(&var("ANGLER_TEST_S3_ENDPOINT"), key, secret)
}

/// A client of another address.
pub fn s3_client_at(endpoint: &str, key: &str, secret: &str) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(aws_sdk_s3::config::BehaviorVersion::v2026_01_12())
        .region(aws_sdk_s3::config::Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .credentials_provider(aws_sdk_s3::config::Credentials::new(key, secret, None, None, "test"))
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

impl Bucket {
    pub async fn new() -> Self {
        Self::named(&unique("b")).await
    }

    pub async fn named(name: &str) -> Self {
        Self::at(&var("ANGLER_TEST_S3_ENDPOINT"), name).await
    }

    /// In a store at another address.
    pub async fn at(endpoint: &str, name: &str) -> Self {
        let (key, secret) = (var("ANGLER_TEST_S3_KEY"), var("ANGLER_TEST_S3_SECRET"));
        let client = s3_client_at(endpoint, &key, &secret);
        // `public` is shared by tests: another one may have made it.
        let _ = client.create_bucket().bucket(name).send().await;
        Self { name: name.to_owned(), client }
    }

    pub async fn put(&self, key: &str, body: impl Into<Vec<u8>>) -> String {
        let body = aws_sdk_s3::primitives::ByteStream::from(body.into());
        self.client.put_object().bucket(&self.name).key(key).body(body).send().await.unwrap();
        format!("s3://{}/{key}", self.name)
    }

    /// Uploads files under their names; yields their URIs.
    pub async fn upload(&self, prefix: &str, paths: &[PathBuf]) -> Vec<String> {
        let mut uris = Vec::new();
        for (number, path) in paths.iter().enumerate() {
            let parent = path.parent().unwrap().file_name().unwrap().to_string_lossy();
            let name = path.file_name().unwrap().to_string_lossy();
            let key = format!("{prefix}/{parent}/{number:04}-{name}");
            uris.push(self.put(&key, std::fs::read(path).unwrap()).await);
        }
        uris
    }
}

/// Environment and flags that a process of angler's gets.
#[derive(Clone, Default)]
pub struct Setup {
    pub env: BTreeMap<String, String>,
    pub set: BTreeMap<String, String>,
    /// Flags beside the settings.
    pub flags: Vec<String>,
}

impl Setup {
    /// The test store with full access; no broker.
    pub fn store() -> Self {
        let mut setup = Self::default();
        setup.credentials(&var("ANGLER_TEST_S3_KEY"), &var("ANGLER_TEST_S3_SECRET"));
        setup.set("s3.endpoint", &var("ANGLER_TEST_S3_ENDPOINT"));
        setup.set("s3.path_style", "true");
        setup.set("embedder.onnxruntime_library", &var("ANGLER_TEST_ONNXRUNTIME"));
        setup
    }

    /// The test store and this broker; HTTP on a free port; class sets under `root`.
    pub fn worker(broker: &Broker, root: &str) -> Self {
        let mut setup = Self::store();
        // In the environment: it holds a password.
        setup.env.insert("ANGLER__AMQP__URL".into(), broker.url.clone());
        setup.set("http.listen", "127.0.0.1:0");
        setup.set("classes.root", root);
        setup
    }

    pub fn credentials(&mut self, key: &str, secret: &str) {
        self.env.insert("AWS_ACCESS_KEY_ID".into(), key.into());
        self.env.insert("AWS_SECRET_ACCESS_KEY".into(), secret.into());
        self.env.insert("AWS_EC2_METADATA_DISABLED".into(), "true".into());
    }

    pub fn set(&mut self, key: &str, value: &str) -> &mut Self {
        self.set.insert(key.into(), value.into());
        self
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_angler"));
        command.args(arguments).args(&self.flags).current_dir(repository(""));
        for (key, value) in &self.set {
            command.arg("--setting").arg(format!("{key}={value}"));
        }
        for key in ["ORT_DYLIB_PATH", "VIRTUAL_ENV", "AWS_PROFILE", "AWS_REGION"] {
            command.env_remove(key);
        }
        command.envs(&self.env).stdin(Stdio::null());
        command
    }

    /// Runs to the end: exit code, standard output, standard error.
    pub fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    /// Starts `angler worker` and waits until it is ready.
    pub async fn start(&self) -> Worker {
        let worker = self.launch().await;
        worker.ready().await;
        worker
    }

    /// Starts `angler worker` and waits until it answers on HTTP.
    pub async fn launch(&self) -> Worker {
        let mut child =
            self.command(&["worker"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (Arc::clone(&log), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let mut worker = Worker { child, log, http: String::new() };
        worker.http = eventually("the worker logs where it listens", async || {
            if let Some(status) = worker.child.try_wait().unwrap() {
                panic!("the worker ended with {status}:\n{}", worker.log());
            }
            let log = worker.log();
            let (_, rest) = log.split_once("listening on ")?;
            Some(rest.split_whitespace().next().unwrap().to_owned())
        })
        .await;
        worker
    }
}

/// A running `angler worker`; killed when dropped.
pub struct Worker {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    pub http: String,
}

impl Worker {
    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// How it ended, if it has.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn ready(&self) {
        eventually(&format!("ready:\n{}", self.log()), async || {
            let (status, _) = http_get(&format!("{}/readyz", self.http))?;
            (status == 200).then_some(())
        })
        .await;
    }

    pub fn signal(&self, name: &str) {
        let done =
            Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(done.unwrap().success());
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the process to end.
    pub async fn ended(&mut self) -> ExitStatus {
        eventually("the worker ends", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the worker's log ---\n{}\n---", self.log());
        }
    }
}

/// Writes a version of class vectors of the sample classes into a new folder by
/// `angler classes build`; yields the folder and `set@version`.
pub fn fashion_classes() -> (tempfile::TempDir, &'static str) {
    let root = tempfile::tempdir().unwrap();
    let mut setup = Setup::store();
    setup.set("classes.root", root.path().to_str().unwrap());
    let (code, _, log) = setup.run(&[
        "classes",
        "build",
        "samples/fashion/reference",
        "--set",
        "fashion",
        "--version",
        "1",
    ]);
    assert_eq!(code, 0, "{log}");
    (root, "fashion@1")
}
