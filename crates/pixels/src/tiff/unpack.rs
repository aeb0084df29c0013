//! Takes a strip or a tile of a TIFF out of its compression, up to the bytes that it may have.

use std::io::Read;

use angler_wire::error::ImageError;
use image::metadata::Orientation;
use weezl::{BitOrder, LzwStatus};

use super::fax::{self, Coding};
use crate::sniff::unsupported;
use crate::stored::{Colours, corrupt};
use crate::{PixelLimits, jpeg};

/// How strips and tiles are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Fax(Coding),
    Lzw,
    /// A JPEG each, of the photometric interpretation of the file.
    Jpeg,
    Deflate,
    PackBits,
    Zstd,
}

impl Compression {
    pub(super) fn of(number: u64, fax_options: u64) -> Result<Self, ImageError> {
        Ok(match number {
            1 => Self::None,
            2 => Self::Fax(Coding::Rows),
            3 if fax_options & 1 == 1 => Self::Fax(Coding::Group3Mixed),
            3 => Self::Fax(Coding::Group3),
            4 => Self::Fax(Coding::Group4),
            5 => Self::Lzw,
            6 => return Err(unsupported("a TIFF with old-style JPEG compression inside")),
            7 => Self::Jpeg,
            8 | 32_946 => Self::Deflate,
            32_773 => Self::PackBits,
            50_000 => Self::Zstd,
            33_003 | 33_005 | 34_712 => return Err(unsupported("a TIFF with JPEG 2000 inside")),
            34_661 => return Err(unsupported("a TIFF with JBIG inside")),
            34_887 => return Err(unsupported("a TIFF with LERC inside")),
            34_925 => return Err(unsupported("a TIFF with LZMA compression")),
            50_001 => return Err(unsupported("a TIFF with WebP inside")),
            50_002 | 52_546 => return Err(unsupported("a TIFF with JPEG XL inside")),
            _ => return Err(unsupported(&format!("a TIFF of an unknown compression ({number})"))),
        })
    }
}

/// `length` bytes of a strip or a tile that is not a JPEG; `width` and `rows` are its own.
pub(super) fn unpack(
    packed: &[u8],
    compression: Compression,
    (width, rows): (u32, u32),
    length: usize,
) -> Result<Vec<u8>, ImageError> {
    let cut = || corrupt("TIFF file is damaged or ends early: a part of its picture is not whole");
    let mut bytes = Vec::new();
    match compression {
        Compression::None => bytes.extend_from_slice(packed.get(..length).ok_or_else(cut)?),
        Compression::Fax(coding) => {
            let width = u16::try_from(width).map_err(|_| cut())?;
            bytes = fax::decode(packed, width, rows as usize, coding).ok_or_else(cut)?;
        }
        Compression::Lzw => bytes = lzw(packed, length),
        Compression::Deflate => {
            let inflater = flate2::read::ZlibDecoder::new(packed);
            // Damage at the end may lie behind the pixels; the length tells.
            let _ = inflater.take(length as u64).read_to_end(&mut bytes);
        }
        Compression::PackBits => bytes = packbits(packed, length),
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|_| cut())?;
            let _ = decoder.take(length as u64).read_to_end(&mut bytes);
        }
        Compression::Jpeg => return Err(cut()),
    }
    if bytes.len() < length { Err(cut()) } else { Ok(bytes) }
}

/// RGB of a strip or a tile that is a JPEG, `width` pixels wide or wider; and its width. `colours` is
/// the file's word on them, `tables` what all its JPEGs share.
pub(super) fn unpack_jpeg(
    packed: &[u8],
    tables: &[u8],
    colours: Colours,
    limits: PixelLimits,
) -> Result<(Vec<u8>, (u32, u32)), ImageError> {
    let marker = |bytes: &[u8]| bytes.starts_with(b"\xff\xd8");
    if !marker(packed) || !(tables.is_empty() || marker(tables)) {
        return Err(corrupt("TIFF file is damaged: a part of its picture is no JPEG"));
    }
    // An Adobe marker tells the decoder what it would else guess.
    let transform = u8::from(colours == Colours::YCbCr);
    let adobe = [b"\xff\xd8\xff\xee\0\x0eAdobe\0\x64\0\0\0\0".as_slice(), &[transform]].concat();
    let tables = tables.get(2..).unwrap_or_default();
    let tables = tables.strip_suffix(b"\xff\xd9").unwrap_or(tables);
    let file = [&adobe, tables, &packed[2..]].concat();
    let header = jpeg::Header::read(&file, limits)?;
    if header.inks {
        return Err(unsupported("a TIFF with a JPEG of four inks inside"));
    }
    let (mut image, colours) = jpeg::decode_at(&file, &header, 8, header.size.1)?;
    if colours == Colours::YCbCr {
        jpeg::to_rgb(&mut image);
    }
    debug_assert_eq!(header.orientation, Orientation::NoTransforms);
    Ok((image.into_raw(), header.size))
}

/// LZW, also in the order of bits of the first writers.
fn lzw(packed: &[u8], length: usize) -> Vec<u8> {
    let old = packed.first() == Some(&0) && packed.get(1).is_some_and(|byte| byte & 1 == 1);
    let mut decoder = if old {
        weezl::decode::Decoder::new(BitOrder::Lsb, 8)
    } else {
        weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8)
    };
    let mut bytes = vec![0; length];
    let (mut read, mut written) = (0, 0);
    while written < length {
        let result = decoder.decode_bytes(&packed[read..], &mut bytes[written..]);
        read += result.consumed_in;
        written += result.consumed_out;
        let stuck = result.consumed_in == 0 && result.consumed_out == 0;
        if stuck || !matches!(result.status, Ok(LzwStatus::Ok)) {
            break;
        }
    }
    bytes.truncate(written);
    bytes
}

/// Runs of one byte, and of bytes as they are.
fn packbits(packed: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = packed;
    while let [head, after @ ..] = rest
        && bytes.len() < length
    {
        rest = match head.cast_signed() {
            count @ 0.. => {
                let end = after.len().min(count as usize + 1);
                bytes.extend_from_slice(&after[..end]);
                &after[end..]
            }
            -128 => after,
            count => {
                let Some((byte, after)) = after.split_first() else { break };
                bytes.resize(bytes.len() + 1 + usize::from(count.unsigned_abs()), *byte);
                after
            }
        };
    }
    bytes.truncate(length);
    bytes
}
