//! Bounds what the TIFF decoder would allocate on its directory's word: a row of a tile, at whatever
//! width the file claims, and a list for each tag, at whatever length. An allocation that fails ends
//! the process, and with it every job that the worker holds.

use angler_wire::error::{ImageError, ImageErrorCode};

use super::PixelLimits;
use super::decode::{METADATA_BYTES, check_size, corrupt};
use super::sniff::unsupported;

/// The tags that are looked at.
mod tag {
    pub const WIDTH: u32 = 256;
    pub const HEIGHT: u32 = 257;
    pub const BITS: u32 = 258;
    pub const COMPRESSION: u32 = 259;
    pub const SAMPLES: u32 = 277;
    pub const TILE_WIDTH: u32 = 322;
    /// All that the decoder reads; it makes a list of each tag's values. A colour profile or an
    /// editor's own data, which may be long, are not among them.
    pub const READ: [u32; 19] = [
        256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339,
        530,
    ];
}

/// JPEG inside TIFF is refused: the embedded file brings a size of its own, which the decoder
/// believes, and the usual kind (YCbCr) is not decoded in any case.
const JPEG: u32 = 7;

/// How many values a tag may have: a tile of 8 × 8 for each part of a picture of 64 megapixels.
const MAX_VALUES: u32 = 1 << 20;

/// Checks the first directory, the only one that is decoded.
pub(super) fn check(bytes: &[u8], limits: PixelLimits) -> Result<(), ImageError> {
    let damaged = || corrupt("TIFF file ends early or has a damaged directory");
    let file = File { bytes, little_endian: bytes.starts_with(b"II") };
    let start = file.long(4).ok_or_else(damaged)? as usize;
    let count = file.short(start).ok_or_else(damaged)?;
    let [mut width, mut height, mut bits, mut samples, mut tile_width] = [0, 0, 1, 1, 0];
    for index in 0..count as usize {
        let entry = file.entry(start + 2 + index * 12).ok_or_else(damaged)?;
        if tag::READ.contains(&entry.tag) && entry.count > MAX_VALUES {
            return Err(too_large(format!("{} values for one tag", entry.count)));
        }
        let slot = match entry.tag {
            tag::WIDTH => &mut width,
            tag::HEIGHT => &mut height,
            tag::BITS => &mut bits,
            tag::SAMPLES => &mut samples,
            tag::TILE_WIDTH => &mut tile_width,
            tag::COMPRESSION if entry.value == Some(JPEG) => {
                return Err(unsupported("a TIFF with JPEG compression inside"));
            }
            _ => continue,
        };
        // A tag given twice counts with its larger value: whichever the decoder takes is bounded.
        *slot = entry.value.ok_or_else(damaged)?.max(*slot);
    }
    check_size(width, height, limits)?;

    let row_bits = [width.max(tile_width), samples, bits]
        .into_iter()
        .fold(1u64, |product, factor| product.saturating_mul(factor.into()));
    if row_bits / 8 > METADATA_BYTES {
        return Err(too_large(format!("{} bytes in a row of pixels", row_bits / 8)));
    }
    Ok(())
}

fn too_large(claim: String) -> ImageError {
    ImageError::new(ImageErrorCode::TooLarge, format!("TIFF file claims {claim}"))
}

/// A TIFF file of either byte order.
struct File<'a> {
    bytes: &'a [u8],
    little_endian: bool,
}

/// An entry of a directory.
struct Entry {
    tag: u32,
    count: u32,
    /// The first value, where it is an unsigned number inside the file.
    value: Option<u32>,
}

