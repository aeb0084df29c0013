//! Calls of a session whose inputs and outputs are bound: what a call reads and writes is kept for
//! the next call of the same size.
//!
//! On a GPU pixels are written into pinned memory, which it fetches by itself and without a copy in
//! between; class vectors are taken as they lie in its memory.
//!
//! Only owned tensors are ever bound: binding one that borrows its data hangs for ever in this
//! release of `ort`.

use ndarray::{ArrayView4, ArrayViewMut4};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session, SessionOutputs};
use ort::value::Tensor;

use angler_wire::error::Reason;

use super::super::EmbedError;
use super::failed;
use crate::model::PIXELS_INPUT;
use crate::model::fused::{CLASSES, COUNT};

/// A session's calls, one for each size and kind.
#[derive(Default)]
pub(super) struct Calls {
    /// The GPU that fetches the pixels.
    gpu: Option<i32>,
    calls: Vec<Call>,
    /// Whether it was said that there is no pinned memory.
    unpinned: bool,
}

struct Call {
    outputs: &'static [&'static str],
    /// u8 [N, H, W, 3].
    pixels: Tensor<u8>,
    binding: IoBinding,
}

/// What is scored against.
#[derive(Clone, Copy)]
pub(super) struct Classes<'a> {
    /// f32 [rows, dim], where it is multiplied.
    pub matrix: &'a Tensor<f32>,
    /// How many rows are listed.
    pub count: usize,
}

impl Calls {
    pub fn new(gpu: Option<i32>) -> Self {
        Self { gpu, ..Self::default() }
    }

    /// Runs the session on `pixels`, u8 [N, H, W, 3]; `outputs` come back in the host's memory.
    ///
    /// # Errors
    /// As [`failed`] says.
    pub fn run<'a>(
        &'a mut self,
        session: &'a mut Session,
        outputs: &'static [&'static str],
        pixels: ArrayView4<'_, u8>,
        classes: Classes<'_>,
    ) -> Result<SessionOutputs<'a>, EmbedError> {
        let at = self.call(session, outputs, pixels.dim()).map_err(failed)?;
        let Call { pixels: bound, binding, .. } = &mut self.calls[at];
        let (_, values) = bound.try_extract_tensor_mut::<u8>().map_err(failed)?;
        let mut to = ArrayViewMut4::from_shape(pixels.dim(), values)
            .map_err(|e| EmbedError::Batch(Reason::new("pixels do not fit their tensor", e)))?;
        to.assign(&pixels);
        bind(binding, bound, classes, outputs).map_err(failed)?;
        session.run_binding(binding).map_err(failed)
    }

    /// Lets go of what was bound. A binding that kept its class vectors until its next run would keep
    /// a version in memory that nobody serves any more.
    pub fn release(&mut self) {
        for call in &mut self.calls {
            call.binding.clear_inputs();
        }
    }

    /// Where the call of this size and kind stands; made if there is none.
    fn call(
        &mut self,
        session: &Session,
        outputs: &'static [&'static str],
        (images, height, width, channels): (usize, usize, usize, usize),
    ) -> ort::Result<usize> {
        let shape = [images, height, width, channels].map(|size| size as i64);
        let fits = |call: &Call| call.outputs == outputs && **call.pixels.shape() == shape[..];
        if let Some(at) = self.calls.iter().position(fits) {
            return Ok(at);
        }
        let pixels = self.tensor(session, shape)?;
        self.calls.push(Call { outputs, pixels, binding: session.create_binding()? });
        Ok(self.calls.len() - 1)
    }

    /// A tensor that the device reads fast, of pixels that are to be written.
    fn tensor(&mut self, session: &Session, shape: [i64; 4]) -> ort::Result<Tensor<u8>> {
        if let Some(device) = self.gpu {
            match pinned(session, device, shape) {
                Ok(tensor) => return Ok(tensor),
                Err(error) if !std::mem::replace(&mut self.unpinned, true) => {
                    tracing::warn!("pixels go to the GPU from memory that is not pinned: {error}");
                }
                Err(_) => {}
            }
        }
        let bytes = shape.iter().product::<i64>();
        let zeros = vec![0_u8; usize::try_from(bytes).unwrap_or_default()];
        Tensor::from_array((shape, zeros))
    }
}

fn pinned(session: &Session, device: i32, shape: [i64; 4]) -> ort::Result<Tensor<u8>> {
    let memory = MemoryInfo::new(
        AllocationDevice::CUDA_PINNED,
        device,
        AllocatorType::Device,
        MemoryType::CPUInput,
    )?;
    Tensor::new(&Allocator::new(session, memory)?, shape)
}

/// Binds a call's values anew: pixels are copied to the device as they are bound, and an output
/// that stays bound would be written over in place, whatever its size.
fn bind(
    binding: &mut IoBinding,
    pixels: &Tensor<u8>,
    Classes { matrix, count }: Classes<'_>,
    outputs: &[&str],
) -> ort::Result<()> {
    let count = Tensor::from_array(([1], vec![i64::try_from(count).unwrap_or(i64::MAX)]))?;
    binding.bind_input(PIXELS_INPUT, pixels)?;
    binding.bind_input(CLASSES, matrix)?;
    binding.bind_input(COUNT, &count)?;
    let host =
        MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput)?;
    for output in outputs {
        binding.bind_output_to_device(*output, &host)?;
    }
    Ok(())
}
