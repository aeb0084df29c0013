//! How a batch is cut into the calls that a back end likes best. Each size of a call costs memory
//! that is never given back, and on a GPU a search for the fastest kernels: so there are few sizes,
//! and all are met when the model is warmed.

use ndarray::{Array2, Array4, ArrayView4, Axis, s};

use super::EmbedError;

/// The sizes of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pieces {
    /// Exactly so many images, because the graph says so; missing ones are black.
    Fixed(usize),
    /// At most so many; a rest is made of powers of two. For a CPU, where a call that stays in the
    /// core's cache is faster than a larger one, and black images cost as much as others.
    UpTo(usize),
    /// Filled up with black images to a power of two, and at most so many. For a GPU, where a
    /// second call costs more than black images.
    Padded(usize),
}

impl Pieces {
    /// Every size of call that there may be, smallest first.
    pub fn sizes(self) -> Vec<usize> {
        match self {
            Self::Fixed(size) => vec![size.max(1)],
            Self::UpTo(most) | Self::Padded(most) => {
                let most = most.max(1);
                let powers = std::iter::successors(Some(1), |size| Some(size * 2));
                powers.take_while(|size| *size < most).chain([most]).collect()
            }
        }
    }

    /// The next call for `left` images: how many of them, and how large the call is.
    fn next(self, left: usize) -> (usize, usize) {
        match self {
            Self::Fixed(size) => (left.min(size.max(1)), size.max(1)),
            Self::UpTo(most) if left >= most.max(1) => (most.max(1), most.max(1)),
            Self::UpTo(_) => {
                let power = 1 << left.ilog2();
                (power, power)
            }
            Self::Padded(most) => {
                let images = left.min(most.max(1));
                (images, images.next_power_of_two().min(most.max(1)))
            }
        }
    }

    /// Runs `run` over a batch piece by piece; the embeddings of black images are dropped.
    ///
    /// * `pixels`: u8 RGB, [N, H, W, 3].
    /// * returns f32 [N, dim].
    ///
    /// # Errors
    /// The first that `run` yields.
    pub fn embed(
        self,
        pixels: ArrayView4<'_, u8>,
        dim: usize,
        mut run: impl FnMut(ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError>,
    ) -> Result<Array2<f32>, EmbedError> {
        let (images, height, width, channels) = pixels.dim();
        if images > 0 && self.next(images) == (images, images) {
            return run(pixels);
        }
        let mut embeddings = Array2::zeros((images, dim));
        let mut done = 0;
        while done < images {
            let (count, size) = self.next(images - done);
            let piece = pixels.slice(s![done..done + count, .., .., ..]);
            let rows = if count == size {
                run(piece)?
            } else {
                let mut padded = Array4::zeros((size, height, width, channels));
                padded.slice_mut(s![..count, .., .., ..]).assign(&piece);
                run(padded.view())?
            };
            embeddings
                .slice_mut(s![done..done + count, ..])
                .assign(&rows.slice_axis(Axis(0), (..count).into()));
            done += count;
        }
        Ok(embeddings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the calls for so many images; each image's embedding is its first value.
    fn calls(pieces: Pieces, images: usize) -> Vec<usize> {
        let pixels = Array4::from_shape_fn((images, 1, 1, 3), |(image, ..)| image as u8 + 1);
        let mut calls = Vec::new();
        let embeddings = pieces.embed(pixels.view(), 1, |piece| {
            calls.push(piece.dim().0);
            Ok(piece.mapv(f32::from).slice(s![.., 0, 0, ..1]).to_owned())
        });
        let wanted: Vec<f32> = (1..=images).map(|value| value as f32).collect();
        assert_eq!(embeddings.unwrap().into_raw_vec_and_offset().0, wanted, "{pieces:?} {images}");
        assert!(calls.iter().all(|size| pieces.sizes().contains(size)), "{pieces:?} {calls:?}");
        calls
    }

    #[test]
    fn few_sizes_of_calls_embed_every_image_once_and_in_order() {
        assert_eq!(calls(Pieces::Fixed(4), 9), [4, 4, 4]);
        assert_eq!(calls(Pieces::Fixed(1), 3), [1, 1, 1]);
        assert_eq!(calls(Pieces::UpTo(4), 32), [4; 8]);
        assert_eq!(calls(Pieces::UpTo(4), 7), [4, 2, 1]);
        assert_eq!(calls(Pieces::UpTo(6), 17), [6, 6, 4, 1]);
        assert_eq!(calls(Pieces::Padded(32), 17), [32]);
        assert_eq!(calls(Pieces::Padded(32), 3), [4]);
        assert_eq!(calls(Pieces::Padded(24), 24), [24]);
        assert_eq!(calls(Pieces::Padded(24), 20), [24]);
        for pieces in [Pieces::Fixed(3), Pieces::UpTo(5), Pieces::Padded(12)] {
            for images in 1..40 {
                calls(pieces, images);
            }
        }
        assert_eq!(Pieces::UpTo(4).sizes(), [1, 2, 4]);
        assert_eq!(Pieces::Padded(48).sizes(), [1, 2, 4, 8, 16, 32, 48]);
        assert_eq!(Pieces::UpTo(1).sizes(), [1]);
    }

    #[test]
    fn a_call_that_fails_ends_it() {
        let pixels = Array4::zeros((5, 1, 1, 3));
        let failed = Pieces::UpTo(2)
            .embed(pixels.view(), 1, |_| Err(EmbedError::Batch("as told".to_owned())));
        assert!(matches!(failed, Err(EmbedError::Batch(_))));
    }
}
