//! Looks at a broker and changes nothing: what it is, and whether what is there is as a worker would
//! declare it.
//!
//! AMQP compares arguments only when something is declared, and declaring makes what is missing. So
//! a passive declaration, which never makes anything, comes first, and the real one only for what is
//! there: then the broker compares, refuses what differs and names the first of it, and leaves it as it
//! is. Only if somebody deletes a queue in the millisecond between the two is one made.

use std::io::{Error, ErrorKind};
use std::pin::Pin;

use futures_io::{AsyncRead, AsyncWrite};
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::protocol::connection::AMQPMethod;
use lapin::protocol::{AMQPClass, AMQPSoftError, parse_class};
use lapin::types::{FieldTable, ShortString};
use lapin::{Connection, ExchangeKind};

use angler_tls::BROKER;

use super::address::Address;
use super::ask::says_missing;
use super::connect::{dial, tls};
use super::topology::Topology;
use super::{AmqpError, AmqpOptions, refused, short, string_header};

/// What a broker says of itself before anybody logs in.
#[derive(Debug, Clone)]
pub struct Server {
    /// `RabbitMQ`.
    pub product: String,
    /// `3.10.8`.
    pub version: String,
}

impl Server {
    /// Major and minor version, if it looks like one.
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut parts = self.version.split('.').map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??))
    }
}

/// Asks the broker at this address who it is. Neither name nor password is sent.
///
/// # Errors
/// [`AmqpError`].
pub async fn greeting(options: &AmqpOptions, address: &Address) -> Result<Server, AmqpError> {
    let tls = tls(options, address).await?;
    let start = async {
        let mut stream = dial(address, tls.as_ref()).await?;
        write(&mut stream, b"AMQP\x00\x00\x09\x01").await?;
        frame(&mut stream).await
    };
    let payload = start.await.map_err(|error: Error| match BROKER.explain(&error) {
        Some(explained) => explained.into(),
        // It hung up, or sent something else.
        None if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            AmqpError::Foreign
        }
        None => AmqpError::Broker(error.into()),
    })?;
    let Ok((_, AMQPClass::Connection(AMQPMethod::Start(start)))) = parse_class(payload.as_slice())
    else {
        return Err(AmqpError::Foreign);
    };
    let text = |key| string_header(&start.server_properties, key);
    let product = text("product").unwrap_or_else(|| "an unknown broker".to_owned());
    Ok(Server { product, version: text("version").unwrap_or_default() })
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        let sent = std::future::poll_fn(|c| Pin::new(&mut *stream).poll_write(c, bytes)).await?;
        if sent == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        bytes = &bytes[sent..];
    }
    std::future::poll_fn(|c| Pin::new(&mut *stream).poll_flush(c)).await
}

async fn read(stream: &mut (impl AsyncRead + Unpin), bytes: &mut [u8]) -> Result<(), Error> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        match std::future::poll_fn(|c| Pin::new(&mut *stream).poll_read(c, rest)).await? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(())
}

/// The largest first frame that is read; RabbitMQ's has some 500 bytes.
const FRAME_BYTES: u32 = 1 << 16;

/// The payload of the first frame, which is a method of channel 0: type, channel, length, payload.
async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, Error> {
    let mut head = [0; 7];
    read(stream, &mut head).await?;
    let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    if head[..3] != [1, 0, 0] || length > FRAME_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut payload = vec![0; length as usize];
    read(stream, &mut payload).await?;
    Ok(payload)
}

/// What was found under a name.
#[derive(Debug, Clone)]
pub enum Found {
    /// Nothing.
    Missing,
    /// What a worker would declare.
    Same(Counts),
    /// Something else, which a worker uses as it is.
    Different(Counts, Difference),
}

/// What a queue holds and who takes from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Messages that nobody holds.
    pub ready: u32,
    /// Consumers: of the jobs queue, the workers.
    pub consumers: u32,
}

/// The first thing that the broker names as different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The argument, if the broker's words could be read.
    pub argument: Option<String>,
    /// A sentence.
    pub text: String,
    /// Whether what is there does without the argument.
    pub is_missing: bool,
}

impl Difference {
    /// Out of `PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'angler.jobs' in
    /// vhost '/': received the value '10' of type 'long' but current is none`.
    fn read(words: &str) -> Self {
        let quoted = |text: &str| Some(text.split_once('\'')?.1.split_once('\'')?.0.to_owned());
        let value = |text: &str| match quoted(text).unwrap_or_else(|| text.trim().to_owned()) {
            empty if empty.is_empty() => "\"\"".to_owned(),
            value => value,
        };
        let parts = words.split_once("inequivalent arg ").and_then(|(_, rest)| {
            let (wanted, current) = rest.rsplit_once(" but current is ")?;
            Some((quoted(rest)?, wanted.rsplit_once("received ")?.1, current))
        });
        let Some((argument, wanted, current)) = parts else {
            let (argument, text) = (None, format!("it is another: {words}"));
            return Self { argument, text, is_missing: false };
        };
        let is_missing = current.trim() == "none";
        let there = if is_missing { "none".to_owned() } else { value(current) };
        let text = format!("its {argument} is {there}, a worker's is {}", value(wanted));
        Self { argument: Some(argument), text, is_missing }
    }
}

