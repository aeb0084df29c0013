//! What a worker exposes is what docs/metrics.md says, has no finding, and moves with what happens.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use lapin::BasicProperties;
use serde_json::json;

use super::exposed::Exposed;
use super::{SET, World, get, status};
use crate::support::{Worker, eventually, repository, tiny};

fn scrape(worker: &Worker) -> Exposed {
    Exposed::read(&get(worker, "/metrics"))
}

/// Waits until a scrape is as wanted: counters move a moment after their result has arrived.
async fn scraped(worker: &Worker, what: &str, wanted: impl Fn(&Exposed) -> bool) -> Exposed {
    eventually(&format!("{what}\n{}", get(worker, "/metrics")), async || {
        Some(scrape(worker)).filter(|exposed| wanted(exposed))
    })
    .await
}

/// A metric as the table has it.
struct Documented {
    kind: String,
    /// Each label, and its values if they are listed.
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// What is between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn table() -> BTreeMap<String, Documented> {
    let text = std::fs::read_to_string(repository("docs/metrics.md")).unwrap();
    let mut table = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, meaning] = cells[..] else { panic!("{line}: not four cells") };
        assert!(meaning.len() > 10, "{line}");
        // Values are listed behind the last label.
        let (names, values) = labels.split_once(':').unwrap_or((labels, ""));
        let mut labels: BTreeMap<_, _> =
            quoted(names).into_iter().map(|label| (label, BTreeSet::new())).collect();
        if let (Some(last), values) = (quoted(names).pop(), quoted(values)) {
            labels.insert(last, values.into_iter().collect());
        }
        let documented = Documented { kind: kind.to_owned(), labels };
        assert!(table.insert(name.trim_matches('`').to_owned(), documented).is_none(), "{line}");
    }
    table
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_under_load_exposes_what_the_table_says_and_promtool_finds_nothing() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids = world.jobs(&client, 50).await;
    results.next().await;
    // In the midst of it.
    let text = get(&worker, "/metrics");
    let exposed = Exposed::read(&text);
    let table = table();
    let documented: BTreeSet<&String> = table.keys().collect();
    assert_eq!(exposed.types.keys().collect::<BTreeSet<_>>(), documented);
    for (name, Documented { kind, labels }) in &table {
        assert_eq!(&exposed.types[name], kind, "{name}");
        let known = &exposed.labels[name];
        let names: BTreeSet<&String> = labels.keys().collect();
        assert_eq!(known.keys().collect::<BTreeSet<_>>(), names, "{name}");
        for (label, values) in labels.iter().filter(|(_, values)| !values.is_empty()) {
            // Closed sets are whole from the start; of how scoring is done there is one.
            let found = &known[label];
            let fits = if label == "scoring" { found.is_subset(values) } else { found == values };
            assert!(fits, "{name}: {label} has {found:?}, the table says {values:?}");
        }
    }
    promtool(&text);
    // The first result was taken above.
    for _ in 1..ids.len() {
        results.next().await;
    }
}

