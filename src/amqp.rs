//! RabbitMQ: connections, the topology, and a publisher with confirms.
//!
//! The reconnect loop is ours: a connection that is lost is replaced after a growing, jittered
//! pause, for as long as it takes. Consuming and publishing have a connection each, so that a
//! broker that blocks publishers (memory or disk alarm) does not stop acks.

pub mod control;
pub mod dead;
pub mod publisher;
pub mod topology;

use std::path::PathBuf;
use std::time::Duration;

use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Connection, ConnectionProperties};

/// How to reach the broker: the part of `[amqp]` that concerns connections.
#[derive(Clone)]
pub struct AmqpOptions {
    /// `amqp://user:password@host:port/vhost`, or `amqps://`.
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
    /// A certificate or key cannot be read.
    #[error("cannot read {path}: {reason} (amqp.ca_file, client_cert_file, client_key_file)", path = path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The client or the broker said no.
    #[error("{0}")]
    Broker(#[from] lapin::Error),
    /// No answer in time.
    #[error("the broker did not answer within {0} s")]
    Silent(u64),
}

/// What opening a connection and one channel may take.
const CONNECT_SECONDS: u64 = 15;

/// Opens a connection; `role` becomes part of its name in the broker's listings.
///
/// # Errors
/// [`AmqpError`].
pub async fn connect(options: &AmqpOptions, role: &str) -> Result<Connection, AmqpError> {
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path)
            .map_err(|e| AmqpError::Tls { path: path.clone(), reason: e.to_string() })
    };
    let identity = match (&options.client_cert_file, &options.client_key_file) {
        (Some(cert), Some(key)) => Some(OwnedIdentity::PKCS8 {
            pem: read(cert)?.into_bytes(),
            key: read(key)?.into_bytes(),
        }),
        _ => None,
    };
    let tls =
        OwnedTLSConfig { identity, cert_chain: options.ca_file.as_ref().map(read).transpose()? };
    let properties = ConnectionProperties::default()
        .with_connection_name(format!("angler {role} {}", options.name).into());
    let runtime = lapin::runtime::default_runtime()?;
    let connecting = Connection::connect_with_config(&options.url, properties, tls, runtime);
    tokio::time::timeout(Duration::from_secs(CONNECT_SECONDS), connecting)
        .await
        .map_err(|_| AmqpError::Silent(CONNECT_SECONDS))?
        .map_err(AmqpError::from)
}

/// Ends a connection in order, so that acks on their way arrive; a broker that does not answer is
/// left.
pub(crate) async fn close(connection: &Connection) {
    let closing = connection.close(200, "done".into());
    let _ = tokio::time::timeout(Duration::from_secs(5), closing).await;
}

/// A pause that doubles from 0.2 s to 15 s, with jitter so that a fleet does not return at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let base = 0.2 * f64::from(1_u32 << self.failures.min(7));
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64((base * (0.5 + fastrand::f64())).min(15.0))
    }
}

/// AMQP's short strings have at most 255 bytes; what is longer is cut at a character.
pub(crate) fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_else(|_| {
        let end = (0..=255).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        ShortString::try_new(&text[..end]).unwrap_or_default()
    })
}

/// Sets a string header.
pub(crate) fn put(headers: &mut FieldTable, key: &str, value: &str) {
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
        let pauses: Vec<f64> = (0..40).map(|_| backoff.next().as_secs_f64()).collect();
        assert!(pauses[0] <= 0.3, "{pauses:?}");
        assert!(pauses.iter().all(|p| *p <= 15.0));
        assert!(pauses[30..].iter().all(|p| *p > 5.0), "{pauses:?}");
        backoff.reset();
        assert!(backoff.next().as_secs_f64() <= 0.3);
    }

    #[test]
    fn short_strings_are_cut_at_a_character() {
        assert_eq!(short(&"ü".repeat(200)).as_str().len(), 254);
        assert_eq!(short("jobs").as_str(), "jobs");
    }
}
