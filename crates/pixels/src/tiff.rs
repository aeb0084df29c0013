//! TIFF and BigTIFF: strips and tiles, planes together or apart, samples of 1 to 64 bits, whole and
//! floating-point numbers, the usual colours and compressions. The first picture of a file is read.
//!
//! This is a reader of our own, on crates that undo the compressions: the usual one panics on some kinds,
//! refuses others, and believes the sizes that a file claims.

mod colours;
mod directory;
mod fax;
mod samples;
#[cfg(test)]
mod tests;
mod unpack;

use image::RgbImage;
use image::metadata::Orientation;

use angler_wire::error::{ImageError, ImageErrorCode};

use super::PixelLimits;
use super::sniff::unsupported;
use super::stored::{Colours, METADATA_BYTES, Stored, bytes_allowed, check_size, corrupt};
use colours::Paint;
use directory::{Directory, tag};
use samples::{Samples, Scale};
use unpack::{Compression, unpack, unpack_jpeg};

/// JPEGs inside a file, at most: each brings tables that have to be read.
const MAX_JPEGS: usize = 1 << 14;

/// Values of a pixel, at most.
const MAX_SAMPLES: u64 = 64;

/// Decodes the first picture of a file.
pub(super) fn decode(bytes: &[u8], limits: PixelLimits) -> Result<Stored, ImageError> {
    let directory = Directory::read(bytes)?;
    let picture = Picture::of(&directory, limits)?;
    let orientation = directory.first(tag::ORIENTATION, 1).unwrap_or(1);
    let orientation = u8::try_from(orientation).ok().and_then(Orientation::from_exif);
    let image = picture.read()?;
    Ok(Stored::whole(image, orientation.unwrap_or(Orientation::NoTransforms)))
}

pub(super) fn too_large(claim: String) -> ImageError {
    ImageError::new(ImageErrorCode::TooLarge, format!("TIFF file claims {claim}"))
}

/// A picture, in parts: strips or tiles, of all planes or of one.
struct Picture<'a> {
    directory: &'a Directory<'a>,
    width: u32,
    height: u32,
    /// Width and height of a part. Tiles are whole, the last strip holds what remains.
    part: (u32, u32),
    tiled: bool,
    /// Planes, each in parts of its own.
    planes: usize,
    /// Values of a pixel in a part.
    channels: usize,
    compression: Compression,
    /// `true` if the bits of each byte are in reverse.
    reversed: bool,
    offsets: Vec<u64>,
    lengths: Vec<u64>,
    samples: Samples,
    paint: Paint,
}

impl<'a> Picture<'a> {
    fn of(directory: &'a Directory<'a>, limits: PixelLimits) -> Result<Self, ImageError> {
        let number = |tag, default| {
            let number = directory.first(tag, default)?;
            u32::try_from(number).map_err(|_| corrupt("TIFF file has a damaged directory"))
        };
        let (width, height) = (number(tag::WIDTH, 0)?, number(tag::HEIGHT, 0)?);
        check_size(width, height, limits)?;
        let tiled = !directory.numbers(tag::TILE_WIDTH)?.is_empty();
        let part = if tiled {
            (number(tag::TILE_WIDTH, 0)?, number(tag::TILE_HEIGHT, 0)?)
        } else {
            let rows = directory.first(tag::STRIP_ROWS, height.into())?.min(height.into());
            (width, rows as u32) // at most the height
        };
        if part.0 == 0 || part.1 == 0 {
            return Err(corrupt("TIFF file is damaged: its parts are empty"));
        }
        let count = directory.first(tag::SAMPLES, 1)?;
        let samples = Samples::of(directory)?;
        claims_memory(part, count, samples.bits, limits)?;
        if count == 0 || count > MAX_SAMPLES {
            return Err(unsupported(&format!("a TIFF of {count} values per pixel")));
        }
        let apart = number(tag::PLANES, 1)? == 2 && count > 1;
        let compression = Compression::of(
            directory.first(tag::COMPRESSION, 1)?,
            directory.first(tag::FAX_OPTIONS, 0)?,
        )?;
        let paint = Paint::of(directory, count as usize, samples, compression)?;
        if matches!(compression, Compression::Fax(_)) && (samples.bits, count) != (1, 1) {
            return Err(unsupported("a TIFF with fax compression of more than one bit per pixel"));
        }
        let (offsets, lengths) = match tiled {
            true => (tag::TILE_OFFSETS, tag::TILE_LENGTHS),
            false => (tag::STRIP_OFFSETS, tag::STRIP_LENGTHS),
        };
        let picture = Self {
            directory,
            width,
            height,
            part,
            tiled,
            planes: if apart { count as usize } else { 1 },
            channels: if apart { 1 } else { count as usize },
            compression,
            reversed: number(tag::FILL_ORDER, 1)? == 2 && compression != Compression::Jpeg,
            offsets: directory.numbers(offsets)?,
            lengths: directory.numbers(lengths)?,
            samples,
            paint,
        };
        let parts = picture.across() * picture.down() * picture.planes;
        if picture.offsets.len() < parts {
            return Err(corrupt("TIFF file is damaged: parts of its picture are missing"));
        }
        if compression == Compression::Jpeg && (parts > MAX_JPEGS || samples.bits != 8) {
            return Err(unsupported("a TIFF with JPEGs inside that are too many or not of 8 bits"));
        }
        Ok(picture)
    }

