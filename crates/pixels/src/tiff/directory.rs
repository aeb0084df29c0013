//! The first directory of a TIFF or BigTIFF file. Nothing is allocated on its word: lists are bounded by
//! the file's own length.

use angler_wire::error::ImageError;

use crate::stored::corrupt;

/// Entries of a directory, at most.
const MAX_ENTRIES: u64 = 4_096;

/// Values of a tag, at most: a tile of 8 × 8 for each part of a picture of 64 megapixels.
const MAX_VALUES: u64 = 1 << 20;

/// The tags that are read.
pub(super) mod tag {
    pub const WIDTH: u16 = 256;
    pub const HEIGHT: u16 = 257;
    pub const BITS: u16 = 258;
    pub const COMPRESSION: u16 = 259;
    pub const PHOTOMETRIC: u16 = 262;
    pub const FILL_ORDER: u16 = 266;
    pub const STRIP_OFFSETS: u16 = 273;
    pub const ORIENTATION: u16 = 274;
    pub const SAMPLES: u16 = 277;
    pub const STRIP_ROWS: u16 = 278;
    pub const STRIP_LENGTHS: u16 = 279;
    pub const PLANES: u16 = 284;
    pub const FAX_OPTIONS: u16 = 292;
    pub const PREDICTOR: u16 = 317;
    pub const COLOUR_MAP: u16 = 320;
    pub const TILE_WIDTH: u16 = 322;
    pub const TILE_HEIGHT: u16 = 323;
    pub const TILE_OFFSETS: u16 = 324;
    pub const TILE_LENGTHS: u16 = 325;
    pub const INKS: u16 = 332;
    pub const EXTRA_SAMPLES: u16 = 338;
    pub const SAMPLE_FORMAT: u16 = 339;
    pub const JPEG_TABLES: u16 = 347;
    pub const SUBSAMPLING: u16 = 530;
}

/// A TIFF file of either byte order, and its entries.
pub(super) struct Directory<'a> {
    bytes: &'a [u8],
    pub little_endian: bool,
    entries: Vec<Entry>,
}

/// An entry: its values are at `place`.
struct Entry {
    tag: u16,
    kind: u16,
    count: u64,
    place: usize,
}

fn damaged() -> ImageError {
    corrupt("TIFF file ends early or has a damaged directory")
}

impl<'a> Directory<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let mut file = Self { bytes, little_endian: bytes.starts_with(b"II"), entries: Vec::new() };
        let big = file.number(2, 2) == Some(43);
        // The sizes of an offset, of the number of entries, and of an entry.
        let (offset, number, entry) = if big { (8, 8, 20) } else { (4, 2, 12) };
        let at =
            |number: Option<u64>| number.and_then(|n| usize::try_from(n).ok()).ok_or_else(damaged);
        let start = at(file.number(if big { 8 } else { 4 }, offset))?;
        let count = file.number(start, number).ok_or_else(damaged)?;
        if count > MAX_ENTRIES {
            return Err(damaged());
        }
        for index in 0..count as usize {
            let place = start + number + index * entry;
            let tag = file.number(place, 2).ok_or_else(damaged)? as u16;
            let kind = file.number(place + 2, 2).ok_or_else(damaged)? as u16;
            let count = file.number(place + 4, offset).ok_or_else(damaged)?;
            let inline = place + 4 + offset;
            let value = file.number(inline, offset);
            let size = size(kind) as u64;
            let place =
                if count.saturating_mul(size) <= offset as u64 { inline } else { at(value)? };
            file.entries.push(Entry { tag, kind, count, place });
        }
        Ok(file)
    }

    /// The whole numbers of a tag; none if there is no such tag.
    pub(super) fn numbers(&self, tag: u16) -> Result<Vec<u64>, ImageError> {
        let Some(entry) = self.entries.iter().find(|entry| entry.tag == tag) else {
            return Ok(Vec::new());
        };
        let size = match entry.kind {
            1 | 3 | 4 | 8 | 9 | 13 | 16..=18 => size(entry.kind),
            _ => return Err(damaged()),
        };
        if entry.count > MAX_VALUES {
            return Err(super::too_large(format!("{} values for one tag", entry.count)));
        }
        (0..entry.count as usize)
            .map(|index| self.number(entry.place.saturating_add(index * size), size))
            .collect::<Option<_>>()
            .ok_or_else(damaged)
    }

    /// The first number of a tag, or `default`.
    pub(super) fn first(&self, tag: u16, default: u64) -> Result<u64, ImageError> {
        Ok(self.numbers(tag)?.first().copied().unwrap_or(default))
    }

    /// The bytes of a tag.
    pub(super) fn data(&self, tag: u16) -> Option<&'a [u8]> {
        let entry = self.entries.iter().find(|entry| entry.tag == tag)?;
        self.bytes.get(entry.place..)?.get(..usize::try_from(entry.count).ok()?)
    }

    /// The part of the file that begins at `offset`.
    pub(super) fn part(&self, offset: u64, length: u64) -> Result<&'a [u8], ImageError> {
        let part = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..));
        let part = part.and_then(|part| part.get(..usize::try_from(length).ok()?));
        part.ok_or_else(|| corrupt("TIFF file ends early"))
    }

    fn number(&self, at: usize, size: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at.checked_add(size)?)?;
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if self.little_endian {
            bytes.iter().rev().fold(0, add)
        } else {
            bytes.iter().fold(0, add)
        })
    }
}

/// The bytes of a value of this type.
fn size(kind: u16) -> usize {
    match kind {
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16..=18 => 8,
        _ => 1,
    }
}
