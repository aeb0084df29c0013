//! tract: pure Rust, always there, CPU only.
//!
//! A batch makes tract 2 to 8 times slower an image than one image a call, so it gets a plan fixed
//! to batch 1 (or to the model's own fixed batch) and runs on as many threads as there are cores,
//! each with a state of its own over the one shared plan. A batch is shared out image by image.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ndarray::{Array2, ArrayView4, Axis, s};
use prost::Message;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::plan::{SimplePlan, SimpleState};

use angler_wire::error::Reason;

use super::{Backend, EmbedError, Embedder};
use crate::model::Model;

type Plan = SimplePlan<TypedFact, Box<dyn TypedOp>>;
type PlanState = SimpleState<TypedFact, Box<dyn TypedOp>>;

/// tract with one state a thread.
pub struct TractEmbedder {
    states: Vec<PlanState>,
    /// Images a call: 1, or what the model fixes.
    batch: usize,
    dim: usize,
}

impl TractEmbedder {
    /// Optimises the model's graph and makes `threads` states of it.
    ///
    /// # Errors
    /// What tract says: an operator that it does not know, for example.
    pub fn new(model: &Model, threads: usize) -> Result<Self, Reason> {
        let batch = model.fixed_batch.unwrap_or(1);
        let plan = plan(model, batch).map_err(|e| Reason::new("tract refuses the model", e))?;
        let states = (0..threads.max(1))
            .map(|_| plan.spawn())
            .collect::<TractResult<Vec<_>>>()
            .map_err(|e| Reason::new("tract cannot start the model", e))?;
        Ok(Self { states, batch, dim: model.dim })
    }
}

fn plan(model: &Model, batch: usize) -> TractResult<Arc<Plan>> {
    let proto = tract_onnx::pb::ModelProto::decode(model.graph.as_slice())?;
    let (height, width) = (model.pixels.height as usize, model.pixels.width as usize);
    let typed = tract_onnx::onnx()
        // Exporters declare shapes that contradict a batch of one.
        .with_ignore_output_shapes(true)
        .with_ignore_value_info(true)
        .parse(&proto, None)?
        .model
        .with_input_fact(
            0,
            InferenceFact::dt_shape(u8::datum_type(), tvec!(batch, height, width, 3)),
        )?
        .into_optimized()?;
    SimplePlan::new(typed)
}

impl Embedder for TractEmbedder {
    fn backend(&self) -> Backend {
        Backend::TractCpu
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        let (batch, dim) = (self.batch, self.dim);
        let images = pixels.len_of(Axis(0));
        let calls = images.div_ceil(batch);
        let next = AtomicUsize::new(0);
        let embeddings = Mutex::new(Array2::zeros((images, dim)));
        let failure = Mutex::new(None);
        std::thread::scope(|scope| {
            for state in self.states.iter_mut().take(calls) {
                let (next, embeddings, failure) = (&next, &embeddings, &failure);
                scope.spawn(move || {
                    loop {
                        let first = next.fetch_add(1, Ordering::Relaxed) * batch;
                        if first >= images {
                            return;
                        }
                        let last = images.min(first + batch);
                        match run(state, pixels.slice(s![first..last, .., .., ..]), batch, dim) {
                            Ok(rows) => lock(embeddings)
                                .slice_mut(s![first..last, ..])
                                .assign(&rows.slice(s![..last - first, ..])),
                            Err(error) => *lock(failure) = Some(error),
                        }
                    }
                });
            }
        });
        match lock(&failure).take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut *lock(&embeddings))),
        }
    }
}

/// A poisoned lock would mean a panic while a row is assigned; the row stays zero and the engine
/// reports an embedding without direction.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// One call; images that are missing to a full batch are black.
fn run(
    state: &mut PlanState,
    pixels: ArrayView4<'_, u8>,
    batch: usize,
    dim: usize,
) -> Result<Array2<f32>, EmbedError> {
    let (images, height, width, channels) = pixels.dim();
    let mut values = Vec::with_capacity(batch * height * width * channels);
    match pixels.as_slice() {
        Some(slice) => values.extend_from_slice(slice),
        None => values.extend(pixels.iter()),
    }
    values.resize(batch * height * width * channels, 0);
    debug_assert!(images <= batch);
    let failed = |e: TractError| EmbedError::Batch(Reason::of(e));
    let shape = [batch, height, width, channels];
    let input = Tensor::from_shape(&shape, &values).map_err(failed)?;
    let output = state.run(tvec!(input.into_tvalue())).map_err(failed)?.remove(0);
    let output = output.cast_to::<f32>().map_err(failed)?;
    let plain = output.try_as_plain_ram().map_err(failed)?;
    let values = plain.as_slice::<f32>().map_err(failed)?;
    super::embeddings(values, batch, dim)
}
