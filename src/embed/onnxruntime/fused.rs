//! A session of the fused graph ([`crate::model::fused`]): what its runs need beside pixels.
//!
//! One session serves embedding and scoring. ONNX Runtime executes every node whichever outputs
//! are asked for, so a run that only embeds is given a class set of one row, which costs nothing.
//!
//! The class vectors of a version are an owned tensor, made once: on a GPU in the device's memory,
//! where a run takes them as they lie. (Binding or copying a tensor that borrows its data hangs
//! for ever in this release of `ort`, so no borrowed one is ever bound or copied.)

use ndarray::{Array2, ArrayView4};
use ort::memory::AllocationDevice;
use ort::session::{HasSelectedOutputs, OutputSelector, RunOptions, Session, SessionOutputs};
use ort::value::{Tensor, TensorRef};

use super::super::pieces::Pieces;
use super::super::prepared::Prepared;
use super::super::{Against, EmbedError, Scores, embeddings};
use super::{Provider, failed};
use crate::classes::ClassVectors;
use crate::classes::matrix::{RowClasses, unit_rows};
use crate::model::PIXELS_INPUT;
use crate::model::fused::{CLASSES, COUNT, EMBEDDING, LENGTH, ROWS, SCORES};

/// The most rows that a run lists for an image. Classes of several hundred vectors, or hundreds of
/// classes wanted, would need more: then a list of all scores is nearer, and the host does better.
const MOST_ROWS: usize = 4096;

/// A version on its device.
struct Version {
    /// f32 [rows, dim].
    matrix: Tensor<f32>,
    rows: RowClasses,
}

/// What a session of the fused graph needs.
pub(super) struct Scoring {
    dim: usize,
    /// The GPU on which class vectors lie.
    gpu: Option<i32>,
    /// [1, dim], what is scored against where only embeddings are wanted.
    nothing: Tensor<f32>,
    only_embeddings: RunOptions<HasSelectedOutputs>,
    only_scores: RunOptions<HasSelectedOutputs>,
    both: RunOptions<HasSelectedOutputs>,
    versions: Prepared<Version>,
}

impl Scoring {
    /// `bytes` bounds the class vectors that are kept.
    pub fn new(provider: Provider, dim: usize, bytes: usize) -> ort::Result<Self> {
        let outputs = |names: &[&str]| {
            let none = OutputSelector::no_default();
            let selected = names.iter().fold(none, |selected, name| selected.with(*name));
            Ok::<_, ort::Error>(RunOptions::new()?.with_outputs(selected))
        };
        Ok(Self {
            dim,
            gpu: match provider {
                Provider::Cpu => None,
                Provider::Cuda(device) | Provider::TensorRt(device) => Some(device),
            },
            nothing: Tensor::from_array(([1, dim], vec![0.0; dim]))?,
            only_embeddings: outputs(&[EMBEDDING])?,
            only_scores: outputs(&[LENGTH, SCORES, ROWS])?,
            both: outputs(&[LENGTH, SCORES, ROWS, EMBEDDING])?,
            versions: Prepared::new(bytes),
        })
    }

    /// f32 [N, dim], not normalised.
    pub fn embed(
        &self,
        session: &mut Session,
        pixels: ArrayView4<'_, u8>,
    ) -> Result<Array2<f32>, EmbedError> {
        let outputs = run(session, &self.only_embeddings, pixels, &self.nothing, 1)?;
        embeddings(values(&outputs, EMBEDDING)?, pixels.dim().0, self.dim)
    }

    /// None if this version, or so many classes of it, is for the host.
    pub fn classify(
        &mut self,
        session: &mut Session,
        pixels: ArrayView4<'_, u8>,
        pieces: Pieces,
        against: &Against<'_>,
    ) -> Option<Result<Scores, EmbedError>> {
        let Self { dim, gpu, only_scores, both, versions, .. } = self;
        let (classes, dim) = (against.classes, *dim);
        if classes.dim() != dim {
            return None;
        }
        let count = classes.row_classes().len();
        let bytes = count * (dim * size_of::<f32>() + size_of::<u32>());
        let Version { matrix, rows } = versions.get(classes, bytes, || prepare(classes, *gpu))?;
        let needed = rows.needed(against.top_k);
        if needed > MOST_ROWS {
            return None;
        }
        let images = pixels.dim().0;
        let mut scores = Scores { top: Vec::with_capacity(images), embeddings: None };
        let mut embedded = Vec::new();
        let options = if against.embeddings { both } else { only_scores };
        let outcome = pieces.each(pixels, |pixels, count| {
            let outputs = run(session, options, pixels, matrix, needed)?;
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
        top: &mut Vec<Option<Vec<crate::score::ClassScore>>>,
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
fn prepare(classes: &ClassVectors, gpu: Option<i32>) -> Result<Version, String> {
    let (values, rows) = unit_rows(classes);
    if rows.needed(2) > MOST_ROWS {
        return Err(format!(
            "a class has {} vectors, and lists are of {MOST_ROWS} at most",
            rows.needed(2) - 1
        ));
    }
    let matrix =
        Tensor::from_array(([rows.rows(), classes.dim()], values)).map_err(|e| e.to_string())?;
    let matrix = match gpu {
        Some(device) => matrix.to(AllocationDevice::CUDA, device).map_err(|e| e.to_string())?,
        None => matrix,
    };
    Ok(Version { matrix, rows })
}

fn run<'a>(
    session: &'a mut Session,
    options: &'a RunOptions<HasSelectedOutputs>,
    pixels: ArrayView4<'_, u8>,
    matrix: &Tensor<f32>,
    count: usize,
) -> Result<SessionOutputs<'a>, EmbedError> {
    let pixels = TensorRef::from_array_view(pixels).map_err(failed)?;
    let count = i64::try_from(count).unwrap_or(i64::MAX);
    let count = Tensor::from_array(([1], vec![count])).map_err(failed)?;
    let inputs = ort::inputs![PIXELS_INPUT => pixels, CLASSES => matrix, COUNT => count];
    session.run_with_options(inputs, options).map_err(failed)
}

fn values<'a, T: ort::value::PrimitiveTensorElementType>(
    outputs: &'a SessionOutputs<'_>,
    name: &str,
) -> Result<&'a [T], EmbedError> {
    Ok(outputs[name].try_extract_tensor::<T>().map_err(failed)?.1)
}
