//! ONNX Runtime through `ort`, its library loaded at run time, so that the binary builds and
//! starts without it.
//!
//! Honesty: an execution provider that was asked for must be registered or the session is not
//! made, and on a GPU no node may fall back to the CPU. What the session reports is therefore what
//! executes.

mod fused;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ndarray::{Array2, ArrayView4, s};
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::TensorRef;

use super::pieces::Pieces;
use super::{Against, Backend, EmbedError, Embedder, Scores};
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
#[derive(Debug, Clone, Copy)]
pub struct Fused<'a> {
    /// ONNX.
    pub graph: &'a [u8],
    /// Memory for class vectors that a session may keep, in bytes.
    pub bytes: usize,
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
    pub fn find(named: Option<&Path>) -> Result<Self, String> {
        let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((environment, library)) = loaded.as_ref() {
            // A second library cannot be loaded beside the first; asking for another is an error,
            // not a silent use of the wrong one.
            return match named {
                Some(path) if !same_file(path, library) => Err(format!(
                    "ONNX Runtime was already loaded from {}, not from {}",
                    library.display(),
                    path.display()
                )),
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
                    .to_owned(),
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
                Err(reason) => refused.push(format!("{}: {reason}", place.display())),
            }
        }
        Err(refused.join("; "))
    }

    /// The library that was loaded.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// A session of `model` on `provider`. With a fused graph it can classify, and embeds as it would
    /// without.
    ///
    /// # Errors
    /// What is missing: a library, the driver, a device.
    pub fn session(
        &self,
        model: &Model,
        provider: Provider,
        size: Size,
        fused: Option<Fused<'_>>,
    ) -> Result<OnnxRuntimeEmbedder, String> {
        if provider != Provider::Cpu {
            preload_cuda(&self.library);
        }
        let graph = fused.map_or(model.graph.as_slice(), |fused| fused.graph);
        let session = build(self.environment, graph, provider, size.threads)?;
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
        let scoring = fused
            .map(|fused| fused::Scoring::new(provider, model.dim, fused.bytes))
            .transpose()
            .map_err(|e| e.to_string())?;
        Ok(OnnxRuntimeEmbedder {
            session,
            backend,
            pieces,
            dim: model.dim,
            output: model.output.clone(),
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

fn load(library: &Path) -> Result<Environment, String> {
    if !library.is_file() {
        return Err("no such file".to_owned());
    }
    // `init_from` is the one entry of `ort` that turns a missing or old library into an error.
    ort::init_from(library)
        .map_err(|e| e.to_string())?
        .with_name("angler")
        .with_telemetry(false)
        .build()
        .map_err(|e| e.to_string())
}

fn build(
    environment: &Environment,
    graph: &[u8],
    provider: Provider,
    threads: usize,
) -> Result<Session, String> {
    let text = |e: ort::Error<SessionBuilder>| e.to_string();
    let builder = Session::builder(environment).map_err(|e| e.to_string())?;
    let builder = builder.with_optimization_level(GraphOptimizationLevel::All).map_err(text)?;
    let mut builder = match provider {
        Provider::Cpu => builder
            .with_intra_threads(threads)
            .map_err(text)?
            // Threads that spin while they wait take the cores that decode the next images.
            .with_intra_op_spinning(false)
            .map_err(text)?,
        Provider::Cuda(device) => builder
            .with_execution_providers([cuda(device)])
            .map_err(text)?
            .with_disable_cpu_fallback()
            .map_err(text)?,
        Provider::TensorRt(device) => builder
            .with_execution_providers([
                ort::ep::TensorRT::default().with_device_id(device).build().error_on_failure(),
                cuda(device),
            ])
            .map_err(text)?
            .with_disable_cpu_fallback()
            .map_err(text)?,
    };
    builder.commit_from_memory(graph).map_err(|e| e.to_string())
}

/// TF32 rounds products to 10 bits of mantissa; ONNX Runtime's own default is on, so it is stated.
fn cuda(device: i32) -> ort::ep::ExecutionProviderDispatch {
    ort::ep::CUDA::default().with_device_id(device).with_tf32(false).build().error_on_failure()
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

/// Loads CUDA's and cuDNN's libraries from the wheels that pip puts beside ONNX Runtime's, where
/// the dynamic linker would not look. What is not there is left to the linker, whose error names it.
fn preload_cuda(library: &Path) {
    let Some(site_packages) = library.ancestors().find(|p| p.ends_with("site-packages")) else {
        return;
    };
    let nvidia = site_packages.join("nvidia");
    let cuda = Some(nvidia.join("cu13/lib")).filter(|p| p.is_dir());
    let cudnn = Some(nvidia.join("cudnn/lib")).filter(|p| p.is_dir());
    if let Err(e) = ort::ep::cuda::preload_dylibs(cuda.as_deref(), cudnn.as_deref()) {
        tracing::debug!("CUDA libraries beside {} were not preloaded: {e}", library.display());
    }
}

/// One session; it lives on one thread.
pub struct OnnxRuntimeEmbedder {
    session: Session,
    backend: Backend,
    pieces: Pieces,
    dim: usize,
    output: String,
    /// What a session of the fused graph needs beside pixels.
    scoring: Option<fused::Scoring>,
}

impl Embedder for OnnxRuntimeEmbedder {
    fn backend(&self) -> Backend {
        self.backend
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
    let message = error.to_string();
    // A CUDA error is sticky: every later call of the process fails with it.
    if message.contains("CUDA failure") || message.contains("CUDNN failure") {
        EmbedError::Broken(message)
    } else {
        EmbedError::Batch(message)
    }
}
