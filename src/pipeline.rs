//! One image's way: fetch, decode, submit. [`crate::worker`] walks it for every image of a job,
//! [`crate::classes::build`] for every reference image.
//!
//! Fetching is async; decoding runs on blocking threads, as many as there are cores; the rest is
//! the engine's. Each step runs against one deadline, the image's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};

use crate::engine::{Engine, Frame, Scored, SubmitError, Want};
use crate::error::{ImageError, ImageErrorCode};
use crate::metrics::{Clock, Metrics, Stage};
use crate::outage::Outage;
use crate::preprocess::{Decoded, PixelLimits, PixelSpec, decode_for};
use crate::store::{ByteBudget, Fetched, ImageStore};
use crate::watchdog::Step;

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
    /// Encoded bytes in memory at once.
    pub bytes_in_flight: usize,
    /// The time of one image, from its admission to its score.
    pub image_time: Duration,
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
    budget: ByteBudget,
    slots: Arc<Semaphore>,
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
            budget: ByteBudget::new(limits.bytes_in_flight, limits.image_bytes),
            slots: Arc::new(Semaphore::new(limits.images_in_flight.max(1))),
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
    pub async fn explain(&self, error: ImageError) -> ImageError {
        match &self.outage {
            Some(outage) => outage.explain(error, self.store.as_ref(), &self.budget).await,
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
    pub async fn slot(&self) -> OwnedSemaphorePermit {
        match Arc::clone(&self.slots).acquire_owned().await {
            Ok(slot) => slot,
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// Fetches, decodes, embeds and scores one image; `slot` is held until it is done.
    ///
    /// # Errors
    /// [`SubmitError::Image`] with one of the closed set of codes, [`SubmitError::Gone`] if the
    /// engine is gone.
    pub async fn image(
        &self,
        uri: &str,
        want: Want,
        slot: OwnedSemaphorePermit,
    ) -> Result<Scored, SubmitError> {
        let _slot = slot;
        let _in_flight = self.metrics().image();
        let deadline = Instant::now() + self.image_time;
        let fetched = self.within(deadline, "fetched", self.fetch(uri)).await??;
        let frame = self.within(deadline, "decoded", self.decode(fetched)).await??;
        self.within(deadline, "classified", self.engine.submit(frame, want)).await?
    }

    /// A fault of the store that may pass is waited out for a moment, within the image's time.
    async fn fetch(&self, uri: &str) -> Result<Fetched, ImageError> {
        let _step = self.metrics().timed(Stage::Fetch);
        let mut tries = 0;
        loop {
            let fetched = self.store.fetch(uri, &self.budget).await;
            if let Ok(fetched) = &fetched {
                self.metrics().fetched(fetched.bytes.len());
            }
            if let Some(outage) = &self.outage {
                outage.note(uri, fetched.as_ref().err());
            }
            let fetched = match fetched {
                Err(error) => Err(self.explain(error).await),
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
    async fn decode(&self, fetched: Fetched) -> Result<Frame, SubmitError> {
        let queued = self.metrics().timed(Stage::Queue);
        let decoder = Arc::clone(&self.decoders)
            .acquire_owned()
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
                let (spec, frame) = (self.spec.clone(), self.engine.frame().await?);
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
        deadline: Instant,
        step: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, ImageError> {
        timeout_at(deadline, work).await.map_err(|_| {
            ImageError::new(
                ImageErrorCode::Timeout,
                format!(
                    "not {step} within {} s (limits.image_seconds)",
                    self.image_time.as_secs_f64()
                ),
            )
        })
    }
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
