//! One image's way: fetch, decode, submit. [`crate::worker`] walks it for every image of a job,
//! [`crate::class_sets::build`] for every reference image.
//!
//! Fetching is async; decoding runs on blocking threads, as many as there are cores; the rest is
//! the engine's. An image's time is that of its own work: its [`Stopwatch`] stands still while it
//! waits for a request, for bytes, for a decoder, for a frame or for its batch. How long it may
//! wait is its job's affair, and no wait is longer than `wait_time`.

mod slots;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};

use angler_inference::engine::{Engine, Frame, Scored, SubmitError, Want};
use angler_metrics::progress::Step;
use angler_metrics::stopwatch::Stopwatch;
use angler_metrics::{Clock, Metrics, Stage};
use angler_pixels::{Decoded, PixelLimits, PixelSpec, decode_for};
use angler_wire::error::{ImageError, ImageErrorCode};

use crate::outage_detector::Outage;
use crate::store::{ByteBudget, Fetched, ImageStore};
pub use slots::Slot;
use slots::Slots;

/// How often a fetch that failed for a passing reason is tried again at once, beside what the
/// store's client does, and the pause before the first of those.
const RETRIES: u32 = 2;
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// What one image may use, and all together: the part of `[limits]` that concerns images.
#[derive(Debug, Clone)]
pub struct ImageLimits {
    /// The largest object, in bytes.
    pub image_bytes: u32,
    /// The most pixels that an image may declare.
    pub image_pixels: u64,
    /// Images admitted at once, over all jobs.
    pub images_in_flight: usize,
    /// Images admitted at once even if they take long. More than this, up to `images_in_flight`, are as
    /// many as are finished within seconds.
    pub images_at_least: usize,
    /// Encoded bytes in memory at once.
    pub bytes_in_flight: usize,
    /// The time of one image's own work.
    pub image_time: Duration,
    /// The time of one image, waiting for others included.
    pub wait_time: Duration,
    /// Images decoded at once.
    pub decoders: usize,
}

/// The steps that every image goes through.
pub struct Pipeline {
    store: Arc<dyn ImageStore>,
    engine: Engine,
    spec: PixelSpec,
    pixel_limits: PixelLimits,
    image_time: Duration,
    wait_time: Duration,
    budget: ByteBudget,
    slots: Arc<Slots>,
    decoders: Arc<Semaphore>,
    decoding: Arc<Step>,
    outage: Option<Arc<Outage>>,
}

impl Pipeline {
    /// Images from `store`, made into pixels by `spec`, through `engine`.
    pub fn new(
        store: Arc<dyn ImageStore>,
        engine: Engine,
        spec: PixelSpec,
        limits: &ImageLimits,
    ) -> Self {
        Self {
            store,
            engine,
            spec,
            pixel_limits: PixelLimits { max_pixels: limits.image_pixels },
            image_time: limits.image_time,
            wait_time: limits.wait_time,
            budget: ByteBudget::new(limits.bytes_in_flight, limits.image_bytes),
            slots: Slots::new(limits.images_at_least, limits.images_in_flight),
            decoders: Arc::new(Semaphore::new(limits.decoders.max(1))),
            decoding: Step::new("image(s) being decoded"),
            outage: None,
        }
    }

    /// Tells `outage` how every fetch ended.
    #[must_use]
    pub fn watched_by(mut self, outage: Arc<Outage>) -> Self {
        self.outage = Some(outage);
        self
    }

    /// Watches for an outage of the store, for as long as it is awaited.
    pub async fn watch_store(&self) {
        match &self.outage {
            Some(outage) => outage.watch(self.store.as_ref(), &self.budget).await,
            None => std::future::pending().await,
        }
    }

    /// Whether the store can be used, if that is watched.
    pub fn outage(&self) -> Option<&Outage> {
        self.outage.as_deref()
    }

    /// Decides what an image's error means for the store, if that is watched.
    pub async fn explain(&self, uri: &str, error: ImageError) -> ImageError {
        match &self.outage {
            Some(outage) => outage.explain(uri, error, self.store.as_ref(), &self.budget).await,
            None => error,
        }
    }

    /// Looks whether the store can be used, because class sets in it cannot be read.
    pub async fn suspect_store(&self) {
        if let Some(outage) = self.outage.as_deref().filter(|outage| outage.has_root()) {
            outage.check(self.store.as_ref(), &self.budget).await;
        }
    }

    /// The steps that no deadline ends, for the watchdog.
    pub fn steps(&self) -> Vec<Arc<Step>> {
        vec![Arc::clone(&self.decoding), self.engine.embedding()]
    }

    /// The engine behind it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Where every step is recorded.
    pub fn metrics(&self) -> &Arc<Metrics> {
        self.engine.metrics()
    }

    /// Waits for a place among the images in flight.
    pub async fn slot(&self) -> Slot {
        self.slots.take().await
    }

    /// Fetches, decodes, embeds and scores one image; `slot` is held until it is done.
    ///
    /// # Errors
    /// [`SubmitError::Image`] with one of the closed set of codes, [`SubmitError::Gone`] if the
    /// engine is gone.
    pub async fn image(&self, uri: &str, want: Want, slot: Slot) -> Result<Scored, SubmitError> {
        let _in_flight = self.metrics().image();
        let done = self.classified(uri, want).await;
        slot.finished();
        done
    }

