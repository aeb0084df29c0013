//! Scoring in the graph: what one run of ONNX Runtime makes of pixels and class vectors is what
//! embedding and scoring on the host make of them, for every kind of model and of class set; and
//! through the engine each image is scored with its own version.

mod engine;
mod limits;
mod models;
mod parity;

use std::path::PathBuf;
use std::sync::Arc;

use crate::support::{repository, var};
use ndarray::{Array2, Array4, ArrayView4};

use angler_inference::embed;
use angler_inference::embed::onnxruntime::CudaOptions;
use angler_inference::embed::{Against, BackendChoice, Embedder, Scores, Scoring};
use angler_inference::model::Model;
use angler_vectors::rows::{Precision, Vectors};
use angler_vectors::score::ClassScore;
use angler_vectors::unit::normalise;
use angler_vectors::{ClassVectors, Contents};

/// Memory for class vectors that no set here fills.
const PLENTY: usize = 1 << 30;

fn load(name: &str) -> Model {
    let folder = match name {
        large if large.starts_with("efficientnet-lite0") => format!("models/{large}"),
        tiny => format!("tests/data/models/{tiny}"),
    };
    Model::load(repository(&folder).to_str().unwrap()).unwrap()
}

fn open(model: &Model, scoring: Scoring, graph_bytes: usize) -> Box<dyn Embedder> {
    let mut opened = opened(model, BackendChoice::Onnxruntime, scoring, graph_bytes);
    opened.embedders.pop().unwrap()
}

fn opened(
    model: &Model,
    choice: BackendChoice,
    scoring: Scoring,
    graph_bytes: usize,
) -> embed::Opened {
    embed::open(model, &options(choice, scoring, graph_bytes)).unwrap()
}

fn options(choice: BackendChoice, scoring: Scoring, graph_bytes: usize) -> embed::Options {
    embed::Options {
        choice,
        devices: vec![0],
        threads: 1,
        sessions: 1,
        max_batch: 32,
        allow_fallback: false,
        scoring,
        graph_bytes,
        cuda: CudaOptions::default(),
        onnxruntime_library: Some(PathBuf::from(var("ANGLER_TEST_ONNXRUNTIME"))),
    }
}

/// Images of noise, each around a grey of its own so that their embeddings differ.
fn noise(model: &Model, images: usize, seed: u64) -> Array4<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let shape = (images, model.pixels.height as usize, model.pixels.width as usize, 3);
    let mut pixels = Array4::zeros(shape);
    for mut image in pixels.outer_iter_mut() {
        let (low, high) = (random.u8(0..100), random.u8(120..=255));
        let tint = [random.u8(0..120), random.u8(0..120), random.u8(0..120)];
        for ((_, _, channel), value) in image.indexed_iter_mut() {
            *value = random.u8(low..high).saturating_sub(tint[channel]);
        }
    }
    pixels
}

/// A set of these labels, a row each, in either precision.
fn set(labels: &[String], rows: &Array2<f32>, precision: Precision) -> Arc<ClassVectors> {
    let vectors = Vectors::from(rows.clone()).to_precision(precision);
    let contents = Contents::new(labels.to_vec(), vectors, "m@0");
    Arc::new(ClassVectors::new(("set", "1"), contents).unwrap())
}

/// Vectors near the embeddings of images, so that scores are as high and as close together as in
/// use, and some far from all.
fn near(embeddings: &Array2<f32>, rows: usize, seed: u64) -> Array2<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let scale = embeddings.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    Array2::from_shape_fn((rows, embeddings.ncols()), |(row, column)| {
        let image = embeddings[[row % embeddings.nrows(), column]];
        image * (1.0 - 0.05 * (row % 13) as f32) + scale * (random.f32() - 0.5)
    })
}

fn labels(rows: usize, class: impl Fn(usize) -> usize) -> Vec<String> {
    (0..rows).map(|row| format!("class-{}", class(row))).collect()
}

/// What the host makes of pixels: embeddings as the model gives them, and each image's best
/// classes; none where an embedding has no direction.
fn on_the_host(
    plain: &mut dyn Embedder,
    pixels: ArrayView4<'_, u8>,
    classes: &ClassVectors,
    top_k: usize,
) -> (Array2<f32>, Vec<Option<Vec<ClassScore>>>) {
    let embeddings = plain.embed(pixels).unwrap();
    let mut units = embeddings.clone();
    let directed: Vec<bool> = units.rows_mut().into_iter().map(normalise).collect();
    let scored = classes.score(units.view(), top_k);
    let top = directed.into_iter().zip(scored).map(|(directed, top)| directed.then_some(top));
    (embeddings, top.collect())
}

fn classify(
    fused: &mut dyn Embedder,
    pixels: ArrayView4<'_, u8>,
    classes: &Arc<ClassVectors>,
    top_k: usize,
) -> Scores {
    let against = Against { classes, top_k, embeddings: false };
    fused.classify(pixels, &against).expect("the back end does not score").unwrap()
}

/// Asserts the same labels in the same order, and scores within `bound`. Only where the host's own
/// scores are apart by a tenth of that may two labels change places; equal ones may not.
fn assert_same(
    what: &str,
    found: &[Option<Vec<ClassScore>>],
    wanted: &[Option<Vec<ClassScore>>],
    bound: f32,
) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (image, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let (Some(found), Some(wanted)) = (found, wanted) else {
            assert_eq!(found.is_some(), wanted.is_some(), "{what}, image {image}");
            continue;
        };
        assert_eq!(found.len(), wanted.len(), "{what}, image {image}");
        for (a, b) in found.iter().zip(wanted) {
            assert!((a.score - b.score).abs() <= bound, "{what}, image {image}: {a:?} {b:?}");
            let by_host = wanted.iter().find(|entry| entry.class == a.class);
            let apart = by_host.map_or(f32::INFINITY, |entry| (entry.score - b.score).abs());
            let swapped = 0.0 < apart && apart < bound / 10.0;
            assert!(a.class == b.class || swapped, "{what}, image {image}: {a:?} {b:?}");
        }
    }
}
