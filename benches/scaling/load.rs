//! Jobs in, results out, in three ways: as many as the workers take, at times that were drawn
//! beforehand, and one after another.
//!
//! Jobs go through angler's own publisher, which confirms each. Every result is looked at: a job
//! that failed, or an image that did, ends the measurement.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, Consumer};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use angler_amqp::publisher::Publisher;
use angler_wire::job::JOB_TYPE;

use crate::statistics::{busy_seconds, cpu_seconds, milliseconds};
use crate::support::DEADLINE;
use crate::world::{World, close};

/// Jobs that are being published at once, as many as the publisher has channels.
const PUBLISHING: usize = 64;
/// The least time before a rate is taken: connections and caches reach their usual state.
const WARM_UP: Duration = Duration::from_secs(1);

/// A rate that was sustained, and what it took.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    pub jobs: f64,
    pub images: f64,
    /// Core milliseconds of the workers for an image.
    pub worker_ms: f64,
    /// Cores of the machine that were busy, on average, with anything.
    pub busy: f64,
}

/// Publishes jobs and takes results.
pub struct Load<'w> {
    world: &'w World,
    publisher: Arc<Publisher>,
    jobs: String,
    results: Consumer,
    connection: Connection,
}

/// What is read of a result.
#[derive(Deserialize)]
struct Seen {
    id: String,
    status: String,
    #[serde(default)]
    images: Vec<SeenImage>,
}

#[derive(Deserialize)]
struct SeenImage {
    error: Option<IgnoredAny>,
}

impl<'w> Load<'w> {
    pub async fn new(world: &'w World) -> Result<Self> {
        let (settings, topology) = (world.app(&[])?.settings, world.topology()?);
        let options = settings.amqp_options("bench");
        let connection = angler_amqp::connect(&options, "bench results").await?;
        let channel = connection.create_channel().await?;
        let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let queue = topology.results.as_str().into();
        let results =
            channel.basic_consume(queue, "bench".into(), no_ack, FieldTable::default()).await?;
        let jobs = topology.jobs.clone();
        let publisher = Arc::new(Publisher::new(options, topology));
        Ok(Self { world, publisher, jobs, results, connection })
    }

    pub async fn close(self) {
        self.publisher.close().await;
        close(self.connection).await;
    }

    /// The body of the next result's message.
    pub async fn arrival(&mut self) -> Result<Vec<u8>> {
        let next = timeout(DEADLINE, self.results.next()).await;
        let next = next.with_context(|| format!("no result within {DEADLINE:?}"))?;
        Ok(next.context("the broker cancelled the consumer of results")??.data)
    }

    /// The next result's id, and how many images it has, all of them classified.
    async fn result(&mut self) -> Result<(String, usize)> {
        let body = self.arrival().await?;
        let seen: Seen = serde_json::from_slice(&body)?;
        let well = seen.status == "done" && seen.images.iter().all(|image| image.error.is_none());
        ensure!(well, "not all was classified: {}", String::from_utf8_lossy(&body));
        Ok((seen.id, seen.images.len()))
    }

    /// The rate at which jobs of so many images are done while there are always more: `backlog`
    /// are published and have no result, at any time. `processes` are those of the workers.
    pub async fn sustained(
        &mut self,
        images: usize,
        backlog: usize,
        window: Duration,
        processes: &[u32],
    ) -> Result<Rate> {
        let stop = CancellationToken::new();
        let room = Arc::new(Semaphore::new(backlog));
        let count = Arc::new(AtomicUsize::new(0));
        // Bodies are made beforehand, and come again: making them is not the workers' work.
        let bodies: Arc<[Vec<u8>]> = (0..64).map(|n| self.world.job(n, images)).collect();
        let mut producers = JoinSet::new();
        for _ in 0..PUBLISHING.min(backlog) {
            let (stop, room, count) = (stop.clone(), Arc::clone(&room), Arc::clone(&count));
            let (publisher, queue) = (Arc::clone(&self.publisher), self.jobs.clone());
            let bodies = Arc::clone(&bodies);
            producers.spawn(async move {
                loop {
                    match stop.run_until_cancelled(room.acquire()).await {
                        Some(Ok(permit)) => permit.forget(),
                        _ => return,
                    }
                    let n = count.fetch_add(1, Ordering::Relaxed);
                    let body = &bodies[n % bodies.len()];
                    let sent = publisher.publish_to_own(&queue, &properties(), body).await;
                    assert!(sent.is_ok(), "the broker refuses a job: {sent:?}");
                }
            });
        }
        let mut seen = 0;
        let warm = Instant::now() + WARM_UP;
        // What was published first fills every place on the way. Only what comes after it comes at
        // the rate that lasts.
        while seen < backlog || Instant::now() < warm {
            self.result().await?;
            room.add_permits(1);
            seen += 1;
        }
        let (cpu, busy) = (cpu_seconds(processes)?, busy_seconds()?);
        let (began, mut jobs, mut done) = (Instant::now(), 0, 0);
        while began.elapsed() < window {
            done += self.result().await?.1;
            room.add_permits(1);
            jobs += 1;
        }
        // To the last result, not to the end of the window: it ends the last job that counts.
        let seconds = began.elapsed().as_secs_f64();
        let (cpu, busy) = (cpu_seconds(processes)? - cpu, busy_seconds()? - busy);
        stop.cancel();
        while let Some(ended) = producers.join_next().await {
            ended?;
        }
        for _ in seen + jobs..count.load(Ordering::Relaxed) {
            self.result().await?;
        }
        Ok(Rate {
            jobs: jobs as f64 / seconds,
            images: done as f64 / seconds,
            worker_ms: cpu * 1e3 / done as f64,
            busy: busy / seconds,
        })
    }

