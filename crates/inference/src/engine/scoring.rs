//! A batch that the back end scores itself: when it may, and how its images are answered.
//!
//! It may when all images want the same version and nothing else of their embeddings. Any other
//! batch is embedded once and scored on the host, version by version.

use std::sync::Arc;

use angler_vectors::unit::normalise;
use angler_wire::error::{ImageError, ImageErrorCode};

use super::{Image, Scored, SubmitError};
use crate::embed::{Against, Scores};

/// What a whole batch can be scored against at once, if it can.
pub(super) fn against(images: &[Image]) -> Option<Against<'_>> {
    let classes = images.first()?.want.classes.as_ref()?;
    let same = |image: &Image| {
        let want = &image.want;
        want.shadow.is_none() && want.classes.as_ref().is_some_and(|c| Arc::ptr_eq(c, classes))
    };
    images.iter().all(same).then(|| Against {
        classes,
        // Images of one version want different numbers of classes; the largest serves all.
        top_k: images.iter().map(|image| image.want.top_k).max().unwrap_or(1),
        embeddings: images.iter().any(|image| image.want.embedding),
    })
}

/// Answers each image of a batch that the back end scored.
pub(super) fn answer(images: Vec<Image>, scores: Scores) {
    let Scores { top, embeddings } = scores;
    // An image without a list is dropped unanswered, which a back end's fault deserves.
    for (index, (image, top)) in images.into_iter().zip(top).enumerate() {
        let embedding = || {
            let mut row = embeddings.as_ref()?.row(index).to_owned();
            normalise(row.view_mut()).then(|| row.to_vec())
        };
        let scored = top.ok_or_else(undirected).map(|mut top| {
            top.truncate(image.want.top_k);
            let embedding = if image.want.embedding { embedding() } else { None };
            Scored { top, shadow: Vec::new(), embedding }
        });
        let _ = image.reply.send(scored); // The image's task may be gone.
    }
}

/// The error of an image whose embedding has no direction.
pub(super) fn undirected() -> SubmitError {
    let message = "the model's embedding of this image is zero or not finite";
    SubmitError::Image(ImageError::new(ImageErrorCode::Internal, message))
}
