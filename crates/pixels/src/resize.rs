//! Resize and crop at once: the crop is mapped back into the source, and only that part of the
//! source is convolved. The weights still see the pixels around the crop, so the result is what
//! resizing everything and cropping afterwards gives, and a 1 × 10,000 image costs no more memory
//! than its crop.
//!
//! The two passes, along the upright picture's rows and then its columns, are made one by one
//! although the resizer would make both: it begins with the columns, and where a filter overshoots
//! and is clipped between the passes, the order shows (up to 39 grey levels from Pillow's result on
//! small hard-edged pictures). Pillow 13 and later begin with the columns too where a height shrinks
//! much more than a width; that can only happen with `Resize::Exact`, and is not followed.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};

use angler_wire::error::{ImageError, ImageErrorCode};

use super::stored::{Colours, Stored};
use super::{Filter, PixelSpec, Resize, jpeg};

/// Pixels along a side for each that is wanted, at least, in a picture decoded at less than its size:
/// a box filter is a poor one, and the resampling filter after it must have something left to do.
/// Over the sample photos, written at 0.7 to 17 megapixels, the embeddings' cosine with those of
/// whole decoding is then 0.998 or more; with 1.46 pixels it was 0.997, with 1.17 0.993.
const SPARE: f64 = 1.75;

/// The same at one eighth, where only the mean of each block is left: with 1.76 pixels it was 0.9979.
const SPARE_OF_MEANS: f64 = 2.0;

/// Refuses a spec that no image can meet. Loading a model refuses it first, with a better message.
pub(super) fn check(spec: &PixelSpec) -> Result<(), ImageError> {
    let empty = spec.width == 0 || spec.height == 0;
    let short =
        matches!(spec.resize, Resize::ShorterSide(side) if side < spec.width.max(spec.height));
    if empty || short {
        return Err(internal(format!(
            "a model cannot want {} × {} pixels after {:?}",
            spec.width, spec.height, spec.resize
        )));
    }
    Ok(())
}

/// Resizes, crops and turns upright into `pixels`, [spec.height, spec.width, 3]. `spec` was checked.
pub(super) fn to_pixels(
    stored: &Stored,
    spec: &PixelSpec,
    pixels: &mut [u8],
) -> Result<(), ImageError> {
    let image = &stored.image;
    let Crop { turn, x, y, width, height } =
        Crop::of(stored.size, stored.eighths, stored.orientation, spec);
    let half_way;
    let (image, x, y) = if turn.swap {
        let near = x.reach(spec.filter, width);
        half_way = resampled(image, near, y, spec.filter)?;
        (&half_way, x.within(near), Axis::kept(0, y.pixels))
    } else {
        let near = y.reach(spec.filter, height);
        half_way = resampled(image, x, near, spec.filter)?;
        (&half_way, Axis::kept(0, x.pixels), y.within(near))
    };
    if stored.orientation == Orientation::NoTransforms {
        resample(image, x, y, spec.filter, pixels)?;
    } else {
        let turned = upright(resampled(image, x, y, spec.filter)?, stored.orientation);
        if turned.len() != pixels.len() {
            return Err(internal(format!("{} bytes for {} of pixels", pixels.len(), turned.len())));
        }
        pixels.copy_from_slice(&turned);
    }
    if stored.colours == Colours::YCbCr {
        jpeg::to_rgb(pixels);
    }
    Ok(())
}

/// How many rows of a stored picture at so many eighths of its size have a weight in what `spec`
/// wants of it.
pub(super) fn rows(
    stored: (u32, u32),
    eighths: u8,
    orientation: Orientation,
    spec: &PixelSpec,
) -> u32 {
    let Crop { y, height, .. } = Crop::of(stored, eighths, orientation, spec);
    let Axis { start, pixels, .. } = y.reach(spec.filter, height);
    start as u32 + pixels
}

/// What of a stored picture becomes the model's pixels.
struct Crop {
    turn: Turn,
    /// In pixels of the picture as it was decoded.
    x: Axis,
    y: Axis,
    /// That picture's size, all of it.
    width: u32,
    height: u32,
}

impl Crop {
    /// * `stored`: the size in the file.
    /// * `eighths`: of which so many were decoded.
    fn of(stored: (u32, u32), eighths: u8, orientation: Orientation, spec: &PixelSpec) -> Self {
        let turn = Turn::of(orientation);
        let (width, height) = turn.swapped(stored);
        let shorter = width.min(height);
        let axis = |source, wanted| match spec.resize {
            Resize::Exact => Axis { start: 0.0, length: f64::from(source), pixels: wanted },
            Resize::ShorterSide(side) => Axis::centre_crop(source, shorter, side, wanted),
        };
        // Where it lies in the upright picture, then in the stored one, then in what was decoded.
        let (x, y) = turn.swapped((axis(width, spec.width), axis(height, spec.height)));
        let x = x.mirrored_if(turn.mirror_x, stored.0);
        let y = y.mirrored_if(turn.mirror_y, stored.1);
        let width = jpeg::reduced(stored.0, eighths);
        let height = jpeg::reduced(stored.1, eighths);
        Self { turn, x: x.reduced(eighths, width), y: y.reduced(eighths, height), width, height }
    }
}

