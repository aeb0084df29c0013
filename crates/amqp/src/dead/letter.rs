//! What a dead letter says of itself.
//!
//! A worker that gives a job up writes why (`angler-reason`, `angler-attempts`, `angler-error`).
//! The broker, which gives up a job that was delivered too often, writes only its own record,
//! `x-death`: a list of tables, the latest first.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde::Deserialize;
use serde_json::{Map, Value};

use angler_wire::job::id_of_malformed;

use crate::{DIED_AT, JOBS_QUEUE, again, number_header, stays_behind, string_header};

/// Tables and lists in headers are shown to this depth.
const DEPTH: usize = 8;

/// A job that was given up on.
pub struct DeadLetter {
    /// The id under which its result was published.
    pub job: String,
    /// The bulk run that it belongs to.
    pub run: Option<String>,
    /// Why it is here: a failure code, or the broker's word (`delivery_limit`).
    pub reason: String,
    /// Attempts that were made.
    pub attempts: Option<i64>,
    /// What was wrong, for a person.
    pub error: Option<String>,
    /// When it was given up.
    pub died_at: Option<SystemTime>,
    /// The queue that it was given up from: one of jobs, or, if the broker did it, perhaps one of
    /// suspects.
    pub queue: Option<String>,
    /// As they came.
    pub properties: BasicProperties,
    /// As it came.
    pub body: Vec<u8>,
    /// By which the channel that got it knows it.
    pub(super) tag: u64,
}

/// The only part of a body that is looked at; the rest may be anything.
#[derive(Deserialize)]
struct OnlyRun {
    run: OnlyId,
}

#[derive(Deserialize)]
struct OnlyId {
    id: String,
}