impl File<'_> {
    /// The entry at this place: tag, type, count and the value or its place, 12 bytes in all.
    fn entry(&self, at: usize) -> Option<Entry> {
        let (tag, kind) = (self.short(at)?, self.short(at + 2)?);
        let (count, place) = (self.long(at + 4)?, self.long(at + 8)? as usize);
        let first = |size: usize, read: &dyn Fn(usize) -> Option<u32>| {
            let inline = (count as usize).saturating_mul(size) <= 4;
            read(if inline { at + 8 } else { place })
        };
        let value = match kind {
            1 => first(1, &|at| self.bytes.get(at).map(|&byte| byte.into())),
            3 => first(2, &|at| self.short(at)),
            4 => first(4, &|at| self.long(at)),
            _ => None,
        };
        Some(Entry { tag, count, value })
    }

    fn short(&self, at: usize) -> Option<u32> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        let number =
            if self.little_endian { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) };
        Some(number.into())
    }

    fn long(&self, at: usize) -> Option<u32> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        Some(if self.little_endian { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };
    const SHORT: u16 = 3;
    const LONG: u16 = 4;

    /// A file of one directory without pixels: entries of tag, type, count and value.
    fn file(little_endian: bool, entries: &[(u32, u16, u32, u32)]) -> Vec<u8> {
        let short = |n: u16| if little_endian { n.to_le_bytes() } else { n.to_be_bytes() };
        let long = |n: u32| if little_endian { n.to_le_bytes() } else { n.to_be_bytes() };
        let mut bytes = if little_endian { b"II".to_vec() } else { b"MM".to_vec() };
        bytes.extend(short(42));
        bytes.extend(long(8));
        bytes.extend(short(entries.len() as u16));
        for &(tag, kind, count, value) in entries {
            bytes.extend(short(tag as u16));
            bytes.extend(short(kind));
            bytes.extend(long(count));
            if kind == SHORT && count == 1 {
                bytes.extend(short(value as u16));
                bytes.extend([0; 2]);
            } else {
                bytes.extend(long(value));
            }
        }
        bytes
    }

    fn verdict(entries: &[(u32, u16, u32, u32)]) -> Option<ImageErrorCode> {
        let [little, big] = [true, false]
            .map(|little| check(&file(little, entries), LIMITS).err().map(|error| error.code));
        assert_eq!(little, big);
        little
    }

    #[test]
    fn honest_directories_pass() {
        assert_eq!(verdict(&[(256, SHORT, 1, 1_000), (257, LONG, 1, 1_000)]), None);
        let tiled = [
            (256, LONG, 1, 100),
            (257, LONG, 1, 100),
            (277, SHORT, 1, 4),
            (322, SHORT, 1, 256),
            (324, LONG, 1, 8),
            (34_675, 7, 4_000_000_000, 0), // a profile that nobody reads
        ];
        assert_eq!(verdict(&tiled), None);
    }

    #[test]
    fn claims_are_bounded() {
        let size = [(256, LONG, 1, 100), (257, LONG, 1, 100)];
        let with = |more: &[(u32, u16, u32, u32)]| verdict(&[size.as_slice(), more].concat());
        let too_large = Some(ImageErrorCode::TooLarge);
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[(256, LONG, 1, 100_000)]), too_large);
        assert_eq!(with(&[(322, LONG, 1, u32::MAX), (277, SHORT, 1, 5)]), too_large);
        assert_eq!(with(&[(277, SHORT, 1, 65_535), (258, LONG, 1, 64)]), too_large);
        assert_eq!(with(&[(273, LONG, MAX_VALUES + 1, 8)]), too_large);
        assert_eq!(with(&[(259, SHORT, 1, 7)]), Some(ImageErrorCode::UnsupportedFormat));
    }

    #[test]
    fn damage_is_seen() {
        let corrupt = Some(ImageErrorCode::CorruptImage);
        assert_eq!(verdict(&[]), corrupt);
        assert_eq!(verdict(&[(256, LONG, 1, 0), (257, LONG, 1, 5)]), corrupt);
        assert_eq!(verdict(&[(256, 5, 1, 8), (257, LONG, 1, 5)]), corrupt); // a fraction
        assert_eq!(verdict(&[(256, LONG, 2, u32::MAX), (257, LONG, 1, 5)]), corrupt);
        let whole = file(true, &[(256, SHORT, 1, 10), (257, SHORT, 1, 10)]);
        for end in 0..whole.len() {
            assert!(check(&whole[..end], LIMITS).is_err(), "{end}");
        }
    }
}
