//! Decodes a file to 8-bit RGB, within limits.

use std::error::Error as _;
use std::io::Cursor;

use image::codecs::jpeg::JpegDecoder;
use image::{DynamicImage, ImageBuffer, ImageDecoder, ImageFormat, ImageReader, Pixel, RgbImage};

use angler_wire::error::{ImageError, ImageErrorCode};

use super::stored::{
    Colours, MAX_SIDE, METADATA_BYTES, Stored, bytes_allowed, check_size, corrupt, over_white,
};
use super::{PixelLimits, PixelSpec, container, guard, jpeg, resize, sniff, tiff};

/// How much of a decoder's own words goes into a message, in characters.
const REASON_CHARS: usize = 200;

/// Decodes an image file to upright 8-bit RGB, shape [H, W, 3], of whatever size the file has.
///
/// Grey, palette, 16-bit (the high byte counts) and CMYK become RGB, transparency is composed over
/// white. Colour profiles are ignored. Of an animation the first frame is taken.
///
/// # Errors
/// As [`preprocess`](super::preprocess).
pub fn decode(bytes: &[u8], limits: PixelLimits) -> Result<RgbImage, ImageError> {
    let mut stored = decode_stored(bytes, None, limits)?;
    if stored.colours == Colours::YCbCr {
        jpeg::to_rgb(&mut stored.image);
    }
    Ok(resize::upright(stored.image, stored.orientation))
}

/// Decodes without turning upright, and no larger than `spec` has use for.
pub(super) fn decode_for(
    bytes: &[u8],
    spec: &PixelSpec,
    limits: PixelLimits,
) -> Result<Stored, ImageError> {
    decode_stored(bytes, Some(spec), limits)
}

fn decode_stored(
    bytes: &[u8],
    spec: Option<&PixelSpec>,
    limits: PixelLimits,
) -> Result<Stored, ImageError> {
    let format = sniff::format(bytes)?;
    // The decoders are other people's and the bytes are anyone's. A panic must cost this image only.
    guard::guarded(name(format), || match format {
        ImageFormat::Jpeg => decode_jpeg(bytes, spec, limits),
        ImageFormat::Tiff => tiff::decode(bytes, limits),
        _ => decode_other(bytes, format, limits),
    })
}

/// A JPEG, at a fraction of its size if that is enough for `spec`.
fn decode_jpeg(
    bytes: &[u8],
    spec: Option<&PixelSpec>,
    limits: PixelLimits,
) -> Result<Stored, ImageError> {
    let header = jpeg::Header::read(bytes, limits)?;
    let (size, orientation) = (header.size, header.orientation);
    let eighths = spec.and_then(|spec| resize::eighths(size, orientation, spec));
    // What the other decoder takes for damage libjpeg may still read, and its word counts.
    if eighths.is_none()
        && header.plain
        && let Ok(decoder) = JpegDecoder::new(Cursor::new(bytes))
        && decoder.dimensions() == size
        && let Ok(image) = DynamicImage::from_decoder(decoder)
    {
        return Ok(Stored::whole(to_rgb(image), orientation));
    }
    let eighths = eighths.unwrap_or(8);
    // Without an end marker only reading all of it tells whether the picture is whole.
    let rows = match spec {
        Some(spec) if header.ended => resize::rows(size, eighths, orientation, spec),
        _ => jpeg::reduced(size.1, eighths),
    };
    let (image, colours) = jpeg::decode_at(bytes, &header, eighths, rows)?;
    Ok(Stored { image, colours, size, eighths, orientation })
}

