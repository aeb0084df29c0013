//! The segments of a JPEG file: what a picture it declares, and where that picture ends. Segments are
//! skipped by their length, so that nothing of an embedded thumbnail counts.

use image::metadata::Orientation;

use angler_wire::error::{ImageError, ImageErrorCode};

use crate::PixelLimits;
use crate::exif;
use crate::sniff::unsupported;
use crate::stored::{check_size, corrupt};

/// Scans of a file, at most. Each passes over the whole picture; encoders write about 10.
const MAX_SCANS: usize = 100;

/// What the segments of a file say.
#[derive(Debug)]
pub(crate) struct Header {
    /// Width and height of the stored picture, in pixels.
    pub size: (u32, u32),
    /// `true` if the end-of-image marker is there. Without it the picture may be whole all the same.
    pub ended: bool,
    /// `true` for what cameras write: the full decoder, which is faster than libjpeg, reads that
    /// kind correctly.
    pub plain: bool,
    /// `true` for a picture of four inks.
    pub inks: bool,
    /// The EXIF orientation.
    pub orientation: Orientation,
}

impl Header {
    /// Reads the segments of a file up to the end of its picture.
    ///
    /// # Errors
    /// `CorruptImage`: no picture, or one that is certainly not whole. `TooLarge`: beyond the limits.
    /// `UnsupportedFormat`: a kind that libjpeg does not decode.
    pub(crate) fn read(bytes: &[u8], limits: PixelLimits) -> Result<Self, ImageError> {
        let mut walk = Walk::default();
        let ended = walk.walk(bytes, limits)?;
        let Some(frame) = walk.frame else {
            return Err(corrupt("JPEG file holds no picture data"));
        };
        if walk.scans.is_empty() {
            return Err(if ended {
                corrupt("JPEG file holds no picture data")
            } else {
                corrupt("JPEG file ends early: it holds no picture data")
            });
        }
        // Arithmetic decoders read zeros behind the data, as they must, so that no damage shows.
        if !ended && frame.arithmetic() {
            return Err(corrupt("JPEG file ends early: it has no end-of-image marker"));
        }
        if !ended && !frame.components.iter().all(|component| component.whole(frame.progressive()))
        {
            return Err(corrupt("JPEG file ends early: scans of its picture are missing"));
        }
        Ok(Self {
            size: frame.size,
            ended,
            plain: ended
                && walk.tables
                && walk.scans == [frame.components.len()]
                && frame.is_plain(walk.jfif, walk.adobe),
            inks: frame.components.len() == 4,
            orientation: exif::orientation(&walk.exif, walk.xmp),
        })
    }
}

/// What was seen so far.
#[derive(Default)]
struct Walk<'a> {
    frame: Option<Frame>,
    /// How many components each scan holds.
    scans: Vec<usize>,
    /// `true` if Huffman tables precede the first scan.
    tables: bool,
    jfif: bool,
    /// The colour transform of an Adobe marker.
    adobe: Option<u8>,
    /// The EXIF data, of all blocks.
    exif: Vec<u8>,
    xmp: Option<&'a [u8]>,
}

impl<'a> Walk<'a> {
    /// Goes through the segments; `true` if the picture's end marker was met.
    fn walk(&mut self, bytes: &'a [u8], limits: PixelLimits) -> Result<bool, ImageError> {
        let mut rest = bytes.get(2..).unwrap_or_default();
        // Compressed data, or junk between segments: a marker is 0xFF and what is neither 0 (a
        // stuffed byte) nor 0xFF (padding).
        while let Some(at) = memchr::memchr(0xff, rest) {
            rest = &rest[at + 1..];
            let Some((&code, after)) = rest.split_first() else { break };
            match code {
                0xff => {}                                 // padding: this byte may begin the marker
                0x00 | 0x01 | 0xd0..=0xd8 => rest = after, // stands alone
                0xd9 => return Ok(true),
                _ => {
                    let length = after.first_chunk().map(|length| u16::from_be_bytes(*length));
                    let Some(body) = length.and_then(|length| after.get(2..length.into())) else {
                        break;
                    };
                    self.segment(code, body, limits)?;
                    rest = &after[2 + body.len()..];
                }
            }
        }
        Ok(false)
    }