impl Topology {
    /// Looks at one of its queues.
    ///
    /// # Errors
    /// What the broker said, if it was anything else than that the queue is missing or different.
    pub async fn look_at(
        &self,
        connection: &Connection,
        queue: &str,
    ) -> Result<Found, lapin::Error> {
        let (passive, none) = (QueueDeclareOptions::durable().passive(), FieldTable::default());
        let name = short(queue);
        // A refusal closes the channel, so each declaration has its own.
        let channel = connection.create_channel().await?;
        let counts = match channel.queue_declare(name.clone(), passive, none).await {
            Ok(found) => Counts { ready: found.message_count(), consumers: found.consumer_count() },
            Err(error) => return missing(error, queue),
        };
        let arguments = self.queues().into_iter().find(|(name, _)| name == queue);
        let Some((_, arguments)) = arguments else { return Ok(Found::Same(counts)) };
        let declared = declare(connection, queue, arguments.clone()).await?;
        let found = compared(counts, declared)?;
        let Found::Different(_, first) = &found else { return Ok(found) };
        if first.argument.as_deref() == Some(QUEUE_TYPE) {
            return Ok(found);
        }
        // Of another type much is different, and the type is what matters: so it is asked for alone.
        let mut kind = FieldTable::default();
        for (key, value) in arguments.inner().iter().filter(|(key, _)| key.as_str() == QUEUE_TYPE) {
            kind.insert(key.clone(), value.clone());
        }
        Ok(match compared(counts, declare(connection, queue, kind).await?)? {
            Found::Different(_, other) if other.argument.as_deref() == Some(QUEUE_TYPE) => {
                Found::Different(counts, other)
            }
            _ => found,
        })
    }

    /// Looks at the control exchange.
    ///
    /// # Errors
    /// As [`Self::look_at`].
    pub async fn look_at_control(&self, connection: &Connection) -> Result<Found, lapin::Error> {
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        let name: ShortString = short(&self.control_exchange);
        let channel = connection.create_channel().await?;
        let kind = ExchangeKind::Fanout;
        if let Err(e) = channel.exchange_declare(name, kind, passive, FieldTable::default()).await {
            return missing(e, &self.control_exchange);
        }
        let channel = connection.create_channel().await?;
        compared(Counts::default(), self.declare_control(&channel).await)
    }
}

const QUEUE_TYPE: &str = "x-queue-type";

/// Declares a queue that is there. A refusal, which closes the channel, is inside.
async fn declare(
    connection: &Connection,
    queue: &str,
    arguments: FieldTable,
) -> Result<Result<(), lapin::Error>, lapin::Error> {
    let channel = connection.create_channel().await?;
    let declaring = channel.queue_declare(short(queue), QueueDeclareOptions::durable(), arguments);
    Ok(declaring.await.map(drop))
}

/// A queue whose node is down is not missing.
fn missing(error: lapin::Error, name: &str) -> Result<Found, lapin::Error> {
    if says_missing(&error, name) { Ok(Found::Missing) } else { Err(error) }
}

fn compared(counts: Counts, declared: Result<(), lapin::Error>) -> Result<Found, lapin::Error> {
    let Err(error) = declared else { return Ok(Found::Same(counts)) };
    match refused(&error) {
        Some((AMQPSoftError::PRECONDITIONFAILED, words)) => {
            Ok(Found::Different(counts, Difference::read(words)))
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_read_out_of_the_brokers_words() {
        let start = "PRECONDITION_FAILED - inequivalent arg";
        let read = |rest: &str| Difference::read(&format!("{start} {rest}"));
        let limit = read(
            "'x-delivery-limit' for queue 'a b' in vhost '/': received the value '10' of type \
             'long' but current is none",
        );
        assert_eq!(limit.argument.as_deref(), Some("x-delivery-limit"));
        assert_eq!(limit.text, "its x-delivery-limit is none, a worker's is 10");
        assert!(limit.is_missing);
        let kind = read(
            "'x-queue-type' for queue 'angler.jobs' in vhost 'v': received 'quorum' but current \
             is 'classic'",
        );
        assert_eq!(kind.text, "its x-queue-type is classic, a worker's is quorum");
        assert!(!kind.is_missing);
        let empty = read(
            "'x' for queue 'q' in vhost '/': received the value '' of type 'longstr' but current is none",
        );
        assert_eq!(empty.text, "its x is none, a worker's is \"\"");
        let other = Difference::read("PRECONDITION_FAILED - something new");
        assert_eq!((other.argument, other.is_missing), (None, false));
        assert!(other.text.ends_with("something new"));
    }

    #[test]
    fn versions_are_read_as_far_as_they_are_numbers() {
        let version =
            |text: &str| Server { product: "RabbitMQ".into(), version: text.into() }.version();
        assert_eq!(version("3.10.8"), Some((3, 10)));
        assert_eq!(version("4.1.0-beta.2"), Some((4, 1)));
        assert_eq!((version(""), version("4"), version("x.1")), (None, None, None));
    }
}
