//! GIF: what the decoder needs of a file for its first frame. Extensions that it does not know it takes
//! for damage, and of a frame larger than the screen it shows a part.

use image::metadata::Orientation;

use angler_wire::error::ImageError;

use super::Checked;
use crate::PixelLimits;
use crate::stored::{check_size, corrupt};

/// Makes the screen as large as the first frame needs, as Pillow does, and drops the extensions in
/// front of it but for the one about its transparency.
pub(super) fn check(bytes: &[u8], limits: PixelLimits) -> Result<Checked<'_>, ImageError> {
    let cut = || corrupt("GIF file ends early: it holds no frame");
    let (header, _) = bytes.split_first_chunk::<13>().ok_or_else(cut)?;
    let mut at = 13 + table(header[10]);
    let mut kept = bytes.get(..at).ok_or_else(cut)?.to_vec();
    loop {
        match *bytes.get(at).ok_or_else(cut)? {
            b',' => break,
            b';' => return Err(cut()),
            b'!' => {
                let start = at;
                let label = *bytes.get(at + 1).ok_or_else(cut)?;
                at += 2;
                // Blocks of data up to an empty one.
                while let length @ 1.. = usize::from(*bytes.get(at).ok_or_else(cut)?) {
                    at += 1 + length;
                }
                at += 1;
                if label == 0xf9 {
                    kept.extend_from_slice(bytes.get(start..at).ok_or_else(cut)?);
                }
            }
            _ => at += 1, // junk, which Pillow passes over, too
        }
    }
    let frame = bytes.get(at + 1..at + 9).ok_or_else(cut)?;
    for axis in 0..2 {
        let number = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
        let screen = number(&header[6 + 2 * axis..]);
        let end = number(&frame[2 * axis..]).saturating_add(number(&frame[4 + 2 * axis..]));
        kept[6 + 2 * axis..8 + 2 * axis].copy_from_slice(&screen.max(end).to_le_bytes());
    }
    let side = |at: usize| u32::from(u16::from_le_bytes([kept[at], kept[at + 1]]));
    check_size(side(6), side(8), limits)?;
    kept.extend_from_slice(&bytes[at..]);
    Ok(Checked { bytes: kept.into(), orientation: Orientation::NoTransforms })
}

/// The bytes of the colour table that these flags announce.
fn table(flags: u8) -> usize {
    if flags & 0x80 == 0 { 0 } else { 3 << (1 + (flags & 7)) }
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageErrorCode;

    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };

    /// A screen, then these blocks.
    fn file(width: u8, height: u8, blocks: &[&[u8]]) -> Vec<u8> {
        let screen = [width, 0, height, 0, 0x80, 0, 0, 0, 0, 0, 1, 2, 3];
        [b"GIF89a", screen.as_slice(), &blocks.concat()].concat()
    }

    /// A frame of 4 × 3 pixels at 2, 1, and whatever follows.
    const FRAME: &[u8] = b",\x02\0\x01\0\x04\0\x03\0\0rest";

    #[test]
    fn the_screen_holds_the_first_frame() {
        for (screen, expected) in [((0, 0), (6, 4)), ((5, 9), (6, 9)), ((9, 9), (9, 9))] {
            let checked =
                check(&file(screen.0, screen.1, &[FRAME]), LIMITS).unwrap().bytes.into_owned();
            assert_eq!(checked, file(expected.0, expected.1, &[FRAME]));
        }
    }

    #[test]
    fn only_the_extension_about_transparency_is_kept() {
        let control = b"!\xf9\x04\x01\0\0\0\0".as_slice();
        let unknown = b"!\x42\x03abc\x01d\0\0".as_slice();
        let file = |blocks: &[&[u8]]| file(9, 9, blocks);
        let whole = file(&[unknown, control, unknown, FRAME]);
        let checked = check(&whole, LIMITS).unwrap();
        assert_eq!(checked.bytes.as_ref(), file(&[control, FRAME]));
    }

    #[test]
    fn a_cut_file_is_corrupt() {
        let whole = file(9, 9, &[b"!\xf9\x04\x01\0\0\0\0", FRAME]);
        for end in 0..whole.len() - 5 {
            let error = check(&whole[..end], LIMITS).err().unwrap();
            assert_eq!(error.code, ImageErrorCode::CorruptImage, "{end}");
        }
    }
}
