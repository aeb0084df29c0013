//! Reference images, one folder a class, embedded: what class vectors are built from.
//!
//! The images go the way of every image ([`crate::pipeline`]); what becomes of their embeddings is
//! in [`angler_vectors::reference_embeddings`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ndarray::Array2;
use tokio_util::task::AbortOnDropHandle;

use angler_inference::engine::{Scored, SubmitError, Want};
pub use angler_vectors::reference_embeddings::Reference;
use angler_vectors::reference_embeddings::{Class, Embedded, NoDirection};
use angler_vectors::rows::{Precision, Vectors};
use angler_wire::error::{FatalError, ImageError, Reason};

use crate::pipeline::Pipeline;

/// Class vectors made of means.
#[derive(Debug)]
pub struct Built {
    /// One row a class, in the order of the labels.
    pub labels: Vec<String>,
    /// [classes, dim], unit rows.
    pub vectors: Array2<f32>,
    /// Images that could not be used.
    pub failed: Failed,
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
    #[error(transparent)]
    NoDirection(#[from] NoDirection),
    /// The engine is gone.
    #[error(transparent)]
    Fatal(#[from] FatalError),
}

/// Whether each image's embedding stays in memory, or only the sums of the classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Sums alone: memory depends on the number of classes.
    Sums,
    /// Embeddings as well, as f16: images × dimension × 2 bytes.
    Embeddings,
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
    progress: impl FnMut(),
) -> Result<Built, BuildError> {
    let (embedded, failed) = embed(pipeline, references, Keep::Sums, progress).await?;
    let vectors = embedded.means()?;
    let labels = embedded.classes.into_iter().map(|class| class.label).collect();
    Ok(Built { labels, vectors, failed })
}

/// Images that could not be used, and why, sorted.
pub type Failed = Vec<(Reference, ImageError)>;

/// Embeds every reference image; `progress` is called once an image. Also yields the images that
/// could not be used.
///
/// # Errors
/// [`BuildError`]; a single image that fails is none, unless its class has no other.
pub async fn embed(
    pipeline: &Arc<Pipeline>,
    references: Vec<Reference>,
    keep: Keep,
    mut progress: impl FnMut(),
) -> Result<(Embedded, Failed), BuildError> {
    let mut gathered = Gathered::new(keep, references.len());
    let mut running: VecDeque<(Reference, Embedding)> = VecDeque::new();
    for reference in references {
        while running.len() >= WINDOW
            || running.front().is_some_and(|(_, embedding)| embedding.is_finished())
        {
            gathered.take(running.pop_front()).await?;
            progress();
        }
        // A slot before the task: however many references there are, few are in memory.
        let slot = pipeline.slot().await;
        let (pipeline, uri) = (Arc::clone(pipeline), reference.uri.clone());
        let want = Want { top_k: 1, embedding: true, ..Want::default() };
        let embedding = tokio::spawn(async move { pipeline.image(&uri, want, slot).await });
        running.push_back((reference, AbortOnDropHandle::new(embedding)));
    }
    while !running.is_empty() {
        gathered.take(running.pop_front()).await?;
        progress();
    }
    gathered.finish()
}

/// What came so far.
struct Gathered {
    keep: Keep,
    /// How many images there are at most: the room that is taken at the first embedding, when its
    /// length is known.
    expected: usize,
    classes: BTreeMap<String, Class>,
    vectors: Option<Vectors>,
    images: Vec<String>,
    failed: Failed,
}

impl Gathered {
    fn new(keep: Keep, expected: usize) -> Self {
        Self {
            keep,
            expected,
            classes: BTreeMap::new(),
            vectors: None,
            images: Vec::new(),
            failed: Vec::new(),
        }
    }

