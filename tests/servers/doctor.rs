//! `angler doctor` as a user runs it, against a real broker and a real store: what is planted is found
//! and told with what to do, what is well is left as it is, and nothing secret is shown.

use crate::support::{Broker, Bucket, Setup, eventually, repository, tiny};
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use ndarray::array;
use serde_json::{Value, json};

use angler_vectors::{Contents, file};

/// A virtual host, and a bucket with a class set that is active, of a model that costs nothing.
struct World {
    broker: Broker,
    bucket: Bucket,
    setup: Setup,
}

impl World {
    async fn new() -> Self {
        let (broker, bucket) = (Broker::new().await, Bucket::new().await);
        let mut setup = Setup::worker(&broker, &format!("s3://{}/classes", bucket.name));
        setup.set("model.path", tiny::MODEL);
        setup.set("s3.allowed_buckets", &bucket.name);
        let world = Self { broker, bucket, setup };
        world.version("colours", "1", tiny::version("colours", "1")).await;
        world.bucket.put("classes/colours/active.json", r#"{"version": "1"}"#).await;
        world
    }

    async fn version(&self, set: &str, version: &str, bytes: Vec<u8>) {
        self.bucket.put(&format!("classes/{set}/{version}.safetensors"), bytes).await;
    }

    /// Runs it and checks what holds for every run; yields the exit code and the report.
    fn doctor(&self) -> (i32, Value) {
        doctor(&self.setup)
    }

    /// Runs it where there is something wrong; yields the report.
    fn broken(&self) -> Value {
        let (code, report) = self.doctor();
        assert_eq!(code, 1, "{report:#}");
        report
    }

    /// Queues, exchanges and objects: all that it could change.
    async fn state(&self) -> Value {
        let vhost = &self.broker.vhost;
        let kept = |kind: &str, keys: &[&str]| {
            let all = self.broker.manage("GET", &format!("{kind}/{vhost}"), None);
            let mut all: Vec<String> = all
                .as_array()
                .unwrap()
                .iter()
                .map(|one| keys.iter().map(|key| one[key].to_string()).collect())
                .collect();
            all.sort();
            all
        };
        let queues = kept("queues", &["name", "arguments", "durable", "type"]);
        let exchanges = kept("exchanges", &["name", "type", "durable"]);
        let objects = self.bucket.client.list_objects_v2().bucket(&self.bucket.name).send().await;
        let objects: Vec<String> = objects
            .unwrap()
            .contents()
            .iter()
            .map(|o| format!("{:?} {:?} {:?}", o.key(), o.e_tag(), o.last_modified()))
            .collect();
        json!({ "queues": queues, "exchanges": exchanges, "objects": objects })
    }

    async fn declare(&self, queue: &str, arguments: &[(&str, AMQPValue)]) {
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert((*key).into(), value.clone());
        }
        let client = self.broker.connect().await;
        let durable = QueueDeclareOptions::durable();
        client.channel.queue_declare(queue.into(), durable, table).await.unwrap();
        client.close().await;
    }
}

fn doctor(setup: &Setup) -> (i32, Value) {
    let (code, out, log) = setup.run(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{log}"));
    for secret in ["guest:guest", "testsecret", "hunter2"] {
        assert!(!out.contains(secret) && !log.contains(secret), "{secret}:\n{out}{log}");
    }
    let mut counts = [0, 0];
    for check in report["checks"].as_array().unwrap() {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "warning", "problem"].contains(&state), "{check:#}");
        // Whatever is wrong is told with what to do.
        let remedy = check["remedy"].as_str().unwrap_or_default();
        assert_eq!(state == "ok", remedy.is_empty(), "{check:#}");
        assert!(!check["message"].as_str().unwrap().is_empty(), "{check:#}");
        counts[0] += u64::from(state == "problem");
        counts[1] += u64::from(state == "warning");
    }
    assert_eq!([&report["problems"], &report["warnings"]], counts, "{report:#}");
    assert_eq!(code == 0, counts[0] == 0, "{report:#}");
    (code, report)
}

/// The one line of this name.
fn line<'a>(report: &'a Value, section: &str, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    let mut found = checks.iter().filter(|c| c["section"] == section && c["name"] == name);
    let one = found.next().unwrap_or_else(|| panic!("no {section}, {name}: {report:#}"));
    assert!(found.next().is_none(), "{section}, {name} twice: {report:#}");
    one
}

