//! Class vectors out of reference images: one folder a class.
//!
//! A class's vector is the mean of its images' normalised embeddings; normalised, it is the
//! direction that has the largest mean cosine with them (the spherical mean).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ndarray::{Array1, Array2};
use tokio_util::task::AbortOnDropHandle;

use super::Contents;
use crate::engine::{Scored, SubmitError, Want};
use crate::error::{FatalError, ImageError};
use crate::pipeline::Pipeline;

/// A reference image and its class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// The class.
    pub label: String,
    /// A path or an `s3://` URI.
    pub uri: String,
}

/// What was built.
#[derive(Debug)]
pub struct Built {
    /// One row a class, in the order of the labels.
    pub labels: Vec<String>,
    /// [classes, dim], unit rows.
    pub vectors: Array2<f32>,
    /// How many images each class was made of.
    pub images: Vec<usize>,
    /// Images that could not be used.
    pub failed: Vec<(Reference, ImageError)>,
}

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// None of a class's images could be used, so it would silently be missing.
    #[error("class {label:?} has no usable image; the first error was: {first}")]
    EmptyClass {
        /// The class.
        label: String,
        /// The first of its images' errors.
        first: String,
    },
    /// There are no reference images at all.
    #[error("there are no reference images")]
    NoImages,
    /// The embeddings of a class cancel each other out.
    #[error("the mean of class {0:?} is zero: its images have nothing in common")]
    NoDirection(String),
    /// The engine is gone.
    #[error(transparent)]
    Fatal(#[from] FatalError),
}

/// Results that may wait for an image before them. Sums of floats depend on their order, so images
/// are added in the order of the references; this bounds what that costs.
const WINDOW: usize = 512;

type Embedding = AbortOnDropHandle<Result<Scored, SubmitError>>;

/// Embeds every reference image and averages by class; `progress` is called once an image.
///
/// # Errors
/// [`BuildError`]. Single images that fail are listed in [`Built::failed`].
pub async fn build(
    pipeline: &Arc<Pipeline>,
    references: Vec<Reference>,
    mut progress: impl FnMut(),
) -> Result<Built, BuildError> {
    let mut means: BTreeMap<String, Mean> = BTreeMap::new();
    let mut failed = Vec::new();
    let mut running: VecDeque<(Reference, Embedding)> = VecDeque::new();
    for reference in references {
        while running.len() >= WINDOW
            || running.front().is_some_and(|(_, embedding)| embedding.is_finished())
        {
            take(running.pop_front(), &mut means, &mut failed).await?;
            progress();
        }
        // A slot before the task: however many references there are, few are in memory.
        let slot = pipeline.slot().await;
        let (pipeline, uri) = (Arc::clone(pipeline), reference.uri.clone());
        let want = Want { classes: None, top_k: 1, embedding: true, shadow: None };
        let embedding = tokio::spawn(async move { pipeline.image(&uri, want, slot).await });
        running.push_back((reference, AbortOnDropHandle::new(embedding)));
    }
    while !running.is_empty() {
        take(running.pop_front(), &mut means, &mut failed).await?;
        progress();
    }
    finish(means, failed)
}

async fn take(
    next: Option<(Reference, Embedding)>,
    means: &mut BTreeMap<String, Mean>,
    failed: &mut Vec<(Reference, ImageError)>,
) -> Result<(), BuildError> {
    let Some((reference, embedding)) = next else { return Ok(()) };
    let fatal = |e: String| BuildError::Fatal(FatalError::Engine(e));
    let mean = means.entry(reference.label.clone()).or_default();
    match embedding.await.map_err(|e| fatal(e.to_string()))? {
        Ok(scored) => mean.add(&scored.embedding.unwrap_or_default()),
        Err(SubmitError::Image(error)) => failed.push((reference, error)),
        Err(SubmitError::Gone) => return Err(fatal("it stopped".to_owned())),
    }
    Ok(())
}

fn finish(
    means: BTreeMap<String, Mean>,
    mut failed: Vec<(Reference, ImageError)>,
) -> Result<Built, BuildError> {
    failed.sort_by(|a, b| a.0.cmp(&b.0));
    if means.is_empty() {
        return Err(BuildError::NoImages);
    }
    let mut labels = Vec::with_capacity(means.len());
    let mut images = Vec::with_capacity(means.len());
    let mut rows = Vec::with_capacity(means.len());
    for (label, mean) in means {
        if mean.count == 0 {
            let first = failed.iter().find(|(reference, _)| reference.label == label);
            let first = first.map(|(r, e)| format!("{}: {e}", r.uri)).unwrap_or_default();
            return Err(BuildError::EmptyClass { label, first });
        }
        images.push(mean.count);
        rows.push(mean.vector().ok_or_else(|| BuildError::NoDirection(label.clone()))?);
        labels.push(label);
    }
    let dim = rows[0].len();
    let mut vectors = Array2::zeros((rows.len(), dim));
    for (mut out, row) in vectors.rows_mut().into_iter().zip(&rows) {
        out.assign(row);
    }
    Ok(Built { labels, vectors, images, failed })
}

impl Built {
    /// What a file of this is written from.
    pub fn contents(&self, model: &str, source: Option<String>) -> Contents {
        let mut contents = Contents::new(self.labels.clone(), self.vectors.clone(), model);
        contents.source = source;
        contents
    }
}

/// The sum of a class's embeddings.
#[derive(Default)]
struct Mean {
    sum: Vec<f64>,
    count: usize,
}

impl Mean {
    fn add(&mut self, embedding: &[f32]) {
        self.sum.resize(embedding.len(), 0.0);
        for (sum, value) in self.sum.iter_mut().zip(embedding) {
            *sum += f64::from(*value);
        }
        self.count += 1;
    }

    /// The mean, normalised; none if it has no direction.
    fn vector(&self) -> Option<Array1<f32>> {
        let mut mean: Array1<f32> =
            self.sum.iter().map(|sum| (sum / self.count as f64) as f32).collect();
        crate::score::normalise(mean.view_mut()).then_some(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ImageErrorCode;

    fn reference(label: &str, uri: &str) -> Reference {
        Reference { label: label.into(), uri: uri.into() }
    }

    #[test]
    fn a_class_is_the_normalised_mean_in_the_order_of_its_labels() {
        let mut means: BTreeMap<String, Mean> = BTreeMap::new();
        means.entry("b".into()).or_default().add(&[1.0, 0.0]);
        means.entry("b".into()).or_default().add(&[0.0, 1.0]);
        means.entry("a".into()).or_default().add(&[0.0, 1.0]);
        let built = finish(means, vec![]).unwrap();
        assert_eq!(built.labels, ["a", "b"]);
        assert_eq!(built.images, [1, 2]);
        let half = std::f32::consts::FRAC_1_SQRT_2;
        assert!((built.vectors[[1, 0]] - half).abs() < 1e-6);
    }

    #[test]
    fn a_class_without_a_usable_image_is_an_error_with_the_reason() {
        let mut means: BTreeMap<String, Mean> = BTreeMap::new();
        means.entry("a".into()).or_default();
        let failed =
            vec![(reference("a", "a/1.jpg"), ImageError::new(ImageErrorCode::CorruptImage, "cut"))];
        let message = finish(means, failed).unwrap_err().to_string();
        assert!(message.contains("\"a\"") && message.contains("a/1.jpg: cut"), "{message}");
    }
}
