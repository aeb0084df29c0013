//! What the store and the broker give on this machine when nobody does any work with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use angler_amqp::publisher::Publisher;
use angler_core::store::{ByteBudget, ImageStore};

use crate::load::{Load, Rate};
use crate::statistics::busy_seconds;
use crate::world::{World, close};

/// GETs at once: the default of `s3.concurrency`.
const REQUESTS: usize = 32;
/// Jobs that the worker without work holds.
const PREFETCH: u16 = 64;

/// What the store gives.
#[derive(Debug, Clone, Copy)]
pub struct Store {
    /// GETs a second.
    pub rate: f64,
    /// Core milliseconds a GET, of the store and of the client together.
    pub core_ms: f64,
}

/// GETs of the images, over and over, by the worker's own client.
pub async fn store(world: &World, window: Duration) -> Result<Store> {
    let app = world.app(&[])?;
    let (images, limits) = (app.s3_images().await?, app.settings.image_limits());
    let budget = ByteBudget::new(limits.bytes_in_flight, limits.image_bytes);
    let uris: Arc<[String]> = world.uris.clone().into();
    let next = Arc::new(AtomicUsize::new(0));
    // A moment first that opens the connections, and does not count.
    let mut until = Instant::now() + Duration::from_millis(500);
    let mut rate = Store { rate: 0.0, core_ms: 0.0 };
    for counted in [false, true] {
        let (began, busy, first) = (Instant::now(), busy_seconds()?, next.load(Ordering::Relaxed));
        let mut requests = JoinSet::new();
        for _ in 0..REQUESTS {
            let (images, budget) = (images.clone(), budget.clone());
            let (uris, next) = (Arc::clone(&uris), Arc::clone(&next));
            requests.spawn(async move {
                while Instant::now() < until {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    images.fetch(&uris[n % uris.len()], &budget).await?;
                }
                anyhow::Ok(())
            });
        }
        for ended in requests.join_all().await {
            ended?;
        }
        let gets = (next.load(Ordering::Relaxed) - first) as f64;
        let busy = busy_seconds()? - busy;
        if counted {
            let seconds = began.elapsed().as_secs_f64();
            rate = Store { rate: gets / seconds, core_ms: busy * 1e3 / gets };
        }
        until = Instant::now() + window;
    }
    Ok(rate)
}

/// Jobs a second of so many images through the broker and back as results of the usual size, by a
/// worker that does nothing: it publishes a result and acks.
pub async fn broker(world: &World, images: usize, window: Duration) -> Result<Rate> {
    let echo = Echo::start(world, images).await?;
    let mut load = Load::new(world).await?;
    let rate = load.sustained(images, 4 * usize::from(PREFETCH), window, &[]).await?;
    load.close().await;
    echo.stop().await;
    Ok(rate)
}

struct Echo {
    connection: Connection,
    publisher: Arc<Publisher>,
    _answers: AbortOnDropHandle<()>,
}

impl Echo {
    async fn start(world: &World, images: usize) -> Result<Self> {
        let (settings, topology) = (world.app(&[])?.settings, world.topology()?);
        let options = settings.amqp_options("bench");
        let connection = angler_amqp::connect(&options, "bench jobs").await?;
        let channel = connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (queue, by_hand) = (topology.jobs.as_str().into(), BasicConsumeOptions::default());
        let mut jobs =
            channel.basic_consume(queue, "echo".into(), by_hand, FieldTable::default()).await?;
        let results = topology.results.clone();
        let publisher = Arc::new(Publisher::new(options, topology));
        let (answer, through): (Arc<[u8]>, _) =
            (world.result(images)?.into(), Arc::clone(&publisher));
        let answers = tokio::spawn(async move {
            // The prefetch bounds how many there are.
            let mut answering = JoinSet::new();
            while let Some(Ok(job)) = jobs.next().await {
                while answering.try_join_next().is_some() {}
                let (publisher, answer) = (Arc::clone(&through), Arc::clone(&answer));
                let results = results.clone();
                answering.spawn(async move {
                    let properties = BasicProperties::default().with_delivery_mode(2);
                    let sent = publisher.publish_to_own(&results, &properties, &answer).await;
                    assert!(sent.is_ok(), "the broker refuses an answer: {sent:?}");
                    // A job that is not acked would be missed as a result.
                    let _ = job.acker.ack(BasicAckOptions::default()).await;
                });
            }
        });
        Ok(Self { connection, publisher, _answers: AbortOnDropHandle::new(answers) })
    }

    async fn stop(self) {
        self.publisher.close().await;
        close(self.connection).await;
    }
}
