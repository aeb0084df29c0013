//! A shadow version changes no result, and what it would change is counted exactly.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Broker, eventually};
use crate::swap::world::{BLUE, File, GREEN, RED, SET, World};

/// Jobs of each kind, over all workers.
const JOBS: usize = 12;

/// What jobs with these images get, by id: the images' entries, byte for byte.
async fn entries(broker: &Broker, images: &[String]) -> BTreeMap<String, String> {
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    for n in 0..JOBS {
        // The active version, one that is pinned, and another set: only the first is tried.
        for classes in [SET, &format!("{SET}@2"), "other"] {
            let id = format!("{classes}/{n}");
            let job = json!({"id": id, "images": images, "classes": classes, "top_k": 3});
            client.job(&job).await;
        }
    }
    let all = results.collect(3 * JOBS).await;
    let entries = all.into_iter().map(|(id, result)| {
        assert_eq!(result.body["status"], "done", "{}", result.body);
        // From the message's own bytes, not from numbers that were read and written again.
        let raw = String::from_utf8(result.raw).unwrap();
        let (_, rest) = raw.split_once(r#""images":"#).unwrap();
        let (images, _) = rest.split_once(r#","attempt""#).unwrap();
        (id, format!("{} {images}", result.body["classes"]))
    });
    entries.collect()
}

async fn reports(world: &World) -> (u64, Vec<Value>) {
    let ran = world.run(&["classes", "shadow", "--json"]).await;
    assert_eq!(ran.code, 0, "{}", ran.log);
    let said = ran.json();
    (said["workers"].as_u64().unwrap(), said["reports"].as_array().unwrap().clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_version_changes_no_result_and_counts_what_it_would_change() {
    let mut world = World::new().await;
    let mut images = world.images().await;
    images.push(world.image("grey", [100, 100, 101]).await);
    // Green has another name in the candidate; grey is unknown to it; red and blue stay.
    let served = [("red", RED), ("green", GREEN), ("blue", BLUE)];
    let tried = [("red", RED), ("lime", GREEN), ("blue", BLUE)];
    world.put_version(SET, "1", world.file(&served)).await;
    let candidate = File { min_score: Some(0.8), ..world.file(&tried) };
    world.put_version(SET, "2", candidate).await;
    world.put_version("other", "1", world.file(&served)).await;
    for set in [SET, "other"] {
        world.put_active(set, r#"{"version":"1"}"#).await;
    }
    world.setup.set("classes.preload", &format!("{SET},other"));

    let plain = world.setup.start().await;
    let without = entries(&world.broker, &images).await;
    assert_eq!(reports(&world).await.1, Vec::<Value>::new(), "a worker without a shadow");
    drop(plain);

    let mut world = world.beside().await;
    world.setup.set("classes.shadow", &format!("{SET}@2"));
    let workers = [world.setup.start().await, world.setup.start().await];
    for worker in &workers {
        eventually("the candidate is loaded", async || {
            worker.log().contains("tried beside what is served").then_some(())
        })
        .await;
    }
    let with = entries(&world.broker, &images).await;
    assert_eq!(with, without);
    let result = &with[&format!("{SET}/0")];
    assert!(result.contains("green") && !result.contains("lime"), "{result}");

    let (count, reports) = reports(&world).await;
    assert_eq!(count, 2);
    let jobs = JOBS as u64;
    let sum = |field: &str| reports.iter().map(|r| r[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("images"), 4 * jobs, "{reports:#?}");
    assert_eq!(sum("flips"), 2 * jobs);
    assert_eq!((sum("became_unknown"), sum("became_known")), (jobs, 0));
    assert_eq!(sum("other_flips"), 0);
    let mut flips: BTreeMap<(Option<String>, Option<String>), u64> = BTreeMap::new();
    // A worker that got no image of the set says so in a report of its own.
    for report in reports.iter().filter(|r| r["images"] != 0) {
        assert_eq!(report["candidate"], format!("{SET}@2"));
        assert_eq!(
            (&report["loaded"], &report["served"]),
            (&json!(true), &json!(format!("{SET}@1")))
        );
        for flip in report["transitions"].as_array().unwrap() {
            let label = |key: &str| flip[key].as_str().map(str::to_owned);
            *flips.entry((label("from"), label("to"))).or_default() +=
                flip["count"].as_u64().unwrap();
        }
    }
    let flip = |from: &str, to: Option<&str>| (Some(from.to_owned()), to.map(str::to_owned));
    let wanted = [(flip("green", Some("lime")), jobs), (flip("blue", None), jobs)];
    assert_eq!(flips, BTreeMap::from(wanted));
}
