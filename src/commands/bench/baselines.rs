//! Three ways to do the same, without angler's pipeline around them, so that only the way differs: one
//! image at a time; in batches, with the cosine on the host; in batches, with the cosine in the model's
//! graph. Nothing overlaps: fetch, decode, embed, score, then the next.
//!
//! Each is measured on pixels that are in memory, and from files.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use ndarray::{Array4, ArrayView4, Axis, s};

use angler_inference::embed;
use angler_inference::embed::{Against, EmbedError, Embedder, Scoring};
use angler_inference::model::Model;
use angler_pixels::{PixelLimits, PixelSpec, preprocess};
use angler_vectors::ClassVectors;
use angler_vectors::score::Scorer;
use angler_vectors::unit::normalise;

use super::figures::{Sample, Samples};
use super::meter::Meter;
use super::score::TOP_K;
use crate::commands::bench::fixture::{Stage, blocking};

/// How images become labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Way {
    OneByOne,
    Batched,
    Fused,
}

/// Which way, and from what: `pixels`, or files of a kind.
pub(super) type Key = (Way, String);

/// What begins with decoded pixels.
pub(super) const PIXELS: &str = "pixels";

/// Pixels as they come: from memory, or from files.
enum Input {
    Pixels(Arc<Array4<u8>>),
    Files(Arc<[String]>),
}

pub(super) async fn measure(stage: &Stage, samples: &mut Samples<Key>) -> Result<()> {
    let mut options = stage.app.settings.embed_options();
    options.scoring = Scoring::Host;
    // One session with all cores, on one device: nothing overlaps.
    options.sessions = 1;
    options.devices.truncate(1);
    let mut inputs = vec![(PIXELS.to_owned(), Input::Pixels(Arc::clone(&stage.pixels)))];
    inputs.extend(
        stage
            .sets
            .iter()
            .map(|set| (set.photos.kind.clone(), Input::Files(Arc::clone(&set.local)))),
    );
    let model = Arc::clone(&stage.model);
    let (classes, scorer) = (Arc::clone(&stage.classes), stage.app.settings.scorer());
    let batch = stage.app.settings.embedder.max_batch;
    let (limits, time) = (stage.limits(), stage.plan.time);
    let measured = blocking(move || {
        let mut ways = vec![Way::OneByOne, Way::Batched];
        let embedder = open(&model, &options)?;
        options.scoring = Scoring::Graph;
        let mut fusing = open(&model, &options)?;
        let (height, width) = (model.pixels.height as usize, model.pixels.width as usize);
        let black = Array4::zeros((1, height, width, 3));
        if let Some(scored) = fused(fusing.as_mut(), black.view(), &classes) {
            scored.context("the back end fails to score in its graph")?;
            ways.push(Way::Fused);
        }
        let spec = model.pixels.clone();
        let mut walk = Walk { embedder, fusing, classes, scorer, spec, limits, batch };
        let mut measured = Vec::new();
        for (from, input) in inputs {
            for way in ways.iter().copied() {
                walk.block(way, &input, 0)?;
                let meter = Meter::start();
                let mut images = 0;
                while images == 0 || meter.elapsed() < time {
                    walk.block(way, &input, images)?;
                    images += batch;
                }
                measured.push(((way, from.clone()), meter.stop(images as u64)));
            }
        }
        Ok::<Vec<(Key, Sample)>, anyhow::Error>(measured)
    });
    for (key, sample) in measured.await? {
        samples.add(key, sample);
    }
    Ok(())
}

fn open(model: &Model, options: &embed::Options) -> Result<Box<dyn Embedder>> {
    let first = embed::open(model, options)?.embedders.into_iter().next();
    first.ok_or_else(|| anyhow!("there is no embedder"))
}

/// Embeds and scores in one graph; none if the back end cannot, or not with these classes.
fn fused(
    embedder: &mut dyn Embedder,
    pixels: ArrayView4<'_, u8>,
    classes: &Arc<ClassVectors>,
) -> Option<Result<(), EmbedError>> {
    let against = Against { classes, top_k: TOP_K, embeddings: false };
    embedder.classify(pixels, &against).map(|scores| scores.map(|_| ()))
}

struct Walk {
    embedder: Box<dyn Embedder>,
    fusing: Box<dyn Embedder>,
    classes: Arc<ClassVectors>,
    scorer: Scorer,
    spec: PixelSpec,
    limits: PixelLimits,
    batch: usize,
}

impl Walk {
    /// One full batch of images, from image `first` on, in this way.
    fn block(&mut self, way: Way, input: &Input, first: usize) -> Result<()> {
        let (calls, size) = match way {
            Way::OneByOne => (self.batch, 1),
            Way::Batched | Way::Fused => (1, self.batch),
        };
        for call in 0..calls {
            match input {
                Input::Pixels(pixels) => {
                    let pixels = Arc::clone(pixels);
                    let from = call * size;
                    self.run(way, pixels.slice(s![from..from + size, .., .., ..]))?;
                }
                Input::Files(files) => {
                    let pixels = self.read(files, first + call * size, size)?;
                    self.run(way, pixels.view())?;
                }
            }
        }
        Ok(())
    }

    /// Fetches and decodes, one after another.
    fn read(&self, files: &[String], first: usize, count: usize) -> Result<Array4<u8>> {
        let (height, width) = (self.spec.height as usize, self.spec.width as usize);
        let mut all = Array4::zeros((count, height, width, 3));
        for (number, mut image) in (first..).zip(all.axis_iter_mut(Axis(0))) {
            let path = &files[number % files.len()];
            let bytes = std::fs::read(path)?;
            let pixels =
                preprocess(&bytes, &self.spec, self.limits).map_err(|e| anyhow!("{path}: {e}"))?;
            if let Some(values) = image.as_slice_mut() {
                values.copy_from_slice(&pixels.data);
            }
        }
        Ok(all)
    }

    fn run(&mut self, way: Way, pixels: ArrayView4<'_, u8>) -> Result<()> {
        let failed = |e: EmbedError| anyhow::Error::new(e).context("the back end failed");
        if way == Way::Fused {
            let fused = fused(self.fusing.as_mut(), pixels, &self.classes);
            return fused.ok_or_else(|| anyhow!("the back end scores no more"))?.map_err(failed);
        }
        let mut embeddings = self.embedder.embed(pixels).map_err(failed)?;
        embeddings.rows_mut().into_iter().for_each(|row| {
            normalise(row);
        });
        self.classes.score_with(&self.scorer, embeddings.view(), TOP_K);
        Ok(())
    }
}
