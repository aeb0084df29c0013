//! Preprocessing against Pillow: the zoo of `tests/data/images` (every guise that a picture comes
//! in, and what must be refused) and the pixels of `tests/data/reference`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in tests a panic is the report")]

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use angler_pixels::{Filter, PixelLimits, PixelSpec, Resize, decode, preprocess};
use angler_wire::error::ImageErrorCode;

const LIMITS: PixelLimits = PixelLimits { max_pixels: 50_000_000 };

/// How the default model wants its pixels.
const EFFICIENTNET: PixelSpec = PixelSpec {
    width: 224,
    height: 224,
    resize: Resize::ShorterSide(256),
    filter: Filter::Bicubic,
};

/// A picture that is decoded; `expected` holds its upright pixels as RGB.
#[derive(Deserialize)]
struct Good {
    file: String,
    width: u32,
    height: u32,
    expected: String,
    /// Mean absolute difference, in grey levels.
    tolerance: f64,
}

/// A file that is refused, with one of these codes.
#[derive(Deserialize)]
struct Bad {
    file: String,
    codes: Vec<ImageErrorCode>,
}

/// An image of which the pixels after preprocessing may be stored.
#[derive(Deserialize)]
struct Reference {
    file: String,
    pixels: Option<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn images() -> PathBuf {
    root().join("tests/data/images")
}

fn read(path: PathBuf) -> Vec<u8> {
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn index<T: DeserializeOwned>(path: PathBuf) -> Vec<T> {
    let entries: Vec<T> = serde_json::from_slice(&read(path)).unwrap();
    assert!(!entries.is_empty());
    entries
}

fn zoo() -> Vec<Good> {
    index(images().join("images.json"))
}

/// Mean and greatest absolute difference, in grey levels.
fn difference(got: &[u8], expected: &[u8]) -> (f64, u8) {
    assert_eq!(got.len(), expected.len());
    let differences = || got.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    let sum: f64 = differences().map(f64::from).sum();
    (sum / got.len() as f64, differences().max().unwrap())
}

fn code(bytes: &[u8]) -> Option<ImageErrorCode> {
    let decoded = decode(bytes, LIMITS).err();
    let preprocessed = preprocess(bytes, &EFFICIENTNET, LIMITS).err();
    assert_eq!(decoded, preprocessed);
    decoded.map(|error| error.code)
}

#[test]
fn every_guise_is_the_same_picture() {
    for good in zoo() {
        let image = decode(&read(images().join(&good.file)), LIMITS)
            .unwrap_or_else(|error| panic!("{}: {error}", good.file));
        assert_eq!(image.dimensions(), (good.width, good.height), "{}", good.file);
        let expected = read(images().join(&good.expected));
        let (mean, max) = difference(image.as_raw(), &expected);
        println!("{}: mean {mean:.3}, max {max}", good.file);
        assert!(mean <= good.tolerance, "{}: mean {mean}, max {max}", good.file);
    }
}

#[test]
fn what_is_bad_is_refused_with_its_code() {
    for bad in index::<Bad>(images().join("bad.json")) {
        let error = decode(&read(images().join(&bad.file)), LIMITS).unwrap_err();
        println!("{}: {:?}: {error}", bad.file, error.code);
        assert!(bad.codes.contains(&error.code), "{}: {error:?}", bad.file);
    }
}

#[test]
fn a_cut_file_is_corrupt() {
    for good in zoo() {
        let bytes = read(images().join(&good.file));
        // Of an animation the first frame may be whole although the file is not.
        let frames = good.file.starts_with("animated") || good.file.starts_with("transparent");
        // Beyond 60% a TIFF may have lost nothing but its colour profile.
        for percent in [10, 20, 40, 60] {
            if frames && percent > 10 {
                continue;
            }
            let cut = &bytes[..bytes.len() * percent / 100];
            let message = format!("{} cut to {percent}%", good.file);
            assert_eq!(code(cut), Some(ImageErrorCode::CorruptImage), "{message}");
        }
    }
}

#[test]
fn a_jpeg_without_its_end_marker_is_whole_if_its_scans_are() {
    for file in ["rgb.jpg", "progressive.jpg", "grey.jpg", "cmyk.jpg", "exif-6.jpg"] {
        let whole = read(images().join(file));
        let expected = decode(&whole, LIMITS).unwrap();
        for lost in [1, 2] {
            let mut bytes = whole[..whole.len() - lost].to_vec();
            for padding in [0, 64] {
                bytes.resize(bytes.len() + padding, 0);
                let image = decode(&bytes, LIMITS).unwrap();
                let (mean, _) = difference(image.as_raw(), expected.as_raw());
                assert!(mean < 0.5, "{file}: {mean}"); // two decoders
            }
        }
        // Nor does padding to the full size hide that a scan is cut short, as a broken download leaves it.
        let mut bytes = whole[..whole.len() - 40].to_vec();
        assert_eq!(code(&bytes), Some(ImageErrorCode::CorruptImage), "{file}");
        bytes.extend([0; 64]);
        assert_eq!(code(&bytes), Some(ImageErrorCode::CorruptImage), "{file}");
    }
}

#[test]
fn what_follows_a_picture_does_not_matter() {
    for file in ["rgb.jpg", "progressive.jpg", "rgb.png", "lossy.webp", "exif-6.webp", "rgb.tiff"] {
        let whole = read(images().join(file));
        let expected = decode(&whole, LIMITS).unwrap();
        // A maker's data, and a second picture cut short.
        for tail in [b"\0\0\xff\xff\x01SEFH maker's".as_slice(), &whole[..whole.len() / 2]] {
            let bytes = [&whole, tail].concat();
            assert_eq!(decode(&bytes, LIMITS).unwrap(), expected, "{file}");
        }
    }
}

#[test]
fn the_limit_counts_declared_pixels() {
    let bytes = read(images().join("rgb.png"));
    assert!(decode(&bytes, PixelLimits { max_pixels: 96 * 64 }).is_ok());
    let error = decode(&bytes, PixelLimits { max_pixels: 96 * 64 - 1 }).unwrap_err();
    assert_eq!(error.code, ImageErrorCode::TooLarge);
    assert_eq!(
        error.message,
        "image is 96 × 64 = 6144 pixels, the limit is 6143 (limits.image_pixels)"
    );
    for good in zoo() {
        let bytes = read(images().join(&good.file));
        let error = decode(&bytes, PixelLimits { max_pixels: 96 * 64 - 1 }).unwrap_err();
        assert_eq!(error.code, ImageErrorCode::TooLarge, "{}", good.file);
    }
}

#[test]
fn damage_never_panics() {
    // Deterministic noise over every file of the zoo. What is decoded of it does not matter.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for good in zoo() {
        let whole = read(images().join(&good.file));
        for _ in 0..20 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random() % 4 {
                // Half of the hits go to the head, where the sizes stand.
                let end = if random() % 2 == 0 { bytes.len().min(200) } else { bytes.len() };
                bytes[random() % end] = random() as u8;
            }
            if let Err(error) = preprocess(&bytes, &EFFICIENTNET, LIMITS) {
                assert_ne!(error.code, ImageErrorCode::Internal, "{}: {error}", good.file);
            }
        }
    }
}

