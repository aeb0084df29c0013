//! Bytes to pixels: the whole way into the default model's 224 × 224, and decoding alone.
//!
//! `preprocess` of a BMP is resizing and nearly nothing else, since a BMP's pixels are only copied.
//! It is resizing at full size, though: a large JPEG is decoded at a fraction of its size, which
//! leaves less to resize.

use std::fmt;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use image::ImageFormat;

use angler_pixels::{Filter, PixelLimits, PixelSpec, Resize, decode, preprocess};

use crate::photos::{Photos, encoded, jpeg};

/// As the default model wants them.
const SPEC: PixelSpec = PixelSpec {
    width: 224,
    height: 224,
    resize: Resize::ShorterSide(256),
    filter: Filter::Bicubic,
};
const LIMITS: PixelLimits = PixelLimits { max_pixels: 50_000_000 };

/// A file to be read.
#[derive(Clone, Copy)]
struct File {
    name: &'static str,
    size: (u32, u32),
    format: Format,
}

#[derive(Clone, Copy)]
enum Format {
    /// Baseline, 4:2:0, of this quality.
    Jpeg(u8),
    Png,
    /// The encoder at hand knows no other.
    LosslessWebP,
    Bmp,
}

impl fmt::Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

const FILES: [File; 7] = [
    File { name: "jpeg 320x240", size: (320, 240), format: Format::Jpeg(90) },
    File { name: "jpeg 1600x1200", size: (1600, 1200), format: Format::Jpeg(87) },
    File { name: "jpeg 4000x3000", size: (4000, 3000), format: Format::Jpeg(87) },
    File { name: "png 1600x1200", size: (1600, 1200), format: Format::Png },
    File { name: "webp 320x240", size: (320, 240), format: Format::LosslessWebP },
    File { name: "webp 1600x1200", size: (1600, 1200), format: Format::LosslessWebP },
    File { name: "bmp 1600x1200", size: (1600, 1200), format: Format::Bmp },
];

impl File {
    fn bytes(self) -> Vec<u8> {
        let photo = Photos::load().expect("samples/photos").photo(0, self.size);
        match self.format {
            Format::Jpeg(quality) => jpeg(&photo, quality.into()),
            Format::Png => encoded(&photo, ImageFormat::Png),
            Format::LosslessWebP => encoded(&photo, ImageFormat::WebP),
            Format::Bmp => encoded(&photo, ImageFormat::Bmp),
        }
        .expect("an encoder")
    }
}

#[divan::bench(args = FILES)]
fn whole_way(bencher: Bencher<'_, '_>, file: File) {
    let bytes = file.bytes();
    bencher
        .counter(ItemsCount::new(1_usize))
        .counter(BytesCount::new(bytes.len()))
        .bench(|| preprocess(divan::black_box(&bytes), &SPEC, LIMITS).expect("pixels"));
}

/// At full size, which the worker does only where it must.
#[divan::bench(args = FILES)]
fn full_decode(bencher: Bencher<'_, '_>, file: File) {
    let bytes = file.bytes();
    bencher
        .counter(ItemsCount::new(1_usize))
        .counter(BytesCount::new(bytes.len()))
        .bench(|| decode(divan::black_box(&bytes), LIMITS).expect("an image"));
}
