//! The whole with a broker and a store: the daemon as `angler worker` runs it, on queues of its own.
//!
//! After a warm-up job all jobs are sent at once. The clock runs from the first of them to the last
//! result. Sending takes a few milliseconds for each thousand images, so the queue is full while the
//! worker works.

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use futures_util::{StreamExt, stream};
use lapin::options::{BasicAckOptions, BasicConsumeOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, Consumer};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use angler_amqp::connect;
use angler_amqp::publisher::{Published, Publisher};
use angler_core::readiness::Readiness;
use angler_wire::job::{ClassSelector, ImageRef, JOB_TYPE, Job, JobResult, Outcome, Verdict};

use super::figures::Sample;
use super::meter::Meter;
use super::plan::IMAGES_PER_JOB;
use super::remote::SILENCE;
use crate::app::Daemon;
use crate::commands::bench::fixture::{SET, Set, Stage};

/// Jobs that are sent at once.
const SENDING: usize = 32;

/// Classifies so many images. A stop ends it in order, so that nobody holds on to its queues.
pub(super) async fn measure(
    stage: &Stage,
    set: &Set,
    images: usize,
    stop: &CancellationToken,
) -> Result<Sample> {
    let settings = &stage.app.settings;
    let connection = connect(&settings.amqp_options("bench"), "bench").await?;
    settings.topology().declare(&connection).await?;
    let daemon = Box::pin(stage.app.daemon(Arc::new(Readiness::default()))).await?;
    let Daemon { worker, surroundings } = daemon;
    let drain = CancellationToken::new();
    let mut working = tokio::spawn(worker.run(drain.clone()));
    let outcome = tokio::select! {
        biased;
        () = stop.cancelled() => Err(anyhow!("interrupted")),
        ended = &mut working => Err(ended_early(ended)),
        sample = drive(stage, set, images, &connection) => sample,
    };
    drain.cancel();
    if outcome.is_err() {
        working.abort();
    }
    if !working.is_finished() && timeout(SILENCE, &mut working).await.is_err() {
        working.abort();
    }
    surroundings.close().await;
    // A broker that is gone has closed it already.
    let _ = connection.close(200, "done".into()).await;
    outcome
}

fn ended_early(
    ended: Result<Result<(), angler_wire::error::FatalError>, tokio::task::JoinError>,
) -> anyhow::Error {
    match ended {
        Ok(Ok(())) => anyhow!("the worker ended by itself"),
        Ok(Err(error)) => anyhow::Error::new(error).context("the worker ended"),
        Err(error) => anyhow::Error::new(error).context("the worker panicked"),
    }
}

async fn drive(stage: &Stage, set: &Set, images: usize, connection: &Connection) -> Result<Sample> {
    let queues = &stage.app.settings.amqp;
    let jobs_queue = &queues.jobs_queue.first().queue;
    let mut results = consume(connection, &queues.results_queue).await?;
    let publisher = stage.app.job_publisher("bench");
    let warm_up = job(set, "warm-up", 0)?;
    send(&publisher, jobs_queue, &warm_up).await?;
    collect(&mut results, HashSet::from(["warm-up".to_owned()])).await?;

    let ids: Vec<String> = (0..images / IMAGES_PER_JOB).map(|n| format!("bench/{n}")).collect();
    let jobs: Vec<Vec<u8>> =
        ids.iter().enumerate().map(|(n, id)| job(set, id, n)).collect::<Result<_>>()?;
    let meter = Meter::start();
    let sending = async {
        let sends = jobs.iter().map(|body| send(&publisher, jobs_queue, body));
        let mut sends = stream::iter(sends).buffer_unordered(SENDING);
        while let Some(sent) = sends.next().await {
            sent?;
        }
        Ok(())
    };
    tokio::try_join!(sending, collect(&mut results, ids.into_iter().collect()))?;
    let sample = meter.stop(images as u64);
    publisher.close().await;
    Ok(sample)
}

/// The job of this number, as JSON.
fn job(set: &Set, id: &str, number: usize) -> Result<Vec<u8>> {
    let uris = set.remote.iter().cycle().skip(number * IMAGES_PER_JOB % set.remote.len().max(1));
    let images = uris.take(IMAGES_PER_JOB).map(|uri| ImageRef { uri: uri.clone(), id: None });
    let classes = ClassSelector { set: SET.0.to_owned(), version: Some(SET.1.to_owned()) };
    let (images, id) = (images.collect(), id.to_owned());
    let (top_k, min_score, embeddings, run) = (1, None, false, None);
    Ok(serde_json::to_vec(&Job { id, images, classes, top_k, min_score, embeddings, run })?)
}

async fn send(publisher: &Publisher, queue: &str, body: &[u8]) -> Result<()> {
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_type(JOB_TYPE.into())
        .with_delivery_mode(2);
    let sent = timeout(SILENCE, publisher.publish(queue, &properties, body)).await;
    match sent.context("the broker does not confirm a job")? {
        Published::Confirmed => Ok(()),
        Published::Unroutable => bail!("the queue {queue} is gone"),
        Published::TooLarge(error) => Err(error.into()),
    }
}

async fn consume(connection: &Connection, queue: &str) -> Result<Consumer> {
    let channel = connection.create_channel().await?;
    let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
    Ok(channel.basic_consume(queue.into(), "bench".into(), options, arguments).await?)
}

/// Results until each of these jobs has one. An image that failed fails the measurement: it would count
/// as work that was not done.
async fn collect(results: &mut Consumer, mut missing: HashSet<String>) -> Result<()> {
    while !missing.is_empty() {
        let next = timeout(SILENCE, results.next()).await;
        let next = next.with_context(|| format!("no result within {} s", SILENCE.as_secs()))?;
        let delivery =
            next.ok_or_else(|| anyhow!("the broker ended the consumer of results"))??;
        let result: JobResult = serde_json::from_slice(&delivery.data)?;
        delivery.acker.ack(BasicAckOptions::default()).await?;
        let failed = match &result.outcome {
            Outcome::Failed { error } => Some(error.to_string()),
            Outcome::Done { images, .. } => images.iter().find_map(|entry| match &entry.verdict {
                Verdict::Failed { error } => Some(format!("{}: {error}", entry.uri)),
                Verdict::Labelled(_) => None,
            }),
        };
        if let Some(error) = failed {
            bail!("job {} was not classified: {error}", result.id);
        }
        missing.remove(&result.id);
    }
    Ok(())
}
