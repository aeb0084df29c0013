//! The orientation of a picture, found as Pillow's `ImageOps.exif_transpose` finds it: in the EXIF
//! data, else in the XMP packet.

use image::metadata::Orientation;

/// The tag of the orientation.
const ORIENTATION: u16 = 0x0112;

/// Entries of a directory that are looked at, at most.
const MAX_ENTRIES: u16 = 4_096;

/// The orientation that EXIF data (a small TIFF file) or an XMP packet gives. Damaged data gives none:
/// it does not make the picture unreadable.
pub(crate) fn orientation(exif: &[u8], xmp: Option<&[u8]>) -> Orientation {
    let number = of_exif(exif).or_else(|| xmp.and_then(of_xmp));
    number.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// The number in the first directory. `None` if there is none; one outside 1 to 8 means upright.
fn of_exif(mut exif: &[u8]) -> Option<u8> {
    // JPEG's prefix, which other containers should leave out; some writers give it twice.
    for _ in 0..2 {
        exif = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    }
    let data = Data { bytes: exif, little_endian: exif.starts_with(b"II") };
    if !(data.little_endian || exif.starts_with(b"MM")) {
        return None;
    }
    let start = data.long(4)? as usize;
    let count = data.short(start)?.min(MAX_ENTRIES);
    (0..usize::from(count)).find_map(|index| data.orientation_at(start + 2 + index * 12))
}

/// `tiff:Orientation` as an attribute or as an element.
fn of_xmp(packet: &[u8]) -> Option<u8> {
    let name = b"tiff:Orientation";
    let at = memchr::memmem::find(packet, name)?;
    let value = &packet[at + name.len()..];
    let value = value.strip_prefix(b"=\"").or_else(|| value.strip_prefix(b">"))?;
    value.first().filter(|digit| digit.is_ascii_digit()).map(|digit| digit - b'0')
}

struct Data<'a> {
    bytes: &'a [u8],
    little_endian: bool,
}

impl Data<'_> {
    /// The value of the entry at this place, if it is the orientation: tag, type, count, value.
    fn orientation_at(&self, at: usize) -> Option<u8> {
        if self.short(at)? != ORIENTATION {
            return None;
        }
        // Unsigned bytes are no number to Pillow.
        let (kind, count) = (self.short(at + 2)?, self.long(at + 4)?);
        // An array of more than 4 bytes is elsewhere; its first value counts.
        let place = |size: u32| {
            if count.saturating_mul(size) <= 4 {
                Some(at + 8)
            } else {
                Some(self.long(at + 8)? as usize)
            }
        };
        let value = match kind {
            6 => u32::from(*self.bytes.get(place(1)?)?),
            3 | 8 => self.short(place(2)?)?.into(),
            4 | 9 => self.long(place(4)?)?,
            _ => return None,
        };
        Some(u8::try_from(value).unwrap_or(0))
    }

    fn short(&self, at: usize) -> Option<u16> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        Some(if self.little_endian { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    }

    fn long(&self, at: usize) -> Option<u32> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        Some(if self.little_endian { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// EXIF data of one entry: type, count and the value's four bytes.
    fn exif(kind: u8, count: u8, value: [u8; 4]) -> Vec<u8> {
        let mut bytes = b"II*\0\x08\0\0\0\x01\0\x12\x01".to_vec();
        bytes.extend([kind, 0, count, 0, 0, 0]);
        bytes.extend(value);
        bytes
    }

    #[test]
    fn whole_numbers_of_every_type_count() {
        for kind in [3, 4, 6, 8, 9] {
            assert_eq!(orientation(&exif(kind, 1, [6, 0, 0, 0]), None), Orientation::Rotate90);
        }
        for (kind, value) in [(1, 6), (2, 6), (5, 6), (3, 0), (3, 9)] {
            let upright = Orientation::NoTransforms;
            assert_eq!(orientation(&exif(kind, 1, [value, 0, 0, 0]), None), upright);
        }
        let prefixed = [b"Exif\0\0Exif\0\0", exif(3, 1, [8, 0, 0, 0]).as_slice()].concat();
        assert_eq!(orientation(&prefixed, None), Orientation::Rotate270);
        let mut array = exif(4, 2, [26, 0, 0, 0]);
        array.extend([0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(orientation(&array, None), Orientation::Rotate180);
    }

    #[test]
    fn damaged_data_is_upright() {
        let whole = exif(3, 1, [6, 0, 0, 0]);
        for end in 0..whole.len() - 2 {
            assert_eq!(orientation(&whole[..end], None), Orientation::NoTransforms, "{end}");
        }
    }

    #[test]
    fn xmp_counts_if_exif_says_nothing() {
        let attribute = b"<rdf:Description tiff:Orientation=\"6\"/>".as_slice();
        let element = b"<tiff:Orientation>3</tiff:Orientation>".as_slice();
        assert_eq!(orientation(b"", Some(attribute)), Orientation::Rotate90);
        assert_eq!(orientation(b"", Some(element)), Orientation::Rotate180);
        let first = exif(3, 1, [8, 0, 0, 0]);
        assert_eq!(orientation(&first, Some(attribute)), Orientation::Rotate270);
    }
}
