//! `angler dead`, against a real broker, with dead letters that a real worker or the broker made.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::support::{Broker, Bucket, Client, Received, Setup, eventually, fashion_classes, files};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::options::{BasicGetOptions, BasicNackOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use angler_amqp::AmqpOptions;
use angler_amqp::queue_scan::Pass;

struct World {
    broker: Broker,
    setup: Setup,
    client: Client,
    _root: tempfile::TempDir,
}

impl World {
    /// A broker, and settings with which a job whose store is away is given up after two attempts.
    async fn new() -> Self {
        let (root, _) = fashion_classes();
        let broker = Broker::new().await;
        let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
        setup.set("retry.delays_seconds", "0.1").set("retry.max_attempts", "2");
        let client = broker.connect().await;
        Self { client, broker, setup, _root: root }
    }

    /// The same settings with a store where nothing listens.
    fn without_store(&self) -> Setup {
        // Bound and never accepted from, so that nobody else takes the port.
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut setup = self.setup.clone();
        setup.set("s3.endpoint", &format!("http://{closed}"));
        setup
    }

    /// `angler dead …`: exit code, standard output, standard error.
    fn dead(&self, arguments: &[&str]) -> (i32, String, String) {
        self.setup.run(&[&["dead"], arguments].concat())
    }

    /// The same with `--json`, which has to end with 0.
    fn dead_json(&self, arguments: &[&str]) -> Value {
        let (code, out, log) = self.dead(&[arguments, &["--json"]].concat());
        assert_eq!(code, 0, "{arguments:?}: {out}{log}");
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).unwrap()
    }

    async fn depth(&self, queue: &str, wanted: u64) {
        eventually(&format!("{wanted} in {queue}"), async || {
            let queue = self.broker.queue(queue);
            let ready = queue["messages_ready"] == wanted && queue["messages"] == wanted;
            ready.then_some(())
        })
        .await;
    }

    /// Jobs that are none, and that a worker has given up on: `junk/0`, `junk/1`, …
    async fn malformed(&self, count: usize) {
        let worker = self.setup.start().await;
        for i in 0..count {
            let id = format!("junk/{i}");
            let properties = BasicProperties::default().with_message_id(id.as_str().into());
            self.client.publish("angler.jobs", b"no job", properties).await;
        }
        self.depth("angler.dead", count as u64).await;
        drop(worker);
        self.depth("angler.jobs", 0).await;
    }

    /// Puts jobs among the dead letters: `junk/0`, `junk/1`, …
    async fn letters(&self, count: usize) {
        let mut arguments = header("x-queue-type", "quorum");
        let never = AMQPValue::LongLongInt(1_000_000_000);
        arguments.insert("x-delivery-limit".into(), never);
        let (queue, durable) = ("angler.dead", QueueDeclareOptions::durable());
        self.client.channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
        let mut waiting = VecDeque::new();
        for number in 0..count {
            let body = json!({"id": format!("junk/{number}")}).to_string();
            let options = BasicPublishOptions::default();
            let persistent = BasicProperties::default().with_delivery_mode(2);
            let publishing = self.client.channel.basic_publish(
                "".into(),
                queue.into(),
                options,
                body.as_bytes(),
                persistent,
            );
            waiting.push_back(publishing.await.unwrap());
            if waiting.len() > 1_000 {
                assert!(waiting.pop_front().unwrap().await.unwrap().is_ack());
            }
        }
        for confirm in waiting {
            assert!(confirm.await.unwrap().is_ack());
        }
    }

    fn options(&self) -> AmqpOptions {
        AmqpOptions {
            url: self.broker.url.clone(),
            ca_file: None,
            client_cert_file: None,
            client_key_file: None,
            name: "test".into(),
        }
    }

    /// Takes everything out of a queue.
    async fn drain(&self, queue: &str) -> Vec<Received> {
        let mut all = Vec::new();
        while let Some(message) = self.client.get(queue).await {
            all.push(message);
        }
        all
    }
}

fn jobs(listed: &Value) -> Vec<String> {
    let messages = listed["messages"].as_array().unwrap();
    messages.iter().map(|m| m["job"].as_str().unwrap().to_owned()).collect()
}

