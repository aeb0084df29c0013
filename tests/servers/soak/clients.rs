//! Producers and consumers, as a user would write them; they reach the broker directly.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::soak::ledger::Answer;
use crate::soak::load::{Load, Order, Way};
use crate::soak::world::{REPLIES, World};
use crate::support::raw::{Properties, RawPublisher};

const JOBS_QUEUE: &str = "angler.jobs";
const DIRECT_REPLIES: &str = "amq.rabbitmq.reply-to";
/// How long a broker that says nothing is waited for.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a confirm is waited for; while the broker blocks publishers, as long as that lasts.
const CONFIRM: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(200);

/// Declares the queue that some jobs want their results in.
pub async fn declare_replies(url: &str) {
    let open = open(url).await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    open.channel.queue_declare(REPLIES.into(), durable, arguments).await.unwrap();
}

struct Open {
    channel: Channel,
    /// The channel ends with it.
    connection: Connection,
}

async fn open(url: &str) -> Result<Open, lapin::Error> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(Open { channel, connection })
}

/// A connection, once the broker gives one.
async fn connect(url: &str) -> Open {
    loop {
        if let Ok(Ok(open)) = timeout(CONNECT, open(url)).await {
            return open;
        }
        sleep(PAUSE).await;
    }
}

/// Publishes jobs at a pace until it is stopped, each until it is confirmed.
pub async fn produce(world: Arc<World>, mut load: Load, pace: Duration, stop: CancellationToken) {
    // What a client that reconnects cannot take is not sent: nobody expects an answer to it.
    let (direct, orders) = mpsc::channel(1024);
    let client = tokio::spawn(direct_client(Arc::clone(&world), orders));
    let mut pace = interval(pace);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut open = None;
    while stop.run_until_cancelled(pace.tick()).await.is_some() {
        let order = load.next();
        match &order.way {
            Way::Direct => drop(direct.try_send(order)),
            Way::Raw(properties) => {
                world.ledger.expect(&order.id, order.outcome.clone(), Answer::Certain);
                publish_raw(&world, properties, &order).await;
            }
            Way::Ordinary(properties) => {
                world.ledger.expect(&order.id, order.outcome.clone(), Answer::Certain);
                let body = order.body.to_string();
                loop {
                    let current = match &open {
                        Some(open) => open,
                        None => open.insert(connect(&world.broker.url).await),
                    };
                    match publish_patiently(current, body.as_bytes(), properties).await {
                        Published::Taken => break,
                        Published::Refused | Published::Unknown => open = None,
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }
    drop(direct);
    client.await.unwrap();
}

/// What the broker said of a message.
#[derive(Debug, PartialEq, Eq)]
enum Published {
    Taken,
    /// The queue is full. RabbitMQ 3.10 may go on refusing on this channel when it no longer is.
    Refused,
    /// Nothing: the connection is lost, or the broker is silent.
    Unknown,
}

async fn publish_patiently(open: &Open, body: &[u8], properties: &BasicProperties) -> Published {
    let mut publishing = std::pin::pin!(publish(&open.channel, body, properties));
    loop {
        match timeout(CONFIRM, &mut publishing).await {
            Ok(Ok(true)) => return Published::Taken,
            Ok(Ok(false)) => return Published::Refused,
            Ok(Err(_)) => return Published::Unknown,
            Err(_) if open.connection.status().blocked() => {}
            Err(_) => {
                println!("a producer got no confirm within {CONFIRM:?}");
                return Published::Unknown;
            }
        }
    }
}

async fn publish(
    channel: &Channel,
    body: &[u8],
    properties: &BasicProperties,
) -> Result<bool, lapin::Error> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let published =
        channel.basic_publish("".into(), JOBS_QUEUE.into(), options, body, properties.clone());
    Ok(matches!(published.await?.await?, Confirmation::Ack(None)))
}

async fn publish_raw(world: &World, properties: &Properties, order: &Order) {
    let (address, body) = (world.broker.address(), order.body.to_string());
    loop {
        let publishing = async {
            let mut raw = RawPublisher::connect(&address, &world.broker.vhost).await?;
            raw.publish(JOBS_QUEUE, properties, body.as_bytes()).await
        };
        if let Ok(Ok(true)) = timeout(CONFIRM, publishing).await {
            return;
        }
        sleep(PAUSE).await;
    }
}

/// Publishes jobs and takes their results from the pseudo-queue `amq.rabbitmq.reply-to`.
///
/// Such results live as long as the client's channel: when that ends, those that are outstanding may be
/// lost. On the last channel none may be.
async fn direct_client(world: Arc<World>, mut orders: mpsc::Receiver<Order>) {
    let mut is_open = true;
    while is_open {
        let mut asked = Vec::new();
        let connected = async {
            let Open { channel, connection: _connection } = connect(&world.broker.url).await;
            let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
            let (queue, tag) = (DIRECT_REPLIES.into(), "direct".into());
            let mut replies =
                channel.basic_consume(queue, tag, no_ack, FieldTable::default()).await?;
            loop {
                tokio::select! {
                    order = orders.recv(), if is_open => match order {
                        None => is_open = false,
                        Some(order) => {
                            asked.push(order.id.clone());
                            if !ask(&channel, &world, &order).await? {
                                return Ok(());
                            }
                        }
                    },
                    reply = replies.next() => {
                        let Some(reply) = reply else { return Ok(()) };
                        world.ledger.take(serde_json::from_slice(&reply?.data).unwrap());
                    }
                    () = sleep(PAUSE), if !is_open => {
                        if asked.iter().all(|job| world.ledger.has(job)) {
                            return Ok(());
                        }
                    }
                }
            }
        };
        let ended: Result<(), lapin::Error> = connected.await;
        // Not those of a channel that lived to the end.
        if ended.is_err() || is_open {
            asked.iter().for_each(|job| world.ledger.excuse(job));
        }
        sleep(PAUSE).await;
    }
}

/// Publishes a job with a direct reply; `false` if the queue is full: then nobody asks again.
async fn ask(channel: &Channel, world: &World, order: &Order) -> Result<bool, lapin::Error> {
    let properties =
        BasicProperties::default().with_delivery_mode(2).with_reply_to(DIRECT_REPLIES.into());
    world.ledger.expect(&order.id, order.outcome.clone(), Answer::Certain);
    publish(channel, order.body.to_string().as_bytes(), &properties).await
}

/// Takes results from both queues until it is stopped.
pub async fn collect(world: Arc<World>, stop: CancellationToken) {
    let forever = async {
        loop {
            let open = connect(&world.broker.url).await;
            let _ = consume(&open.channel, &world).await;
            sleep(PAUSE).await;
        }
    };
    stop.run_until_cancelled(forever).await;
}

async fn consume(channel: &Channel, world: &World) -> Result<(), lapin::Error> {
    let mut consumers: Vec<Consumer> = Vec::new();
    for queue in ["angler.results", REPLIES] {
        let options = BasicConsumeOptions::default();
        let tag = queue.into();
        consumers
            .push(channel.basic_consume(queue.into(), tag, options, FieldTable::default()).await?);
    }
    let mut all = futures_util::stream::select_all(consumers);
    while let Some(delivery) = all.next().await {
        let delivery = delivery?;
        world.ledger.take(serde_json::from_slice(&delivery.data).unwrap());
        delivery.acker.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}
