//! WebP: chunks may claim gigabytes of metadata, and the picture inside may be larger than the canvas;
//! the decoder allocates both before it compares. In an animation it does not compare.

use std::borrow::Cow;

use angler_wire::error::ImageError;

use super::Checked;
use crate::stored::{check_size, corrupt};
use crate::{PixelLimits, exif};

/// How far the length of the container may be off: writers count its own 8 bytes or leave them out.
const SLACK: usize = 8;

/// The flags of the extended header that promise a colour profile, EXIF data and an XMP packet, which
/// the decoder insists on and nobody needs.
const PROMISES: u8 = 0x20 | 0x08 | 0x04;

/// Bounds every chunk by the file and every lossy picture by the limit; finds the orientation.
pub(super) fn check(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
    let cut = || corrupt("WebP file ends early");
    let riff = bytes.get(4..).and_then(|b| b.first_chunk()).ok_or_else(cut)?;
    let end = usize::try_from(u32::from_le_bytes(*riff)).map_err(|_| cut())?.saturating_add(8);
    // What follows the container is nobody's, and the decoder must not read it as more chunks.
    let end = if end.abs_diff(bytes.len()) <= SLACK { bytes.len() } else { end };
    let body = bytes.get(12..end).ok_or_else(cut)?;

    let mut chunks = Chunks(body);
    let (mut exif, mut xmp, mut picture, mut extended) = (None, None, false, None);
    // Of the chunks that are whole, the end of the last.
    let mut whole = 12;
    while let Some(chunk) = chunks.next() {
        let Some((name, body)) = chunk else {
            // Behind the picture a chunk that is not whole does not matter.
            if picture && end == bytes.len() && bytes.len() - whole <= SLACK + 24 {
                break;
            } else {
                return Err(cut());
            }
        };
        match name {
            b"VP8 " => {
                lossy_size(body, limits)?;
                picture = true;
            }
            b"VP8L" => {
                lossless_size(body, limits)?;
                picture = true;
            }
            b"VP8X" => extended = body.first().copied(),
            b"EXIF" if exif.is_none() => exif = Some(body),
            b"XMP " if xmp.is_none() => xmp = Some(body),
            // The first frame only: no other is decoded.
            b"ANMF" if !picture => {
                animation_frame(body, limits)?;
                picture = true;
            }
            _ => {}
        }
        whole = end - chunks.0.len();
    }
    let orientation = exif::orientation(exif.unwrap_or_default(), xmp);
    let mut file = Cow::Borrowed(&bytes[..whole]);
    if file.len() as u64 != 8 + u64::from(u32::from_le_bytes(*riff)) {
        let length = u32::try_from(file.len() - 8).map_err(|_| cut())?;
        file.to_mut()[4..8].copy_from_slice(&length.to_le_bytes());
    }
    // The extended header is the first chunk, its flags the first byte after name and length.
    if extended.is_some_and(|flags| flags & PROMISES != 0) && file.get(12..16) == Some(b"VP8X") {
        file.to_mut()[20] &= !PROMISES;
    }
    Ok(Checked { bytes: file, orientation })
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
    use image::metadata::Orientation;

    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };

    fn webp(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
        check(bytes, limits)
    }

    fn code<T>(result: Result<T, ImageError>) -> Option<ImageErrorCode> {
        result.err().map(|error| error.code)
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
        assert_eq!(checked.bytes.as_ref(), file);
        assert_eq!(checked.orientation, Orientation::Rotate90);
        for end in 4..30 {
            let cut = webp(&file[..end], LIMITS);
            assert_eq!(code(cut), Some(ImageErrorCode::CorruptImage), "{end}");
        }
        let claims_much = riff(&[b"EXIF\xff\xff\xff\xff".to_vec()]);
        assert_eq!(code(webp(&claims_much, LIMITS)), Some(ImageErrorCode::CorruptImage));
    }

    #[test]
    fn lengths_may_be_off_by_the_containers_own_eight_bytes() {
        let small = b"\x10\x00\x00\x9d\x01\x2a\x10\x00\x10\x00";
        let file = riff(&[chunk(b"VP8 ", small)]);
        for off in [-8, -2, 2, 8] {
            let mut other = file.clone();
            let length = (file.len() as i32 - 8 + off).to_le_bytes();
            other[4..8].copy_from_slice(&length);
            assert_eq!(webp(&other, LIMITS).unwrap().bytes.as_ref(), file, "{off}");
        }
    }

    #[test]
    fn promises_of_metadata_are_not_held() {
        let small = b"\x10\x00\x00\x9d\x01\x2a\x10\x00\x10\x00";
        let file =
            riff(&[chunk(b"VP8X", &[0x3c, 0, 0, 0, 15, 0, 0, 15, 0, 0]), chunk(b"VP8 ", small)]);
        assert_eq!(webp(&file, LIMITS).unwrap().bytes[20], 0x10);
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
}
