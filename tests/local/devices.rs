//! Devices that run out of memory or break for good, as the engine sees them: no image is lost that
//! a device could still do. What GPUs do is played here by an embedder: none can be had where tests
//! run, and these failures cannot be asked of one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use ndarray::{Array2, ArrayView4};

use angler_inference::embed::{Backend, EmbedError, Embedder};
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, OnFailure, Scored, SubmitError, Want};
use angler_vectors::score::Scorer;
use angler_wire::text::chain;

/// What a device did.
#[derive(Default)]
struct Log {
    /// The sizes of calls that succeeded, and of those for which there was no memory.
    ran: Mutex<Vec<usize>>,
    refused: Mutex<Vec<usize>>,
}

impl Log {
    fn take(&self) -> (Vec<usize>, Vec<usize>) {
        (
            std::mem::take(&mut self.ran.lock().unwrap()),
            std::mem::take(&mut self.refused.lock().unwrap()),
        )
    }
}

/// A device with memory for so many images, that breaks at a call, counted over the devices that
/// share the counter.
struct Device {
    memory: usize,
    shapes: Vec<usize>,
    breaks_at: Vec<usize>,
    /// From this call on every image fails, black ones too, as if each were at fault.
    fails_from: Option<usize>,
    /// Every call is filled up to this size, as on a GPU.
    padded: Option<usize>,
    calls: Arc<AtomicUsize>,
    /// Calls wait until so many devices are in one.
    together: Option<Arc<Meeting>>,
    log: Arc<Log>,
}

/// Devices that run at the same time.
struct Meeting {
    needed: usize,
    here: Mutex<usize>,
    arrived: Condvar,
}

impl Meeting {
    fn new(needed: usize) -> Arc<Self> {
        Arc::new(Self { needed, here: Mutex::default(), arrived: Condvar::new() })
    }

    fn wait(&self) {
        let mut here = self.here.lock().unwrap();
        *here += 1;
        self.arrived.notify_all();
        let limit = Duration::from_secs(30);
        let (_here, late) =
            self.arrived.wait_timeout_while(here, limit, |here| *here < self.needed).unwrap();
        assert!(!late.timed_out(), "the other device was never given a batch");
    }
}

impl Device {
    fn new(memory: usize) -> Self {
        Self {
            memory,
            shapes: vec![1],
            breaks_at: Vec::new(),
            fails_from: None,
            padded: None,
            calls: Arc::default(),
            together: None,
            log: Arc::default(),
        }
    }
}

impl Embedder for Device {
    fn backend(&self) -> Backend {
        Backend::Fake
    }

    fn shapes(&self) -> Vec<usize> {
        self.padded.map_or_else(|| self.shapes.clone(), |size| vec![size])
    }

    fn shrink(&mut self) -> bool {
        match &mut self.padded {
            Some(size) if *size > 1 => {
                *size /= 2;
                true
            }
            _ => false,
        }
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        let (images, ..) = pixels.dim();
        let taken = self.padded.unwrap_or(images);
        if taken > self.memory {
            self.log.refused.lock().unwrap().push(taken);
            return Err(EmbedError::OutOfMemory("CUDA failure 2: out of memory".into()));
        }
        let so_far = self.calls.load(Ordering::SeqCst);
        if self.fails_from.is_some_and(|from| so_far >= from) {
            return Err(EmbedError::Batch("CUDNN_FE failure 11: HEURISTIC_QUERY_FAILED".into()));
        }
        // The call of the warm-up is black.
        if pixels[[0, 0, 0, 0]] > 0 {
            if let Some(meeting) = &self.together {
                meeting.wait();
            }
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            if self.breaks_at.contains(&call) {
                return Err(EmbedError::Broken("CUDA failure 700: as told".into()));
            }
            self.log.ran.lock().unwrap().push(images);
        }
        Ok(Array2::from_shape_fn((images, 2), |(image, column)| match column {
            0 => f32::from(pixels[[image, 0, 0, 0]]),
            _ => 10.0,
        }))
    }
}

const BATCH: usize = 16;

fn engine(devices: Vec<Device>, on_failure: OnFailure) -> Engine {
    let policy = BatchPolicy { max_batch: BATCH, linger: Duration::from_secs(3600) };
    let devices = devices.into_iter().map(|device| Box::new(device) as Box<dyn Embedder>);
    Engine::start_with(
        devices.collect(),
        policy,
        (1, 1),
        Scorer::default(),
        on_failure,
        Arc::default(),
    )
    .unwrap()
}

/// Full batches of images, each of another grey.
async fn submit(engine: &Engine, images: usize) -> Vec<Result<Scored, SubmitError>> {
    let submit = async |grey: usize| {
        let mut frame = engine.frame().await?;
        frame.pixels_mut().fill(u8::try_from(grey + 1).unwrap());
        let want = Want { embedding: true, ..Want::default() };
        engine.submit(frame, want).await
    };
    let all = join_all((0..images).map(submit));
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("images wait for ever")
}

/// Each image has its own embedding.
fn assert_answered(scored: &[Result<Scored, SubmitError>]) {
    for (grey, scored) in scored.iter().enumerate() {
        let embedding = scored.as_ref().unwrap().embedding.as_ref().unwrap();
        let ratio = embedding[0] / embedding[1] * 10.0;
        assert!((ratio - (grey + 1) as f32).abs() < 1e-3, "image {grey}: {embedding:?}");
    }
}

