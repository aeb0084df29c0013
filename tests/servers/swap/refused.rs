//! A version that is wrong in any way is refused aloud, and the one before it goes on serving.

use serde_json::json;

use crate::support::eventually;
use crate::swap::world::{File, SET, World, colours, labels, status};

/// What the log says once for each version that is refused.
const REFUSED: &str = "refused, the old version goes on serving";

struct Case {
    /// What `active.json` says.
    active: String,
    /// The version it names, if that can be read.
    version: Option<&'static str>,
    /// What the reason must say.
    words: &'static [&'static str],
    /// Where, within the root.
    place: String,
    /// Whether the version itself is wrong, so that no operator can activate it.
    never: bool,
}

/// Puts every wrong version into the store.
async fn cases(world: &World) -> Vec<Case> {
    let classes = [("red", [1.0, 0.0, 0.0]), ("green", [0.0, 1.0, 0.0]), ("blue", [0.0, 0.0, 1.0])];
    let good = || world.file(&classes);
    let row = |at: usize, row: [f32; 3]| {
        let mut file = good();
        file.values[at * 3..at * 3 + 3].copy_from_slice(&row);
        Vec::from(file)
    };
    let whole = Vec::from(good());
    let truncated = whole[..whole.len() - 5].to_vec();
    let labels: Vec<u8> = File { labels: vec!["red".into(), "green".into()], ..good() }.into();
    let narrow: Vec<u8> =
        File { values: vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dim: 2, ..good() }.into();
    let foreign: Vec<u8> = File { model: "other-model@0123456789ab".into(), ..good() }.into();
    let files: [(&'static str, Vec<u8>, &'static [&'static str]); 7] = [
        ("truncated", truncated, &["not a whole safetensors file"]),
        ("empty", Vec::new(), &["not a whole safetensors file"]),
        ("nan", row(1, [0.0, f32::NAN, 0.0]), &["row 1", "green", "NaN"]),
        ("zero", row(2, [0.0, 0.0, 0.0]), &["row 2", "blue"]),
        ("labels", labels, &["2", "3", "labels"]),
        ("narrow", narrow, &["2 values", "3"]),
        ("foreign", foreign, &["other-model@0123456789ab", "tiny-mean@"]),
    ];
    let mut cases = Vec::new();
    for (version, file, words) in files {
        world.put_version(SET, version, file).await;
        cases.push(Case {
            active: json!({"version": version}).to_string(),
            version: Some(version),
            words,
            place: format!("{version}.safetensors"),
            never: true,
        });
    }
    cases.push(Case {
        active: json!({"version": "absent"}).to_string(),
        version: Some("absent"),
        words: &["does not exist"],
        place: "absent.safetensors".into(),
        never: true,
    });
    let wrong_sum = "0".repeat(64);
    cases.push(Case {
        active: json!({"version": "2", "sha256": wrong_sum}).to_string(),
        version: Some("2"),
        words: &["sha256", "active.json says 0000"],
        place: "2.safetensors".into(),
        never: false,
    });
    cases.push(Case {
        active: "{\"version\": ".into(),
        version: None,
        words: &["not readable"],
        place: "active.json".into(),
        never: false,
    });
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_once_aloud_and_the_old_version_goes_on() {
    let mut world = World::new().await;
    let images = world.images().await;
    world.put_colours("1").await;
    world.put_colours("2").await;
    world.put_active(SET, r#"{"version":"1"}"#).await;
    let cases = cases(&world).await;
    world.setup.set("classes.poll_seconds", "0.2").set("classes.preload", SET);
    let worker = world.setup.start().await;
    let client = world.broker.connect().await;
    let mut results = client.consume("angler.results").await;

    for (number, case) in cases.iter().enumerate() {
        world.put_active(SET, &case.active).await;
        let seen = eventually(&format!("refused: {}", case.active), async || {
            let status = status(&worker, SET);
            (status["refusals"] == number + 1).then_some(status)
        })
        .await;
        assert_eq!(seen["version"], "1", "{seen}");
        let refused = &seen["refused"];
        assert_eq!(refused.get("version"), case.version.map(|v| json!(v)).as_ref(), "{seen}");
        let reason = refused["reason"].as_str().unwrap();
        for words in case.words {
            assert!(reason.contains(words), "{words}: {reason}");
        }
        let place = format!("s3://{}/classes/{SET}/{}", world.bucket.name, case.place);
        assert!(reason.contains(&place), "{place}: {reason}");

        // Who looks again learns the same, and nothing is counted or logged twice.
        assert_eq!(world.announce(&client, SET).await, seen);
        assert_eq!(labels(&client, &mut results, &images, SET).await, colours("1"));
        assert_eq!(worker.log().matches(REFUSED).count(), number + 1, "{}", worker.log());
        let line = worker.log().lines().rfind(|l| l.contains(REFUSED)).unwrap().to_owned();
        assert!(line.contains("ERROR") && line.contains(reason), "{line}");

        let Some(version) = case.version.filter(|_| case.never) else { continue };
        let (_, before) = world.active().await;
        let ran = world.run(&["classes", "activate", &format!("{SET}@{version}")]).await;
        assert_eq!(ran.code, 1, "{}", ran.log);
        assert!(ran.log.contains(reason), "not {reason}: {}", ran.log);
        assert_eq!(world.active().await.1, before, "activate {version} changed active.json");
    }

    // A good one is served again, by the operator's command, whatever stands there.
    let ran = world.run(&["classes", "activate", &format!("{SET}@2"), "--json"]).await;
    assert_eq!(ran.code, 0, "{}", ran.log);
    assert_eq!(ran.json()["workers"]["confirmed"].as_array().unwrap().len(), 1, "{}", ran.out);
    let seen = status(&worker, SET);
    assert_eq!((&seen["version"], seen.get("refused")), (&json!("2"), None), "{seen}");
    assert_eq!((&seen["swaps"], &seen["refusals"]), (&json!(1), &json!(cases.len())));
    assert_eq!(labels(&client, &mut results, &images, SET).await, colours("2"));
    drop(worker);
}
