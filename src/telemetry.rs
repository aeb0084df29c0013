//! Logs, on standard error: text for people, JSON for machines. Traces, to a collector: [`otlp`].

pub mod otlp;

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogSettings};

/// Libraries that say more than an operator wants to know, unless a filter names them.
const QUIET: &str = "ort=warn,lapin=off,tract_core=error,tract_onnx=error,tract_linalg=error,tract_hir=error,aws_config=warn,aws_smithy_runtime=warn,hyper_util=warn,hyper=warn,rustls=warn";

/// Starts logging; `log.level` is a level or a filter.
///
/// # Errors
/// If the filter cannot be read.
pub fn start(settings: &LogSettings) -> Result<()> {
    let directives = format!("{QUIET},{}", settings.level);
    let filter = EnvFilter::try_new(directives)
        .with_context(|| format!("log.level = {:?}", settings.level))?;
    // A line that cannot be written, on a full disk or into a pipe that nobody reads, is lost: said
    // on the same standard error, that would be a panic.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    let started = match settings.format {
        LogFormat::Json => {
            let started = builder.json().flatten_event(true).try_init();
            // A panic, too, is a line that machines can read.
            std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
            started
        }
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
            .with_target(false)
            .try_init(),
    };
    // A second start in one process (tests) keeps the first.
    let _ = started;
    Ok(())
}
