//! Where results go: the port [`ResultSink`].

pub mod jsonl;

use async_trait::async_trait;
use tokio::sync::watch;

use angler_wire::error::{FatalError, Reason};
use angler_wire::job::JobResult;

use crate::source::Reply;

/// Why a result was not published.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SinkError {
    /// No result can be written any more.
    #[error(transparent)]
    Fatal(#[from] FatalError),
    /// This result can never be published, because it is too large; a smaller one can.
    #[error("a result of {bytes} bytes is too large: {reason}")]
    TooLarge {
        /// Bytes of the result.
        bytes: usize,
        /// What the broker said.
        #[source]
        reason: Reason,
    },
}

/// Publishes results.
#[async_trait]
pub trait ResultSink: Send + Sync {
    /// Returns once the result is safe: confirmed by the broker, or written.
    ///
    /// # Errors
    /// [`SinkError`]; what can come back is waited for inside.
    async fn publish(&self, result: &JobResult, reply: &Reply) -> Result<(), SinkError>;

    /// Returns whether results have not been accepted for so long that jobs in hand have to be given
    /// back. `None` if that cannot happen.
    fn stuck(&self) -> Option<watch::Receiver<bool>> {
        None
    }
}
