//! Fetching alone: files from a folder, objects from the store, as many at once as `s3.concurrency` says.
//! Nothing is done with the bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::task::JoinSet;

use angler_core::store::{ByteBudget, ImageStore};
use angler_storage::local::LocalImages;

use super::figures::{Sample, Samples};
use super::meter::Meter;
use crate::commands::bench::fixture::Stage;

/// Where images lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Place {
    Folder,
    S3,
}

impl Place {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::S3 => "S3",
        }
    }
}

/// What is fetched: from where, and which kind.
pub(super) type Key = (Place, String);

pub(super) async fn measure(stage: &Stage, samples: &mut Samples<Key>) -> Result<()> {
    for set in &stage.sets {
        let kind = || set.photos.kind.clone();
        let sample = fetch(stage, Arc::new(LocalImages), &set.local).await?;
        samples.add((Place::Folder, kind()), sample);
        if !set.remote.is_empty() {
            let store = Arc::new(stage.app.s3_images().await?);
            let sample = fetch(stage, store, &set.remote).await?;
            samples.add((Place::S3, kind()), sample);
        }
    }
    Ok(())
}

async fn fetch(stage: &Stage, store: Arc<dyn ImageStore>, uris: &Arc<[String]>) -> Result<Sample> {
    let limits = stage.app.settings.image_limits();
    let budget = ByteBudget::new(limits.bytes_in_flight, limits.image_bytes);
    let next = Arc::new(AtomicUsize::new(0));
    // Connections are opened before the clock runs.
    let width = stage.app.settings.s3.concurrency;
    for time in [Duration::ZERO, stage.plan.time] {
        let meter = Meter::start();
        let started = std::time::Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..width {
            let (store, uris) = (Arc::clone(&store), Arc::clone(uris));
            let (budget, next) = (budget.clone(), Arc::clone(&next));
            tasks.spawn(async move {
                let mut fetched = 0;
                loop {
                    let uri = &uris[next.fetch_add(1, Ordering::Relaxed) % uris.len()];
                    let image = store.fetch(uri, &budget).await;
                    image.map_err(|e| anyhow!("{uri}: {e}"))?;
                    fetched += 1;
                    if started.elapsed() >= time {
                        return Ok::<u64, anyhow::Error>(fetched);
                    }
                }
            });
        }
        let mut total = 0;
        while let Some(fetched) = tasks.join_next().await {
            total += fetched??;
        }
        if !time.is_zero() {
            return Ok(meter.stop(total));
        }
    }
    Err(anyhow!("nothing was fetched"))
}