/// How many eighths of a stored picture's size are enough for `spec`: the fewest that leave
/// [`SPARE`] pixels for each that is wanted. None if no fewer than all.
pub(super) fn eighths(
    stored: (u32, u32),
    orientation: Orientation,
    spec: &PixelSpec,
) -> Option<u8> {
    let (width, height) = Turn::of(orientation).swapped(stored);
    let (width, height) = (f64::from(width), f64::from(height));
    let shrunk = match spec.resize {
        Resize::ShorterSide(side) => width.min(height) / f64::from(side),
        Resize::Exact => (width / f64::from(spec.width)).min(height / f64::from(spec.height)),
    };
    // With more than a half, decoding whole is as fast.
    let spare = |eighths| if eighths == 1 { SPARE_OF_MEANS } else { SPARE };
    [1, 2, 3, 4].into_iter().find(|eighths| shrunk * f64::from(*eighths) / 8.0 >= spare(*eighths))
}

/// Applies an EXIF orientation.
pub(super) fn upright(image: RgbImage, orientation: Orientation) -> RgbImage {
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    image.into_rgb8() // it is RGB already: nothing is copied
}

/// Resamples the box that `x` and `y` span; shape [y.pixels, x.pixels, 3].
fn resampled(image: &RgbImage, x: Axis, y: Axis, filter: Filter) -> Result<RgbImage, ImageError> {
    let mut target = RgbImage::new(x.pixels, y.pixels);
    resample(image, x, y, filter, &mut target)?;
    Ok(target)
}

/// Resamples the box that `x` and `y` span into `target`, [y.pixels, x.pixels, 3].
fn resample(
    image: &RgbImage,
    x: Axis,
    y: Axis,
    filter: Filter,
    target: &mut [u8],
) -> Result<(), ImageError> {
    let filter = match filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom, // a = -0.5, as in Pillow
        Filter::Lanczos3 => FilterType::Lanczos3,
    };
    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3)
        .map_err(internal)?;
    let mut target =
        Image::from_slice_u8(x.pixels, y.pixels, target, PixelType::U8x3).map_err(internal)?;
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(filter))
        .crop(x.start, y.start, x.length, y.length);
    Resizer::new().resize(&source, &mut target, &options).map_err(internal)
}

/// A stretch of one axis of a source and the number of pixels that it becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    /// Where it begins, in source pixels.
    start: f64,
    /// How long it is, in source pixels.
    length: f64,
    /// How long it becomes.
    pixels: u32,
}

impl Axis {
    /// What of an axis of `source` pixels ends up in the middle `wanted` pixels, once the image's
    /// shorter side (`shorter` pixels) has become `side`. An odd pixel is lost at the end. Needs
    /// `shorter <= source` and `wanted <= side`.
    fn centre_crop(source: u32, shorter: u32, side: u32, wanted: u32) -> Self {
        let resized = resized_length(source, shorter, side);
        let offset = resized.saturating_sub(wanted.into()) / 2;
        let scale = f64::from(source) / resized as f64; // below 2^48: exact
        let start = offset as f64 * scale;
        // Rounding may put the end a hair past the source's, which the resizer would refuse.
        let length = (f64::from(wanted) * scale).min(f64::from(source) - start);
        Self { start, length, pixels: wanted }
    }

    /// The same stretch of the source at so many eighths of its size, `source` pixels then.
    fn reduced(self, eighths: u8, source: u32) -> Self {
        if eighths == 8 {
            return self;
        }
        let factor = f64::from(eighths) / 8.0;
        let start = self.start * factor;
        let length = (self.length * factor).min(f64::from(source) - start);
        Self { start, length, ..self }
    }

    /// `pixels` pixels taken as they are.
    fn kept(start: u32, pixels: u32) -> Self {
        Self { start: start.into(), length: pixels.into(), pixels }
    }

    fn mirrored_if(self, mirror: bool, source: u32) -> Self {
        if !mirror {
            return self;
        }
        let start = (f64::from(source) - (self.start + self.length)).max(0.0);
        let length = self.length.min(f64::from(source) - start);
        Self { start, length, ..self }
    }

