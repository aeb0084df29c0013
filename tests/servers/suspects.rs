//! A job that kills every worker that works on it ends in the dead letters, with a reason, and takes
//! no other job there.
//!
//! The worker here is put together from the library's parts by this very binary, run again as a
//! child process, with a back end that aborts on one colour. What is shipped has no such hook.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Broker, Bucket, eventually, var};
use ndarray::{Array2, ArrayView4, array};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use angler_amqp::AmqpOptions;
use angler_amqp::control_listener::ControlListener;
use angler_amqp::losses::Losses;
use angler_amqp::publisher::Publisher;
use angler_amqp::sink::AmqpSink;
use angler_amqp::source::AmqpSource;
use angler_amqp::topology::Topology;
use angler_core::class_sets::catalog::Catalog;
use angler_core::pipeline::{ImageLimits, Pipeline};
use angler_core::readiness::Readiness;
use angler_core::retry::RetrySchedule;
use angler_core::worker::{Worker, WorkerOptions};
use angler_inference::embed::fake::FakeEmbedder;
use angler_inference::embed::{Backend, EmbedError, Embedder};
use angler_inference::engine::Engine;
use angler_inference::engine::policy::BatchPolicy;
use angler_pixels::{Filter, PixelSpec, Resize};
use angler_storage::s3;
use angler_storage::s3::{S3Images, S3Options};
use angler_vectors::score::Scorer;
use angler_vectors::{ClassVectors, Contents};
use angler_wire::job::JobLimits;

/// The red value on which the back end aborts.
const DEADLY: u8 = 66;
const MODEL: &str = "fake@000000000000";
/// Tells the child which broker it works for; without it the child does nothing.
const BROKER: &str = "ANGLER_TEST_SUSPECTS_BROKER";

struct Deadly(FakeEmbedder);

impl Embedder for Deadly {
    fn backend(&self) -> Backend {
        self.0.backend()
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        if pixels.outer_iter().any(|image| image[[0, 0, 0]] == DEADLY) {
            std::process::abort();
        }
        self.0.embed(pixels)
    }
}

fn options(url: &str) -> AmqpOptions {
    AmqpOptions {
        url: url.to_owned(),
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        name: "deadly".into(),
    }
}

fn topology() -> Topology {
    Topology {
        jobs: "angler.jobs".into(),
        results: "angler.results".into(),
        dead: "angler.dead".into(),
        control_exchange: "angler.control".into(),
        retry_delays: vec![Duration::from_secs(1)],
    }
}