    /// Publishes a job of so many images at each of these times, in seconds from now; yields how
    /// many milliseconds each took, from when it was due to its result.
    pub async fn at_times(&mut self, images: usize, times: &[f64]) -> Result<Vec<f64>> {
        let bodies: Vec<Vec<u8>> = (0..times.len()).map(|n| self.world.job(n, images)).collect();
        let start = Instant::now() + Duration::from_millis(50);
        let due: Vec<Instant> =
            times.iter().map(|time| start + Duration::from_secs_f64(*time)).collect();
        let (publisher, queue, schedule) =
            (Arc::clone(&self.publisher), self.jobs.clone(), due.clone());
        let mut producer = JoinSet::new();
        producer.spawn(async move {
            let mut publishing = JoinSet::new();
            for (body, due) in bodies.into_iter().zip(schedule) {
                sleep_until(due).await;
                let (publisher, queue) = (Arc::clone(&publisher), queue.clone());
                publishing.spawn(async move {
                    let sent = publisher.publish_to_own(&queue, &properties(), &body).await;
                    assert!(sent.is_ok(), "the broker refuses a job: {sent:?}");
                });
            }
            publishing.join_all().await;
        });
        let mut latencies = Vec::with_capacity(due.len());
        for _ in &due {
            let (id, _) = self.result().await?;
            let number = id.rsplit_once('/').and_then(|(_, n)| n.parse::<usize>().ok());
            let due = number.and_then(|n| due.get(n)).context("a result of no job of these")?;
            latencies.push(milliseconds(due.elapsed()));
        }
        producer.join_next().await.transpose()?;
        Ok(latencies)
    }

    /// Publishes one-image jobs, each some milliseconds after the result of the one before; yields
    /// the milliseconds from a job's publication to its result.
    pub async fn one_by_one(&mut self, jobs: usize) -> Result<Vec<f64>> {
        let mut random = fastrand::Rng::with_seed(3);
        let mut latencies = Vec::with_capacity(jobs);
        for n in 0..jobs {
            let body = self.world.job(n, 1);
            // Of no fixed length: jobs must not fall in step with anything.
            sleep(Duration::from_micros(random.u64(5_000..15_000))).await;
            let began = Instant::now();
            self.send(&body).await?;
            self.result().await?;
            latencies.push(milliseconds(began.elapsed()));
        }
        Ok(latencies)
    }

    /// Publishes a job's message; returns once it is confirmed.
    async fn send(&self, body: &[u8]) -> Result<()> {
        Ok(self.publisher.publish_to_own(&self.jobs, &properties(), body).await?)
    }

    /// Milliseconds that a message takes through the broker: published and confirmed, and at the
    /// consumer of results.
    pub async fn passage(&mut self, body: &[u8]) -> Result<f64> {
        let (publisher, queue) = (Arc::clone(&self.publisher), self.world.topology()?.results);
        let properties = properties();
        let began = Instant::now();
        let (sent, arrived) =
            tokio::join!(publisher.publish_to_own(&queue, &properties, body), self.arrival());
        sent?;
        arrived?;
        Ok(milliseconds(began.elapsed()))
    }
}

/// As `angler enqueue` sends a job.
pub fn properties() -> BasicProperties {
    BasicProperties::default()
        .with_content_type("application/json".into())
        .with_type(JOB_TYPE.into())
        .with_delivery_mode(2)
}