    async fn take(&mut self, next: Option<(Reference, Embedding)>) -> Result<(), BuildError> {
        let Some((reference, embedding)) = next else { return Ok(()) };
        let fatal = |reason| BuildError::Fatal(FatalError::Engine(reason));
        match embedding.await.map_err(|e| fatal(Reason::of(e)))? {
            Ok(scored) => self.add(reference, &scored.embedding.unwrap_or_default()),
            Err(SubmitError::Image(error)) => self.fail(reference, error),
            Err(SubmitError::Gone) => return Err(fatal("it stopped".into())),
        }
        Ok(())
    }

    fn class(&mut self, label: &str) -> &mut Class {
        self.classes.entry(label.to_owned()).or_default()
    }

    fn add(&mut self, reference: Reference, embedding: &[f32]) {
        let row = self.images.len();
        let keep = self.keep == Keep::Embeddings;
        let class = self.class(&reference.label);
        class.add(embedding);
        if keep {
            class.rows.push(row);
            let dim = embedding.len();
            let room = || Vectors::with_capacity(Precision::F16, self.expected, dim);
            self.vectors.get_or_insert_with(room).push(embedding);
            self.images.push(reference.uri);
        }
    }

    fn fail(&mut self, reference: Reference, error: ImageError) {
        self.class(&reference.label);
        self.failed.push((reference, error));
    }

    fn finish(self) -> Result<(Embedded, Failed), BuildError> {
        let mut failed = self.failed;
        failed.sort_by(|a, b| a.0.cmp(&b.0));
        let mut classes = Vec::with_capacity(self.classes.len());
        for (label, class) in self.classes {
            if class.count == 0 {
                let first = failed.iter().find(|(reference, _)| reference.label == label);
                let first = first.map(|(r, e)| format!("{}: {e}", r.uri)).unwrap_or_default();
                return Err(BuildError::EmptyClass { label, first });
            }
            classes.push(Class { label, ..class });
        }
        let dim = classes.first().ok_or(BuildError::NoImages)?.sum.len();
        let vectors = self.vectors.unwrap_or_else(|| Vectors::zeros(Precision::F16, 0, dim));
        Ok((Embedded { classes, vectors, images: self.images, dim }, failed))
    }
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageErrorCode;

    use super::*;

    fn reference(label: &str, uri: &str) -> Reference {
        Reference { label: label.into(), uri: uri.into() }
    }

    #[test]
    fn a_class_is_the_normalised_mean_in_the_order_of_its_labels() {
        for keep in [Keep::Sums, Keep::Embeddings] {
            let mut gathered = Gathered::new(keep, 3);
            gathered.add(reference("b", "b/1"), &[1.0, 0.0]);
            gathered.add(reference("b", "b/2"), &[0.0, 1.0]);
            gathered.add(reference("a", "a/1"), &[0.0, 1.0]);
            let (embedded, failed) = gathered.finish().unwrap();
            let of = |class: &Class| (class.label.clone(), class.count);
            let classes: Vec<_> = embedded.classes.iter().map(of).collect();
            assert_eq!(classes, [("a".to_owned(), 1), ("b".to_owned(), 2)]);
            let half = std::f32::consts::FRAC_1_SQRT_2;
            assert!((embedded.means().unwrap()[[1, 0]] - half).abs() < 1e-6);
            assert!(failed.is_empty());
            let kept = if keep == Keep::Embeddings { 3 } else { 0 };
            assert_eq!((embedded.vectors.rows(), embedded.images.len()), (kept, kept));
        }
    }

    #[test]
    fn a_class_without_a_usable_image_is_an_error_with_the_reason() {
        let mut gathered = Gathered::new(Keep::Embeddings, 2);
        gathered.add(reference("b", "b/1.jpg"), &[1.0, 0.0]);
        let error = ImageError::new(ImageErrorCode::CorruptImage, "cut");
        gathered.fail(reference("a", "a/1.jpg"), error);
        let message = gathered.finish().unwrap_err().to_string();
        assert!(message.contains("\"a\"") && message.contains("a/1.jpg: cut"), "{message}");
    }
}
