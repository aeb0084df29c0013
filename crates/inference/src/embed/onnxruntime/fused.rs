//! A session of the fused graph ([`crate::model::fused`]): what its runs need beside pixels.
//!
//! One session serves embedding and scoring. ONNX Runtime executes every node whichever outputs
//! are asked for, so a run that only embeds is given a class set of one row, which costs nothing.
//!
//! The class vectors of a version are an owned tensor, made once for all sessions of a device: on a
//! GPU in its memory, where a run takes them as they lie. [`Memory`] makes it, from any thread, so
//! a version that will be served travels beside the batches of the one that is.

use std::sync::Arc;

use ndarray::{Array2, ArrayView4};
use ort::memory::AllocationDevice;
use ort::session::{Session, SessionOutputs};
use ort::value::Tensor;

use angler_vectors::ClassVectors;
use angler_vectors::matrix::{RowClasses, unit_rows};
use angler_wire::error::Reason;

use super::super::{Against, ClassMemory, EmbedError, Scores, embeddings};
use super::{Provider, failed};
use crate::embed::call_sizes::Pieces;
use crate::embed::device_cache::Prepared;
use crate::embed::onnxruntime::io_binding::{Calls, Classes};
use crate::model::fused::{EMBEDDING, LENGTH, ROWS, SCORES};

/// The most rows that a run lists for an image. Classes of several hundred vectors, or hundreds of
/// classes wanted, would need more: then a list of all scores is nearer, and the host does better.
const MOST_ROWS: usize = 4096;

const ONLY_EMBEDDINGS: &[&str] = &[EMBEDDING];
const ONLY_SCORES: &[&str] = &[LENGTH, SCORES, ROWS];
const BOTH: &[&str] = &[LENGTH, SCORES, ROWS, EMBEDDING];

/// A version on its device.
struct Version {
    /// f32 [rows, dim].
    matrix: Tensor<f32>,
    rows: RowClasses,
}

/// A device's memory for class vectors.
pub struct Memory {
    dim: usize,
    /// The GPU on which class vectors lie.
    gpu: Option<i32>,
    versions: Prepared<Arc<Version>>,
}

impl Memory {
    /// `bytes` bounds the class vectors that are kept.
    pub fn new(provider: Provider, dim: usize, bytes: usize) -> Self {
        Self { dim, gpu: provider.gpu(), versions: Prepared::new(bytes) }
    }

    /// The version on the device. None if it is for the host, or on its way.
    fn version(&self, classes: &Arc<ClassVectors>) -> Option<Arc<Version>> {
        let Self { dim, gpu, versions } = self;
        if classes.dim() != *dim {
            return None;
        }
        let bytes = classes.row_classes().len() * (dim * size_of::<f32>() + size_of::<u32>());
        versions.get(classes, bytes, || prepare(classes, *gpu).map(Arc::new))
    }
}

impl ClassMemory for Memory {
    fn upload(&self, classes: &Arc<ClassVectors>) {
        self.version(classes);
    }
}

/// What a session of the fused graph needs.
pub(super) struct Scoring {
    memory: Arc<Memory>,
    calls: Calls,
    /// [1, dim], what is scored against where only embeddings are wanted.
    nothing: Tensor<f32>,
}

impl Scoring {
    pub fn new(memory: Arc<Memory>) -> ort::Result<Self> {
        let dim = memory.dim;
        let nothing = Tensor::from_array(([1, dim], vec![0.0; dim]))?;
        let nothing = match memory.gpu {
            Some(device) => nothing.to(AllocationDevice::CUDA, device)?,
            None => nothing,
        };
        Ok(Self { calls: Calls::new(memory.gpu), memory, nothing })
    }

    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// f32 [N, dim], not normalised.
    pub fn embed(
        &mut self,
        session: &mut Session,
        pixels: ArrayView4<'_, u8>,
    ) -> Result<Array2<f32>, EmbedError> {
        let classes = Classes { matrix: &self.nothing, count: 1 };
        let outputs = self.calls.run(session, ONLY_EMBEDDINGS, pixels, classes)?;
        embeddings(values(&outputs, EMBEDDING)?, pixels.dim().0, self.memory.dim)
    }

