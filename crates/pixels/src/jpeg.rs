//! JPEG by libjpeg (mozjpeg), which reads every kind that people have: several scans, arithmetic
//! coding, any sampling, no Huffman tables, no end marker. The pure-Rust decoder is left with the plain
//! kind at full size, where it is faster.
//!
//! libjpeg also decodes at a fraction of the size. Blocks are 8 × 8 cosine coefficients; for a picture of
//! n eighths of the size only the lowest n × n of each are transformed back, which is a resize, about
//! as good as with a box filter, that costs less than nothing.
//!
//! Two thirds of the time goes into the Huffman code, and that of the rows below the crop is not
//! read. Colours stay as the file has them: a model wants a few of the pixels, and only those are
//! turned into RGB ([`to_rgb`]).

mod fault;
mod header;

use std::panic::catch_unwind;

use image::RgbImage;
use mozjpeg::{ColorSpace, Decompress};

use angler_wire::error::ImageError;

use super::stored::{Colours, corrupt};
pub(crate) use header::Header;

/// The end-of-image marker.
const END: &[u8] = b"\xff\xd9";

/// Decodes the first `rows` rows of what it is at `eighths` eighths of its size, [rows, W, 3], W
/// rounded up. Without an end marker the scan data must be whole.
///
/// # Errors
/// `CorruptImage`: damaged or not whole. `UnsupportedFormat`: a kind that libjpeg does not decode.
pub(crate) fn decode_at(
    bytes: &[u8],
    header: &Header,
    eighths: u8,
    rows: u32,
) -> Result<(RgbImage, Colours), ImageError> {
    let whole;
    let bytes = if header.ended {
        bytes
    } else {
        whole = ended(bytes);
        &whole
    };
    // libjpeg's errors come as panics, for which no hook is called.
    catch_unwind(|| decompress(bytes, header, eighths, rows))
        .unwrap_or_else(|panic| Err(fault::refusal(panic.as_ref())))
}

/// A file with an end marker in place of the zeros that pad it. One belongs to a last byte of 255; more
/// would pass for the blocks that a cut scan lacks, since short codes may be zeros.
fn ended(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let stuffed = bytes[..end].ends_with(b"\xff") && end < bytes.len();
    [&bytes[..end + usize::from(stuffed)], END].concat()
}

fn decompress(
    bytes: &[u8],
    header: &Header,
    eighths: u8,
    rows: u32,
) -> Result<(RgbImage, Colours), ImageError> {
    let damaged = |_| corrupt("JPEG file is damaged");
    let mut jpeg =
        Decompress::with_err(fault::manager(header.ended)).from_mem(bytes).map_err(damaged)?;
    // The limits were held against that size.
    if (jpeg.width(), jpeg.height()) != (header.size.0 as usize, header.size.1 as usize) {
        return Err(corrupt("JPEG file is damaged: it declares two sizes"));
    }
    jpeg.scale(eighths);
    let (space, colours) = match jpeg.color_space() {
        ColorSpace::JCS_YCbCr => (ColorSpace::JCS_YCbCr, Colours::YCbCr),
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => (ColorSpace::JCS_CMYK, Colours::Rgb),
        _ => (ColorSpace::JCS_RGB, Colours::Rgb),
    };
    let mut lines = jpeg.to_colorspace(space).map_err(damaged)?;
    let (width, height) = (reduced(header.size.0, eighths), reduced(header.size.1, eighths));
    if (lines.width(), lines.height()) != (width as usize, height as usize) || rows > height {
        return Err(corrupt("JPEG file is damaged: it declares two sizes"));
    }
    let mut image = RgbImage::new(width, rows);
    let (pixels, _) = image.as_chunks_mut::<3>();
    if header.inks {
        let mut line = vec![[0; 4]; width as usize];
        for row in pixels.chunks_exact_mut(width as usize) {
            lines.read_scanlines_into(&mut line).map_err(damaged)?;
            for (pixel, inks) in row.iter_mut().zip(&line) {
                *pixel = without_inks(*inks);
            }
        }
    } else {
        lines.read_scanlines_into(pixels).map_err(damaged)?;
    }
    Ok((image, colours))
}

/// RGB of four inks as JPEG files store them, inverted: 255 is none.
fn without_inks([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|ink| ((u32::from(ink) * u32::from(black) + 127) / 255) as u8) // at most 255
}

/// What a side of the file becomes.
pub(super) fn reduced(side: u32, eighths: u8) -> u32 {
    // A side is below 2^16.
    (side * u32::from(eighths)).div_ceil(8)
}

/// Y, Cb, Cr to R, G, B in place, by the formula of JFIF 1.02 (ITU-T T.871, 7), in 16 bits of
/// fraction, rounded.
pub(super) fn to_rgb(pixels: &mut [u8]) {
    const HALF: i32 = 1 << 15;
    let (pixels, _) = pixels.as_chunks_mut::<3>();
    for pixel in pixels {
        let [y, cb, cr] = pixel.map(i32::from);
        let (y, cb, cr) = ((y << 16) + HALF, cb - 128, cr - 128);
        let red = y + 91_881 * cr; // 1.402
        let green = y - 22_554 * cb - 46_802 * cr; // 0.344136, 0.714136
        let blue = y + 116_130 * cb; // 1.772
        *pixel = [red, green, blue].map(|value| (value >> 16).clamp(0, 255) as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::to_rgb;

    #[test]
    fn colours_follow_the_formula() {
        for y in (0..=255).step_by(5) {
            for cb in (0..=255).step_by(5) {
                for cr in (0..=255).step_by(5) {
                    let mut pixel = [y as u8, cb as u8, cr as u8];
                    to_rgb(&mut pixel);
                    let [y, cb, cr] = [f64::from(y), f64::from(cb) - 128.0, f64::from(cr) - 128.0];
                    let exact = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb];
                    for (got, exact) in pixel.into_iter().zip(exact) {
                        let off = f64::from(got) - exact.clamp(0.0, 255.0);
                        assert!(off.abs() <= 0.51, "{y} {cb} {cr}: {pixel:?} for {exact}");
                    }
                }
            }
        }
    }
}
