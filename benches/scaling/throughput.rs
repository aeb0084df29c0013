//! Images a second against the number of workers.

use anyhow::Result;
use serde_json::{Value, json};

use crate::Options;
use crate::load::{Load, Rate};
use crate::statistics::median;
use crate::worker::Workers;
use crate::world::World;

/// Images in a job: small enough that a window holds many.
const IMAGES: usize = 16;
/// Jobs that a worker holds: 256 images, as many as it may have in flight by default.
const PREFETCH: usize = 16;
/// Images in a batch, the default of `embedder.max_batch`.
const BATCH: f64 = 32.0;

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    // [batch time][number of workers][round]
    let mut rates: Vec<Vec<Vec<Rate>>> =
        vec![vec![Vec::new(); options.workers.len()]; options.batch_ms.len()];
    let mut load = Load::new(world).await?;
    for _ in 0..options.rounds {
        for (batch_ms, rates) in options.batch_ms.iter().zip(&mut rates) {
            let mut workers = Workers::new(world, PREFETCH, *batch_ms);
            for (count, rates) in options.workers.iter().zip(rates) {
                workers.grow(*count).await?;
                // Some more than the workers hold, so that there is always one in the queue.
                let backlog = workers.held() + workers.held() / 2;
                let processes = workers.processes();
                let window = options.window();
                rates.push(load.sustained(IMAGES, backlog, window, &processes).await?);
            }
            workers.stop().await?;
        }
    }
    load.close().await;
    Ok(report(options, &rates))
}

fn report(options: &Options, rates: &[Vec<Vec<Rate>>]) -> Value {
    println!("## Scaling: jobs of {IMAGES} images, batches of {BATCH} in a fixed time\n");
    println!(
        "| a batch takes | workers | images/s | of what their embedders allow | core ms an image | cores busy in all |"
    );
    println!("|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for (batch_ms, rates) in options.batch_ms.iter().zip(rates) {
        for (workers, rates) in options.workers.iter().zip(rates) {
            let of = |value: &dyn Fn(&Rate) -> f64| median(rates.iter().map(value));
            let (images, worker_ms) = (of(&|r| r.images), of(&|r| r.worker_ms));
            let busy = of(&|r| r.busy);
            let ideal = *workers as f64 * BATCH * 1e3 / *batch_ms as f64;
            println!(
                "| {batch_ms} ms | {workers} | {images:.0} | {:.0} % of {ideal:.0} | {worker_ms:.2} | {busy:.1} |",
                100.0 * images / ideal
            );
            lines.push(json!({
                "batch_ms": batch_ms,
                "workers": workers,
                "images_per_second": images,
                "ideal_images_per_second": ideal,
                "worker_core_ms_per_image": worker_ms,
                "busy_cores": busy,
            }));
        }
    }
    println!();
    json!(lines)
}