/// Pillow's pixels for photos, in each way that a model may ask for. Measured: mean at most 0.007
/// grey levels, 2 at most.
#[test]
fn preprocessing_is_pillows() {
    let reference = root().join("tests/data/reference");
    let spec = |width, height, resize, filter| PixelSpec { width, height, resize, filter };
    // As in each model's model.toml.
    let models = [
        ("efficientnet-lite0", EFFICIENTNET),
        ("tiny-nhwc", spec(40, 24, Resize::Exact, Filter::Bilinear)),
        ("tiny-fixed4", spec(32, 32, Resize::ShorterSide(36), Filter::Bicubic)),
        ("tiny-fixed1", spec(112, 112, Resize::ShorterSide(128), Filter::Lanczos3)),
    ];
    for (model, spec) in models {
        let mut compared = 0;
        for entry in index::<Reference>(reference.join(format!("{model}.json"))) {
            let Some(expected) = entry.pixels else { continue };
            let got = preprocess(&read(root().join(&entry.file)), &spec, LIMITS).unwrap();
            assert_eq!((got.width, got.height), (spec.width, spec.height));
            let (mean, max) = difference(&got.data, &read(reference.join(&expected)));
            println!("{model}, {}: mean {mean:.4}, max {max}", entry.file);
            assert!(mean <= 0.1 && max <= 3, "{model}, {}: mean {mean}, max {max}", entry.file);
            compared += 1;
        }
        assert!(compared > 0, "{model} has no reference pixels");
    }
}

