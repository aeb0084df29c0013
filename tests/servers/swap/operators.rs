//! Several people activate at the same time: nobody overwrites another unseen.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio::task::JoinSet;

use crate::support::{Setup, Worker};
use crate::swap::gate::Gate;
use crate::swap::world::{Ran, SET, World, colours, labels, run, serves, status};

/// Versions 1 to `operators` + 1; version 1 is active and served.
async fn served(operators: usize) -> (World, Worker) {
    let mut world = World::new().await;
    for version in 1..=operators + 1 {
        world.put_colours(&version.to_string()).await;
    }
    world.put_active(SET, r#"{"version":"1"}"#).await;
    world.setup.set("classes.preload", SET).set("classes.poll_seconds", "3600");
    let worker = world.setup.start().await;
    (world, worker)
}

/// Each activates another version, from 2 on; how it ended, by version.
async fn activate_all(setup: &Setup, operators: usize) -> JoinSet<(String, Ran)> {
    let mut running = JoinSet::new();
    for version in 2..operators + 2 {
        let mut setup = setup.clone();
        setup.env.insert("USER".into(), format!("operator-{version}"));
        let id = format!("{SET}@{version}");
        running.spawn(async move {
            (version.to_string(), run(&setup, &["classes", "activate", &id, "--json"]).await)
        });
    }
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn of_operators_that_saw_the_same_one_wins_and_the_others_learn_who() {
    const OPERATORS: usize = 4;
    let (world, worker) = served(OPERATORS).await;
    // Whoever reads a version has looked at active.json before; here all have, before any writes.
    let gate = Gate::before(".safetensors").await;
    let mut gated = world.setup.clone();
    gated.set("s3.endpoint", &gate.url);
    let running = activate_all(&gated, OPERATORS).await;
    gate.reached(OPERATORS).await;
    assert_eq!(world.active().await.0, "1");
    gate.open();
    let (won, lost): (Vec<_>, Vec<_>) =
        running.join_all().await.into_iter().partition(|(_, ran)| ran.code == 0);

    let [(winner, ran)] = &won[..] else {
        panic!("{} won: {:?}", won.len(), won.iter().map(|(v, _)| v).collect::<Vec<_>>())
    };
    let said = ran.json();
    assert_eq!((&said["changed"], &said["previous"]), (&true.into(), &"1".into()), "{said}");
    assert_eq!(said["workers"]["confirmed"].as_array().unwrap().len(), 1, "{said}");
    assert_eq!(world.active().await.0, *winner);
    for (version, ran) in &lost {
        assert_eq!(ran.code, 1, "{}", ran.log);
        let named = format!("version {winner} by operator-{winner}@");
        assert!(ran.log.contains(&named), "{version} is not told of {named}: {}", ran.log);
        assert!(ran.log.contains("nothing was changed by this command"), "{}", ran.log);
        assert!(ran.out.is_empty(), "{}", ran.out);
    }
    let status = serves(&worker, winner).await;
    assert_eq!((&status["swaps"], &status["refusals"]), (&1.into(), &0.into()));

    // Back, and back again: each is an activation like any other.
    for wanted in ["1", winner] {
        let ran = world.run(&["classes", "rollback", SET, "--json"]).await;
        assert_eq!(ran.code, 0, "{}", ran.log);
        assert_eq!(ran.json()["version"], wanted);
        assert_eq!(status_version(&worker), wanted);
    }
    let images = world.images().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours(winner));
    drop(worker);
}

fn status_version(worker: &Worker) -> String {
    status(worker, SET)["version"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_operators_in_a_crowd_each_that_won_followed_the_one_before() {
    const OPERATORS: usize = 6;
    let (world, worker) = served(OPERATORS).await;
    let ended = activate_all(&world.setup, OPERATORS).await.join_all().await;

    // Who wrote says what was active before: a lost update would be two with the same before it.
    let mut after: BTreeMap<String, String> = BTreeMap::new();
    for (version, ran) in &ended {
        if ran.out.is_empty() {
            assert_eq!(ran.code, 1, "{}", ran.log);
            assert!(ran.log.contains("became active meanwhile"), "{}", ran.log);
            continue;
        }
        let said: Value = ran.json();
        assert_eq!((&said["changed"], said["version"].as_str()), (&true.into(), Some(&**version)));
        let previous = said["previous"].as_str().unwrap().to_owned();
        if let Some(other) = after.insert(previous.clone(), version.clone()) {
            panic!("{other} and {version} both replaced {previous}");
        }
    }
    let (mut last, mut steps) = ("1".to_owned(), 0);
    while let Some(next) = after.get(&last) {
        (last, steps) = (next.clone(), steps + 1);
        assert!(steps <= after.len(), "{after:?} goes in a circle");
    }
    assert!(steps == after.len() && steps > 0, "not one line from 1: {after:?}");
    let (active, bytes) = world.active().await;
    assert_eq!(active, last, "{}", String::from_utf8_lossy(&bytes));
    // The last one's announcement found nothing newer, so it was confirmed.
    let (_, ran) = ended.iter().find(|(version, _)| *version == last).unwrap();
    assert_eq!(ran.code, 0, "{}", ran.log);
    assert_eq!(status_version(&worker), last);
    drop(worker);
}
