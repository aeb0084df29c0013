//! What is fed with bytes of anybody's making. Shared by `tests/local/fuzz` and the libFuzzer targets in
//! `fuzz/`.

use angler_amqp::sanitize::{Frames, rewrite};
use angler_pixels::{Filter, PixelLimits, PixelSpec, Resize};
use angler_vectors::active::Active;
use angler_vectors::file;
use angler_vectors::file::Reader;
use angler_wire::error::ImageErrorCode;
use angler_wire::job::{ClassSelector, Job, JobLimits, id_of_malformed};

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
    match angler_pixels::preprocess(bytes, &spec, limits) {
        Ok(pixels) => assert_eq!(pixels.data.len(), 8 * 8 * 3),
        // A decoder's panic, which is caught there, or our own mistake.
        Err(error) => assert_ne!(error.code, ImageErrorCode::Internal, "{error}"),
    }
}

/// A frame from a broker, and a stream of frames.
pub fn sanitize(bytes: &[u8]) {
    const METHOD: u8 = 1;
    const HEADER: u8 = 2;
    let parses = |payload: &[u8]| {
        // Behind class, weight and body size.
        let parsed = lapin::protocol::basic::parse_properties(&payload[12..]);
        parsed.is_ok_and(|(rest, _)| rest.is_empty())
    };
    match rewrite(HEADER, bytes) {
        Some(new) => {
            assert!(new.len() <= bytes.len().max(4_088), "{} of {}", new.len(), bytes.len());
            assert!(new[..12] == bytes[..12] && parses(&new), "{new:?}");
            assert!(rewrite(HEADER, &new).is_none());
        }
        None => assert!(bytes.len() < 12 || parses(bytes)),
    }
    if let Some(new) = rewrite(METHOD, bytes) {
        let parsed = lapin::protocol::parse_class(&new[..]);
        assert!(
            parsed.is_ok_and(|(_, class)| matches!(class, lapin::protocol::AMQPClass::Basic(_)))
        );
        assert!(rewrite(METHOD, &new).is_none());
    }
    let (mut frames, mut buffer) = (Frames::default(), [0; 64]);
    let mut read = 0;
    for piece in bytes.chunks(1 + bytes.len() % 300) {
        frames.push(piece);
        while let count @ 1.. = frames.read(&mut buffer) {
            read += count;
        }
    }
    assert!(read <= bytes.len() + 4_096 * (1 + bytes.len() / 8));
}
