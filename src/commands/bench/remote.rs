//! What the benchmark puts into a store and a broker, under names that nobody else has, and takes away
//! again however it ends.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use futures_util::{StreamExt, TryStreamExt, stream};
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions, QueuePurgeOptions};
use tokio::time::timeout;

use angler_amqp::{AmqpOptions, connect};
use angler_storage::s3;
use angler_storage::s3::{S3Uri, brief};

use super::photos::Photos;
use crate::config::{Lanes, Settings};

/// How long a broker or a worker may say nothing.
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// Uploads and deletions at once.
const AT_ONCE: usize = 16;
/// What taking everything away may take.
const CLEARING: Duration = Duration::from_secs(60);

/// Objects under a prefix of the benchmark's own, and queues, if it has any.
pub(super) struct Remote {
    client: Client,
    prefix: S3Uri,
    /// Written before the object is, so that none is forgotten.
    keys: Mutex<Vec<String>>,
    queues: Option<AmqpOptions>,
    settings: Settings,
}

/// Gives the queues names that nobody has, so that no other worker takes the benchmark's jobs and it
/// takes nobody's.
pub(super) fn with_own_queues(settings: &mut Settings) {
    let base = format!("angler.bench.{:016x}", fastrand::u64(..));
    settings.amqp.jobs_queue = Lanes::one(format!("{base}.jobs"));
    settings.amqp.results_queue = format!("{base}.results");
    settings.amqp.dead_queue = format!("{base}.dead");
    settings.amqp.control_exchange = format!("{base}.control");
}

impl Remote {
    /// `settings` are those with queues of its own; `bucket` is where objects may be put.
    ///
    /// # Errors
    /// If `s3.ca_file` cannot be used.
    pub(super) async fn new(settings: Settings, bucket: S3Uri, queues: bool) -> Result<Self> {
        let client = s3::Clients::new(&settings.s3_options()).await?.get();
        let folder = bucket.key.trim_end_matches('/');
        let slash = if folder.is_empty() { "" } else { "/" };
        let key = format!("{folder}{slash}angler-bench-{:016x}/", fastrand::u64(..));
        let prefix = S3Uri { key, ..bucket };
        let queues = queues.then(|| settings.amqp_options("bench"));
        Ok(Self { client, prefix, keys: Mutex::default(), queues, settings })
    }

    pub(super) fn has_queues(&self) -> bool {
        self.queues.is_some()
    }

    fn keys(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uploads images under so many names; yields their URIs.
    ///
    /// # Errors
    /// What the store said.
    pub(super) async fn upload(&self, photos: &Photos, names: usize) -> Result<Vec<String>> {
        let S3Uri { bucket, key } = &self.prefix;
        let keys: Vec<String> =
            (0..names).map(|name| format!("{key}{}/{name:06}", photos.kind)).collect();
        self.keys().extend(keys.iter().cloned());
        let put = |(number, key): (usize, String)| {
            let body = ByteStream::from(photos.files[number % photos.files.len()].clone());
            async move {
                let put = self.client.put_object().bucket(bucket).key(&key).body(body).send().await;
                put.map_err(|e| anyhow!("s3://{bucket}/{key}: {}", told(&e)))?;
                Ok::<String, anyhow::Error>(format!("s3://{bucket}/{key}"))
            }
        };
        let uploads = stream::iter(keys.into_iter().enumerate().map(put)).buffered(AT_ONCE);
        uploads.try_collect().await.context("--bucket: an image cannot be uploaded")
    }

    /// Takes what is left in the results queue.
    ///
    /// # Errors
    /// What the broker said.
    pub(super) async fn empty_results(&self) -> Result<()> {
        let Some(options) = &self.queues else { return Ok(()) };
        let connection = connect(options, "bench").await?;
        let channel = connection.create_channel().await?;
        let queue = self.settings.amqp.results_queue.as_str();
        channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await?;
        connection.close(200, "done".into()).await?;
        Ok(())
    }

    /// Takes everything away that was put there.
    ///
    /// # Errors
    /// What could not be taken away, and where it is.
    pub(super) async fn clear(&self) -> Result<()> {
        let objects = timeout(CLEARING, self.delete_objects()).await;
        let queues = timeout(CLEARING, self.delete_queues()).await;
        let S3Uri { bucket, key } = &self.prefix;
        objects.map_err(|_| anyhow!("the store does not answer")).flatten().with_context(|| {
            format!("objects of the benchmark are left below s3://{bucket}/{key}")
        })?;
        queues.map_err(|_| anyhow!("the broker does not answer")).flatten().with_context(|| {
            let queue = &self.settings.amqp.jobs_queue.first().queue;
            let base = queue.trim_end_matches(".jobs");
            format!("queues of the benchmark are left, whose names begin with {base}")
        })
    }

    async fn delete_objects(&self) -> Result<()> {
        let bucket = &self.prefix.bucket;
        let keys = std::mem::take(&mut *self.keys());
        let delete = |key: String| async move {
            let deleted = self.client.delete_object().bucket(bucket).key(&key).send().await;
            deleted.map_err(|e| anyhow!("s3://{bucket}/{key}: {}", told(&e)))
        };
        let mut deleted = stream::iter(keys.into_iter().map(delete)).buffer_unordered(AT_ONCE);
        let mut outcome = Ok(());
        while let Some(one) = deleted.next().await {
            if let Err(error) = one {
                outcome = Err(error);
            }
        }
        outcome
    }

    async fn delete_queues(&self) -> Result<()> {
        let Some(options) = &self.queues else { return Ok(()) };
        let topology = self.settings.topology();
        let connection = connect(options, "bench").await?;
        let channel = connection.create_channel().await?;
        let delays = topology.retry_delays.iter().map(|delay| topology.retry_queue(*delay));
        let (suspects, given_up) = (topology.suspects_queue(), topology.undeliverable_queue());
        let others = [suspects, given_up, topology.results.clone(), topology.dead.clone()];
        // The jobs first: what leads to them goes nowhere then.
        for queue in [topology.jobs.clone()].into_iter().chain(delays).chain(others) {
            channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
        }
        let exchange = topology.control_exchange.as_str().into();
        channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await?;
        connection.close(200, "done".into()).await?;
        Ok(())
    }
}

/// What the store said, else the innermost cause: the layers between only say that a request failed.
fn told<E>(error: &SdkError<E, aws_sdk_s3::config::http::HttpResponse>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    if let Some(code) = error.code() {
        return format!("{code}: {}", error.message().unwrap_or("no message"));
    }
    brief(error)
}
