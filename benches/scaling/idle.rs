//! A one-image job on an idle worker with its real model, beside the parts that it consists of.
//!
//! In each round first the parts, each alone and in order, by the same code, settings and back end
//! as the worker's, while no worker runs; then the worker. What a job takes more than its parts are
//! the linger, which is waited for company that never comes, its own way through the broker, and
//! what is lost between the parts.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use ndarray::ArrayView4;
use serde_json::{Value, json};

use angler::app::App;
use angler_core::store::{ByteBudget, ImageStore};
use angler_inference::embed;
use angler_inference::model::Model;
use angler_pixels::{PixelLimits, preprocess};
use angler_vectors::ClassVectors;
use angler_vectors::unit::normalise;

use crate::Options;
use crate::load::Load;
use crate::statistics::{median, milliseconds, percentile, sorted};
use crate::world::{CLASSES, World};

/// The parts, in a job's order. The first is not the worker's: it is the job's way to it.
const PARTS: [&str; 6] = ["enqueue", "fetch", "decode", "embed", "score", "publish"];

/// Milliseconds of each part, one entry a time.
type Times = [Vec<f64>; PARTS.len()];

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    let app = world.app(&[])?;
    let model = app.model()?;
    let selector = angler_wire::job::ClassSelector::parse(CLASSES)?;
    let classes = app.catalog(&model).await?.resolve(&selector).await;
    let classes = classes.map_err(|e| anyhow::anyhow!("{CLASSES}: {e}"))?;
    let mut times: Times = Default::default();
    let (mut jobs, mut backend) = (Vec::new(), String::new());
    let mut load = Load::new(world).await?;
    for _ in 0..options.rounds {
        backend = parts(world, &app, &model, &classes, &mut load, options, &mut times).await?;
        let mut worker = world.setup.start().await;
        // The first jobs meet connections that are not open yet.
        load.one_by_one(5).await?;
        jobs.extend(load.one_by_one(options.idle_jobs).await?);
        worker.signal("TERM");
        worker.ended().await;
    }
    load.close().await;
    let linger_ms = app.settings.embedder.linger_ms;
    Ok(report(&backend, linger_ms, &times, jobs))
}

/// Measures every part as often as there are jobs; yields what embeds.
async fn parts(
    world: &World,
    app: &App,
    model: &Model,
    classes: &Arc<ClassVectors>,
    load: &mut Load<'_>,
    options: &Options,
    times: &mut Times,
) -> Result<String> {
    let (store, limits) = (app.s3_images().await?, app.settings.image_limits());
    let budget = ByteBudget::new(limits.bytes_in_flight, limits.image_bytes);
    let pixel_limits = PixelLimits { max_pixels: limits.image_pixels };
    let opened = embed::open(model, &app.settings.embed_options())?;
    let mut embedder = opened.embedders.into_iter().next().context("there is no embedder")?;
    let scorer = app.settings.scorer();
    let (job, result) = (world.job(0, 1), world.result(1)?);
    let shape = (1, model.pixels.height as usize, model.pixels.width as usize, 3);
    for n in 0..options.idle_jobs + 1 {
        let enqueued = load.passage(&job).await?;
        let began = Instant::now();
        let fetched = store.fetch(&world.uris[n % world.uris.len()], &budget).await?;
        let at_fetched = Instant::now();
        let pixels = preprocess(&fetched.bytes, &model.pixels, pixel_limits)?;
        let at_decoded = Instant::now();
        let view = ArrayView4::from_shape(shape, &pixels.data)?;
        let mut embeddings = embedder.embed(view)?;
        let at_embedded = Instant::now();
        for row in embeddings.rows_mut() {
            normalise(row);
        }
        std::hint::black_box(classes.score_with(&scorer, embeddings.view(), 2));
        let at_scored = Instant::now();
        let published = load.passage(&result).await?;
        // The first time is the one that opens connections and warms the model.
        if n > 0 {
            let parts = [
                enqueued,
                milliseconds(at_fetched - began),
                milliseconds(at_decoded - at_fetched),
                milliseconds(at_embedded - at_decoded),
                milliseconds(at_scored - at_embedded),
                published,
            ];
            times.iter_mut().zip(parts).for_each(|(times, part)| times.push(part));
        }
    }
    Ok(opened.backend.to_string())
}

fn report(backend: &str, linger_ms: u64, times: &Times, jobs: Vec<f64>) -> Value {
    println!("## A one-image job on an idle worker, {backend}\n");
    println!("| | p50 | p99 | most |");
    println!("|---|---|---|---|");
    let line = |name: &str, values: &[f64]| {
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|p| percentile(values, p));
        println!("| {name} | {p50:.2} ms | {p99:.2} ms | {most:.2} ms |");
        json!({ "part": name, "p50_ms": p50, "p99_ms": p99, "max_ms": most })
    };
    let parts: Vec<Value> = PARTS
        .iter()
        .zip(times)
        .map(|(name, times)| line(name, &sorted(times.iter().copied())))
        .collect();
    let jobs = sorted(jobs);
    let job = line("the job, from enqueue to result", &jobs);
    // The job's own way to the worker is not a part of the worker's.
    let sum: f64 = times[1..].iter().map(|times| median(times.iter().copied())).sum();
    let limit = linger_ms as f64 + 2.0 * sum;
    let p99 = percentile(&jobs, 0.99);
    println!(
        "\n{} jobs: p99 {p99:.1} ms; the linger of {linger_ms} ms and twice the parts without the \
         enqueueing ({sum:.1} ms) are {limit:.1} ms: {}\n",
        jobs.len(),
        if p99 <= limit { "within" } else { "over" }
    );
    json!({
        "backend": backend,
        "parts": parts,
        "job": job,
        "jobs": jobs.len(),
        "linger_ms": linger_ms,
        "parts_p50_sum_ms": sum,
        "limit_ms": limit,
        "within": p99 <= limit,
    })
}
