//! The seam to the model: pixels in, embeddings out, nothing else.
//!
//! An [`Embedder`] is synchronous and takes `&mut self`: it is moved into an OS thread of the
//! engine's, which owns it, so no back end needs a lock. [`open`] chooses among the back ends and
//! says which one really works.
//!
//! A back end may be able to score as well ([`Embedder::classify`]): on a GPU the class vectors lie
//! beside the model, and a few labels come back instead of embeddings. It never has to: whoever
//! asks scores embeddings on the host as soon as the answer is none.

pub(crate) mod call_sizes;
mod device_cache;
pub mod fake;
pub mod onnxruntime;
pub mod tract;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use ndarray::{Array2, Array4, ArrayView4};
use serde::{Deserialize, Serialize};

use angler_pixels::PixelSpec;
use angler_vectors::ClassVectors;
use angler_vectors::score::ClassScore;
use angler_wire::error::Reason;
use angler_wire::text::{chain, plural};

use crate::model::Model;

/// A back end that has loaded a model and is ready to run it.
pub trait Embedder: Send {
    /// What executes, as results name it.
    fn backend(&self) -> Backend;

    /// The device that it executes on: `cpu`, or `cuda:0` for the first GPU.
    fn device(&self) -> String {
        "cpu".to_owned()
    }

    /// The batch sizes that the back end is warmed with: one of each shape that it runs as long as
    /// memory suffices.
    fn shapes(&self) -> Vec<usize> {
        vec![1]
    }

    /// The embeddings of a batch.
    ///
    /// * `pixels`: u8 RGB, [N, H, W, 3], N ≥ 1.
    /// * returns f32 [N, dim], not normalised.
    ///
    /// # Errors
    /// [`EmbedError::Batch`] if this batch could not be run; the next may.
    /// [`EmbedError::OutOfMemory`] if fewer images at once may do.
    /// [`EmbedError::Broken`] if the back end cannot go on.
    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError>;

    /// Embeds a batch and scores it against one version, all in the back end. None: it does not
    /// score, or not against this version, and nothing was run.
    ///
    /// * `pixels`: as for [`Self::embed`].
    ///
    /// # Errors
    /// As [`Self::embed`]. After [`EmbedError::Batch`] and [`EmbedError::OutOfMemory`] the batch may
    /// still be embedded.
    fn classify(
        &mut self,
        pixels: ArrayView4<'_, u8>,
        against: &Against<'_>,
    ) -> Option<Result<Scores, EmbedError>> {
        let _ = (pixels, against);
        None
    }

    /// Makes its calls smaller because memory is short; `false` if they cannot be, or follow the
    /// batch anyway.
    fn shrink(&mut self) -> bool {
        false
    }

    /// Where it keeps the class vectors that it scores against; none if it does not score. Sessions
    /// that share a memory yield the same one.
    fn class_memory(&self) -> Option<Arc<dyn ClassMemory>> {
        None
    }
}

/// Memory beside a model for class vectors. It is filled from any thread, while batches run.
pub trait ClassMemory: Send + Sync {
    /// Brings a version there, so that its first batch does not wait for that; returns when that is
    /// done. A version that is there, or cannot be, costs nothing.
    fn upload(&self, classes: &Arc<ClassVectors>);
}

/// What a batch is scored against in the back end.
#[derive(Debug, Clone, Copy)]
pub struct Against<'a> {
    /// The version. A back end may keep a copy for as long as somebody else holds it.
    pub classes: &'a Arc<ClassVectors>,
    /// How many of the best classes are listed.
    pub top_k: usize,
    /// Whether the embeddings come back as well.
    pub embeddings: bool,
}

/// A batch that was scored in the back end.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// Each image's best classes, best first, each class once; none: its embedding is zero or not
    /// finite.
    pub top: Vec<Option<Vec<ClassScore>>>,
    /// f32 [N, dim], not normalised, if asked for.
    pub embeddings: Option<Array2<f32>>,
}