impl DeadLetter {
    pub(super) fn read(delivery: Delivery) -> Self {
        let Delivery { properties, data, delivery_tag: tag, .. } = delivery;
        let none = FieldTable::default();
        let headers = properties.headers().as_ref().unwrap_or(&none);
        let death = latest_death(headers);
        let broker_reason = reason_of_death(headers);
        let reason = string_header(headers, "angler-reason")
            .or(broker_reason)
            .or_else(|| string_header(headers, "x-first-death-reason"))
            .unwrap_or_else(|| "unknown".to_owned());
        let recorded_by_worker = string_header(headers, DIED_AT);
        let recorded_by_worker =
            recorded_by_worker.and_then(|text| humantime::parse_rfc3339(&text).ok());
        let recorded = match death.and_then(|death| death.inner().get("time")) {
            Some(AMQPValue::Timestamp(seconds)) => {
                SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))
            }
            _ => None,
        };
        let message_id = properties.message_id().as_ref().map(ShortString::as_str);
        let run = serde_json::from_slice::<OnlyRun>(&data).ok();
        Self {
            job: id_of_malformed(&data, message_id),
            run: run.map(|only| only.run.id),
            reason,
            attempts: number_header(headers, "angler-attempts")
                .or_else(|| number_header(headers, "angler-attempt")),
            error: string_header(headers, "angler-error"),
            died_at: recorded_by_worker.or(recorded),
            queue: string_header(headers, JOBS_QUEUE)
                .or_else(|| string_header(headers, "x-first-death-queue")),
            body: data,
            tag,
            properties,
        }
    }

    /// Returns the properties of the job as it was before its first attempt: without what workers and
    /// the broker wrote into its headers, and without its producer's `CC` and `BCC`.
    pub(super) fn properties_again(&self) -> BasicProperties {
        let old = &self.properties;
        let headers: BTreeMap<ShortString, AMQPValue> = old
            .headers()
            .iter()
            .flat_map(|headers| headers.inner())
            .filter(|(key, _)| !is_dropped(key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        again(old, FieldTable::from(headers))
    }

    /// The properties that are set, but for the headers, for people and programs.
    pub fn properties_json(&self) -> Map<String, Value> {
        let p = &self.properties;
        let mut all = Map::new();
        for (name, value) in [
            ("message_id", p.message_id()),
            ("correlation_id", p.correlation_id()),
            ("reply_to", p.reply_to()),
            ("type", p.kind()),
            ("content_type", p.content_type()),
            ("content_encoding", p.content_encoding()),
            ("app_id", p.app_id()),
            ("user_id", p.user_id()),
        ] {
            if let Some(value) = value {
                all.insert(name.to_owned(), value.as_str().into());
            }
        }
        if let Some(priority) = p.priority() {
            all.insert("priority".to_owned(), (*priority).into());
        }
        if let Some(timestamp) = p.timestamp() {
            all.insert("timestamp".to_owned(), (*timestamp).into());
        }
        all
    }

    /// The headers, for people and programs.
    pub fn headers_json(&self) -> Map<String, Value> {
        self.properties.headers().as_ref().map(|h| table(h, DEPTH)).unwrap_or_default()
    }
}

/// Returns whether a header is no part of the job as it is sent again.
fn is_dropped(key: &str) -> bool {
    key.starts_with("angler-") || stays_behind(key)
}

/// Returns why the broker dead-lettered a message most recently, in its own word.
pub(crate) fn reason_of_death(headers: &FieldTable) -> Option<String> {
    latest_death(headers).and_then(|death| string_header(death, "reason"))
}

fn latest_death(headers: &FieldTable) -> Option<&FieldTable> {
    let Some(AMQPValue::FieldArray(deaths)) = headers.inner().get("x-death") else { return None };
    match deaths.as_slice().first() {
        Some(AMQPValue::FieldTable(death)) => Some(death),
        _ => None,
    }
}

/// A header's value as JSON; bytes that are no text are shown as far as they are.
fn at_depth(value: &AMQPValue, depth: usize) -> Value {
    match value {
        AMQPValue::Boolean(b) => (*b).into(),
        AMQPValue::ShortShortInt(n) => (*n).into(),
        AMQPValue::ShortShortUInt(n) => (*n).into(),
        AMQPValue::ShortInt(n) => (*n).into(),
        AMQPValue::ShortUInt(n) => (*n).into(),
        AMQPValue::LongInt(n) => (*n).into(),
        AMQPValue::LongUInt(n) => (*n).into(),
        AMQPValue::LongLongInt(n) => (*n).into(),
        AMQPValue::Float(n) => (*n).into(),
        AMQPValue::Double(n) => (*n).into(),
        AMQPValue::DecimalValue(n) => (f64::from(n.value) / 10_f64.powi(i32::from(n.scale))).into(),
        AMQPValue::ShortString(text) => text.as_str().into(),
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into(),
        AMQPValue::ByteArray(bytes) => String::from_utf8_lossy(bytes.as_slice()).into(),
        AMQPValue::Timestamp(seconds) => (*seconds).into(),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) if depth == 0 => "…".into(),
        AMQPValue::FieldArray(values) => {
            values.as_slice().iter().map(|value| at_depth(value, depth - 1)).collect()
        }
        AMQPValue::FieldTable(inner) => table(inner, depth - 1).into(),
        AMQPValue::Void => Value::Null,
    }
}

fn table(table: &FieldTable, depth: usize) -> Map<String, Value> {
    table.inner().iter().map(|(key, value)| (key.to_string(), at_depth(value, depth))).collect()
}

#[cfg(test)]
mod tests {
    use angler_wire::job::JOB_TYPE;

    use super::*;
    use crate::{put, short};

    fn letter(headers: FieldTable, id: Option<&str>, body: &str) -> DeadLetter {
        let mut properties = BasicProperties::default().with_headers(headers);
        if let Some(id) = id {
            properties = properties.with_message_id(short(id));
        }
        let mut delivery = Delivery::mock(1, "".into(), "angler.dead".into(), false, body.into());
        delivery.properties = properties;
        DeadLetter::read(delivery)
    }

