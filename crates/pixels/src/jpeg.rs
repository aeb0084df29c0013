//! A JPEG at a fraction of its size. Its blocks are 8 × 8 cosine coefficients; for a picture of n
//! eighths of the size only the lowest n × n of each are transformed back, which is a resize, about
//! as good as with a box filter, that costs less than nothing.
//!
//! libjpeg does that, here as mozjpeg without its assembler. Only the plain kind goes there, which is
//! what cameras write; any other, and any that libjpeg refuses, is left to the full decoder, whose
//! word on it counts.
//!
//! Two thirds of the time goes into the Huffman code, and that of the rows below the crop is not
//! read. Colours stay as the file has them: a model wants a few of the pixels, and only those are
//! turned into RGB ([`to_rgb`]).

use std::panic::catch_unwind;

use image::RgbImage;
use mozjpeg::{ColorSpace, Decompress};

use super::decode::Colours;

/// Decodes the first `rows` rows of what it is at `eighths` eighths of its size, [rows, W, 3], W
/// rounded up. `size` is what the file was found to declare. None if it is not for this decoder.
pub(super) fn decode_at(
    bytes: &[u8],
    size: (u32, u32),
    eighths: u8,
    rows: u32,
) -> Option<(RgbImage, Colours)> {
    if !is_plain(bytes) {
        return None;
    }
    // libjpeg's errors come as panics.
    catch_unwind(|| decompress(bytes, size, eighths, rows)).ok().flatten()
}

fn decompress(
    bytes: &[u8],
    size: (u32, u32),
    eighths: u8,
    rows: u32,
) -> Option<(RgbImage, Colours)> {
    let mut jpeg = Decompress::new_mem(bytes).ok()?;
    // The limits were held against that size.
    let declared = (u32::try_from(jpeg.width()).ok()?, u32::try_from(jpeg.height()).ok()?);
    if declared != size {
        return None;
    }
    jpeg.scale(eighths);
    let (space, colours) = match jpeg.color_space() {
        ColorSpace::JCS_YCbCr => (ColorSpace::JCS_YCbCr, Colours::YCbCr),
        _ => (ColorSpace::JCS_RGB, Colours::Rgb),
    };
    let mut lines = jpeg.to_colorspace(space).ok()?;
    let (width, height) = (reduced(size.0, eighths), reduced(size.1, eighths));
    if (lines.width(), lines.height()) != (width as usize, height as usize) || rows > height {
        return None;
    }
    let mut image = RgbImage::new(width, rows);
    let (pixels, _) = image.as_chunks_mut::<3>();
    let read = lines.read_scanlines_into(pixels).ok()?.len();
    (read == width as usize * rows as usize).then_some((image, colours))
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

/// Whether all of the picture is in one scan, of 8-bit grey or of three colours. In the other kinds
/// (progressive above all) each scan passes over the whole picture, and a small file may have
/// thousands.
fn is_plain(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    let mut components = None;
    while let [0xff, code, after @ ..] = rest {
        let code = *code;
        if code == 0xff {
            rest = &rest[1..]; // padding
            continue;
        }
        let Some([high, low]) = after.first_chunk() else { return false };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some(body) = after.get(2..length) else { return false };
        match (code, body) {
            // Sequential frames: precision, height, width, components. (ITU-T T.81, B.2.2.)
            (0xc0 | 0xc1, [8, _, _, _, _, count @ (1 | 3), ..]) if components.is_none() => {
                components = Some(*count);
            }
            // Start of scan: how many components it holds, first. (B.2.3.)
            (0xda, [count, ..]) => return components == Some(*count),
            // Any other frame; 0xc4, 0xc8 and 0xcc are none.
            (0xc0..=0xcf, _) if !matches!(code, 0xc4 | 0xc8 | 0xcc) => return false,
            _ => {}
        }
        rest = &after[length..];
    }
    false
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
