//! What workers and commands say to each other over the control exchange, as JSON.
//!
//! A command publishes a [`Request`] to the fanout exchange `amqp.control_exchange` (property
//! `type` = [`REQUEST_TYPE`]); every worker has a queue of its own there. With `reply_to`, each
//! worker answers with [`Reply`]s (`type` = [`REPLY_TYPE`]), the command's `correlation_id` echoed.
//! Unknown fields and kinds are ignored, so that old and new workers live side by side. A request
//! may be lost: it only makes a worker do at once what it does by itself a little later.

pub mod shadow;

use serde::{Deserialize, Serialize};

use shadow::ShadowReport;

/// AMQP property `type` of a request.
pub const REQUEST_TYPE: &str = "control.v1";
/// AMQP property `type` of a reply.
pub const REPLY_TYPE: &str = "control.reply.v1";
/// The largest request that a worker reads, in bytes.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// What a command, or another worker, wants of every worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Request {
    /// A set's `active.json` changed: look at it now, and say which version is served then.
    Activated {
        /// The set.
        set: String,
        /// The version that became active.
        version: String,
    },
    /// Say what is served.
    Status,
    /// Say what the shadow version counted.
    Shadow,
    /// Say how many deliveries of a message came back to the broker from you while you lived. A worker
    /// asks this before it counts a delivery that came back as the death of a process.
    Losses {
        /// The job's id.
        job: String,
        /// Which copy of the job: its header `angler-stamp`, or empty if it has none.
        stamp: String,
    },
}

/// One worker's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The worker's name, as in results.
    pub worker: String,
    /// Which process of that name: unique among all.
    pub instance: String,
    /// What it says.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The request arrived, and its answer will follow.
    Heard,
    /// What it serves of the set that was activated; none: it has not been asked for that set yet,
    /// and will read what is active with the first job.
    Serving {
        /// Of the set that was asked about.
        set: Option<SetStatus>,
    },
    /// What it serves.
    Status {
        /// Every set that it has loaded.
        sets: Vec<SetStatus>,
    },
    /// What its shadow version counted; none: it has none.
    Shadow {
        /// The counts.
        report: Option<Box<ShadowReport>>,
    },
    /// How many deliveries of the message it lost or handed back.
    Losses {
        /// As far as it remembers.
        count: u32,
    },
}

/// What a worker serves of one set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetStatus {
    /// The set.
    pub set: String,
    /// The version that jobs are scored against when they name the set alone.
    pub version: String,
    /// The SHA-256 of its file.
    pub sha256: String,
    /// How many vectors it has.
    pub rows: usize,
    /// What it takes in memory.
    pub bytes: usize,
    /// Since when, RFC 3339.
    pub since: String,
    /// How often the version was replaced since the worker started.
    pub swaps: u64,
    /// How often another version was refused since the worker started.
    pub refusals: u64,
    /// What was active last and could not be served, if it is active still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// A version that a worker does not serve although it is active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The version, if `active.json` could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What is wrong with it, and where.
    pub reason: String,
    /// When that was found, RFC 3339.
    pub at: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_and_replies_have_these_shapes() {
        let request = Request::Activated { set: "s".into(), version: "8".into() };
        let value = json!({"kind": "activated", "set": "s", "version": "8"});
        assert_eq!(serde_json::to_value(&request).unwrap(), value);
        assert_eq!(serde_json::to_value(Request::Status).unwrap(), json!({"kind": "status"}));
        let reply = Reply {
            worker: "host-1".into(),
            instance: "i".into(),
            answer: Answer::Serving { set: None },
        };
        let value = json!({"worker": "host-1", "instance": "i", "answer": "serving", "set": null});
        assert_eq!(serde_json::to_value(&reply).unwrap(), value);
        assert_eq!(serde_json::from_value::<Reply>(value).unwrap(), reply);
    }

    #[test]
    fn a_kind_from_the_future_is_an_error_and_an_unknown_field_is_not() {
        assert!(serde_json::from_value::<Request>(json!({"kind": "dance"})).is_err());
        let request = json!({"kind": "status", "loud": true});
        assert_eq!(serde_json::from_value::<Request>(request).unwrap(), Request::Status);
    }
}
