//! From a job's time of arrival to its result, against the load.
//!
//! Arrivals are a Poisson process, drawn beforehand, and do not wait: a generator that waited for
//! results would send less just when the worker is slow, and so would hide it.

use anyhow::Result;
use serde_json::{Value, json};

use crate::Options;
use crate::load::Load;
use crate::statistics::{median, percentile, sorted};
use crate::worker::Workers;
use crate::world::World;

/// Images a job, and the prefetch for it: two batches and more in flight.
const JOBS: [(usize, usize); 2] = [(1, 128), (64, 16)];
/// Of the capacity.
const LOADS: [f64; 3] = [0.1, 0.5, 0.9];
/// Fewer do not tell a 99th percentile.
const ENOUGH: usize = 100;

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    println!(
        "## Latency: one worker, batches in {} ms, Poisson arrivals\n",
        options.latency_batch_ms
    );
    println!("| images a job | capacity, jobs/s | load | jobs | p50 | p99 | most |");
    println!("|---|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    let mut load = Load::new(world).await?;
    for (images, prefetch) in JOBS {
        let mut workers = Workers::new(world, prefetch, options.latency_batch_ms);
        workers.grow(1).await?;
        let (processes, backlog) = (workers.processes(), 2 * workers.held());
        let (mut capacities, mut latencies) = (Vec::new(), [const { Vec::new() }; LOADS.len()]);
        for round in 0..options.rounds {
            let rate = load.sustained(images, backlog, options.window(), &processes).await?;
            capacities.push(rate.jobs);
            for (share, latencies) in LOADS.iter().zip(&mut latencies) {
                let times = arrivals(share * rate.jobs, options.latency_seconds, images + round);
                latencies.extend(load.at_times(images, &times).await?);
            }
        }
        workers.stop().await?;
        let capacity = median(capacities);
        for (share, latencies) in LOADS.iter().zip(latencies) {
            let latencies = sorted(latencies);
            let [p50, p99, most] = [0.5, 0.99, 1.0].map(|p| percentile(&latencies, p));
            let p99 = (latencies.len() >= ENOUGH).then_some(p99);
            println!(
                "| {images} | {capacity:.1} | {:.0} % | {} | {p50:.0} ms | {} | {most:.0} ms |",
                100.0 * share,
                latencies.len(),
                p99.map_or("too few".to_owned(), |p99| format!("{p99:.0} ms")),
            );
            lines.push(json!({
                "images_per_job": images,
                "batch_ms": options.latency_batch_ms,
                "capacity_jobs_per_second": capacity,
                "load": share,
                "jobs": latencies.len(),
                "p50_ms": p50,
                "p99_ms": p99,
                "max_ms": most,
            }));
        }
    }
    load.close().await;
    println!();
    Ok(json!(lines))
}

/// Times of arrival in seconds, `rate` a second on average; at least one.
fn arrivals(rate: f64, seconds: f64, seed: usize) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(seed as u64);
    let mut now = 0.0;
    let mut times = Vec::new();
    while now < seconds {
        times.push(now);
        // Exponential gaps; 1 - x is never 0.
        now -= (1.0 - random.f64()).ln() / rate;
    }
    times
}
