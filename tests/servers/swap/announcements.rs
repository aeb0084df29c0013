//! An announcement may be lost: what is active is served all the same.

use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use serde_json::{Value, json};

use crate::support::servers::Server;
use crate::support::{Broker, Client, eventually};
use crate::swap::world::{SET, World, colours, labels, serves, status};

async fn two_versions(poll_seconds: &str) -> (World, Vec<String>) {
    prepared(World::new().await, poll_seconds).await
}

async fn prepared(mut world: World, poll_seconds: &str) -> (World, Vec<String>) {
    let images = world.images().await;
    world.put_colours("1").await;
    world.put_colours("2").await;
    world.put_active(SET, r#"{"version":"1"}"#).await;
    world.setup.set("classes.poll_seconds", poll_seconds).set("classes.preload", SET);
    (world, images)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_the_store_alone_is_found_by_polling_and_by_whoever_starts() {
    let (world, images) = two_versions("0.2").await;
    let mut first = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("1"));

    world.put_active(SET, r#"{"version":"2"}"#).await;
    let status = serves(&first, "2").await;
    assert_eq!((&status["swaps"], &status["refusals"]), (&1.into(), &0.into()));
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("2"));
    // Killed between a result and its ack, it would leave that job to the second.
    first.signal("TERM");
    assert!(first.ended().await.success(), "{}", first.log());

    let second = world.setup.start().await;
    let status = serves(&second, "2").await;
    assert_eq!(status["swaps"], 0, "it never served another");
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("2"));
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_a_listener_was_cut_off_is_served_once_it_is_back() {
    // No poll comes to its help.
    let (world, images) = two_versions("3600").await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("1"));
    let ear = eventually("the listener's connection is listed", async || {
        let all = world.broker.connections();
        all.into_iter().find(|(_, own)| own.starts_with("angler control ")).map(|(name, _)| name)
    })
    .await;

    // Nobody tells it: the announcement is lost with certainty, not by a race with the cut.
    world.put_active(SET, r#"{"version":"2"}"#).await;
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("1"));
    assert_eq!(status(&worker, SET)["swaps"], 0);
    world.broker.cut(&ear);
    serves(&worker, "2").await;
    assert!(worker.log().contains("announcements are not heard"), "{}", worker.log());
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("2"));

    // And it hears again.
    world.put_active(SET, r#"{"version":"1"}"#).await;
    assert_eq!(world.announce(&client, SET).await["version"], "1");
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("1"));
    drop(worker);
}

/// Sends a request to all workers and waits for no reply.
async fn request(client: &Client, request: &Value) {
    let properties = BasicProperties::default()
        .with_type("control.v1".into())
        .with_correlation_id("1".into())
        .with_reply_to("replies".into());
    let (options, body) = (BasicPublishOptions::default(), request.to_string());
    let (exchange, everyone) = ("angler.control".into(), "".into());
    let channel = &client.channel;
    let sent = channel.basic_publish(exchange, everyone, options, body.as_bytes(), properties);
    sent.await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_announcement_does_not_wait_for_replies_that_the_broker_blocks() {
    let server = Server::rabbitmq("");
    let (world, _) = prepared(World::at(Broker::of(&server)).await, "3600").await;
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    client.private_queue("replies").await;
    serves(&worker, "1").await;
    // More requests than a worker answers at once reach it right before an alarm.
    worker.signal("STOP");
    for _ in 0..40 {
        request(&client, &json!({"kind": "status"})).await;
    }
    world.put_active(SET, r#"{"version":"2"}"#).await;
    request(&client, &json!({"kind": "activated", "set": SET, "version": "2"})).await;
    server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    let is_alarmed = || world.broker.manage("GET", "nodes", None)[0]["mem_alarm"] == true;
    eventually("the alarm", async || is_alarmed().then_some(())).await;
    worker.signal("CONT");
    serves(&worker, "2").await;
    // Waited for: a busy broker leaves it out of its statistics now and then.
    eventually("the alarm still holds", async || is_alarmed().then_some(())).await;
}
