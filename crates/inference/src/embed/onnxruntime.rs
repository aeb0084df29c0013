//! ONNX Runtime through `ort`, its library loaded at run time, so that the binary builds and
//! starts without it.
//!
//! Honesty: an execution provider that was asked for must be registered or the session is not
//! made, and which provider executes each node is read from the session (`assignment`): on a GPU
//! none that computes may be the CPU's. What the session reports is therefore what executes.

mod assignment;
mod fused;
mod io_binding;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ndarray::{Array2, ArrayView4, s};
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;
use ort::value::TensorRef;
use serde::{Deserialize, Serialize};

use angler_wire::error::Reason;
use angler_wire::text::chain;

use super::{Against, Backend, ClassMemory, EmbedError, Embedder, Scores};
use crate::embed::call_sizes::Pieces;
use crate::embed::onnxruntime::assignment::Assignment;
pub use crate::embed::onnxruntime::fused::Memory;
use crate::model::{Model, PIXELS_INPUT};

/// Which part of ONNX Runtime executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// The CPU.
    Cpu,
    /// CUDA on the GPU of this number.
    Cuda(i32),
    /// TensorRT on the GPU of this number, CUDA for what it does not take.
    TensorRt(i32),
}

impl Provider {
    /// The GPU's number.
    fn gpu(self) -> Option<i32> {
        match self {
            Self::Cpu => None,
            Self::Cuda(device) | Self::TensorRt(device) => Some(device),
        }
    }

    /// As ONNX Runtime calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda(_) => "CUDAExecutionProvider",
            Self::TensorRt(_) => "TensorrtExecutionProvider",
        }
    }
}

/// How CUDA computes. By default exact, with the fastest kernels that are found.
#[derive(Debug, Clone, Copy, Default)]
pub struct CudaOptions {
    /// Whether products may be rounded to TF32's 10 bits of mantissa.
    pub tf32: bool,
    /// How cuDNN's kernels for convolutions are chosen.
    pub search: ConvSearch,
    /// Whether convolutions work on [N, H, W, C], which tensor cores prefer.
    pub nhwc: bool,
}

/// How cuDNN's kernels for convolutions are chosen: `embedder.cudnn_search`. It happens while the
/// model is warmed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConvSearch {
    /// All are tried on each shape.
    #[default]
    Exhaustive,
    /// cuDNN estimates which is fastest.
    Heuristic,
    /// Always the one that needs least memory.
    Default,
}

/// How large a session is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Threads that compute; they count on the CPU only.
    pub threads: usize,
    /// The most images that it is given at once.
    pub max_batch: usize,
}

/// Images in a call on a CPU. The activations of more do not stay in a core's cache: on one thread
/// EfficientNet-Lite0 took 4.4 ms for an image alone, 4.7 in calls of 4, 5.9 in calls of 32, which
/// also take ten times the memory. Several threads have less waiting for each other with two each.
fn images_a_call(threads: usize) -> usize {
    if threads <= 1 { 1 } else { 2 * threads }
}

/// The graph that scores as well ([`Model::fused_graph`]).
#[derive(Clone)]
pub struct Fused<'a> {
    /// ONNX.
    pub graph: &'a [u8],
    /// Where class vectors are kept, on the same device.
    pub memory: Arc<Memory>,
}

/// ONNX Runtime, loaded. The library is loaded once a process and stays: it cannot be unloaded.
pub struct Runtime {
    environment: &'static Environment,
    library: PathBuf,
}