#[tokio::test]
async fn a_device_without_memory_for_a_batch_gets_smaller_ones_from_then_on() {
    let device = Device::new(5);
    let log = Arc::clone(&device.log);
    let engine = engine(vec![device], OnFailure::Exit);
    assert_answered(&submit(&engine, BATCH).await);
    assert_eq!(log.take(), (vec![4; 4], vec![16, 8]));
    assert_answered(&submit(&engine, 2 * BATCH).await);
    assert_eq!(log.take(), (vec![4; 8], vec![]));
    engine.close().await;
}

#[tokio::test]
async fn what_does_not_fit_is_found_while_the_model_is_warmed() {
    let mut device = Device::new(11);
    device.shapes = vec![1, 2, 4, 8, 16];
    let log = Arc::clone(&device.log);
    let engine = engine(vec![device], OnFailure::Exit);
    assert_eq!(log.take(), (vec![], vec![16]));
    assert_answered(&submit(&engine, BATCH).await);
    assert_eq!(log.take(), (vec![8, 8], vec![]));
    engine.close().await;
}

#[tokio::test]
async fn a_device_without_memory_for_one_image_is_broken_and_blames_no_image() {
    // Somebody else took it after the warm-up, of which there is none here.
    let device = Device { shapes: Vec::new(), ..Device::new(0) };
    let engine = engine(vec![device], OnFailure::Exit);
    let scored = submit(&engine, BATCH).await;
    assert!(scored.iter().all(|s| matches!(s, Err(SubmitError::Gone))), "{scored:?}");
    let reason = chain(&engine.broken().await);
    assert!(reason.contains("out of memory"), "{reason}");
    engine.close().await;
}

#[tokio::test]
async fn calls_that_are_always_filled_up_become_smaller_and_no_image_is_blamed() {
    let device = Device { padded: Some(BATCH), ..Device::new(5) };
    let log = Arc::clone(&device.log);
    let engine = engine(vec![device], OnFailure::Exit);
    assert_eq!(log.take(), (vec![], vec![16, 8]), "found while the model is warmed");
    assert_answered(&submit(&engine, BATCH).await);
    assert_eq!(log.take(), (vec![BATCH], vec![]), "the back end cuts it into calls of 4 itself");
    engine.close().await;
}

#[tokio::test]
async fn a_failure_that_black_images_have_too_is_the_back_ends_and_no_image_is_answered() {
    let device = Device { fails_from: Some(1), ..Device::new(BATCH) };
    let engine = engine(vec![device], OnFailure::Exit);
    assert_answered(&submit(&engine, BATCH).await);
    let scored = submit(&engine, BATCH).await;
    assert!(scored.iter().all(|s| matches!(s, Err(SubmitError::Gone))), "{scored:?}");
    let reason = chain(&engine.broken().await);
    assert!(reason.contains("black") && reason.contains("HEURISTIC_QUERY_FAILED"), "{reason}");
    engine.close().await;
}

#[tokio::test]
async fn what_one_device_fails_on_for_good_is_done_by_another() {
    let (mut devices, _) = two(&[]);
    devices[0].fails_from = Some(0);
    devices[0].shapes = Vec::new(); // The fault begins after the warm-up.
    devices.iter_mut().for_each(|device| device.together = None);
    let engine = engine(devices, OnFailure::Continue);
    assert_answered(&submit(&engine, 4 * BATCH).await);
    engine.close().await;
}

/// Two devices, both at work, of which calls break.
fn two(breaks_at: &[usize]) -> (Vec<Device>, Arc<Log>) {
    let (calls, log, meeting) = (Arc::default(), Arc::<Log>::default(), Meeting::new(2));
    let device = || Device {
        breaks_at: breaks_at.to_vec(),
        calls: Arc::clone(&calls),
        together: Some(Arc::clone(&meeting)),
        log: Arc::clone(&log),
        ..Device::new(BATCH)
    };
    (vec![device(), device()], log)
}

#[tokio::test]
async fn a_device_that_breaks_is_taken_out_and_the_other_does_its_images() {
    let (devices, log) = two(&[1]);
    let engine = engine(devices, OnFailure::Continue);
    assert_answered(&submit(&engine, 6 * BATCH).await);
    assert_eq!(log.take().0, vec![BATCH; 6], "none is done twice");
    let broken = tokio::time::timeout(Duration::ZERO, engine.broken()).await;
    assert!(broken.is_err(), "the engine goes on");
    assert_answered(&submit(&engine, BATCH).await);
    engine.close().await;
}

#[tokio::test]
async fn a_worker_exits_with_the_first_device_unless_it_is_told_otherwise() {
    let (devices, _) = two(&[1]);
    let engine = engine(devices, OnFailure::Exit);
    let gone = submit(&engine, 2 * BATCH).await;
    let lost = gone.iter().filter(|s| matches!(s, Err(SubmitError::Gone))).count();
    assert_eq!(lost, BATCH);
    assert!(engine.broken().await.to_string().contains("CUDA failure 700"));
    engine.close().await;
}

#[tokio::test]
async fn when_the_last_device_breaks_the_engine_is_broken_and_nobody_waits() {
    let (devices, log) = two(&[1, 2]);
    let engine = engine(devices, OnFailure::Continue);
    let scored = submit(&engine, 4 * BATCH).await;
    let answered = scored.iter().filter(|s| s.is_ok()).count();
    assert_eq!(answered, BATCH * log.take().0.len());
    assert!(answered < scored.len());
    assert!(engine.broken().await.to_string().contains("CUDA failure 700"));
    engine.close().await;
}
