//! What recording a job's metrics takes, all of it on one thread: a job of so many images, batches of
//! at most 32, and what each step records on its way.

use std::sync::Arc;
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;

use angler_metrics::{CloseReason, JobEnd, Metrics, Stage};

const BATCH: usize = 32;

#[divan::bench(args = [1, 64])]
fn recorded(bencher: Bencher<'_, '_>, images: usize) {
    job(bencher, images, Arc::new(Metrics::default()));
}

#[divan::bench(args = [1, 64])]
fn not_recorded(bencher: Bencher<'_, '_>, images: usize) {
    job(bencher, images, Arc::new(Metrics::off()));
}

fn job(bencher: Bencher<'_, '_>, images: usize, metrics: Arc<Metrics>) {
    bencher.counter(ItemsCount::new(images)).bench_local(|| {
        let job = metrics.job();
        for _ in 0..images {
            let image = metrics.image();
            for stage in [Stage::Fetch, Stage::Queue, Stage::Decode, Stage::Wait] {
                let clock = metrics.clock();
                metrics.step(stage, clock.spent());
            }
            metrics.fetched(10_000);
            metrics.frame_waited(Duration::ZERO);
            metrics.classified(true);
            drop(image);
        }
        for first in (0..images).step_by(BATCH) {
            let batch = BATCH.min(images - first);
            metrics.batch_closed(CloseReason::Full, batch);
            metrics.embedded(Duration::from_millis(5), batch);
            let clock = metrics.clock();
            metrics.step_of(Stage::Score, clock.spent(), batch);
        }
        let clock = metrics.clock();
        metrics.result(1_000);
        metrics.step_of(Stage::Publish, clock.spent(), images);
        job.ended(JobEnd::Done);
    });
}