#[test]
fn an_orientation_is_applied_before_the_crop() {
    let upright = preprocess(&read(images().join("rgb.png")), &EFFICIENTNET, LIMITS).unwrap();
    for file in ["exif-6.png", "exif-6.webp", "orientation-6.tiff"] {
        let turned = preprocess(&read(images().join(file)), &EFFICIENTNET, LIMITS).unwrap();
        let (mean, max) = difference(&turned.data, &upright.data);
        assert!(mean <= 0.05 && max <= 2, "{file}: mean {mean}, max {max}");
    }
}

#[test]
fn a_thread_thin_image_is_resized() {
    for (width, height) in [(1, 10_000), (10_000, 1), (1, 1)] {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(width, height, image::Rgb([1, 2, 3]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        let pixels = preprocess(bytes.get_ref(), &EFFICIENTNET, LIMITS).unwrap();
        assert!(pixels.data.chunks_exact(3).all(|pixel| pixel == [1, 2, 3]));
    }
}

/// A JPEG of these pixels, with an EXIF orientation if one is given.
fn jpeg(image: &image::RgbImage, orientation: Option<u8>) -> Vec<u8> {
    use image::ImageEncoder;
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90);
    if let Some(orientation) = orientation {
        // One entry, 0x0112, big endian.
        let mut exif = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
        exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
        encoder.set_exif_metadata(exif).unwrap();
    }
    encoder.encode_image(image).unwrap();
    bytes
}

#[test]
fn a_large_jpeg_decoded_at_a_fraction_of_its_size_looks_as_if_decoded_whole() {
    use image::imageops::{FilterType, resize};
    let photo =
        decode(&std::fs::read(root().join("samples/photos/chelsea.png")).unwrap(), LIMITS).unwrap();
    // 1, 2, 3 and 4 eighths; sides that no fraction divides. Turning comes after the fraction: the largest are turned once.
    let (once, each) = ([None, Some(6)], [None, Some(3), Some(6), Some(7)]);
    for (width, height, orientations) in [
        (5803, 4107, &once[..]),
        (3999, 2661, &once[..]),
        (1807, 1203, &each[..]),
        (1611, 1083, &each[..]),
    ] {
        let large = resize(&photo, width, height, FilterType::CatmullRom);
        for orientation in orientations.iter().copied() {
            let bytes = jpeg(&large, orientation);
            let got = preprocess(&bytes, &EFFICIENTNET, LIMITS).unwrap();
            // All of it, as a BMP, which has no fractions.
            let mut whole = std::io::Cursor::new(Vec::new());
            let decoded = decode(&bytes, LIMITS).unwrap();
            decoded.write_to(&mut whole, image::ImageFormat::Bmp).unwrap();
            let wanted = preprocess(whole.get_ref(), &EFFICIENTNET, LIMITS).unwrap();
            let (mean, max) = difference(&got.data, &wanted.data);
            println!("{width} × {height}, {orientation:?}: mean {mean:.3}, max {max}");
            assert!(mean > 0.0, "it was decoded whole");
            assert!(mean < 1.0, "{width} × {height}, {orientation:?}: mean {mean}, max {max}");
        }
    }
}
