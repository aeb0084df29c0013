//! What must hold of a file before a decoder sees it, where the decoder does not see to it itself, and
//! what a decoder stumbles over that does not matter.
//!
//! * BMP: the decoder calls a picture of no or of too many pixels unsupported.
//! * PNG, GIF, WebP: see the modules.
//! * JPEG and TIFF are decoded elsewhere.

mod gif;
mod png;
mod webp;

use std::borrow::Cow;

use image::ImageFormat;
use image::metadata::Orientation;

use angler_wire::error::ImageError;

use super::PixelLimits;
use super::stored::{check_size, corrupt};

/// A file that may be given to its decoder.
pub(super) struct Checked<'a> {
    /// What of the file the decoder is to see.
    pub bytes: Cow<'a, [u8]>,
    /// What turns the picture upright.
    pub orientation: Orientation,
}

/// Checks a file of a known format.
pub(super) fn check(
    bytes: &[u8],
    format: ImageFormat,
    limits: PixelLimits,
) -> Result<Checked<'_>, ImageError> {
    match format {
        ImageFormat::Png => png::check(bytes, limits),
        ImageFormat::Gif => gif::check(bytes, limits),
        ImageFormat::WebP => webp::check(bytes, limits),
        ImageFormat::Bmp => bmp(bytes, limits),
        _ => Ok(Checked { bytes: bytes.into(), orientation: Orientation::NoTransforms }),
    }
}

/// Checks the size in the header: 16 bits a side in the oldest kind, whose header has 12 bytes, else 32
/// and a sign, which in the height tells the order of the rows. Puts right what writers leave out: the
/// place of the pixels, and the kind of header that four masks need.
fn bmp(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
    const INFO: u32 = 40;
    const INFO_WITH_FOUR_MASKS: u32 = 56;
    const MASKS: u32 = 3; // BI_BITFIELDS
    const FOUR_MASKS: u32 = 6; // BI_ALPHABITFIELDS

    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let (Some(place), Some(header), Some(first), Some(second)) =
        (number(10), number(14), number(18), number(22))
    else {
        return Err(corrupt("BMP file ends early"));
    };
    let signed = |side: u32| side.cast_signed().unsigned_abs();
    match header {
        12 => check_size(first & 0xffff, first >> 16, limits)?,
        _ => check_size(signed(first), signed(second), limits)?,
    }
    let mut file = Cow::Borrowed(bytes);
    if header == INFO && number(30) == Some(FOUR_MASKS) {
        let file = file.to_mut();
        file[14..18].copy_from_slice(&INFO_WITH_FOUR_MASKS.to_le_bytes());
        file[30..34].copy_from_slice(&MASKS.to_le_bytes());
    }
    if place == 0 {
        let short = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let (bits, used, bytes_a_colour) = match header {
            12 => (short(24), Some(0), 3),
            _ => (short(28), number(46), 4),
        };
        let (Some(bits), Some(used)) = (bits, used) else {
            return Err(corrupt("BMP file ends early"));
        };
        let masks = match number(30) {
            Some(MASKS) if header == INFO => 12,
            Some(FOUR_MASKS) if header == INFO => 16,
            _ => 0,
        };
        let colours = if bits > 8 || used > 0 { used.min(256) } else { 1 << bits };
        let start = header.saturating_add(14 + masks + colours * bytes_a_colour);
        file.to_mut()[10..14].copy_from_slice(&start.to_le_bytes());
    }
    Ok(Checked { bytes: file, orientation: Orientation::NoTransforms })
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageErrorCode;

    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };

    fn code<T>(result: Result<T, ImageError>) -> Option<ImageErrorCode> {
        result.err().map(|error| error.code)
    }

    #[test]
    fn sizes_in_bmp_headers_are_found() {
        let bmp_header =
            |size: u32, sides: &[u8]| [[0; 14].as_slice(), &size.to_le_bytes(), sides].concat();
        let wide = [2_000i32.to_le_bytes(), (-1_000i32).to_le_bytes()].concat();
        assert_eq!(code(bmp(&bmp_header(40, &wide), LIMITS)), Some(ImageErrorCode::TooLarge));
        let old = [2_000u16.to_le_bytes(), 400u16.to_le_bytes(), [0; 2], [0; 2]].concat();
        assert_eq!(code(bmp(&bmp_header(12, &old), LIMITS)), None);
        assert_eq!(code(bmp(&bmp_header(40, &[0; 8]), LIMITS)), Some(ImageErrorCode::CorruptImage));
        assert_eq!(code(bmp(b"BM", LIMITS)), Some(ImageErrorCode::CorruptImage));
    }
}
