//! Traces as a collector gets them, and logs that bear the same ids.

use std::collections::{BTreeMap, BTreeSet};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use super::collector::{Collector, Mood, Span};
use super::{SET, World};
use crate::support::{Client, DEADLINE, Setup, eventually, repository};

/// The producer's trace and the span in it that published the job.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn traced(trace: &str, parent: &str, flags: &str) -> BasicProperties {
    with_header(&format!("00-{trace}-{parent}-{flags}"))
}

fn with_header(traceparent: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    BasicProperties::default().with_headers(headers)
}

async fn publish(client: &Client, job: &Value, properties: BasicProperties) {
    client.publish("angler.jobs", job.to_string().as_bytes(), properties).await;
}

/// Spans that go to `url`, at once.
fn sending(world: &mut World, url: &str) {
    world.setup.set("telemetry.otlp_endpoint", url);
    world.setup.env.insert("OTEL_BSP_SCHEDULE_DELAY".into(), "50".into());
}

/// The span of each job, by the job's id.
fn jobs(spans: &[Span]) -> BTreeMap<String, Span> {
    let jobs = spans.iter().filter(|span| span.name.starts_with("process "));
    jobs.map(|span| (span.attribute("messaging.message.id").to_owned(), span.clone())).collect()
}

fn named<'s>(spans: &'s [Span], name: &'s str) -> impl Iterator<Item = &'s Span> {
    spans.iter().filter(move |span| span.name == name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_continues_its_producers_trace_and_its_batches_are_linked_to_it() {
    let mut world = World::new().await;
    let collector = Collector::new(Mood::Takes).await;
    world.setup.set("telemetry.otlp_endpoint", &collector.url);
    world.setup.set("log.format", "json");
    let headers = "authorization=Bearer of-ours".to_owned();
    world.setup.env.insert("OTEL_EXPORTER_OTLP_HEADERS".into(), headers);
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let job = |id: &str| json!({"id": id, "images": world.images, "classes": SET});
    let mut of_run = job("of-run");
    of_run["run"] = json!({"id": "nightly", "index": 3, "jobs": 9});
    publish(&client, &of_run, traced(TRACE, PARENT, "01")).await;
    // Not to be sent, says its producer.
    publish(&client, &job("unsampled"), traced(&TRACE.replace('0', "1"), PARENT, "00")).await;
    // Not a context: a trace begins, and the result bears what the producer sent.
    publish(&client, &job("strange"), with_header("00-aa-bb-01")).await;
    publish(&client, &job("alone"), BasicProperties::default()).await;
    let mut missing = job("missing");
    missing["images"] = json!([format!("s3://{}/missing.png", world.bucket.name)]);
    publish(&client, &missing, BasicProperties::default()).await;
    let mut nothing = job("nothing");
    nothing["classes"] = json!("nothing");
    nothing["run"] = json!({"id": "nightly", "index": 4, "jobs": 9});
    publish(&client, &nothing, traced(TRACE, PARENT, "01")).await;
    publish(&client, &json!({"id": "malformed"}), BasicProperties::default()).await;
    let all = results.collect(7).await;
    assert_eq!(all["strange"].header("traceparent").as_deref(), Some("00-aa-bb-01"));
    // What is left is sent at the end.
    worker.signal("TERM");
    assert!(worker.ended().await.success(), "{}", worker.log());

    let spans = collector.spans();
    let jobs = jobs(&spans);
    let ids: Vec<&str> = jobs.keys().map(String::as_str).collect();
    assert_eq!(ids, ["alone", "malformed", "missing", "nothing", "of-run", "strange"]);
    let continued = &jobs["of-run"];
    assert_eq!((continued.trace_id.as_str(), continued.parent.as_str()), (TRACE, PARENT));
    assert_eq!((continued.name.as_str(), continued.kind), ("process angler.jobs", 5));
    for (key, value) in [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.type", "process"),
        ("messaging.destination.name", "angler.jobs"),
        ("angler.run.id", "nightly"),
        ("angler.job.attempt", "1"),
        ("angler.job.images", "3"),
        ("angler.job.images_failed", "0"),
        ("angler.job.outcome", "done"),
        ("angler.classes", "colours@1"),
    ] {
        assert_eq!(continued.attribute(key), value, "{key}");
    }
    assert_eq!(continued.error, None);
    for (id, outcome, code) in [
        ("malformed", "dead_lettered", Some("malformed_job")),
        ("nothing", "failed", Some("unknown_class_set")),
        ("missing", "done", None),
    ] {
        let span = &jobs[id];
        assert_eq!(span.attribute("angler.job.outcome"), outcome, "{span:?}");
        assert_eq!(span.attributes.get("error.type").map(String::as_str), code, "{span:?}");
        assert_eq!(span.error.is_some(), code.is_some(), "{span:?}");
    }
    assert_eq!(jobs["missing"].attribute("angler.job.images_failed"), "1");
    for id in ["strange", "alone", "missing", "malformed"] {
        assert_eq!(jobs[id].parent, "", "{id} begins a trace");
    }
    let traces: BTreeSet<_> = jobs.values().map(|span| &span.trace_id).collect();
    assert_eq!(traces.len(), 5, "only those of one producer share a trace");
    let Span { resource, .. } = continued;
    assert_eq!(resource["service.name"], "angler");
    assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
    assert!(resource["service.instance.id"].len() > 1 && resource["angler.model"].len() > 20);

    // The guide names all of it.
    let guide = std::fs::read_to_string(repository("docs/operations.md")).unwrap();
    for span in &spans {
        let Span { name, attributes, .. } = span;
        for word in attributes.keys().chain([name]) {
            assert!(guide.contains(&format!("`{word}`")), "{word} of {name}");
        }
    }
    // Where the job's time went.
    for step in ["admit", "collect", "publish"] {
        let step = named(&spans, step).find(|span| span.parent == continued.id).unwrap();
        assert_eq!(step.trace_id, TRACE);
        assert!(continued.nanos.0 <= step.nanos.0 && step.nanos.1 <= continued.nanos.1, "{step:?}");
    }
    // Batches, and both ways between them and their jobs.
    let batches: Vec<&Span> = named(&spans, "batch").collect();
    let images: usize =
        batches.iter().map(|b| b.attribute("angler.batch.images").parse::<usize>().unwrap()).sum();
    assert!(images >= 9, "three jobs of three images, and perhaps the unsampled one's: {images}");
    for batch in &batches {
        assert_eq!(batch.parent, "", "a batch has no one cause");
        let reason = batch.attribute("angler.batch.close_reason");
        assert!(["full", "linger", "drain"].contains(&reason), "{reason}");
        assert_eq!(batch.attribute("angler.backend"), "onnxruntime-cpu");
        assert_eq!(batch.attribute("angler.batch.jobs"), batch.links.len().to_string());
        for (trace_id, id) in &batch.links {
            let job = jobs.values().find(|job| &job.id == id).unwrap();
            assert_eq!(&job.trace_id, trace_id);
            assert!(job.links.contains(&(batch.trace_id.clone(), batch.id.clone())), "{job:?}");
        }
        for step in ["embed", "score"] {
            let of = named(&spans, step).filter(|span| span.parent == batch.id);
            assert_eq!(of.count(), 1, "{step}");
        }
    }
    for (id, span) in &jobs {
        let scored = ["of-run", "strange", "alone"].contains(&id.as_str());
        assert_eq!(!span.links.is_empty(), scored, "{id}: {span:?}");
    }
    let sent = collector.headers();
    assert_eq!(sent["content-type"], "application/x-protobuf");
    assert_eq!(sent["authorization"], "Bearer of-ours");

    // The log, a JSON object a line, says each failure once, with the ids that lead to it.
    let lines: Vec<Value> =
        worker.log().lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    for line in &lines {
        for key in ["timestamp", "level", "message", "target"] {
            assert!(line[key].is_string(), "{key}: {line}");
        }
    }
    let of = |job: &str| -> Vec<&Value> { lines.iter().filter(|l| l["job"] == job).collect() };
    let [line] = of("nothing")[..] else { panic!("{lines:#?}") };
    assert_eq!((&line["run"], &line["trace_id"]), (&json!("nightly"), &json!(TRACE)));
    assert_eq!((&line["level"], &line["code"]), (&json!("WARN"), &json!("unknown_class_set")));
    let [line] = of("malformed")[..] else { panic!("{lines:#?}") };
    assert_eq!(line["trace_id"], jobs["malformed"].trace_id);
    assert_eq!(line.get("run"), None, "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_refuses_or_hangs_costs_one_warning_and_no_job() {
    let mut world = World::new().await;
    let hanging = Collector::new(Mood::Hangs).await;
    sending(&mut world, &hanging.url);
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let work = async |results: &mut crate::support::Results| {
        let ids = world.jobs(&client, 20).await;
        results.collect(ids.len()).await
    };
    work(&mut results).await;
    let warnings = || worker.log().matches("traces cannot be sent").count();
    eventually("a warning", async || (warnings() == 1).then_some(())).await;
    assert!(worker.log().contains("did not answer within 3 s"), "{}", worker.log());
    // It goes on, and fails otherwise: nothing new is said.
    hanging.turns(Mood::Refuses);
    let asked = hanging.requests();
    work(&mut results).await;
    eventually("it is asked again", async || (hanging.requests() > asked + 1).then_some(())).await;
    assert_eq!(warnings(), 1);
    hanging.turns(Mood::Takes);
    work(&mut results).await;
    let back = || worker.log().contains("traces are sent again");
    eventually("it is back", async || back().then_some(())).await;
    eventually("spans", async || (jobs(&hanging.spans()).len() >= 20).then_some(())).await;
    // One that hangs does not hold up the end.
    hanging.turns(Mood::Hangs);
    work(&mut results).await;
    worker.signal("TERM");
    assert!(worker.ended().await.success(), "{}", worker.log());

    // The doctor asks as the worker does; it is no reason not to start.
    let asks = |setup: &Setup| {
        let (_, out, _) = setup.run(&["doctor", "--json"]);
        let report: Value = serde_json::from_str(&out).unwrap();
        let checks = report["checks"].as_array().unwrap().clone();
        checks.into_iter().find(|check| check["name"] == "telemetry.otlp_endpoint").unwrap()
    };
    let found = asks(&world.setup);
    assert_eq!(found["state"], "warning", "{found}");
    assert!(found["message"].as_str().unwrap().contains("did not answer within 3 s"), "{found}");
    hanging.turns(Mood::Takes);
    let found = asks(&world.setup);
    assert_eq!(found["state"], "ok", "{found}");

    // Nobody listens.
    let (nobody, port) = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        (format!("http://someone:hunter2@127.0.0.1:{port}"), port)
    };
    sending(&mut world, &nobody);
    let mut worker = world.setup.start().await;
    let ids = world.jobs(&client, 20).await;
    results.collect(ids.len()).await;
    eventually("a warning", async || worker.log().contains("Connection refused").then_some(()))
        .await;
    worker.signal("TERM");
    assert!(worker.ended().await.success(), "{}", worker.log());
    assert_eq!(worker.log().matches("traces cannot be sent").count(), 1, "{}", worker.log());
    assert!(worker.log().contains(&format!("127.0.0.1:{port}/v1/traces")), "{}", worker.log());
    assert!(!worker.log().contains("hunter2"), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_jobs_is_traced_and_of_those_whose_producers_decide_what_they_say() {
    let mut world = World::new().await;
    let collector = Collector::new(Mood::Takes).await;
    sending(&mut world, &collector.url);
    world.setup.set("telemetry.otlp_sample", "0");
    world.setup.set("telemetry.service_name", "bottles");
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids = world.jobs(&client, 10).await;
    let job = json!({"id": "wanted", "images": world.images, "classes": SET});
    publish(&client, &job, traced(TRACE, PARENT, "01")).await;
    results.collect(ids.len() + 1).await;
    worker.signal("TERM");
    assert!(tokio::time::timeout(DEADLINE, worker.ended()).await.unwrap().success());
    let spans = collector.spans();
    assert_eq!(jobs(&spans).into_keys().collect::<Vec<_>>(), ["wanted"]);
    assert!(named(&spans, "batch").next().is_some_and(|batch| batch.links.len() == 1));
    assert!(spans.iter().all(|span| span.resource["service.name"] == "bottles"));
    // Without a run or a trace there is no field of that name.
    assert!(!worker.log().contains("run="), "{}", worker.log());
}

#[test]
fn a_worker_that_cannot_start_says_so_as_json_and_exits_as_ever() {
    let mut setup = Setup::default();
    setup.set("log.format", "json").set("http.listen", "").set("model.path", "/nowhere");
    let (code, _, log) = setup.run(&["worker"]);
    let [line] = log.lines().collect::<Vec<_>>()[..] else { panic!("{log}") };
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((code, line["level"].as_str()), (1, Some("ERROR")));
    assert!(line["message"].as_str().unwrap().contains("/nowhere"), "{line}");
}
