//! `/status`: what a worker runs, serves, does and waits for, as JSON.

use std::time::{Instant, SystemTime};

use serde_json::{Map, Value, json};
use strum::VariantNames;

use angler_core::readiness::Readiness;
use angler_metrics::{CloseReason, ImageEnd, JobEnd, Minute, Stage};

use super::{Shown, locked};

/// All of it.
pub(super) fn of(shown: &Shown) -> Value {
    let readiness = &shown.readiness;
    let metrics = readiness.metrics();
    let about = readiness.about();
    let missing = readiness.missing();
    let classes = readiness.catalog().map(|catalog| catalog.status()).unwrap_or_default();
    let now = metrics.snapshot();
    let minute = locked(&shown.window).until(Instant::now(), &now);
    let sessions = readiness.pipeline().map(|pipeline| pipeline.engine().sessions());
    let batches: u64 = now.batches.iter().sum();
    let (images, jobs) = metrics.in_flight();
    let uptime = SystemTime::now().duration_since(metrics.started()).unwrap_or_default();
    json!({
        "ready": missing.is_none(),
        "missing": missing,
        "version": env!("CARGO_PKG_VERSION"),
        "worker": about.map(|about| &about.worker),
        "queue": about.map(|about| &about.queue),
        "brokers": readiness.brokers(),
        "model": about.map(|about| &about.model),
        "backend": backend(readiness),
        "started_at": humantime::format_rfc3339_millis(metrics.started()).to_string(),
        "uptime_seconds": rounded(uptime.as_secs_f64()),
        "classes": classes,
        "in_flight": { "jobs": jobs, "images": images },
        "last_minute": last_minute(&minute, sessions),
        "total": {
            "jobs": named::<JobEnd>(now.jobs),
            "images": named::<ImageEnd>(now.images),
            "batches": named::<CloseReason>(now.batches),
            "mean_batch": (batches > 0).then(|| rounded(now.batch_images / batches as f64)),
        },
        "errors": metrics.recent(),
    })
}

/// What executes; null until the model is loaded.
fn backend(readiness: &Readiness) -> Value {
    let (Some(pipeline), Some(about)) = (readiness.pipeline(), readiness.about()) else {
        return Value::Null;
    };
    let engine = pipeline.engine();
    json!({
        "name": engine.backend().as_str(),
        "devices": engine.devices(),
        "sessions": engine.sessions(),
        "scoring": if engine.class_memories().is_empty() { "host" } else { "graph" },
        "max_batch": about.max_batch,
        "batch_limit": readiness.metrics().batch_limit(),
    })
}

fn last_minute(minute: &Minute, sessions: Option<usize>) -> Value {
    let images: u64 = minute.images.iter().sum();
    let shares = minute.shares().map(named::<Stage>);
    let room = minute.seconds * sessions.unwrap_or(0) as f64;
    json!({
        "seconds": rounded(minute.seconds),
        "images_per_second": rounded(minute.rate(images)),
        "failed_images_per_second": rounded(minute.rate(minute.images[ImageEnd::Failed as usize])),
        "jobs_per_second": rounded(minute.rate(minute.jobs)),
        "bytes_per_second": minute.rate(minute.fetched_bytes).round(),
        "job_seconds": minute.latency.map(|l| json!({ "p50": fine(l.p50), "p99": fine(l.p99) })),
        "mean_batch": minute.mean_batch.map(rounded),
        "batches": named::<CloseReason>(minute.batches),
        "steps": shares,
        "waits_for": minute.waits_for(),
        "sessions_busy": (room > 0.0).then(|| fine((minute.busy_seconds / room).min(1.0))),
    })
}

/// A value per variant of `E`, under its name.
fn named<E: VariantNames>(values: impl IntoIterator<Item: Into<Value>>) -> Value {
    let names = E::VARIANTS.iter().map(|name| (*name).to_owned());
    let pairs = names.zip(values.into_iter().map(Into::into));
    Value::Object(pairs.collect::<Map<_, _>>())
}

/// For people: hundredths.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Fractions of a millisecond are of no use.
fn fine(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}