    fn segment(&mut self, code: u8, body: &'a [u8], limits: PixelLimits) -> Result<(), ImageError> {
        match code {
            0xc4 => self.tables |= self.scans.is_empty(),
            // Arithmetic conditioning, and a reserved code: no frames.
            0xc8 | 0xcc => {}
            0xc0..=0xcf | 0xf7 if self.frame.is_none() => {
                self.frame = Some(Frame::read(code, body, limits)?);
            }
            0xda => self.scan(body)?,
            0xe0 if body.starts_with(b"JFIF\0") && body.len() >= 14 => self.jfif = true,
            0xe1 => {
                if let Some(data) = body.strip_prefix(b"Exif\0\0") {
                    // As Pillow does: what one block cannot hold goes on in the next.
                    self.exif.extend_from_slice(data);
                } else if let Some(packet) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
                    self.xmp = Some(packet);
                }
            }
            0xee if body.starts_with(b"Adobe") && body.len() >= 12 => self.adobe = Some(body[11]),
            _ => {}
        }
        Ok(())
    }

    /// A scan's header: how many components, each with its tables, then which coefficients of them
    /// and at which precision.
    fn scan(&mut self, body: &[u8]) -> Result<(), ImageError> {
        let damaged = || corrupt("JPEG file is damaged: a scan of nothing");
        if self.scans.len() == MAX_SCANS {
            return Err(ImageError::new(
                ImageErrorCode::TooLarge,
                format!("JPEG file holds more than {MAX_SCANS} scans"),
            ));
        }
        let frame = self.frame.as_mut().ok_or_else(damaged)?;
        let (&count, rest) = body.split_first().ok_or_else(damaged)?;
        let (members, rest) = rest.split_at_checked(usize::from(count) * 2).ok_or_else(damaged)?;
        let [first, last, precision, ..] = *rest else { return Err(damaged()) };
        for member in members.chunks_exact(2) {
            for component in frame.components.iter_mut().filter(|c| c.id == member[0]) {
                component.scanned(first, last, precision & 15);
            }
        }
        self.scans.push(count.into());
        Ok(())
    }
}

/// A frame header: the picture.
struct Frame {
    code: u8,
    size: (u32, u32),
    components: Vec<Component>,
}

impl Frame {
    fn read(code: u8, body: &[u8], limits: PixelLimits) -> Result<Self, ImageError> {
        let [precision, height_1, height_2, width_1, width_2, count, components @ ..] = body else {
            return Err(corrupt("JPEG file is damaged: its frame header is too short"));
        };
        let size = (
            u32::from(u16::from_be_bytes([*width_1, *width_2])),
            u32::from(u16::from_be_bytes([*height_1, *height_2])),
        );
        check_size(size.0, size.1, limits)?;
        let kind = match (code, precision, count) {
            (0xc3 | 0xcb, ..) => Some("a lossless JPEG"),
            (0xc5..=0xc7 | 0xcd..=0xcf, ..) => Some("a hierarchical JPEG"),
            (0xf7, ..) => Some("a JPEG-LS picture"),
            (_, 8, 1 | 3 | 4) => None,
            (_, 8, _) => Some("a JPEG of another number of colours than 1, 3 or 4"),
            _ => Some("a JPEG of more than 8 bits per sample"),
        };
        if let Some(kind) = kind {
            return Err(unsupported(kind));
        }
        let components = components.chunks_exact(3).map(Component::new).collect();
        Ok(Self { code, size, components })
    }

    fn arithmetic(&self) -> bool {
        matches!(self.code, 0xc9 | 0xca)
    }

    fn progressive(&self) -> bool {
        matches!(self.code, 0xc2 | 0xca)
    }

    /// `true` for sequential Huffman coding, the usual sampling, and colours that both decoders
    /// understand alike.
    fn is_plain(&self, jfif: bool, adobe: Option<u8>) -> bool {
        let sequential = matches!(self.code, 0xc0 | 0xc1);
        let sides: Vec<_> = self.components.iter().map(|component| component.sampling).collect();
        let sampled = match sides[..] {
            [grey] => grey == 0x11,
            [luma, 0x11, 0x11] => matches!(luma, 0x11 | 0x12 | 0x21 | 0x22),
            _ => false,
        };
        let ids = || self.components.iter().map(|component| component.id).eq([1, 2, 3]);
        let coloured = match adobe {
            Some(transform) => transform == 1,
            None => jfif || ids(),
        };
        sequential && sampled && (coloured || sides.len() == 1)
    }
}

/// A component of a frame, and which of its coefficients the scans brought.
struct Component {
    id: u8,
    /// Horizontal and vertical factor, 4 bits each.
    sampling: u8,
    /// A bit per coefficient that came in full precision.
    complete: u64,
}

