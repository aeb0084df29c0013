//! Models through both back ends: what Pillow and ONNX Runtime make of the samples (tests/data) is
//! what angler makes of them, whatever the layout, the channels and the batch of the model; and a
//! model folder that contradicts itself is refused before anything runs.

#[path = "../../benches/common/photos.rs"]
mod photos;

use std::path::{Path, PathBuf};

use crate::support::{Setup, files, repository, var};
use ndarray::{Array2, Array4, Axis};
use prost::Message;
use serde::Deserialize;
use tract_onnx::pb;

use angler_inference::embed;
use angler_inference::embed::{Backend, BackendChoice, Embedder};
use angler_inference::model::Model;
use angler_pixels::{PixelLimits, PixelSpec, decode, preprocess};

const DEFAULT: &str = "models/efficientnet-lite0";
const INT8: &str = "models/efficientnet-lite0-int8";
const FP16: &str = "models/efficientnet-lite0-fp16";
const TINY: [&str; 3] = ["tiny-nhwc", "tiny-fixed4", "tiny-fixed1"];
const BACK_ENDS: [BackendChoice; 2] = [BackendChoice::Tract, BackendChoice::Onnxruntime];

fn tiny(name: &str) -> String {
    format!("tests/data/models/{name}")
}

fn load(folder: &str) -> Model {
    Model::load(repository(folder).to_str().unwrap()).unwrap()
}

fn try_open(model: &Model, choice: BackendChoice) -> Result<embed::Opened, embed::OpenError> {
    let library = (choice == BackendChoice::Onnxruntime)
        .then(|| PathBuf::from(var("ANGLER_TEST_ONNXRUNTIME")));
    let options = embed::Options {
        choice,
        devices: vec![0],
        threads: 0,
        sessions: 1,
        max_batch: 32,
        allow_fallback: false,
        scoring: embed::Scoring::Host,
        graph_bytes: 0,
        cuda: embed::onnxruntime::CudaOptions::default(),
        onnxruntime_library: library,
    };
    embed::open(model, &options)
}

/// The one embedder of a back end, which must be what was asked for.
fn open(model: &Model, choice: BackendChoice) -> Box<dyn Embedder> {
    let mut opened = try_open(model, choice).unwrap();
    let wanted = match choice {
        BackendChoice::Tract => Backend::TractCpu,
        _ => Backend::OnnxRuntimeCpu,
    };
    assert_eq!((opened.backend, opened.embedders.len()), (wanted, 1), "{}", opened.reason);
    let embedder = opened.embedders.pop().unwrap();
    assert_eq!(embedder.backend(), wanted);
    embedder
}

/// A file as the model sees it.
fn pixels(spec: &PixelSpec, file: &Path) -> Vec<u8> {
    let limits = PixelLimits { max_pixels: 50_000_000 };
    let pixels = preprocess(&std::fs::read(file).unwrap(), spec, limits).unwrap();
    assert_eq!((pixels.width, pixels.height), (spec.width, spec.height));
    pixels.data.into_vec()
}

fn batch<'a>(spec: &PixelSpec, images: impl IntoIterator<Item = &'a Vec<u8>>) -> Array4<u8> {
    let images: Vec<&Vec<u8>> = images.into_iter().collect();
    let all: Vec<u8> = images.iter().flat_map(|image| image.iter().copied()).collect();
    let shape = (images.len(), spec.height as usize, spec.width as usize, 3);
    Array4::from_shape_vec(shape, all).unwrap()
}

/// The embeddings of images, all in one call.
fn embeddings(embedder: &mut dyn Embedder, model: &Model, images: &[Vec<u8>]) -> Array2<f32> {
    let embedded = embedder.embed(batch(&model.pixels, images).view()).unwrap();
    assert_eq!(embedded.dim(), (images.len(), model.dim));
    embedded
}

fn cosine<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f64 {
    let (mut product, mut aa, mut bb, mut length) = (0.0, 0.0, 0.0, 0);
    for (a, b) in a.into_iter().zip(b) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        product += a * b;
        aa += a * a;
        bb += b * b;
        length += 1;
    }
    assert!(length > 0);
    product / (aa * bb).sqrt()
}

