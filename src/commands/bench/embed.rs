//! Embedding alone: each back end that works here, with each size of batch, as many sessions or devices
//! at once as the settings say.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ndarray::{Array4, s};

use angler_inference::embed;
use angler_inference::embed::{Backend, BackendChoice, Embedder, Opened};
use angler_wire::text::chain;

use super::figures::{Sample, Samples};
use super::meter::Meter;
use crate::commands::bench::fixture::{Stage, blocking};

/// A back end and the images in a batch.
pub(super) type Key = (Backend, usize);

/// Back ends that were passed over, and why.
pub(super) type Skipped = Vec<(String, String)>;

pub(super) async fn measure(
    stage: &Stage,
    samples: &mut Samples<Key>,
    skipped: &mut Skipped,
) -> Result<()> {
    for choice in choices(stage.app.settings.embedder.backend) {
        let mut options = stage.app.settings.embed_options();
        let named = options.choice == *choice;
        options.choice = *choice;
        options.max_batch = stage.plan.batches.iter().copied().max().unwrap_or(1);
        let (model, pixels) = (Arc::clone(&stage.model), Arc::clone(&stage.pixels));
        let (time, batches) = (stage.plan.time, stage.plan.batches.clone());
        let measured = blocking(move || {
            let opened = match embed::open(&model, &options) {
                Ok(opened) => opened,
                // What a person named must work; of all others it is only said.
                Err(error) if named => return Err(error.into()),
                Err(error) => return Ok(Err(why(&error))),
            };
            in_batches(opened, &pixels, &batches, time).map(Ok)
        });
        match measured.await? {
            Ok((backend, measured)) => {
                for (batch, sample) in measured {
                    samples.add((backend, batch), sample);
                }
            }
            Err(reason) => skip(skipped, choice.as_str().to_owned(), reason),
        }
    }
    if stage.app.settings.embedder.backend == BackendChoice::Auto {
        let reason = "it builds its engine for minutes; --backend tensorrt measures it".to_owned();
        skip(skipped, BackendChoice::Tensorrt.as_str().to_owned(), reason);
    }
    Ok(())
}

/// The one that the settings name, else those that `auto` tries, in its order: the first that works is
/// the one that the pipeline runs on.
fn choices(asked: BackendChoice) -> &'static [BackendChoice] {
    use BackendChoice::{Auto, Cuda, Onnxruntime, Tensorrt, Tract};
    match asked {
        Auto => &[Cuda, Onnxruntime, Tract],
        Cuda => &[Cuda],
        Tensorrt => &[Tensorrt],
        Onnxruntime => &[Onnxruntime],
        Tract => &[Tract],
    }
}

/// The reason alone; the advice around it is for who named the back end.
fn why(error: &embed::OpenError) -> String {
    match error {
        embed::OpenError::Named { reason, .. } => chain(reason).trim_end_matches('.').to_owned(),
        other => other.to_string(),
    }
}

fn skip(skipped: &mut Skipped, name: String, reason: String) {
    if !skipped.iter().any(|(known, _)| *known == name) {
        skipped.push((name, reason));
    }
}

type Measured = (Backend, Vec<(usize, Sample)>);

fn in_batches(
    opened: Opened,
    pixels: &Array4<u8>,
    batches: &[usize],
    time: Duration,
) -> Result<Measured> {
    let Opened { mut embedders, backend, .. } = opened;
    let mut measured = Vec::new();
    for batch in batches {
        // Memory is found and kernels are chosen before the clock runs.
        embed_for(&mut embedders, pixels, *batch, Duration::ZERO)?;
        measured.push((*batch, embed_for(&mut embedders, pixels, *batch, time)?));
    }
    Ok((backend, measured))
}

/// Every embedder on a thread of its own.
fn embed_for(
    embedders: &mut [Box<dyn Embedder>],
    pixels: &Array4<u8>,
    batch: usize,
    time: Duration,
) -> Result<Sample> {
    let view = pixels.slice(s![..batch, .., .., ..]);
    let meter = Meter::start();
    let images: Result<u64> = std::thread::scope(|scope| {
        let meter = &meter;
        let lanes: Vec<_> = embedders
            .iter_mut()
            .map(|embedder| {
                scope.spawn(move || {
                    let mut images = 0;
                    loop {
                        embedder.embed(view)?;
                        images += batch as u64;
                        if meter.elapsed() >= time {
                            return Ok::<u64, embed::EmbedError>(images);
                        }
                    }
                })
            })
            .collect();
        lanes.into_iter().map(|lane| lane.join().map_err(|_| panicked())?.map_err(failed)).sum()
    });
    Ok(meter.stop(images.with_context(|| format!("a batch of {batch}"))?))
}

fn panicked() -> anyhow::Error {
    anyhow::anyhow!("the back end panicked")
}

fn failed(error: embed::EmbedError) -> anyhow::Error {
    anyhow::Error::new(error).context("the back end failed")
}