fn decode_other(
    bytes: &[u8],
    format: ImageFormat,
    limits: PixelLimits,
) -> Result<Stored, ImageError> {
    let checked = container::check(bytes, format, limits)?;

    let mut reader = ImageReader::with_format(Cursor::new(checked.bytes.as_ref()), format);
    // Only PNG's decoder takes limits when it is made, and it reads the metadata then: one row of
    // pixels and the metadata is all that it allocates itself.
    let mut header = image::Limits::no_limits();
    header.max_alloc = Some(METADATA_BYTES + u64::from(MAX_SIDE) * 8);
    reader.limits(header);
    let mut decoder = reader.into_decoder().map_err(|e| refusal(format, &e))?;

    let (width, height) = decoder.dimensions();
    check_size(width, height, limits)?;
    // A decoder's own buffers (a GIF's frame) may be as large as the picture.
    let most = bytes_allowed(limits);
    if decoder.total_bytes().saturating_mul(2) > most {
        return Err(ImageError::new(
            ImageErrorCode::TooLarge,
            format!(
                "{width} × {height} pixels of this {} take more memory than limits.image_pixels ({}) \
                 allows",
                name(format),
                limits.max_pixels
            ),
        ));
    }
    let mut allowance = image::Limits::no_limits();
    allowance.max_alloc = Some(most.min(METADATA_BYTES + 3 * decoder.total_bytes()));
    decoder.set_limits(allowance).map_err(|e| refusal(format, &e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| refusal(format, &e))?;
    if format == ImageFormat::Bmp {
        make_opaque(&mut image);
    }
    Ok(Stored::whole(to_rgb(image), checked.orientation))
}

/// A BMP whose alpha is 0 all over was written by a program that knows of no alpha.
fn make_opaque(image: &mut DynamicImage) {
    if let DynamicImage::ImageRgba8(image) = image
        && image.pixels().all(|pixel| pixel.0[3] == 0)
    {
        image.pixels_mut().for_each(|pixel| pixel.0[3] = 255);
    }
}

/// The format's name, for people.
fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::Png => "PNG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Gif => "GIF",
        ImageFormat::Bmp => "BMP",
        ImageFormat::Tiff => "TIFF",
        _ => "image",
    }
}

/// What a decoder's error means for the image.
fn refusal(format: ImageFormat, error: &image::ImageError) -> ImageError {
    let name = name(format);
    match error {
        image::ImageError::Limits(_) => ImageError::new(
            ImageErrorCode::TooLarge,
            format!("{name} file asks for more memory than a picture of its size may take"),
        ),
        image::ImageError::Unsupported(_) => {
            sniff::unsupported(&format!("a {name} of an unsupported kind ({})", reason(error)))
        }
        image::ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            corrupt(format!("{name} file ends early"))
        }
        _ => corrupt(format!("{name} file is damaged: {}", reason(error))),
    }
}

/// The innermost words of an error, on one line, not too long.
fn reason(error: &image::ImageError) -> String {
    let words = match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string(),
    };
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    words.chars().take(REASON_CHARS).collect()
}

/// 8-bit RGB out of whatever the decoder gave; transparency over white.
fn to_rgb(image: DynamicImage) -> RgbImage {
    match image {
        DynamicImage::ImageRgb8(image) => image,
        DynamicImage::ImageLuma8(image) => map(&image, |[v]| [v; 3]),
        DynamicImage::ImageLumaA8(image) => map(&image, |[v, a]| [over_white(v, a); 3]),
        DynamicImage::ImageRgba8(image) => {
            map(&image, |[r, g, b, a]| [r, g, b].map(|c| over_white(c, a)))
        }
        DynamicImage::ImageLuma16(image) => map(&image, |[v]| [high(v); 3]),
        DynamicImage::ImageLumaA16(image) => {
            map(&image, |[v, a]| [over_white(high(v), high(a)); 3])
        }
        DynamicImage::ImageRgb16(image) => map(&image, |rgb: [u16; 3]| rgb.map(high)),
        DynamicImage::ImageRgba16(image) => {
            map(&image, |[r, g, b, a]| [r, g, b].map(|c| over_white(high(c), high(a))))
        }
        // Floating point, out of a TIFF: 0 to 1 becomes 0 to 255, and what lies outside is clipped.
        other => map(&other.into_rgba8(), |[r, g, b, a]| [r, g, b].map(|c| over_white(c, a))),
    }
}

