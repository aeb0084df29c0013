//! An announcement may be lost: what is active is served all the same.

use crate::support::eventually;
use crate::world::{SET, World, colours, labels, serves, status};

async fn two_versions(poll_seconds: &str) -> (World, Vec<String>) {
    let mut world = World::new().await;
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