    async fn classified(&self, uri: &str, mut want: Want) -> Result<Scored, SubmitError> {
        let time = Time { watch: Stopwatch::started(), end: Instant::now() + self.wait_time };
        let fetched = self.within(&time, "fetched", self.fetch(uri, &time.watch)).await??;
        let frame = self.within(&time, "decoded", self.decode(fetched, &time.watch)).await??;
        // Until its batch is embedded.
        time.watch.stop();
        want.watch = Some(time.watch.clone());
        self.within(&time, "classified", self.engine.submit(frame, want)).await?
    }

    /// A fault of the store that may pass is waited out for a moment, within the image's time.
    async fn fetch(&self, uri: &str, watch: &Stopwatch) -> Result<Fetched, ImageError> {
        let _step = self.metrics().timed(Stage::Fetch);
        let budget = self.budget.timed_by(watch);
        let mut tries = 0;
        loop {
            let fetched = self.store.fetch(uri, &budget).await;
            if let Ok(fetched) = &fetched {
                self.metrics().fetched(fetched.bytes.len());
            }
            if let Some(outage) = &self.outage {
                outage.note(uri, fetched.as_ref().err());
            }
            let fetched = match fetched {
                Err(error) => Err(self.explain(uri, error).await),
                fetched => fetched,
            };
            let unavailable = |e: &ImageError| e.code == ImageErrorCode::StorageUnavailable;
            let passing = fetched.as_ref().is_err_and(unavailable);
            let away = self.outage.as_ref().is_some_and(|outage| outage.is_on());
            if !passing || away || tries == RETRIES {
                return fetched;
            }
            self.metrics().fetch_retried();
            sleep(RETRY_PAUSE * 4_u32.pow(tries)).await;
            tries += 1;
        }
    }

    /// Decodes into a frame of the engine's. The frame is claimed only once the image is decoded:
    /// a batch that closes waits for those who write. The decoder's place is held until then, so
    /// that no more decoded images wait than there are decoders.
    async fn decode(&self, fetched: Fetched, watch: &Stopwatch) -> Result<Frame, SubmitError> {
        let queued = self.metrics().timed(Stage::Queue);
        let decoder = watch
            .waiting(Arc::clone(&self.decoders).acquire_owned())
            .await
            .map_err(|_| ImageError::new(ImageErrorCode::Internal, "the decoders were closed"))?;
        drop(queued);
        let spent = &mut Decoding { metrics: self.metrics(), spent: Duration::ZERO, since: None };
        let (spec, limits, engine) = (self.spec.clone(), self.pixel_limits, self.engine.clone());
        let decoded = self.on_a_decoder(decoder, spent, move || {
            let decoded = decode_for(&fetched.bytes, &spec, limits)?;
            drop(fetched);
            // Mostly there is a frame, and the thread goes on.
            Ok(match engine.frame_now() {
                Some(frame) => Written::Frame(resized(&decoded, &spec, frame)?),
                None => Written::Waits(decoded),
            })
        });
        let decoded = decoded.await?;
        match decoded {
            (Written::Frame(frame), _) => Ok(frame),
            (Written::Waits(decoded), decoder) => {
                let frame = watch.waiting(self.engine.frame()).await?;
                let spec = self.spec.clone();
                let write = move || resized(&decoded, &spec, frame);
                let (frame, _) = self.on_a_decoder(decoder, spent, write).await?;
                Ok(frame)
            }
        }
    }

    /// Runs `work` on a blocking thread. A panic there is this image's error; the decoder's place
    /// goes with the thread, so one that outlives the image's deadline still counts.
    async fn on_a_decoder<T: Send + 'static>(
        &self,
        decoder: OwnedSemaphorePermit,
        spent: &mut Decoding<'_>,
        work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
    ) -> Result<(T, OwnedSemaphorePermit), ImageError> {
        let decoding = Arc::clone(&self.decoding);
        spent.since = Some(self.metrics().clock());
        let done = tokio::task::spawn_blocking(move || {
            let _watched = decoding.enter();
            Ok((work()?, decoder))
        })
        .await;
        spent.pause();
        done.unwrap_or_else(|_| {
            let message = "the decoder panicked on this image";
            Err(ImageError::new(ImageErrorCode::Internal, message))
        })
    }

    async fn within<T>(
        &self,
        time: &Time,
        step: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, ImageError> {
        let (limit, setting) =
            match timeout_at(time.end, time.watch.within(self.image_time, work)).await {
                Ok(Some(done)) => return Ok(done),
                Ok(None) => (self.image_time, "limits.image_seconds"),
                Err(_) => (self.wait_time, "limits.job_seconds"),
            };
        let message = format!("not {step} within {} s ({setting})", limit.as_secs_f64());
        Err(ImageError::new(ImageErrorCode::Timeout, message))
    }
}

/// An image's time.
struct Time {
    /// Of its own work.
    watch: Stopwatch,
    /// When it is over, whatever the image waits for.
    end: Instant,
}

/// The time that an image is being decoded, without waiting for a frame; recorded at the end, also if
/// the image is given up before.
struct Decoding<'a> {
    metrics: &'a Metrics,
    spent: Duration,
    /// While a decoder works on it.
    since: Option<Clock>,
}

impl Decoding<'_> {
    fn pause(&mut self) {
        self.spent += self.since.take().map_or(Duration::ZERO, Clock::spent);
    }
}

impl Drop for Decoding<'_> {
    fn drop(&mut self) {
        self.pause();
        self.metrics.step(Stage::Decode, self.spent);
    }
}

/// How far a decoder came.
enum Written {
    /// To the end.
    Frame(Frame),
    /// There is no frame for now.
    Waits(Decoded),
}

fn resized(decoded: &Decoded, spec: &PixelSpec, mut frame: Frame) -> Result<Frame, ImageError> {
    decoded.resize_into(spec, frame.pixels_mut())?;
    Ok(frame)
}
