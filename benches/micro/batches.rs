//! What the engine takes beside its model: frames, queue, batcher, scoring, answers.
//!
//! 256 images (the default of `limits.images_in_flight`) are submitted at once to an embedder that
//! takes no time. The rate is what the engine could feed at most. Nobody writes the pixels here:
//! that is the decoder's work, and `images` measures it.

use std::sync::Arc;
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use futures_util::future::join_all;
use ndarray::Array2;
use tokio::runtime::Runtime;

use angler_inference::embed::Embedder;
use angler_inference::embed::fake::FakeEmbedder;
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, Want};
use angler_vectors::score::Scorer;
use angler_vectors::{ClassVectors, Contents};

const IMAGES: usize = 256;
const DIM: usize = 512;

/// With frames for the default model, 150 kB each.
#[divan::bench(args = [1, 8, 32])]
fn of_224_by_224(bencher: Bencher<'_, '_>, max_batch: usize) {
    submit(bencher, 224, max_batch);
}

/// With next to no pixels. Were it faster, somebody would touch them.
#[divan::bench(args = [1, 8, 32])]
fn of_8_by_8(bencher: Bencher<'_, '_>, max_batch: usize) {
    submit(bencher, 8, max_batch);
}

fn submit(bencher: Bencher<'_, '_>, side: u32, max_batch: usize) {
    let runtime = Runtime::new().expect("a runtime");
    let embedder: Box<dyn Embedder> = Box::new(FakeEmbedder::new(DIM));
    let policy = BatchPolicy { max_batch, linger: Duration::ZERO };
    let engine = {
        let _inside = runtime.enter();
        Engine::start(vec![embedder], policy, (side, side), Scorer::new(1)).expect("an engine")
    };
    let want = Want { classes: Some(classes()), top_k: 2, ..Want::default() };
    bencher.counter(ItemsCount::new(IMAGES)).bench_local(|| {
        let submit = (0..IMAGES).map(async |_| {
            let frame = engine.frame().await?;
            engine.submit(frame, want.clone()).await
        });
        for scored in runtime.block_on(join_all(submit)) {
            scored.expect("a score");
        }
    });
    runtime.block_on(engine.close());
}

/// Ten classes: scoring is measured elsewhere.
fn classes() -> Arc<ClassVectors> {
    let labels = (0..10).map(|n| format!("class-{n}")).collect();
    let vectors =
        Array2::from_shape_fn((10, DIM), |(row, column)| ((row * 7 + column) % 11) as f32);
    let contents = Contents::new(labels, vectors, "fake@0");
    Arc::new(ClassVectors::new(("bench", "1"), contents).expect("class vectors"))
}
