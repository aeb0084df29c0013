//! What the values of a TIFF's pixels mean, and the RGB of them.

use angler_wire::error::ImageError;

use super::directory::{Directory, tag};
use super::samples::Samples;
use super::unpack::Compression;
use crate::jpeg;
use crate::sniff::unsupported;
use crate::stored::{corrupt, over_white};

/// How a pixel's levels become RGB.
#[derive(Debug)]
pub(super) enum Paint {
    /// `dark`: 0 is white.
    Grey {
        dark: bool,
        alpha: Option<Alpha>,
    },
    Rgb {
        alpha: Option<Alpha>,
    },
    /// Places in a list of colours.
    Palette {
        colours: Vec<[u8; 3]>,
    },
    /// Four inks, 0 is none.
    Inks,
    /// Luminance and colour differences, which stand once for so many columns and rows.
    YCbCr {
        subsampling: (usize, usize),
    },
    /// JPEGs of them, which the JPEG decoder has turned into RGB.
    YCbCrOfJpeg,
    /// CIE L*a*b*; `offset`: 128 stands for 0 in a and b.
    Lab {
        offset: bool,
    },
}

/// An opacity behind the colours: at this place, and whether they are multiplied by it already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Alpha {
    place: usize,
    multiplied: bool,
}

impl Paint {
    pub(super) fn of(
        directory: &Directory<'_>,
        count: usize,
        samples: Samples,
        compression: Compression,
    ) -> Result<Self, ImageError> {
        let photometric = directory.first(tag::PHOTOMETRIC, 1)?;
        let colours = match photometric {
            2 | 6 | 8 | 9 => 3,
            5 => 4,
            _ => 1,
        };
        if count < colours {
            return Err(corrupt(format!("TIFF file is damaged: {count} values per pixel")));
        }
        let alpha = alpha(directory, count, colours)?;
        let jpeg = compression == Compression::Jpeg;
        Ok(match photometric {
            0 | 1 => Self::Grey { dark: photometric == 0, alpha },
            2 => Self::Rgb { alpha },
            3 if samples.bits <= 8 && !jpeg => Self::Palette { colours: palette(directory)? },
            5 if directory.first(tag::INKS, 1)? == 1 && !jpeg => Self::Inks,
            6 if jpeg => Self::YCbCrOfJpeg,
            6 if samples.bits == 8 && count == 3 && directory.first(tag::PLANES, 1)? != 2 => {
                Self::YCbCr { subsampling: subsampling(directory)? }
            }
            8 | 9 if matches!(samples.bits, 8 | 16) && !jpeg => {
                Self::Lab { offset: photometric == 9 }
            }
            32_803 | 34_892 => return Err(unsupported("a camera's raw photo (DNG)")),
            32_844 | 32_845 => return Err(unsupported("a TIFF of logarithmic luminance")),
            4 => return Err(unsupported("a TIFF that is a mask")),
            _ => {
                let kind = format!("a TIFF of unusual colours (photometric {photometric})");
                return Err(unsupported(&kind));
            }
        })
    }

    /// Values of a pixel that are colours.
    pub(super) fn colours(&self) -> usize {
        match self {
            Self::Grey { .. } | Self::Palette { .. } => 1,
            Self::Inks => 4,
            _ => 3,
        }
    }

    pub(super) fn is_ycbcr(&self) -> bool {
        matches!(self, Self::YCbCrOfJpeg)
    }

    /// `true` if numbers are no brightness of 0 to their greatest.
    pub(super) fn takes_numbers_as_they_are(&self) -> bool {
        matches!(self, Self::Palette { .. } | Self::Lab { .. } | Self::YCbCr { .. })
    }

    pub(super) fn rgb(&self, levels: &[u8]) -> [u8; 3] {
        match *self {
            Self::Grey { dark, alpha } => {
                let grey = if dark { 255 - levels[0] } else { levels[0] };
                on_white([grey; 3], levels, alpha)
            }
            Self::Rgb { alpha } => on_white([levels[0], levels[1], levels[2]], levels, alpha),
            Self::Palette { ref colours } => {
                colours.get(usize::from(levels[0])).copied().unwrap_or_default()
            }
            Self::Inks => [levels[0], levels[1], levels[2]].map(|ink| {
                let light = (255 - u32::from(ink)) * (255 - u32::from(levels[3]));
                ((light + 127) / 255) as u8 // at most 255
            }),
            Self::YCbCr { .. } => {
                let mut pixel = [levels[0], levels[1], levels[2]];
                jpeg::to_rgb(&mut pixel);
                pixel
            }
            Self::YCbCrOfJpeg => [levels[0], levels[1], levels[2]],
            Self::Lab { offset } => lab([levels[0], levels[1], levels[2]], offset),
        }
    }
}

