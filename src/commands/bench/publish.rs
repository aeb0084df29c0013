//! Publishing alone: results of full jobs, written as JSON lines to nowhere, or to the broker, each
//! awaited until it is confirmed, as many at once as a worker holds jobs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use tokio::time::timeout;

use angler_amqp::sink::AmqpSink;
use angler_core::sink::ResultSink;
use angler_core::sink::jsonl::JsonLinesSink;
use angler_core::source::Reply;
use angler_inference::embed::Backend;
use angler_vectors::score::ClassScore;
use angler_wire::job::{ImageEntry, JobResult, Outcome, Provenance, Verdict};

use super::figures::{Sample, Samples};
use super::meter::Meter;
use super::plan::IMAGES_PER_JOB;
use super::remote::SILENCE;
use super::score::TOP_K;
use crate::commands::bench::fixture::{SET, Stage};

/// Where results go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Key {
    Lines,
    Broker,
}

impl Key {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lines => "JSON lines",
            Self::Broker => "RabbitMQ",
        }
    }
}

pub(super) async fn measure(stage: &Stage, samples: &mut Samples<Key>) -> Result<()> {
    let result = Arc::new(result(stage));
    let lines = JsonLinesSink::new(Some(Box::new(std::io::sink())), Box::new(|_| ()));
    let sample = publish(Arc::new(lines), 1, &result, stage.plan.time).await?;
    samples.add(Key::Lines, sample);
    let Some(remote) = stage.remote.as_ref().filter(|remote| remote.has_queues()) else {
        return Ok(());
    };
    let settings = &stage.app.settings;
    let publisher = Arc::new(stage.app.job_publisher("bench"));
    let queue = settings.amqp.results_queue.clone();
    let sink = Arc::new(AmqpSink::new(Arc::clone(&publisher), queue, Vec::new()));
    let width = usize::from(settings.amqp.prefetch);
    let sample = publish(sink, width, &result, stage.plan.time).await;
    publisher.close().await;
    remote.empty_results().await?;
    samples.add(Key::Broker, sample?);
    Ok(())
}

/// A result as a job of the benchmark has it.
fn result(stage: &Stage) -> JobResult {
    let top: Vec<ClassScore> =
        (0..TOP_K as u32).map(|class| ClassScore { class, score: 0.5 }).collect();
    let image = |number| ImageEntry {
        uri: format!("s3://bucket/a/key/of/common/length/{number:012}.jpg"),
        id: None,
        verdict: Verdict::Labelled(stage.classes.classified(&top, 1, None)),
    };
    let provenance = Provenance {
        classes: format!("{}@{}", SET.0, SET.1),
        model: stage.model.fingerprint.clone(),
        backend: Backend::OnnxRuntimeCpu.as_str().to_owned(),
    };
    JobResult {
        id: "bench".to_owned(),
        outcome: Outcome::Done { provenance, images: (0..IMAGES_PER_JOB).map(image).collect() },
        run: None,
        attempt: 1,
        worker: "bench".to_owned(),
        finished_at: humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string(),
    }
}

async fn publish(
    sink: Arc<dyn ResultSink>,
    width: usize,
    result: &Arc<JobResult>,
    time: Duration,
) -> Result<Sample> {
    // The first opens a connection and declares queues.
    let nowhere_else = Reply::default();
    let first = sink.publish(result, &nowhere_else);
    timeout(SILENCE, first).await.context("the broker does not confirm a result")??;
    let meter = Meter::start();
    let started = std::time::Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..width {
        let (sink, result) = (Arc::clone(&sink), Arc::clone(result));
        tasks.spawn(async move {
            let mut images = 0;
            while started.elapsed() < time || images == 0 {
                sink.publish(&result, &Reply::default()).await?;
                images += IMAGES_PER_JOB as u64;
            }
            Ok::<u64, anyhow::Error>(images)
        });
    }
    let all = async {
        let mut images = 0;
        while let Some(published) = tasks.join_next().await {
            images += published??;
        }
        Ok::<u64, anyhow::Error>(images)
    };
    let images = timeout(time + SILENCE, all).await.context("the broker stopped confirming")??;
    Ok(meter.stop(images))
}
