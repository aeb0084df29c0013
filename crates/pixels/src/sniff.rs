//! Tells what a file is from its first bytes. A name or a content type is never asked: both lie.

use image::ImageFormat;

use angler_wire::error::{ImageError, ImageErrorCode};

/// The formats that angler decodes, for people.
const SUPPORTED: &str = "JPEG, PNG, WebP, GIF, BMP and TIFF";

/// What the first bytes look like, for people: the likely strangers in a bucket of images.
const STRANGERS: &[(&[u8], &str)] = &[
    (b"II+\0", "a BigTIFF"),
    (b"MM\0+", "a BigTIFF"),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "a Photoshop file"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"qoif", "QOI"),
    (b"DDS ", "a DDS texture"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"%!PS", "PostScript"),
    (b"SIMPLE  =", "a FITS image"),
    (b"\x89HDF", "HDF5 data"),
    (b"\x93NUMPY", "a NumPy array"),
];

/// How far text is looked through for an `<svg`, in bytes.
const TEXT_WINDOW: usize = 1024;

/// The format of a file, or why it is not decoded.
pub(super) fn format(bytes: &[u8]) -> Result<ImageFormat, ImageError> {
    match image::guess_format(bytes) {
        Ok(
            format @ (ImageFormat::Jpeg
            | ImageFormat::Png
            | ImageFormat::WebP
            | ImageFormat::Gif
            | ImageFormat::Bmp
            | ImageFormat::Tiff),
        ) => Ok(format),
        _ => Err(unsupported(describe(bytes))),
    }
}

/// The refusal of a file that is `what`.
pub(super) fn unsupported(what: &str) -> ImageError {
    ImageError::new(ImageErrorCode::UnsupportedFormat, format!("{what}; supported are {SUPPORTED}"))
}

fn describe(bytes: &[u8]) -> &'static str {
    if bytes.is_empty() {
        return "the file is empty";
    }
    if let Some((_, name)) = STRANGERS.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return name;
    }
    if bytes.get(4..8) == Some(b"ftyp") {
        return describe_brands(bytes);
    }
    let head = &bytes[..bytes.len().min(TEXT_WINDOW)];
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head); // a UTF-8 byte order mark
    if is_text(head) { describe_text(head.trim_ascii_start()) } else { "an unknown format" }
}

/// UTF-8 without control characters; the last character may be cut off.
fn is_text(head: &[u8]) -> bool {
    let valid = std::str::from_utf8(head).map_or_else(|e| e.error_len().is_none(), |_| true);
    let printable = head.iter().all(|&b| b >= b' ' || b.is_ascii_whitespace());
    valid && printable
}

/// An ISO base media file (`ftyp`): its major brand, then the compatible ones, say what it is.
fn describe_brands(bytes: &[u8]) -> &'static str {
    let length = bytes.first_chunk().map_or(0, |size| u32::from_be_bytes(*size) as usize);
    let brands = bytes.get(8..length.min(bytes.len())).unwrap_or_default().chunks_exact(4);
    for brand in brands {
        match brand {
            b"avif" | b"avis" => return "AVIF",
            b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" => return "HEIC",
            b"crx " => return "a Canon raw photo (CR3)",
            b"qt  " | b"isom" | b"mp41" | b"mp42" | b"M4V " => return "a video",
            _ => {}
        }
    }
    if bytes.get(8..12) == Some(b"mif1") {
        return "HEIF";
    }
    "an ISO media file of an unknown brand"
}

fn describe_text(text: &[u8]) -> &'static str {
    let holds = |needle: &[u8]| {
        text.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle))
    };
    if holds(b"<svg") {
        "an SVG drawing"
    } else if holds(b"<html") {
        "an HTML page"
    } else if text.starts_with(b"<?xml") {
        "an XML document"
    } else if text.starts_with(b"{") || text.starts_with(b"[") {
        "JSON or text"
    } else {
        "text"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_named() {
        let cases: &[(&[u8], &str)] = &[
            (b"", "the file is empty"),
            (b"\xff", "an unknown format"),
            (b"   \n", "text"),
            (b"hello", "text"),
            (b"{\"a\": 1}", "JSON"),
            (b"%PDF-1.7", "PDF"),
            (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- c --><svg xmlns=", "SVG"),
            (b"<!DOCTYPE html><HTML>", "HTML"),
            (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML"),
            (b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf", "AVIF"),
            (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", "HEIC"),
            (b"\x00\x00\x00\x14ftypmif1\x00\x00\x00\x00mif1", "HEIF"),
            (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isomavc1", "video"),
            (b"\x00\x00\x00\x02ftyp", "ISO media"),
            (b"\xff\xff\xff\xffftypheic", "HEIC"),
        ];
        for (bytes, expected) in cases {
            let error = format(bytes).unwrap_err();
            assert_eq!(error.code, ImageErrorCode::UnsupportedFormat);
            assert!(error.message.contains(expected), "{bytes:?}: {}", error.message);
            assert!(error.message.contains("supported are JPEG"));
        }
    }

    #[test]
    fn the_content_decides() {
        assert_eq!(format(b"\xff\xd8\xff\xe0").unwrap(), ImageFormat::Jpeg);
        assert_eq!(format(b"\x89PNG\r\n\x1a\n").unwrap(), ImageFormat::Png);
        assert_eq!(format(b"RIFF\0\0\0\0WEBPVP8 ").unwrap(), ImageFormat::WebP);
        assert_eq!(format(b"GIF89a").unwrap(), ImageFormat::Gif);
        assert_eq!(format(b"BM").unwrap(), ImageFormat::Bmp);
        assert_eq!(format(b"II*\0").unwrap(), ImageFormat::Tiff);
        assert_eq!(format(b"MM\0*").unwrap(), ImageFormat::Tiff);
    }
}