fn on_white(rgb: [u8; 3], levels: &[u8], alpha: Option<Alpha>) -> [u8; 3] {
    match alpha {
        None => rgb,
        Some(Alpha { place, multiplied: false }) => {
            rgb.map(|level| over_white(level, levels[place]))
        }
        Some(Alpha { place, multiplied: true }) => {
            rgb.map(|level| level.saturating_add(255 - levels[place]))
        }
    }
}

/// The opacity among the values behind the colours. Without a word on them, one value more is one.
fn alpha(
    directory: &Directory<'_>,
    count: usize,
    colours: usize,
) -> Result<Option<Alpha>, ImageError> {
    let extra = directory.numbers(tag::EXTRA_SAMPLES)?;
    if extra.is_empty() && count == colours + 1 {
        return Ok(Some(Alpha { place: colours, multiplied: false }));
    }
    let place = extra.iter().position(|kind| matches!(kind, 1 | 2));
    let place = place.filter(|place| colours + place < count);
    Ok(place.map(|place| Alpha { place: colours + place, multiplied: extra[place] == 1 }))
}

/// The list of colours: all reds, all greens, all blues, 16 bits each. Some writers leave the high
/// bytes 0.
fn palette(directory: &Directory<'_>) -> Result<Vec<[u8; 3]>, ImageError> {
    let map = directory.numbers(tag::COLOUR_MAP)?;
    let count = map.len() / 3;
    if count == 0 {
        return Err(corrupt("TIFF file is damaged: its list of colours is missing"));
    }
    let shift = if map.iter().all(|level| *level < 256) { 0 } else { 8 };
    let level = |index: usize| (map[index] >> shift) as u8; // of 16 bits
    Ok((0..count).map(|index| [0, count, 2 * count].map(|start| level(start + index))).collect())
}

fn subsampling(directory: &Directory<'_>) -> Result<(usize, usize), ImageError> {
    let numbers = directory.numbers(tag::SUBSAMPLING)?;
    match numbers[..] {
        [] => Ok((2, 2)),
        [across @ (1 | 2 | 4), down @ (1 | 2 | 4), ..] => Ok((across as usize, down as usize)),
        _ => Err(corrupt("TIFF file is damaged: its subsampling is unusual")),
    }
}

/// The bytes of a part: for each block of pixels its luminances, then two colour differences.
pub(super) fn subsampled_length(
    (across, down): (usize, usize),
    width: usize,
    rows: usize,
) -> usize {
    width.div_ceil(across) * rows.div_ceil(down) * (across * down + 2)
}

/// Gives each pixel its colour differences: levels [rows, width, 3].
pub(super) fn unsubsample(
    bytes: &[u8],
    (across, down): (usize, usize),
    width: usize,
    levels: &mut [u8],
) {
    let blocks = width.div_ceil(across);
    let luminances = across * down;
    for (y, row) in levels.chunks_exact_mut(width * 3).enumerate() {
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            let start = ((y / down) * blocks + x / across) * (luminances + 2);
            let block = &bytes[start..start + luminances + 2];
            let luminance = block[(y % down) * across + x % across];
            pixel.copy_from_slice(&[luminance, block[luminances], block[luminances + 1]]);
        }
    }
}

/// CIE L*a*b* (D50) to sRGB.
fn lab([lightness, a, b]: [u8; 3], offset: bool) -> [u8; 3] {
    let signed = |level: u8| {
        if offset { f32::from(level) - 128.0 } else { f32::from(level.cast_signed()) }
    };
    let y = (f32::from(lightness) / 2.55 + 16.0) / 116.0;
    let linear = |t: f32| if t > 6.0 / 29.0 { t.powi(3) } else { (t - 4.0 / 29.0) * 108.0 / 841.0 };
    let [x, y, z] =
        [0.9642 * linear(y + signed(a) / 500.0), linear(y), 0.8249 * linear(y - signed(b) / 200.0)];
    // To sRGB's primaries, from D50 to D65 (Bradford).
    let rgb = [
        3.13386 * x - 1.61687 * y - 0.490_615 * z,
        -0.978_768 * x + 1.91614 * y + 0.033_454 * z,
        0.071_945 * x - 0.228_991 * y + 1.40524 * z,
    ];
    rgb.map(|light| {
        let level = if light <= 0.003_130_8 {
            12.92 * light
        } else {
            1.055 * light.powf(1.0 / 2.4) - 0.055
        };
        (level * 255.0 + 0.5) as u8
    })
}
