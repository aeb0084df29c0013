//! Sends one job to angler's workers and prints its id:
//! `cargo run --example producer -- bottles@7 my-job-1 s3://photos/a.jpg s3://photos/b.jpg`
//!
//! Nothing of angler's is used, as in a program of your own: lapin, tokio, serde_json, anyhow. `AMQP_URL` says where the
//! broker is.

use std::time::Duration;

use anyhow::{Result, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties};

const JOBS: &str = "angler.jobs";
const TRIES: u8 = 3;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(classes), Some(id)) = (arguments.next(), arguments.next()) else {
        bail!("usage: producer CLASSES ID URI...");
    };
    let images: Vec<String> = arguments.collect();
    // The caller chose the id before the first try, so that each try sends the same job.
    let job = serde_json::json!({"id": id, "classes": classes, "images": images});
    let url = std::env::var("AMQP_URL").unwrap_or_else(|_| "amqp://localhost/%2f".to_owned());
    for attempt in 1..=TRIES {
        match publish(&url, &id, job.to_string().as_bytes()).await {
            Ok(true) => {
                println!("{id}");
                return Ok(());
            }
            Ok(false) => bail!("there is no queue {JOBS}: workers declare it when they start"),
            // Perhaps the broker has it and only its confirm was lost. Sending it again is right all the same: then there
            // are two results with this id, and the consumer takes one of them.
            Err(error) => eprintln!("try {attempt} of {TRIES}: {error:#}"),
        }
        tokio::time::sleep(Duration::from_secs(attempt.into())).await;
    }
    bail!("the job was not confirmed")
}

/// Returns once the broker has confirmed the job: true, or returned it because no queue takes it: false.
async fn publish(url: &str, id: &str, job: &[u8]) -> Result<bool> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let properties = BasicProperties::default()
        .with_type("classify.v1".into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_message_id(id.into());
    // Without `mandatory` RabbitMQ confirms a message that no queue takes, and drops it.
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    // The default exchange routes to the queue of this name. The second `await` waits for the confirm.
    //
    // One message a channel at a time: a message that comes back bears no number, and lapin hands it to whichever confirm
    // arrives next.
    let confirm =
        channel.basic_publish("".into(), JOBS.into(), options, job, properties).await?.await?;
    let taken = match confirm {
        Confirmation::Ack(returned) => returned.is_none(),
        Confirmation::Nack(_) | Confirmation::NotRequested => bail!("the broker refused the job"),
    };
    // Whatever becomes of the connection now, the broker has answered.
    let _ = connection.close(200, "done".into()).await;
    Ok(taken)
}
