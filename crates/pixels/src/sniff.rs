//! Tells what a file is from its first bytes. A name or a content type is never asked: both lie.

use image::ImageFormat;

use angler_wire::error::{ImageError, ImageErrorCode};

/// The formats that angler decodes, for people.
const SUPPORTED: &str = "JPEG, PNG, WebP, GIF, BMP and TIFF";

/// What the first bytes look like, for people: the likely strangers in a bucket of images.
const STRANGERS: &[(&[u8], &str)] = &[
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file that it stands for (run git lfs pull)",
    ),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"\x00\x00\x00\x0cJXL ", JPEG_XL),
    (b"\xff\x0a", JPEG_XL),
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
    (b"\x80\x04\x95", "a Python pickle"),
    (b"PAR1", "a Parquet file"),
    (b"FUJIFILMCCD-RAW", "a Fujifilm raw photo (RAF)"),
    (b"IIRO", "an Olympus raw photo (ORF)"),
    (b"IIU\0", "a Panasonic raw photo (RW2)"),
];

const JPEG_XL: &str = "JPEG XL (convert it to JPEG or PNG, for example with djxl)";
const AVIF: &str = "AVIF (convert it to JPEG or PNG, for example with avifdec)";
const HEIC: &str = "HEIC (convert it to JPEG, for example with heif-convert of libheif)";

/// What base64 text of an image begins with.
const ENCODED: &[(&[u8], &str)] = &[
    (b"/9j/", "base64 text of a JPEG (decode it first)"),
    (b"iVBORw0KGgo", "base64 text of a PNG (decode it first)"),
    (b"R0lGOD", "base64 text of a GIF (decode it first)"),
    (b"UklGR", "base64 text of a WebP (decode it first)"),
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
        _ if matches!(bytes, [b'I', b'I', 43, 0, ..] | [b'M', b'M', 0, 43, ..]) => {
            Ok(ImageFormat::Tiff)
        } // BigTIFF
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
    let brands = || bytes.get(8..length.min(bytes.len())).unwrap_or_default().chunks_exact(4);
    for brand in brands() {
        match brand {
            b"avif" | b"avis" => return AVIF,
            b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"hevm" | b"hevs" => {
                return HEIC;
            }
            b"crx " => return "a Canon raw photo (CR3)",
            b"jp2 " | b"jpx " => return "JPEG 2000",
            b"jxl " => return JPEG_XL,
            b"M4A " | b"M4B " => return "a sound recording (MPEG-4)",
            b"qt  " => return "a video (QuickTime)",
            b"isom" | b"iso2" | b"iso4" | b"iso5" | b"iso6" | b"mp41" | b"mp42" | b"M4V "
            | b"avc1" | b"MSNV" => {
                return "a video (MPEG-4)";
            }
            [b'3', b'g', ..] => return "a video (3GPP)",
            _ => {}
        }
    }
    if brands().any(|brand| matches!(brand, b"mif1" | b"msf1" | b"mif2" | b"heif")) {
        return "HEIF of an unknown coding (convert it to JPEG)";
    }
    "an ISO media file (MP4 or the like) of an unknown brand"
}

fn describe_text(text: &[u8]) -> &'static str {
    let starts =
        |start: &[u8]| text.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start));
    let holds = |needle: &[u8]| {
        text.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle))
    };
    if starts(b"data:") {
        "a data URI, not the file in it (decode it first)"
    } else if starts(b"http://") || starts(b"https://") || starts(b"s3://") {
        "text of an address, not the file there"
    } else if let Some((_, name)) = ENCODED.iter().find(|(start, _)| text.starts_with(start)) {
        name
    } else if starts(b"<!doctype html") || holds(b"<html") {
        "an HTML page, perhaps the error page of a server"
    } else if holds(b"<svg") {
        "an SVG drawing"
    } else if starts(b"<?xml") && holds(b"<Error>") {
        "an XML document, perhaps the error of an object store"
    } else if starts(b"<?xml") {
        "an XML document"
    } else if text.starts_with(b"{") || text.starts_with(b"[") {
        "JSON or text"
    } else if is_base64(text) {
        "base64 text (decode it first)"
    } else {
        "text"
    }
}

/// Long lines of nothing but base64's characters.
fn is_base64(text: &[u8]) -> bool {
    let line = text.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=-_".contains(byte);
    line.len() >= 60 && text.iter().all(|byte| known(byte) || byte.is_ascii_whitespace())
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
            (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom", "video"),
            (b"\x00\x00\x00\x14ftypXAVC\x00\x00\x00\x00", "ISO media"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "Git LFS pointer"),
            (b"data:image/jpeg;base64,/9j/4AAQ", "data URI"),
            (b"/9j/4AAQSkZJRgABAQAAAQ", "base64 text of a JPEG"),
            (b"iVBORw0KGgoAAAANSUhEUgAA", "base64 text of a PNG"),
            (b"TU0AKgAAAAgAAgEAAAMAAAABAAEAAAEBAAMAAAABAAEAAAAAAAAAAAAAAAAAAAAA", "base64"),
            (b"  <!doctype HTML><title>404", "HTML"),
            (b"https://example.org/a.jpg", "address"),
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
        assert_eq!(format(b"MM\0+").unwrap(), ImageFormat::Tiff);
    }
}
