//! A model folder: `model.onnx` beside `model.toml`, read, checked against each other, and turned
//! into one graph from u8 pixels to embeddings.
//!
//! `model.toml` is the only place that knows how a model wants its pixels; nothing about any model
//! stands in code.

pub mod fused;
mod graph;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use angler_pixels::{Filter, PixelSpec, Resize};
use angler_wire::error::Reason;
use angler_wire::job::{check_name, hex};

/// Name of the u8 input that the edited graph has: [N, H, W, 3], RGB.
pub const PIXELS_INPUT: &str = "angler_pixels";

/// Why a model folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {path} (model.path must be a folder with model.onnx and model.toml)", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `model.toml` does not follow the format.
    #[error("{place}: {reason}")]
    Description {
        /// The file.
        place: String,
        /// What is wrong in it.
        #[source]
        reason: Reason,
    },
    /// `model.onnx` is no ONNX model, or one that cannot be used.
    #[error("{place}: {reason}")]
    Graph {
        /// The file.
        place: String,
        /// What is wrong with it.
        #[source]
        reason: Reason,
    },
    /// The two files contradict each other.
    #[error("{place}: model.toml says {said}, but the graph {has}")]
    Contradiction {
        /// The folder.
        place: String,
        /// model.toml's side.
        said: String,
        /// model.onnx's side.
        has: String,
    },
}

/// `model.toml` as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    input: InputDescription,
    output: OutputDescription,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputDescription {
    name: Option<String>,
    layout: Layout,
    channels: Channels,
    width: u32,
    height: u32,
    resize: ResizeRule,
    resize_to: Option<u32>,
    filter: Filter,
    mean: [f32; 3],
    std: [f32; 3],
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutputDescription {
    name: Option<String>,
    dim: usize,
}

/// The order of the axes of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// [N, C, H, W]
    Nchw,
    /// [N, H, W, C]
    Nhwc,
}

/// The order of the colour channels of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channels {
    /// Red first.
    Rgb,
    /// Blue first.
    Bgr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ResizeRule {
    ShorterSide,
    Exact,
}

/// How the graph's float input is made of u8 RGB pixels: what the graph edit puts in front.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct InputTransform {
    pub name: Option<String>,
    pub layout: Layout,
    pub channels: Channels,
    pub width: u32,
    pub height: u32,
    /// value = (x - mean[c]) / std[c], x in 0..=255, c in the tensor's channel order.
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// A model that has been checked and is ready for a back end.
#[derive(Debug, Clone)]
pub struct Model {
    /// The name in `model.toml`.
    pub name: String,
    /// `name@` and the first 12 hex digits of the SHA-256 over the ONNX file and the canonical
    /// preprocessing settings. Class vectors carry it.
    pub fingerprint: String,
    /// How an image becomes pixels.
    pub pixels: PixelSpec,
    /// Length of an embedding.
    pub dim: usize,
    /// The batch size that is fixed in the graph; none: any.
    pub fixed_batch: Option<usize>,
    /// Name of the output that holds the embedding, [N, dim].
    pub output: String,
    /// The edited ONNX graph: input [`PIXELS_INPUT`] u8 [N, H, W, 3], output [`Model::output`]
    /// f32 [N, dim].
    pub graph: Vec<u8>,
}

impl Model {
    /// Loads the folder at `path`.
    ///
    /// # Errors
    /// [`ModelError`], which names the file and, for a contradiction, both sides.
    pub fn load(path: &str) -> Result<Self, ModelError> {
        let folder = Path::new(path);
        let toml = folder.join("model.toml");
        let description = std::fs::read_to_string(&toml)
            .map_err(|source| ModelError::Unreadable { path: toml, source })?;
        let onnx = folder.join("model.onnx");
        let graph =
            std::fs::read(&onnx).map_err(|source| ModelError::Unreadable { path: onnx, source })?;
        Self::from_parts(&graph, &description, path)
    }

    /// Makes a model of the two files' contents; `place` names them in errors.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_parts(onnx: &[u8], description: &str, place: &str) -> Result<Self, ModelError> {
        let wrong = |reason: Reason| ModelError::Description {
            place: format!("{place}/model.toml"),
            reason,
        };
        let d: Description =
            toml::from_str(description).map_err(|e| wrong(Reason::new(e.to_string().trim(), e)))?;
        let pixels = d.input.pixel_spec().map_err(wrong)?;
        d.check().map_err(wrong)?;
        let transform = d.input.transform();
        let edited = graph::with_pixel_input(onnx, &transform, d.output.name.as_deref(), place)?;
        if let Some(dim) = edited.dim.filter(|dim| *dim != d.output.dim) {
            return Err(ModelError::Contradiction {
                place: place.to_owned(),
                said: format!("output.dim = {}", d.output.dim),
                has: format!("gives embeddings of {dim} values (output {:?})", edited.output),
            });
        }
        let fingerprint = fingerprint(&d, onnx, &edited.output);
        Ok(Self {
            name: d.name,
            fingerprint,
            pixels,
            dim: d.output.dim,
            fixed_batch: edited.fixed_batch,
            output: edited.output,
            graph: edited.bytes,
        })
    }
}

impl Description {
    fn check(&self) -> Result<(), Reason> {
        check_name(&self.name).map_err(|e| Reason::new("name", e))?;
        if self.output.dim == 0 {
            return Err("output.dim must be at least 1".into());
        }
        if !self.input.mean.iter().all(|m| m.is_finite()) {
            return Err("input.mean must be finite numbers".into());
        }
        if !self.input.std.iter().all(|s| s.is_finite() && *s > 0.0) {
            return Err("input.std must be numbers above 0".into());
        }
        Ok(())
    }
}

