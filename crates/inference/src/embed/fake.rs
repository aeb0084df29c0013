//! An embedder without a model: for tests of everything around a model, and for measuring it.
//!
//! It is not a friendly fake: it can be slow, fail on a chosen image, or break for good.

use std::time::Duration;

use ndarray::{Array2, ArrayView4, Axis};

use super::{Backend, EmbedError, Embedder};

/// Embeds an image as the first `dim` values of its pixels, each plus one (so that no embedding is
/// zero).
#[derive(Debug, Clone, Default)]
pub struct FakeEmbedder {
    /// Length of an embedding.
    pub dim: usize,
    /// What a batch takes, whatever its size, as on a GPU.
    pub delay: Duration,
    /// A batch that holds an image whose first value is this fails.
    pub poison: Option<u8>,
    /// An image whose first value is this breaks the back end for good.
    pub breaks_on: Option<u8>,
    /// Panics on an image whose first value is this.
    pub panics_on: Option<u8>,
}

impl FakeEmbedder {
    /// A fake of this dimension that never misbehaves.
    pub fn new(dim: usize) -> Self {
        Self { dim, ..Self::default() }
    }
}

impl Embedder for FakeEmbedder {
    fn backend(&self) -> Backend {
        Backend::Fake
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        if !self.delay.is_zero() {
            #[allow(clippy::disallowed_methods)] // Stands in for a GPU's work on its own thread.
            std::thread::sleep(self.delay);
        }
        let holds = |value: Option<u8>| {
            value.is_some_and(|v| pixels.axis_iter(Axis(0)).any(|image| image[[0, 0, 0]] == v))
        };
        if holds(self.breaks_on) {
            return Err(EmbedError::Broken("the fake back end broke, as it was told to".into()));
        }
        assert!(!holds(self.panics_on), "the fake back end panicked, as it was told to");
        if holds(self.poison) {
            return Err(EmbedError::Batch("the fake back end refuses this image".into()));
        }
        let mut embeddings = Array2::zeros((pixels.len_of(Axis(0)), self.dim));
        for (image, mut row) in pixels.axis_iter(Axis(0)).zip(embeddings.rows_mut()) {
            for (value, out) in image.iter().cycle().zip(row.iter_mut()) {
                *out = f32::from(*value) + 1.0;
            }
        }
        Ok(embeddings)
    }
}
