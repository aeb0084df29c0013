//! Each back end: whether it works here, and whether all see the same in one image.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use futures_util::future::join_all;
use ndarray::{Array4, ArrayView1};

use angler_inference::embed;
use angler_inference::embed::{Backend, BackendChoice, OpenError, onnxruntime};
use angler_inference::model::Model;
use angler_vectors::unit::norm;
use angler_wire::text::chain;

use super::report::Check;
use super::{devices, within_time};
use crate::app::App;
use crate::config::Settings;

use BackendChoice::{Auto, Cuda, Onnxruntime, Tensorrt, Tract};

/// The README's lines.
const INSTALL_CPU: &str = "python3 -m venv ~/.local/share/angler/onnxruntime && ~/.local/share/angler/onnxruntime/bin/pip install onnxruntime==1.32.0";
const INSTALL_GPU: &str = "python3 -m venv ~/.local/share/angler/onnxruntime && ~/.local/share/angler/onnxruntime/bin/pip install \"onnxruntime-gpu[cuda,cudnn]==1.31.1\"";

/// What loading a model and embedding one image may take.
const LOADING: Duration = Duration::from_secs(60);
/// The same with TensorRT, which builds its engine first.
const BUILDING: Duration = Duration::from_secs(600);
/// Back ends round differently, and no further apart than this.
const COSINE: f64 = 0.999;

/// What a back end made of the image.
struct Works {
    backend: Backend,
    library: Option<PathBuf>,
    embedding: Vec<f32>,
}

type Tried = (BackendChoice, Result<Works>);

/// How much a back end is wanted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// A worker does not start without it.
    Must,
    /// A worker takes the next best.
    Should,
    /// Nobody asked.
    May,
}

pub(super) async fn check(app: &App, model: Option<&Arc<Model>>) -> Vec<Check> {
    let settings = &app.settings;
    let asked = settings.embedder.backend;
    let on_gpu = matches!(asked, Cuda | Tensorrt);
    let named: &[i32] = if on_gpu { &settings.embedder.devices } else { &[] };
    let (devices, gpus) = devices::check(on_gpu, named).await;
    let mut checks = vec![devices];
    let Some(model) = model else {
        checks.push(Check::warning(
            "back ends",
            "were not tried: the model does not load",
            "Mend the model first, then run this again.",
        ));
        return checks;
    };
    let tensorrt = (asked == Tensorrt).then_some(Tensorrt);
    let choices = tensorrt.into_iter().chain([Cuda, Onnxruntime, Tract]);
    // Side by side: one that hangs holds up no other.
    let trying = choices.map(async |choice| (choice, attempt(settings, model, choice).await));
    let tried = join_all(trying).await;
    checks.extend(tried.iter().map(|(choice, tried)| told(settings, *choice, tried, gpus)));
    checks.push(taken(settings, &tried, gpus));
    checks.extend(agreement(&tried));
    checks
}

async fn attempt(settings: &Settings, model: &Arc<Model>, choice: BackendChoice) -> Result<Works> {
    let mut options = settings.embed_options();
    options.choice = choice;
    options.allow_fallback = false;
    // One is as good as many here, and does not fill the memory.
    options.sessions = 1;
    options.max_batch = 1;
    let model = Arc::clone(model);
    let working = tokio::task::spawn_blocking(move || works(&model, &options));
    let limit = if choice == Tensorrt { BUILDING } else { LOADING };
    match within_time(limit, working).await {
        Ok(Ok(tried)) => tried,
        Ok(Err(panic)) => Err(panic).context("it panicked"),
        Err(silent) => Err(silent.into()),
    }
}

fn works(model: &Model, options: &embed::Options) -> Result<Works> {
    let opened = embed::open(model, options).map_err(|error| match error {
        OpenError::Named { reason, .. } => Error::new(reason),
        other => Error::new(other),
    })?;
    let pixels = golden(model.pixels.width as usize, model.pixels.height as usize);
    let mut first: Option<Vec<f32>> = None;
    for (lane, mut embedder) in opened.embedders.into_iter().enumerate() {
        let embedded = embedder.embed(pixels.view()).context("the model fails")?;
        let embedding = embedded.row(0);
        let length = norm(embedding);
        if !(length.is_finite() && length > 0.0) {
            bail!("the embedding of an image has length {length}");
        }
        match &first {
            None => first = Some(embedding.to_vec()),
            Some(other) => {
                let cosine = cosine(embedding, other.as_slice().into());
                if cosine < COSINE {
                    bail!("device {lane} sees something else: cosine {cosine:.6}");
                }
            }
        }
    }
    let embedding = first.context("embedder.devices is empty")?;
    let library = match options.choice {
        Tract | Auto => None,
        _ => onnxruntime::Runtime::find(options.onnxruntime_library.as_deref())
            .ok()
            .map(|runtime| runtime.library().to_owned()),
    };
    Ok(Works { backend: opened.backend, library, embedding })
}

/// An image that is the same everywhere: gradients under stripes and squares, so that every channel,
/// both directions and fine and coarse structure count. u8 RGB, [1, H, W, 3].
fn golden(width: usize, height: usize) -> Array4<u8> {
    Array4::from_shape_fn((1, height, width, 3), |(_, y, x, channel)| {
        let across = 255 * x / width;
        let down = 255 * y / height;
        let squares = if (8 * x / width + 8 * y / height).is_multiple_of(2) { 60 } else { 0 };
        let stripes = 40 * ((x + 2 * y) % 7) / 6;
        let value = match channel {
            0 => across + squares,
            1 => down + stripes,
            _ => 255 - (across + down) / 2 + squares / 2 + stripes / 2,
        };
        value.min(255) as u8
    })
}

