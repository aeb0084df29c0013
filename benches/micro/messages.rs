//! Jobs read as `source/amqp.rs` reads them, results written as `sink/amqp.rs` writes them.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

use angler_wire::job::{Job, JobLimits};

use crate::wire;

/// Images in a job: the smallest, a usual one, the largest of the defaults.
const IMAGES: [usize; 3] = [1, 64, 1000];
const LIMITS: JobLimits = JobLimits { images: 1000, message_bytes: 4 << 20 };

fn uris(images: usize) -> Vec<String> {
    (0..images).map(|n| format!("s3://photos-production/2026/01/31/{n:08}.jpg")).collect()
}

#[divan::bench(args = IMAGES)]
fn parse_job(bencher: Bencher<'_, '_>, images: usize) {
    let uris = uris(images);
    let body = wire::job("nightly/000017", "bottles@7", uris.iter().map(String::as_str));
    bencher
        .counter(ItemsCount::new(images))
        .counter(BytesCount::new(body.len()))
        .bench(|| Job::parse(divan::black_box(&body), None, LIMITS).expect("a job"));
}

#[divan::bench(args = IMAGES)]
fn write_result(bencher: Bencher<'_, '_>, images: usize) {
    let uris = uris(images);
    let result = wire::result("nightly/000017", "bottles@7", uris.iter().map(String::as_str));
    let bytes = result.to_json().expect("JSON").len();
    bencher
        .counter(ItemsCount::new(images))
        .counter(BytesCount::new(bytes))
        .bench(|| divan::black_box(&result).to_json().expect("JSON"));
}