/// Why a batch has no embeddings.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    /// This batch failed; the back end goes on.
    #[error("{0}")]
    Batch(#[source] Reason),
    /// The device had no memory for so many images; fewer may fit.
    #[error("{0}")]
    OutOfMemory(#[source] Reason),
    /// The back end is broken for good.
    #[error("{0}")]
    Broken(#[source] Reason),
}

/// What executes a model.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    strum::Display,
    strum::IntoStaticStr,
)]
pub enum Backend {
    /// ONNX Runtime, CUDA provider.
    #[serde(rename = "onnxruntime-cuda")]
    #[strum(serialize = "onnxruntime-cuda")]
    OnnxRuntimeCuda,
    /// ONNX Runtime, TensorRT provider with CUDA behind it.
    #[serde(rename = "onnxruntime-tensorrt")]
    #[strum(serialize = "onnxruntime-tensorrt")]
    OnnxRuntimeTensorRt,
    /// ONNX Runtime, CPU provider.
    #[serde(rename = "onnxruntime-cpu")]
    #[strum(serialize = "onnxruntime-cpu")]
    OnnxRuntimeCpu,
    /// tract.
    #[serde(rename = "tract-cpu")]
    #[strum(serialize = "tract-cpu")]
    TractCpu,
    /// No model at all: for tests and for measuring what surrounds a model.
    #[serde(rename = "fake")]
    #[strum(serialize = "fake")]
    Fake,
}

impl Backend {
    /// Returns the name that results give it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What was asked for: `embedder.backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum BackendChoice {
    /// The best that works: cuda, then onnxruntime on the CPU, then tract.
    Auto,
    /// ONNX Runtime on an NVIDIA GPU.
    Cuda,
    /// ONNX Runtime with TensorRT on an NVIDIA GPU.
    Tensorrt,
    /// ONNX Runtime on the CPU.
    Onnxruntime,
    /// tract, in pure Rust, on the CPU.
    Tract,
}

impl BackendChoice {
    /// Returns the choice as settings name it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Where embeddings are scored: `embedder.scoring`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// In the graph on a GPU, on the host otherwise.
    Auto,
    /// On the host.
    Host,
    /// In the graph wherever that can be done.
    Graph,
}

impl Scoring {
    fn in_graph(self, gpu: bool) -> bool {
        self == Self::Graph || (self == Self::Auto && gpu)
    }
}

/// How to open a back end: the part of `[embedder]` that concerns it.
#[derive(Debug, Clone)]
pub struct Options {
    /// What was asked for.
    pub choice: BackendChoice,
    /// GPUs to use, by number.
    pub devices: Vec<i32>,
    /// CPU threads of each embedder; 0: the cores, shared among the sessions.
    pub threads: usize,
    /// Sessions on the CPU or on each GPU, each with a thread and an embedder of its own; 0: on the
    /// CPU as many as the cores allow with `threads` each, one thread each if that is 0 too, and
    /// [`SESSIONS_A_GPU`] on a GPU.
    pub sessions: usize,
    /// The most images that an embedder is given at once.
    pub max_batch: usize,
    /// Whether a named back end that does not work may be replaced by the next best.
    pub allow_fallback: bool,
    /// Where embeddings are scored.
    pub scoring: Scoring,
    /// Memory for class vectors that are scored in the graph, in bytes, on each device.
    pub graph_bytes: usize,
    /// How CUDA computes.
    pub cuda: onnxruntime::CudaOptions,
    /// Where ONNX Runtime's library lies; none: well-known places are searched.
    pub onnxruntime_library: Option<PathBuf>,
}

