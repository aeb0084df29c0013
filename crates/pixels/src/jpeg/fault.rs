//! What libjpeg complains of. It calls a function of ours, which unwinds to the caller.

#![allow(unsafe_code, reason = "libjpeg says what is wrong behind a pointer")]

use std::any::Any;
use std::ffi::c_int;
use std::panic::resume_unwind;

use mozjpeg_sys::{
    JERR_CCIR601_NOTIMPL, JERR_CONVERSION_NOTIMPL, JERR_FRACT_SAMPLE_NOTIMPL, JERR_NO_QUANT_TABLE,
    JERR_NOT_COMPILED, JERR_NOTIMPL, JERR_SOF_UNSUPPORTED, JWRN_HIT_MARKER, JWRN_HUFF_BAD_CODE,
    JWRN_MUST_RESYNC, jpeg_common_struct, jpeg_error_mgr, msg_parm_union,
};

use angler_wire::error::ImageError;

use crate::sniff::unsupported;
use crate::stored::corrupt;

/// The number of a message of libjpeg.
struct Fault(i64);

/// Handles a file's errors. Data that ends early or makes no sense, which libjpeg only warns of, is an
/// error in a file without an end marker: its picture is not whole.
pub(super) fn manager(ended: bool) -> jpeg_error_mgr {
    jpeg_error_mgr {
        error_exit: Some(fail),
        emit_message: Some(if ended { ignore } else { insist }),
        output_message: Some(silence),
        format_message: None,
        reset_error_mgr: Some(silence),
        msg_code: 0,
        msg_parm: msg_parm_union { _bindgen_data_: [0; 20] },
        trace_level: 0,
        num_warnings: 0,
        jpeg_message_table: std::ptr::null(),
        last_jpeg_message: 0,
        addon_message_table: std::ptr::null(),
        first_addon_message: 0,
        last_addon_message: 0,
    }
}

/// What a panic out of libjpeg means for the image.
pub(super) fn refusal(panic: &(dyn Any + Send)) -> ImageError {
    let code = match panic.downcast_ref() {
        Some(Fault(code)) => *code,
        None => return corrupt("JPEG file is damaged"),
    };
    let is = |known: &[_]| known.iter().any(|known| i64::from(*known) == code);
    if is(&[JWRN_HIT_MARKER, JWRN_HUFF_BAD_CODE, JWRN_MUST_RESYNC]) {
        corrupt(
            "JPEG file ends early: it has no end-of-image marker and its last scan is cut short",
        )
    } else if is(&[JERR_FRACT_SAMPLE_NOTIMPL, JERR_CCIR601_NOTIMPL]) {
        unsupported("a JPEG of unusual sampling")
    } else if is(&[JERR_SOF_UNSUPPORTED, JERR_NOT_COMPILED, JERR_NOTIMPL, JERR_CONVERSION_NOTIMPL])
    {
        unsupported("a JPEG of an unsupported kind")
    } else if is(&[JERR_NO_QUANT_TABLE]) {
        corrupt("JPEG file is damaged: a quantization table is missing")
    } else {
        corrupt(format!("JPEG file is damaged (libjpeg error {code})"))
    }
}

fn code(cinfo: &jpeg_common_struct) -> i64 {
    // SAFETY: libjpeg sets `err` to the manager that it was created with, and the manager lives as
    // long as the decoder, before it calls any function of the manager.
    unsafe { cinfo.err.as_ref() }.map_or(0, |manager| manager.msg_code.into())
}

#[cold]
extern "C-unwind" fn fail(cinfo: &mut jpeg_common_struct) {
    resume_unwind(Box::new(Fault(code(cinfo))));
}

/// Warnings have a level below 0.
#[cold]
extern "C-unwind" fn insist(cinfo: &mut jpeg_common_struct, level: c_int) {
    let code = code(cinfo);
    let missing = [JWRN_HIT_MARKER, JWRN_HUFF_BAD_CODE, JWRN_MUST_RESYNC];
    if level < 0 && missing.iter().any(|missing| i64::from(*missing) == code) {
        resume_unwind(Box::new(Fault(code)));
    }
}

extern "C-unwind" fn ignore(_: &mut jpeg_common_struct, _: c_int) {}

extern "C-unwind" fn silence(_: &mut jpeg_common_struct) {}