/// That a line is in this state, and its message and its remedy hold these words.
fn told(report: &Value, (section, name): (&str, &str), state: &str, words: &str, remedy: &str) {
    let line = line(report, section, name);
    assert_eq!(line["state"], state, "{line:#}");
    assert!(line["message"].as_str().unwrap().contains(words), "{words}: {line:#}");
    assert!(line["remedy"].as_str().unwrap_or_default().contains(remedy), "{remedy}: {line:#}");
}

/// What is not ok, by name.
fn wrong(report: &Value) -> Vec<&str> {
    let checks = report["checks"].as_array().unwrap().iter();
    checks.filter(|c| c["state"] != "ok").map(|c| c["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_is_well_it_says_so_and_changes_nothing() {
    let mut world = World::new().await;
    // Before any worker has run: the queues are not there, and are not there afterwards.
    let before = world.state().await;
    let (code, report) = world.doctor();
    assert_eq!((code, wrong(&report)), (0, vec![]), "{report:#}");
    assert_eq!(world.state().await, before);
    assert_eq!(before["queues"], json!([]));
    let jobs = ("broker", "angler.jobs");
    told(&report, jobs, "ok", "not there yet", "");
    told(&report, ("class sets", "colours"), "ok", "1 is active: 3 classes, 3 vectors", "");
    told(&report, ("store", "conditional writes"), "ok", "keeps to conditions", "");
    let agree = line(&report, "back ends", "onnxruntime-cpu beside tract-cpu");
    assert!(agree["message"].as_str().unwrap().contains("cosine of 1.0000"), "{agree:#}");

    // Beside one that runs.
    let worker = world.setup.start().await;
    let consumers = || world.broker.queue("angler.jobs")["consumers"].as_u64();
    eventually("the worker consumes", async || consumers().filter(|n| *n == 1)).await;
    let client = world.broker.connect().await;
    client.publish("angler.results", b"{}", lapin::BasicProperties::default()).await;
    world.setup.set("http.listen", worker.http.trim_start_matches("http://"));
    let before = world.state().await;
    let (code, report) = world.doctor();
    assert_eq!((code, wrong(&report)), (0, vec![]), "{report:#}");
    assert_eq!(world.state().await, before);
    told(&report, jobs, "ok", "as it should be; 0 messages ready, 1 worker", "");
    told(&report, ("broker", "angler.results"), "ok", "1 message ready, no consumer", "");
    told(&report, ("settings", "http.listen"), "ok", "in use by a worker that is ready", "");
    assert!(world.broker.queue("angler.retry.5m")["name"].is_string(), "{before:#}");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn for_people_it_is_grouped_and_fits_80_columns() {
    let mut world = World::new().await;
    world.setup.set("classes.preload", "bottles");
    let (code, text, log) = world.setup.run(&["doctor"]);
    assert_eq!((code, log.as_str()), (1, ""), "{text}");
    for heading in ["settings", "broker", "store", "model", "back ends", "class sets"] {
        assert_eq!(text.lines().filter(|line| *line == heading).count(), 1, "{heading}: {text}");
    }
    let path = |line: &&str| !line.trim_start().starts_with('/');
    for line in text.lines().filter(path) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    assert!(text.contains("\n  problem  classes.preload bottles: "), "{text}");
    assert!(text.contains("\n           → "), "{text}");
    assert!(text.ends_with("\n1 problem, no warnings\n"), "{text}");
    // No colours in a pipe.
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_used_are_a_finding_and_exit_code_2() {
    let mut setup = Setup::default();
    setup.set("amqp.prefecth", "4");
    let (code, out, log) = setup.run(&["doctor", "--json"]);
    assert_eq!((code, log.as_str()), (2, ""), "{out}");
    let report: Value = serde_json::from_str(&out).unwrap();
    told(&report, ("settings", "settings"), "problem", "prefecth", "angler default-settings");
    assert_eq!(report["problems"], 1);
    let mut setup = Setup::default();
    setup.set("log.level", "what,is=this");
    let (code, out, _) = setup.run(&["doctor"]);
    assert!(code == 2 && out.contains("problem") && out.contains("log.level"), "{code} {out}");
    assert_eq!(Setup::default().run(&["doctor", "--jsno"]).0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_broker_password_is_found() {
    let mut world = World::new().await;
    let url = world.broker.url.replace("guest:guest", "guest:hunter2");
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let report = world.broken();
    told(&report, ("broker", "connection"), "ok", "RabbitMQ", "");
    let login = ("broker", "login");
    told(&report, login, "problem", "refuses user guest", "rabbitmqctl change_password guest");
    assert_eq!(wrong(&report), ["login"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_does_not_listen_is_found_and_hides_nothing_of_the_store() {
    let mut world = World::new().await;
    let url = "amqp://guest:guest@127.0.0.1:1/%2f";
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url.into());
    world.setup.set("s3.allowed_buckets", "nowhere-at-all");
    let report = world.broken();
    let connection = ("broker", "connection");
    told(&report, connection, "problem", "127.0.0.1:1: ", "correct host and port in amqp.url");
    told(&report, ("store", "bucket nowhere-at-all"), "problem", "no such bucket", "Make the");
    assert_eq!(wrong(&report), ["connection", "bucket nowhere-at-all"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_nodes_is_looked_at_and_one_that_works_is_enough() {
    let mut world = World::new().await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let real = world.broker.address();
    let at = |address: &str| world.broker.url.replace(&real, address);
    let wrong_password = world.broker.url.replace("guest:guest", "guest:hunter2");
    let urls = [at("127.0.0.1:1"), at(&silent), wrong_password, world.broker.url.clone()];
    world.setup.env.insert("ANGLER__AMQP__URL".into(), urls.join(","));
    let (code, report) = world.doctor();
    assert_eq!(code, 0, "{report:#}");
    let checks = report["checks"].as_array().unwrap().iter();
    let broker: Vec<(&str, &str)> = checks
        .filter(|check| check["name"] == "connection" || check["name"] == "login")
        .map(|check| (check["state"].as_str().unwrap(), check["message"].as_str().unwrap()))
        .collect();
    let said = |state: &str, words: &str| {
        let found = broker.iter().any(|(is, message)| *is == state && message.contains(words));
        assert!(found, "{state}: {words} is not in {broker:#?}");
    };
    said("warning", "127.0.0.1:1: ");
    said("warning", &format!("{silent}: no answer within 10 s"));
    said("warning", &format!("{real} refuses user guest"));
    said("ok", &format!("amqp://{real}/{} accepts user guest", world.broker.vhost));
    told(&report, ("broker", "angler.jobs"), "ok", "not there yet", "");

    // Where none works, each is a problem.
    world.setup.env.insert("ANGLER__AMQP__URL".into(), urls[..3].join(","));
    let report = world.broken();
    assert_eq!(report["problems"], 3, "{report:#}");
}

/// What is written where a URL of a broker belongs, with a password somewhere.
const BROKEN: [&str; 28] = [
    "hunter2",
    "amqp:u:hunter2@h/v",
    "amqp:/u:hunter2@h/v",
    "amqp:///u:hunter2@h/v",
    "amqp//u:hunter2@h/v",
    "u:hunter2@h/v",
    "http://u:hunter2@h/v",
    "amqp://u:1/hunter2@h/v",
    "amqp://u:1?hunter2@h/v",
    "amqp://u:1#hunter2@h/v",
    "amqp://u:hunter2/v",
    "amqp://u:hunter2@/v",
    "amqp://u:hunter2@h:port/v",
    "amqp://u:hunter2@h:99999/v",
    "amqp://u:hunter2@[::1/v",
    "amqp://u:hunter2@[::zz]/v",
    "amqp://u:hunter2@h h/v",
    "amqp://h/u:hunter2",
    "amqp://h/v;amqp://u:hunter2@h/v",
    "amqp://h/v amqp://u:hunter2@h/v",
    "amqp://h/v,u:hunter2@h/v",
    "amqp://h/v,amqp:u:hunter2@h/v",
    "amqp://h/v,http://u:hunter2@h/v",
    "amqp://h/v,amqp://u:hunter2@h:x/v",
    "amqp://h/v,amqp://u:1/hunter2@h/v",
    "amqp://u:hunter2@h/v,amqp://u:hunter2@h/w",
    "[\"amqp://u:hunter2@h/v\"]",
    "amqp://h:1,u:hunter2@h:y/v",
];

/// Runs it; yields the exit code. No output has the password.
fn run(setup: &Setup, arguments: &[&str]) -> i32 {
    let (code, out, log) = setup.run(arguments);
    assert!(!out.contains("hunter2") && !log.contains("hunter2"), "{arguments:?}\n{out}{log}");
    code
}

#[test]
fn no_command_shows_the_password_of_a_broken_url_wherever_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("angler.toml");
    let config = file.to_str().unwrap();
    let commands: [&[&str]; 5] = [
        &["doctor"],
        &["doctor", "--json"],
        &["worker"],
        &["dead", "list", "--json"],
        &["enqueue", "-", "--classes", "a", "--run", "r"],
    ];
    for (at, url) in BROKEN.iter().enumerate() {
        let mut env = Setup::default();
        env.env.insert("ANGLER__AMQP__URL".into(), (*url).to_owned());
        let mut flag = Setup::default();
        flag.set("amqp.url", url);
        std::fs::write(&file, format!("[amqp]\nurl = '{url}'\n")).unwrap();
        for (setup, more) in
            [(&env, &[][..]), (&flag, &[]), (&Setup::default(), &["--config", config])]
        {
            let arguments = [commands[at % commands.len()], more].concat();
            assert_eq!(run(setup, &arguments), 2, "{url}");
        }
    }
    // Where no URL belongs.
    let none = Setup::default();
    let url = "amqp://u:hunter2@h/v";
    assert_eq!(run(&none, &["worker", url]), 2);
    assert_eq!(run(&none, &["worker", "--setting", url]), 2);
    assert_eq!(run(&none, &["worker", "--setting", "amqp.url hunter2"]), 2);
    assert_eq!(run(&none, &["worker", "--setting", &format!("amqp.url:{url}?heartbeat=5")]), 2);
    assert_eq!(run(&none, &["worker", "--setting", &format!("embedder.backend={url}")]), 2);
    assert_eq!(run(&none, &["worker", &format!("--backend={url}")]), 2);
    for text in ["[amqp]\nurl = \"amqp://u:hunter2@h", "[amqp]\nurl = hunter2", "amqp = 'hunter2'"]
    {
        std::fs::write(&file, text).unwrap();
        for command in commands {
            assert_eq!(run(&none, &[command, &["--config", config]].concat()), 2, "{text}");
        }
    }
    // Addresses that only lead nowhere.
    for url in [
        "amqp://u:hunter2@127.0.0.1:1/v?heartbeat=5",
        "amqp://hunter2@127.0.0.1:1/v",
        "amqp://127.0.0.1:1/v?password=hunter2",
        "amqp://u:hunter2@127.0.0.1:1/v,amqps://u:hunter2@127.0.0.1:1/v",
    ] {
        let mut setup = Setup::default();
        setup.env.insert("ANGLER__AMQP__URL".into(), url.to_owned());
        setup.set("log.level", "trace");
        assert_eq!(run(&setup, &["dead", "list"]), 1, "{url}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_silent_is_given_up_and_nothing_waits_for_it() {
    let mut world = World::new().await;
    // The system takes connections for them, and nobody answers.
    let [broker, store] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = |listener: &std::net::TcpListener| listener.local_addr().unwrap().to_string();
    let url = format!("amqp://guest:guest@{}/%2f", address(&broker));
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    world.setup.set("s3.endpoint", &format!("http://{}", address(&store)));
    let begin = std::time::Instant::now();
    let report = world.broken();
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());
    let silent = "no answer within 10 s";
    told(&report, ("broker", "connection"), "problem", silent, "Start the broker");
    let bucket = format!("bucket {}", world.bucket.name);
    told(&report, ("store", &bucket), "problem", silent, "s3.endpoint");
    told(&report, ("class sets", "classes.root"), "problem", silent, "classes.root");
    told(&report, ("back ends", "tract"), "ok", "works", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_in_the_brokers_place_is_told_from_a_broker() {
    let mut world = World::new().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://u:hunter2@{}/%2f", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::io::Write::write_all(&mut stream.unwrap(), b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        }
    });
    world.setup.env.insert("ANGLER__AMQP__URL".into(), url);
    let report = world.broken();
    told(&report, ("broker", "connection"), "problem", "does not speak AMQP", "amqps://");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_virtual_host_is_found() {
    let mut world = World::new().await;
    world.setup.env.insert("ANGLER__AMQP__URL".into(), format!("{}-not", world.broker.url));
    let report = world.broken();
    let vhost = format!("no virtual host {}-not", world.broker.vhost);
    let remedy = format!("rabbitmqctl add_vhost {}-not", world.broker.vhost);
    told(&report, ("broker", "virtual host"), "problem", &vhost, &remedy);
    assert_eq!(wrong(&report), ["virtual host"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_declare_is_found() {
    let world = World::new().await;
    let setup = world.setup.start().await;
    drop(setup);
    let none = r#"{"configure":"^$","write":".*","read":".*"}"#;
    world.broker.manage("PUT", &format!("permissions/{}/guest", world.broker.vhost), Some(none));
    let jobs = ("broker", "angler.jobs");
    let (code, report) = world.doctor();
    told(&report, jobs, "warning", "may not declare it", "rabbitmqctl set_permissions -p");
    assert_eq!(code, 0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_queue_that_was_declared_otherwise_is_found_and_left_as_it_is() {
    let world = World::new().await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let kind = [("x-queue-type", text("classic"))];
    world.declare("angler.jobs", &kind).await;
    // As a worker declares it, but for the limit.
    let without_limit = [
        ("x-queue-type", text("quorum")),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text("angler.undeliverable")),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ];
    world.declare("angler.suspects", &without_limit).await;
    world.declare("angler.dead", &kind).await;
    let before = world.state().await;
    let report = world.broken();
    assert_eq!(world.state().await, before);
    let delete = format!("rabbitmqctl delete_queue --vhost {} --if-empty", world.broker.vhost);
    let jobs = ("broker", "angler.jobs");
    told(&report, jobs, "problem", "its x-queue-type is classic, a worker's is quorum", &delete);
    let suspects = ("broker", "angler.suspects");
    told(&report, suspects, "problem", "its x-delivery-limit is none, a worker's is 100", &delete);
    // What is only kept is kept in any queue.
    told(&report, ("broker", "angler.dead"), "warning", "classic", &delete);
    told(&report, ("broker", "angler.results"), "ok", "not there yet", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_of_an_older_angler_are_a_warning() {
    let world = World::new().await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let older = [
        ("x-queue-type", text("quorum")),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text("angler.dead")),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
        ("x-delivery-limit", AMQPValue::LongLongInt(10)),
    ];
    world.declare("angler.jobs", &older).await;
    let (code, report) = world.doctor();
    let delete = format!("rabbitmqctl delete_queue --vhost {} --if-empty", world.broker.vhost);
    told(&report, ("broker", "angler.jobs"), "warning", "a worker's is", &delete);
    assert_eq!(code, 0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_exchange_in_the_control_exchanges_place_is_found() {
    let world = World::new().await;
    let client = world.broker.connect().await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let (kind, none) = (lapin::ExchangeKind::Topic, FieldTable::default());
    let declared = client.channel.exchange_declare("angler.control".into(), kind, durable, none);
    declared.await.unwrap();
    let report = world.broken();
    let control = ("broker", "angler.control");
    told(&report, control, "problem", "its type is topic, a worker's is fanout", "amqp.control");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_of_the_store_is_found() {
    let mut world = World::new().await;
    world.setup.credentials("testkey", "hunter2");
    let report = world.broken();
    let bucket = format!("bucket {}", world.bucket.name);
    let bucket = ("store", bucket.as_str());
    told(&report, bucket, "problem", "rejected the credentials", "AWS_SECRET_ACCESS_KEY");
    told(&report, ("class sets", "classes.root"), "problem", "403", "the store's section");
    told(&report, ("broker", "login"), "ok", "accepts user guest", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_are_missing_are_told_from_wrong_ones() {
    let mut world = World::new().await;
    for key in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        world.setup.env.remove(key);
    }
    // Nobody's files either.
    for key in ["AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"] {
        world.setup.env.insert(key.into(), "/nowhere".into());
    }
    let report = world.broken();
    let bucket = format!("bucket {}", world.bucket.name);
    told(&report, ("store", &bucket), "problem", "no credentials", "Set AWS_ACCESS_KEY_ID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_bucket_of_the_class_sets_is_found() {
    let mut world = World::new().await;
    world.setup.set("classes.root", "s3://nowhere-at-all/classes");
    let report = world.broken();
    let bucket = ("store", "bucket nowhere-at-all");
    told(&report, bucket, "problem", "no such bucket", "Make the bucket nowhere-at-all");
    told(&report, ("class sets", "classes.root"), "problem", "NoSuchBucket", "classes.root");
    // Of a bucket that is not there nothing else can be said, and nothing is: no line on writes.
    assert_eq!(wrong(&report), ["bucket nowhere-at-all", "classes.root"]);
    assert!(!report.to_string().contains("conditional writes"), "{report:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_only_read_are_enough_for_a_worker() {
    let mut world = World::new().await;
    let public = Bucket::named("public").await;
    let prefix = crate::support::unique("doctor");
    public.put(&format!("{prefix}/colours/1.safetensors"), tiny::version("colours", "1")).await;
    public.put(&format!("{prefix}/colours/active.json"), r#"{"version": "1"}"#).await;
    let ro = ["ANGLER_TEST_S3_RO_KEY", "ANGLER_TEST_S3_RO_SECRET"].map(crate::support::var);
    world.setup.credentials(&ro[0], &ro[1]);
    world.setup.set("s3.allowed_buckets", "public");
    world.setup.set("classes.root", &format!("s3://public/{prefix}"));
    let (code, report) = world.doctor();
    assert_eq!((code, wrong(&report)), (0, vec![]), "{report:#}");
    told(&report, ("store", "conditional writes"), "ok", "may not write", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_folder_that_is_damaged_or_incomplete_is_found() {
    let mut world = World::new().await;
    let folder = tempfile::tempdir().unwrap();
    world.setup.set("model.path", folder.path().to_str().unwrap());
    let copy = |name: &str| {
        std::fs::copy(repository(tiny::MODEL).join(name), folder.path().join(name)).unwrap()
    };
    let model = ("model", "model.path");
    told(&world.broken(), model, "problem", "model.toml", "\"builtin\"");
    copy("model.toml");
    let bytes = std::fs::read(repository(tiny::MODEL).join("model.onnx")).unwrap();
    std::fs::write(folder.path().join("model.onnx"), &bytes[..bytes.len() / 2]).unwrap();
    let report = world.broken();
    told(&report, model, "problem", "model.onnx", "Copy or export model.onnx anew");
    // The rest is still looked at.
    told(&report, ("class sets", "colours"), "ok", "not compared", "");
    told(&report, ("back ends", "back ends"), "warning", "not tried", "Mend the model first");
    copy("model.onnx");
    let text = std::fs::read_to_string(folder.path().join("model.toml")).unwrap();
    std::fs::write(folder.path().join("model.toml"), text.replace("dim = 3", "dim = 4")).unwrap();
    told(&world.broken(), model, "problem", "output.dim = 4", "Correct model.toml");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_set_of_another_model_is_found() {
    let world = World::new().await;
    let other = "another@0123456789ab";
    let contents = Contents::new(vec!["a".to_owned()], array![[1.0, 0.0, 0.0]], other);
    world.version("bottles", "7", file::write(&contents, ("bottles", "7")).unwrap()).await;
    world.bucket.put("classes/bottles/active.json", r#"{"version": "7"}"#).await;
    let report = world.broken();
    let bottles = ("class sets", "bottles");
    told(&report, bottles, "problem", other, "angler classes build reference/ --set bottles");
    assert_eq!(wrong(&report), ["bottles"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn class_sets_whose_files_are_broken_missing_or_not_active_are_found() {
    let world = World::new().await;
    world.bucket.put("classes/gone/active.json", r#"{"version": "3"}"#).await;
    world.bucket.put("classes/garbled/active.json", "{").await;
    world.version("asleep", "1", tiny::version("asleep", "1")).await;
    world.version("short", "1", tiny::version("short", "1")[..100].to_vec()).await;
    world.bucket.put("classes/short/active.json", r#"{"version": "1"}"#).await;
    world.bucket.put("classes/no-set/readme.txt", "text").await;
    let report = world.broken();
    told(&report, ("class sets", "gone"), "problem", "no version \"3\"", "classes list gone");
    told(&report, ("class sets", "garbled"), "problem", "active.json", "classes activate garbled@");
    told(&report, ("class sets", "asleep"), "warning", "no version is active", "activate asleep@");
    told(&report, ("class sets", "short"), "problem", "short/1", "rollback short");
    assert_eq!(wrong(&report).len(), 4, "{report:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_the_settings_name_and_that_are_not_there_are_found() {
    let mut world = World::new().await;
    world.setup.set("classes.preload", "colours@1,colours@2,bottles");
    world.setup.set("classes.shadow", "colours@3");
    let report = world.broken();
    let preload = |selector: &str| format!("classes.preload {selector}");
    told(&report, ("class sets", &preload("colours@1")), "ok", "is active", "");
    let missing = "does not start";
    told(&report, ("class sets", &preload("colours@2")), "problem", missing, "list colours");
    told(&report, ("class sets", &preload("bottles")), "problem", missing, "classes list");
    let shadow = ("class sets", "classes.shadow colours@3");
    told(&report, shadow, "warning", "colours/3.safetensors", "classes list colours");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_of_onnx_runtime_that_does_not_exist_is_found() {
    let mut world = World::new().await;
    world.setup.set("embedder.onnxruntime_library", "/nowhere/libonnxruntime.so");
    let library = "/nowhere/libonnxruntime.so: no such file";
    let runtime = ("back ends", "onnxruntime");
    // Left to choose, a worker takes tract: slower, and no problem.
    let (code, report) = world.doctor();
    assert_eq!(code, 0, "{report:#}");
    told(&report, runtime, "warning", library, "pip install onnxruntime==");
    told(&report, ("back ends", "embedder.backend"), "ok", "runs on tract-cpu", "");

    world.setup.set("embedder.backend", "onnxruntime");
    let report = world.broken();
    told(&report, runtime, "problem", library, "Correct embedder.onnxruntime_library");
    let setting = ("back ends", "embedder.backend");
    told(&report, setting, "problem", "nothing to run the model on", "pip install onnxruntime==");
    told(&report, ("back ends", "tract"), "ok", "works", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_is_asked_for_and_cannot_be_used_is_found() {
    let mut world = World::new().await;
    world.setup.set("embedder.backend", "cuda");
    let report = world.broken();
    // The library of the tests has no CUDA in it, whatever the machine has.
    told(&report, ("back ends", "cuda"), "problem", "does not work", "");
    told(&report, ("back ends", "onnxruntime"), "ok", "works", "");
    if !std::path::Path::new("/proc/driver/nvidia").exists() {
        told(&report, ("back ends", "GPUs"), "problem", "no NVIDIA GPU", "Install the driver");
        told(&report, ("back ends", "cuda"), "problem", "", "embedder.backend = \"auto\"");
    }
    // With leave to fall back a worker runs, on something else than was asked for.
    world.setup.set("embedder.allow_fallback", "true");
    let report = world.doctor().1;
    told(&report, ("back ends", "cuda"), "warning", "does not work", "");
    told(&report, ("back ends", "embedder.backend"), "ok", "runs on onnxruntime-cpu", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_contradict_each_other_are_warned_of() {
    let mut world = World::new().await;
    world.setup.set("shutdown.grace_seconds", "1200").set("limits.job_seconds", "1000");
    world.setup.set("limits.image_seconds", "2000");
    world.setup.set("limits.images_in_flight", "8");
    world.setup.env.insert("ANGLER_AMQP_PREFETCH".into(), "4".into());
    let (code, report) = world.doctor();
    assert_eq!(code, 0, "{report:#}");
    let settings = |name| ("settings", name);
    let grace = settings("shutdown.grace_seconds");
    told(&report, grace, "warning", "limits.job_seconds = 1000", "Lower shutdown.grace_seconds");
    let image = settings("limits.image_seconds");
    told(&report, image, "warning", "2000 s", "Lower limits.image_seconds");
    told(&report, settings("limits.stall_seconds"), "warning", "300 s", "Raise limits.stall_s");
    let in_flight = settings("limits.images_in_flight");
    told(&report, in_flight, "warning", "never fill a batch", "Raise limits.images_in_flight");
    let variable = settings("ANGLER_AMQP_PREFETCH");
    told(&report, variable, "warning", "is not read", "ANGLER__AMQP__PREFETCH");
    let timeout = ("broker", "consumer_timeout");
    told(&report, timeout, "warning", "at most 2500 s", "consumer_timeout = 5000000");
    // Two queues of one name are no matter of taste.
    world.setup.set("amqp.results_queue", "angler.jobs");
    told(&world.broken(), settings("amqp"), "problem", "angler.jobs", "different names");
}
