//! What must hold of a file before a decoder sees it, where the decoder does not see to it itself.
//!
//! * JPEG: the decoder fills a picture that was cut short with grey and calls it well.
//! * PNG: it reads all metadata as it is made, before its size can be asked.
//! * BMP: it calls a picture of no or of too many pixels unsupported.
//! * WebP: a chunk may claim gigabytes of metadata, and the picture inside may be larger than the
//!   canvas; the decoder allocates both before it compares. In an animation it does not compare.
//! * TIFF: see [`tiff`].

use image::ImageFormat;
use image::metadata::Orientation;

use angler_wire::error::ImageError;

use super::decode::{check_size, corrupt};
use super::{PixelLimits, tiff};

/// A file that may be given to its decoder.
pub(super) struct Checked<'a> {
    /// What of the file the decoder is to see.
    pub bytes: &'a [u8],
    /// The orientation, where it was found on the way; else the decoder is asked.
    pub orientation: Option<Orientation>,
}

/// Checks a file of a known format.
pub(super) fn check(
    bytes: &[u8],
    format: ImageFormat,
    limits: PixelLimits,
) -> Result<Checked<'_>, ImageError> {
    match format {
        ImageFormat::Jpeg => jpeg(bytes)?,
        ImageFormat::Png => png(bytes, limits)?,
        ImageFormat::Bmp => bmp(bytes, limits)?,
        ImageFormat::Tiff => tiff::check(bytes, limits)?,
        ImageFormat::WebP => return webp(bytes, limits),
        _ => {}
    }
    Ok(Checked { bytes, orientation: None })
}

/// Finds the end-of-image marker that belongs to the picture. Segments are skipped by their length,
/// so that the one of an embedded thumbnail does not count; what follows it (a second picture, a
/// maker's data) does not matter.
fn jpeg(bytes: &[u8]) -> Result<(), ImageError> {
    let cut = || corrupt("JPEG file ends early: it has no end-of-image marker");
    let mut rest = bytes.get(2..).ok_or_else(cut)?;
    let mut scanned = false;
    loop {
        // Compressed data, or junk between segments: a marker is 0xFF and what is neither 0 (a
        // stuffed byte) nor 0xFF (padding).
        let at = memchr::memchr(0xff, rest).ok_or_else(cut)?;
        rest = &rest[at + 1..];
        let (&code, after) = rest.split_first().ok_or_else(cut)?;
        match code {
            0xff => {}                                 // padding: this byte may begin the marker
            0x00 | 0x01 | 0xd0..=0xd8 => rest = after, // stands alone
            0xd9 if scanned => return Ok(()),
            0xd9 => return Err(corrupt("JPEG file holds no picture data")),
            _ => {
                scanned |= code == 0xda;
                let length = after.first_chunk().ok_or_else(cut)?;
                let length = usize::from(u16::from_be_bytes(*length));
                rest = after.get(length..).ok_or_else(cut)?;
            }
        }
    }
}

/// The size in the header, which stands at a fixed place.
fn png(bytes: &[u8], limits: PixelLimits) -> Result<(), ImageError> {
    let number = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let (Some(width), Some(height)) = (number(16), number(20)) else {
        return Err(corrupt("PNG file ends early"));
    };
    check_size(width, height, limits)
}

/// The size in the header: 16 bits a side in the oldest kind, whose header has 12 bytes, else 32 and
/// a sign, which in the height tells the order of the rows.
fn bmp(bytes: &[u8], limits: PixelLimits) -> Result<(), ImageError> {
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let (Some(header), Some(first), Some(second)) = (number(14), number(18), number(22)) else {
        return Err(corrupt("BMP file ends early"));
    };
    let signed = |side: u32| side.cast_signed().unsigned_abs();
    match header {
        12 => check_size(first & 0xffff, first >> 16, limits),
        _ => check_size(signed(first), signed(second), limits),
    }
}

