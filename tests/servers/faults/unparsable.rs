//! Messages that lapin cannot parse: AMQP's short strings are bytes, lapin's are UTF-8.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions};
use lapin::types::FieldTable;
use serde_json::{Value, json};

use crate::faults::ledger::Ledger;
use crate::faults::world::World;
use crate::support::raw::{Properties, RawPublisher};
use crate::support::{eventually, http_get};

/// Properties that lapin cannot parse, by a name, and what is said of them.
fn unparsable() -> Vec<(&'static str, Properties, &'static str)> {
    let text = |bytes: &[u8]| Some(bytes.to_vec());
    let none = Properties::default;
    vec![
        (
            "correlation",
            Properties { correlation_id: text(b"mine-\xff"), ..none() },
            "correlation_id \"mine-\\xff\"",
        ),
        (
            "message",
            Properties { message_id: text(b"\xc3(id)"), ..none() },
            "message_id \"\\xc3(id)\"",
        ),
        (
            "type",
            Properties { kind: text(b"classify\xfe.v1"), ..none() },
            "type \"classify\\xfe.v1\"",
        ),
        (
            "header",
            Properties { headers: vec![(b"tenant\xff".to_vec(), b"a".to_vec())], ..none() },
            "a header \"tenant\\xff\"",
        ),
        // lapin parses it by recursion, which ends the process.
        ("nested", Properties { nested: 20_000, ..none() }, "32 levels deep"),
    ]
}