/// No back end could be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The one that was named does not work.
    #[error(
        "embedder.backend = {name:?} does not work here (embedder.allow_fallback = true would try the next best): {reason}"
    )]
    Named {
        /// What was asked for.
        name: &'static str,
        /// What is missing.
        #[source]
        reason: Reason,
    },
    /// None works: each one's name and what it misses.
    #[error("no back end works here: {}", refusals(.0).trim_start_matches("; "))]
    None(Vec<(&'static str, Reason)>),
}

/// The embedders that were opened, one for each engine thread, and why these.
pub struct Opened {
    /// At least one; all of the same back end.
    pub embedders: Vec<Box<dyn Embedder>>,
    /// What executes.
    pub backend: Backend,
    /// One line: what runs, and why nothing better does.
    pub reason: String,
}

/// Opens the back end that was asked for, or the best that works.
///
/// TensorRT is taken only by name: it builds its engine for minutes at the first start.
///
/// # Errors
/// [`OpenError`], which names what is missing.
pub fn open(model: &Model, options: &Options) -> Result<Opened, OpenError> {
    use BackendChoice::{Auto, Cuda, Onnxruntime, Tensorrt, Tract};
    let order: &[BackendChoice] = match options.choice {
        Auto => &[Cuda, Onnxruntime, Tract],
        Tensorrt if options.allow_fallback => &[Tensorrt, Cuda, Onnxruntime, Tract],
        Cuda if options.allow_fallback => &[Cuda, Onnxruntime, Tract],
        Onnxruntime if options.allow_fallback => &[Onnxruntime, Tract],
        Tensorrt => &[Tensorrt],
        Cuda => &[Cuda],
        Onnxruntime => &[Onnxruntime],
        Tract => &[Tract],
    };
    let mut failed = Vec::new();
    for choice in order {
        match open_one(model, options, *choice) {
            Ok((embedders, detail)) if !embedders.is_empty() => {
                let backend = embedders[0].backend();
                let mut reason = format!("{backend}: {detail}");
                reason.push_str(&refusals(&failed));
                return Ok(Opened { embedders, backend, reason });
            }
            Ok(_) => failed.push((choice.as_str(), "embedder.devices is empty".into())),
            Err(reason) => failed.push((choice.as_str(), reason)),
        }
    }
    match failed.pop() {
        Some((name, reason)) if order.len() == 1 => Err(OpenError::Named { name, reason }),
        last => {
            failed.extend(last);
            Err(OpenError::None(failed))
        }
    }
}

/// Why each back end was passed over; neighbours with the same reason share it.
fn refusals(failed: &[(&'static str, Reason)]) -> String {
    let failed: Vec<_> = failed.iter().map(|(name, reason)| (*name, chain(reason))).collect();
    let same = failed.chunk_by(|a, b| a.1 == b.1);
    same.map(|group| {
        let names: Vec<&str> = group.iter().map(|(name, _)| *name).collect();
        format!("; not {}: {}", names.join(", not "), group[0].1.trim_end_matches('.'))
    })
    .collect()
}

type OpenedOne = (Vec<Box<dyn Embedder>>, String);

fn open_one(model: &Model, options: &Options, choice: BackendChoice) -> Result<OpenedOne, Reason> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if choice == BackendChoice::Tract || choice == BackendChoice::Auto {
        let threads = if options.threads == 0 { cores } else { options.threads };
        let embedder = tract::TractEmbedder::new(model, threads)?;
        let reason = Some("tract only embeds").filter(|_| options.scoring == Scoring::Graph);
        return Ok((
            vec![Box::new(embedder)],
            format!("{}, an image each, {}", plural(threads, "thread"), on_the_host(reason)),
        ));
    }
    let runtime = onnxruntime::Runtime::find(options.onnxruntime_library.as_deref())?;
    let size = |threads| onnxruntime::Size { threads, max_batch: options.max_batch };
    let (places, detail): (Vec<(onnxruntime::Provider, onnxruntime::Size)>, String) = match choice {
        BackendChoice::Onnxruntime => {
            let (sessions, threads) = shares(cores, options.sessions, options.threads);
            let places = vec![(onnxruntime::Provider::Cpu, size(threads)); sessions];
            let each = plural(threads, "thread");
            (places, format!("{}, {each} each", plural(sessions, "session")))
        }
        _ => {
            let sessions = if options.sessions == 0 { SESSIONS_A_GPU } else { options.sessions };
            let provider = |device: &i32| match choice {
                BackendChoice::Tensorrt => (onnxruntime::Provider::TensorRt(*device), size(1)),
                _ => (onnxruntime::Provider::Cuda(*device), size(1)),
            };
            // Device by device in turn, so that the first batches go to different ones.
            let places = options.devices.iter().map(provider).cycle();
            let places = places.take(options.devices.len() * sessions).collect();
            let each = plural(sessions, "session");
            (places, format!("devices {:?}, {each} each", options.devices))
        }
    };
    let open = |graph: Option<&[u8]>| open_all(&runtime, model, options, &places, graph);
    let (embedders, scoring) = match fused_graph(model, options, choice) {
        None => (open(None)?, on_the_host(None)),
        Some(Err(reason)) => (open(None)?, on_the_host(Some(&chain(&reason)))),
        Some(Ok(graph)) => match open(Some(&graph)) {
            Ok(embedders) => (embedders, "scored in the graph".to_owned()),
            // Scoring is no reason to be without the back end.
            Err(reason) => (open(None)?, on_the_host(Some(&chain(&reason)))),
        },
    };
    let executed: BTreeSet<String> = embedders.iter().map(|one| one.executed()).collect();
    let executed = executed.into_iter().collect::<Vec<_>>().join(" or ");
    let embedders = embedders.into_iter().map(|one| Box::new(one) as Box<dyn Embedder>).collect();
    let library = runtime.library().display();
    Ok((embedders, format!("{detail}, {executed}, {scoring}, library {library}")))
}

/// Opens a session in each of these places; those of a device share its memory for class vectors.
fn open_all(
    runtime: &onnxruntime::Runtime,
    model: &Model,
    options: &Options,
    places: &[(onnxruntime::Provider, onnxruntime::Size)],
    graph: Option<&[u8]>,
) -> Result<Vec<onnxruntime::OnnxRuntimeEmbedder>, Reason> {
    let mut memories: Vec<(onnxruntime::Provider, Arc<onnxruntime::Memory>)> = Vec::new();
    let mut open = |(provider, size): &(onnxruntime::Provider, onnxruntime::Size)| {
        let memory = match memories.iter().find(|(known, _)| known == provider) {
            Some((_, memory)) => Arc::clone(memory),
            None => {
                let memory = onnxruntime::Memory::new(*provider, model.dim, options.graph_bytes);
                let memory = Arc::new(memory);
                memories.push((*provider, Arc::clone(&memory)));
                memory
            }
        };
        let fused = graph.map(|graph| onnxruntime::Fused { graph, memory });
        let mut session = runtime.session(model, *provider, *size, options.cuda, fused)?;
        // A GPU that lacks a part of cuDNN, or kernels for its architecture, fails at its first
        // image. It is tried here, where another back end can still be chosen.
        if *provider != onnxruntime::Provider::Cpu {
            let PixelSpec { width, height, .. } = model.pixels;
            let black = Array4::zeros((1, height as usize, width as usize, 3));
            session.embed(black.view()).map_err(|e| Reason::new("its first image failed", e))?;
        }
        Ok(session)
    };
    places.iter().map(&mut open).collect()
}

/// The graph that scores as well, if that is asked for; else why there is none.
fn fused_graph(
    model: &Model,
    options: &Options,
    choice: BackendChoice,
) -> Option<Result<Vec<u8>, Reason>> {
    let gpu = choice != BackendChoice::Onnxruntime;
    match choice {
        _ if !options.scoring.in_graph(gpu) => None,
        // Its engine is made for a range of shapes, and a set outside of it would take minutes.
        BackendChoice::Tensorrt => {
            Some(Err("TensorRT would build its engine anew for a larger set".into()))
        }
        _ => Some(model.fused_graph().map_err(Reason::of)),
    }
}

/// Where scoring is done, and why not in the graph although that was asked for.
fn on_the_host(reason: Option<&str>) -> String {
    let reason = reason.map(|reason| format!(" ({})", reason.trim_end_matches('.')));
    format!("scored on the host{}", reason.unwrap_or_default())
}

/// Sessions on a GPU if nobody says how many: while one computes, the pixels of the other travel, and
/// the host starts its kernels.
pub const SESSIONS_A_GPU: usize = 2;

/// Sessions on a CPU, at most, if nobody says how many: each has the weights once more.
const MOST_SESSIONS: usize = 16;

/// How many sessions there are and how many threads each has; 0 leaves it to us. A session of one
/// thread never waits for another thread, and measured up to a fifth faster than one of all cores.
fn shares(cores: usize, sessions: usize, threads: usize) -> (usize, usize) {
    match (sessions, threads) {
        (0, 0) => {
            let sessions = cores.clamp(1, MOST_SESSIONS);
            (sessions, (cores / sessions).max(1))
        }
        (0, threads) => ((cores / threads).clamp(1, MOST_SESSIONS), threads),
        (sessions, 0) => (sessions, (cores / sessions).max(1)),
        both => both,
    }
}

/// What a graph gave, as [images, dim].
pub(crate) fn embeddings(
    values: &[f32],
    images: usize,
    dim: usize,
) -> Result<Array2<f32>, EmbedError> {
    Array2::from_shape_vec((images, dim), values.to_vec()).map_err(|_| {
        let given = values.len();
        EmbedError::Broken(
            format!("the graph gave {given} values for {images} image(s), but model.toml says output.dim = {dim}").into(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn cores_are_shared_and_never_handed_out_twice_unless_somebody_says_so() {
        for (cores, sessions, threads, wanted) in [
            (2, 0, 0, (2, 1)),
            (1, 0, 0, (1, 1)),
            (64, 0, 0, (16, 4)),
            (8, 0, 2, (4, 2)),
            (2, 0, 4, (1, 4)),
            (8, 2, 0, (2, 4)),
            (2, 4, 0, (4, 1)),
            (2, 1, 2, (1, 2)),
        ] {
            assert_eq!(shares(cores, sessions, threads), wanted, "{cores} {sessions} {threads}");
        }
    }
}
