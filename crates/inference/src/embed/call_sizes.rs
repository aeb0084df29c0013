//! How a batch is cut into the calls that a back end likes best.
//!
//! On a CPU each size of a call costs memory that is never returned, so there are few sizes, and all
//! are met when the model is warmed. On a GPU there is one: since release 1.20 ONNX Runtime keeps one
//! cuDNN plan per convolution and makes it again whenever the input's shape differs from the
//! previous call's (microsoft/onnxruntime#23006), which takes far longer than a batch.

use ndarray::{Array4, ArrayView4, s};

use super::EmbedError;

/// The sizes of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pieces {
    /// Exactly so many images, because the graph says so; missing ones are black.
    Fixed(usize),
    /// At most so many; a rest is made of powers of two. For a CPU, where a call that stays in the
    /// core's cache is faster than a larger one, and black images cost as much as others.
    UpTo(usize),
    /// Always this many images, filled up with black ones; fewer if memory is short
    /// ([`Self::shrink`]). For a GPU.
    Padded(usize),
}

impl Pieces {
    /// Every size of call that there may be, smallest first.
    pub fn sizes(self) -> Vec<usize> {
        match self {
            Self::Fixed(size) | Self::Padded(size) => vec![size.max(1)],
            Self::UpTo(most) => {
                let most = most.max(1);
                let powers = std::iter::successors(Some(1), |size| Some(size * 2));
                powers.take_while(|size| *size < most).chain([most]).collect()
            }
        }
    }

    /// The next call for `left` images: how many of them, and how large the call is.
    fn next(self, left: usize) -> (usize, usize) {
        match self {
            Self::Fixed(size) | Self::Padded(size) => (left.min(size.max(1)), size.max(1)),
            Self::UpTo(most) if left >= most.max(1) => (most.max(1), most.max(1)),
            Self::UpTo(_) => {
                let power = 1 << left.ilog2();
                (power, power)
            }
        }
    }

    /// Halves the calls of a GPU that has no memory for them; `false` if they cannot be smaller.
    pub fn shrink(&mut self) -> bool {
        match self {
            Self::Padded(size) if *size > 1 => {
                *size /= 2;
                true
            }
            _ => false,
        }
    }

    /// Hands a batch to `run` piece by piece, and with each how many of its images count: the rest
    /// are black.
    ///
    /// * `pixels`: u8 RGB, [N, H, W, 3].
    ///
    /// # Errors
    /// The first that `run` yields.
    pub fn each(
        self,
        pixels: ArrayView4<'_, u8>,
        mut run: impl FnMut(ArrayView4<'_, u8>, usize) -> Result<(), EmbedError>,
    ) -> Result<(), EmbedError> {
        let (images, height, width, channels) = pixels.dim();
        let mut done = 0;
        while done < images {
            let (count, size) = self.next(images - done);
            let piece = pixels.slice(s![done..done + count, .., .., ..]);
            if count == size {
                run(piece, count)?;
            } else {
                let mut padded = Array4::zeros((size, height, width, channels));
                padded.slice_mut(s![..count, .., .., ..]).assign(&piece);
                run(padded.view(), count)?;
            }
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the calls for so many images, each of which has a first value of its own.
    fn calls(pieces: Pieces, images: usize) -> Vec<usize> {
        let pixels = Array4::from_shape_fn((images, 1, 1, 3), |(image, ..)| image as u8 + 1);
        let (mut calls, mut seen) = (Vec::new(), Vec::<u8>::new());
        let all = pieces.each(pixels.view(), |piece, count| {
            calls.push(piece.dim().0);
            seen.extend(piece.slice(s![..count, 0, 0, 0]));
            assert!(piece.slice(s![count.., .., .., ..]).iter().all(|value| *value == 0));
            Ok(())
        });
        all.unwrap();
        let wanted: Vec<u8> = (1..=images).map(|value| value as u8).collect();
        assert_eq!(seen, wanted, "{pieces:?} {images}");
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
        assert_eq!(calls(Pieces::Padded(24), 24), [24]);
        assert_eq!(calls(Pieces::Padded(24), 25), [24, 24]);
        for pieces in [Pieces::Fixed(3), Pieces::UpTo(5), Pieces::Padded(12)] {
            for images in 1..40 {
                calls(pieces, images);
            }
        }
        assert_eq!(Pieces::UpTo(4).sizes(), [1, 2, 4]);
        assert_eq!(Pieces::UpTo(1).sizes(), [1]);
    }

    #[test]
    fn a_gpu_never_sees_two_shapes_unless_memory_is_short() {
        let mut pieces = Pieces::Padded(32);
        let mut shapes: Vec<usize> = (1..100).flat_map(|images| calls(pieces, images)).collect();
        shapes.dedup();
        assert_eq!((shapes, pieces.sizes()), (vec![32], vec![32]));
        assert!(pieces.shrink());
        assert_eq!(calls(pieces, 20), [16, 16]);
        while pieces.shrink() {}
        assert_eq!(calls(pieces, 2), [1, 1]);
        assert!(!Pieces::Fixed(8).shrink() && !Pieces::UpTo(8).shrink());
    }

    #[test]
    fn a_call_that_fails_ends_it() {
        let pixels = Array4::zeros((5, 1, 1, 3));
        let mut calls = 0;
        let failed = Pieces::UpTo(2).each(pixels.view(), |_, _| {
            calls += 1;
            Err(EmbedError::Batch("as told".into()))
        });
        assert_eq!(calls, 1);
        assert!(matches!(failed, Err(EmbedError::Batch(_))));
    }
}
