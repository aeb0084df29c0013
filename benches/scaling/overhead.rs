//! What angler itself takes: one worker whose embedder takes no time, beside the store and the
//! broker without a worker, in the same rounds.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use angler::builtin_model::{self, BUILTIN};
use angler_pixels::{PixelLimits, preprocess};

use crate::Options;
use crate::ceilings::{self, Store};
use crate::load::{Load, Rate};
use crate::statistics::{median, milliseconds};
use crate::worker::Workers;
use crate::world::World;

/// Images a job and the prefetch for it: images in flight are then bounded by their own limit, and
/// not by jobs.
const JOBS: [(usize, usize); 2] = [(64, 16), (1, 256)];

struct Round {
    store: Store,
    /// For each of [`JOBS`].
    broker: [Rate; 2],
    worker: [Rate; 2],
    /// Decoding alone, on one core.
    decode_ms: f64,
}

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let store = ceilings::store(world, options.window()).await?;
        let (mut broker, mut worker) = (Vec::new(), Vec::new());
        for (images, prefetch) in JOBS {
            broker.push(ceilings::broker(world, images, options.window()).await?);
            worker.push(null(world, images, prefetch, options).await?);
        }
        let decode_ms = decode_ms(world)?;
        let (broker, worker) = ([broker[0], broker[1]], [worker[0], worker[1]]);
        rounds.push(Round { store, broker, worker, decode_ms });
    }
    Ok(report(&rounds))
}

/// One worker that embeds in no time.
async fn null(world: &World, images: usize, prefetch: usize, options: &Options) -> Result<Rate> {
    let mut workers = Workers::new(world, prefetch, 0);
    workers.grow(1).await?;
    let mut load = Load::new(world).await?;
    let backlog = 2 * workers.held();
    let rate = load.sustained(images, backlog, options.window(), &workers.processes()).await?;
    load.close().await;
    workers.stop().await?;
    Ok(rate)
}

/// Core milliseconds of decoding one of the images.
fn decode_ms(world: &World) -> Result<f64> {
    let spec = builtin_model::load(BUILTIN)?.pixels;
    let limits = PixelLimits { max_pixels: 50_000_000 };
    let mut times = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        std::hint::black_box(preprocess(&world.image, &spec, limits)?);
        times.push(milliseconds(began.elapsed()));
    }
    Ok(median(times))
}

fn report(rounds: &[Round]) -> Value {
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value));
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let (store, core_ms) = (of(&|r| r.store.rate), of(&|r| r.store.core_ms));
    let decode_ms = of(&|r| r.decode_ms);
    // Fetching and decoding share the cores: no worker can be faster here.
    let both = |r: &Round| cores * 1e3 / (r.store.core_ms + r.decode_ms);
    println!("## Overhead: an embedder that takes no time\n");
    println!("| what | images/s | core ms an image |");
    println!("|---|---|---|");
    println!("| the store alone, 32 GETs at once | {store:.0} | {core_ms:.2} (with the client) |");
    println!("| decoding alone, one core | {:.0} | {decode_ms:.2} |", 1e3 / decode_ms);
    println!("| what {cores} cores allow for both | {:.0} | |", of(&both));
    let mut jobs = Vec::new();
    for (n, (images, _)) in JOBS.iter().enumerate() {
        let (broker, worker) = (of(&|r| r.broker[n].images), of(&|r| r.worker[n].images));
        let messages = of(&|r| r.broker[n].jobs);
        let (worker_ms, busy) = (of(&|r| r.worker[n].worker_ms), of(&|r| r.worker[n].busy));
        let to_store = of(&|r| r.worker[n].images / r.store.rate);
        let to_both = of(&|r| r.worker[n].images / both(r));
        println!(
            "| the broker alone, jobs of {images}: {messages:.0} jobs/s and as many results | \
             {broker:.0} | |"
        );
        println!(
            "| **a worker, jobs of {images}**: {to_store:.2} × the store, {to_both:.2} × what the \
             cores allow | **{worker:.0}** | {worker_ms:.2} ({busy:.1} cores busy in all) |"
        );
        jobs.push(json!({
            "images_per_job": images,
            "broker_jobs_per_second": messages,
            "broker_images_per_second": broker,
            "worker_images_per_second": worker,
            "worker_core_ms_per_image": worker_ms,
            "busy_cores": busy,
            "ratio_to_store": to_store,
            "ratio_to_cores": to_both,
        }));
    }
    println!();
    json!({
        "store_gets_per_second": store,
        "store_core_ms_per_get": core_ms,
        "decode_core_ms_per_image": decode_ms,
        "cores_allow_images_per_second": of(&both),
        "jobs": jobs,
    })
}