/// Asserts that every row of `found` points where its row of `wanted` does, and shows the smallest
/// cosine (`--no-capture`). NaN is below every bound.
fn assert_near(what: &str, found: &Array2<f32>, wanted: &Array2<f32>, least: f64) {
    assert_eq!(found.dim(), wanted.dim(), "{what}");
    let cosines: Vec<f64> =
        found.rows().into_iter().zip(wanted.rows()).map(|(a, b)| cosine(a, b)).collect();
    let worst = cosines.iter().copied().fold(f64::INFINITY, |a, b| if b < a { b } else { a });
    println!("{what}: {} images, smallest cosine {worst:.9}", cosines.len());
    assert!(cosines.iter().all(|c| *c >= least), "{what}: below {least}: {cosines:?}");
}

/// What the scripts of tests/data recorded for a model.
struct Reference {
    files: Vec<PathBuf>,
    embeddings: Array2<f32>,
    /// Row and pixels, for the photos that have them.
    pixels: Vec<(usize, Vec<u8>)>,
}

impl Reference {
    fn read(name: &str) -> Self {
        #[derive(Deserialize)]
        struct Entry {
            file: String,
            row: usize,
            pixels: Option<String>,
        }
        let folder = repository("tests/data/reference");
        let index = std::fs::read(folder.join(format!("{name}.json"))).unwrap();
        let entries: Vec<Entry> = serde_json::from_slice(&index).unwrap();
        assert!(entries.iter().enumerate().all(|(at, entry)| entry.row == at));
        let bytes = std::fs::read(folder.join(format!("{name}.embeddings.f32"))).unwrap();
        let values: Vec<f32> =
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let shape = (entries.len(), values.len() / entries.len());
        let read = |entry: &Entry| {
            let pixels = entry.pixels.as_ref()?;
            Some((entry.row, std::fs::read(folder.join(pixels)).unwrap()))
        };
        let reference = Self {
            files: entries.iter().map(|entry| repository(&entry.file)).collect(),
            embeddings: Array2::from_shape_vec(shape, values).unwrap(),
            pixels: entries.iter().filter_map(read).collect(),
        };
        assert_eq!(reference.pixels.len(), 3);
        reference
    }

    /// The pixels that were recorded, and the embeddings that belong to them.
    fn recorded(&self) -> (Vec<Vec<u8>>, Array2<f32>) {
        let rows: Vec<usize> = self.pixels.iter().map(|(row, _)| *row).collect();
        let pixels = self.pixels.iter().map(|(_, pixels)| pixels.clone()).collect();
        (pixels, self.embeddings.select(Axis(0), &rows))
    }
}

// Parity.

/// The photo at this size. Not by `imageops::resize`, which would be compiled in here, and slow in a test's build.
fn enlarged(photo: &image::RgbImage, width: u32, height: u32) -> image::RgbImage {
    use fast_image_resize::images::{Image, ImageRef};
    use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
    let source =
        ImageRef::new(photo.width(), photo.height(), photo.as_raw(), PixelType::U8x3).unwrap();
    let mut large = Image::new(width, height, PixelType::U8x3);
    let filter = ResizeAlg::Convolution(FilterType::CatmullRom);
    Resizer::new().resize(&source, &mut large, &ResizeOptions::new().resize_alg(filter)).unwrap();
    image::RgbImage::from_raw(width, height, large.into_vec()).unwrap()
}

#[test]
fn large_photos_decoded_at_a_fraction_of_their_size_embed_as_if_decoded_whole() {
    let model = load(DEFAULT);
    let limits = PixelLimits { max_pixels: 50_000_000 };
    let seen = |bytes: &[u8]| preprocess(bytes, &model.pixels, limits).unwrap().data.into_vec();
    let mut embedder = open(&model, BackendChoice::Onnxruntime);
    // 2 eighths, and the two that leave the least to the resampling filter: 3 and 1.
    for (width, height) in [(4000, 3000), (1600, 1200), (4096, 4096)] {
        let (mut reduced, mut whole) = (Vec::new(), Vec::new());
        for file in files("samples/photos") {
            let photo = decode(&std::fs::read(&file).unwrap(), limits).unwrap();
            let large = enlarged(&photo, width, height);
            let jpeg = photos::jpeg(&large, 75.0).unwrap();
            reduced.push(seen(&jpeg));
            let mut bmp = std::io::Cursor::new(Vec::new());
            decode(&jpeg, limits).unwrap().write_to(&mut bmp, image::ImageFormat::Bmp).unwrap();
            whole.push(seen(&bmp.into_inner()));
        }
        let reduced = embeddings(embedder.as_mut(), &model, &reduced);
        let whole = embeddings(embedder.as_mut(), &model, &whole);
        assert_near(&format!("{width} × {height}"), &reduced, &whole, 0.998);
    }
}

