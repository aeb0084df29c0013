//! The images that are measured: a person's own, or photo-like ones made here, the same every time.
//!
//! A made one is smooth structure (colours at the points of a coarse and of a finer grid, with straight
//! lines between) under the noise of a sensor. How much noise decides how many bytes a JPEG takes, and
//! with that most of what decoding costs: it is set so that they are as large as photos of that size.

use std::io::Cursor;
use std::panic::catch_unwind;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};
use rayon::prelude::*;

/// Quality of the JPEGs that are made.
const QUALITY: f32 = 87.0;
/// What is read of a person's own images at most, in bytes.
const OWN_BYTES: usize = 256 << 20;

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Jpeg,
    Png,
    /// Lossless.
    WebP,
}

/// What images are to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Recipe {
    pub kind: &'static str,
    pub format: Format,
    pub width: u32,
    pub height: u32,
    /// Grey levels by which neighbours differ at most.
    noise: f32,
}

const fn recipe(kind: &'static str, format: Format, (width, height): (u32, u32)) -> Recipe {
    let noise = if width < 1000 { 20.0 } else { 17.0 };
    Recipe { kind, format, width, height, noise }
}

/// A photo from the web, about 22 kB.
pub(super) const SMALL: Recipe = recipe("small", Format::Jpeg, (320, 240));
/// A camera's photo, scaled down, about 400 kB.
pub(super) const CAMERA: Recipe = recipe("camera", Format::Jpeg, (1600, 1200));
/// What only decoding is measured with.
pub(super) const ONLY_DECODED: [Recipe; 3] = [
    recipe("camera PNG", Format::Png, (1600, 1200)),
    recipe("camera WebP", Format::WebP, (1600, 1200)),
    recipe("12 MP", Format::Jpeg, (4000, 3000)),
];

/// Encoded images of one kind; at least one.
#[derive(Debug, Clone)]
pub(super) struct Photos {
    pub kind: String,
    /// For people: `JPEG 1600×1200`.
    pub format: String,
    /// Of files that are all one size.
    pub size: Option<(u32, u32)>,
    pub files: Vec<Bytes>,
}

impl Photos {
    /// Makes `count` of them.
    ///
    /// # Errors
    /// What an encoder said.
    pub(super) fn make(recipe: Recipe, count: usize) -> Result<Self> {
        let Recipe { kind, format, width, height, .. } = recipe;
        let file = |seed| encode(&picture(recipe, seed), format).map(Bytes::from);
        let files = (0..count.max(1) as u64).into_par_iter().map(file).collect::<Result<_>>();
        let name = match format {
            Format::Jpeg => "JPEG",
            Format::Png => "PNG",
            Format::WebP => "WebP",
        };
        Ok(Self {
            kind: kind.to_owned(),
            format: format!("{name} {width}×{height}"),
            size: Some((width, height)),
            files: files.with_context(|| format!("{kind} images cannot be made"))?,
        })
    }

    /// Reads a person's own images, as many as fit into memory.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(super) fn read(paths: &[String]) -> Result<Self> {
        let mut files = Vec::new();
        let mut left = OWN_BYTES;
        for path in paths {
            let bytes = std::fs::read(Path::new(path)).with_context(|| path.clone())?;
            if bytes.len() > left {
                break;
            }
            left -= bytes.len();
            files.push(Bytes::from(bytes));
        }
        if files.is_empty() {
            bail!("--images: the first image alone has more than {OWN_BYTES} bytes");
        }
        Ok(Self { kind: "given".to_owned(), format: "as given".to_owned(), size: None, files })
    }

    /// The mean size of a file, in bytes.
    pub(super) fn mean_bytes(&self) -> u64 {
        let total: usize = self.files.iter().map(Bytes::len).sum();
        (total / self.files.len().max(1)) as u64
    }
}

/// Values at the points of a grid, one a `cell` pixels, and straight lines between.
struct Grid {
    cell: f32,
    columns: usize,
    values: Vec<[f32; 3]>,
}

impl Grid {
    fn new(random: &mut fastrand::Rng, recipe: Recipe, parts: u32, from: f32, to: f32) -> Self {
        let cell = recipe.width as f32 / parts as f32;
        let (columns, rows) = (parts as usize + 2, (recipe.height as f32 / cell) as usize + 2);
        let mut value = || from + (to - from) * random.f32();
        let values = (0..columns * rows).map(|_| [value(), value(), value()]).collect();
        Self { cell, columns, values }
    }

    /// The values along row `y` at each of the grid's columns.
    fn row(&self, y: u32) -> Vec<[f32; 3]> {
        let (row, part) = self.at(y);
        let pair = |column: usize| {
            let above = self.values[row * self.columns + column];
            let below = self.values[(row + 1) * self.columns + column];
            between(above, below, part)
        };
        (0..self.columns).map(pair).collect()
    }

