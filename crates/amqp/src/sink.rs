//! Results to RabbitMQ: to the job's `reply_to`, else to the results queue, with confirms.
//!
//! The results queue is the worker's own, and so is that of a bulk run: a result waits for it as long
//! as it takes, since a run that misses one can never be complete. Any other `reply_to` is somebody
//! else's: if it does not exist or refuses for too long, the result goes to the results
//! queue with a header that says so. A direct reply goes to a client that waits for it; if that client
//! is gone, nobody else wants the result.

mod refusing;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use lapin::BasicProperties;
use tokio::sync::watch;

use angler_core::sink::{ResultSink, SinkError};
use angler_core::source::Reply;
use angler_metrics::Metrics;
use angler_wire::error::{FatalError, Reason};
use angler_wire::job::{JobResult, RESULT_TYPE, Run};

use crate::publisher::{Published, Publisher, Refusal, TooLarge};
use crate::run_queues::RunQueues;
use crate::sink::refusing::Refusing;
use crate::source::headers;
use crate::{Backoff, DIRECT_REPLY, is_direct_reply, short};

/// Publishes results and returns once they are confirmed.
pub struct AmqpSink {
    publisher: Arc<Publisher>,
    results: String,
    /// Patterns with `*` that a `reply_to` must match; empty: any queue.
    reply_to_allow: Vec<String>,
    /// The fleet's first jobs queue, which the queues of bulk runs are named after.
    runs_of: String,
    refusing: Refusing,
    /// Whether the broker has blocked publishers for too long.
    stuck: Option<watch::Receiver<bool>>,
    metrics: Arc<Metrics>,
}

/// Where a result ended up that a `reply_to` was to get.
enum Replied {
    /// Nothing is left to do.
    Done,
    /// It has to go to the results queue, with this header that names the `reply_to`.
    Diverted(&'static str),
}

const REFUSED: &str = "angler-reply-to-refused";
const UNROUTABLE: &str = "angler-reply-to-unroutable";

impl AmqpSink {
    /// Results through `publisher` to the queue `results` unless their job names another.
    pub fn new(publisher: Arc<Publisher>, results: String, reply_to_allow: Vec<String>) -> Self {
        let (refusing, metrics) = (Refusing::default(), Arc::default());
        let (runs_of, stuck) = (String::new(), None);
        Self { publisher, results, reply_to_allow, runs_of, refusing, stuck, metrics }
    }

    /// Waits for the results queues of bulk runs as for its own. They are named after `jobs`, the
    /// fleet's first jobs queue.
    #[must_use]
    pub fn with_runs_of(mut self, jobs: &str) -> Self {
        jobs.clone_into(&mut self.runs_of);
        self
    }

    /// Is stuck once the broker has blocked publishers for longer than `limit`.
    #[must_use]
    pub fn stuck_after(mut self, limit: Duration) -> Self {
        self.stuck = Some(self.publisher.blocked_for(limit));
        self
    }

    /// Records what is published.
    #[must_use]
    pub fn counted_by(mut self, metrics: Arc<Metrics>) -> Self {
        self.metrics = metrics;
        self
    }

    /// Publishes a result to the `reply_to` of its job.
    async fn reply(
        &self,
        queue: &str,
        result: &JobResult,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<Replied, TooLarge> {
        let (job, run) = (&result.id, result.run.as_ref().map(Run::shown));
        if !is_allowed(&self.reply_to_allow, queue) {
            tracing::warn!(job, run, queue, "reply_to is not allowed (amqp.reply_to_allow)");
            return Ok(Replied::Diverted(REFUSED));
        }
        let own = result.run.as_ref().and_then(|run| RunQueues::of_job(&self.runs_of, run));
        let offered = match own {
            Some(run) if run.results == queue => {
                Ok(self.publisher.publish(queue, properties, body).await)
            }
            _ => self.offer(queue, properties, body).await,
        };
        match offered {
            Ok(Published::Confirmed) => Ok(Replied::Done),
            Ok(Published::TooLarge(error)) => Err(error),
            Ok(Published::Unroutable) => {
                tracing::warn!(job, run, queue, "reply_to names no queue");
                Ok(Replied::Diverted(UNROUTABLE))
            }
            Err(refusal) if is_direct_reply(queue) => {
                tracing::warn!(job, run, queue, "a direct reply was not delivered: {refusal}");
                Ok(Replied::Done)
            }
            Err(refusal) => {
                let to = &self.results;
                tracing::warn!(job, run, queue, to, "reply_to refuses its result: {refusal}");
                Ok(Replied::Diverted(REFUSED))
            }
        }
    }

    /// Offers a result to a queue for as long as there is patience with it.
    async fn offer(
        &self,
        queue: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<Published, Refusal> {
        let mut backoff = Backoff::default();
        loop {
            let confirm = self.refusing.confirm(queue);
            let refusal = match self.publisher.offer(queue, properties, body, confirm).await {
                Ok(published) => {
                    self.refusing.accepted(queue);
                    return Ok(published);
                }
                Err(refusal) => refusal,
            };
            let left = self.refusing.refused(queue);
            if left.is_zero() {
                return Err(refusal);
            }
            tokio::time::sleep(backoff.pause().min(left)).await;
        }
    }
}

#[async_trait]
impl ResultSink for AmqpSink {
    fn stuck(&self) -> Option<watch::Receiver<bool>> {
        self.stuck.clone()
    }

    async fn publish(&self, result: &JobResult, reply: &Reply) -> Result<(), SinkError> {
        let body = result
            .to_json()
            .map_err(|e| FatalError::Sink(Reason::new("a result cannot be written as JSON", e)))?;
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
        let too_large =
            |error: TooLarge| SinkError::TooLarge { bytes: body.len(), reason: Reason::of(error) };
        let mut is_done = false;
        if let Some(queue) = &reply.to {
            match self.reply(queue, result, &properties(&notes), &body).await.map_err(too_large)? {
                Replied::Done => is_done = true,
                Replied::Diverted(header) => notes.push((header, queue)),
            }
        }
        if !is_done {
            let properties = properties(&notes);
            let published = self.publisher.publish_to_own(&self.results, &properties, &body).await;
            published.map_err(too_large)?;
        }
        self.metrics.result(body.len());
        Ok(())
    }
}

/// Returns whether results may go to `queue`. All direct replies go by one name: the tokens of
/// clients cannot be known before.
fn is_allowed(patterns: &[String], queue: &str) -> bool {
    let name = if is_direct_reply(queue) { DIRECT_REPLY } else { queue };
    patterns.is_empty() || patterns.iter().any(|p| matches(p, queue) || matches(p, name))
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
    use super::{is_allowed, matches};

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

    #[test]
    fn direct_replies_go_by_one_name() {
        let direct = "amq.rabbitmq.reply-to.g1h2AA5yZXBseUA.abc==";
        for (pattern, queue, expected) in [
            ("amq.rabbitmq.reply-to", direct, true),
            ("amq.rabbitmq.reply-to.*", direct, true),
            ("*", direct, true),
            ("replies.*", direct, false),
            ("amq.rabbitmq.reply-to", "amq.rabbitmq.reply-to-mine", false),
        ] {
            assert_eq!(is_allowed(&[pattern.to_owned()], queue), expected, "{pattern} {queue}");
        }
        assert!(is_allowed(&[], direct));
    }
}
