//! A worker as a process of its own: this program again, as the daemon, with an embedder that only
//! takes time.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use angler::app::{App, Daemon};
use angler::config::Settings;
use angler_inference::embed::Embedder;
use angler_inference::embed::fake::FakeEmbedder;
use angler_inference::engine::{Engine, OnFailure};
use angler_metrics::Metrics;

use crate::support::eventually;
use crate::world::World;

/// Tells the child what it is; without it this is the measuring program.
const ORDERS: &str = "ANGLER_BENCH_SCALING_WORKER";

#[derive(Serialize, Deserialize)]
pub struct Orders {
    settings: Vec<(String, String)>,
    batch_ms: u64,
    /// Whether it records metrics.
    metrics: bool,
}

/// What this process has to be, if it is a worker.
pub fn orders() -> Result<Option<Orders>> {
    let Ok(text) = std::env::var(ORDERS) else { return Ok(None) };
    Ok(Some(serde_json::from_str(&text).with_context(|| format!("{ORDERS} is not from here"))?))
}

/// Works until standard input ends, as it does when the measuring program lets go of it or dies.
pub async fn run(orders: Orders) -> Result<()> {
    let settings = Settings::load(None, &orders.settings)?;
    angler::telemetry::start(&settings.log)?;
    let mut app = App::new(settings);
    if !orders.metrics {
        app.metrics = Arc::new(Metrics::off());
    }
    let model = app.model()?;
    let delay = Duration::from_millis(orders.batch_ms);
    let embedder: Box<dyn Embedder> =
        Box::new(FakeEmbedder { delay, ..FakeEmbedder::new(model.dim) });
    let size = (model.pixels.width, model.pixels.height);
    let (policy, scorer) = (app.settings.batch_policy(), app.settings.scorer());
    let metrics = Arc::clone(&app.metrics);
    let exits = OnFailure::Exit;
    let engine = Engine::start_with(vec![embedder], policy, size, scorer, exits, metrics)?;
    let stop = CancellationToken::new();
    let ended = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ended.cancel();
    });
    let daemon = app.daemon_with(Arc::default(), &model, engine).await?;
    let Daemon { worker, surroundings } = daemon;
    let outcome = worker.run(stop).await;
    surroundings.close().await;
    Ok(outcome?)
}

/// Workers that run; they end when this is dropped.
pub struct Workers<'w> {
    world: &'w World,
    prefetch: usize,
    batch_ms: u64,
    settings: Vec<(String, String)>,
    metrics: bool,
    children: Vec<Child>,
}

impl<'w> Workers<'w> {
    /// None yet. Each will hold `prefetch` jobs, and take `batch_ms` for a batch.
    pub fn new(world: &'w World, prefetch: usize, batch_ms: u64) -> Self {
        let settings = Vec::new();
        Self { world, prefetch, batch_ms, settings, metrics: true, children: Vec::new() }
    }

    /// Changes a setting of those that are started from now on.
    pub fn set(&mut self, key: &str, value: &str) {
        self.settings.push((key.to_owned(), value.to_owned()));
    }

    /// They record no metrics.
    pub fn unmeasured(mut self) -> Self {
        self.metrics = false;
        self
    }

    /// Starts more until there are `count`, and waits until all consume.
    pub async fn grow(&mut self, count: usize) -> Result<()> {
        let mut settings = self.world.flags(&[("amqp.prefetch", &self.prefetch.to_string())]);
        settings.extend(self.settings.iter().cloned());
        let orders = serde_json::to_string(&Orders {
            settings,
            batch_ms: self.batch_ms,
            metrics: self.metrics,
        })?;
        while self.children.len() < count {
            let mut command = Command::new(std::env::current_exe()?);
            command.env(ORDERS, &orders).stdin(Stdio::piped()).stdout(Stdio::null());
            self.children.push(command.spawn()?);
        }
        self.consumers(count).await
    }

    /// Lets all finish and waits for them.
    pub async fn stop(mut self) -> Result<()> {
        for child in &mut self.children {
            drop(child.stdin.take());
        }
        for child in &mut self.children {
            let status = eventually("a worker ends", async || child.try_wait().unwrap()).await;
            ensure!(status.success(), "a worker ended with {status}");
        }
        // The next ones are counted from none.
        self.consumers(0).await
    }

    /// Jobs that all of them hold at once.
    pub fn held(&self) -> usize {
        self.prefetch * self.children.len()
    }

    pub fn processes(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    async fn consumers(&self, count: usize) -> Result<()> {
        let client = self.world.broker.connect().await;
        let queue = self.world.topology()?.jobs;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        eventually(&format!("{count} workers consume"), async || {
            let looked =
                client.channel.queue_declare(queue.as_str().into(), passive, FieldTable::default());
            (looked.await.unwrap().consumer_count() as usize == count).then_some(())
        })
        .await;
        client.close().await;
        Ok(())
    }
}

impl Drop for Workers<'_> {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