    /// The grid's line before a pixel, and how far behind it the pixel lies.
    fn at(&self, pixel: u32) -> (usize, f32) {
        let place = pixel as f32 / self.cell;
        (place as usize, place.fract())
    }
}

fn between(a: [f32; 3], b: [f32; 3], part: f32) -> [f32; 3] {
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * part)
}

fn picture(recipe: Recipe, seed: u64) -> RgbImage {
    let mut random = fastrand::Rng::with_seed(seed);
    let coarse = Grid::new(&mut random, recipe, 7, 40.0, 210.0);
    let fine = Grid::new(&mut random, recipe, 40, -25.0, 25.0);
    let mut pixels = Vec::with_capacity(recipe.width as usize * recipe.height as usize * 3);
    for y in 0..recipe.height {
        let rows = [coarse.row(y), fine.row(y)];
        for x in 0..recipe.width {
            // Mostly of brightness, as a sensor's is once a camera has made colours of it.
            let noise = (random.f32() - 0.5) * recipe.noise;
            let mut value = [noise; 3];
            for (grid, row) in [&coarse, &fine].into_iter().zip(&rows) {
                let (column, part) = grid.at(x);
                let smooth = between(row[column], row[column + 1], part);
                value = [0, 1, 2].map(|c| value[c] + smooth[c]);
            }
            pixels.extend(value.map(|v| v.clamp(0.0, 255.0) as u8));
        }
    }
    RgbImage::from_raw(recipe.width, recipe.height, pixels).unwrap_or_default()
}

fn encode(picture: &RgbImage, format: Format) -> Result<Vec<u8>> {
    let (width, height) = picture.dimensions();
    let mut bytes = Vec::new();
    let rgb = ExtendedColorType::Rgb8;
    match format {
        Format::Jpeg => return jpeg(picture),
        Format::Png => {
            PngEncoder::new(Cursor::new(&mut bytes)).write_image(picture, width, height, rgb)?;
        }
        Format::WebP => {
            WebPEncoder::new_lossless(&mut bytes).write_image(picture, width, height, rgb)?;
        }
    }
    Ok(bytes)
}

/// Baseline, colours at half the resolution: what cameras write, and the image crate does not.
fn jpeg(picture: &RgbImage) -> Result<Vec<u8>> {
    let compressed = catch_unwind(|| {
        let mut jpeg = mozjpeg::Compress::new(mozjpeg::ColorSpace::JCS_RGB);
        jpeg.set_size(picture.width() as usize, picture.height() as usize);
        jpeg.set_fastest_defaults();
        jpeg.set_quality(QUALITY);
        jpeg.set_chroma_sampling_pixel_sizes((2, 2), (2, 2));
        let mut started = jpeg.start_compress(Vec::new())?;
        started.write_scanlines(picture.as_raw())?;
        started.finish()
    });
    // libjpeg's errors come as panics.
    Ok(compressed.map_err(|_| anyhow!("libjpeg refused the picture"))??)
}

#[cfg(test)]
mod tests {
    use angler_pixels::{PixelLimits, decode};

    use super::*;

    #[test]
    fn made_photos_are_the_same_every_time_and_as_large_as_photos_are() {
        for (recipe, bytes) in [(SMALL, 19_000..25_000), (CAMERA, 350_000..480_000)] {
            let photos = Photos::make(recipe, 2).unwrap();
            assert_eq!(photos.files, Photos::make(recipe, 2).unwrap().files);
            assert_ne!(photos.files[0], photos.files[1]);
            assert!(bytes.contains(&photos.mean_bytes()), "{}", photos.mean_bytes());
            let decoded = decode(&photos.files[1], PixelLimits { max_pixels: 50_000_000 }).unwrap();
            assert_eq!(decoded.dimensions(), (recipe.width, recipe.height));
        }
    }

    #[test]
    fn the_other_formats_hold_the_same_picture() {
        let small = Recipe { width: 64, height: 48, ..SMALL };
        for format in [Format::Png, Format::WebP] {
            let photos = Photos::make(Recipe { format, ..small }, 1).unwrap();
            let decoded = decode(&photos.files[0], PixelLimits { max_pixels: 10_000 }).unwrap();
            assert_eq!(decoded, picture(small, 0));
        }
    }

    #[test]
    fn own_images_are_read_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        std::fs::write(&path, b"bytes").unwrap();
        let path = path.to_str().unwrap().to_owned();
        let photos = Photos::read(&[path.clone(), path]).unwrap();
        assert_eq!((photos.files.len(), photos.mean_bytes()), (2, 5));
        let error = Photos::read(&["/nowhere/a.jpg".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/a.jpg"), "{error}");
    }
}