    fn across(&self) -> usize {
        self.width.div_ceil(self.part.0) as usize
    }

    fn down(&self) -> usize {
        self.height.div_ceil(self.part.1) as usize
    }

    /// Rows of the part that begins at row `top`: what is stored of it.
    fn rows(&self, top: u32) -> u32 {
        if self.tiled { self.part.1 } else { self.part.1.min(self.height - top) }
    }

    fn read(&self) -> Result<RgbImage, ImageError> {
        let scale = self.scale()?;
        let mut image = RgbImage::new(self.width, self.height);
        for down in 0..self.down() {
            for across in 0..self.across() {
                self.read_part(&mut image, across, down, scale)?;
            }
        }
        Ok(image)
    }

    /// Reads the part at this place into the picture.
    fn read_part(
        &self,
        image: &mut RgbImage,
        across: usize,
        down: usize,
        scale: Scale,
    ) -> Result<(), ImageError> {
        let (left, top) = (across as u32 * self.part.0, down as u32 * self.part.1);
        let rows = self.rows(top);
        let width = self.part.0 as usize;
        let count = self.planes * self.channels;
        // [rows, width, count], 8 bits each.
        let mut levels = vec![0; rows as usize * width * count];
        for plane in 0..self.planes {
            let index = (plane * self.down() + down) * self.across() + across;
            if self.compression == Compression::Jpeg {
                self.jpeg(index, rows, &mut levels, plane)?;
                continue;
            }
            let bytes = self.bytes(index, rows)?;
            if let Paint::YCbCr { subsampling } = self.paint {
                colours::unsubsample(&bytes, subsampling, width, &mut levels);
                continue;
            }
            let stride = self.stride();
            for (packed, row) in
                bytes.chunks_exact(stride).zip(levels.chunks_exact_mut(width * count))
            {
                if self.planes == 1 {
                    self.samples.levels(packed, scale, row.iter_mut());
                } else {
                    self.samples.levels(packed, scale, row.iter_mut().skip(plane).step_by(count));
                }
            }
        }
        let shown = (self.width - left).min(self.part.0) as usize;
        let (target, _) = image.as_chunks_mut::<3>();
        for (y, row) in levels.chunks_exact(width * count).enumerate() {
            let y = top as usize + y;
            if y >= self.height as usize {
                break;
            }
            let start = y * self.width as usize + left as usize;
            for (pixel, levels) in
                target[start..start + shown].iter_mut().zip(row.chunks_exact(count))
            {
                *pixel = self.paint.rgb(levels);
            }
        }
        Ok(())
    }

    /// The bytes of a row of a part.
    fn stride(&self) -> usize {
        (self.part.0 as usize * self.channels * usize::from(self.samples.bits)).div_ceil(8)
    }

