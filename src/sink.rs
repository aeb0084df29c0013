//! Where results go: the port [`ResultSink`].

pub mod amqp;
pub mod jsonl;

use async_trait::async_trait;

use crate::error::FatalError;
use crate::job::JobResult;
use crate::source::Reply;

/// Publishes results.
#[async_trait]
pub trait ResultSink: Send + Sync {
    /// Returns once the result is safe: confirmed by the broker, or written.
    ///
    /// # Errors
    /// Only when no result can be written any more; what can come back is waited for inside.
    async fn publish(&self, result: &JobResult, reply: &Reply) -> Result<(), FatalError>;
}