#[test]
fn the_default_model_sees_the_samples_as_its_reference_does() {
    let (model, reference) = (load(DEFAULT), Reference::read("efficientnet-lite0"));
    // All photos and ten fashion samples have a reference; ten more compare the back ends.
    let more = files("samples/fashion/query").into_iter().filter(|f| f.ends_with("0001.png"));
    let images: Vec<Vec<u8>> =
        reference.files.iter().cloned().chain(more).map(|f| pixels(&model.pixels, &f)).collect();
    assert_eq!((reference.files.len(), images.len()), (18, 28));
    let (recorded, wanted) = reference.recorded();
    let all = BACK_ENDS.map(|choice| {
        let mut embedder = open(&model, choice);
        let same = embeddings(embedder.as_mut(), &model, &recorded);
        assert_near(&format!("{choice:?}, from pixels"), &same, &wanted, 0.99999);
        let all = embeddings(embedder.as_mut(), &model, &images);
        let known = all.slice(ndarray::s![..reference.files.len(), ..]).to_owned();
        assert_near(&format!("{choice:?}, from files"), &known, &reference.embeddings, 0.999);
        all
    });
    assert_near("tract and ONNX Runtime", &all[0], &all[1], 0.99999);
}

/// A variant of the default model sees at least this much of what it sees, on every back end.
fn assert_variant(folder: &str, least: f64) {
    let (default, variant) = (load(DEFAULT), load(folder));
    // Near is not the same: vectors of one are refused by the other.
    assert_ne!(variant.fingerprint, default.fingerprint);
    assert_eq!(variant.pixels, default.pixels);
    assert_eq!((variant.dim, variant.fixed_batch), (default.dim, None));
    let queries = files("samples/fashion/query").into_iter().filter(|f| f.ends_with("0000.png"));
    let images: Vec<Vec<u8>> = files("samples/photos")
        .into_iter()
        .chain(queries)
        .map(|file| pixels(&default.pixels, &file))
        .collect();
    assert_eq!(images.len(), 18);
    let mut exact = open(&default, BackendChoice::Onnxruntime);
    let wanted = embeddings(exact.as_mut(), &default, &images);
    for choice in BACK_ENDS {
        let found = embeddings(open(&variant, choice).as_mut(), &variant, &images);
        assert_near(&format!("{choice:?}, {folder}"), &found, &wanted, least);
    }
}

#[test]
fn the_int8_model_sees_almost_what_the_default_one_sees() {
    // .927 was measured on the worst photo.
    assert_variant(INT8, 0.9);
}

#[test]
fn the_fp16_model_sees_what_the_default_one_sees() {
    // tract sums in f16, too: .9998 was measured; ONNX Runtime computes it in f32.
    assert_variant(FP16, 0.999);
}

#[test]
fn a_batch_of_any_size_gives_what_its_images_give_alone() {
    let model = load(DEFAULT);
    let images: Vec<Vec<u8>> =
        files("samples/photos").iter().map(|file| pixels(&model.pixels, file)).collect();
    assert_eq!((images.len(), model.fixed_batch), (8, None));
    for choice in BACK_ENDS {
        let mut embedder = open(&model, choice);
        let mut by = |size: usize| {
            let mut all = Array2::zeros((0, model.dim));
            for images in images.chunks(size) {
                let part = embeddings(embedder.as_mut(), &model, images);
                all.append(Axis(0), part.view()).unwrap();
            }
            all
        };
        let alone = by(1);
        for size in [3, 8] {
            let together = by(size);
            assert_near(&format!("{choice:?}, batches of {size}"), &together, &alone, 0.99999);
        }
    }
}

