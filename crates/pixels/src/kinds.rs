//! Every kind of file that people were seen to have, against the picture that it holds or the words of
//! its refusal (`tests/data/images/kinds`).

use std::path::{Path, PathBuf};

use angler_wire::error::ImageErrorCode;
use image::RgbImage;

use crate::{Filter, PixelLimits, PixelSpec, Resize, decode, preprocess};

const LIMITS: PixelLimits = PixelLimits { max_pixels: 50_000_000 };

/// A wide picture's crop, at a fraction of the size.
const SPEC: PixelSpec =
    PixelSpec { width: 32, height: 16, resize: Resize::ShorterSide(40), filter: Filter::Bicubic };

/// A file, the picture that it holds, and the mean absolute difference that its losses explain, in grey
/// levels.
const READ: &[(&str, &str, f64)] = &[
    ("jpeg_multiscan_420_s.jpg", "base", 2.6),
    ("jpeg_multiscan_y_cbcr_s.jpg", "base", 2.6),
    ("jpeg_ycc_jfif_adobe0_s.jpg", "base", 2.6),
    ("jpeg_exif6_long_s.jpg", "base", 2.6),
    ("jpeg_no_dht_s.jpg", "base", 2.6),
    ("jpeg_no_eoi_zero_pad_s.jpg", "base", 2.6),
    ("jpeg_arith_s.jpg", "base", 2.6),
    ("jpeg_sample_1x1_2x2_2x2_s.jpg", "sample_1x1_2x2_2x2", 1.0), // as Pillow reads it
    ("jpeg_sample_3x1_s.jpg", "sample_3x1", 1.0),
    ("gif_frame_bigger.gif", "gifpal", 0.0),
    ("gif_unknown_extension.gif", "gifpal", 0.0),
    ("webp_flag_no_exif.webp", "base", 2.3),
    ("webp_exif_no_flag.webp", "base", 2.3),
    ("png_no_iend.png", "base", 0.0),
    ("tiff_palette8.tif", "tpal", 0.0),
    ("tiff_jpeg_ycbcr.tif", "base", 1.5),
    ("tiff_bigtiff.tif", "base", 0.0),
    ("tiff_float01.tif", "gray", 0.0),
    ("tiff_gray_int16.tif", "gray", 0.0),
    ("tiff_1bit_group3.tif", "tone", 0.0),
    ("tiff_planar_separate_tiled.tif", "base", 0.0),
    ("tiff_more_zlibpredbe.tif", "more-rgb", 0.0),
    ("tiff_more_lzwpred16le.tif", "more-rgb", 0.0),
    ("tiff_more_zstdpredfle.tif", "more-grey", 0.0),
    ("tiff_more_f32rangele.tif", "more-stretched", 0.0),
    ("tiff_more_i16negbe.tif", "more-stretched", 0.0),
    ("tiff_more_i32be.tif", "more-stretched", 0.0),
    ("tiff_more_group3_2d.tif", "more-bilevel", 0.0),
    ("tiff_more_lsb_g3.tif", "more-bilevel", 0.0),
    ("tiff_more_tiff_ccitt.tif", "more-bilevel", 0.0),
    ("tiff_more_palettelzw.tif", "more-palette", 0.0),
    ("tiff_more_pil_cmyk.tif", "more-rgb", 0.0),
    ("tiff_more_pil_ycc.tif", "more-rgb", 1.4),
    ("tiff_more_lab.tif", "more-rgb", 1.4),
    ("tiff_more_jpegplanar.tif", "more-rgb", 1.4),
    ("tiff_more_rgbx.tif", "more-rgb", 0.0),
    ("tiff_more_miniswhite.tif", "more-grey", 0.0),
];

/// A file, its code, and what the message says.
const REFUSED: &[(&str, ImageErrorCode, &str)] = &[
    ("png_palette_len.png", ImageErrorCode::CorruptImage, "PNG"),
    ("png_cgbi.png", ImageErrorCode::UnsupportedFormat, "iOS-optimised PNG"),
    ("x_lfs.jpg", ImageErrorCode::UnsupportedFormat, "Git LFS pointer"),
    ("x_base64.jpg", ImageErrorCode::UnsupportedFormat, "base64"),
    ("x_heic_named.jpg", ImageErrorCode::UnsupportedFormat, "HEIC"),
    ("x_avif_named.jpg", ImageErrorCode::UnsupportedFormat, "AVIF"),
    ("x_jxl_named.jpg", ImageErrorCode::UnsupportedFormat, "JPEG XL"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/images/kinds")
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap()
}

fn truth(name: &str) -> RgbImage {
    decode(&read(&format!("truth/{name}.png")), LIMITS).unwrap()
}

/// In grey levels.
fn mean_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: u64 = a.iter().zip(b.iter()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.len() as f64
}

#[test]
fn every_kind_shows_its_picture() {
    let mut wrong = Vec::new();
    for &(file, expected, tolerance) in READ {
        match decode(&read(file), LIMITS) {
            Ok(image) => {
                let expected = truth(expected);
                if image.dimensions() != expected.dimensions() {
                    wrong.push(format!("{file}: {:?}", image.dimensions()));
                    continue;
                }
                let mean = mean_difference(&image, &expected);
                println!("{file}: mean {mean:.3}");
                if mean > tolerance {
                    wrong.push(format!("{file}: mean {mean}"));
                }
            }
            Err(error) => wrong.push(format!("{file}: {error:?}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_other_kind_is_refused_by_name() {
    for &(file, code, words) in REFUSED {
        let error = decode(&read(file), LIMITS).err().unwrap_or_else(|| panic!("{file} was read"));
        assert_eq!(error.code, code, "{file}: {}", error.message);
        assert!(error.message.contains(words), "{file}: {}", error.message);
    }
}

#[test]
fn every_file_has_an_outcome() {
    let mut files: Vec<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "truth")
        .collect();
    let mut listed: Vec<_> = READ.iter().map(|entry| entry.0.to_owned()).collect();
    listed.extend(REFUSED.iter().map(|entry| entry.0.to_owned()));
    files.sort();
    listed.sort();
    assert_eq!(files, listed);
}

#[test]
fn a_scan_cut_in_the_middle_is_corrupt_whatever_pads_it() {
    for (file, ..) in READ.iter().filter(|entry| entry.0.starts_with("jpeg_")) {
        let whole = read(file);
        let end = whole.iter().rposition(|&byte| byte != 0).unwrap();
        for percent in [30, 60, 95] {
            let mut cut = whole[..end * percent / 100].to_vec();
            for padding in [0, whole.len() - cut.len(), 4 * whole.len()] {
                cut.resize(cut.len() + padding, 0);
                let code = decode(&cut, LIMITS).err().map(|error| error.code);
                let message = format!("{file} at {percent}%, {padding} zeros");
                assert_eq!(code, Some(ImageErrorCode::CorruptImage), "{message}");
                let code = preprocess(&cut, &SPEC, LIMITS).err().map(|error| error.code);
                assert_eq!(code, Some(ImageErrorCode::CorruptImage), "{message}");
            }
        }
    }
}