async fn raw(world: &World) -> RawPublisher {
    RawPublisher::connect(&world.broker.address(), &world.broker.vhost).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_parsed_is_given_up_and_its_neighbours_are_done() {
    let world = World::new().await;
    let (worker, other) = (world.setup.start().await, world.setup.start().await);
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let mut publisher = raw(&world).await;
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for (name, properties, _) in unparsable() {
        good.extend(world.jobs(&client, &format!("{name}/before"), 4).await);
        let body = world.job(&format!("bad/{name}")).to_string();
        assert!(publisher.publish("angler.jobs", &properties, body.as_bytes()).await.unwrap());
        bad.push(format!("bad/{name}"));
        good.extend(world.jobs(&client, &format!("{name}/after"), 4).await);
    }
    // Without an id that can be read anywhere.
    let only = Properties { message_id: Some(b"only\xff".to_vec()), ..Properties::default() };
    assert!(publisher.publish("angler.jobs", &only, b"no job").await.unwrap());
    bad.push("only\\xff".to_owned());
    let mut all = results.collect(good.len() + bad.len()).await;
    for (id, result) in bad.iter().map(|id| (id, all.remove(id).unwrap().body)) {
        let error = &result["error"];
        assert_eq!(result["status"], "failed", "{result}");
        assert_eq!(error["code"], "malformed_job", "{result}");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("is not UTF-8") || message.contains("levels deep"),
            "{id}: {message}"
        );
    }
    for result in all.values() {
        assert_eq!(result.body["status"], "done", "{}", result.body);
    }
    // No connection was lost over it, and nobody else is suspected.
    for worker in [&worker, &other] {
        worker.ready().await;
        let log = worker.log();
        assert!(!log.contains("is lost") && !log.contains("delivered again"), "{log}");
    }
    eventually("nothing is left", async || {
        let left = ["angler.jobs", "angler.suspects"];
        left.iter().all(|queue| world.broker.depth(queue) == Some(0)).then_some(())
    })
    .await;
    drop((worker, other));

    // The tools read past them.
    let dead = |arguments: &[&str]| world.setup.run(&[&["dead"], arguments].concat());
    let (code, listed, log) = dead(&["list", "--json"]);
    assert_eq!(code, 0, "{log}");
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["reasons"], json!({"malformed_job": bad.len()}), "{listed}");
    let errors: BTreeMap<&str, &str> = listed["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["job"].as_str().unwrap(), row["error"].as_str().unwrap()))
        .collect();
    for (name, _, shown) in unparsable() {
        let error = errors[format!("bad/{name}").as_str()];
        assert!(error.contains(shown), "{name}: {error}");
    }
    let (code, shown, _) = dead(&["show", "bad/correlation", "--json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (code, &shown["messages"][0]["properties"]["correlation_id"]),
        (0, &json!("mine-\\xff"))
    );
    assert_eq!(shown["messages"][0]["body"]["id"], "bad/correlation", "its body is kept");
    let (code, removed, _) = dead(&["purge", "--id", "only\\xff", "--yes"]);
    assert_eq!((code, removed.as_str()), (0, "1 dead letter of angler.dead removed\n"));

    // Sent again, it has properties that can be parsed, and its body is done.
    let (code, sent, log) = dead(&["redrive", "--all"]);
    assert_eq!(
        (code, sent.as_str()),
        (0, "5 dead letters of angler.dead sent to angler.jobs\n"),
        "{log}"
    );
    let _worker = world.setup.start().await;
    for (id, result) in results.collect(5).await {
        assert_eq!(result.body["status"], "done", "{id}: {}", result.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_routing_key_cannot_be_parsed_is_done() {
    let world = World::new().await;
    let _worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let (options, none) = (ExchangeDeclareOptions::default(), FieldTable::default());
    let topic = lapin::ExchangeKind::Topic;
    client.channel.exchange_declare("topic".into(), topic, options, none.clone()).await.unwrap();
    let binding = QueueBindOptions::default();
    client
        .channel
        .queue_bind("angler.jobs".into(), "topic".into(), "#".into(), binding, none)
        .await
        .unwrap();
    let job = world.job("routed").to_string();
    let plain = Properties::default();
    let sent = raw(&world).await.publish_to("topic", b"jobs.\xff", &plain, job.as_bytes()).await;
    assert!(sent.unwrap());
    let mut ledger = Ledger::default();
    ledger.collect(&mut results, &["routed".to_owned()]).await;
    ledger.all_done();
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_cannot_be_parsed_stop_nothing_else_that_reads_queues() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let mut publisher = raw(&world).await;
    // To workers on the control exchange, and straight into the dead letters and the list of runs.
    let unparsable = unparsable();
    for (name, properties, _) in &unparsable {
        assert!(publisher.publish_to("angler.control", b"", properties, b"{}").await.unwrap());
        let body = json!({"id": name}).to_string();
        assert!(publisher.publish("angler.dead", properties, body.as_bytes()).await.unwrap());
    }
    let client = world.broker.connect().await;
    client.publish("angler.dead", b"{\"id\": \"plain\"}", BasicProperties::default()).await;
    let (code, listed, log) = world.setup.run(&["dead", "list", "--json"]);
    assert_eq!(code, 0, "{log}");
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["matched"], 6, "{listed}");
    // Among the results of a run.
    let images = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(images.path(), world.images.join("\n")).unwrap();
    let (list, out) = (images.path().to_str().unwrap(), tempfile::tempdir().unwrap());
    let out = out.path().join("results.jsonl");
    let enqueue = ["enqueue", list, "--format", "text", "--classes", "colours@1", "--run", "r"];
    let (code, _, log) = world.setup.run(&enqueue);
    assert_eq!(code, 0, "{log}");
    let queues = world.broker.manage("GET", &format!("queues/{}", world.broker.vhost), None);
    let mut names = queues.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap());
    let is_results =
        |name: &&str| name.starts_with("angler.run.r") && name.matches('.').count() == 2;
    let results = names.find(is_results).unwrap();
    for (_, properties, _) in &unparsable {
        assert!(publisher.publish(results, properties, b"{}").await.unwrap());
    }
    let (code, _, log) =
        world.setup.run(&["collect", "--run", "r", "--out", out.to_str().unwrap()]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(std::fs::read_to_string(out).unwrap().lines().count(), 3);
    let (code, _, log) = world.setup.run(&["runs", "list"]);
    assert_eq!(code, 0, "{log}");
    worker.ready().await;
    let log = worker.log();
    assert!(!log.contains("announcements are not heard"), "{log}");
    assert_eq!(http_get(&format!("{}/livez", worker.http)).unwrap().0, 200);
}
