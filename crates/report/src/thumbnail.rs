//! Small pictures to look at beside their names.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{PixelType, Resizer};
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;

use angler_wire::error::Reason;

use super::PageError;

/// The longest side of a picture in a gallery, in pixels: sharp enough on a laptop, about 6 kB.
pub const THUMBNAIL_SIDE: u32 = 160;

/// Of 100. Below it the grain of JPEG shows on hard edges.
const QUALITY: u8 = 80;

/// A JPEG whose longer side is at most `max_side` pixels, from RGB bytes, shape [height, width, 3]:
/// those of [`Pixels`](angler_pixels::Pixels) or of a decoded image. The aspect ratio stays, and
/// a small picture is not enlarged.
///
/// # Errors
/// `Thumbnail`: the picture has no pixels, `rgb` is not `height * width * 3` bytes, or `max_side`
/// is 0.
pub fn thumbnail(rgb: &[u8], width: u32, height: u32, max_side: u32) -> Result<Vec<u8>, PageError> {
    let bytes = u128::from(width) * u128::from(height) * 3;
    if bytes == 0 || max_side == 0 || rgb.len() as u128 != bytes {
        let bytes = rgb.len();
        let reason =
            format!("{bytes} bytes for {width} × {height} pixels, {max_side} pixels at most");
        return Err(PageError::Thumbnail(reason.into()));
    }
    let source = ImageRef::new(width, height, rgb, PixelType::U8x3).map_err(failed)?;
    let (width, height) = fit(width, height, max_side);
    let mut small = Image::new(width, height, PixelType::U8x3);
    Resizer::new().resize(&source, &mut small, None).map_err(failed)?;
    let (width, height) = (narrow(width)?, narrow(height)?);
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .encode(small.buffer(), width.into(), height.into(), ExtendedColorType::Rgb8)
        .map_err(failed)?;
    Ok(jpeg)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> PageError {
    PageError::Thumbnail(Reason::of(error))
}

/// A side as JPEG counts it.
fn narrow(side: u32) -> Result<u16, PageError> {
    side.try_into().map_err(|_| {
        PageError::Thumbnail(format!("a side of {side} pixels is too long for JPEG").into())
    })
}

/// The size in a square of `side`; no side becomes 0.
fn fit(width: u32, height: u32, side: u32) -> (u32, u32) {
    let longer = width.max(height);
    if longer <= side {
        return (width, height);
    }
    let scaled = |length: u32| {
        let (length, side, longer) = (u64::from(length), u64::from(side), u64::from(longer));
        // At most `side`, as `length` is at most `longer`.
        (((length * side * 2 + longer) / (longer * 2)).max(1)) as u32
    };
    (scaled(width), scaled(height))
}

#[cfg(test)]
mod tests {
    use angler_pixels::{PixelLimits, decode};

    use super::*;

    fn decoded(width: u32, height: u32, side: u32) -> image::RgbImage {
        let rgb: Vec<u8> = (0..width * height)
            .flat_map(|i| if i % width < width / 2 { [250, 10, 10] } else { [10, 10, 250] })
            .collect();
        let jpeg = thumbnail(&rgb, width, height, side).unwrap();
        decode(&jpeg, PixelLimits { max_pixels: 1 << 20 }).unwrap()
    }

    #[test]
    fn the_longer_side_fits_and_the_picture_stays() {
        let image = decoded(640, 480, 160);
        assert_eq!(image.dimensions(), (160, 120));
        let (left, right) = (image.get_pixel(20, 60).0, image.get_pixel(140, 60).0);
        assert!(left[0] > 230 && left[2] < 30, "{left:?}");
        assert!(right[2] > 230 && right[0] < 30, "{right:?}");
        assert_eq!(decoded(28, 28, 160).dimensions(), (28, 28));
        assert_eq!(decoded(2, 3_000, 160).dimensions(), (1, 160));
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        for (bytes, width, height, side) in
            [(0, 0, 0, 160), (11, 2, 2, 160), (12, 2, 2, 0), (0, u32::MAX, u32::MAX, 160)]
        {
            let error = thumbnail(&vec![0; bytes], width, height, side).unwrap_err().to_string();
            assert!(error.starts_with("cannot make a thumbnail"), "{error}");
        }
    }
}
