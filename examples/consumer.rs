//! Takes results of angler's workers and prints a line an image: `cargo run --example consumer -- [COUNT]`
//!
//! Nothing of angler's is used, as in a program of your own: lapin, tokio, futures-util, serde_json, anyhow. `AMQP_URL` says
//! where the broker is. Without COUNT it goes on. When the connection is lost it ends with an error: let whatever runs it start
//! it again. Nothing is lost, since what was not acked is delivered again.

use std::collections::{HashSet, VecDeque};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::Value;

const RESULTS: &str = "angler.results";
const RESULT_TYPE: &str = "classify.result.v1";

#[tokio::main]
async fn main() -> Result<()> {
    let count: Option<usize> = std::env::args()
        .nth(1)
        .map(|n| n.parse())
        .transpose()
        .context("usage: consumer [COUNT]")?;
    let url = std::env::var("AMQP_URL").unwrap_or_else(|_| "amqp://localhost/%2f".to_owned());
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    // How many unacked messages the broker hands out at once: it bounds memory, and what comes again after a crash.
    channel.basic_qos(16, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut messages =
        channel.basic_consume(RESULTS.into(), "".into(), options, FieldTable::default()).await?;
    let (mut seen, mut handled) = (Seen::default(), 0);
    while count.is_none_or(|count| handled < count) {
        let Some(message) = messages.next().await else { bail!("the broker ended the consumer") };
        let message = message?;
        let text = |property: &Option<lapin::types::ShortString>| {
            property.as_ref().map(ToString::to_string)
        };
        match (text(message.properties.kind()), text(message.properties.message_id())) {
            (Some(kind), Some(id)) if kind == RESULT_TYPE => {
                if seen.contains(&id) {
                    eprintln!("passed over: {id} again");
                } else {
                    handle(&serde_json::from_slice(&message.data)?)?;
                    seen.add(id);
                    handled += 1;
                }
            }
            (kind, _) => eprintln!("passed over: a message of type {kind:?}"),
        }
        // Only now: what was acked is gone from the broker.
        message.acker.ack(BasicAckOptions::default()).await?;
    }
    // In order, so that the last ack arrives.
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// What is done with a result. If it fails, the message was not acked and comes again.
fn handle(result: &Value) -> Result<()> {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or("unknown").to_owned();
    let id = text(result, "id");
    let why = |error: &Value| format!("{}: {}", text(error, "code"), text(error, "message"));
    if result["status"] == "failed" {
        println!("{id}: failed: {}", why(&result["error"]));
        return Ok(());
    }
    for image in result["images"].as_array().context("a result without images")? {
        let verdict = match image.get("error") {
            Some(error) => why(error),
            // A label that is null is unknown: the best class's score is under the threshold.
            None => format!(
                "{} {:.4}",
                text(image, "label"),
                image["score"].as_f64().unwrap_or_default()
            ),
        };
        println!("{id}: {}: {verdict}", text(image, "uri"));
    }
    Ok(())
}

/// The last ids: at-least-once delivery brings a job's result twice now and then, always under the same id.
///
/// Here they are lost with the process. If a second handling would do harm, keep the id where the result goes, in the same
/// transaction.
#[derive(Default)]
struct Seen {
    ids: HashSet<String>,
    order: VecDeque<String>,
}

impl Seen {
    const MOST: usize = 100_000;

    fn contains(&self, id: &str) -> bool {
        self.ids.contains(id)
    }

    fn add(&mut self, id: String) {
        self.order.push_back(id.clone());
        self.ids.insert(id);
        if self.order.len() > Self::MOST
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}