/// Bounds every chunk by the file and every lossy picture by the limit; finds the orientation.
fn webp(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
    let cut = || corrupt("WebP file ends early");
    let riff = bytes.get(4..).and_then(|b| b.first_chunk()).ok_or_else(cut)?;
    let end = 8 + u64::from(u32::from_le_bytes(*riff));
    let end = usize::try_from(end).map_err(|_| cut())?;
    // What follows the container is nobody's, and the decoder must not read it as more chunks.
    let bytes = bytes.get(..end).ok_or_else(cut)?;

    let mut orientation = None;
    let mut animation_seen = false;
    for chunk in Chunks(bytes.get(12..).ok_or_else(cut)?) {
        let (name, body) = chunk.ok_or_else(cut)?;
        match name {
            b"VP8 " => {
                lossy_size(body, limits)?;
            }
            b"VP8L" => lossless_size(body, limits)?,
            b"EXIF" if orientation.is_none() => {
                // Some writers put JPEG's prefix before the EXIF data.
                let exif = body.strip_prefix(b"Exif\0\0").unwrap_or(body);
                orientation = Orientation::from_exif_chunk(exif);
            }
            // The first frame only: no other is decoded.
            b"ANMF" if !animation_seen => {
                animation_seen = true;
                animation_frame(body, limits)?;
            }
            _ => {}
        }
    }
    Ok(Checked { bytes, orientation: Some(orientation.unwrap_or(Orientation::NoTransforms)) })
}

/// The first frame of an animation: 16 bytes, of which the seventh to the twelfth give its size less
/// one, then its chunks. The decoder counts on the picture in them being of that size.
fn animation_frame(body: &[u8], limits: PixelLimits) -> Result<(), ImageError> {
    let cut = || corrupt("WebP file ends early");
    let (header, chunks) = body.split_first_chunk::<16>().ok_or_else(cut)?;
    let side = |at: usize| 1 + u32::from_le_bytes([header[at], header[at + 1], header[at + 2], 0]);
    let mut after_alpha = false;
    for chunk in Chunks(chunks) {
        let (name, body) = chunk.ok_or_else(cut)?;
        // The decoder takes whatever comes after the alpha for a lossy picture.
        if (name == b"VP8 " || after_alpha) && lossy_size(body, limits)? != (side(6), side(9)) {
            return Err(corrupt("WebP file holds a frame of another size than it says"));
        }
        after_alpha = name == b"ALPH";
    }
    Ok(())
}

/// The chunks of a RIFF container: name and body. `None` for one that is longer than what is left.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = Option<(&'a [u8; 4], &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.0.split_first_chunk::<4>()?;
        let chunk = rest.split_first_chunk::<4>().and_then(|(size, rest)| {
            let size = usize::try_from(u32::from_le_bytes(*size)).ok()?;
            let body = rest.get(..size)?;
            // Padded to an even length; some writers leave the last pad out.
            self.0 = rest.get(size + size % 2..).unwrap_or_default();
            Some((name, body))
        });
        if chunk.is_none() {
            self.0 = &[];
        }
        Some(chunk)
    }
}

/// A lossy WebP picture's own size: 14 bits each, after a tag and a signature of 3 bytes each. The
/// tag's lowest bit would say that the picture only changes one before it.
fn lossy_size(body: &[u8], limits: PixelLimits) -> Result<(u32, u32), ImageError> {
    if body.first().is_some_and(|tag| tag & 1 == 1) {
        return Err(corrupt("WebP file holds no key frame"));
    }
    let number =
        |at: usize| Some(u32::from(u16::from_le_bytes(*body.get(at..)?.first_chunk()?) & 0x3fff));
    let (Some(width), Some(height)) = (number(6), number(8)) else {
        return Err(corrupt("WebP file ends early"));
    };
    check_size(width, height, limits)?;
    Ok((width, height))
}

