//! Photos of any size, made of `samples/photos`, and encoded as cameras and the web encode them.

#![allow(dead_code)] // Each benchmark uses its own part.

use std::path::PathBuf;

use anyhow::{Context, Result};
use image::RgbImage;
use image::imageops::{self, FilterType};

use angler_pixels::{PixelLimits, decode};

/// Decoded sample photos.
pub struct Photos(Vec<RgbImage>);

impl Photos {
    /// Reads `samples/photos`.
    pub fn load() -> Result<Self> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/photos");
        let mut paths = std::fs::read_dir(&folder)
            .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>())
            .with_context(|| format!("{} cannot be listed", folder.display()))?;
        paths.sort();
        Self::read(&paths)
    }

    /// Reads these.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let photos = paths.iter().map(|path| {
            let bytes = std::fs::read(path)?;
            Ok(decode(&bytes, PixelLimits { max_pixels: 50_000_000 })?)
        });
        Ok(Self(photos.collect::<Result<_>>()?))
    }

    /// Photo number `n`, the same each time: a part of a sample at this size, with a sensor's noise,
    /// without which an enlarged picture would be far easier to code than a camera's.
    pub fn photo(&self, n: usize, (width, height): (u32, u32)) -> RgbImage {
        let sample = &self.0[n % self.0.len()];
        let mut random = fastrand::Rng::with_seed(n as u64);
        let part = 0.6 + 0.4 * random.f64();
        let scale = (f64::from(sample.width()) / f64::from(width))
            .min(f64::from(sample.height()) / f64::from(height));
        let side = |wanted: u32| ((f64::from(wanted) * scale * part) as u32).max(1);
        let (w, h) = (side(width), side(height));
        let (x, y) = (random.u32(0..=sample.width() - w), random.u32(0..=sample.height() - h));
        let cut = imageops::crop_imm(sample, x, y, w, h).to_image();
        let mut photo = imageops::resize(&cut, width, height, FilterType::CatmullRom);
        for pixel in photo.pixels_mut() {
            // Nearly normal, with a standard deviation of 3 grey levels.
            let noise = (0..4).map(|_| random.i16(-5..=5)).sum::<i16>() / 2;
            pixel.0 = pixel.0.map(|value| (i16::from(value) + noise).clamp(0, 255) as u8);
        }
        photo
    }
}

/// A baseline JPEG with halved colour resolution (4:2:0), what most cameras write.
pub fn jpeg(photo: &RgbImage, quality: f32) -> Result<Vec<u8>> {
    let mut encoder = mozjpeg::Compress::new(mozjpeg::ColorSpace::JCS_RGB);
    encoder.set_fastest_defaults(); // Baseline; the crate's own default is progressive.
    encoder.set_size(photo.width() as usize, photo.height() as usize);
    encoder.set_quality(quality);
    let mut encoder = encoder.start_compress(Vec::new())?;
    encoder.write_scanlines(photo.as_raw())?;
    Ok(encoder.finish()?)
}

/// A JPEG of about so many bytes, and no more.
pub fn jpeg_of(photo: &RgbImage, bytes: usize) -> Result<Vec<u8>> {
    for quality in (20..=95).rev().step_by(5) {
        let encoded = jpeg(photo, quality as f32)?;
        if encoded.len() <= bytes {
            return Ok(encoded);
        }
    }
    anyhow::bail!("{} × {} do not fit {bytes} bytes", photo.width(), photo.height())
}

/// Another format of the `image` crate's, with its defaults.
pub fn encoded(photo: &RgbImage, format: image::ImageFormat) -> Result<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    photo.write_to(&mut bytes, format)?;
    Ok(bytes.into_inner())
}
