//! `angler worker`, the process, against a real broker and a real store.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use crate::support::{
    Broker, Bucket, Setup, eventually, fashion_classes, files, http_get, repository, var,
};
use base64::Engine;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

/// Everything that most tests need: a broker, a bucket, the sample classes.
struct World {
    broker: Broker,
    bucket: Bucket,
    root: tempfile::TempDir,
    setup: Setup,
}

impl World {
    async fn new() -> Self {
        let (root, _) = fashion_classes();
        let broker = Broker::new().await;
        let setup = Setup::worker(&broker, root.path().to_str().unwrap());
        Self { broker, bucket: Bucket::new().await, root, setup }
    }
}

fn query_images(count: usize) -> Vec<PathBuf> {
    files("samples/fashion/query").into_iter().take(count).collect()
}

/// Rows and labels of a class vectors file, read without angler: the safetensors format is eight
/// bytes of header length, a JSON header, and the tensors' bytes.
fn read_safetensors(path: &std::path::Path) -> (Vec<Vec<f32>>, Vec<String>) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = &header["vectors"];
    assert_eq!(tensor["dtype"], "F32");
    let dim = tensor["shape"][1].as_u64().unwrap() as usize;
    let begin = 8 + length + tensor["data_offsets"][0].as_u64().unwrap() as usize;
    let end = 8 + length + tensor["data_offsets"][1].as_u64().unwrap() as usize;
    let values: Vec<f32> =
        bytes[begin..end].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let labels = header["__metadata__"]["labels"].as_str().unwrap();
    (values.chunks(dim).map(<[f32]>::to_vec).collect(), serde_json::from_str(labels).unwrap())
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_32_images_comes_back_as_one_result_with_right_scores_and_as_classify_gives_them()
{
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(32)).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;

    let images: Vec<Value> =
        uris.iter()
            .enumerate()
            .map(|(i, uri)| {
                if i % 2 == 0 { json!(uri) } else { json!({"uri": uri, "id": format!("sku-{i}")}) }
            })
            .collect();
    let job = json!({
        "id": "nightly/000017", "images": images, "classes": "fashion@1", "top_k": 4,
        "embeddings": true, "run": {"id": "nightly", "jobs": 1563, "index": 17},
        "a_field_of_the_future": true,
    });
    client.job(&job).await;
    let result = results.next().await;

    let p = &result.properties;
    let text = |v: &Option<lapin::types::ShortString>| v.as_ref().map(ToString::to_string);
    assert_eq!(text(p.kind()).as_deref(), Some("classify.result.v1"));
    assert_eq!(text(p.content_type()).as_deref(), Some("application/json"));
    assert_eq!(text(p.message_id()).as_deref(), Some("nightly/000017"));
    assert_eq!(text(p.correlation_id()).as_deref(), Some("nightly/000017"));
    assert_eq!(*p.delivery_mode(), Some(2));
    let body = &result.body;
    assert_eq!(body["id"], "nightly/000017");
    assert_eq!(body["status"], "done");
    assert_eq!(body["classes"], "fashion@1");
    assert_eq!(body["backend"], "onnxruntime-cpu");
    assert_eq!(body["attempt"], 1);
    assert_eq!(body["run"], job["run"]);
    assert!(body["model"].as_str().unwrap().starts_with("efficientnet-lite0@"));
    assert!(!body["worker"].as_str().unwrap().is_empty());
    let finished = body["finished_at"].as_str().unwrap();
    assert!(finished.len() == 24 && finished.ends_with('Z'), "{finished}");

    // The scores, by a cosine in f64 from the embeddings that came back.
    let (vectors, labels) = read_safetensors(&world.root.path().join("fashion/1.safetensors"));
    let entries = body["images"].as_array().unwrap();
    assert_eq!(entries.len(), 32);
    for (i, (entry, uri)) in entries.iter().zip(&uris).enumerate() {
        assert_eq!(entry["uri"], *uri);
        assert_eq!(entry.get("id"), (i % 2 == 1).then(|| json!(format!("sku-{i}"))).as_ref());
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(entry["embedding"].as_str().unwrap())
            .unwrap();
        let embedding: Vec<f32> =
            bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let norm: f64 = embedding.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((norm - 1.0).abs() < 1e-5, "{norm}");
        let mut wanted: Vec<(f64, &String)> =
            vectors.iter().map(|v| cosine(v, &embedding)).zip(&labels).collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0));
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        for (found, (score, label)) in top.iter().zip(&wanted) {
            assert_eq!(found["label"], **label);
            assert!((found["score"].as_f64().unwrap() - score).abs() < 1e-4);
        }
        assert_eq!(entry["label"], top[0]["label"]);
        assert_eq!(entry["score"], top[0]["score"]);
    }

    // The same images through `angler classify`.
    let prefix = format!("s3://{}/q/", world.bucket.name);
    let (code, lines, log) =
        world.setup.run(&["classify", &prefix, "--classes", "fashion@1", "--top-k", "4"]);
    assert_eq!(code, 0, "{log}");
    let classified: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(classified.len(), 32);
    for line in &classified {
        let entry = entries.iter().find(|e| e["uri"] == line["uri"]).unwrap();
        assert_eq!(line["label"], entry["label"]);
        assert_eq!(line["classes"], body["classes"]);
        assert_eq!(line["model"], body["model"]);
        assert_eq!(line["backend"], body["backend"]);
        let (a, b) = (line["score"].as_f64().unwrap(), entry["score"].as_f64().unwrap());
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_image_error_has_its_code_and_hurts_no_neighbour() {
    let mut world = World::new().await;
    let private = Bucket::new().await;
    let public = Bucket::named("public").await;
    let prefix = crate::support::unique("errors");
    let key = |name: &str| format!("{prefix}/{name}");
    let data = |name: &str| std::fs::read(repository("tests/data/images").join(name)).unwrap();
    let good = public.put(&key("good.png"), std::fs::read(&query_images(1)[0]).unwrap()).await;
    let secret = private.put("secret.jpg", data("rgb.jpg")).await;
    let elsewhere = world.bucket.put("a.jpg", data("rgb.jpg")).await;
    // As large as a photo may be, and one byte more than this worker takes.
    let large = public.put(&key("large.jpg"), vec![0; 200_001]).await;
    let text = public.put(&key("text.jpg"), data("bad/text.jpg")).await;
    let empty = public.put(&key("empty.jpg"), data("bad/empty.jpg")).await;
    let truncated = public.put(&key("truncated.jpg"), data("bad/truncated.jpg")).await;
    let bomb = public.put(&key("bomb.png"), data("bad/bomb.png")).await;
    let missing = format!("s3://public/{prefix}/missing.jpg");
    let cases = [
        (good.as_str(), None),
        (missing.as_str(), Some("not_found")),
        (secret.as_str(), Some("access_denied")),
        (elsewhere.as_str(), Some("bucket_not_allowed")),
        ("http://example.org/a.jpg", Some("bad_uri")),
        ("file:///etc/passwd", Some("bad_uri")),
        ("s3://public", Some("bad_uri")),
        (large.as_str(), Some("too_large")),
        (bomb.as_str(), Some("too_large")),
        (good.as_str(), None),
        (text.as_str(), Some("unsupported_format")),
        (empty.as_str(), Some("unsupported_format")),
        (truncated.as_str(), Some("corrupt_image")),
        (good.as_str(), None),
    ];
    world.setup.credentials(&var("ANGLER_TEST_S3_RO_KEY"), &var("ANGLER_TEST_S3_RO_SECRET"));
    world
        .setup
        .set("s3.allowed_buckets", &format!("public,{}", private.name))
        .set("limits.image_bytes", "200000");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let images: Vec<&str> = cases.iter().map(|(uri, _)| *uri).collect();
    client.job(&json!({"id": "errors", "images": images, "classes": "fashion@1"})).await;
    let result = results.next().await.body;
    assert_eq!(result["status"], "done", "{result}");
    for ((uri, code), entry) in cases.iter().zip(result["images"].as_array().unwrap()) {
        assert_eq!(entry["uri"], *uri);
        match code {
            Some(code) => {
                assert_eq!(entry["error"]["code"], *code, "{entry}");
                assert!(!entry["error"]["message"].as_str().unwrap().is_empty());
                assert!(entry.get("label").is_none() && entry.get("score").is_none());
            }
            None => assert!(entry["label"].is_string(), "{entry}"),
        }
    }
    drop(worker);
}

/// A network that gives a black image the embedding zero, which has no cosine with anything.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_the_model_fails_on_is_internal_and_hurts_no_neighbour() {
    let mut world = World::new().await;
    // A BMP of 8 × 8 pixels of one colour, by hand: header, info, rows of B, G, R.
    let bmp = |colour: [u8; 3]| {
        let mut bytes = b"BM".to_vec();
        for value in [54_u32 + 192, 0, 54, 40, 8, 8, 1 | 24 << 16, 0, 192, 2835, 2835, 0, 0] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(colour.repeat(64));
        bytes
    };
    let references = tempfile::tempdir().unwrap();
    for (label, colour) in [("red", [0, 0, 255]), ("blue", [255, 0, 0])] {
        std::fs::create_dir(references.path().join(label)).unwrap();
        std::fs::write(references.path().join(label).join("1.bmp"), bmp(colour)).unwrap();
    }
    world.setup.set("model.path", "tests/data/models/tiny-mean");
    let source = references.path().to_str().unwrap();
    let (code, _, log) =
        world.setup.run(&["classes", "build", source, "--set", "colours", "--version", "1"]);
    assert_eq!(code, 0, "{log}");
    let mut images = Vec::new();
    for (name, colour) in [("red", [30, 20, 200]), ("black", [0, 0, 0]), ("blue", [90, 9, 9])] {
        images.push(world.bucket.put(&format!("{name}.bmp"), bmp(colour)).await);
    }
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "black", "images": images, "classes": "colours@1"})).await;
    let result = results.next().await.body;
    assert_eq!(result["images"][0]["label"], "red", "{result}");
    assert_eq!(result["images"][1]["error"]["code"], "internal", "{result}");
    assert_eq!(result["images"][2]["label"], "blue", "{result}");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_retried_and_then_said() {
    let mut world = World::new().await;
    // Nothing listens there: bound and never accepted from, so that nobody else takes the port.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    world
        .setup
        .set("s3.endpoint", &format!("http://{closed}"))
        .set("retry.delays_seconds", "0.2")
        .set("retry.max_attempts", "2");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    // One image has its own answer, so the job has one.
    client
        .job(&json!({"id": "mixed", "images": ["s3://b/k", "ftp://x"], "classes": "fashion@1"}))
        .await;
    let mixed = results.next().await.body;
    assert_eq!(mixed["attempt"], 2, "{mixed}");
    assert_eq!(mixed["images"][0]["error"]["code"], "storage_unavailable");
    assert_eq!(mixed["images"][1]["error"]["code"], "bad_uri");
    // Nothing can be said: the job failed, and a person finds it among the dead.
    client.job(&json!({"id": "all", "images": ["s3://b/k"], "classes": "fashion@1"})).await;
    let failed = results.next().await.body;
    assert_eq!(failed["status"], "failed");
    assert_eq!(failed["error"]["code"], "retries_exhausted");
    assert_eq!(failed["attempt"], 2);
    let dead = eventually("a dead letter", async || client.get("angler.dead").await).await;
    assert_eq!(dead.header("angler-reason").as_deref(), Some("retries_exhausted"));
    assert_eq!(dead.header("angler-attempts").as_deref(), Some("LongUInt(2)"));
    assert!(dead.header("angler-error").unwrap().contains("cannot be reached"));
    assert_eq!(dead.header("x-death"), None);
    assert_eq!(dead.body["id"], "all");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_ready_in_time_says_so() {
    let mut world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(1)).await;
    world.setup.set("limits.image_seconds", "0.001");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "late", "images": uris, "classes": "fashion@1"})).await;
    let result = results.next().await.body;
    assert_eq!(result["images"][0]["error"]["code"], "timeout", "{result}");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_job_or_cannot_be_classified_has_a_failed_result_and_blocks_nothing() {
    let mut world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(2)).await;
    // A version that another model made.
    let setup = &mut world.setup;
    let root = world.root.path().to_str().unwrap().to_owned();
    let mut other = Setup::store();
    other.set("classes.root", &root).set("model.path", "tests/data/models/tiny-nhwc");
    let build =
        ["classes", "build", "samples/fashion/reference", "--set", "other", "--version", "1"];
    let (code, _, log) = other.run(&build);
    assert_eq!(code, 0, "{log}");
    setup.set("limits.images_per_job", "3");
    let worker = setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let job = |id: &str, images: Value, classes: &str| {
        json!({"id": id, "images": images, "classes": classes}).to_string().into_bytes()
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("g-1", b"garbage".to_vec(), "malformed_job"),
        ("g-2", b"\xff\xfe\x00".to_vec(), "malformed_job"),
        ("g-3", Vec::new(), "malformed_job"),
        ("g-4", b"[1,2".to_vec(), "malformed_job"),
        ("no-images", job("no-images", json!([]), "fashion@1"), "malformed_job"),
        ("bad-name", job("bad-name", json!(uris), "../fashion"), "malformed_job"),
        ("no-set", job("no-set", json!(uris), "nothing"), "unknown_class_set"),
        ("no-version", job("no-version", json!(uris), "fashion@99"), "unknown_version"),
        ("mismatch", job("mismatch", json!(uris), "other@1"), "model_mismatch"),
        ("many", job("many", json!(["a", "b", "c", "d"]), "fashion@1"), "too_many_images"),
    ];
    for (id, body, _) in &cases {
        let properties = BasicProperties::default().with_message_id((*id).into());
        client.publish("angler.jobs", body, properties).await;
    }
    client.publish("angler.jobs", b"nameless garbage", BasicProperties::default()).await;
    client.job(&json!({"id": "good", "images": uris, "classes": "fashion@1"})).await;

    let all = results.collect(cases.len() + 2).await;
    for (id, _, code) in &cases {
        let result = &all[*id].body;
        assert_eq!(result["status"], "failed", "{result}");
        assert_eq!(result["error"]["code"], *code, "{result}");
        assert!(result.get("images").is_none());
    }
    assert_eq!(all["good"].body["status"], "done");
    let nameless = all.keys().find(|id| id.starts_with("malformed-")).unwrap();
    assert_eq!(all[nameless].body["error"]["code"], "malformed_job");
    // What is malformed is kept for a person, as it came.
    let mut dead = BTreeSet::new();
    for _ in 0..7 {
        let letter = eventually("a dead letter", async || client.get("angler.dead").await).await;
        assert_eq!(letter.header("angler-reason").as_deref(), Some("malformed_job"));
        dead.insert(letter.raw);
    }
    assert!(dead.contains(b"garbage".as_slice()) && dead.contains(b"nameless garbage".as_slice()));
    eventually("the jobs queue is empty", async || {
        (world.broker.depth("angler.jobs") == Some(0)).then_some(())
    })
    .await;
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_go_where_the_producer_says_and_never_into_the_void() {
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(1)).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    client.private_queue("replies").await;
    let mut replies = client.consume("replies").await;
    let mut results = client.consume("angler.results").await;
    let job = |id: &str| json!({"id": id, "images": uris, "classes": "fashion@1"}).to_string();
    let mut headers = FieldTable::default();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(trace.into()));
    let properties = BasicProperties::default()
        .with_reply_to("replies".into())
        .with_correlation_id("my-own".into())
        .with_headers(headers);
    client.publish("angler.jobs", job("mine").as_bytes(), properties).await;
    let reply = replies.next().await;
    assert_eq!(reply.body["id"], "mine");
    assert_eq!(reply.properties.correlation_id().as_ref().unwrap().as_str(), "my-own");
    assert_eq!(reply.properties.message_id().as_ref().unwrap().as_str(), "mine");
    assert_eq!(reply.header("traceparent").as_deref(), Some(trace));

    let nowhere = BasicProperties::default().with_reply_to("nowhere".into());
    client.publish("angler.jobs", job("lost").as_bytes(), nowhere).await;
    let fallen = results.next().await;
    assert_eq!(fallen.body["id"], "lost");
    assert_eq!(fallen.header("angler-reply-to-unroutable").as_deref(), Some("nowhere"));
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_is_admitted_and_leaves_the_rest_to_others() {
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(32)).await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids: Vec<String> = (0..40).map(|i| format!("drain/{i:03}")).collect();
    for id in &ids {
        client.job(&json!({"id": id, "images": uris, "classes": "fashion@1"})).await;
    }
    let first = results.next().await.body["id"].as_str().unwrap().to_owned();
    worker.signal("TERM");
    // A signal is seen a moment after it was sent; from then on the worker is unready, or gone.
    let readyz = format!("{}/readyz", worker.http);
    eventually("the worker is not ready any more", async || {
        let (status, _) = http_get(&readyz).unwrap_or_default();
        (status != 200).then_some(())
    })
    .await;
    let ended = worker.ended().await;
    assert!(ended.success(), "{ended}:\n{}", worker.log());
    // What the first did not finish, a second does, each job once.
    let second = world.setup.start().await;
    let rest = ids.iter().filter(|id| **id != first).cloned();
    let duplicates = results.until_all(rest).await;
    assert_eq!(duplicates, 0);
    eventually("the jobs queue is empty", async || {
        (world.broker.depth("angler.jobs") == Some(0)).then_some(())
    })
    .await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_of_20_jobs_loses_none() {
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(32)).await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids: BTreeSet<String> = (0..20).map(|i| format!("kill/{i:03}")).collect();
    for id in &ids {
        client.job(&json!({"id": id, "images": uris, "classes": "fashion@1"})).await;
    }
    let first = results.next().await;
    worker.kill();
    let second = world.setup.start().await;
    let first = first.body["id"].as_str().unwrap().to_owned();
    results.until_all(ids.into_iter().filter(|id| *id != first)).await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_exits_at_once_and_loses_nothing() {
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(32)).await;
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids: BTreeSet<String> = (0..20).map(|i| format!("twice/{i:03}")).collect();
    for id in &ids {
        client.job(&json!({"id": id, "images": uris, "classes": "fashion@1"})).await;
    }
    let first = results.next().await.body["id"].as_str().unwrap().to_owned();
    worker.signal("INT");
    eventually("the first signal is seen", async || worker.log().contains("SIGINT").then_some(()))
        .await;
    worker.signal("INT");
    let ended = worker.ended().await;
    // Either the drain was quicker than the second signal, or it did what it says.
    assert!(matches!(ended.code(), Some(0 | 130)), "{ended}");
    let second = world.setup.start().await;
    results.until_all(ids.into_iter().filter(|id| *id != first)).await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_broker_drops_come_back_and_no_job_is_lost() {
    let world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(16)).await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let ids: BTreeSet<String> = (0..20).map(|i| format!("cut/{i:03}")).collect();
    for id in &ids {
        client.job(&json!({"id": id, "images": uris, "classes": "fashion@1"})).await;
    }
    let first = results.next().await.body["id"].as_str().unwrap().to_owned();
    let own = eventually("all three connections are listed", async || {
        let all = world.broker.connections();
        let own: Vec<_> = all.into_iter().filter(|(_, own)| own.starts_with("angler ")).collect();
        (own.len() == 3).then_some(own)
    })
    .await;
    for what in ["angler consume ", "angler publish ", "angler control "] {
        assert!(own.iter().any(|(_, name)| name.starts_with(what)), "{what}: {own:?}");
    }
    for (name, _) in &own {
        world.broker.cut(name);
    }
    results.until_all(ids.into_iter().filter(|id| *id != first)).await;
    worker.ready().await;
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_topology_is_that_of_the_contract_and_a_foreign_queue_is_said() {
    let world = World::new().await;
    // A results queue that somebody made before, of another kind.
    let client = world.broker.connect().await;
    client.private_queue("angler.results").await;
    let worker = world.setup.start().await;
    let jobs = world.broker.queue("angler.jobs");
    assert_eq!(jobs["type"], "quorum", "{jobs}");
    assert_eq!(jobs["durable"], true);
    let arguments = &jobs["arguments"];
    assert_eq!(arguments["x-dead-letter-routing-key"], "angler.undeliverable");
    assert_eq!(arguments["x-dead-letter-strategy"], "at-least-once");
    // Connections that break count as well.
    assert!(arguments["x-delivery-limit"].as_u64().is_some_and(|limit| limit >= 100));
    // What is kept is not dropped because somebody looked at it: 4.x would do so after 20 times.
    let keeps =
        |queue: &Value| queue["arguments"]["x-delivery-limit"].as_u64() == Some(1_000_000_000);
    for retry in ["angler.retry.5s", "angler.retry.30s", "angler.retry.5m"] {
        let queue = world.broker.queue(retry);
        assert_eq!(queue["arguments"]["x-dead-letter-routing-key"], "angler.jobs", "{queue}");
        assert!(queue["arguments"]["x-message-ttl"].is_u64());
        assert!(keeps(&queue), "{queue}");
    }
    for kept in ["angler.dead", "angler.undeliverable"] {
        let queue = world.broker.queue(kept);
        assert!(queue["type"] == "quorum" && keeps(&queue), "{queue}");
    }
    let exchange = crate::support::management(
        "GET",
        &format!("exchanges/{}/angler.control", world.broker.vhost),
        None,
    );
    assert_eq!(exchange["type"], "fanout");
    let log = worker.log();
    assert!(log.contains("angler.results exists with other arguments"), "{log}");
    // It is used as it is.
    let uris = world.bucket.upload("q", &query_images(1)).await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "a", "images": uris, "classes": "fashion@1"})).await;
    assert_eq!(results.next().await.body["id"], "a");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_what_is_missing_and_the_worker_waits_for_its_broker() {
    let mut world = World::new().await;
    world.setup.env.insert("ANGLER__AMQP__URL".into(), "amqp://u:hunter2@127.0.0.1:9/%2f".into());
    let mut worker = world.setup.launch().await;
    assert_eq!(http_get(&format!("{}/livez", worker.http)).unwrap().0, 200);
    let waiting = eventually("the broker is missed", async || {
        let (status, text) = http_get(&format!("{}/readyz", worker.http))?;
        text.contains("no jobs are being consumed").then_some(status)
    })
    .await;
    assert_eq!(waiting, 503);
    eventually("the outage is logged", async || {
        worker.log().contains("the broker is tried again").then_some(())
    })
    .await;
    assert!(!worker.log().contains("hunter2"), "{}", worker.log());
    worker.signal("TERM");
    assert!(worker.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn class_sets_come_from_s3_with_their_active_version() {
    let mut world = World::new().await;
    let uris = world.bucket.upload("q", &query_images(4)).await;
    let file = std::fs::read(world.root.path().join("fashion/1.safetensors")).unwrap();
    world.bucket.put("classes/fashion/1.safetensors", file).await;
    world.bucket.put("classes/fashion/active.json", r#"{"version":"1","previous":null}"#).await;
    let root = format!("s3://{}/classes", world.bucket.name);
    world.setup.set("classes.root", &root).set("classes.preload", "fashion");
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "a", "images": uris, "classes": "fashion", "min_score": 0.999})).await;
    let result = results.next().await.body;
    assert_eq!(result["classes"], "fashion@1", "{result}");
    for entry in result["images"].as_array().unwrap() {
        assert!(entry["label"].is_null() && entry["top"][0]["label"].is_string(), "{entry}");
    }
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_work_stops_with_the_reason() {
    let mut world = World::new().await;
    world.setup.set("classes.preload", "nothing");
    let mut worker = world.setup.launch().await;
    assert_eq!(worker.ended().await.code(), Some(1));
    let log = worker.log();
    assert!(log.contains("classes.preload: nothing") && log.contains("active.json"), "{log}");
    let (code, _, log) = world.setup.run(&["worker", "--setting", "amqp.prefecth=3"]);
    assert_eq!(code, 2, "{log}");
    assert!(log.contains("prefecth"), "{log}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    world.setup.set("http.listen", &taken.local_addr().unwrap().to_string());
    let (code, _, log) = world.setup.run(&["worker"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("http.listen"), "{log}");
}

/// A drain is bounded by its grace period even when jobs hang.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_takes_too_long_gives_its_jobs_back() {
    let mut world = World::new().await;
    // A store that accepts and never answers.
    let hole = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = hole.local_addr().unwrap();
    world.setup.set("s3.endpoint", &format!("http://{address}")).set("shutdown.grace_seconds", "1");
    let mut worker = world.setup.start().await;
    let client = world.broker.connect().await;
    client.job(&json!({"id": "stuck", "images": ["s3://b/k"], "classes": "fashion@1"})).await;
    eventually("the job is being worked on", async || {
        let queue = world.broker.queue("angler.jobs");
        (queue["messages_unacknowledged"] == 1).then_some(())
    })
    .await;
    let asked = std::time::Instant::now();
    worker.signal("TERM");
    assert_eq!(worker.ended().await.code(), Some(1));
    assert!(asked.elapsed() < Duration::from_secs(30));
    assert!(worker.log().contains("shutdown.grace_seconds"), "{}", worker.log());
    eventually("the job is back", async || {
        let queue = world.broker.queue("angler.jobs");
        (queue["messages_ready"] == 1).then_some(())
    })
    .await;
}