    /// The source pixels that have a weight in any pixel of this stretch: as many as its own and
    /// the filter's support at each end.
    fn reach(self, filter: Filter, source: u32) -> Self {
        let support = match filter {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos3 => 3.0,
        };
        let margin = support * (self.length / f64::from(self.pixels)).max(1.0) + 1.0;
        let first = (self.start - margin).floor().max(0.0) as u32;
        let end = ((self.start + self.length + margin).ceil() as u32).min(source);
        Self::kept(first, end - first)
    }

    /// This stretch as it lies in the pixels kept by `near`.
    fn within(self, near: Self) -> Self {
        let start = self.start - near.start;
        Self { start, length: self.length.min(near.length - start), ..self }
    }
}

/// How many pixels an axis of `source` pixels gets when the shorter axis gets `side`: rounded, a
/// half upwards. Never below `side`.
fn resized_length(source: u32, shorter: u32, side: u32) -> u64 {
    let (source, shorter, side) = (u64::from(source), u64::from(shorter), u64::from(side));
    // Below 2^50: `source` is a side of a decoded picture, below 2^16.
    (2 * source * side + shorter) / (2 * shorter)
}

/// An orientation as what it does to a box: axes swapped or not, then each mirrored or not, in the
/// stored picture's axes.
struct Turn {
    swap: bool,
    mirror_x: bool,
    mirror_y: bool,
}

impl Turn {
    fn of(orientation: Orientation) -> Self {
        use Orientation as O;
        Self {
            swap: matches!(
                orientation,
                O::Rotate90 | O::Rotate270 | O::Rotate90FlipH | O::Rotate270FlipH
            ),
            mirror_x: matches!(
                orientation,
                O::FlipHorizontal | O::Rotate180 | O::Rotate270 | O::Rotate270FlipH
            ),
            mirror_y: matches!(
                orientation,
                O::FlipVertical | O::Rotate180 | O::Rotate90 | O::Rotate270FlipH
            ),
        }
    }

    fn swapped<T>(&self, (x, y): (T, T)) -> (T, T) {
        if self.swap { (y, x) } else { (x, y) }
    }
}