#[test]
fn any_layout_channel_order_and_batch_gives_the_reference() {
    for (name, fixed_batch, output) in [
        ("tiny-nhwc", None, "features"),
        ("tiny-fixed4", Some(4), "code"),
        ("tiny-fixed1", Some(1), "683"),
    ] {
        let (model, reference) = (load(&tiny(name)), Reference::read(name));
        assert_eq!((model.fixed_batch, model.output.as_str()), (fixed_batch, output), "{name}");
        let (recorded, wanted) = reference.recorded();
        // Otherwise rows in the wrong order would not show.
        assert!(cosine(wanted.row(0), wanted.row(1)) < 0.95, "{name}");
        assert!(cosine(wanted.row(1), wanted.row(2)) < 0.95, "{name}");
        let from_files: Vec<Vec<u8>> =
            reference.files.iter().map(|file| pixels(&model.pixels, file)).collect();
        for choice in BACK_ENDS {
            let mut embedder = open(&model, choice);
            // Over a fixed batch too, and the other way round: nothing stays from call to call.
            for count in [1, 4, 5, 9, 1] {
                let order: Vec<usize> = (0..count).map(|at| at % 3).collect();
                let images: Vec<Vec<u8>> = order.iter().map(|at| recorded[*at].clone()).collect();
                let found = embeddings(embedder.as_mut(), &model, &images);
                let what = format!("{name}, {choice:?}, from pixels, {count} at once");
                assert_near(&what, &found, &wanted.select(Axis(0), &order), 0.99999);
            }
            let found = embeddings(embedder.as_mut(), &model, &from_files);
            let what = format!("{name}, {choice:?}, from files");
            // Another filter gives .9995 at most (tests/data/README.md).
            assert_near(&what, &found, &reference.embeddings, 0.9998);
        }
    }
}

// model.toml decides.

/// A folder's two files, `model.toml` changed; `from` must be in it.
fn with(folder: &str, from: &str, to: &str) -> Result<Model, String> {
    let (onnx, toml) = parts(folder);
    Model::from_parts(&onnx, &replaced(&toml, from, to), "folder").map_err(|e| e.to_string())
}

fn parts(folder: &str) -> (Vec<u8>, String) {
    let folder = repository(folder);
    let onnx = std::fs::read(folder.join("model.onnx")).unwrap();
    (onnx, std::fs::read_to_string(folder.join("model.toml")).unwrap())
}

fn replaced(toml: &str, from: &str, to: &str) -> String {
    assert!(toml.contains(from), "{from:?} is not in:\n{toml}");
    toml.replace(from, to)
}

#[test]
fn every_setting_of_model_toml_changes_what_the_model_sees() {
    let photo = repository("samples/photos/astronaut.png");
    for choice in BACK_ENDS {
        let embed = |model: &Model| {
            let images = [pixels(&model.pixels, &photo)];
            embeddings(open(model, choice).as_mut(), model, &images)
        };
        let [nhwc, fixed4, fixed1] = TINY.map(|name| {
            let model = load(&tiny(name));
            (embed(&model), model.fingerprint)
        });
        for (name, original, from, to) in [
            ("tiny-nhwc", &nhwc, "\"bgr\"", "\"rgb\""),
            ("tiny-nhwc", &nhwc, "mean = [103.5,", "mean = [203.5,"),
            ("tiny-nhwc", &nhwc, "116.3, 123.7]", "116.3, 223.7]"),
            ("tiny-nhwc", &nhwc, "std = [57.4,", "std = [157.4,"),
            ("tiny-nhwc", &nhwc, "57.1, 58.4]", "57.1, 158.4]"),
            ("tiny-nhwc", &nhwc, "\"bilinear\"", "\"lanczos3\""),
            ("tiny-nhwc", &nhwc, "\"exact\"", "\"shorter-side\"\nresize_to = 60"),
            ("tiny-nhwc", &nhwc, "\"features\"", "\"aux\""),
            ("tiny-fixed4", &fixed4, "\"rgb\"", "\"bgr\""),
            ("tiny-fixed4", &fixed4, "resize_to = 36", "resize_to = 60"),
            ("tiny-fixed4", &fixed4, "mean = [125.0, 120.0", "mean = [125.0, 20.0"),
            ("tiny-fixed4", &fixed4, "std = [60.0, 62.0", "std = [60.0, 12.0"),
            ("tiny-fixed1", &fixed1, "\"rgb\"", "\"bgr\""),
        ] {
            let changed = with(&tiny(name), from, to).expect(to);
            let cosine = cosine(embed(&changed).row(0), original.0.row(0));
            println!("{name}, {choice:?}, {to:?}: cosine {cosine:.6}");
            // The same pixels come within 1e-6; a filter changes them least.
            assert!(cosine < 0.9998, "{name}, {choice:?}: {to:?} changes nothing: {cosine}");
            assert_ne!(changed.fingerprint, original.1, "{name}: {to:?}");
        }
    }
}