impl InputDescription {
    fn pixel_spec(&self) -> Result<PixelSpec, Reason> {
        let (width, height) = (self.width, self.height);
        // 8192² × 3 bytes are 200 MB an image: a larger input is a typing error.
        if !(1..=8192).contains(&width) || !(1..=8192).contains(&height) {
            return Err(format!("input is {width} × {height}, each side must be 1 to 8192").into());
        }
        let resize = match (self.resize, self.resize_to) {
            (ResizeRule::ShorterSide, Some(to)) if to >= width.max(height) && to <= 8192 => {
                Resize::ShorterSide(to)
            }
            (ResizeRule::ShorterSide, Some(to)) => {
                return Err(format!(
                    "input.resize_to = {to}: it must be at least the larger of width and height \
                     ({}) and at most 8192",
                    width.max(height)
                )
                .into());
            }
            (ResizeRule::ShorterSide, None) => {
                return Err("input.resize = \"shorter-side\" needs input.resize_to".into());
            }
            (ResizeRule::Exact, None) => Resize::Exact,
            (ResizeRule::Exact, Some(_)) => {
                return Err("input.resize_to is for resize = \"shorter-side\" only".into());
            }
        };
        Ok(PixelSpec { width, height, resize, filter: self.filter })
    }

    fn transform(&self) -> InputTransform {
        InputTransform {
            name: self.name.clone(),
            layout: self.layout,
            channels: self.channels,
            width: self.width,
            height: self.height,
            mean: self.mean,
            std: self.std,
        }
    }
}

/// What identifies an embedding space: the weights and everything that decides what they see.
/// Comments, key order and the spelling of numbers in `model.toml` do not count.
fn fingerprint(d: &Description, onnx: &[u8], output: &str) -> String {
    let i = &d.input;
    let canonical = format!(
        "angler.preprocessing/1\nlayout={:?}\nchannels={:?}\nsize={}x{}\nresize={:?}\n\
         resize_to={:?}\nfilter={:?}\nmean={:?}\nstd={:?}\noutput={output}\n",
        i.layout, i.channels, i.width, i.height, i.resize, i.resize_to, i.filter, i.mean, i.std
    );
    let mut hash = Sha256::new();
    hash.update((onnx.len() as u64).to_le_bytes());
    hash.update(onnx);
    hash.update(canonical);
    format!("{}@{}", d.name, &hex(&hash.finalize())[..12])
}

#[cfg(test)]
mod tests {
    use super::*;

    pub const FOLDER: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/efficientnet-lite0");

    fn description() -> String {
        std::fs::read_to_string(Path::new(FOLDER).join("model.toml")).unwrap()
    }

    fn with(change: impl Fn(&str) -> String) -> Result<Model, ModelError> {
        let graph = std::fs::read(Path::new(FOLDER).join("model.onnx")).unwrap();
        Model::from_parts(&graph, &change(&description()), "folder")
    }

    #[test]
    fn the_default_model_is_what_its_description_says() {
        let model = Model::load(FOLDER).unwrap();
        assert_eq!((model.dim, model.fixed_batch), (1280, None));
        assert_eq!((model.pixels.width, model.pixels.height), (224, 224));
        assert!(model.fingerprint.starts_with("efficientnet-lite0@"), "{}", model.fingerprint);
    }

    #[test]
    fn the_fingerprint_follows_what_the_model_sees_and_nothing_else() {
        let original = Model::load(FOLDER).unwrap().fingerprint;
        let same = with(|t| format!("# a comment\n{t}")).unwrap().fingerprint;
        assert_eq!(same, original);
        let other = with(|t| t.replace("bicubic", "bilinear")).unwrap().fingerprint;
        assert_ne!(other, original);
    }

    #[test]
    fn contradictions_are_refused_with_both_sides() {
        for (from, to, said, has) in [
            ("dim = 1280", "dim = 512", "output.dim = 512", "1280"),
            ("layout = \"nchw\"", "layout = \"nhwc\"", "[N, 224, 224, 3]", "[batch, 3, 224, 224]"),
            ("width = 224", "width = 200", "[N, 3, 224, 200]", "[batch, 3, 224, 224]"),
            ("name = \"input\"", "name = \"image\"", "\"image\"", "\"input\""),
            ("name = \"embedding\"", "name = \"logits\"", "\"logits\"", "\"embedding\""),
        ] {
            let changed = |t: &str| {
                assert!(t.contains(from), "{from} not in {t}");
                t.replace(from, to)
            };
            let message = with(changed).expect_err(from).to_string();
            assert!(message.contains(said), "{message}");
            assert!(message.split_once("but").is_some_and(|(_, g)| g.contains(has)), "{message}");
        }
    }

    #[test]
    fn descriptions_that_make_no_sense_are_refused() {
        for (from, to, word) in [
            ("resize_to = 256", "resize_to = 100", "resize_to = 100"),
            ("resize_to = 256", "", "needs input.resize_to"),
            ("\"shorter-side\"", "\"exact\"", "shorter-side"),
            ("\"bicubic\"", "\"magic\"", "magic"),
            ("width = 224", "width = 0", "0 × 224"),
            ("std = [128.0, 128.0, 128.0]", "std = [128.0, 0.0, 128.0]", "input.std"),
            ("width = 224", "widht = 224", "widht"),
        ] {
            let message = with(|t| t.replace(from, to)).expect_err(to).to_string();
            assert!(message.contains(word), "{to}: {message}");
        }
        let message = Model::from_parts(b"not onnx", &description(), "x").unwrap_err().to_string();
        assert!(message.contains("x/model.onnx"), "{message}");
        let message = Model::load("/nowhere").unwrap_err().to_string();
        assert!(message.contains("/nowhere/model.toml"), "{message}");
    }
}
