//! The numbers of a TIFF's pixels, of any type, and how they become 8 bits.

use angler_wire::error::ImageError;

use super::directory::{Directory, tag};
use crate::sniff::unsupported;

/// What a picture's numbers are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    pub bits: u16,
    format: Format,
    little_endian: bool,
    predictor: Predictor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Unsigned,
    Signed,
    Float,
}

/// What is stored instead of the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Predictor {
    None,
    /// The difference from the pixel to the left.
    Horizontal,
    /// The same of bytes, the highest ones of a row first.
    Float,
}

/// How a number becomes 8 bits: less `offset`, times `factor`, plus `bias`, without its fraction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    offset: f32,
    factor: f32,
    bias: f32,
}

impl Scale {
    /// A number as it is.
    pub(super) const RAW: Self = Self { offset: 0.0, factor: 1.0, bias: 0.0 };

    fn level(self, value: f32) -> u8 {
        // A cast clips, and makes 0 of what is no number.
        ((value - self.offset) * self.factor + self.bias) as u8
    }
}

/// The least and the greatest number of a picture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    least: f32,
    greatest: f32,
}

impl Range {
    pub(super) const EMPTY: Self = Self { least: f32::INFINITY, greatest: f32::NEG_INFINITY };

    /// Takes the colours of the first `pixels` pixels of a row in; what is not finite does not count.
    pub(super) fn widen(
        &mut self,
        samples: &Samples,
        row: &[u8],
        pixels: usize,
        channels: usize,
        colours: usize,
    ) {
        for pixel in 0..pixels {
            for colour in 0..colours {
                let value = samples.value(row, pixel * channels + colour);
                if value.is_finite() {
                    self.least = self.least.min(value);
                    self.greatest = self.greatest.max(value);
                }
            }
        }
    }
}

impl Samples {
    pub(super) fn of(directory: &Directory<'_>) -> Result<Self, ImageError> {
        let bits = directory.numbers(tag::BITS)?;
        let first = bits.first().copied().unwrap_or(1);
        if bits.iter().any(|bits| *bits != first) {
            return Err(unsupported("a TIFF of values of different lengths"));
        }
        let formats = directory.numbers(tag::SAMPLE_FORMAT)?;
        let format = formats.first().copied().unwrap_or(1);
        if formats.iter().any(|other| *other != format) {
            return Err(unsupported("a TIFF of values of different types"));
        }
        let format = match (format, first) {
            (1 | 4, 1..=32 | 64) => Format::Unsigned,
            (2, 2..=32 | 64) => Format::Signed,
            (3, 16 | 32 | 64) => Format::Float,
            (5 | 6, _) => return Err(unsupported("a TIFF of complex numbers")),
            _ => return Err(unsupported(&format!("a TIFF of values of {first} bits"))),
        };
        let predictor = match directory.first(tag::PREDICTOR, 1)? {
            2 if first.is_multiple_of(8) && first.is_power_of_two() => Predictor::Horizontal,
            3 if format == Format::Float => Predictor::Float,
            0 | 1 => Predictor::None,
            other => return Err(unsupported(&format!("a TIFF of an unknown predictor ({other})"))),
        };
        let little_endian = directory.little_endian;
        Ok(Self { bits: first as u16, format, little_endian, predictor })
    }

    /// How numbers of this type become 8 bits; `None` if their range is not known by their type.
    pub(super) fn scale(&self) -> Option<Scale> {
        if self.format != Format::Unsigned || self.bits >= 32 {
            return None;
        }
        Some(match self.bits {
            bits @ 1..=7 => {
                Scale { offset: 0.0, factor: 255.0 / ((1 << bits) - 1) as f32, bias: 0.5 }
            }
            // The high byte, as Pillow has it.
            bits => Scale { offset: 0.0, factor: 0.5f32.powi(i32::from(bits) - 8), bias: 0.0 },
        })
    }