#[test]
fn mean_and_std_are_in_the_order_of_the_tensor() {
    let (original, reference) = (load(&tiny("tiny-nhwc")), Reference::read("tiny-nhwc"));
    let swapped = with(&tiny("tiny-nhwc"), "\"bgr\"", "\"rgb\"").unwrap();
    let (recorded, wanted) = reference.recorded();
    let turned: Vec<Vec<u8>> = recorded
        .iter()
        .map(|image| image.as_chunks::<3>().0.iter().flat_map(|[r, g, b]| [*b, *g, *r]).collect())
        .collect();
    for choice in BACK_ENDS {
        // Blue where red was, and a model that is told so: it sees the same tensor.
        let found = embeddings(open(&swapped, choice).as_mut(), &swapped, &turned);
        assert_near(&format!("{choice:?}, channels swapped twice"), &found, &wanted, 0.9999);
        let once = embeddings(open(&original, choice).as_mut(), &original, &turned);
        assert!(cosine(once.row(0), wanted.row(0)) < 0.99);
    }
}

#[test]
fn fingerprints_are_stable() {
    // Class vectors that users keep carry it: a change here makes them all unusable. Computed apart
    // from angler, as the format is documented in src/model.rs.
    assert_eq!(load(&tiny("tiny-nhwc")).fingerprint, "tiny-nhwc@b9f0436ae619");
    let built_in = angler::builtin_model::load("builtin").unwrap();
    let folder = load(DEFAULT);
    assert_eq!(built_in.fingerprint, folder.fingerprint);
    assert_eq!((built_in.dim, built_in.graph), (folder.dim, folder.graph));
    assert_eq!(load(&format!("{DEFAULT}/")).fingerprint, folder.fingerprint);

    let original = load(&tiny("tiny-fixed4")).fingerprint;
    for (from, to) in [
        ("mean = [125.0, 120.0, 110.0]", "mean = [125, 1.2e2, 110.00] # the same"),
        ("width = 32\nheight = 32", "height = 32\nwidth = 32"),
        ("layout = \"nchw\"", "name = \"pixels\"\nlayout = \"nchw\""),
        ("dim = 16", "name = \"code\"\ndim = 16"),
    ] {
        let same = with(&tiny("tiny-fixed4"), from, to).unwrap().fingerprint;
        assert_eq!(same, original, "{to}");
    }
    // Other weights are another space.
    let (onnx, toml) = parts(&tiny("tiny-fixed4"));
    let other = edited(&onnx, |graph| graph.initializer[0].raw_data[0] ^= 1);
    let other = Model::from_parts(&other, &toml, "folder").unwrap().fingerprint;
    assert_ne!(other, original);
}

#[test]
fn every_model_folder_that_is_shipped_or_tested_with_loads() {
    let is_toml = |f: &PathBuf| f.file_name().is_some_and(|name| name == "model.toml");
    let shipped = files("models").into_iter().filter(is_toml);
    let tested = files("tests/data/models").into_iter().filter(is_toml);
    let folders: Vec<PathBuf> =
        shipped.chain(tested).map(|f| f.parent().unwrap().to_owned()).collect();
    assert!(folders.len() >= 4, "{folders:?}");
    for folder in folders {
        let model = Model::load(folder.to_str().unwrap()).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy();
        assert_eq!(model.name, name, "a folder is named like its model");
    }
}

// Contradictions.

