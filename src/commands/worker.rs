//! `angler worker`: the daemon.

use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;

use angler_core::readiness::Readiness;

use crate::app::{App, Daemon};
use crate::http;
use crate::shutdown;

/// Run the daemon: jobs from RabbitMQ, images from S3, results to RabbitMQ
///
/// Runs until SIGTERM or SIGINT, then finishes what it has admitted and exits 0; a second signal
/// exits at once. Jobs that are not finished are delivered to another worker.
///
/// Settings come from angler.toml, the environment (ANGLER__AMQP__URL, ANGLER__S3__ENDPOINT, …) and
/// flags; `angler default-settings` lists them all. AWS credentials come the AWS way.
#[derive(Args)]
pub struct WorkerCommand {}

impl WorkerCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let stop = shutdown::on_signals("finishing what is admitted")
            .context("signals cannot be caught")?;
        let readiness = Arc::new(Readiness::new(Arc::clone(&app.metrics)));
        // Bound before the model loads, so that a probe sees "alive, not ready" meanwhile.
        let listen = &app.settings.http.listen;
        let _http = if listen.is_empty() {
            None
        } else {
            let (address, server) = http::serve(listen, Arc::clone(&readiness))
                .await
                .with_context(|| format!("http.listen = {listen:?} cannot be bound"))?;
            tracing::info!("listening on http://{address} (/, /livez, /readyz, /metrics, /status)");
            Some(server)
        };
        let daemon = tokio::select! {
            daemon = app.daemon(readiness) => daemon?,
            () = stop.cancelled() => return Ok(()),
        };
        let Daemon { worker, surroundings } = daemon;
        let engine = surroundings.engine.clone();
        let outcome = worker.run(stop).await;
        surroundings.close().await;
        outcome?;
        tracing::info!(
            images = engine.stats().images(),
            batches = engine.stats().describe(),
            "done: everything that was admitted is settled"
        );
        Ok(())
    }
}
