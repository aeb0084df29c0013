//! Decoding alone: what the pipeline does with an image's bytes, on as many threads, and which share
//! of it is decoding and which is resizing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, anyhow};

use angler_pixels::decode_for;
use angler_wire::error::ImageError;

use super::figures::Samples;
use super::photos::Photos;
use crate::commands::bench::fixture::{Stage, blocking, on_threads};

/// The kind of images.
pub(super) type Key = String;

/// `all`: also the formats that never go through the pipeline here.
pub(super) async fn measure(stage: &Stage, samples: &mut Samples<Key>, all: bool) -> Result<()> {
    let piped = stage.sets.iter().map(|set| &set.photos);
    let others = stage.only_decoded.iter().filter(|_| all);
    for photos in piped.chain(others) {
        let sample = decode(stage, Arc::clone(photos)).await?;
        samples.add(photos.kind.clone(), sample);
    }
    Ok(())
}

async fn decode(stage: &Stage, photos: Arc<Photos>) -> Result<super::figures::Sample> {
    let (spec, limits) = (stage.model.pixels.clone(), stage.limits());
    let (decoders, time) = (stage.app.settings.image_limits().decoders, stage.plan.time);
    blocking(move || {
        let [decoding, resizing] = [AtomicU64::new(0), AtomicU64::new(0)];
        let add = |to: &AtomicU64, from: Instant| {
            let nanos = u64::try_from(from.elapsed().as_nanos()).unwrap_or(u64::MAX);
            to.fetch_add(nanos, Ordering::Relaxed);
        };
        let size = spec.width as usize * spec.height as usize * 3;
        let mut sample = on_threads(decoders, time, |number| {
            let file = &photos.files[number % photos.files.len()];
            let mut pixels = vec![0; size];
            let started = Instant::now();
            let decoded = decode_for(file, &spec, limits).map_err(|e| unusable(&photos, &e))?;
            add(&decoding, started);
            let started = Instant::now();
            decoded.resize_into(&spec, &mut pixels).map_err(|e| unusable(&photos, &e))?;
            add(&resizing, started);
            Ok(1)
        })?;
        let [decoding, resizing] = [decoding, resizing].map(|nanos| nanos.into_inner() as f64);
        sample.decode_share = Some(decoding / (decoding + resizing).max(1.0));
        Ok(sample)
    })
    .await
}

fn unusable(photos: &Photos, error: &ImageError) -> anyhow::Error {
    anyhow!("one of the {} images: {error}; leave it out", photos.kind)
}