    /// The same by the range of a picture: 0 to 1 for floating point and the type's own for signed
    /// numbers, if all are inside; else from the least number to the greatest.
    pub(super) fn scale_of(&self, range: Range) -> Scale {
        let Range { least, greatest } = range;
        match self.format {
            Format::Float if least >= 0.0 && greatest <= 1.0 => {
                Scale { offset: 0.0, factor: 255.0, bias: 0.5 }
            }
            Format::Signed if least >= 0.0 && self.bits < 32 => {
                Scale { offset: 0.0, factor: 0.5f32.powi(i32::from(self.bits) - 9), bias: 0.0 }
            }
            _ if greatest > least => {
                Scale { offset: least, factor: 255.0 / (greatest - least), bias: 0.5 }
            }
            _ => Scale { offset: 0.0, factor: 0.0, bias: 0.0 },
        }
    }

    /// The levels of a row of numbers.
    pub(super) fn levels<'a>(
        &self,
        row: &[u8],
        scale: Scale,
        levels: impl Iterator<Item = &'a mut u8>,
    ) {
        match (self.format, self.bits) {
            (Format::Unsigned, 8) => {
                levels.zip(row).for_each(|(level, byte)| *level = *byte);
            }
            (Format::Unsigned, 16) => {
                let high = usize::from(self.little_endian);
                let (pairs, _) = row.as_chunks::<2>();
                levels.zip(pairs).for_each(|(level, pair)| *level = pair[high]);
            }
            _ => levels.enumerate().for_each(|(index, level)| {
                *level = scale.level(self.value(row, index));
            }),
        }
    }

    /// The number at a place in a row; 0 outside.
    fn value(&self, row: &[u8], index: usize) -> f32 {
        if self.bits < 8 || !self.bits.is_multiple_of(8) || self.bits == 24 {
            return self.packed(row, index);
        }
        let size = usize::from(self.bits / 8);
        let bytes = row.get(index * size..(index + 1) * size).unwrap_or(&[0; 8][..size]);
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        let number = if self.little_endian {
            bytes.iter().rev().fold(0, add)
        } else {
            bytes.iter().fold(0, add)
        };
        match (self.format, self.bits) {
            (Format::Unsigned, _) => number as f32,
            (Format::Signed, bits) => {
                (number << (64 - bits)).cast_signed() as f32 / 2f32.powi(64 - i32::from(bits))
            }
            (Format::Float, 16) => half::f16::from_bits(number as u16).to_f32(),
            (Format::Float, 32) => f32::from_bits(number as u32),
            (Format::Float, _) => f64::from_bits(number) as f32,
        }
    }

    /// A number whose bits follow those of the one before.
    fn packed(&self, row: &[u8], index: usize) -> f32 {
        let bits = usize::from(self.bits);
        let start = index * bits;
        let mut number = 0u32;
        for at in start..start + bits {
            let byte = row.get(at / 8).copied().unwrap_or(0);
            number = number << 1 | u32::from(byte >> (7 - at % 8) & 1);
        }
        match self.format {
            Format::Signed => {
                (number << (32 - bits)).cast_signed() as f32 / 2f32.powi(32 - bits as i32)
            }
            _ => number as f32,
        }
    }

    /// Turns differences back into numbers; `channels` of them are a pixel.
    pub(super) fn undo_prediction(&self, row: &mut [u8], channels: usize) {
        let size = usize::from(self.bits / 8);
        match self.predictor {
            Predictor::None => {}
            Predictor::Horizontal => self.sum(row, channels, size),
            Predictor::Float => {
                for at in channels..row.len() {
                    row[at] = row[at].wrapping_add(row[at - channels]);
                }
                let planes = row.to_vec();
                let count = row.len() / size;
                for (at, byte) in row.iter_mut().enumerate() {
                    let plane = at % size;
                    let plane = if self.little_endian { size - 1 - plane } else { plane };
                    *byte = planes.get(plane * count + at / size).copied().unwrap_or(0);
                }
            }
        }
    }

    /// Sums up differences of numbers of `size` bytes.
    fn sum(&self, row: &mut [u8], channels: usize, size: usize) {
        for at in (channels * size..row.len() / size * size).step_by(size) {
            let mut carry = 0;
            for index in 0..size {
                let place = at + if self.little_endian { index } else { size - 1 - index };
                let sum = u16::from(row[place]) + u16::from(row[place - channels * size]) + carry;
                row[place] = sum as u8; // the low byte
                carry = sum >> 8;
            }
        }
    }
}
