//! PNG: what the decoder needs of a file, and no more. It reads all metadata as it is made, before its
//! size can be asked, and text of any length may stand there.

use std::io::Read;

use angler_wire::error::ImageError;

use super::Checked;
use crate::sniff::unsupported;
use crate::stored::{check_size, corrupt};
use crate::{PixelLimits, exif};

/// The signature, then the length, name, body and checksum of the header.
const HEADER: usize = 8 + 4 + 4 + 13 + 4;

/// An empty chunk: the end of the file.
const END: &[u8] = b"\0\0\0\0IEND\xae\x42\x60\x82";

/// A profile in a text chunk may have so many bytes.
const MAX_PROFILE: u64 = 1 << 20;

/// Keeps header, palette, transparency and pixels; finds the orientation. The end marker may be
/// missing: the pixels' own stream says whether they are whole.
pub(super) fn check(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
    if bytes.get(12..16) == Some(b"CgBI") {
        return Err(unsupported("an iOS-optimised PNG (CgBI)"));
    }
    let number = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let (Some(width), Some(height), Some(header)) = (number(16), number(20), bytes.get(..HEADER))
    else {
        return Err(corrupt("PNG file ends early"));
    };
    check_size(width, height, limits)?;

    let mut kept = Vec::with_capacity(bytes.len() + END.len());
    kept.extend_from_slice(header);
    let (mut profile, mut xmp, mut pixels) = (Vec::new(), None, false);
    let mut rest = &bytes[HEADER..];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let name = after.first_chunk::<4>();
        let (Some(body), Some(name)) = (after.get(4..4 + length), name) else {
            if name == Some(b"IDAT") || !pixels {
                return Err(corrupt("PNG file ends early"));
            }
            break;
        };
        let end = 12 + length;
        match name {
            b"PLTE" | b"tRNS" | b"IDAT" => {
                pixels |= name == b"IDAT";
                kept.extend_from_slice(
                    rest.get(..end).ok_or_else(|| corrupt("PNG file ends early"))?,
                );
            }
            b"eXIf" => profile = body.to_vec(),
            b"tEXt" | b"zTXt" if profile.is_empty() => {
                profile = raw_profile(body).unwrap_or_default()
            }
            b"iTXt" => xmp = body.strip_prefix(b"XML:com.adobe.xmp\0\0\0").or(xmp),
            b"IEND" => break,
            _ => {}
        }
        rest = rest.get(end..).unwrap_or_default();
    }
    kept.extend_from_slice(END);
    Ok(Checked { bytes: kept.into(), orientation: exif::orientation(&profile, xmp) })
}

/// EXIF data as ImageMagick writes it into a text chunk: a line of its name, one of its length, then
/// hexadecimal digits. The text may be compressed.
fn raw_profile(body: &[u8]) -> Option<Vec<u8>> {
    let text = body.strip_prefix(b"Raw profile type exif\0")?;
    let mut inflated = Vec::new();
    let text = match text.strip_prefix(b"\0") {
        Some(compressed) => {
            let inflater = flate2::read::ZlibDecoder::new(compressed);
            inflater.take(MAX_PROFILE).read_to_end(&mut inflated).ok()?;
            &inflated
        }
        None => text,
    };
    let digits = text.splitn(4, |&byte| byte == b'\n').nth(3)?;
    let digits = digits.iter().filter(|digit| !digit.is_ascii_whitespace());
    let digits: Vec<u8> = digits
        .map(|&digit| char::from(digit).to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageErrorCode;
    use image::metadata::Orientation;

    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };

    fn header(width: u32, height: u32) -> Vec<u8> {
        let start = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".as_slice();
        [start, &width.to_be_bytes(), &height.to_be_bytes(), &[8, 0, 0, 0, 0], &[0; 4]].concat()
    }

    fn chunk(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32).to_be_bytes(), name.as_slice(), body, &[0; 4]].concat()
    }

    fn code(bytes: &[u8]) -> Option<ImageErrorCode> {
        check(bytes, LIMITS).err().map(|error| error.code)
    }

    #[test]
    fn the_size_is_held_against_the_limits() {
        assert_eq!(code(&header(1_000, 1_000)), None);
        assert_eq!(code(&header(1_001, 1_000)), Some(ImageErrorCode::TooLarge));
        assert_eq!(code(&header(0, 1_000)), Some(ImageErrorCode::CorruptImage));
        assert_eq!(code(b"\x89PNG"), Some(ImageErrorCode::CorruptImage));
        let optimised = b"\x89PNG\r\n\x1a\n\0\0\0\x04CgBI\x50\0\x20\x02";
        assert_eq!(code(optimised), Some(ImageErrorCode::UnsupportedFormat));
    }

    #[test]
    fn what_nobody_needs_is_dropped() {
        let pixels = chunk(b"IDAT", b"abc");
        let long = chunk(b"tEXt", &vec![b'x'; 1 << 20]);
        let file = [header(1, 1), long, pixels.clone()].concat();
        let expected = [header(1, 1), pixels, END.to_vec()].concat();
        for tail in [b"".as_slice(), END, &END[..5], b"\0\0\x01\0tEXt"] {
            let file = [&file, tail].concat();
            assert_eq!(check(&file, LIMITS).unwrap().bytes.as_ref(), expected, "{tail:?}");
        }
        assert_eq!(code(&file[..file.len() - 1]), Some(ImageErrorCode::CorruptImage));
    }

    #[test]
    fn orientations_are_found_wherever_writers_put_them() {
        let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0";
        let prefixed = [b"Exif\0\0", exif.as_slice()].concat();
        let digits: String = prefixed.iter().map(|byte| format!("{byte:02x}")).collect();
        let raw = format!("Raw profile type exif\0\nexif\n{}\n{digits}", prefixed.len());
        let xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\"6\"/>";
        for chunk in [
            chunk(b"eXIf", exif),
            chunk(b"eXIf", &prefixed),
            chunk(b"tEXt", raw.as_bytes()),
            chunk(b"iTXt", xmp),
        ] {
            let file = [header(1, 1), chunk].concat();
            assert_eq!(check(&file, LIMITS).unwrap().orientation, Orientation::Rotate90);
        }
    }
}
