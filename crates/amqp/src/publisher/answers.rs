//! What the broker's answer to a message means.

use std::time::Duration;

use lapin::Confirmation;
use lapin::protocol::AMQPSoftError;

use angler_wire::error::Reason;

use super::{Published, Refusal, TooLarge};
use crate::refused;

/// Why a message was not confirmed.
pub(super) enum Failed {
    /// The broker's answer to this message.
    Queue(Refusal),
    /// The channel or the connection failed, which says nothing of the message.
    Channel(Reason),
    /// No answer.
    Silent(Duration),
}

/// Reads the answer to a message of this many bytes.
pub(super) fn read(
    answer: Result<Confirmation, lapin::Error>,
    bytes: usize,
) -> Result<Published, Failed> {
    let of_queue = |reason: &str| Err(Failed::Queue(Refusal(reason.to_owned())));
    match answer {
        Ok(Confirmation::Ack(None)) => Ok(Published::Confirmed),
        Ok(Confirmation::Ack(Some(_))) => Ok(Published::Unroutable),
        Ok(Confirmation::Nack(_)) => of_queue("the broker refused it (nack); is the queue full?"),
        Ok(Confirmation::NotRequested) => {
            Err(Failed::Channel("confirms are off on this channel".into()))
        }
        Err(error) => match refused(&error) {
            Some((AMQPSoftError::PRECONDITIONFAILED, words)) if is_of_size(words) => {
                if is_of(words, bytes) {
                    return Ok(Published::TooLarge(TooLarge(words.to_owned())));
                }
                Err(Failed::Channel(format!("an error of another message: {words}").into()))
            }
            Some((_, words)) => of_queue(words),
            None => Err(Failed::Channel(Reason::of(error))),
        },
    }
}

/// Returns whether the broker complains of a message's size, as in `PRECONDITION_FAILED - message
/// size 17000000 is larger than configured max size 16777216`.
fn is_of_size(words: &str) -> bool {
    words.contains("message size") && words.contains("larger than")
}

/// Returns whether a refusal of a size is about a message of `bytes`. lapin 4.12 keeps a channel's error
/// under the channel's number, and may reject what is sent on the next channel of that number with it.
fn is_of(words: &str, bytes: usize) -> bool {
    let size = words.split_once("message size ").and_then(|(_, rest)| rest.split(' ').next());
    size.and_then(|size| size.parse().ok()).is_none_or(|size: usize| size == bytes)
}

#[cfg(test)]
mod tests {
    use super::{is_of, is_of_size};

    #[test]
    fn a_size_is_told_from_other_preconditions() {
        // With the default of 3.10, and with another.
        assert!(is_of_size(
            "PRECONDITION_FAILED - message size 134217729 is larger than max size 134217728"
        ));
        assert!(is_of_size(
            "PRECONDITION_FAILED - message size 30001 is larger than configured max size 30000"
        ));
        assert!(!is_of_size("PRECONDITION_FAILED - invalid expiration 'x'"));
    }

    #[test]
    fn a_refusal_of_a_size_is_about_a_message_of_that_size() {
        let words = "PRECONDITION_FAILED - message size 30001 is larger than max size 30000";
        assert!(is_of(words, 30_001) && !is_of(words, 253));
        assert!(is_of("message size too large, larger than allowed", 253));
    }
}
