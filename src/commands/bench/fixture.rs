//! What all measurements share: the settings, the model, the images where they lie, a class set.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use ndarray::{Array2, Array4, Axis};
use tempfile::TempDir;

use angler_inference::model::Model;
use angler_pixels::{PixelLimits, preprocess};
use angler_vectors::rows::{Precision, Vectors};
use angler_vectors::unit::normalise;
use angler_vectors::{ClassVectors, Contents};

use super::figures::Sample;
use super::meter::Meter;
use super::photos::Photos;
use super::plan::Plan;
use super::remote::Remote;
use crate::app::App;

/// The class set of the measurements.
pub(super) const SET: (&str, &str) = ("bench", "1");
/// Rows that are random; a larger set repeats them, which costs its scoring the same.
const RANDOM_ROWS: usize = 4096;

/// Images of one kind, and where they lie under as many names as are in flight at once.
pub(super) struct Set {
    pub photos: Arc<Photos>,
    /// Files.
    pub local: Arc<[String]>,
    /// `s3://` URIs; empty without a bucket.
    pub remote: Arc<[String]>,
}

/// What all measurements share.
pub(super) struct Stage {
    /// Its settings name queues and a class root of the benchmark's own.
    pub app: App,
    pub model: Arc<Model>,
    pub plan: Plan,
    pub cores: usize,
    /// What goes through the pipeline.
    pub sets: Vec<Set>,
    /// What is only decoded.
    pub only_decoded: Vec<Arc<Photos>>,
    /// [N, H, W, 3], as many as the largest batch.
    pub pixels: Arc<Array4<u8>>,
    pub classes: Arc<ClassVectors>,
    /// What class vectors that are measured may take, in bytes.
    pub memory: u64,
    pub remote: Option<Arc<Remote>>,
    /// Removed with the stage.
    pub _folder: TempDir,
}

impl Stage {
    pub(super) fn limits(&self) -> PixelLimits {
        PixelLimits { max_pixels: self.app.settings.limits.image_pixels }
    }
}

/// Random class vectors; a class a row.
pub(super) fn contents(model: &Model, rows: usize, precision: Precision) -> Contents {
    let mut random = fastrand::Rng::with_seed(rows as u64);
    let some = rows.min(RANDOM_ROWS);
    let mut tile = Vectors::with_capacity(precision, some, model.dim);
    for _ in 0..some {
        let row: Vec<f32> = (0..model.dim).map(|_| random.f32() - 0.5).collect();
        tile.push(&row);
    }
    let mut vectors = Vectors::zeros(precision, rows, model.dim);
    for (target, source) in
        vectors.bytes_mut().chunks_mut(tile.bytes()).zip(std::iter::repeat(&tile))
    {
        target.copy_from_slice(&source.as_bytes()[..target.len()]);
    }
    let labels = (0..rows).map(|row| format!("class {row}")).collect();
    Contents::new(labels, vectors, &model.fingerprint)
}

/// Random unit vectors, [rows, dim].
pub(super) fn embeddings(rows: usize, dim: usize) -> Array2<f32> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut all = Array2::from_shape_simple_fn((rows, dim), || random.f32() - 0.5);
    all.rows_mut().into_iter().for_each(|row| {
        normalise(row);
    });
    all
}

/// The pixels of so many images, [N, H, W, 3].
///
/// # Errors
/// If an image cannot be decoded.
pub(super) fn pixels(
    model: &Model,
    photos: &Photos,
    limits: PixelLimits,
    count: usize,
) -> Result<Array4<u8>> {
    let (height, width) = (model.pixels.height as usize, model.pixels.width as usize);
    let mut all = Array4::zeros((count, height, width, 3));
    let files = photos.files.iter().cycle();
    for (index, (mut image, file)) in all.axis_iter_mut(Axis(0)).zip(files).enumerate() {
        let decoded = preprocess(file, &model.pixels, limits).map_err(|e| {
            anyhow!("image {} of the {} ones: {e}; leave it out", index + 1, photos.kind)
        })?;
        if let Some(values) = image.as_slice_mut() {
            values.copy_from_slice(&decoded.data);
        }
    }
    Ok(all)
}