    fn death(reason: &str, time: u64) -> AMQPValue {
        let mut death = FieldTable::default();
        put(&mut death, "reason", reason);
        death.insert(short("time"), AMQPValue::Timestamp(time));
        AMQPValue::FieldTable(death)
    }

    #[test]
    fn the_workers_word_comes_before_the_brokers() {
        let mut headers = FieldTable::default();
        // A job that was retried, and then killed its worker too often: the first death is the
        // retry queue's TTL.
        put(&mut headers, "x-first-death-reason", "expired");
        let deaths = vec![death("delivery_limit", 1_800_000_000), death("expired", 1)];
        headers.insert(short("x-death"), AMQPValue::FieldArray(deaths.into()));
        headers.insert(short("angler-attempt"), AMQPValue::LongUInt(2));
        let by_broker = letter(headers.clone(), Some("a"), r#"{"id":"b","run":{"id":"nightly"}}"#);
        assert_eq!((by_broker.reason.as_str(), by_broker.attempts), ("delivery_limit", Some(2)));
        assert_eq!((by_broker.job.as_str(), by_broker.run.as_deref()), ("b", Some("nightly")));
        let died = by_broker.died_at.unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(died.as_secs(), 1_800_000_000);

        put(&mut headers, "angler-reason", "retries_exhausted");
        put(&mut headers, "angler-error", "no store");
        headers.insert(short("angler-attempts"), AMQPValue::LongUInt(4));
        let by_worker = letter(headers, Some("a"), "no json");
        assert_eq!((by_worker.reason.as_str(), by_worker.attempts), ("retries_exhausted", Some(4)));
        assert_eq!((by_worker.job.as_str(), by_worker.error.as_deref()), ("a", Some("no store")));
        let nothing = letter(FieldTable::default(), None, "no json");
        assert!(nothing.job.starts_with("malformed-") && nothing.reason == "unknown");
    }

    #[test]
    fn a_job_goes_again_as_its_producer_sent_it() {
        let mut headers = FieldTable::default();
        let added = [
            "angler-reason",
            "angler-attempts",
            "angler-attempt",
            "angler-error",
            "x-death",
            "x-first-death-queue",
            "x-last-death-reason",
            "x-delivery-count",
            "CC",
            "BCC",
        ];
        for key in added.into_iter().chain(["traceparent", "x-tenant"]) {
            put(&mut headers, key, "value");
        }
        let mut dead = letter(headers, Some("a"), "{}");
        dead.properties = dead
            .properties
            .with_reply_to("replies".into())
            .with_correlation_id("mine".into())
            .with_user_id("somebody".into())
            .with_priority(3);
        let again = dead.properties_again();
        let left: Vec<String> = again
            .headers()
            .iter()
            .flat_map(|h| h.inner().keys())
            .map(ToString::to_string)
            .collect();
        assert_eq!(left, ["traceparent", "x-tenant"]);
        assert_eq!(again.user_id(), &None);
        assert_eq!(again.message_id(), dead.properties.message_id());
        assert_eq!(again.reply_to(), dead.properties.reply_to());
        assert_eq!(again.correlation_id(), dead.properties.correlation_id());
        assert_eq!((again.priority(), again.delivery_mode()), (&Some(3), &Some(2)));
        assert_eq!(again.kind().as_ref().map(ShortString::as_str), Some(JOB_TYPE));
    }

    #[test]
    fn headers_are_shown_to_a_bounded_depth() {
        let mut value = AMQPValue::LongString("deep".into());
        for _ in 0..5_000 {
            value = AMQPValue::FieldArray(vec![value].into());
        }
        assert!(at_depth(&value, DEPTH).to_string().contains('…'));
        // Dropping it recurses, which is amq-protocol's affair and not ours.
        std::mem::forget(value);
        let bytes = AMQPValue::LongString(b"a\xff".as_slice().into());
        assert_eq!(at_depth(&bytes, DEPTH), "a\u{fffd}");
    }
}
