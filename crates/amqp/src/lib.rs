//! RabbitMQ: connections, the topology, and a publisher with confirms.
//!
//! The reconnect loop is ours: a connection that is lost is replaced after a growing, jittered
//! pause, for as long as it takes. Consuming and publishing have a connection each, so that a
//! broker that blocks publishers (memory or disk alarm) does not stop acks.
//!
//! This crate adapts the ports of [`angler_core`] and knows no store and no model. Read [`topology`]
//! first, then [`source`] and [`publisher`].

pub mod address;
pub mod ask;
pub mod cancelled;
pub mod connect;
pub mod control;
pub mod control_listener;
pub mod dead;
pub mod inspect;
pub mod losses;
pub mod publisher;
pub mod queue_scan;
pub mod run_queues;
pub mod sanitize;
pub mod sink;
pub mod source;
pub mod topology;
pub mod turn;

use std::path::PathBuf;
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Connection, ErrorKind};
use tokio::task::JoinError;

use angler_tls::{HandshakeError, TlsError};
use angler_wire::job::JOB_TYPE;
use angler_wire::text::chain;

use crate::address::UrlError;
pub use crate::connect::connect;

/// How to reach the broker: the part of `[amqp]` that concerns connections.
#[derive(Clone)]
pub struct AmqpOptions {
    /// `amqp://user:password@host:port/vhost`, or `amqps://`; several, of the nodes of one cluster,
    /// are separated by commas.
    pub url: String,
    /// PEM file of the authorities that the broker's certificate may come from.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the client's certificate.
    pub client_cert_file: Option<PathBuf>,
    /// PEM file of the client's key.
    pub client_key_file: Option<PathBuf>,
    /// The worker's name; connections are named after it.
    pub name: String,
}

