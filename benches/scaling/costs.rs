//! What recording metrics costs, and what sending traces does: one worker whose embedder takes no
//! time, with and without it, in turn, so that both meet the same machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use crate::Options;
use crate::load::{Load, Rate};
use crate::statistics::median;
use crate::worker::Workers;
use crate::world::World;

/// As in the section `overhead`.
const JOBS: [(usize, usize); 2] = [(64, 16), (1, 256)];

/// What is there or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    Metrics,
    /// Of every job.
    Traces,
}

/// Takes whatever is sent and looks at none of it, on this machine's cores as all else.
struct Collector {
    url: String,
    bytes: Arc<AtomicU64>,
    _serving: AbortOnDropHandle<()>,
}

impl Collector {
    async fn new() -> Result<Self> {
        let bytes = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&bytes);
        let take = post(async move |body: Bytes| {
            count.fetch_add(body.len() as u64, Ordering::Relaxed);
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let router = Router::new().route("/v1/traces", take);
        let serving = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await; // Until it is dropped.
        });
        Ok(Self { url, bytes, _serving: AbortOnDropHandle::new(serving) })
    }
}

pub async fn measure(world: &World, options: &Options, cost: Cost) -> Result<Value> {
    let collector = Collector::new().await?;
    // [jobs of so many images][without, with][round]
    let mut rates: [[Vec<Rate>; 2]; 2] = Default::default();
    for round in 0..options.rounds {
        for ((images, prefetch), rates) in JOBS.into_iter().zip(&mut rates) {
            // Whoever comes second finds caches that are warm: they take turns in that, too.
            for turn in 0..2 {
                let with = (round + turn) % 2;
                let mut workers = Workers::new(world, prefetch, 0);
                match (cost, with) {
                    (Cost::Metrics, 0) => workers = workers.unmeasured(),
                    (Cost::Traces, 1) => workers.set("telemetry.otlp_endpoint", &collector.url),
                    _ => {}
                }
                workers.grow(1).await?;
                let mut load = Load::new(world).await?;
                let backlog = 2 * workers.held();
                let processes = workers.processes();
                let rate = load.sustained(images, backlog, options.window(), &processes).await?;
                rates[with].push(rate);
                load.close().await;
                workers.stop().await?;
            }
        }
    }
    if cost == Cost::Traces {
        ensure!(collector.bytes.load(Ordering::Relaxed) > 0, "no traces came");
    }
    Ok(report(&rates, cost))
}

fn report(rates: &[[Vec<Rate>; 2]; 2], cost: Cost) -> Value {
    println!("## {cost:?}: an embedder that takes no time, with and without\n");
    println!(
        "| jobs of | images/s without | with | ratio | core ms an image without | with | ratio |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for ((images, _), [without, with]) in JOBS.iter().zip(rates) {
        let of = |rates: &[Rate], value: &dyn Fn(&Rate) -> f64| median(rates.iter().map(value));
        let [rate_without, rate_with] = [without, with].map(|r| of(r, &|r| r.images));
        let [ms_without, ms_with] = [without, with].map(|r| of(r, &|r| r.worker_ms));
        // Neighbours in time are compared, and then the median of that is taken.
        let pairs = || without.iter().zip(with);
        let throughput = median(pairs().map(|(a, b)| b.images / a.images));
        let core_time = median(pairs().map(|(a, b)| b.worker_ms / a.worker_ms));
        println!(
            "| {images} | {rate_without:.0} | {rate_with:.0} | {throughput:.3} | {ms_without:.3} | \
             {ms_with:.3} | {core_time:.3} |"
        );
        lines.push(json!({
            "images_per_job": images,
            "images_per_second_without": rate_without,
            "images_per_second_with": rate_with,
            "throughput_ratio": throughput,
            "core_ms_without": ms_without,
            "core_ms_with": ms_with,
            "core_ms_ratio": core_time,
        }));
    }
    println!();
    json!(lines)
}
