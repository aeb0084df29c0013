//! The few images that a page shows, fetched and decoded once more.
//!
//! Of all images that were scored nothing is kept, and only at the end it is known which ones are
//! worth a look. They are shown whole, not as the model's crop: what the crop cut away may be why a
//! label is wrong. It takes no model, so kept results can be shown as well. The limits are those of
//! `[limits]`: bytes, pixels, the time of one image, a decoder a core.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use angler_core::store::{ByteBudget, ImageStore};
use angler_pixels::{PixelLimits, decode};
use angler_report::{THUMBNAIL_SIDE, thumbnail};
use angler_wire::error::{ImageError, ImageErrorCode};
use angler_wire::text::chain;

use super::progress::progress_bar;
use crate::app::App;

/// The most images that a page shows: as many as somebody looks at.
pub(super) const IMAGES: usize = 60;
/// Images that are fetched side by side.
const FETCHES: usize = 16;
/// The time of all together: a page without some pictures is better than none while a store is away.
const ALL: Duration = Duration::from_secs(120);

/// A small JPEG, or why there is none.
pub(super) type Thumbnail = Result<Vec<u8>, ImageError>;

/// Small JPEGs of these images, in their order.
pub(super) async fn thumbnails(app: &App, uris: &[&str]) -> Vec<Thumbnail> {
    let limits = app.settings.image_limits();
    let store = match app.images_for(uris.iter().copied()).await {
        Ok(store) => store,
        Err(error) => return vec![Err(internal(&chain(error.as_ref()))); uris.len()],
    };
    let source = Source {
        store,
        budget: ByteBudget::new(limits.bytes_in_flight, limits.image_bytes),
        pixels: PixelLimits { max_pixels: limits.image_pixels },
        decoders: Arc::new(Semaphore::new(limits.decoders.max(1))),
        time: limits.image_time,
        end: Instant::now() + ALL,
    };
    let bar = progress_bar(uris.len(), "thumbnails");
    let (one, bar_of_one) = (&source, &bar);
    let made = stream::iter(uris.iter().copied()).map(|uri| async move {
        let made = one.within_time(uri).await;
        bar_of_one.inc(1);
        made
    });
    let all = made.buffered(FETCHES).collect().await;
    bar.finish_and_clear();
    all
}

struct Source {
    store: Arc<dyn ImageStore>,
    budget: ByteBudget,
    pixels: PixelLimits,
    decoders: Arc<Semaphore>,
    time: Duration,
    end: Instant,
}

fn internal(what: &str) -> ImageError {
    ImageError::new(ImageErrorCode::Internal, what)
}

impl Source {
    async fn within_time(&self, uri: &str) -> Thumbnail {
        let own = Instant::now() + self.time;
        let late = |_| {
            let message = match own < self.end {
                true => {
                    format!("not there within {} s (limits.image_seconds)", self.time.as_secs_f64())
                }
                false => format!("all pictures together have {} s", ALL.as_secs()),
            };
            Err(ImageError::new(ImageErrorCode::Timeout, message))
        };
        timeout_at(own.min(self.end), self.make(uri)).await.unwrap_or_else(late)
    }

    async fn make(&self, uri: &str) -> Thumbnail {
        let fetched = self.store.fetch(uri, &self.budget).await.map_err(|error| {
            // The card names the image already.
            let reason = error.message.strip_prefix(uri).unwrap_or(&error.message);
            ImageError::new(error.code, reason.trim_start_matches([':', ' ']))
        })?;
        let decoder = Arc::clone(&self.decoders)
            .acquire_owned()
            .await
            .map_err(|_| internal("the decoders were closed"))?;
        let limits = self.pixels;
        tokio::task::spawn_blocking(move || {
            // Permit and bytes go with the thread, which may outlive the image's time.
            let _decoder = decoder;
            let image = decode(&fetched.bytes, limits)?;
            let (width, height) = image.dimensions();
            thumbnail(&image, width, height, THUMBNAIL_SIDE)
                .map_err(|error| internal(&chain(&error)))
        })
        .await
        .unwrap_or_else(|_| Err(internal("the decoder panicked on this image")))
    }
}