/// A lossless WebP picture's own size: 14 bits each, less one, after a signature of one byte. The
/// decoder takes 16,384 pixels for none.
fn lossless_size(body: &[u8], limits: PixelLimits) -> Result<(), ImageError> {
    let sides = body.get(1..).and_then(|b| b.first_chunk());
    let sides = u32::from_le_bytes(*sides.ok_or_else(|| corrupt("WebP file ends early"))?);
    check_size(1 + (sides & 0x3fff), 1 + (sides >> 14 & 0x3fff), limits)
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
    fn a_jpeg_ends_with_its_own_marker() {
        let picture: &[u8] = b"\xff\xda\x00\x04ab\x01\xff\x00\x02\xff\xd3\x03";
        let thumbnail: &[u8] = b"\xff\xe1\x00\x08\xff\xd8\xff\xd9xx";
        let file = |parts: &[&[u8]]| [b"\xff\xd8", parts.concat().as_slice()].concat();
        let whole: [&[&[u8]]; 5] = [
            &[picture, b"\xff\xd9"],
            &[thumbnail, picture, b"\xff\xd9"],
            &[thumbnail, b"\xff\xff", picture, picture, b"\xff\xff\xff\xd9"],
            &[picture, b"\xff\xd9\xff\xd8 another picture, cut sho"],
            &[b"junk", picture, b"\xff\xd9\x00\x00\x00"],
        ];
        for parts in whole {
            assert_eq!(code(jpeg(&file(parts))), None, "{parts:?}");
        }
        let cut: [&[&[u8]]; 6] = [
            &[],
            &[b"\xff\xd9"],
            &[thumbnail],
            &[thumbnail, picture],
            &[picture, b"\xff"],
            &[picture, b"\x00\x00\x00\x00"],
        ];
        for parts in cut {
            assert_eq!(code(jpeg(&file(parts))), Some(ImageErrorCode::CorruptImage), "{parts:?}");
        }
        let file = file(&[thumbnail, picture, b"\xff\xd9"]);
        for end in 0..file.len() {
            assert_eq!(code(jpeg(&file[..end])), Some(ImageErrorCode::CorruptImage), "{end}");
        }
    }

    fn chunk(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(body.len()).unwrap().to_le_bytes();
        let pad: &[u8] = if body.len().is_multiple_of(2) { b"" } else { b"\0" };
        [name.as_slice(), &size, body, pad].concat()
    }

    fn riff(chunks: &[Vec<u8>]) -> Vec<u8> {
        chunk(b"RIFF", &[b"WEBP".to_vec(), chunks.concat()].concat())
    }

    /// The first bytes of a lossy picture that says it is 16,383 pixels square.
    const HUGE: &[u8] = b"\x10\x00\x00\x9d\x01\x2a\xff\x3f\xff\x3f";

    #[test]
    fn a_webp_claims_no_more_than_it_holds() {
        let small = b"\x10\x00\x00\x9d\x01\x2a\x10\x00\x10\x00";
        let exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0";
        let file = riff(&[chunk(b"VP8 ", small), chunk(b"EXIF", exif)]);
        let with_tail = [file.as_slice(), b"EXIF\xff\xff\xff\xff"].concat();
        let checked = webp(&with_tail, LIMITS).unwrap();
        assert_eq!(checked.bytes, file);
        assert_eq!(checked.orientation, Some(Orientation::Rotate90));
        for end in 4..file.len() {
            let cut = webp(&file[..end], LIMITS);
            assert_eq!(code(cut), Some(ImageErrorCode::CorruptImage), "{end}");
        }
        let claims_much = riff(&[b"EXIF\xff\xff\xff\xff".to_vec()]);
        assert_eq!(code(webp(&claims_much, LIMITS)), Some(ImageErrorCode::CorruptImage));
    }

    #[test]
    fn a_webp_hides_no_large_picture() {
        let frame = |chunks: &[Vec<u8>]| [vec![0; 16], chunks.concat()].concat();
        let huge = chunk(b"VP8 ", HUGE);
        let alpha = chunk(b"ALPH", b"abc");
        for file in [
            riff(&[chunk(b"VP8X", &[0; 10]), huge.clone()]),
            riff(&[chunk(b"ANMF", &frame(std::slice::from_ref(&huge)))]),
            riff(&[chunk(b"ANMF", &frame(&[alpha.clone(), huge]))]),
            riff(&[chunk(b"ANMF", &frame(&[alpha, chunk(b"????", HUGE)]))]),
        ] {
            assert_eq!(code(webp(&file, LIMITS)), Some(ImageErrorCode::TooLarge));
        }
        let nested = riff(&[chunk(b"ANMF", &frame(&[b"EXIF\xff\xff\xff\xff".to_vec()]))]);
        assert_eq!(code(webp(&nested, LIMITS)), Some(ImageErrorCode::CorruptImage));
    }

    #[test]
    fn sizes_in_headers_are_found() {
        let png_header = |width: u32, height: u32| {
            let start = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".as_slice();
            [start, &width.to_be_bytes(), &height.to_be_bytes()].concat()
        };
        assert_eq!(code(png(&png_header(1_000, 1_000), LIMITS)), None);
        assert_eq!(code(png(&png_header(1_001, 1_000), LIMITS)), Some(ImageErrorCode::TooLarge));
        assert_eq!(code(png(&png_header(0, 1_000), LIMITS)), Some(ImageErrorCode::CorruptImage));
        assert_eq!(code(png(b"\x89PNG", LIMITS)), Some(ImageErrorCode::CorruptImage));

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
