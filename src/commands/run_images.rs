//! Images through the pipeline without a worker, for commands that want scores or embeddings and
//! no results.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use tokio_util::task::AbortOnDropHandle;

use angler_core::pipeline::Pipeline;
use angler_inference::engine::{Scored, SubmitError, Want};
use angler_wire::error::ImageError;

use super::progress::progress_bar;

/// Results that may wait for an image before them.
const WINDOW: usize = 512;

type Running = AbortOnDropHandle<Result<Scored, SubmitError>>;

/// Embeds every image once and hands on what came of it, in the order of the images, with a
/// progress bar on a terminal. What is in memory does not grow with the number of images.
///
/// # Errors
/// If the engine is gone, or `take` fails.
pub(super) async fn each_image(
    pipeline: &Arc<Pipeline>,
    images: &[String],
    want: Want,
    mut take: impl FnMut(usize, Result<Scored, ImageError>) -> Result<()>,
) -> Result<()> {
    let bar = progress_bar(images.len(), "images");
    let mut running: VecDeque<Running> = VecDeque::new();
    let mut taken = 0;
    for uri in images {
        while running.len() >= WINDOW || running.front().is_some_and(|first| first.is_finished()) {
            let Some(first) = running.pop_front() else { break };
            take(taken, outcome(first).await?)?;
            taken += 1;
            bar.inc(1);
        }
        // A slot before the task: however many images there are, few are in memory.
        let slot = pipeline.slot().await;
        let (pipeline, uri, want) = (Arc::clone(pipeline), uri.clone(), want.clone());
        let image = tokio::spawn(async move { pipeline.image(&uri, want, slot).await });
        running.push_back(AbortOnDropHandle::new(image));
    }
    for image in running {
        take(taken, outcome(image).await?)?;
        taken += 1;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

async fn outcome(image: Running) -> Result<Result<Scored, ImageError>> {
    match image.await? {
        Ok(scored) => Ok(Ok(scored)),
        Err(SubmitError::Image(error)) => Ok(Err(error)),
        Err(SubmitError::Gone) => Err(anyhow!("the engine stopped")),
    }
}
