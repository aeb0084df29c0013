//! What a message from RabbitMQ says of its job, and of its earlier deliveries.

use std::sync::Arc;

use lapin::types::ShortString;
use tokio_util::sync::CancellationToken;

use angler_core::source::{Delivery, Reply, Unworkable};
use angler_wire::error::{Failure, FailureCode};
use angler_wire::job::{Job, JobLimits, id_of_malformed};

use super::acks::Acks;
use super::settle::{ATTEMPT, LONE_RUN, Message, Origin, STAMP};
use crate::dead::reason_of_death;
use crate::losses::JobCopy;
use crate::publisher::Publisher;
use crate::sanitize::UNPARSABLE;
use crate::topology::Topology;
use crate::{ACQUIRED_COUNT, DELIVERY_COUNT, number_header, string_header};
use angler_core::pace::Pace;

/// The longest `traceparent` that is read and echoed. The standard's has 55 bytes; later ones may add to it.
const TRACEPARENT_BYTES: usize = 512;

/// Reads messages.
#[derive(Clone)]
pub(super) struct Reader {
    pub publisher: Arc<Publisher>,
    pub topology: Arc<Topology>,
    pub limits: JobLimits,
    /// The largest frame of the connection that messages come on.
    pub frame_max: usize,
    /// Measures how fast jobs are finished.
    pub pace: Pace,
}

/// A message that was received and read. Dropped: it goes back to its queue.
pub(super) struct Incoming {
    pub message: Message,
    pub copy: JobCopy,
    /// Cancelled with its connection.
    pub lost: CancellationToken,
    job: Result<Job, Unworkable>,
    losses: Losses,
}

/// How many deliveries of a message came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Losses {
    Counted(u32),
    /// At least one: a classic queue does not count.
    Some,
}

impl Reader {
    /// Reads a message.
    ///
    /// * `acks`: of the channel on which it came.
    pub fn read(
        &self,
        origin: Origin,
        delivery: lapin::message::Delivery,
        acks: &Acks,
        lost: CancellationToken,
    ) -> Incoming {
        let losses = Losses::of(&delivery);
        let lapin::message::Delivery { properties, data: body, delivery_tag, .. } = delivery;
        let headers = properties.headers().as_ref();
        let message_id = properties.message_id().as_ref().map(ShortString::as_str);
        let mut job = Job::parse(&body, message_id, self.limits).map_err(|failure| Unworkable {
            id: id_of_malformed(&body, message_id),
            run: None,
            failure,
        });
        if let Some(problem) = headers.and_then(|headers| string_header(headers, UNPARSABLE)) {
            job = Err(instead(job, unparsable(&problem)));
        }
        let number = |key| {
            let number = headers.and_then(|headers| number_header(headers, key));
            number.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(1)
        };
        let (attempt, lone_run) = (number(ATTEMPT), number(LONE_RUN));
        let stamp = match origin {
            Origin::Suspects => headers.and_then(|headers| string_header(headers, STAMP)),
            Origin::Jobs | Origin::Undeliverable => None,
        };
        let id = match &job {
            Ok(job) => &job.id,
            Err(unworkable) => &unworkable.id,
        };
        let copy = JobCopy { job: id.clone(), stamp: stamp.unwrap_or_default() };
        let message = Message {
            ack: acks.pending(delivery_tag, copy.clone()),
            publisher: Arc::clone(&self.publisher),
            topology: Arc::clone(&self.topology),
            origin,
            properties,
            body,
            attempt,
            lone_run,
            frame_max: self.frame_max,
            in_hand: (origin == Origin::Jobs).then(|| self.pace.begin()),
        };
        Incoming { message, copy, lost, job, losses }
    }
}

impl Incoming {
    /// Returns how many of its deliveries came back, or `unknown` if its queue does not count.
    pub fn came_back(&self, unknown: u32) -> u32 {
        match self.losses {
            Losses::Counted(count) => count,
            Losses::Some => unknown,
        }
    }

    /// Hands it to the worker.
    pub fn deliver(self) -> Delivery {
        let Self { message, job, lost, .. } = self;
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        let properties = &message.properties;
        let reply = Reply {
            to: text(properties.reply_to()).filter(|q| !q.is_empty()),
            correlation_id: text(properties.correlation_id()),
            traceparent: properties
                .headers()
                .as_ref()
                .and_then(|headers| string_header(headers, "traceparent"))
                .filter(|text| text.len() <= TRACEPARENT_BYTES),
        };
        let (queue, attempt) = (message.queue(), message.attempt);
        let suspect = message.origin == Origin::Suspects;
        Delivery { job, queue, attempt, suspect, reply, settle: Box::new(message), lost }
    }

    /// Returns why the broker moved it here, as far as it says.
    pub fn death(&self) -> Option<String> {
        self.message.properties.headers().as_ref().and_then(reason_of_death)
    }

    /// Hands it to the worker as one that is given up.
    pub fn give_up(mut self, failure: Failure) -> Delivery {
        self.job = Err(instead(self.job, failure));
        self.deliver()
    }
}

impl Losses {
    fn of(delivery: &lapin::message::Delivery) -> Self {
        if !delivery.redelivered {
            return Self::Counted(0);
        }
        let headers = delivery.properties.headers().as_ref();
        let count = |key| headers.and_then(|headers| number_header(headers, key));
        match (count(DELIVERY_COUNT), count(ACQUIRED_COUNT)) {
            (Some(losses), _) => Self::Counted(u32::try_from(losses).unwrap_or(u32::MAX)),
            // From 4.0 on: it was only handed back.
            (None, Some(_)) => Self::Counted(0),
            (None, None) => Self::Some,
        }
    }
}

/// The same message, not worked on.
fn instead(job: Result<Job, Unworkable>, failure: Failure) -> Unworkable {
    let (id, run) = match job {
        Ok(job) => (job.id, job.run),
        Err(unworkable) => (unworkable.id, unworkable.run),
    };
    Unworkable { id, run, failure }
}

/// Why a message is not worked on whose properties [`crate::sanitize`] had to rewrite.
fn unparsable(problem: &str) -> Failure {
    let message = format!("the message's properties cannot be parsed: {problem}");
    Failure::new(FailureCode::MalformedJob, message)
}