fn cosine(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    dot / (norm(a) * norm(b))
}

fn need(settings: &Settings, choice: BackendChoice, gpus: usize) -> Need {
    match settings.embedder.backend {
        asked if asked == choice && settings.embedder.allow_fallback => Need::Should,
        asked if asked == choice => Need::Must,
        Auto if choice == Onnxruntime || (choice == Cuda && gpus > 0) => Need::Should,
        _ => Need::May,
    }
}

fn told(settings: &Settings, choice: BackendChoice, tried: &Result<Works>, gpus: usize) -> Check {
    let name = choice.as_str();
    let reason = match tried {
        Ok(Works { backend, library, .. }) => {
            let from = library.as_ref().map(|path| format!(", {}", path.display()));
            return Check::ok(name, format!("{backend} works{}", from.unwrap_or_default()));
        }
        Err(error) => chain(error.as_ref()),
    };
    let reason = reason.trim_end_matches('.');
    let remedy = || remedy(settings, choice, gpus);
    match need(settings, choice, gpus) {
        Need::Must => Check::problem(name, format!("does not work: {reason}"), remedy()),
        Need::Should => Check::warning(name, format!("does not work: {reason}"), remedy()),
        Need::May => Check::ok(name, format!("is not here, and not asked for: {reason}")),
    }
}

fn remedy(settings: &Settings, choice: BackendChoice, gpus: usize) -> String {
    let named = !settings.embedder.onnxruntime_library.is_empty();
    let variable = std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| !path.is_empty());
    let place = match (named, variable) {
        (true, _) => "Correct embedder.onnxruntime_library, or leave it empty and install",
        (false, true) => "Correct ORT_DYLIB_PATH, or unset it and install",
        (false, false) => "Install",
    };
    match choice {
        Tract | Auto => "Use ONNX Runtime for this model: embedder.backend = \"auto\".".to_owned(),
        Onnxruntime => format!("{place} ONNX Runtime where it is looked for:\n  {INSTALL_CPU}"),
        Cuda | Tensorrt if gpus == 0 => {
            "Run it where an NVIDIA GPU and its driver are, or set embedder.backend = \"auto\"."
                .to_owned()
        }
        Cuda => format!(
            "{place} ONNX Runtime's GPU build where it is looked for (the driver must know CUDA \
             13):\n  {INSTALL_GPU}"
        ),
        Tensorrt => format!(
            "{place} ONNX Runtime's GPU build and TensorRT 10 (libnvinfer.so.10), or set \
             embedder.backend = \"cuda\":\n  {INSTALL_GPU}"
        ),
    }
}

/// What a worker would run on.
fn taken(settings: &Settings, tried: &[Tried], gpus: usize) -> Check {
    let asked = settings.embedder.backend;
    let setting = "embedder.backend";
    let from = tried.iter().position(|(choice, _)| *choice == asked).unwrap_or(0);
    let open_to_others = asked == Auto || settings.embedder.allow_fallback;
    let until = if open_to_others { tried.len() } else { from + 1 };
    // TensorRT is tried only where it is named.
    let works = tried[from..until].iter().find_map(|(_, tried)| tried.as_ref().ok());
    match works {
        Some(works) => {
            Check::ok(setting, format!("{}: a worker runs on {}", asked.as_str(), works.backend))
        }
        None => {
            let first = if asked == Auto { Onnxruntime } else { asked };
            Check::problem(
                setting,
                format!("{}: a worker has nothing to run the model on", asked.as_str()),
                remedy(settings, first, gpus),
            )
        }
    }
}

/// Whether all that work see the same. A model for which they do not gives other labels elsewhere.
fn agreement(tried: &[Tried]) -> Vec<Check> {
    let mut works = tried.iter().filter_map(|(_, tried)| tried.as_ref().ok());
    let Some(first) = works.next() else { return Vec::new() };
    let compared = works.map(|other| {
        let cosine = cosine(first.embedding.as_slice().into(), other.embedding.as_slice().into());
        let name = format!("{} beside {}", first.backend, other.backend);
        let message = format!("the same image's embeddings have a cosine of {cosine:.6}");
        if cosine >= COSINE {
            return Check::ok(name, message);
        }
        Check::problem(
            name,
            format!("{message}, less than {COSINE}"),
            "Name one in embedder.backend, the same on every worker, and build class vectors with \
             it: scores of the other differ. A model in 8 bits is rounded differently by each.",
        )
    });
    compared.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_installed_is_what_the_readme_says() {
        let readme = include_str!("../../../README.md");
        for line in [INSTALL_CPU, INSTALL_GPU] {
            assert!(readme.lines().any(|l| l == line), "{line}");
        }
    }

    #[test]
    fn the_golden_image_is_no_plain_one_at_any_size() {
        for (width, height) in [(8, 8), (112, 112), (224, 200)] {
            let image = golden(width, height);
            assert_eq!(image.dim(), (1, height, width, 3));
            for channel in 0..3 {
                let values = image.slice(ndarray::s![0, .., .., channel]);
                let distinct: std::collections::BTreeSet<u8> = values.iter().copied().collect();
                assert!(distinct.len() > 7, "{width} × {height}, channel {channel}");
            }
        }
    }
}
