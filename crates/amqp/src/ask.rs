//! Questions to a broker, each with a deadline.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::protocol::AMQPSoftError;
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection};
use tokio::time::timeout;

use super::{AmqpError, refused, short};

/// What the broker may take to answer.
const ANSWER: Duration = Duration::from_secs(15);

/// What a call came to, in time.
///
/// # Errors
/// What the broker said, or [`AmqpError::Silent`].
pub async fn answer<T>(
    call: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, AmqpError> {
    let silent = AmqpError::Silent(ANSWER.as_secs());
    timeout(ANSWER, call).await.map_err(|_| silent)?.map_err(AmqpError::from)
}

/// `true` if the broker said that there is no queue or exchange of this name. It has closed the channel
/// then.
///
/// A queue that exists but cannot be reached is `NOT_FOUND` as well ("home node … of durable queue … is
/// down or inaccessible"), and is not missing: hence the words. Hence also the name: lapin 4.12 may fail
/// what is sent on a channel with the error of an earlier channel of the same number.
pub fn is_missing(error: &AmqpError, name: &str) -> bool {
    matches!(error, AmqpError::Broker(error) if says_missing(error, name))
}

/// The same of lapin's error.
pub(crate) fn says_missing(error: &lapin::Error, name: &str) -> bool {
    let is_named = |words: &str| {
        ["queue", "exchange"].iter().any(|kind| words.contains(&format!("no {kind} '{name}'")))
    };
    refused(error).is_some_and(|(kind, words)| kind == AMQPSoftError::NOTFOUND && is_named(words))
}

/// `true` if the answer to a `basic_get` means that the queue exists and has no leader. The broker closes
/// the connection with `INTERNAL_ERROR`, at once or after a minute, which is too long to wait for.
///
/// A quorum queue that was declared less than about a second before RabbitMQ 3.10 is killed may come
/// back like that for good. A passive declaration succeeds all the same.
pub fn is_unserved(error: &AmqpError) -> bool {
    match error {
        AmqpError::Silent(_) => true,
        AmqpError::Broker(error) => error.to_string().contains("Cannot get a message from queue"),
        _ => false,
    }
}

/// Properties of a message that only asks whether its queue is there: it expires at once, and comes
/// back if there is none. A passive declaration of a queue that is missing closes the channel and
/// leaves an error in the broker's log each time.
pub(crate) fn question() -> BasicProperties {
    BasicProperties::default().with_expiration("0".into())
}

/// A queue as it is, which is not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Messages that nobody holds.
    pub ready: u64,
    /// Who consumes it.
    pub consumers: u32,
}

/// Looks at a queue on a channel, which is of no more use if there is no such queue.
///
/// # Errors
/// What the broker said.
pub async fn look(channel: &Channel, queue: &str) -> Result<Queue, AmqpError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(short(queue), passive, FieldTable::default());
    let queue = answer(declared).await?;
    Ok(Queue { ready: queue.message_count().into(), consumers: queue.consumer_count() })
}

/// Looks at a queue; none if there is no such queue.
///
/// # Errors
/// What the broker said.
pub async fn look_at(connection: &Connection, queue: &str) -> Result<Option<Queue>, AmqpError> {
    // A refusal closes the channel, so each question has its own.
    let channel = answer(connection.create_channel()).await?;
    match look(&channel, queue).await {
        Ok(found) => {
            answer(channel.close(200, "done".into())).await?;
            Ok(Some(found))
        }
        Err(error) if is_missing(&error, queue) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use lapin::ErrorKind;
    use lapin::protocol::AMQPError;

    use super::*;

    #[test]
    fn a_queue_whose_node_is_down_is_not_missing() {
        let not_found = |words: &str| {
            let error = AMQPError::new(AMQPSoftError::NOTFOUND.into(), words.into());
            AmqpError::Broker(ErrorKind::ProtocolError(error).into())
        };
        let missing = not_found("NOT_FOUND - no queue 'angler.jobs' in vhost '/'");
        assert!(is_missing(&missing, "angler.jobs") && !is_missing(&missing, "angler"));
        assert!(is_missing(&not_found("NOT_FOUND - no exchange 'e' in vhost '/'"), "e"));
        let down = not_found(
            "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' in vhost '/' is down or inaccessible",
        );
        assert!(!is_missing(&down, "q") && !is_missing(&AmqpError::Silent(15), "q"));
    }
}