impl Component {
    fn new(bytes: &[u8]) -> Self {
        Self { id: bytes[0], sampling: bytes[1], complete: 0 }
    }

    fn scanned(&mut self, first: u8, last: u8, precision: u8) {
        if precision == 0 {
            for coefficient in first..=last.min(63) {
                self.complete |= 1 << coefficient;
            }
        }
    }

    /// `true` if nothing more can come.
    fn whole(&self, progressive: bool) -> bool {
        if progressive { self.complete == u64::MAX } else { self.complete != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };

    /// A grey frame of 8 × 8 pixels, then a scan of it.
    const FRAME: &[u8] = b"\xff\xc0\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00";
    const SCAN: &[u8] = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x01\xff\x00\x02\xff\xd3\x03";
    const THUMBNAIL: &[u8] = b"\xff\xe1\x00\x08\xff\xd8\xff\xd9xx";
    const END: &[u8] = b"\xff\xd9";

    fn file(parts: &[&[u8]]) -> Vec<u8> {
        [b"\xff\xd8", parts.concat().as_slice()].concat()
    }

    fn read(parts: &[&[u8]]) -> Result<Header, ImageErrorCode> {
        Header::read(&file(parts), LIMITS).map_err(|error| error.code)
    }

    #[test]
    fn a_jpeg_ends_with_its_own_marker() {
        for parts in [
            &[FRAME, SCAN, END] as &[&[u8]],
            &[THUMBNAIL, FRAME, SCAN, END],
            &[THUMBNAIL, b"\xff\xff", FRAME, SCAN, SCAN, b"\xff\xff\xff\xd9"],
            &[FRAME, SCAN, END, b"\xff\xd8 another picture, cut sho"],
            &[b"junk", FRAME, SCAN, END, b"\x00\x00\x00"],
        ] {
            assert!(read(parts).unwrap().ended, "{parts:?}");
        }
        for parts in [
            &[FRAME, SCAN] as &[&[u8]],
            &[THUMBNAIL, FRAME, SCAN],
            &[FRAME, SCAN, b"\xff"],
            &[FRAME, SCAN, b"\x00\x00\x00\x00"],
        ] {
            assert!(!read(parts).unwrap().ended, "{parts:?}");
        }
        for parts in [&[] as &[&[u8]], &[END], &[THUMBNAIL], &[FRAME, END], &[SCAN, END]] {
            assert_eq!(read(parts).unwrap_err(), ImageErrorCode::CorruptImage, "{parts:?}");
        }
    }

    #[test]
    fn a_progressive_picture_without_an_end_needs_all_its_scans() {
        let frame = b"\xff\xc2\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00".as_slice();
        let scan = |first: u8, last: u8, precision: u8| {
            [b"\xff\xda\x00\x08\x01\x01\x00".as_slice(), &[first, last, precision]].concat()
        };
        let [dc, rough, fine] = [scan(0, 0, 0), scan(1, 63, 1), scan(1, 63, 0x10)];
        assert!(read(&[frame, &dc, &rough]).is_err());
        assert!(!read(&[frame, &dc, &rough, &fine]).unwrap().ended);
        assert!(read(&[frame, &dc, END]).unwrap().ended);
    }

    #[test]
    fn scans_are_counted() {
        let mut parts = vec![FRAME];
        parts.extend(vec![SCAN; MAX_SCANS]);
        assert!(read(&parts).is_ok());
        parts.push(SCAN);
        assert_eq!(read(&parts).unwrap_err(), ImageErrorCode::TooLarge);
    }

    #[test]
    fn kinds_that_no_decoder_reads_are_named() {
        for (code, precision, count, name) in [
            (0xc3, 8, 1, "lossless"),
            (0xc5, 8, 1, "hierarchical"),
            (0xf7, 8, 1, "JPEG-LS"),
            (0xc1, 12, 1, "8 bits"),
            (0xc0, 8, 2, "1, 3 or 4"),
        ] {
            let mut frame = vec![0xff, code, 0, 8 + 3 * count, precision, 0, 8, 0, 8, count];
            frame.extend([1, 0x11, 0].repeat(count.into()));
            let error = Header::read(&file(&[&frame, SCAN, END]), LIMITS).unwrap_err();
            assert_eq!(error.code, ImageErrorCode::UnsupportedFormat, "{}", error.message);
            assert!(error.message.contains(name), "{}", error.message);
        }
    }
}