/// What is said of a changed `model.toml`, from, to, and words that the message must have.
type Refusal = (&'static str, &'static str, &'static str, &'static [&'static str]);

const REFUSALS: &[Refusal] = &[
    ("tiny-nhwc", "dim = 24", "dim = 25", &["output.dim = 25", "embeddings of 24 values"]),
    ("tiny-fixed4", "dim = 16", "dim = 4", &["output.dim = 4", "embeddings of 16 values"]),
    ("tiny-nhwc", "\"nhwc\"", "\"nchw\"", &["\"nchw\"", "[N, 3, 24, 40]", "[batch, 24, 40, 3]"]),
    ("tiny-fixed4", "\"nchw\"", "\"nhwc\"", &["\"nhwc\"", "[N, 32, 32, 3]", "[4, 3, 32, 32]"]),
    ("tiny-nhwc", "width = 40", "width = 24", &["[N, 24, 24, 3]", "[batch, 24, 40, 3]"]),
    ("tiny-nhwc", "height = 24", "height = 40", &["[N, 40, 40, 3]", "[batch, 24, 40, 3]"]),
    ("tiny-nhwc", "\"image_bgr\"", "\"image\"", &["input.name = \"image\"", "\"image_bgr\""]),
    (
        "tiny-nhwc",
        "\"features\"",
        "\"logits\"",
        &["output.name = \"logits\"", "\"aux\", \"features\""],
    ),
    (
        "tiny-nhwc",
        "name = \"features\"",
        "",
        &["no output.name", "2 outputs: \"aux\", \"features\""],
    ),
    ("tiny-fixed1", "filter = ", "fliter = ", &["model.toml", "fliter"]),
    ("tiny-fixed1", "[output]", "[output]\nnorm = true", &["model.toml", "norm"]),
    ("tiny-fixed1", "std = [127.5, 127.5, 127.5]", "std = [127.5]", &["model.toml", "std"]),
    ("tiny-fixed1", "layout = \"nchw\"\n", "", &["model.toml", "layout"]),
];

#[test]
fn a_model_toml_that_contradicts_its_graph_is_refused_with_both_sides() {
    for (name, from, to, words) in REFUSALS {
        let message = with(&tiny(name), from, to).expect_err(to);
        for word in *words {
            assert!(message.contains(word), "{name}, {to:?}: {word:?} is not in {message:?}");
        }
    }
}

/// The graph of an ONNX file, changed.
fn edited(onnx: &[u8], change: impl FnOnce(&mut pb::GraphProto)) -> Vec<u8> {
    let mut model = pb::ModelProto::decode(onnx).unwrap();
    change(model.graph.as_mut().unwrap());
    model.encode_to_vec()
}

fn tensor_type(value: &mut pb::ValueInfoProto) -> &mut pb::type_proto::Tensor {
    match value.r#type.as_mut().unwrap().value.as_mut().unwrap() {
        pb::type_proto::Value::TensorType(tensor) => tensor,
    }
}

#[test]
fn a_graph_that_angler_cannot_feed_is_refused_with_the_reason() {
    let (onnx, toml) = parts(&tiny("tiny-fixed4"));
    let refused = |onnx: &[u8]| {
        let message = Model::from_parts(onnx, &toml, "folder").unwrap_err().to_string();
        assert!(message.starts_with("folder"), "{message}");
        message
    };
    let second = edited(&onnx, |graph| {
        let mut other = graph.input[0].clone();
        other.name = "mask".to_owned();
        graph.input.push(other);
    });
    // Which of two is the image is the first question.
    let message = refused(&second);
    assert!(message.contains("no input.name") && message.contains("\"mask\""), "{message}");
    let named = toml.replace("layout", "name = \"pixels\"\nlayout");
    let message = Model::from_parts(&second, &named, "folder").unwrap_err().to_string();
    assert!(message.contains("second input, \"mask\""), "{message}");

    let bytes = edited(&onnx, |graph| tensor_type(&mut graph.input[0]).elem_type = 2);
    assert!(refused(&bytes).contains("must be f32"), "{}", refused(&bytes));
    let map = edited(&onnx, |graph| {
        let shape = tensor_type(&mut graph.output[0]).shape.as_mut().unwrap();
        let seven = pb::tensor_shape_proto::dimension::Value::DimValue(7);
        shape.dim.push(pb::tensor_shape_proto::Dimension {
            value: Some(seven),
            ..pb::tensor_shape_proto::Dimension::default()
        });
    });
    assert!(refused(&map).contains("one embedding an image"), "{}", refused(&map));
    let outside = edited(&onnx, |graph| {
        let weights = &mut graph.initializer[0];
        weights.raw_data.clear();
        weights.external_data.push(pb::StringStringEntryProto::default());
    });
    assert!(refused(&outside).contains("external files"), "{}", refused(&outside));
    for bytes in [&b""[..], b"<html>", &onnx[..onnx.len() / 2], &std::fs::read(PHOTO).unwrap()] {
        assert!(refused(bytes).contains("not an ONNX model"), "{}", refused(bytes));
    }
}

#[test]
fn a_length_that_the_graph_does_not_declare_is_checked_when_it_runs() {
    let (onnx, toml) = parts(&tiny("tiny-fixed4"));
    let silent = edited(&onnx, |graph| tensor_type(&mut graph.output[0]).shape = None);
    let right = Model::from_parts(&silent, &toml, "folder").unwrap();
    let wrong = replaced(&toml, "dim = 16", "dim = 15");
    let wrong = Model::from_parts(&silent, &wrong, "folder").unwrap();
    let (recorded, wanted) = Reference::read("tiny-fixed4").recorded();
    for choice in BACK_ENDS {
        let found = embeddings(open(&right, choice).as_mut(), &right, &recorded);
        assert_near(&format!("{choice:?}, no output shape"), &found, &wanted, 0.9999);
        let images = batch(&wrong.pixels, &recorded);
        let error = open(&wrong, choice).embed(images.view()).unwrap_err();
        assert!(matches!(error, embed::EmbedError::Broken(_)), "{error}");
        assert!(error.to_string().contains("output.dim = 15"), "{error}");
    }
    // The command finds it while it warms up: no image is blamed for it.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.onnx"), &silent).unwrap();
    let toml = replaced(&toml, "dim = 16", "dim = 15");
    std::fs::write(folder.path().join("model.toml"), toml).unwrap();
    let message = refused_at_start("classify", folder.path(), "tract");
    assert!(message.contains("output.dim = 15"), "{message}");
}

// At the start of a command.

const PHOTO: &str = "samples/photos/coffee.png";

/// Runs a command with a model that cannot be used: exit code 1, one line that says why.
fn refused_at_start(command: &str, model: &Path, backend: &str) -> String {
    let mut setup = Setup::default();
    setup.set("model.path", model.to_str().unwrap());
    setup.set("embedder.backend", backend);
    setup.set("http.listen", "");
    setup.set("log.level", "error");
    let (code, out, message) = match command {
        "worker" => setup.run(&["worker"]),
        _ => setup.run(&["classify", PHOTO, "--classes", "none@1"]),
    };
    assert_eq!((code, out.as_str()), (1, ""), "{message}");
    assert!(message.starts_with("error: ") && !message.contains("panicked"), "{message}");
    message
}

#[test]
fn a_model_that_cannot_be_used_stops_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let (onnx, toml) = (folder.path().join("model.onnx"), folder.path().join("model.toml"));
    for (number, (name, from, to, words)) in REFUSALS.iter().enumerate() {
        let (bytes, text) = parts(&tiny(name));
        std::fs::write(&onnx, bytes).unwrap();
        std::fs::write(&toml, replaced(&text, from, to)).unwrap();
        let command = if number % 2 == 0 { "classify" } else { "worker" };
        let message = refused_at_start(command, folder.path(), "tract");
        for word in *words {
            assert!(message.contains(word), "{name}, {to:?}: {word:?} is not in {message:?}");
        }
    }
    let place = folder.path().to_str().unwrap();
    std::fs::copy(repository(&tiny("tiny-nhwc")).join("model.toml"), &toml).unwrap();
    std::fs::write(&onnx, "this is no model").unwrap();
    let message = refused_at_start("classify", folder.path(), "tract");
    assert!(message.contains(&format!("{place}/model.onnx: not an ONNX model")), "{message}");
    std::fs::remove_file(&onnx).unwrap();
    let message = refused_at_start("classify", folder.path(), "tract");
    assert!(message.contains(&format!("cannot read {place}/model.onnx")), "{message}");
    let message = refused_at_start("worker", &folder.path().join("gone"), "tract");
    assert!(message.contains(&format!("cannot read {place}/gone/model.toml")), "{message}");
}