fn promtool(text: &str) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, which `tests/services.sh install` installs");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn load_then_bad_jobs_then_swaps_move_the_right_counters() {
    let world = World::new().await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let before = scrape(&worker);
    assert_eq!(before.value("angler_jobs_total{outcome=\"done\"}"), 0.0);
    assert_eq!(before.value("angler_ready"), 1.0);
    assert_eq!(before.value("angler_broker_connected"), 1.0);

    let ids = world.jobs(&client, 20).await;
    results.collect(ids.len()).await;
    let loaded = scraped(&worker, "20 jobs are settled", |exposed| {
        exposed.value("angler_job_seconds_count") == 20.0
            && exposed.value("angler_jobs_in_flight") == 0.0
    })
    .await;
    assert_eq!(loaded.value("angler_jobs_total{outcome=\"done\"}"), 20.0);
    assert_eq!(loaded.value("angler_images_total{outcome=\"labelled\"}"), 60.0);
    assert_eq!(loaded.value("angler_images_in_flight"), 0.0);
    for step in ["fetch", "queue", "decode", "wait", "embed", "score", "publish"] {
        let count = loaded.value(&format!("angler_step_seconds_count{{step=\"{step}\"}}"));
        assert_eq!(count, 60.0, "{step}");
    }
    assert_eq!(loaded.value("angler_batch_images_sum"), 60.0);
    let closed = ["full", "linger", "drain"]
        .map(|reason| loaded.value(&format!("angler_batches_total{{reason=\"{reason}\"}}")));
    assert_eq!(closed.iter().sum::<f64>(), loaded.value("angler_batch_images_count"));
    assert!(loaded.value("angler_fetched_bytes_total") > 60.0 * 1000.0);
    assert!(loaded.value("angler_result_bytes_total") > 20.0 * 100.0);
    assert!(loaded.value("angler_embedder_busy_seconds_total") > 0.0);
    assert!(loaded.value("process_cpu_seconds_total") > 0.0);
    assert!(loaded.value("process_resident_memory_bytes") > 1e6);

    // Bad ones: no job at all, a set that is not there, an image that is not, one that is unknown.
    client.publish("angler.jobs", b"{\"id\": \"bad\"}", BasicProperties::default()).await;
    assert_eq!(results.next().await.body["error"]["code"], "malformed_job");
    let images = &world.images;
    let job = json!({"id": "no-set", "images": images, "classes": "nothing"});
    world.job(&client, &mut results, job).await;
    let missing = format!("s3://{}/missing.png", world.bucket.name);
    let job = json!({"id": "no-image", "images": [missing], "classes": SET});
    world.job(&client, &mut results, job).await;
    let job = json!({"id": "unknown", "images": images, "classes": SET, "min_score": 1.0});
    world.job(&client, &mut results, job).await;
    let bad = scraped(&worker, "four more are settled", |exposed| {
        exposed.value("angler_job_seconds_count") == 24.0
    })
    .await;
    for (series, value) in [
        ("angler_jobs_total{outcome=\"done\"}", 22.0),
        ("angler_jobs_total{outcome=\"failed\"}", 1.0),
        ("angler_jobs_total{outcome=\"dead_lettered\"}", 1.0),
        ("angler_jobs_total{outcome=\"retried\"}", 0.0),
        ("angler_job_failures_total{code=\"malformed_job\"}", 1.0),
        ("angler_job_failures_total{code=\"unknown_class_set\"}", 1.0),
        ("angler_dead_letters_total{reason=\"malformed_job\"}", 1.0),
        ("angler_dead_letters_total{reason=\"unknown_class_set\"}", 0.0),
        ("angler_images_total{outcome=\"failed\"}", 1.0),
        ("angler_images_total{outcome=\"unknown\"}", 3.0),
        ("angler_images_total{outcome=\"labelled\"}", 60.0),
        ("angler_image_errors_total{code=\"not_found\"}", 1.0),
        ("angler_image_errors_total{code=\"timeout\"}", 0.0),
    ] {
        assert_eq!(bad.value(series), value, "{series}");
    }
    let status = status(&worker);
    let errors = status["errors"].as_array().unwrap();
    let codes: Vec<&str> = errors.iter().map(|e| e["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["not_found", "unknown_class_set", "malformed_job"], "newest first");
    assert_eq!((&errors[0]["job"], &errors[0]["image"]), (&json!("no-image"), &json!(missing)));
    assert!(errors[2]["image"].is_null() && errors[2]["job"] == "bad", "{errors:?}");
    assert_eq!(status["total"]["jobs"]["done"], 22);
    assert_eq!(status["queue"], "angler.jobs");
    assert_eq!(status["backend"]["name"], "onnxruntime-cpu");
    assert_eq!(status["backend"]["devices"], json!(["cpu"]));
    let minute = &status["last_minute"];
    assert!(minute["images_per_second"].as_f64().unwrap() > 0.0, "{status}");
    let (p50, p99) = (&minute["job_seconds"]["p50"], &minute["job_seconds"]["p99"]);
    assert!(p50.as_f64().unwrap() > 0.0 && p50.as_f64() <= p99.as_f64(), "{status}");
    let waits_for = minute["waits_for"].as_str().unwrap();
    assert!(["fetch", "decode", "engine", "publish"].contains(&waits_for), "{status}");
    let shares = minute["steps"].as_object().unwrap().values();
    let all: f64 = shares.map(|share| share.as_f64().unwrap()).sum();
    assert!((all - 1.0).abs() < 1e-6, "{status}");

    swaps(&world, &worker).await;
}

async fn swaps(world: &World, worker: &Worker) {
    let version =
        |number: &str| format!("angler_class_version_info{{set=\"{SET}\",version=\"{number}\"}}");
    let count =
        |outcome: &str| format!("angler_class_swaps_total{{outcome=\"{outcome}\",set=\"{SET}\"}}");
    let refused = format!("angler_class_refused{{set=\"{SET}\"}}");
    let since = format!("angler_class_swap_timestamp_seconds{{set=\"{SET}\"}}");
    let before = scrape(worker);
    assert_eq!(before.value(&version("1")), 1.0);
    assert_eq!((before.value(&count("served")), before.value(&refused)), (0.0, 0.0));

    world.put_version("2", tiny::version(SET, "2")).await;
    world.activate("2").await;
    let after = scraped(worker, "version 2 is served", |e| e.get(&version("2")).is_some()).await;
    assert_eq!(after.get(&version("1")), None);
    assert_eq!((after.value(&count("served")), after.value(&count("refused"))), (1.0, 0.0));
    assert!(after.value(&since) > before.value(&since));

    world.put_version("3", b"no class vectors".to_vec()).await;
    world.activate("3").await;
    let after = scraped(worker, "version 3 is refused", |e| e.value(&refused) == 1.0).await;
    assert_eq!(after.value(&version("2")), 1.0);
    assert_eq!((after.value(&count("served")), after.value(&count("refused"))), (1.0, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_model_runs_the_worker_says_so_and_without_a_broker_too() {
    let mut world = World::new().await;
    world.setup.env.insert("ANGLER__AMQP__URL".into(), "amqp://u:p@127.0.0.1:9/%2f".into());
    let worker = world.setup.launch().await;
    let exposed = scrape(&worker);
    assert_eq!(exposed.value("angler_ready"), 0.0);
    assert_ne!(exposed.get("angler_broker_connected"), Some(1.0));
    assert_eq!(exposed.value("angler_jobs_total{outcome=\"done\"}"), 0.0);
    let status = status(&worker);
    assert_eq!(status["ready"], false);
    assert!(status["missing"].is_string() && status["last_minute"]["job_seconds"].is_null());
    assert!(get(&worker, "/").contains("<noscript>"));
    // Once the model is loaded the worker turns to the broker, and says that it is not there.
    scraped(&worker, "no connection", |e| e.get("angler_broker_connected") == Some(0.0)).await;
}
