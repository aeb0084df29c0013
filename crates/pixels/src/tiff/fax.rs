//! CCITT facsimile coding, Groups 3 and 4 (ITU-T T.4 and T.6), as TIFF files hold it. The codes are those
//! of the crate `fax`, whose own decoders know neither the two-dimensional Group 3 nor rows without
//! end-of-line codes.

use fax::BitReader;
use fax::maps::{Mode, black, mode, white};

/// How rows are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    /// Each row on its own, from a byte on (TIFF compression 2).
    Rows,
    /// Group 3, each row on its own.
    Group3,
    /// Group 3, most rows by their difference from the one before.
    Group3Mixed,
    /// Group 4: every row by its difference from the one before.
    Group4,
}

/// An end-of-line code: at least 11 zeros, then a one.
const END_OF_LINE_ZEROS: u8 = 11;

/// Decodes `rows` rows of `width` pixels; a bit per pixel, black 1, each row from a byte on. `None` if
/// the data is damaged or ends early.
pub(super) fn decode(bytes: &[u8], width: u16, rows: usize, coding: Coding) -> Option<Vec<u8>> {
    let stride = usize::from(width).div_ceil(8);
    let mut packed = vec![0; stride.checked_mul(rows)?];
    let mut reader = Reader { bytes, at: 0 };
    let (mut reference, mut current) = (Vec::new(), Vec::new());
    for row in packed.chunks_exact_mut(stride) {
        current.clear();
        let plain = match coding {
            Coding::Rows => {
                reader.at = reader.at.next_multiple_of(8);
                true
            }
            Coding::Group3 => {
                reader.skip_end_of_line();
                true
            }
            Coding::Group3Mixed => {
                reader.skip_end_of_line();
                reader.take()
            }
            Coding::Group4 => false,
        };
        if plain {
            plain_row(&mut reader, width, &mut current)?;
        } else if !difference(&mut reader, width, &reference, &mut current)? {
            break; // the end of the block: the rest is white
        }
        paint(row, width, &current);
        std::mem::swap(&mut reference, &mut current);
    }
    (reader.at <= bytes.len() * 8 + 7).then_some(packed)
}

/// A row of runs, white first.
fn plain_row(reader: &mut Reader<'_>, width: u16, changes: &mut Vec<u16>) -> Option<()> {
    let (mut at, mut dark) = (0u16, false);
    while at < width {
        at = at.checked_add(run(reader, dark)?).filter(|at| *at <= width)?;
        changes.push(at);
        dark = !dark;
    }
    Some(())
}

/// A row by its difference from the one above; `false` at the end of the block. (T.6, 2.2.)
fn difference(
    reader: &mut Reader<'_>,
    width: u16,
    above: &[u16],
    changes: &mut Vec<u16>,
) -> Option<bool> {
    let (mut at, mut dark, mut begun) = (0u16, false, false);
    while at < width {
        // The first change above that lies to the right and to the other colour, and the next one.
        // Changes to black have even places in the list.
        let mut first = above.partition_point(|&change| change < at || (begun && change == at));
        if first % 2 != usize::from(dark) {
            first += 1;
        }
        let change = |index: usize| above.get(index).copied().unwrap_or(width);
        match mode::decode(reader)? {
            Mode::Pass => at = change(first + 1),
            Mode::Vertical(off) => {
                let next = i32::from(change(first)) + i32::from(off);
                at = u16::try_from(next).ok().filter(|next| (at..=width).contains(next))?;
                changes.push(at);
                dark = !dark;
            }
            Mode::Horizontal => {
                for dark in [dark, !dark] {
                    at = at.checked_add(run(reader, dark)?).filter(|at| *at <= width)?;
                    changes.push(at);
                }
            }
            Mode::EOF if !begun => return Some(false),
            Mode::EOF | Mode::Extension => return None,
        }
        begun = true;
    }
    Some(true)
}

/// The length of a run: codes of multiples of 64, then one below 64.
fn run(reader: &mut Reader<'_>, dark: bool) -> Option<u16> {
    let mut sum = 0u16;
    loop {
        let length = if dark { black::decode(reader) } else { white::decode(reader) }?;
        sum = sum.checked_add(length)?;
        if length < 64 {
            return Some(sum);
        }
    }
}

/// Sets the bits of the black runs.
fn paint(row: &mut [u8], width: u16, changes: &[u16]) {
    for run in changes.chunks(2) {
        let end = run.get(1).copied().unwrap_or(width);
        for x in run[0]..end {
            row[usize::from(x / 8)] |= 0x80 >> (x % 8);
        }
    }
}

/// Bits of bytes, zeros behind them.
struct Reader<'a> {
    bytes: &'a [u8],
    /// In bits.
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self) -> bool {
        let bit = self.peek(1) == Some(1);
        self.at += 1;
        bit
    }

    /// Skips an end-of-line code with the zeros in front of it, if one follows.
    fn skip_end_of_line(&mut self) {
        if self.peek(END_OF_LINE_ZEROS) != Some(0) {
            return;
        }
        while self.at < self.bytes.len() * 8 && !self.take() {}
    }
}

impl BitReader for Reader<'_> {
    type Error = ();

    fn peek(&self, bits: u8) -> Option<u16> {
        let byte =
            |index: usize| u32::from(self.bytes.get(self.at / 8 + index).copied().unwrap_or(0));
        let window = byte(0) << 16 | byte(1) << 8 | byte(2);
        let shift = 24u32.checked_sub(self.at as u32 % 8 + u32::from(bits))?;
        Some((window >> shift & ((1 << bits) - 1)) as u16)
    }

    fn consume(&mut self, bits: u8) -> Result<(), ()> {
        self.at += usize::from(bits);
        if self.at > self.bytes.len() * 8 + 7 { Err(()) } else { Ok(()) }
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        (self.at.next_multiple_of(8) - self.at) as u8
    }
}

#[cfg(test)]
mod tests {
    use fax::encoder::Encoder;
    use fax::{Color, VecWriter};

    use super::*;

    #[test]
    fn group_4_comes_back() {
        const WIDTH: u16 = 61;
        let dark = |x: u16, y: u16| (x * 7 + y * y) % 11 < 4 && !(x / 5 + y).is_multiple_of(3);
        let mut encoder = Encoder::new(VecWriter::new());
        for y in 0..40 {
            let colour = |x| if dark(x, y) { Color::Black } else { Color::White };
            encoder.encode_line((0..WIDTH).map(colour), WIDTH).unwrap();
        }
        let bytes = encoder.finish().unwrap().finish();
        let packed = decode(&bytes, WIDTH, 40, Coding::Group4).unwrap();
        for y in 0..40 {
            for x in 0..WIDTH {
                let bit = packed[usize::from(y) * 8 + usize::from(x / 8)] & (0x80 >> (x % 8)) != 0;
                assert_eq!(bit, dark(x, y), "{x}, {y}");
            }
        }
        assert_eq!(decode(&bytes[..bytes.len() / 2], WIDTH, 40, Coding::Group4), None);
    }
}
