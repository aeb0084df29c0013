//! A decoded picture, and the limits that every decoder keeps.

use image::RgbImage;
use image::metadata::Orientation;

use angler_wire::error::{ImageError, ImageErrorCode};

use super::PixelLimits;

/// The longest side that is taken, in pixels: what JPEG, GIF and BMP can say at most. A longer one
/// would let a strip a pixel high, harmless by its area, ask for gigabytes of resampling weights.
pub(super) const MAX_SIDE: u32 = 65_535;

/// What a decoder may allocate beyond the pixels: tables, metadata, a colour profile.
pub(super) const METADATA_BYTES: u64 = 16 << 20;

/// What decoding may take, in bytes for each pixel that the limit allows: two copies of 16-bit RGBA.
/// A floating-point TIFF near the limit on pixels needs more, and is refused.
const BYTES_A_PIXEL: u64 = 16;

/// What the three values of a pixel are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colours {
    /// Red, green, blue.
    Rgb,
    /// As a JPEG has them; a few pixels are cheaper to convert than all of them.
    YCbCr,
}

/// A decoded picture as the file stores it, and what turns it upright.
pub(super) struct Stored {
    /// 8 bits a value, shape [H, W, 3], at `eighths` eighths of the file's size, rounded up; less
    /// the rows at the end that nobody wants.
    pub image: RgbImage,
    /// What its values are.
    pub colours: Colours,
    /// Width and height in the file, in pixels.
    pub size: (u32, u32),
    /// 8, unless a JPEG was decoded at less than its size.
    pub eighths: u8,
    /// To be applied; the pixels are still as stored.
    pub orientation: Orientation,
}

impl Stored {
    /// All pixels of a file, as red, green and blue.
    pub(super) fn whole(image: RgbImage, orientation: Orientation) -> Self {
        let (colours, size) = (Colours::Rgb, image.dimensions());
        Self { image, colours, size, eighths: 8, orientation }
    }
}

/// What decoding may take, in bytes.
pub(super) fn bytes_allowed(limits: PixelLimits) -> u64 {
    METADATA_BYTES + BYTES_A_PIXEL.saturating_mul(limits.max_pixels)
}

/// Holds a declared size against the limits.
pub(super) fn check_size(width: u32, height: u32, limits: PixelLimits) -> Result<(), ImageError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(corrupt(format!("image is {width} × {height} pixels")));
    }
    if pixels > limits.max_pixels {
        return Err(ImageError::new(
            ImageErrorCode::TooLarge,
            format!(
                "image is {width} × {height} = {pixels} pixels, the limit is {} (limits.image_pixels)",
                limits.max_pixels
            ),
        ));
    }
    if width.max(height) > MAX_SIDE {
        return Err(ImageError::new(
            ImageErrorCode::TooLarge,
            format!("image is {width} × {height} pixels, the longest side allowed is {MAX_SIDE}"),
        ));
    }
    Ok(())
}

/// The refusal of a file that is damaged, cut short or empty of pixels.
pub(super) fn corrupt(message: impl Into<String>) -> ImageError {
    ImageError::new(ImageErrorCode::CorruptImage, message)
}

/// A sample of opacity `alpha` on white paper, rounded.
pub(super) fn over_white(sample: u8, alpha: u8) -> u8 {
    let (sample, alpha) = (u32::from(sample), u32::from(alpha));
    ((sample * alpha + 255 * (255 - alpha) + 127) / 255) as u8 // at most 255: an average of two bytes
}