fn internal(error: impl std::fmt::Display) -> ImageError {
    ImageError::new(ImageErrorCode::Internal, format!("cannot resize: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BICUBIC_224: PixelSpec = PixelSpec {
        width: 224,
        height: 224,
        resize: Resize::ShorterSide(256),
        filter: Filter::Bicubic,
    };

    /// A picture in which no two corners are alike.
    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let (x, y) = (f64::from(x) / 9.0, f64::from(y) / 5.0);
            let wave = |t: f64| (127.5 + 127.5 * t.sin()) as u8;
            image::Rgb([wave(x), wave(y + x / 3.0), wave(x * y / 20.0)])
        })
    }

    fn pixels(image: RgbImage, orientation: Orientation, spec: &PixelSpec) -> Vec<u8> {
        let size = image.dimensions();
        let stored = Stored { size, eighths: 8, image, colours: Colours::Rgb, orientation };
        let mut pixels = vec![0; spec.width as usize * spec.height as usize * 3];
        to_pixels(&stored, spec, &mut pixels).unwrap();
        pixels
    }

    fn worst(a: &[u8], b: &[u8]) -> u8 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
    }

    #[test]
    fn the_other_side_is_rounded_with_halves_upwards() {
        assert_eq!(resized_length(640, 480, 256), 341); // 341.33
        assert_eq!(resized_length(480, 480, 256), 256);
        assert_eq!(resized_length(513, 512, 256), 257); // 256.5
        assert_eq!(resized_length(515, 512, 256), 258); // 257.5
        assert_eq!(resized_length(10_000, 1, 256), 2_560_000);
        assert_eq!(resized_length(65_535, 65_535, 256), 256);
        assert_eq!(resized_length(65_535, 1, u32::MAX), 65_535 * u64::from(u32::MAX));
    }

    #[test]
    fn the_crop_is_the_centre() {
        // 480 -> 256: 16 pixels off at each end, in source pixels 16 * 480 / 256.
        let y = Axis::centre_crop(480, 480, 256, 224);
        assert_eq!(y, Axis { start: 30.0, length: 420.0, pixels: 224 });
        // 640 -> 341: 117 pixels to lose, 58 of them at the start.
        let x = Axis::centre_crop(640, 480, 256, 224);
        assert_eq!((x.start, x.length), (58.0 * 640.0 / 341.0, 224.0 * 640.0 / 341.0));
        // Nothing to crop.
        let all = Axis::centre_crop(300, 300, 224, 224);
        assert_eq!((all.start, all.length), (0.0, 300.0));
    }

    #[test]
    fn the_crop_never_leaves_the_source() {
        for source in (1..1_500).chain([4_097, 10_007, 65_535]) {
            for shorter in [1, 2, 3, 7, 100, 223, 224, 480, 1_999, 65_535] {
                let shorter = shorter.min(source);
                for (side, wanted) in [(224, 224), (225, 224), (256, 224), (257, 256), (1, 1)] {
                    let axis = Axis::centre_crop(source, shorter, side, wanted);
                    for axis in [axis, axis.mirrored_if(true, source)] {
                        let near = axis.reach(Filter::Lanczos3, source);
                        let within = axis.within(near);
                        for (axis, end) in [
                            (axis, f64::from(source)),
                            (near, source.into()),
                            (within, near.length),
                        ] {
                            assert!(axis.start >= 0.0 && axis.length > 0.0, "{source} {axis:?}");
                            assert!(axis.start + axis.length <= end, "{source} {axis:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn cropping_first_equals_cropping_last() {
        for (width, height) in [(640, 480), (481, 640), (28, 28), (100, 37), (1_003, 257)] {
            let image = picture(width, height);
            let shorter = width.min(height);
            let full = PixelSpec {
                width: resized_length(width, shorter, 256) as u32,
                height: resized_length(height, shorter, 256) as u32,
                resize: Resize::Exact,
                filter: Filter::Bicubic,
            };
            let resized = pixels(image.clone(), Orientation::NoTransforms, &full);
            let resized = RgbImage::from_raw(full.width, full.height, resized).unwrap();
            let (left, top) = ((full.width - 224) / 2, (full.height - 224) / 2);
            let cropped = image::imageops::crop_imm(&resized, left, top, 224, 224).to_image();
            let direct = pixels(image, Orientation::NoTransforms, &BICUBIC_224);
            // Two levels: a weight that is 0 in one of them and 1e-17 in the other rounds otherwise.
            let worst = worst(&cropped, &direct);
            assert!(worst <= 2, "{width} × {height}: {worst}");
        }
    }

    #[test]
    fn turning_last_equals_turning_first() {
        // 101 : 71 becomes 364 : 256, 102 : 71 becomes 368 : 256; 300 : 299 becomes 257 : 256, an
        // odd number to lose, so that a crop mirrored by mistake shows.
        for (width, height) in [(101, 71), (71, 102), (64, 64), (300, 299)] {
            for exif in 1..=8 {
                let orientation = Orientation::from_exif(exif).unwrap();
                for spec in [
                    BICUBIC_224,
                    PixelSpec { width: 96, height: 48, ..BICUBIC_224 },
                    PixelSpec {
                        width: 60,
                        height: 30,
                        resize: Resize::Exact,
                        filter: Filter::Lanczos3,
                    },
                ] {
                    let image = picture(width, height);
                    let turned = upright(image.clone(), orientation);
                    let first = pixels(turned, Orientation::NoTransforms, &spec);
                    let last = pixels(image, orientation, &spec);
                    let worst = worst(&first, &last);
                    assert!(worst <= 1, "{width} × {height}, EXIF {exif}: {worst}");
                }
            }
        }
    }

    #[test]
    fn extreme_aspect_ratios_cost_only_their_crop() {
        for (width, height) in [(1, 10_000), (10_000, 1), (1, 65_535), (65_535, 1), (1, 1)] {
            let image = RgbImage::from_pixel(width, height, image::Rgb([10, 20, 30]));
            for resize in [Resize::ShorterSide(256), Resize::Exact] {
                for orientation in [Orientation::NoTransforms, Orientation::Rotate90] {
                    let spec = PixelSpec { resize, ..BICUBIC_224 };
                    let data = pixels(image.clone(), orientation, &spec);
                    assert!(data.chunks_exact(3).all(|p| p == [10, 20, 30]));
                }
            }
        }
        // The rows that the second pass needs are few, although 2,560,000 would be made of them.
        let axis = Axis::centre_crop(10_000, 1, 256, 224);
        assert!(axis.reach(Filter::Lanczos3, 10_000).pixels < 12);
    }

    #[test]
    fn an_impossible_spec_is_an_error() {
        for (width, height, resize) in [
            (0, 224, Resize::Exact),
            (224, 0, Resize::Exact),
            (224, 224, Resize::ShorterSide(223)),
            (100, 224, Resize::ShorterSide(128)),
        ] {
            let spec = PixelSpec { width, height, resize, filter: Filter::Bicubic };
            assert_eq!(check(&spec).unwrap_err().code, ImageErrorCode::Internal);
        }
        assert!(check(&BICUBIC_224).is_ok());
    }
}