    /// The bytes of a part that is no JPEG, [rows, stride].
    fn bytes(&self, index: usize, rows: u32) -> Result<Vec<u8>, ImageError> {
        let length = match self.paint {
            Paint::YCbCr { subsampling } => {
                colours::subsampled_length(subsampling, self.part.0 as usize, rows as usize)
            }
            _ => self.stride() * rows as usize,
        };
        let packed = self.packed(index, length)?;
        let reversed: Vec<u8>;
        let packed = if self.reversed {
            reversed = packed.iter().map(|byte| byte.reverse_bits()).collect();
            &reversed
        } else {
            packed
        };
        let mut bytes = unpack(packed, self.compression, (self.part.0, rows), length)?;
        for row in bytes.chunks_exact_mut(self.stride()) {
            self.samples.undo_prediction(row, self.channels);
        }
        Ok(bytes)
    }

    fn packed(&self, index: usize, length: usize) -> Result<&'a [u8], ImageError> {
        let packed = match self.lengths.get(index) {
            Some(&length) => length,
            None if self.compression == Compression::None => length as u64,
            None => return Err(corrupt("TIFF file is damaged: parts of its picture are missing")),
        };
        self.directory.part(self.offsets[index], packed)
    }

    /// Reads a part that is a JPEG: of all colours, or of the one at `plane`.
    fn jpeg(
        &self,
        index: usize,
        rows: u32,
        levels: &mut [u8],
        plane: usize,
    ) -> Result<(), ImageError> {
        let packed = self.packed(index, 0)?;
        let tables = self.directory.data(tag::JPEG_TABLES).unwrap_or_default();
        // JPEGs are whole blocks, so that the last may be larger than its part.
        let area = u64::from(self.part.0 + 16) * u64::from(self.part.1 + 16);
        let colours = if self.paint.is_ycbcr() { Colours::YCbCr } else { Colours::Rgb };
        let limits = PixelLimits { max_pixels: area };
        let (rgb, (width, height)) = unpack_jpeg(packed, tables, colours, limits)?;
        if width < self.part.0 || height < rows {
            return Err(corrupt("TIFF file is damaged: a JPEG inside is too small"));
        }
        let count = self.planes * self.channels;
        let target = levels.chunks_exact_mut(self.part.0 as usize * count);
        for (row, source) in target.zip(rgb.chunks_exact(width as usize * 3)) {
            for (pixel, source) in row.chunks_exact_mut(count).zip(source.chunks_exact(3)) {
                if self.channels == 1 {
                    pixel[plane] = source[0];
                } else {
                    pixel.iter_mut().zip(source).for_each(|(level, source)| *level = *source);
                }
            }
        }
        Ok(())
    }

    /// How numbers become 8 bits. Where the kind of number does not say, the picture's own range does.
    fn scale(&self) -> Result<Scale, ImageError> {
        if self.paint.takes_numbers_as_they_are() {
            return Ok(Scale::RAW);
        }
        if let Some(scale) = self.samples.scale() {
            return Ok(scale);
        }
        let mut range = samples::Range::EMPTY;
        for plane in 0..self.planes.min(self.paint.colours()) {
            for down in 0..self.down() {
                for across in 0..self.across() {
                    let index = (plane * self.down() + down) * self.across() + across;
                    let rows = self.rows(down as u32 * self.part.1);
                    let shown =
                        (self.width - across as u32 * self.part.0).min(self.part.0) as usize;
                    let shown_rows = (self.height - down as u32 * self.part.1) as usize;
                    for row in self.bytes(index, rows)?.chunks_exact(self.stride()).take(shown_rows)
                    {
                        let colours = self.paint.colours().min(self.channels);
                        range.widen(&self.samples, row, shown, self.channels, colours);
                    }
                }
            }
        }
        Ok(self.samples.scale_of(range))
    }
}

/// Holds what decoding a part takes against the limits: its bytes, its levels, and the whole picture.
fn claims_memory(
    part: (u32, u32),
    count: u64,
    bits: u16,
    limits: PixelLimits,
) -> Result<(), ImageError> {
    let product =
        |factors: &[u64]| factors.iter().fold(1, |product: u64, n| product.saturating_mul(*n));
    let row = product(&[part.0.into(), count, bits.into()]) / 8;
    if row > METADATA_BYTES {
        return Err(too_large(format!("{row} bytes in a row of pixels")));
    }
    let whole = product(&[row + product(&[part.0.into(), count]), part.1.into()]);
    if whole.saturating_add(limits.max_pixels.saturating_mul(3)) > bytes_allowed(limits) {
        return Err(too_large(format!("{whole} bytes for a part of its picture")));
    }
    Ok(())
}
