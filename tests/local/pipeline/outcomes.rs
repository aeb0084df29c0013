//! What a result says, and how its delivery settles.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::json;

use angler_core::class_sets::catalog::{Catalog, version_key};
use angler_core::retry::RetrySchedule;
use angler_core::source::Settlement;
use angler_core::source::folder::FolderSource;
use angler_core::store::{ETag, Got, Listed, Object, ObjectError, ObjectStore};
use angler_storage::local::LocalObjects;
use angler_vectors::{Contents, file};
use angler_wire::error::{Failure, FailureCode};
use angler_wire::job::Job;

use super::rig::*;

fn settled(id: &str, how: Settlement) -> (String, Settlement) {
    (id.to_owned(), how)
}

fn retry(seconds: u64, error: &str) -> Settlement {
    Settlement::Retry { delay: Duration::from_secs(seconds), error: error.to_owned() }
}

fn failure_of(settlement: &Settlement) -> &Failure {
    match settlement {
        Settlement::DeadLetter(failure) => failure,
        other => panic!("not a dead letter: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn entries_keep_the_jobs_order_whatever_is_ready_first() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.policy.max_batch = 3;
    rig.policy.linger = Duration::from_millis(2);
    let mut run = rig.start();
    // The later an image stands in the job, the sooner it comes.
    let uri = |n: usize| {
        let rgb = ["9,0,0", "0,9,0", "0,0,9"][n % 3];
        format!("{rgb}+{}ms", 60 - n)
    };
    let uris: Vec<String> = (0..50).map(uri).collect();
    let images: Vec<_> =
        uris.iter().enumerate().map(|(n, uri)| json!({"uri": uri, "id": n.to_string()})).collect();
    run.push(json!({"id": "a", "images": images, "classes": "colours"}));
    let result = run.only_result().await;
    let entries = entries(&result);
    assert_eq!(entries.len(), 50);
    for (n, entry) in entries.iter().enumerate() {
        assert_eq!((&entry.uri, entry.id.as_deref()), (&uris[n], Some(n.to_string().as_str())));
        assert_eq!(classified(entry).label.as_deref(), Some(["red", "green", "blue"][n % 3]));
    }
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_image_error_stands_in_its_own_entry() {
    let _clock = Frozen::clock();
    let mut run = Rig::default().start();
    let bad = ["not_found", "access_denied", "bucket_not_allowed", "bad_uri", "garbage", "panics"];
    let images: Vec<&str> = bad.into_iter().flat_map(|bad| [bad, "0,0,9"]).collect();
    run.job("a", &images);
    let result = run.only_result().await;
    let expected = [
        "not_found",
        "access_denied",
        "bucket_not_allowed",
        "bad_uri",
        "unsupported_format",
        "internal",
    ];
    let expected: Vec<&str> = expected.into_iter().flat_map(|code| [code, "blue"]).collect();
    assert_eq!(verdicts(&result), expected);
    assert_eq!((result.attempt, result.worker.as_str()), (1, "rig"));
    assert_eq!(run.settled(), [settled("a", Settlement::Ack)]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_tried_by_the_schedule_and_then_said() {
    let _clock = ticking();
    let mut run = Rig::default().start();
    run.job("mixed", &["9,0,0", "storage_unavailable"]);
    run.finished().await;
    let told = "as told: storage_unavailable";
    let all = [retry(5, told), retry(60, told), Settlement::Ack].map(|how| settled("mixed", how));
    assert_eq!(run.settled(), all);
    let result = run.result("mixed"); // one, after the last attempt
    assert_eq!(verdicts(&result), ["red", "storage_unavailable"]);
    assert_eq!(result.attempt, 3);
}

#[tokio::test(start_paused = true)]
async fn a_job_of_which_nothing_can_be_said_fails_and_is_kept() {
    let _clock = ticking();
    let mut run = Rig::default().start();
    run.job("none", &["storage_unavailable", "storage_unavailable"]);
    // With one that is known to be missing there is something to say.
    run.job("one", &["storage_unavailable", "not_found"]);
    run.finished().await;
    let result = run.result("none");
    assert_eq!(result.attempt, 3);
    let failed = failure(&result);
    assert!(failed.starts_with("retries_exhausted: attempt 3 was the last: as told"), "{failed}");
    let of_none: Vec<_> = run.settled().into_iter().filter(|(id, _)| id == "none").collect();
    assert_eq!(of_none.len(), 3);
    assert_eq!(failure_of(&of_none[2].1).code, FailureCode::RetriesExhausted);
    assert_eq!(verdicts(&run.result("one")), ["storage_unavailable", "not_found"]);
    assert!(run.settled().contains(&settled("one", Settlement::Ack)));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_job_has_a_failed_result_under_its_id_and_is_kept() {
    let _clock = Frozen::clock();
    let mut run = Rig::default().start();
    run.push(json!({"id": "half", "classes": "colours"}));
    run.queue.push("no JSON at all");
    run.queue.push("no JSON at all");
    run.job("good", &["9,0,0"]);
    run.finished().await;
    let malformed = failure(&run.result("half"));
    assert!(
        malformed.starts_with("malformed_job: ") && malformed.contains("images"),
        "{malformed}"
    );
    // The same bytes have the same id: a reader sees that the second is the first again.
    let nameless: Vec<String> =
        run.sink.ids().into_iter().filter(|id| id.starts_with("malformed-")).collect();
    assert_eq!(nameless.len(), 2);
    assert_eq!(nameless[0], nameless[1]);
    for (id, how) in run.settled().iter().filter(|(id, _)| id != "good") {
        assert_eq!(failure_of(how).code, FailureCode::MalformedJob, "{id}");
    }
    assert_eq!(verdicts(&run.result("good")), ["red"]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_can_never_work_fails_at_once_and_is_done_with() {
    let _clock = Frozen::clock();
    let root = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(LocalObjects::new(root.path()));
    let contents =
        Contents::new(vec!["a".into()], ndarray::array![[1.0, 0.0, 0.0]], "another@111111111111");
    let bytes = file::write(&contents, ("alien", "1")).unwrap();
    store.create(&version_key("alien", "1"), bytes.into()).await.unwrap();
    store.create(&version_key("torn", "1"), Bytes::from_static(b"torn")).await.unwrap();
    let mut rig = Rig::default();
    rig.catalog = Catalog::new(store, MODEL, 3, CATALOG);
    let mut run = rig.start();
    let cases = [
        ("none", "unknown_class_set"),
        ("alien@2", "unknown_version"),
        ("alien@1", "model_mismatch"),
        ("torn@1", "unknown_version"),
    ];
    for (classes, _) in cases {
        run.push(json!({"id": classes, "images": ["9,0,0"], "classes": classes}));
    }
    run.job("many", &["9,0,0"; 101]);
    run.finished().await;
    for (id, code) in cases.into_iter().chain([("many", "too_many_images")]) {
        let failed = failure(&run.result(id));
        assert!(failed.starts_with(&format!("{code}: ")), "{id}: {failed}");
        assert!(run.settled().contains(&settled(id, Settlement::Ack)), "{id}");
    }
    assert_eq!(run.store.fetching.started(), 0);
}

struct Away;

#[async_trait]
impl ObjectStore for Away {
    fn place(&self, key: &str) -> String {
        format!("away/{key}")
    }

    async fn get(&self, _: &str, _: Option<&ETag>) -> Result<Got, ObjectError> {
        Err(ObjectError::Unavailable("the store is away".into()))
    }

    async fn open(&self, _: &str) -> Result<Option<Object>, ObjectError> {
        Err(ObjectError::Unavailable("the store is away".into()))
    }

    async fn replace(&self, _: &str, _: Bytes, _: Option<&ETag>) -> Result<ETag, ObjectError> {
        Err(ObjectError::Unavailable("the store is away".into()))
    }

    async fn list(&self, _: &str) -> Result<Vec<Listed>, ObjectError> {
        Err(ObjectError::Unavailable("the store is away".into()))
    }

    async fn create(&self, _: &str, _: Bytes) -> Result<(), ObjectError> {
        Err(ObjectError::Unavailable("the store is away".into()))
    }
}

#[tokio::test(start_paused = true)]
async fn class_vectors_that_cannot_be_read_now_are_a_reason_to_try_again() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.catalog = Catalog::new(Arc::new(Away), MODEL, 3, CATALOG);
    let mut run = rig.start();
    run.job("a", &["9,0,0"]);
    let result = run.only_result().await;
    assert!(failure(&result).starts_with("retries_exhausted: "), "{result:?}");
    let settled = run.settled();
    assert!(matches!(&settled[0].1, Settlement::Retry { delay, .. } if delay.as_secs() == 5));
    assert!(matches!(&settled[1].1, Settlement::Retry { delay, .. } if delay.as_secs() == 60));
    assert_eq!(failure_of(&settled[2].1).code, FailureCode::RetriesExhausted);
    assert_eq!(settled.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_jobs_own_threshold_beats_the_sets_and_what_is_under_it_is_unknown() {
    let _clock = Frozen::clock();
    // Between red and green: the cosine with either is about 0.7.
    const BETWEEN: &str = "99,99,0";
    for (of_set, of_job, label) in [
        (None, None, Some("red")),
        (Some(0.9), None, None),
        (Some(0.9), Some(0.5), Some("red")),
        (Some(0.1), Some(0.9), None),
        (Some(0.9), Some(-1.0), Some("red")),
    ] {
        let mut rig = Rig::default();
        rig.catalog = fixed(of_set);
        let mut run = rig.start();
        run.push(json!({
            "id": "a", "images": [BETWEEN], "classes": "colours", "top_k": 2, "min_score": of_job
        }));
        let result = run.only_result().await;
        let best = classified(&entries(&result)[0]);
        assert_eq!(best.label.as_deref(), label, "set {of_set:?}, job {of_job:?}");
        // Known or not, the nearest are listed; the tie goes to the class that comes first.
        let labels: Vec<&str> = best.top.iter().map(|top| top.label.as_str()).collect();
        assert_eq!(labels, ["red", "green"]);
        assert!(
            (best.score - std::f32::consts::FRAC_1_SQRT_2).abs() < 1e-3
                && best.score == best.top[0].score,
            "{best:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn as_many_classes_are_listed_as_wanted_and_there_are() {
    let _clock = Frozen::clock();
    let mut run = Rig::default().start();
    for top_k in [1, 2, 100] {
        run.push(json!({
            "id": top_k.to_string(), "images": ["9,99,49"], "classes": "colours", "top_k": top_k
        }));
    }
    run.finished().await;
    for (top_k, listed) in [("1", 1), ("2", 2), ("100", 3)] {
        let result = run.result(top_k);
        let best = classified(&entries(&result)[0]);
        let labels: Vec<&str> = best.top.iter().map(|top| top.label.as_str()).collect();
        assert_eq!(labels, ["green", "blue", "red"][..listed]);
        assert!(best.top.is_sorted_by(|a, b| a.score >= b.score));
        assert!(best.embedding.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn embeddings_come_back_as_unit_vectors_if_wanted() {
    let _clock = Frozen::clock();
    let mut run = Rig::default().start();
    run.push(json!({
        "id": "a", "images": ["2,0,0", "99,199,9"], "classes": "colours", "embeddings": true
    }));
    let result = run.only_result().await;
    for (entry, colour) in entries(&result).iter().zip([[3.0, 1.0, 1.0], [100.0, 200.0, 10.0]]) {
        let best = classified(entry);
        let embedding = &best.embedding.as_ref().unwrap().0;
        let norm = colour.iter().map(|x: &f32| x * x).sum::<f32>().sqrt();
        for (got, wanted) in embedding.iter().zip(colour) {
            assert!((got - wanted / norm).abs() < 1e-5, "{embedding:?}");
        }
        // The colours are the axes: the score is the embedding's largest value.
        let largest = embedding.iter().copied().fold(f32::MIN, f32::max);
        assert!((best.score - largest).abs() < 1e-5);
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_list_every_image_is_told_though_there_is_no_queue_for_a_later_attempt() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.options.retry = RetrySchedule::never();
    let job = json!({"id": "list", "images": ["9,0,0"], "classes": "colours"});
    let template = Job::parse(job.to_string().as_bytes(), None, JOB_LIMITS).unwrap();
    let mut images = vec!["9,0,0".to_owned(); 40];
    images[3] = "storage_unavailable".to_owned();
    let mut run = rig.start_with(|_| Box::new(FolderSource::new(template, images)));
    run.ended().await.unwrap();
    let told: Vec<String> = run.sink.results().iter().flat_map(verdicts).collect();
    assert_eq!(told.len(), 40);
    assert_eq!(told.iter().filter(|told| *told == "storage_unavailable").count(), 1);
}