    /// None if this version, or so many classes of it, is for the host.
    pub fn classify(
        &mut self,
        session: &mut Session,
        pixels: ArrayView4<'_, u8>,
        pieces: Pieces,
        against: &Against<'_>,
    ) -> Option<Result<Scores, EmbedError>> {
        let Self { memory, calls, .. } = self;
        let dim = memory.dim;
        let version = memory.version(against.classes)?;
        let Version { matrix, rows } = version.as_ref();
        let needed = rows.needed(against.top_k);
        if needed > MOST_ROWS {
            return None;
        }
        let images = pixels.dim().0;
        let mut scores = Scores { top: Vec::with_capacity(images), embeddings: None };
        let mut embedded = Vec::new();
        let wanted = if against.embeddings { BOTH } else { ONLY_SCORES };
        let outcome = pieces.each(pixels, |pixels, count| {
            let classes = Classes { matrix, count: needed };
            let outputs = calls.run(session, wanted, pixels, classes)?;
            let lists = Lists {
                lengths: values(&outputs, LENGTH)?,
                scores: values(&outputs, SCORES)?,
                rows: values(&outputs, ROWS)?,
            };
            lists.read(rows, count, needed, against.top_k, &mut scores.top)?;
            if against.embeddings {
                let values = values::<f32>(&outputs, EMBEDDING)?;
                embedded.extend_from_slice(values.get(..count * dim).unwrap_or_default());
            }
            Ok(())
        });
        calls.release();
        Some(outcome.and_then(|()| {
            if against.embeddings {
                scores.embeddings = Some(embeddings(&embedded, images, dim)?);
            }
            Ok(scores)
        }))
    }
}

/// What a run listed, image after image.
struct Lists<'a> {
    lengths: &'a [f32],
    scores: &'a [f32],
    rows: &'a [i64],
}

impl Lists<'_> {
    /// Appends the best classes of the first `images` images, each of which has `each` rows.
    fn read(
        &self,
        classes: &RowClasses,
        images: usize,
        each: usize,
        top_k: usize,
        top: &mut Vec<Option<Vec<angler_vectors::score::ClassScore>>>,
    ) -> Result<(), EmbedError> {
        let wrong = || EmbedError::Batch("the fused graph gave no list of rows an image".into());
        if self.lengths.len() < images {
            return Err(wrong());
        }
        for (image, length) in self.lengths.iter().take(images).enumerate() {
            if !(length.is_finite() && *length > 0.0) {
                top.push(None);
                continue;
            }
            let range = image * each..(image + 1) * each;
            let rows = self.rows.get(range.clone()).ok_or_else(wrong)?;
            let scores = self.scores.get(range).ok_or_else(wrong)?;
            top.push(Some(classes.best(rows, scores, top_k).ok_or_else(wrong)?));
        }
        Ok(())
    }
}

/// Copies a version to where it is multiplied.
fn prepare(classes: &ClassVectors, gpu: Option<i32>) -> Result<Version, Reason> {
    let (values, rows) = unit_rows(classes);
    if rows.needed(2) > MOST_ROWS {
        let most = rows.needed(2) - 1;
        return Err(
            format!("a class has {most} vectors, and lists are of {MOST_ROWS} at most").into()
        );
    }
    let matrix = Tensor::from_array(([rows.rows(), classes.dim()], values)).map_err(Reason::of)?;
    let matrix = match gpu {
        Some(device) => matrix.to(AllocationDevice::CUDA, device).map_err(Reason::of)?,
        None => matrix,
    };
    Ok(Version { matrix, rows })
}

fn values<'a, T: ort::value::PrimitiveTensorElementType>(
    outputs: &'a SessionOutputs<'_>,
    name: &str,
) -> Result<&'a [T], EmbedError> {
    Ok(outputs[name].try_extract_tensor::<T>().map_err(failed)?.1)
}
