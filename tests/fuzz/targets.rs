//! What is fed with bytes of anybody's making. Shared by `tests/fuzz` and the libFuzzer targets in
//! `fuzz/`.

use angler::classes::active::Active;
use angler::classes::file::{self, Reader};
use angler::error::ImageErrorCode;
use angler::job::{ClassSelector, Job, JobLimits, id_of_malformed};
use angler::preprocess::{Filter, PixelLimits, PixelSpec, Resize};

/// The message of a job; what is no job still gets an id.
pub fn job(bytes: &[u8]) {
    let limits = JobLimits { images: 100, message_bytes: 1 << 20 };
    match Job::parse(bytes, None, limits) {
        Ok(job) => {
            assert!(!job.images.is_empty() && job.images.len() <= limits.images);
            let set = &job.classes.set;
            assert!(!set.is_empty() && !set.contains(['/', '\\', '\0']) && !set.starts_with('.'));
        }
        Err(_) => assert!(!id_of_malformed(bytes, None).is_empty()),
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = ClassSelector::parse(text);
    }
}

/// A version's file, in chunks of some size; and the small file that points at it.
pub fn class_vectors(bytes: &[u8]) {
    let chunk = 1 + bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>() % 300;
    let mut reader = Reader::new("fuzz", bytes.len() as u64, None);
    let read = bytes.chunks(chunk).try_for_each(|chunk| reader.push(chunk));
    if let Ok(contents) = read.and_then(|()| reader.finish())
        && let Ok(classes) = file::check(contents, ("s", "1"), "fuzz")
    {
        assert!(classes.vectors().rows() > 0 && classes.dim() > 0);
    }
    let _ = Active::parse(bytes);
}

/// An image's file.
pub fn preprocess(bytes: &[u8]) {
    let spec =
        PixelSpec { width: 8, height: 8, resize: Resize::ShorterSide(10), filter: Filter::Bicubic };
    let limits = PixelLimits { max_pixels: 100_000 };
    match angler::preprocess::preprocess(bytes, &spec, limits) {
        Ok(pixels) => assert_eq!(pixels.data.len(), 8 * 8 * 3),
        // A decoder's panic, which is caught there, or our own mistake.
        Err(error) => assert_ne!(error.code, ImageErrorCode::Internal, "{error}"),
    }
}