/// Writes the images below `folder` under so many names; the same content is the same file.
///
/// # Errors
/// What the system said.
pub(super) fn write(folder: &Path, photos: &Photos, names: usize) -> Result<Vec<String>> {
    let folder = folder.join(photos.kind.replace(' ', "-"));
    let told = || format!("{} cannot be written", folder.display());
    std::fs::create_dir(&folder).with_context(told)?;
    let mut paths: Vec<String> = Vec::with_capacity(names);
    for name in 0..names.max(photos.files.len()) {
        let path = folder.join(format!("{name:06}"));
        match photos.files.get(name) {
            Some(bytes) => std::fs::write(&path, bytes).with_context(told)?,
            None => {
                let first = &paths[name % photos.files.len()];
                std::fs::hard_link(first, &path).with_context(told)?;
            }
        }
        let path = path.to_str().ok_or_else(|| anyhow!("{} is not UTF-8", path.display()))?;
        paths.push(path.to_owned());
    }
    Ok(paths)
}

/// Runs what keeps a thread busy, without keeping the runtime's.
///
/// # Errors
/// Those of `work`, and its panic.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| anyhow!("a measurement panicked: {e}"))?
}

/// Runs `work` on so many threads at once, with ever new numbers, until the time is over. It yields how
/// many images it did.
///
/// # Errors
/// The first of `work`.
pub(super) fn on_threads(
    threads: usize,
    time: Duration,
    work: impl Fn(usize) -> Result<u64> + Sync,
) -> Result<Sample> {
    let next = AtomicUsize::new(0);
    let outcome = Mutex::new(Ok(0_u64));
    let lock = || outcome.lock().unwrap_or_else(PoisonError::into_inner);
    let meter = Meter::start();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                // At least one each.
                loop {
                    let done = work(next.fetch_add(1, Ordering::Relaxed));
                    let mut outcome = lock();
                    match (done, outcome.as_mut()) {
                        (Ok(images), Ok(total)) => *total += images,
                        (Err(error), Ok(_)) => *outcome = Err(error),
                        (_, Err(_)) => {}
                    }
                    if outcome.is_err() || meter.elapsed() >= time {
                        return;
                    }
                }
            });
        }
    });
    let images = std::mem::replace(&mut *lock(), Ok(0))?;
    Ok(meter.stop(images))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin_model::{self, BUILTIN};

    #[test]
    fn large_sets_repeat_their_rows_and_every_row_is_a_class() {
        let model = builtin_model::load(BUILTIN).unwrap();
        for precision in [Precision::F32, Precision::F16] {
            let contents = contents(&model, RANDOM_ROWS + 3, precision);
            let set = ClassVectors::new(SET, contents).unwrap();
            assert_eq!(set.labels().len(), RANDOM_ROWS + 3);
            assert_eq!(set.unit_row(2), set.unit_row(RANDOM_ROWS + 2));
            assert_ne!(set.unit_row(2), set.unit_row(3));
        }
    }

    #[test]
    fn files_have_as_many_names_as_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let files = vec![b"a".to_vec().into(), b"b".to_vec().into()];
        let photos = Photos { kind: "of two".into(), format: String::new(), size: None, files };
        let paths = write(folder.path(), &photos, 5).unwrap();
        let contents: Vec<String> =
            paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
        assert_eq!(contents, ["a", "b", "a", "b", "a"]);
    }

    #[test]
    fn every_thread_works_at_least_once_and_the_first_error_ends_all() {
        let sample = on_threads(3, Duration::ZERO, |_| Ok(2)).unwrap();
        assert_eq!(sample.images, 6.0);
        let error = on_threads(2, Duration::from_secs(60), |n| match n {
            0..10 => Ok(1),
            n => Err(anyhow!("number {n}")),
        });
        assert!(error.unwrap_err().to_string().starts_with("number 1"));
    }
}