// Which back end. ONNX Runtime loads once a process, so each case is one.

/// `angler classify` of one photo with the tiny model: exit code, back end in the row, log.
fn choose(backend: &str, setup: &Setup) -> (i32, Option<String>, String) {
    let mut setup = setup.clone();
    setup.set("model.path", &tiny("tiny-nhwc"));
    setup.set("embedder.backend", backend);
    let arguments = ["classify", PHOTO, "--classes", "samples/fashion/reference"];
    let (code, out, log) = setup.run(&arguments);
    let row = out.lines().next().map(|line| {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        row["backend"].as_str().unwrap().to_owned()
    });
    (code, row, log)
}

fn library(path: &str) -> Setup {
    let mut setup = Setup::default();
    setup.set("embedder.onnxruntime_library", path);
    setup
}

#[test]
fn a_gpu_that_is_not_there_stops_the_start_unless_falling_back_is_allowed() {
    // The library of the tests knows the CPU only.
    let mut setup = library(&var("ANGLER_TEST_ONNXRUNTIME"));
    for (backend, provider) in [("cuda", "CUDA"), ("tensorrt", "TensorRT")] {
        let (code, row, log) = choose(backend, &setup);
        assert_eq!((code, row), (1, None), "{log}");
        assert!(log.contains(&format!("embedder.backend = {backend:?} does not work")), "{log}");
        assert!(log.contains(&format!("{provider} execution provider")), "{log}");
        assert!(log.contains("embedder.allow_fallback"), "{log}");
    }
    setup.set("embedder.allow_fallback", "true");
    for backend in ["cuda", "tensorrt"] {
        let (code, row, log) = choose(backend, &setup);
        assert_eq!((code, row.as_deref()), (0, Some("onnxruntime-cpu")), "{log}");
        assert!(log.contains(&format!("not {backend}")), "{log}");
        // The summary says what ran as well.
        assert!(log.contains("back end onnxruntime-cpu\n"), "{log}");
    }
    let (code, row, log) = choose("auto", &setup);
    assert_eq!((code, row.as_deref()), (0, Some("onnxruntime-cpu")), "{log}");
    assert!(log.contains("not cuda: CUDA execution provider"), "{log}");
    let (code, row, log) = choose("tract", &setup);
    assert_eq!((code, row.as_deref()), (0, Some("tract-cpu")), "{log}");
}

