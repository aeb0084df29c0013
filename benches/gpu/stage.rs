//! What every section works with: back ends, models, pixels, class sets.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use ndarray::{Array2, Array4, ArrayView4, Axis};
use tempfile::TempDir;
use walkdir::WalkDir;

use angler_inference::embed;
use angler_inference::embed::{BackendChoice, Embedder, Opened, Scoring};
use angler_inference::model::Model;
use angler_pixels::{PixelLimits, preprocess};
use angler_vectors::rows::{Precision, Vectors};
use angler_vectors::score::Scorer;
use angler_vectors::unit::normalise;
use angler_vectors::{ClassVectors, Contents};

use crate::{Options, resnet};

/// How many classes are asked for, as jobs do at most mostly.
pub const TOP_K: usize = 5;
/// `embedder.max_batch`'s default.
pub const BATCH: usize = 32;
/// What an image may declare, as `limits.image_pixels`.
pub const LIMITS: PixelLimits = PixelLimits { max_pixels: 50_000_000 };
/// More than any set takes.
const PLENTY: usize = usize::MAX / 2;

/// How a back end is opened.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    pub choice: BackendChoice,
    pub scoring: Scoring,
    pub max_batch: usize,
    /// Memory for class vectors in the graph; none: plenty.
    pub graph_bytes: Option<usize>,
    /// One session, with all cores if it is on a CPU; else as many as a worker has.
    pub alone: bool,
}

pub struct Stage {
    pub choice: BackendChoice,
    pub library: Option<PathBuf>,
    pub device: i32,
    pub quick: bool,
    pub rounds: usize,
    /// What each time is taken over.
    pub time: Duration,
    pub cores: usize,
    pub scorer: Scorer,
    /// EfficientNet-Lite0.
    pub default: Model,
    /// Image files, and the folder of each, which is its class.
    pub files: Vec<PathBuf>,
    pub photos: Vec<PathBuf>,
    /// Models that are made, and what is handed to other processes.
    pub folder: TempDir,
}

impl Stage {
    pub fn new(options: &Options) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let path = options.models.join("efficientnet-lite0");
        let default = Model::load(path.to_str().context("--models is not UTF-8")?)?;
        let mut files = Vec::new();
        for entry in WalkDir::new(&options.images).sort_by_file_name() {
            let entry = entry.with_context(|| format!("--images {}", options.images.display()))?;
            let ending = entry.path().extension().and_then(|e| e.to_str()).unwrap_or_default();
            if entry.file_type().is_file() && ["png", "jpg", "jpeg", "webp"].contains(&ending) {
                files.push(entry.into_path());
            }
        }
        ensure!(!files.is_empty(), "no images in {}", options.images.display());
        let large = options.images.join("photos");
        let photos: Vec<_> =
            files.iter().filter(|path| path.starts_with(&large)).cloned().collect();
        let (rounds, seconds) = if options.quick { (2, 0.2) } else { (5, 0.5) };
        Ok(Self {
            choice: options.backend,
            library: options.library.clone(),
            device: options.device,
            quick: options.quick,
            rounds: options.rounds.unwrap_or(rounds),
            time: Duration::from_secs_f64(options.seconds.unwrap_or(seconds)),
            cores,
            scorer: Scorer::new(cores),
            default,
            photos: if photos.is_empty() { files.clone() } else { photos },
            files,
            folder: tempfile::tempdir()?,
        })
    }

    pub fn on_a_gpu(&self) -> bool {
        matches!(self.choice, BackendChoice::Cuda | BackendChoice::Tensorrt)
    }

    /// One of two sizes: of a whole run, and of a quick one.
    pub fn sized<T>(&self, whole: T, quick: T) -> T {
        if self.quick { quick } else { whole }
    }

    /// ResNet-50's size; see [`resnet::model`].
    pub fn resnet(&self, side: u32, dim: Option<usize>) -> Result<Model> {
        resnet::model(self.folder.path(), side, dim)
    }

    /// What is asked for, in one session.
    pub fn wish(&self, scoring: Scoring) -> Wish {
        let max_batch = BATCH;
        Wish { choice: self.choice, scoring, max_batch, graph_bytes: None, alone: true }
    }

    /// The only place that says how a back end is opened.
    pub fn open_all(&self, model: &Model, wish: Wish) -> Result<Opened> {
        let options = embed::Options {
            choice: wish.choice,
            devices: vec![self.device],
            threads: 0,
            sessions: usize::from(wish.alone),
            max_batch: wish.max_batch,
            allow_fallback: false,
            scoring: wish.scoring,
            graph_bytes: wish.graph_bytes.unwrap_or(PLENTY),
            cuda: embed::onnxruntime::CudaOptions::default(),
            onnxruntime_library: self.library.clone(),
        };
        Ok(embed::open(model, &options)?)
    }

    pub fn open(&self, model: &Model, wish: Wish) -> Result<Box<dyn Embedder>> {
        let opened = self.open_all(model, wish)?;
        opened.embedders.into_iter().next().ok_or_else(|| anyhow!("no embedder was opened"))
    }

    /// Another implementation on this machine's CPU, for comparison.
    pub fn reference(&self) -> BackendChoice {
        match self.choice {
            BackendChoice::Onnxruntime => BackendChoice::Tract,
            _ => BackendChoice::Onnxruntime,
        }
    }

    /// So many images as `model` wants them, all different: the files, then variants of them. With
    /// each its file's number.
    pub fn pixels(&self, model: &Model, count: usize) -> Result<(Array4<u8>, Vec<usize>)> {
        let (width, height) = (model.pixels.width as usize, model.pixels.height as usize);
        // A stride that is prime to the number of files: few images are of many classes, too.
        let step = (2..).map(|n| self.files.len() / n).find(|s| gcd(*s, self.files.len()) == 1);
        let step = step.unwrap_or(1).max(1);
        let mut decoded = vec![None; self.files.len()];
        let mut pixels = Array4::zeros((count, height, width, 3));
        let mut of = Vec::with_capacity(count);
        for (number, mut image) in pixels.axis_iter_mut(Axis(0)).enumerate() {
            let file = number * step % self.files.len();
            let source = match &decoded[file] {
                Some(source) => source,
                None => {
                    let path = &self.files[file];
                    let place = || format!("{}", path.display());
                    let bytes = std::fs::read(path).with_context(place)?;
                    let read = preprocess(&bytes, &model.pixels, LIMITS).with_context(place)?;
                    decoded[file].insert(read.data)
                }
            };
            let target = image.as_slice_mut().context("an image lies in one piece")?;
            vary(source, target, width, number / self.files.len());
            of.push(file);
        }
        Ok((pixels, of))
    }

    /// A set of random vectors, each a class of its own.
    pub fn random_set(&self, model: &Model, rows: usize, seed: u64) -> Result<Arc<ClassVectors>> {
        let mut random = fastrand::Rng::with_seed(seed);
        let vectors = Array2::from_shape_simple_fn((rows, model.dim), || random.f32() - 0.5);
        set(model, &seed.to_string(), numbered(rows), vectors)
    }

    /// A set that takes this many bytes as f32 and half of it here, of few different vectors.
    pub fn large_set(&self, model: &Model, bytes: usize) -> Result<Arc<ClassVectors>> {
        let rows = bytes / (model.dim * size_of::<f32>());
        let mut random = fastrand::Rng::with_seed(7);
        let block = Array2::from_shape_simple_fn((1024, model.dim), || random.f32() - 0.5);
        let block = Vectors::from(block).to_precision(Precision::F16);
        let mut vectors = Vectors::zeros(Precision::F16, rows, model.dim);
        for chunk in vectors.bytes_mut().chunks_mut(block.bytes()) {
            chunk.copy_from_slice(&block.as_bytes()[..chunk.len()]);
        }
        set(model, "large", numbered(rows), vectors)
    }

    pub fn backend_name(&self) -> String {
        format!("{:?}", self.choice).to_lowercase()
    }

    /// The GPU as its driver names it, or that it is a CPU.
    pub fn device_name(&self) -> String {
        if !self.on_a_gpu() {
            return "a CPU".to_owned();
        }
        let asked = nvidia_smi(self.device, "name,driver_version,memory.total");
        asked.map_or_else(
            |error| format!("a GPU ({error:#})"),
            |answer| match answer.split(", ").collect::<Vec<_>>()[..] {
                [name, driver, memory] => format!("{name}, {memory}, driver {driver}"),
                _ => answer,
            },
        )
    }
}

