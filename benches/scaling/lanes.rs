//! One-image jobs in a queue of their own, while another queue has more jobs than can be done.
//!
//! Each is sent some time after the result of the one before, by a producer of its own, and its result
//! goes to a queue of that producer's.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, Consumer};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use angler_amqp::publisher::{Published, Publisher};

use crate::Options;
use crate::load::{Load, Rate, properties};
use crate::statistics::{median, milliseconds, percentile, sorted};
use crate::support::DEADLINE;
use crate::worker::Workers;
use crate::world::{World, close};

/// The first queue of jobs is that of the other sections.
const LANES: &str = "angler.jobs,angler.quick:8";
const QUICK: &str = "angler.quick";
/// Images in a job of the other queue, and jobs that a worker holds of each.
const IMAGES: usize = 64;
const PREFETCH: usize = 16;

/// `limits.images_in_flight`: as many as by default, and three batches.
const IN_FLIGHT: [usize; 2] = [256, 96];

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    println!("## Lanes: one worker, batches in {} ms\n", options.latency_batch_ms);
    println!(
        "| images in flight | beside | one-image jobs | p50 | p99 | most | the others' images/s |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for in_flight in IN_FLIGHT {
        lines.extend(at(world, options, in_flight).await?);
    }
    println!();
    Ok(json!({ "batch_ms": options.latency_batch_ms, "lines": lines }))
}

async fn at(world: &World, options: &Options, in_flight: usize) -> Result<[Value; 2]> {
    let mut workers = Workers::new(world, PREFETCH, options.latency_batch_ms);
    workers.set("amqp.jobs_queue", LANES);
    workers.set("limits.images_in_flight", &in_flight.to_string());
    workers.grow(1).await?;
    let mut load = Load::new(world).await?;
    let mut quick = Quick::new(world).await?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let (processes, backlog) = (workers.processes(), 2 * workers.held());
    let window = Duration::from_secs_f64(options.latency_seconds);
    for _ in 0..options.rounds {
        let end = CancellationToken::new();
        let timer = async {
            sleep(window).await;
            end.cancel();
            anyhow::Ok(())
        };
        let (times, ()) = tokio::try_join!(quick.until(&end), timer)?;
        alone.extend(times);
        without.push(load.sustained(IMAGES, backlog, window, &processes).await?.images);
        let end = CancellationToken::new();
        let bulk = async {
            let rate: Rate = load.sustained(IMAGES, backlog, window, &processes).await?;
            end.cancel();
            anyhow::Ok(rate)
        };
        let (times, rate) = tokio::try_join!(quick.until(&end), bulk)?;
        beside.extend(times);
        with.push(rate.images);
    }
    workers.stop().await?;
    quick.close().await;
    load.close().await;
    let (without, with) = (median(without), median(with));
    let line = |what: &str, times: Vec<f64>, other: f64| {
        let times = sorted(times);
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|p| percentile(&times, p));
        println!(
            "| {in_flight} | {what} | {} | {p50:.0} ms | {p99:.0} ms | {most:.0} ms | {other:.0} |",
            times.len()
        );
        json!({
            "images_in_flight": in_flight, "beside": what, "jobs": times.len(), "p50_ms": p50,
            "p99_ms": p99, "max_ms": most, "other_images_per_second": other,
        })
    };
    let nothing = line("nothing (the others alone)", alone, without);
    let full = line(&format!("jobs of {IMAGES}, more than can be done"), beside, with);
    Ok([nothing, full])
}

/// Sends one job after another and waits for its result.
struct Quick<'w> {
    world: &'w World,
    publisher: Publisher,
    connection: Connection,
    reply_to: String,
    results: Consumer,
    sent: usize,
}

impl<'w> Quick<'w> {
    async fn new(world: &'w World) -> Result<Self> {
        let settings = world.app(&[("amqp.jobs_queue", LANES)])?.settings;
        let options = settings.amqp_options("bench quick");
        let connection = angler_amqp::connect(&options, "bench quick").await?;
        let channel = connection.create_channel().await?;
        let own = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let queue = channel.queue_declare("".into(), own, FieldTable::default()).await?;
        let reply_to = queue.name().to_string();
        let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let name = reply_to.as_str().into();
        let results =
            channel.basic_consume(name, "quick".into(), no_ack, FieldTable::default()).await?;
        let publisher = Publisher::new(options, settings.topology());
        Ok(Self { world, publisher, connection, reply_to, results, sent: 0 })
    }

    /// Milliseconds from each job's sending to its result, until `end`.
    async fn until(&mut self, end: &CancellationToken) -> Result<Vec<f64>> {
        let mut random = fastrand::Rng::with_seed(self.sent as u64);
        let mut times = Vec::new();
        while !end.is_cancelled() {
            // Of no fixed length: jobs must not fall in step with the batches.
            sleep(Duration::from_micros(random.u64(5_000..45_000))).await;
            let body = self.world.job(self.sent, 1);
            self.sent += 1;
            let properties = properties().with_reply_to(self.reply_to.as_str().into());
            let began = Instant::now();
            let published = self.publisher.publish(QUICK, &properties, &body).await;
            ensure!(published == Published::Confirmed, "there is no queue {QUICK}");
            let next = timeout(DEADLINE, self.results.next()).await;
            let next = next.with_context(|| format!("no result within {DEADLINE:?}"))?;
            let result = next.context("the broker cancelled the consumer of results")??;
            times.push(milliseconds(began.elapsed()));
            let text = String::from_utf8_lossy(&result.data);
            ensure!(text.contains(r#""label""#), "not classified: {text}");
        }
        Ok(times)
    }

    async fn close(self) {
        self.publisher.close().await;
        close(self.connection).await;
    }
}
