//! Results to RabbitMQ: to the job's `reply_to`, else to the results queue, with confirms.

use std::sync::Arc;

use async_trait::async_trait;
use lapin::BasicProperties;

use super::ResultSink;
use crate::amqp::publisher::{Published, Publisher};
use crate::amqp::short;
use crate::error::FatalError;
use crate::job::{JobResult, RESULT_TYPE, Run};
use crate::metrics::Metrics;
use crate::source::Reply;
use crate::source::amqp::headers;

/// Publishes results and returns once they are confirmed.
pub struct AmqpSink {
    publisher: Arc<Publisher>,
    results: String,
    /// Patterns with `*` that a `reply_to` must match; empty: any queue.
    reply_to_allow: Vec<String>,
    metrics: Arc<Metrics>,
}

impl AmqpSink {
    /// Results through `publisher` to the queue `results` unless their job names another.
    pub fn new(publisher: Arc<Publisher>, results: String, reply_to_allow: Vec<String>) -> Self {
        Self { publisher, results, reply_to_allow, metrics: Arc::default() }
    }

    /// Records what is published.
    #[must_use]
    pub fn counted_by(mut self, metrics: Arc<Metrics>) -> Self {
        self.metrics = metrics;
        self
    }

    fn allowed(&self, queue: &str) -> bool {
        self.reply_to_allow.is_empty() || self.reply_to_allow.iter().any(|p| matches(p, queue))
    }
}

#[async_trait]
impl ResultSink for AmqpSink {
    async fn publish(&self, result: &JobResult, reply: &Reply) -> Result<(), FatalError> {
        let body = result
            .to_json()
            .map_err(|e| FatalError::Sink(format!("a result cannot be written as JSON: {e}")))?;
        // Only for a warning, which is rare.
        let run = || result.run.as_ref().map(Run::shown);
        let correlation = reply.correlation_id.as_deref().unwrap_or(&result.id);
        let mut notes: Vec<(&str, &str)> = Vec::new();
        if let Some(traceparent) = &reply.traceparent {
            notes.push(("traceparent", traceparent));
        }
        let properties = |notes: &[(&str, &str)]| {
            BasicProperties::default()
                .with_content_type("application/json".into())
                .with_type(RESULT_TYPE.into())
                .with_delivery_mode(2)
                .with_message_id(short(&result.id))
                .with_correlation_id(short(correlation))
                .with_headers(headers(notes.iter().copied()))
        };
        match &reply.to {
            Some(queue) if !self.allowed(queue) => {
                tracing::warn!(
                    job = result.id,
                    run = run(),
                    queue,
                    "reply_to is not allowed (amqp.reply_to_allow)"
                );
                notes.push(("angler-reply-to-refused", queue));
            }
            Some(queue) => {
                if self.publisher.publish(queue, &properties(&notes), &body).await
                    == Published::Confirmed
                {
                    self.metrics.result(body.len());
                    return Ok(());
                }
                tracing::warn!(job = result.id, run = run(), queue, "reply_to names no queue");
                notes.push(("angler-reply-to-unroutable", queue));
            }
            None => {}
        }
        self.publisher.publish_to_own(&self.results, &properties(&notes), &body).await;
        self.metrics.result(body.len());
        Ok(())
    }
}

/// Whether `text` is `pattern`, whose `*` stand for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text, expected) in [
            ("replies", "replies", true),
            ("replies", "replies2", false),
            ("replies.*", "replies.a", true),
            ("replies.*", "other.a", false),
            ("*.replies", "a.replies", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c", false),
            ("aa*aa", "aaa", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
