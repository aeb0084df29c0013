//! A JPEG at a fraction of its size. Its blocks are 8 × 8 cosine coefficients; for a picture of n
//! eighths of the size only the lowest n × n of each are transformed back, which is a resize, about
//! as good as with a box filter, that costs less than nothing.
//!
//! libjpeg does that, here as mozjpeg without its assembler. Only the plain kind goes there, which is
//! what cameras write; any other, and any that libjpeg refuses, is left to the full decoder, whose
//! word on it counts.

use std::panic::catch_unwind;

use image::RgbImage;
use mozjpeg::Decompress;

/// Decodes to 8-bit RGB at `eighths` eighths of its size, rounded up; shape [H, W, 3]. `size` is what
/// the file was found to declare. None if it is not for this decoder.
pub(super) fn decode_at(bytes: &[u8], size: (u32, u32), eighths: u8) -> Option<RgbImage> {
    if !is_plain(bytes) {
        return None;
    }
    // libjpeg's errors come as panics.
    catch_unwind(|| decompress(bytes, size, eighths)).ok().flatten()
}

fn decompress(bytes: &[u8], size: (u32, u32), eighths: u8) -> Option<RgbImage> {
    let mut jpeg = Decompress::new_mem(bytes).ok()?;
    // The limits were held against that size.
    let declared = (u32::try_from(jpeg.width()).ok()?, u32::try_from(jpeg.height()).ok()?);
    if declared != size {
        return None;
    }
    jpeg.scale(eighths);
    let mut rows = jpeg.rgb().ok()?;
    let side = |full: u32| (full * u32::from(eighths)).div_ceil(8);
    let (width, height) = (side(size.0), side(size.1));
    if (rows.width(), rows.height()) != (width as usize, height as usize) {
        return None;
    }
    let mut image = RgbImage::new(width, height);
    let (pixels, _) = image.as_chunks_mut::<3>();
    let read = rows.read_scanlines_into(pixels).ok()?.len();
    (read == width as usize * height as usize).then_some(image)
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
