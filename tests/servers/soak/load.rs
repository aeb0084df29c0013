//! The jobs: ordinary ones, and those that mean harm.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use serde_json::{Value, json};

use crate::soak::world::{FORBIDDEN, MESSAGE_BYTES, REPLIES};
use crate::support::raw::Properties;
use crate::support::tiny;

/// Images of a large job.
const LARGE: usize = 100;
/// Images whose result is larger than the broker's largest message, while the job is not.
const TOO_LARGE: usize = MESSAGE_BYTES / 120;

/// One job to be published.
pub struct Order {
    pub id: String,
    pub body: Value,
    pub way: Way,
    /// Labels and error codes, or the code of the whole job.
    pub outcome: Value,
}

/// How a job is published.
pub enum Way {
    /// As a producer does it.
    Ordinary(BasicProperties),
    /// With `amq.rabbitmq.reply-to`.
    Direct,
    /// With properties that are not UTF-8.
    Raw(Properties),
}

/// A seeded stream of jobs.
pub struct Load {
    random: fastrand::Rng,
    images: Vec<String>,
    number: usize,
}

impl Load {
    pub fn new(seed: u64, images: Vec<String>) -> Self {
        Self { random: fastrand::Rng::with_seed(seed ^ 0x10ad), images, number: 0 }
    }

    pub fn next(&mut self) -> Order {
        let number = self.number;
        self.number += 1;
        let (uris, outcome) = match number % 100 {
            // Early, so that a short soak has them too.
            30 => self.images(LARGE),
            60 => self.images(TOO_LARGE),
            _ => {
                let count = self.random.usize(1..=5);
                self.images(count)
            }
        };
        let id = format!("soak/{number}");
        let mut body = json!({"id": id, "images": uris, "classes": "colours"});
        let properties = BasicProperties::default().with_delivery_mode(2);
        let mut order = Order { id, body: Value::Null, way: Way::Ordinary(properties), outcome };
        match number % 100 {
            30 => {}
            60 => {
                body["top_k"] = json!(tiny::LABELS.len());
                order.outcome = json!("result_too_large");
            }
            _ => self.vary(&mut body, &mut order),
        }
        order.body = body;
        order
    }

    /// Images and what must come of each.
    fn images(&mut self, count: usize) -> (Vec<String>, Value) {
        let verdict = |pick: usize| match pick {
            0 => (FORBIDDEN.to_owned(), "access_denied"),
            1..5 => ("s3://soak/no-such-object.png".to_owned(), "not_found"),
            _ => (self.images[pick % 3].clone(), tiny::LABELS[pick % 3]),
        };
        let mut uris = Vec::new();
        let mut verdicts = Vec::new();
        for _ in 0..count {
            let (uri, verdict) = verdict(self.random.usize(0..40));
            uris.push(uri);
            verdicts.push(verdict);
        }
        (uris, json!(verdicts))
    }

    /// One kind of job out of many.
    fn vary(&mut self, body: &mut Value, order: &mut Order) {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let mut malformed = |order: &mut Order| {
            body.as_object_mut().unwrap().remove("images");
            order.outcome = json!("malformed_job");
        };
        match self.random.usize(0..100) {
            0..4 => malformed(order),
            // Who carries this on publishes without end.
            4..6 => {
                malformed(order);
                order.way = Way::Ordinary(properties.with_headers(copy_to_jobs("CC")));
            }
            6 => order.way = Way::Ordinary(properties.with_headers(copy_to_jobs("CC"))),
            7..11 => {
                body["classes"] = json!("colours@404");
                order.outcome = json!("unknown_version");
            }
            11..15 => {
                order.way = Way::Ordinary(properties.with_reply_to("no.such.queue".into()));
            }
            15..19 => order.way = Way::Direct,
            19 => {
                order.outcome = json!("malformed_job");
                order.way = Way::Raw(self.unparsable());
            }
            20..45 => order.way = Way::Ordinary(properties.with_reply_to(REPLIES.into())),
            45..65 => body["classes"] = json!("colours@1"),
            _ => {}
        }
    }

    /// Properties that no client has to read.
    fn unparsable(&mut self) -> Properties {
        let (bytes, mut properties) = (Some(b"\xff\xfe\xfd".to_vec()), Properties::default());
        match self.random.usize(0..5) {
            0 => properties.correlation_id = bytes,
            1 => properties.message_id = bytes,
            2 => properties.kind = bytes,
            3 => properties.nested = 5_000,
            _ => properties.headers = vec![(b"\xff\xfe".to_vec(), b"value".to_vec())],
        }
        properties
    }
}

/// A header that makes the broker route a message to the jobs queue once more.
fn copy_to_jobs(header: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    let queues = vec![AMQPValue::LongString("angler.jobs".into())];
    headers.insert(header.into(), AMQPValue::FieldArray(FieldArray::from(queues)));
    headers
}