/// The one environment of the process and the library that it came from.
static LOADED: Mutex<Option<(&'static Environment, PathBuf)>> = Mutex::new(None);

impl Runtime {
    /// Loads ONNX Runtime: the library that is named, else `ORT_DYLIB_PATH`, else the first of the
    /// well-known places ([`candidates`]) that loads.
    ///
    /// # Errors
    /// Each place that was tried and why it did not do.
    pub fn find(named: Option<&Path>) -> Result<Self, Reason> {
        let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((environment, library)) = loaded.as_ref() {
            // A second library cannot be loaded beside the first; asking for another is an error,
            // not a silent use of the wrong one.
            return match named {
                Some(path) if !same_file(path, library) => Err(format!(
                    "ONNX Runtime was already loaded from {}, not from {}",
                    library.display(),
                    path.display()
                )
                .into()),
                _ => Ok(Self { environment, library: library.clone() }),
            };
        }
        let env_path = std::env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty());
        let places = match (named, env_path) {
            // What a person named is not silently replaced by something else.
            (Some(path), _) => vec![path.to_owned()],
            (None, Some(path)) => vec![PathBuf::from(path)],
            (None, None) => candidates(),
        };
        if places.is_empty() {
            return Err(
                "libonnxruntime.so was not found (the README says where it is looked for, \
                        and how to install it in one line)"
                    .into(),
            );
        }
        let mut refused = Vec::new();
        for place in places {
            match load(&place) {
                Ok(environment) => {
                    // Leaked on purpose: sessions need it as long as the process lives.
                    let environment: &'static Environment = Box::leak(Box::new(environment));
                    *loaded = Some((environment, place.clone()));
                    return Ok(Self { environment, library: place });
                }
                Err(reason) => refused.push(Reason::new(place.display().to_string(), reason)),
            }
        }
        match refused.pop() {
            Some(only) if refused.is_empty() => Err(only),
            last => {
                let all = refused.iter().chain(&last).map(|reason| chain(reason));
                Err(all.collect::<Vec<_>>().join("; ").into())
            }
        }
    }

    /// The library that was loaded.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// A session of `model` on `provider`. With a fused graph it can classify, and embeds as it would
    /// without.
    ///
    /// # Errors
    /// What is missing: a library, the driver, a device; or what the CPU would execute in its place.
    pub fn session(
        &self,
        model: &Model,
        provider: Provider,
        size: Size,
        cuda: CudaOptions,
        fused: Option<Fused<'_>>,
    ) -> Result<OnnxRuntimeEmbedder, Reason> {
        if provider != Provider::Cpu {
            preload_cuda(&self.library);
        }
        let graph = fused.as_ref().map_or(model.graph.as_slice(), |fused| fused.graph);
        let session = build(self.environment, graph, provider, size.threads, cuda);
        let session = session.map_err(Reason::of)?;
        let assignment = Assignment::of(&session)?;
        match provider {
            // TensorRT leaves to CUDA what it does not take, which may be all of a small model.
            Provider::TensorRt(device) => assignment
                .check(provider.name())
                .or_else(|_| assignment.check(Provider::Cuda(device).name()))?,
            _ => assignment.check(provider.name())?,
        }
        let backend = match provider {
            Provider::Cpu => Backend::OnnxRuntimeCpu,
            Provider::Cuda(_) => Backend::OnnxRuntimeCuda,
            Provider::TensorRt(_) => Backend::OnnxRuntimeTensorRt,
        };
        let max_batch = size.max_batch.max(1);
        let pieces = match (model.fixed_batch, provider) {
            (Some(fixed), _) => Pieces::Fixed(fixed),
            (None, Provider::Cpu) => Pieces::UpTo(max_batch.min(images_a_call(size.threads))),
            (None, _) => Pieces::Padded(max_batch),
        };
        let scoring = fused.map(|fused| fused::Scoring::new(fused.memory));
        let scoring = scoring.transpose().map_err(Reason::of)?;
        Ok(OnnxRuntimeEmbedder {
            session,
            backend,
            device: provider.gpu().map_or_else(|| "cpu".to_owned(), |gpu| format!("cuda:{gpu}")),
            pieces,
            dim: model.dim,
            output: model.output.clone(),
            assignment,
            scoring,
        })
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

fn load(library: &Path) -> Result<Environment, Reason> {
    if !library.is_file() {
        return Err("no such file".into());
    }
    // `init_from` is the one entry of `ort` that turns a missing or old library into an error.
    ort::init_from(library)
        .map_err(Reason::of)?
        .with_name("angler")
        .with_telemetry(false)
        .build()
        .map_err(Reason::of)
}

/// The configuration entry with which sums of uint8 × int8 products do not saturate in 16 bits on x86
/// processors without VNNI: an int8 model's embeddings would hang on the machine. It changes nothing
/// on others (`kOrtSessionOptionsAvx2PrecisionMode` in ONNX Runtime's
/// `onnxruntime_session_options_config_keys.h`).
const EXACT_PRODUCTS: &str = "session.x64quantprecision";

fn build(
    environment: &Environment,
    graph: &[u8],
    provider: Provider,
    threads: usize,
    options: CudaOptions,
) -> ort::Result<Session> {
    let builder = Session::builder(environment)?;
    let builder = builder.with_optimization_level(GraphOptimizationLevel::All)?;
    let builder = builder.with_config_entry(assignment::RECORD, "1")?;
    let builder = builder.with_config_entry(EXACT_PRODUCTS, "1")?;
    // Of a session on a GPU only what computes shapes runs on the CPU: one thread does.
    let threads = if provider == Provider::Cpu { threads } else { 1 };
    let builder = builder.with_intra_threads(threads)?;
    // Threads that spin while they wait take the cores that decode the next images.
    let builder = builder.with_intra_op_spinning(false)?;
    let mut builder = match provider {
        Provider::Cpu => builder,
        Provider::Cuda(device) => builder.with_execution_providers([cuda(device, options)])?,
        Provider::TensorRt(device) => builder.with_execution_providers([
            ort::ep::TensorRT::default().with_device_id(device).build().error_on_failure(),
            cuda(device, options),
        ])?,
    };
    builder.commit_from_memory(graph)
}

/// Every option is stated: ONNX Runtime's own default for TF32 is on.
fn cuda(device: i32, options: CudaOptions) -> ort::ep::ExecutionProviderDispatch {
    use ort::ep::cuda::ConvAlgorithmSearch;
    let search = match options.search {
        ConvSearch::Exhaustive => ConvAlgorithmSearch::Exhaustive,
        ConvSearch::Heuristic => ConvAlgorithmSearch::Heuristic,
        ConvSearch::Default => ConvAlgorithmSearch::Default,
    };
    ort::ep::CUDA::default()
        .with_device_id(device)
        .with_tf32(options.tf32)
        .with_conv_algorithm_search(search)
        .with_prefer_nhwc(options.nhwc)
        .build()
        .error_on_failure()
}

/// The places where ONNX Runtime is looked for when nobody says where it is, best first: a `lib`
/// folder beside the binary, the virtual environment of the README's install line, an active
/// virtual environment, the system's library folders.
pub fn candidates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Some(folder) = std::env::current_exe().ok().and_then(|p| p.parent().map(Path::to_owned))
    {
        folders.push(folder.join("lib"));
        folders.push(folder);
    }
    let data_home = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
    let environments = data_home
        .map(|d| d.join("angler/onnxruntime"))
        .into_iter()
        .chain([PathBuf::from("/opt/angler/onnxruntime")])
        .chain(std::env::var_os("VIRTUAL_ENV").map(PathBuf::from));
    for environment in environments {
        for python in entries(&environment.join("lib"), "python3") {
            folders.push(python.join("site-packages/onnxruntime/capi"));
        }
    }
    for folder in
        ["/opt/onnxruntime/lib", "/usr/local/lib", "/usr/lib", "/usr/lib/x86_64-linux-gnu"]
    {
        folders.push(PathBuf::from(folder));
    }
    folders
        .iter()
        // The plain name is a link that development packages make; wheels have only the versioned.
        .filter_map(|folder| entries(folder, "libonnxruntime.so").into_iter().next_back())
        .collect()
}

/// The folder's entries whose names begin with `prefix`, sorted.
fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Loads CUDA's and cuDNN's libraries from the wheels that pip puts next to ONNX Runtime's, where the
/// dynamic linker would not look. Every one is tried, and those that fail are named together: what
/// the linker says later names the first only.
fn preload_cuda(library: &Path) {
    use ort::ep::cuda::{CUDA_DYLIBS, CUDNN_DYLIBS};
    let Some(site_packages) = library.ancestors().find(|p| p.ends_with("site-packages")) else {
        return;
    };
    let missing = [("cu13", CUDA_DYLIBS), ("cudnn", CUDNN_DYLIBS)]
        .into_iter()
        .flat_map(|(package, names)| {
            missing(&site_packages.join("nvidia").join(package).join("lib"), names)
        })
        .collect::<Vec<_>>();
    if !missing.is_empty() {
        tracing::warn!(
            "cannot load {} from {}; ONNX Runtime looks for them elsewhere",
            missing.join(", "),
            site_packages.display()
        );
    }
}

/// Preloads the libraries of a folder and yields those that fail, with the reason. A folder that does
/// not exist misses nothing: its libraries are installed elsewhere.
fn missing(folder: &Path, names: &[&str]) -> Vec<String> {
    if !folder.is_dir() {
        return Vec::new();
    }
    let load = |name: &&str| ort::util::preload_dylib(folder.join(name)).err();
    names.iter().filter_map(|name| Some(format!("{name} ({})", load(name)?))).collect()
}

/// One session; it lives on one thread.
pub struct OnnxRuntimeEmbedder {
    session: Session,
    backend: Backend,
    device: String,
    pieces: Pieces,
    dim: usize,
    output: String,
    assignment: Assignment,
    /// What a session of the fused graph needs beside pixels.
    scoring: Option<fused::Scoring>,
}

impl OnnxRuntimeEmbedder {
    /// How many nodes which provider executes, for people.
    pub fn executed(&self) -> String {
        self.assignment.to_string()
    }
}

impl Embedder for OnnxRuntimeEmbedder {
    fn backend(&self) -> Backend {
        self.backend
    }

    fn device(&self) -> String {
        self.device.clone()
    }

    fn shapes(&self) -> Vec<usize> {
        self.pieces.sizes()
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        let Self { session, output, dim, scoring, .. } = self;
        let mut embeddings = Array2::zeros((pixels.dim().0, *dim));
        let mut first = 0;
        self.pieces.each(pixels, |pixels, count| {
            let rows = match scoring {
                Some(scoring) => scoring.embed(session, pixels)?,
                None => run(session, output, *dim, pixels)?,
            };
            let mut to = embeddings.slice_mut(s![first..first + count, ..]);
            to.assign(&rows.slice(s![..count, ..]));
            first += count;
            Ok(())
        })?;
        Ok(embeddings)
    }

    fn classify(
        &mut self,
        pixels: ArrayView4<'_, u8>,
        against: &Against<'_>,
    ) -> Option<Result<Scores, EmbedError>> {
        let Self { session, scoring, pieces, .. } = self;
        scoring.as_mut()?.classify(session, pixels, *pieces, against)
    }

    fn shrink(&mut self) -> bool {
        self.pieces.shrink()
    }

    fn class_memory(&self) -> Option<Arc<dyn ClassMemory>> {
        self.scoring.as_ref().map(|scoring| scoring.memory() as Arc<dyn ClassMemory>)
    }
}

fn run(
    session: &mut Session,
    output: &str,
    dim: usize,
    pixels: ArrayView4<'_, u8>,
) -> Result<Array2<f32>, EmbedError> {
    let images = pixels.dim().0;
    let input = TensorRef::from_array_view(pixels).map_err(failed)?;
    let outputs = session.run(ort::inputs![PIXELS_INPUT => input]).map_err(failed)?;
    let (_, values) = outputs[output].try_extract_tensor::<f32>().map_err(failed)?;
    super::embeddings(values, images, dim)
}

/// What a failed call means for the next one.
fn failed(error: ort::Error) -> EmbedError {
    meaning(Reason::of(error))
}

/// What ONNX Runtime, CUDA, cuBLAS and cuDNN say when memory is short.
const OUT_OF_MEMORY: [&str; 5] = [
    "out of memory",
    "Failed to allocate memory",
    "is smaller than requested bytes", // of the arena
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
];

/// Whether memory is short. Everything else is the batch's fault until the back end fails on a black
/// image, too: a CUDA error that sticks is told so from one that only looks like it.
fn meaning(reason: Reason) -> EmbedError {
    let message = reason.to_string();
    match OUT_OF_MEMORY.iter().any(|words| message.contains(words)) {
        true => EmbedError::OutOfMemory(reason),
        false => EmbedError::Batch(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_that_cannot_be_loaded_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libb.so.9"), "no library").unwrap();
        let missing = missing(folder.path(), &["liba.so.13", "libb.so.9", "libc.so.9"]);
        assert_eq!(missing.len(), 3, "{missing:?}");
        for (text, name) in missing.iter().zip(["liba.so.13 (", "libb.so.9 (", "libc.so.9 ("]) {
            assert!(text.starts_with(name), "{text}");
        }
        assert!(super::missing(Path::new("/no/such/folder"), &["liba.so.13"]).is_empty());
    }

    #[test]
    fn memory_that_is_short_is_no_broken_device() {
        for message in [
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=a ; file=cuda_allocator.cc ; line=50 \
             ; expr=cudaMalloc((void**)&p, size);",
            "Non-zero status code returned while running Conv node. Name:'/0/Conv' Status Message: \
             bfc_arena.cc:376 void* BFCArena::AllocateRawInternal(size_t) Failed to allocate memory \
             for requested buffer of size 3288334336",
            "Available memory of 1024 is smaller than requested bytes of 4096",
            "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
            "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        ] {
            let meant = meaning(message.into());
            assert!(matches!(meant, EmbedError::OutOfMemory(_)), "{meant:?}");
        }
        for message in [
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=a",
            "CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED ; GPU=0 ; HEURISTIC_QUERY_FAILED",
            "Non-zero status code returned while running Reshape node.",
        ] {
            let meant = meaning(message.into());
            assert!(matches!(meant, EmbedError::Batch(_)), "{meant:?}");
        }
    }
}
