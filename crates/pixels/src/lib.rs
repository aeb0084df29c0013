//! Bytes in, pixels out: the bytes of one image file become the RGB pixels that a model wants.
//! Pure and synchronous; a call that takes long takes it on the caller's thread.
//!
//! 1. `sniff`: the format is told from the content, never from a name.
//! 2. `jpeg`, `tiff` and, for the other formats, `container`: what must hold of a file before its
//!    decoder sees it, because the decoder does not see to it: a size that only a nested picture
//!    declares, a list of four thousand million offsets; and what does not matter, although the decoder
//!    stumbles over it.
//! 3. `decode`: the declared size is held against the limit before pixel memory is allocated, then
//!    the file is decoded and brought to 8-bit RGB, transparency over white.
//!    A large JPEG is decoded at a fraction of its size instead (`jpeg`), if that leaves more pixels
//!    than the model wants: most of its cosines need not be summed then, nor its pixels resized.
//! 4. `resize`: only the part that the crop keeps is resized, straight out of the stored picture.
//!    The EXIF orientation is applied last, to the few pixels that remain: turning a phone's photo
//!    at full size would cost as much as resizing it.
//!
//! The result follows Pillow (`Image.resize` with its own antialiasing, then a crop), because that
//! is how most models saw their pictures in training.

mod container;
mod decode;
mod exif;
mod guard;
mod jpeg;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "in tests a panic is the report")]
mod kinds;
mod resize;
mod sniff;
mod stored;
mod tiff;

use angler_wire::error::ImageError;

pub use decode::decode;

/// How a model wants its pixels: the part of `[input]` in `model.toml` that concerns them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PixelSpec {
    /// Width of the model's input, in pixels.
    pub width: u32,
    /// Height of the model's input, in pixels.
    pub height: u32,
    /// How an image of another size gets there.
    pub resize: Resize,
    /// The filter that resizing uses, up as well as down.
    pub filter: Filter,
}

/// How an image of any size becomes one of the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// The shorter side becomes this many pixels and the other side keeps the aspect ratio
    /// (rounded, a half upwards); then the centre is cropped, and an odd pixel is lost on the right
    /// or at the bottom. Must be at least the input's width and height.
    ShorterSide(u32),
    /// Both sides become the input's; the aspect ratio is given up.
    Exact,
}

/// A resampling filter, always antialiased: its support grows with the reduction, as in Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// Triangle, support 1.
    Bilinear,
    /// Cubic with a = -0.5 (Catmull-Rom), support 2: Pillow's `BICUBIC`.
    Bicubic,
    /// Windowed sinc, support 3: Pillow's `LANCZOS`.
    Lanczos3,
}

/// What an image may ask for.
#[derive(Debug, Clone, Copy)]
pub struct PixelLimits {
    /// Width × height that a file may declare (`limits.image_pixels`), checked before pixel memory
    /// is allocated. Decoding takes up to 16 bytes for each of them, and 16 MiB for metadata; a file
    /// whose pixels would take more is refused.
    pub max_pixels: u64,
}

/// Pixels as a model takes them: RGB, u8, interleaved, shape [H, W, 3].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// Width in pixels, the spec's.
    pub width: u32,
    /// Height in pixels, the spec's.
    pub height: u32,
    /// `height * width * 3` bytes, row by row from the top left.
    pub data: Box<[u8]>,
}

/// An image that has been decoded and is not resized yet.
pub struct Decoded(stored::Stored);

impl Decoded {
    /// Resizes, crops and turns upright as `spec` says, straight into `pixels`: u8 RGB,
    /// [spec.height, spec.width, 3].
    ///
    /// # Errors
    /// `Internal`: `spec` asks for the impossible, or `pixels` are not as many as it wants. Then
    /// they hold anything.
    pub fn resize_into(&self, spec: &PixelSpec, pixels: &mut [u8]) -> Result<(), ImageError> {
        resize::check(spec)?;
        resize::to_pixels(&self.0, spec, pixels)
    }
}

impl std::fmt::Debug for Decoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoded").field("size", &self.0.size).finish_non_exhaustive()
    }
}

/// Decodes an image file, no larger than `spec` has use for.
///
/// # Errors
/// As [`preprocess`].
pub fn decode_for(
    bytes: &[u8],
    spec: &PixelSpec,
    limits: PixelLimits,
) -> Result<Decoded, ImageError> {
    decode::decode_for(bytes, spec, limits).map(Decoded)
}

/// Turns an image file into the pixels that a model wants: upright, RGB, resized and cropped as
/// `spec` says; shape [spec.height, spec.width, 3].
///
/// # Errors
/// * `UnsupportedFormat`: not an image, or a kind of image that no decoder here reads.
/// * `TooLarge`: it declares more pixels than `limits` allows, or needs more memory than such an
///   image may.
/// * `CorruptImage`: damaged, cut short or empty of pixels.
/// * `Internal`: `spec` asks for the impossible, or this crate's own code panicked.
pub fn preprocess(
    bytes: &[u8],
    spec: &PixelSpec,
    limits: PixelLimits,
) -> Result<Pixels, ImageError> {
    resize::check(spec)?;
    let decoded = decode_for(bytes, spec, limits)?;
    let mut data = vec![0; spec.width as usize * spec.height as usize * 3].into_boxed_slice();
    decoded.resize_into(spec, &mut data)?;
    Ok(Pixels { width: spec.width, height: spec.height, data })
}