/// Converts pixel by pixel.
fn map<P, const N: usize>(
    image: &ImageBuffer<P, Vec<P::Subpixel>>,
    to_rgb: impl Fn([P::Subpixel; N]) -> [u8; 3],
) -> RgbImage
where
    P: Pixel,
{
    let mut rgb = RgbImage::new(image.width(), image.height());
    let (sources, _) = image.as_raw().as_chunks::<N>();
    let (targets, _) = rgb.as_chunks_mut::<3>();
    for (target, source) in targets.iter_mut().zip(sources) {
        *target = to_rgb(*source);
    }
    rgb
}

/// The high byte of a 16-bit sample: what Pillow takes, where `image` rounds (a level apart).
fn high(sample: u16) -> u8 {
    sample.to_be_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 50_000_000 };

    #[test]
    fn the_declared_size_is_held_against_the_limits() {
        assert!(check_size(10_000, 5_000, LIMITS).is_ok());
        let error = check_size(30_000, 30_000, LIMITS).unwrap_err();
        assert_eq!(error.code, ImageErrorCode::TooLarge);
        assert_eq!(
            error.message,
            "image is 30000 × 30000 = 900000000 pixels, the limit is 50000000 (limits.image_pixels)"
        );
        assert!(check_size(u32::MAX, u32::MAX, LIMITS).is_err());
        let error = check_size(65_536, 1, LIMITS).unwrap_err();
        assert_eq!(error.code, ImageErrorCode::TooLarge);
        for (width, height) in [(0, 1), (1, 0), (0, 0)] {
            let error = check_size(width, height, LIMITS).unwrap_err();
            assert_eq!(error.code, ImageErrorCode::CorruptImage);
        }
    }

    #[test]
    fn transparency_lies_on_white() {
        assert_eq!(over_white(0, 0), 255);
        assert_eq!(over_white(7, 255), 7);
        assert_eq!(over_white(0, 128), 127);
        assert_eq!(over_white(255, 77), 255);
        for sample in 0..=255 {
            for alpha in 0..=255 {
                let exact = (f64::from(sample) * f64::from(alpha)
                    + 255.0 * (255.0 - f64::from(alpha)))
                    / 255.0;
                assert_eq!(f64::from(over_white(sample, alpha)), exact.round());
            }
        }
    }

    #[test]
    fn every_kind_of_pixel_becomes_rgb() {
        use image::{Luma, LumaA, Rgb, Rgba, Rgba32FImage};
        let one = |image: DynamicImage| to_rgb(image).get_pixel(0, 0).0;
        assert_eq!(one(ImageBuffer::from_pixel(2, 1, Luma([9u8])).into()), [9; 3]);
        assert_eq!(one(RgbImage::from_pixel(2, 1, Rgb([1, 2, 3])).into()), [1, 2, 3]);
        let grey_alpha = ImageBuffer::from_pixel(2, 1, LumaA([0u8, 128]));
        assert_eq!(one(grey_alpha.into()), [127, 127, 127]);
        let rgba = ImageBuffer::from_pixel(2, 1, Rgba([200u8, 100, 0, 0]));
        assert_eq!(one(rgba.into()), [255, 255, 255]);
        let grey_16 = ImageBuffer::from_pixel(2, 1, Luma([0x12ff_u16]));
        assert_eq!(one(grey_16.into()), [0x12; 3]);
        let rgb_16 = ImageBuffer::from_pixel(2, 1, Rgb([0xffff_u16, 0x8000, 0x00ff]));
        assert_eq!(one(rgb_16.into()), [0xff, 0x80, 0]);
        let rgba_16 = ImageBuffer::from_pixel(2, 1, Rgba([0u16, 0, 0, 0x80ff]));
        assert_eq!(one(rgba_16.into()), [127; 3]);
        let float = Rgba32FImage::from_pixel(2, 1, Rgba([0.0, 1.0, 7.0, 1.0]));
        assert_eq!(one(DynamicImage::ImageRgba32F(float)), [0, 255, 255]);
    }
}
