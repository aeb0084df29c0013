//! The parts of an image's way that need no server, each alone, on one thread.
//!
//! ```sh
//! cargo bench --bench micro                     # all of it, about two minutes
//! cargo bench --bench micro -- jpeg             # the benchmarks whose name holds "jpeg"
//! cargo bench --bench micro -- --list
//! ```
//!
//! * `images`: bytes to the default model's pixels, and decoding alone.
//! * `batches`: what the engine takes beside its model.
//! * `messages`: jobs read, results written.
//! * `metrics`: what recording takes, beside not recording.
//!
//! Scoring has `benches/score.rs`, which holds it against the bare product.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A panic ends a benchmark, as it does a test.

#[path = "../common/photos.rs"]
mod photos;
#[path = "../common/messages.rs"]
mod wire;

mod batches;
mod images;
mod messages;
mod metrics;

fn main() {
    divan::main();
}
