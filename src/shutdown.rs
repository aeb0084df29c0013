//! Signals: the first asks for a drain, the second ends the process at once.
//!
//! Nothing is lost either way: what is not settled is delivered again.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that SIGTERM or SIGINT cancels; `doing` tells the log what happens then.
///
/// # Errors
/// If signals cannot be caught.
pub fn on_signals(doing: &'static str) -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => ("SIGTERM", 143),
                _ = interrupt.recv() => ("SIGINT", 130),
            }
        };
        let (name, _) = next().await;
        tracing::info!("{name}: {doing}; a second signal exits at once");
        token.cancel();
        let (name, code) = next().await;
        tracing::warn!("{name} again: exiting at once");
        std::process::exit(code);
    });
    Ok(stop)
}