fn header(key: &str, value: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert(key.into(), AMQPValue::LongString(value.into()));
    headers
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_gave_up_is_listed_shown_and_runs_again_as_a_new_job() {
    let world = World::new().await;
    let bucket = Bucket::new().await;
    let image = bucket.upload("q", &files("samples/fashion/query")[..1]).await.remove(0);
    let worker = world.without_store().start().await;
    let client = &world.client;
    client.private_queue("replies").await;
    let job = |id: &str, index: u64| {
        let run = json!({"id": "nightly", "jobs": 2, "index": index});
        json!({"id": id, "images": [image], "classes": "fashion@1", "run": run}).to_string()
    };
    for (index, id) in [(0, "nightly/0"), (1, "nightly/1")] {
        let properties = BasicProperties::default()
            .with_type("classify.v1".into())
            .with_reply_to("replies".into())
            .with_correlation_id(format!("mine-{index}").as_str().into())
            .with_headers(header("traceparent", "00-trace"));
        client.publish("angler.jobs", job(id, index).as_bytes(), properties).await;
    }
    let named = BasicProperties::default().with_message_id("junk".into());
    client.publish("angler.jobs", b"\xffjunk \x1b[2J{", named).await;
    client.publish("angler.jobs", b"{\"id\": \"other\", \"images\": []}", Default::default()).await;
    world.depth("angler.dead", 4).await;
    let replies = world.drain("replies").await;
    assert_eq!(replies.len(), 2, "each job has had its result");
    drop(worker);

    // For people.
    let (code, table, log) = world.dead(&["list"]);
    assert_eq!(code, 0, "{log}");
    for line in table.lines() {
        assert!(line.chars().count() <= 80, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    let rows: Vec<&str> = table.lines().filter(|l| l.starts_with("nightly/")).collect();
    assert_eq!(rows.len(), 2, "{table}");
    assert!(rows.iter().all(|r| r.contains("retries_exhausted") && r.contains(" 2")), "{table}");
    assert!(table.contains("cannot be reached"), "{table}");
    let counts = "angler.dead: 4 dead letters: malformed_job 2, retries_exhausted 2";
    assert!(table.trim_end().ends_with(counts), "{table}");

    // For programs, through each filter.
    let all = world.dead_json(&["list"]);
    assert_eq!(all["matched"], 4, "{all}");
    assert_eq!(all["not_looked_at"], 0);
    assert_eq!(all["reasons"], json!({"malformed_job": 2, "retries_exhausted": 2}));
    let names = |arguments: &[&str]| {
        let listed = world.dead_json(&[&["list"], arguments].concat());
        jobs(&listed).into_iter().collect::<BTreeSet<_>>()
    };
    let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(&[]), set(&["nightly/0", "nightly/1", "junk", "other"]));
    assert_eq!(names(&["--run", "nightly"]), set(&["nightly/0", "nightly/1"]));
    assert_eq!(names(&["--reason", "malformed_job"]), set(&["junk", "other"]));
    assert_eq!(names(&["--id", "junk", "--id", "nightly/1"]), set(&["junk", "nightly/1"]));
    assert_eq!(names(&["--run", "nightly", "--id", "nightly/1"]), set(&["nightly/1"]));
    assert_eq!(names(&["--limit", "3"]).len(), 3);
    let of_run = world.dead_json(&["list", "--run", "nightly"]);
    for message in of_run["messages"].as_array().unwrap() {
        assert_eq!(message["run"], "nightly");
        assert_eq!(message["attempts"], 2, "{message}");
        assert!(message["error"].as_str().unwrap().contains("cannot be reached"), "{message}");
    }
    assert_eq!(world.dead_json(&["redrive", "--all", "--dry-run"])["matched"], 4);
    world.depth("angler.dead", 4).await;

    // One, with everything in it.
    let (code, text, _) = world.dead(&["show", "nightly/1"]);
    assert_eq!(code, 0);
    for part in
        ["retries_exhausted", "\"uri\"", "mine-1", "traceparent: 00-trace", "nightly", &image]
    {
        let part = part.replace("\"uri\"", "\"images\": [\n");
        assert!(text.contains(&part), "{part}: {text}");
    }
    let shown = world.dead_json(&["show", "nightly/1"]);
    let message = &shown["messages"][0];
    assert_eq!(message["body"]["images"][0], image, "{shown}");
    assert_eq!(message["properties"]["reply_to"], "replies");
    assert_eq!(message["headers"]["angler-attempts"], 2);
    let (_, junk, _) = world.dead(&["show", "junk"]);
    assert!(junk.contains("junk \u{fffd}[2J{") && !junk.contains('\x1b'), "{junk}");
    let junk = world.dead_json(&["show", "junk"]);
    assert_eq!(junk["messages"][0]["body_text"], "\u{fffd}junk \x1b[2J{");

    // Again, once the store is back: the first attempt, its result where it was wanted.
    let sent = world.dead_json(&["redrive", "--run", "nightly"]);
    assert_eq!((&sent["matched"], &sent["redriven"]), (&json!(2), &json!(2)), "{sent}");
    world.depth("angler.dead", 2).await;
    let held = client.channel.basic_get("angler.jobs".into(), BasicGetOptions::default()).await;
    let held = held.unwrap().unwrap().delivery;
    let headers = held.properties.headers().clone().unwrap();
    let keys: Vec<&str> = headers.inner().keys().map(|k| k.as_str()).collect();
    assert_eq!(keys, ["traceparent", "x-delivery-count"]);
    assert_eq!(headers.inner()["x-delivery-count"], AMQPValue::LongLongInt(0));
    held.acker.nack(BasicNackOptions { requeue: true, multiple: false }).await.unwrap();
    let worker = world.setup.start().await;
    let mut replies = client.consume("replies").await;
    for (id, result) in replies.collect(2).await {
        assert_eq!(result.body["status"], "done", "{}", result.body);
        assert_eq!(result.body["attempt"], 1);
        let own = result.properties.correlation_id().as_ref().unwrap().to_string();
        assert_eq!(own, id.replace("nightly/", "mine-"));
    }
    world.depth("angler.dead", 2).await;
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_the_broker_gave_up_says_so_and_can_be_sent_again() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    drop(worker); // It has declared the queues.
    for queue in ["angler.results", "angler.dead"] {
        let arguments = world.broker.queue(queue)["arguments"].clone();
        assert_eq!(arguments["x-delivery-limit"], 1_000_000_000, "{queue}: {arguments}");
    }
    // As an older angler declared it: it leads to the dead letters without a worker in between.
    let queue = format!("queues/{}/angler.jobs", world.broker.vhost);
    world.broker.manage("DELETE", &queue, None);
    let old = json!({"durable": true, "arguments": {
        "x-queue-type": "quorum", "x-delivery-limit": 10, "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "angler.dead",
        "x-dead-letter-strategy": "at-least-once",
    }});
    world.broker.manage("PUT", &queue, Some(&old.to_string()));
    let headers = header("angler-error", "the store was away");
    let properties = BasicProperties::default().with_headers(headers);
    world.client.publish("angler.jobs", br#"{"id": "killer"}"#, properties).await;
    // Delivered, and not acked, more often than the queue allows.
    let get = async || {
        let options = BasicGetOptions::default();
        world.client.channel.basic_get("angler.jobs".into(), options).await.unwrap()
    };
    for _ in 0..=10 {
        let message = eventually("it comes again", get).await;
        let requeue = BasicNackOptions { requeue: true, multiple: false };
        message.delivery.acker.nack(requeue).await.unwrap();
    }
    world.depth("angler.dead", 1).await;

    let listed = world.dead_json(&["list", "--reason", "delivery_limit"]);
    let message = &listed["messages"][0];
    assert_eq!(message["job"], "killer", "{listed}");
    let died = humantime::parse_rfc3339(message["died_at"].as_str().unwrap()).unwrap();
    assert!(died.elapsed().unwrap_or_default() < Duration::from_secs(600), "{listed}");
    let (_, table, _) = world.dead(&["list"]);
    let row = table.lines().find(|l| l.starts_with("killer")).unwrap();
    assert!(row.contains("delivery_limit") && row.chars().count() <= 80, "{table}");
    let (_, text, _) = world.dead(&["show", "killer"]);
    assert!(text.contains("x-death: [{") && text.contains("died "), "{text}");

    assert_eq!(world.dead_json(&["redrive", "--id", "killer"])["redriven"], 1);
    let again = world.client.get("angler.jobs").await.unwrap();
    let headers = again.properties.headers().clone().unwrap_or_default();
    let count = |key: &str| (key == "x-delivery-count").then_some(AMQPValue::LongLongInt(0));
    assert!(
        headers.inner().iter().all(|(k, v)| count(k.as_str()).as_ref() == Some(v)),
        "{headers:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_300_dead_letters_again_and_again_takes_nothing_away() {
    let world = World::new().await;
    world.malformed(300).await;
    let all: BTreeSet<String> = (0..300).map(|i| format!("junk/{i}")).collect();
    let mut first = Vec::new();
    for round in 0..25 {
        let listed = world.dead_json(&["list", "--limit", "1000"]);
        assert_eq!(listed["matched"], 300, "round {round}");
        assert_eq!(listed["reasons"], json!({"malformed_job": 300}));
        let jobs = jobs(&listed);
        if round == 0 {
            assert_eq!(jobs.iter().cloned().collect::<BTreeSet<_>>(), all);
            first = jobs;
        } else {
            // Each look finds what the one before gave back, in the same order.
            assert_eq!(jobs, first, "round {round}");
        }
    }
    let (_, text, _) = world.dead(&["list"]);
    assert_eq!(text.lines().filter(|l| l.starts_with("junk/")).count(), 100, "{text}");
    assert!(text.contains("200 of them not shown"), "{text}");
    world.depth("angler.dead", 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn people_at_once_and_one_who_is_killed_lose_nothing_and_see_everything() {
    let world = World::new().await;
    world.malformed(200).await;
    let run = |arguments: &[&str]| {
        let mut command = world.setup.command(arguments);
        let piped = std::process::Stdio::piped;
        command.stdout(piped()).stderr(piped()).spawn().unwrap()
    };
    // One who reads is killed while it holds messages.
    let mut killed = run(&["dead", "list"]);
    eventually("it holds messages", async || {
        let held = &world.broker.queue("angler.dead")["messages_unacknowledged"];
        (held.as_u64() > Some(0) || killed.try_wait().unwrap().is_some()).then_some(())
    })
    .await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    // Two look, one sends 50 again, one removes 50: each sees what is there in its turn.
    let ids: Vec<String> = (100..150).map(|i| format!("--id=junk/{i}")).collect();
    let mut purge = vec!["dead", "purge", "--yes", "--json"];
    purge.extend(ids.iter().map(String::as_str));
    let running = [
        run(&["dead", "list", "--json", "--limit", "1000"]),
        run(&["dead", "redrive", "--all", "--limit", "50", "--json"]),
        run(&purge),
        run(&["dead", "list", "--json", "--limit", "1000"]),
    ];
    let mut answers = Vec::new();
    for child in running {
        let output = child.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        answers.push(serde_json::from_slice::<Value>(&output.stdout).unwrap());
    }
    for listed in [&answers[0], &answers[3]] {
        let seen = listed["matched"].as_u64().unwrap();
        assert!([100, 150, 200].contains(&seen), "{seen}");
        assert_eq!(jobs(listed).into_iter().collect::<BTreeSet<_>>().len() as u64, seen);
    }
    assert_eq!((&answers[1]["redriven"], &answers[2]["purged"]), (&json!(50), &json!(50)));
    world.depth("angler.dead", 100).await;
    world.depth("angler.jobs", 50).await;
    let id = |m: &Received| m.properties.message_id().as_ref().unwrap().to_string();
    let mut left: BTreeSet<String> = world.drain("angler.dead").await.iter().map(id).collect();
    left.extend(world.drain("angler.jobs").await.iter().map(id));
    let wanted = (0..200).filter(|i| !(100..150).contains(i)).map(|i| format!("junk/{i}"));
    assert_eq!(left, wanted.collect::<BTreeSet<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_does_not_end_is_said() {
    let world = World::new().await;
    world.malformed(1).await;
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let turn = "angler.dead.reader".into();
    world.client.channel.queue_declare(turn, exclusive, FieldTable::default()).await.unwrap();
    let (code, _, log) = world.dead(&["list"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("somebody else reads angler.dead"), "{log}");
    world.depth("angler.dead", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_sent_again_stays() {
    let mut world = World::new().await;
    world.malformed(2).await;
    // A jobs queue that takes nothing.
    let mut full = header("x-overflow", "reject-publish");
    full.insert("x-max-length".into(), AMQPValue::LongInt(0));
    let options = QueueDeclareOptions::durable();
    world.client.channel.queue_declare("full.jobs".into(), options, full).await.unwrap();
    world.setup.set("amqp.jobs_queue", "full.jobs");
    let (code, out, log) = world.dead(&["redrive", "--all"]);
    assert_eq!(code, 1, "{log}");
    assert!(out.starts_with("0 dead letters of angler.dead sent to full.jobs\n"), "{out}");
    assert!(log.contains(" was not sent again and stays where it is"), "{log}");
    world.depth("angler.dead", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_removes_what_is_meant_and_exit_codes_tell_what_happened() {
    let world = World::new().await;
    // No worker has run here.
    let (code, _, log) = world.dead(&["list"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("no queue angler.dead") && log.contains("amqp.dead_queue"), "{log}");
    world.malformed(3).await;
    // Nothing by accident.
    for (arguments, hint) in [
        (&["redrive"][..], "--all"),
        (&["purge", "--yes"], "--all"),
        (&["purge", "--all"], "--yes"),
        (&["purge", "--all", "--id", "a", "--yes"], "--all"),
        (&["redrive", "--all", "--limit", "0"], "--limit"),
        (&["show"], "JOB"),
    ] {
        let (code, out, log) = world.dead(arguments);
        assert_eq!(code, 2, "{arguments:?}: {out}{log}");
        assert!(log.contains(hint), "{arguments:?}: {log}");
    }
    for arguments in [
        &["list", "--reason", "retries_exhausted"][..],
        &["show", "junk"],
        &["redrive", "--run", "nightly"],
        &["purge", "--id", "junk/9", "--yes"],
    ] {
        let (code, _, log) = world.dead(arguments);
        assert_eq!(code, 1, "{arguments:?}: {log}");
        assert!(log.contains("no dead letter in angler.dead matches"), "{log}");
    }
    world.depth("angler.dead", 3).await;
    let order = jobs(&world.dead_json(&["list"]));
    let (code, out, _) = world.dead(&["purge", "--id", &order[1], "--yes"]);
    assert_eq!((code, out.as_str()), (0, "1 dead letter of angler.dead removed\n"));
    assert_eq!(world.dead_json(&["purge", "--all", "--limit", "1", "--yes"])["purged"], 1);
    assert_eq!(jobs(&world.dead_json(&["list"])), order[2..], "the oldest went first");
    assert_eq!(world.dead_json(&["purge", "--all", "--yes"])["purged"], 1);
    world.depth("angler.dead", 0).await;
    // All of nothing is done; nothing in particular is not.
    assert_eq!(world.dead_json(&["list"])["matched"], 0);
    assert_eq!(world.dead_json(&["redrive", "--all"])["redriven"], 0);
    let (code, out, _) = world.dead(&["list"]);
    assert_eq!((code, out.as_str()), (0, "angler.dead: no dead letters\n"));
    // A broker that is not there.
    let mut away = world.setup.clone();
    away.env.insert("ANGLER__AMQP__URL".into(), "amqp://u:hunter2@127.0.0.1:9/%2f".into());
    let (code, _, log) = away.run(&["dead", "list"]);
    assert_eq!(code, 1, "{log}");
    assert!(!log.contains("hunter2"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_reads_window_after_window_and_keeps_the_order_of_what_it_gives_back() {
    let world = World::new().await;
    world.letters(2_000).await;
    let open = async || Pass::open(&world.options(), "dead", "angler.dead").await.unwrap();
    let id = |letter: &Delivery| -> usize {
        let body: Value = serde_json::from_slice(&letter.data).unwrap();
        body["id"].as_str().unwrap().trim_start_matches("junk/").parse().unwrap()
    };
    let mut pass = open().await;
    for expected in 0..2_000 {
        let letter = pass.next().await.unwrap().unwrap();
        assert_eq!(id(&letter), expected);
        if expected % 3 == 0 {
            pass.remove(letter.delivery_tag).await.unwrap();
        }
    }
    assert!(pass.next().await.unwrap().is_none());
    pass.close().await.unwrap();
    // In the middle of a window it runs out of time.
    let left: Vec<usize> = (0..2_000).filter(|id| id % 3 != 0).collect();
    let mut pass = open().await;
    for expected in &left[..700] {
        assert_eq!(id(&pass.next().await.unwrap().unwrap()), *expected);
    }
    let mut pass = pass.within(Duration::ZERO);
    assert!(pass.next().await.unwrap().is_none());
    assert_eq!(pass.unseen() as usize, left.len() - 700);
    pass.close().await.unwrap();
    // Somebody else takes the oldest while the next one begins.
    let mut pass = open().await;
    world.drain("angler.dead").await;
    assert!(pass.next().await.unwrap().is_none());
    pass.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_a_hundred_thousand_others_is_found_and_sent_again() {
    let world = World::new().await;
    drop(world.setup.start().await); // It has declared the queues.
    world.letters(100_600).await;
    let sent = world.dead_json(&["redrive", "--id", "junk/100599"]);
    assert_eq!((&sent["redriven"], &sent["not_looked_at"]), (&json!(1), &json!(0)), "{sent}");
    assert_eq!(world.client.get("angler.jobs").await.unwrap().body["id"], "junk/100599");
    world.depth("angler.dead", 100_599).await;
}