/// What `nvidia-smi` says of a GPU.
pub fn nvidia_smi(device: i32, what: &str) -> Result<String> {
    let output = std::process::Command::new("nvidia-smi")
        .args([format!("--query-gpu={what}"), "--format=csv,noheader".to_owned()])
        .args(["-i", &device.to_string()])
        .output()
        .context("nvidia-smi does not run")?;
    let answer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(output.status.success(), "nvidia-smi: {answer}");
    Ok(answer)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn numbered(rows: usize) -> Vec<String> {
    (0..rows).map(|row| format!("class-{row}")).collect()
}

/// A version that is named after `version`.
pub fn set(
    model: &Model,
    version: &str,
    labels: Vec<String>,
    vectors: impl Into<Vectors>,
) -> Result<Arc<ClassVectors>> {
    let contents = Contents::new(labels, vectors, &model.fingerprint);
    Ok(Arc::new(ClassVectors::new(("proof", version), contents)?))
}

/// Embeds in batches, and brings to unit length; an embedding without a direction is an error.
pub fn units(embedder: &mut dyn Embedder, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>> {
    let mut all: Option<Array2<f32>> = None;
    for batch in pixels.axis_chunks_iter(Axis(0), BATCH) {
        let embedded = embedder.embed(batch)?;
        match &mut all {
            None => all = Some(embedded),
            Some(all) => all.append(Axis(0), embedded.view())?,
        }
    }
    let mut all = all.context("no images")?;
    for (image, row) in all.rows_mut().into_iter().enumerate() {
        ensure!(normalise(row), "the embedding of image {image} is zero or not finite");
    }
    Ok(all)
}

/// Image `n` of the same file: itself, mirrored, darker, noisy, and so on, so that all are different.
fn vary(source: &[u8], target: &mut [u8], width: usize, n: usize) {
    target.copy_from_slice(source);
    if n % 2 == 1 {
        for row in target.chunks_exact_mut(3 * width) {
            for x in 0..width / 2 {
                for channel in 0..3 {
                    row.swap(3 * x + channel, 3 * (width - 1 - x) + channel);
                }
            }
        }
    }
    let steps = n / 2;
    if steps > 0 {
        let mut random = fastrand::Rng::with_seed(steps as u64);
        let light = 0.5 + 0.1 * (steps % 6) as f32;
        for value in target {
            *value = (f32::from(*value) * light) as u8 + random.u8(0..16);
        }
    }
}