/// A shared library of this C source; the compiler is the one that the build needs, too.
fn compiled(folder: &std::path::Path, name: &str, source: &str) -> String {
    let (from, to) = (folder.join(format!("{name}.c")), folder.join(format!("lib{name}.so")));
    std::fs::write(&from, source).unwrap();
    let mut compile = std::process::Command::new("cc");
    let done = compile.args(["-shared", "-fPIC", "-o"]).args([&to, &from]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    to.to_str().unwrap().to_owned()
}

#[test]
fn a_library_that_does_not_load_is_refused_by_name_and_auto_takes_tract() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("libonnxruntime.so");
    std::fs::write(&text, "this is no library\n").unwrap();
    let text = text.to_str().unwrap();
    // Libraries that load: one of another purpose, and ONNX Runtime of a release that is too old.
    let other = compiled(folder.path(), "other", "int other(void) { return 0; }");
    let old = compiled(
        folder.path(),
        "old",
        "struct base { const void *(*api)(unsigned); const char *(*version)(void); };
         static const void *api(unsigned version) { (void)version; return 0; }
         static const char *version(void) { return \"1.16.3\"; }
         static const struct base base = { api, version };
         const struct base *OrtGetApiBase(void) { return &base; }",
    );
    for (path, why) in [
        ("/nowhere/libonnxruntime.so", "no such file"),
        (text, "failed to load"),
        (&other, "OrtGetApiBase"),
        (&old, "expected version >= '1.24.x', but got '1.16.3'"),
    ] {
        let (code, row, log) = choose("onnxruntime", &library(path));
        // A crash would have no exit code.
        assert_eq!((code, row), (1, None), "{log}");
        assert!(log.contains(path) && log.contains(why), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        let (code, row, log) = choose("auto", &library(path));
        assert_eq!((code, row.as_deref()), (0, Some("tract-cpu")), "{log}");
        assert!(log.contains("back end tract-cpu"), "{log}");
        assert!(log.contains(&format!("not onnxruntime: {path}: ")), "{log}");
    }
    // The environment's library counts as named, and the setting wins over it.
    let mut setup = Setup::default();
    setup.env.insert("ORT_DYLIB_PATH".into(), "/nowhere/by-environment.so".into());
    let (code, row, log) = choose("auto", &setup);
    assert_eq!((code, row.as_deref()), (0, Some("tract-cpu")), "{log}");
    assert!(log.contains("/nowhere/by-environment.so: no such file"), "{log}");
    setup.set("embedder.onnxruntime_library", &var("ANGLER_TEST_ONNXRUNTIME"));
    let (code, row, log) = choose("onnxruntime", &setup);
    assert_eq!((code, row.as_deref()), (0, Some("onnxruntime-cpu")), "{log}");
}