/// What keeps the broker from being used.
#[derive(Debug, thiserror::Error)]
pub enum AmqpError {
    /// Not an address.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// A file of certificates or a key cannot be used.
    #[error(transparent)]
    File(#[from] TlsError),
    /// No TLS connection came about.
    #[error(transparent)]
    Tls(#[from] HandshakeError),
    /// The thread that reads certificates panicked.
    #[error("certificates cannot be read")]
    Reading(#[source] JoinError),
    /// The client or the broker said no.
    #[error(transparent)]
    Broker(#[from] lapin::Error),
    /// Another server.
    #[error("what listens there does not speak AMQP 0-9-1")]
    Foreign,
    /// No answer in time.
    #[error("the broker did not answer within {0} s")]
    Silent(u64),
    /// None of several addresses works.
    #[error("{}", listed(.0))]
    Nowhere(Vec<(String, AmqpError)>),
    /// Queues or an exchange are missing, and the user may not declare them.
    #[error(
        "there is no {names} on this virtual host, and the broker does not let this user declare it: {refusal}; declare it as another user, or grant this one `configure` for it"
    )]
    Undeclared {
        /// Their names.
        names: String,
        /// The broker's words.
        refusal: String,
    },
}

fn listed(errors: &[(String, AmqpError)]) -> String {
    let each = errors.iter().map(|(address, error)| format!("{address}: {}", chain(error)));
    each.collect::<Vec<_>>().join("; ")
}

impl AmqpError {
    /// Returns what right the user lacks, if that is the error. It does not pass with time.
    pub fn denied(&self) -> Option<String> {
        match self {
            Self::Broker(error) => refused(error)
                .filter(|(kind, _)| *kind == AMQPSoftError::ACCESSREFUSED)
                .map(|(_, words)| words.to_owned()),
            Self::Undeclared { .. } => Some(self.to_string()),
            _ => None,
        }
    }
}

/// Ends a connection in order, so that acks on their way arrive; a broker that does not answer is
/// left.
pub async fn close(connection: &Connection) {
    let closing = connection.close(200, "done".into());
    let _ = tokio::time::timeout(Duration::from_secs(5), closing).await;
}

/// What the broker refused and its words, if the connection survived it.
pub fn refused(error: &lapin::Error) -> Option<(AMQPSoftError, &str)> {
    match error.kind() {
        ErrorKind::ProtocolError(e) => match e.kind() {
            AMQPErrorKind::Soft(soft) => Some((soft.clone(), e.get_message().as_str())),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// A pause that doubles from 0.2 s to 15 s, with jitter so that a fleet does not return at once.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Begins again with the shortest pause.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after one more failure.
    pub fn pause(&mut self) -> Duration {
        let base = 0.2 * f64::from(1_u32 << self.failures.min(7));
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64((base * (0.5 + fastrand::f64())).min(15.0))
    }
}

/// AMQP's short strings have at most 255 bytes; what is longer is cut at a character.
pub fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_else(|_| {
        let end = (0..=255).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        ShortString::try_new(&text[..end]).unwrap_or_default()
    })
}

/// The name that a client consumes from to get replies without a queue of its own. The broker gives
/// each client's `reply_to` this name, a dot and a token.
pub(crate) const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

/// Returns whether a `reply_to` leads to a waiting client itself and not to a queue (direct reply-to).
pub(crate) fn is_direct_reply(queue: &str) -> bool {
    queue.strip_prefix(DIRECT_REPLY).is_some_and(|token| token.starts_with('.'))
}

/// Returns whether a header stays behind when a message is published again: the broker's own records,
/// and `CC` and `BCC`, which would send the copy to other queues as well. RabbitMQ before 4.0 reads
/// `x-death` and drops the copy as a cycle.
pub(crate) fn stays_behind(key: &str) -> bool {
    matches!(key, "CC" | "BCC" | "x-death" | DELIVERY_COUNT | ACQUIRED_COUNT)
        || key.starts_with("x-first-death-")
        || key.starts_with("x-last-death-")
}

/// Where a quorum queue tells how many deliveries of a message have failed. Before 4.0 each that came
/// back counts; on 4.3 one that was handed back or took too long does not.
pub(crate) const DELIVERY_COUNT: &str = "x-delivery-count";

/// Where a quorum queue tells, from 4.0 on, how many deliveries of a message came back for any reason.
pub(crate) const ACQUIRED_COUNT: &str = "x-acquired-count";

/// The queue of jobs that a dead letter came from, so that it goes back there.
pub(crate) const JOBS_QUEUE: &str = "angler-jobs-queue";

/// When a worker gave a job up, RFC 3339.
pub(crate) const DIED_AT: &str = "angler-died-at";

/// A job's properties for publishing it again, with other headers. `user_id` stays behind, since the
/// broker refuses another's, and so does `expiration`, which was for the queue that it came from.
pub(crate) fn again(old: &BasicProperties, headers: FieldTable) -> BasicProperties {
    let mut new = BasicProperties::default()
        .with_headers(headers)
        .with_delivery_mode(2)
        .with_type(JOB_TYPE.into());
    type With = fn(BasicProperties, ShortString) -> BasicProperties;
    let kept: [(&Option<ShortString>, With); 6] = [
        (old.content_type(), BasicProperties::with_content_type),
        (old.content_encoding(), BasicProperties::with_content_encoding),
        (old.message_id(), BasicProperties::with_message_id),
        (old.correlation_id(), BasicProperties::with_correlation_id),
        (old.reply_to(), BasicProperties::with_reply_to),
        (old.app_id(), BasicProperties::with_app_id),
    ];
    for (value, with) in kept {
        if let Some(value) = value {
            new = with(new, value.clone());
        }
    }
    if let Some(priority) = old.priority() {
        new = new.with_priority(*priority);
    }
    if let Some(timestamp) = old.timestamp() {
        new = new.with_timestamp(*timestamp);
    }
    new
}

/// Sets a string header.
pub fn put(headers: &mut FieldTable, key: &str, value: &str) {
    headers.insert(short(key), AMQPValue::LongString(value.into()));
}

/// Reads a string header.
pub(crate) fn string_header(headers: &FieldTable, key: &str) -> Option<String> {
    match headers.inner().get(key) {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        Some(AMQPValue::ShortString(text)) => Some(text.to_string()),
        _ => None,
    }
}

/// Reads a whole number from a header, whatever its width.
pub(crate) fn number_header(headers: &FieldTable, key: &str) -> Option<i64> {
    match headers.inner().get(key)? {
        AMQPValue::ShortShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongInt(n) => Some(i64::from(*n)),
        AMQPValue::LongUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongLongInt(n) => Some(*n),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut backoff = Backoff::default();
        let pauses: Vec<f64> = (0..40).map(|_| backoff.pause().as_secs_f64()).collect();
        assert!(pauses[0] <= 0.3, "{pauses:?}");
        assert!(pauses.iter().all(|p| *p <= 15.0));
        assert!(pauses[30..].iter().all(|p| *p > 5.0), "{pauses:?}");
        backoff.reset();
        assert!(backoff.pause().as_secs_f64() <= 0.3);
    }

    #[test]
    fn a_direct_reply_has_a_token() {
        assert!(is_direct_reply("amq.rabbitmq.reply-to.g1h2AA5yZXBseUA"));
        for queue in ["amq.rabbitmq.reply-to", "amq.rabbitmq.reply-token.a", "replies", ""] {
            assert!(!is_direct_reply(queue), "{queue}");
        }
    }

    #[test]
    fn short_strings_are_cut_at_a_character() {
        assert_eq!(short(&"ü".repeat(200)).as_str().len(), 254);
        assert_eq!(short("jobs").as_str(), "jobs");
    }
}