/// The child: a worker as `angler worker` puts it together, but for its back end.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run as a child process by the test below"]
async fn child() {
    let Ok(url) = std::env::var(BROKER) else { return };
    let (options, topology) = (options(&url), topology());
    let store = S3Options {
        endpoint: Some(var("ANGLER_TEST_S3_ENDPOINT")),
        path_style: true,
        concurrency: 8,
        ..S3Options::default()
    };
    let images = S3Images::new(s3::Clients::new(&store).await.unwrap(), &store);
    let policy = BatchPolicy { max_batch: 8, linger: Duration::from_millis(20) };
    let embedder: Box<dyn Embedder> = Box::new(Deadly(FakeEmbedder::new(3)));
    let engine = Engine::start(vec![embedder], policy, (1, 1), Scorer::default()).unwrap();
    let spec = PixelSpec { width: 1, height: 1, resize: Resize::Exact, filter: Filter::Bilinear };
    let minute = Duration::from_secs(60);
    let limits = ImageLimits {
        image_bytes: 1 << 20,
        image_pixels: 1 << 20,
        images_in_flight: 64,
        images_at_least: 64,
        bytes_in_flight: 64 << 20,
        image_time: minute,
        wait_time: minute,
        decoders: 2,
    };
    let labels = ["red", "green", "blue"].map(str::to_owned).to_vec();
    let vectors = array![[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    let classes = ClassVectors::new(("s", "1"), Contents::new(labels, vectors, MODEL)).unwrap();
    let catalog = Arc::new(Catalog::fixed(classes, MODEL, 3).unwrap());
    let publisher = Arc::new(Publisher::new(options.clone(), topology.clone()));
    // Nobody here needs long to connect again.
    let losses = Losses::new(options.clone(), topology.clone());
    let losses = Arc::new(losses.with_patience(Duration::from_secs(1)));
    let listener = ControlListener::new(
        options.clone(),
        topology.clone(),
        Arc::clone(&losses),
        Arc::clone(&catalog),
        None,
    );
    tokio::spawn(Arc::new(listener).run());
    let source = AmqpSource::new(
        options,
        topology,
        16,
        JobLimits { images: 100, message_bytes: 1 << 20 },
        Arc::clone(&publisher),
        Arc::new(Readiness::default()),
    );
    let worker = Worker::new(
        Box::new(source.with_losses(losses)),
        Arc::new(AmqpSink::new(publisher, "angler.results".into(), vec![])),
        Arc::new(Pipeline::new(Arc::new(images), engine, spec, &limits)),
        catalog,
        WorkerOptions {
            name: "deadly".into(),
            model: MODEL.into(),
            jobs_in_flight: 16,
            job_time: minute,
            grace: minute,
            retry: RetrySchedule { delays: vec![Duration::from_secs(1)], max_attempts: 2 },
            every_image: false,
            shadow: None,
            cancellations: None,
            traces: None,
        },
    );
    worker.run(CancellationToken::new()).await.unwrap();
}

/// One worker after another, as a supervisor starts them.
struct Supervised {
    broker: String,
    child: Option<Child>,
    deaths: Vec<ExitStatus>,
}

impl Supervised {
    /// Starts a worker if none runs.
    fn look(&mut self) {
        if let Some(child) = &mut self.child {
            let Some(status) = child.try_wait().unwrap() else { return };
            self.deaths.push(status);
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "suspects::child", "--ignored", "--nocapture"])
            .env(BROKER, &self.broker);
        command.env("AWS_ACCESS_KEY_ID", var("ANGLER_TEST_S3_KEY"));
        command.env("AWS_SECRET_ACCESS_KEY", var("ANGLER_TEST_S3_SECRET"));
        command.env("AWS_EC2_METADATA_DISABLED", "true");
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(silent.spawn().unwrap());
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn png(rgb: [u8; 3]) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let image = image::RgbImage::from_pixel(1, 1, image::Rgb(rgb));
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ten_jobs_in_flight_the_one_that_kills_workers_ends_as_a_dead_letter_and_nine_are_done()
{
    let (broker, bucket) = (Broker::new().await, Bucket::new().await);
    let good = bucket.put("good.png", png([0, 200, 0])).await;
    let deadly = bucket.put("deadly.png", png([DEADLY, 0, 0])).await;
    let mut workers = Supervised { broker: broker.url.clone(), child: None, deaths: vec![] };
    // The jobs are there before the first worker, so that all are in flight together.
    let connection = angler_amqp::connect(&options(&broker.url), "test").await.unwrap();
    topology().declare(&connection).await.unwrap();
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    for number in 0..10 {
        let mut images = vec![good.as_str(); 3];
        if number == 4 {
            images[1] = &deadly;
        }
        let run = json!({"id": "r", "jobs": 10, "index": number});
        let job =
            json!({"id": format!("r/{number}"), "images": images, "classes": "s@1", "run": run});
        client.job(&job).await;
    }
    let ended = {
        let supervise = async {
            loop {
                workers.look();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // A worker that dies between a result's confirm and its ack leaves its job to be done again.
        let all = async {
            let mut all = BTreeMap::new();
            while all.len() < 10 {
                let result = results.next().await;
                all.insert(result.body["id"].as_str().unwrap().to_owned(), result);
            }
            all
        };
        tokio::select! {
            ended = all => ended,
            () = supervise => unreachable!("it never ends"),
        }
    };
    for (id, received) in &ended {
        let result = &received.body;
        if id == "r/4" {
            assert_eq!(
                (&result["status"], &result["error"]["code"]),
                (&json!("failed"), &json!("retries_exhausted"))
            );
            let message = result["error"]["message"].as_str().unwrap();
            assert!(message.contains("3 times alone"), "{message}");
            assert_eq!(result["run"]["index"], 4);
        } else {
            assert_eq!(result["status"], "done", "{result}");
            let labels = result["images"].as_array().unwrap().iter().map(|i| &i["label"]);
            assert!(labels.eq(vec![&json!("green"); 3]), "{result}");
        }
    }
    let dead = eventually("the dead letter", async || client.get("angler.dead").await).await;
    assert_eq!(dead.body["id"], "r/4");
    assert_eq!(dead.header("angler-reason").as_deref(), Some("retries_exhausted"));
    assert!(client.get("angler.dead").await.is_none(), "an innocent job");
    eventually("nothing is left", async || {
        let left = ["angler.jobs", "angler.suspects", "angler.retry.1s"];
        left.iter().all(|queue| broker.depth(queue) == Some(0)).then_some(())
    })
    .await;
    // Twice among the others, three times alone; and each time it was an abort.
    let aborts: Vec<Option<i32>> = workers.deaths.iter().map(ExitStatusExt::signal).collect();
    assert_eq!(aborts, [Some(6); 5]);
}
