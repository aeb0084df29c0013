//! Batches form across jobs, close for a reason, and a bad image in one hurts only itself.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use angler_core::class_sets::catalog::{Catalog, version_key};
use angler_core::store::ObjectStore;
use angler_inference::embed::fake::FakeEmbedder;
use angler_storage::local::LocalObjects;
use angler_vectors::{Contents, file};
use angler_wire::job::Outcome;

use super::rig::*;

const LINGER: Duration = Duration::from_millis(5);

#[tokio::test(start_paused = true)]
async fn a_batch_fills_across_jobs_and_closes_without_waiting() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.policy.max_batch = 4;
    rig.policy.linger = LONG; // never, as the clock stands still
    let mut run = rig.start();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0"]);
    }
    run.job("d", &["9,0,0", "0,9,0", "0,0,9", "9,0,0", "0,9,0"]);
    run.finished().await;
    assert_eq!(run.batches(), [4, 4]);
    assert_eq!(run.closed(), [2, 0, 0]);
    assert_eq!(run.engine.stats().images(), 8);
    assert_eq!(verdicts(&run.result("d")), ["red", "green", "blue", "red", "green"]);
}

#[tokio::test(start_paused = true)]
async fn an_idle_engine_waits_for_company_as_long_as_the_linger() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.policy.linger = LINGER;
    let mut run = rig.start();
    let start = tokio::time::Instant::now();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0"]);
    }
    until_ticking("the batch is closed", || run.closed() != [0, 0, 0]).await;
    assert!(start.elapsed() >= LINGER, "{:?}", start.elapsed());
    run.finished().await;
    assert_eq!(run.batches(), [3], "the three came within the linger");
    assert_eq!(run.closed(), [0, 1, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_busy_engine_lets_the_next_batch_fill() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.policy.linger = LINGER;
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("first", &["9,0,0"]);
    until_ticking("the engine is busy", || run.batches() == [1]).await;
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0"]);
        // Much longer than the linger, and all that can happen by then has happened.
        tokio::time::sleep(10 * LINGER).await;
    }
    assert_eq!(run.closed(), [0, 1, 0]);
    drop(hold);
    run.finished().await;
    assert_eq!(run.batches(), [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn the_next_jobs_images_are_fetched_while_a_batch_is_embedded() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("first", &["9,0,0"]);
    until("the engine is busy", || run.batches() == [1]).await;
    for id in ["a", "b"] {
        run.job(id, &["9,0,0", "0,9,0", "0,0,9"]);
    }
    until("all are fetched", || (run.store.fetching.started(), run.store.fetching.now()) == (7, 0))
        .await;
    assert_eq!((run.batches(), run.sink.results().len()), (vec![1], 0), "the engine was held");
    drop(hold);
    run.finished().await;
    assert_eq!(verdicts(&run.result("b")), ["red", "green", "blue"]);
}

/// [`until`] for a clock that ticks.
async fn until_ticking(what: &str, check: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_linger() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.policy.linger = LONG;
    let mut run = rig.start();
    run.job("a", &["9,0,0"]);
    run.job("b", &["0,9,0"]);
    until("both are admitted", || run.store.fetching.started() == 2).await;
    run.stop.cancel();
    run.ended().await.unwrap();
    let [full, linger, drain] = run.closed();
    assert_eq!((full, linger), (0, 0));
    assert!((1..=2).contains(&drain), "{drain}"); // two if the first was alone when it began
    assert_eq!(run.engine.stats().images(), 2);
    assert_eq!(run.sink.results().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn each_image_of_a_batch_is_scored_with_its_own_jobs_version() {
    let _clock = Frozen::clock();
    let root = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(LocalObjects::new(root.path()));
    // The same directions under other names and in another order: a class that was found in one
    // version is another class in the next.
    let (red, green, blue) = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]);
    for (set, version, labels, vectors) in [
        ("colours", "1", ["red", "green", "blue"], [red, green, blue]),
        ("colours", "2", ["blau", "rot", "grün"], [blue, red, green]),
        ("other", "1", ["y", "z", "x"], [green, blue, red]),
    ] {
        let contents =
            Contents::new(labels.map(str::to_owned).to_vec(), ndarray::arr2(&vectors), MODEL);
        let bytes = file::write(&contents, (set, version)).unwrap();
        store.create(&version_key(set, version), bytes.into()).await.unwrap();
    }
    let active = br#"{"version": "2"}"#.to_vec();
    store.create("colours/active.json", active.into()).await.unwrap();

    let mut rig = Rig::default();
    rig.catalog = Catalog::new(store, MODEL, 3, CATALOG);
    rig.policy.max_batch = 6;
    rig.policy.linger = LONG;
    let mut run = rig.start();
    for (id, classes, top_k) in
        [("a", "colours@1", 1), ("b", "colours", 3), ("c", "other@1", 2), ("d", "colours@1", 2)]
    {
        run.push(json!({"id": id, "images": ["0,9,0"], "classes": classes, "top_k": top_k}));
    }
    run.push(json!({"id": "e", "images": ["9,0,0", "0,0,9"], "classes": "colours@2"}));
    run.finished().await;

    assert_eq!(run.batches(), [6], "all were in one batch");
    for (id, classes, labels, tops) in [
        ("a", "colours@1", vec!["green"], 1),
        ("b", "colours@2", vec!["grün"], 3),
        ("c", "other@1", vec!["y"], 2),
        ("d", "colours@1", vec!["green"], 2),
        ("e", "colours@2", vec!["rot", "blau"], 1),
    ] {
        let result = run.result(id);
        assert_eq!(verdicts(&result), labels, "{id}");
        for entry in entries(&result) {
            assert_eq!(classified(entry).top.len(), tops, "{id}");
        }
        let Outcome::Done { provenance, .. } = result.outcome else { unreachable!() };
        assert_eq!(
            (provenance.classes.as_str(), provenance.model.as_str(), provenance.backend.as_str()),
            (classes, MODEL, "fake"),
        );
    }
}

/// Two jobs whose images share one batch of eight, of which the embedder cannot bear one.
async fn one_bad_image_in_a_batch(embedder: FakeEmbedder, words: &str) {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.embedder = embedder;
    rig.policy.linger = LONG;
    let mut run = rig.start();
    run.job("bad", &["9,0,0", "200,0,0", "0,9,0", "0,0,9"]);
    run.job("good", &["9,0,0", "0,9,0", "0,0,9", "9,0,0"]);
    run.finished().await;
    assert_eq!(run.batches()[0], 8, "all were in one batch");
    assert_eq!(run.timed("embed"), 8, "each counts once, however often it ran");
    let bad = run.result("bad");
    assert_eq!(verdicts(&bad), ["red", "internal", "green", "blue"]);
    assert!(message(&entries(&bad)[1]).contains(words), "{bad:?}");
    assert_eq!(verdicts(&run.result("good")), ["red", "green", "blue", "red"]);
    assert!(run.settled().iter().all(|(_, how)| *how == angler_core::source::Settlement::Ack));
}

#[tokio::test(start_paused = true)]
async fn an_image_that_fails_its_batch_is_found_and_hurts_no_neighbour() {
    let embedder = FakeEmbedder { poison: Some(200), ..FakeEmbedder::new(3) };
    one_bad_image_in_a_batch(embedder, "refuses this image").await;
}

#[tokio::test(start_paused = true)]
async fn an_image_on_which_the_back_end_panics_hurts_no_neighbour() {
    let embedder = FakeEmbedder { panics_on: Some(200), ..FakeEmbedder::new(3) };
    one_bad_image_in_a_batch(embedder, "panicked").await;
}
