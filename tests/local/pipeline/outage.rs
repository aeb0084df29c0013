//! A store that is away costs no attempts: the worker stops taking jobs until it is back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;

use angler_core::outage_detector::Outage;
use angler_core::retry::RetrySchedule;
use angler_core::source::Settlement;
use angler_wire::error::{ImageError, ImageErrorCode};

use super::rig::*;

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_no_jobs_are_taken_and_then_all_are_done() {
    let _clock = ticking();
    let outage = Arc::new(Outage::default());
    let mut rig = Rig::default();
    rig.outage = Some(Arc::clone(&outage));
    rig.options.jobs_in_flight = 4;
    let mut run = rig.start();
    run.job("before", &["9,0,0"]);
    until("a job is done", || run.sink.ids().len() == 1).await;
    run.store.away.store(true, Ordering::SeqCst);
    for number in 0..50 {
        run.job(&number.to_string(), &["9,0,0", "0,9,0", "0,0,9"]);
    }
    outage.began().await;
    sleep(Duration::from_secs(2)).await; // what was in flight is given back
    let (waiting, unsettled) = run.queue.depth();
    assert_eq!((waiting, unsettled), (50, 0));
    // Ten minutes, in which only probes go out, and no attempt is spent.
    let (fetches, settled) = (run.store.fetching.started(), run.settled().len());
    sleep(Duration::from_secs(600)).await;
    let probes = run.store.fetching.started() - fetches;
    assert!((30..=80).contains(&probes), "{probes} probes");
    assert_eq!(run.settled().len(), settled);
    assert_eq!(run.sink.ids(), ["before"]);

    run.store.away.store(false, Ordering::SeqCst);
    run.finished().await;
    assert_eq!(run.sink.ids().len(), 51);
    let retried = run.settled().into_iter().filter(|(_, s)| matches!(s, Settlement::Retry { .. }));
    assert!(retried.count() <= 4, "those in flight when it began, at most");
    for result in run.sink.results() {
        assert!(result.attempt <= 2 && verdicts(&result)[0] == "red", "{result:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fault_that_passes_at_once_costs_no_attempt() {
    let _clock = ticking();
    let mut run = Rig::default().start();
    run.store.away.store(true, Ordering::SeqCst);
    run.job("a", &["9,0,0"]);
    until("it is tried", || run.store.fetching.started() == 1).await;
    sleep(Duration::from_millis(100)).await;
    run.store.away.store(false, Ordering::SeqCst);
    let result = run.only_result().await;
    assert_eq!((result.attempt, verdicts(&result)), (1, vec!["red".to_owned()]));
}

/// A store that refuses everything in the middle of a job; after it was read from, if that matters.
async fn a_refusal_in_the_middle(refusal: ImageError) {
    let _clock = ticking();
    let outage = Arc::new(Outage::default());
    let mut rig = Rig::default();
    rig.outage = Some(Arc::clone(&outage));
    rig.options.retry = RetrySchedule::never();
    let mut run = rig.start();
    run.job("before", &["9,0,0"]);
    until("a job is done", || run.sink.ids().len() == 1).await;
    run.store.gate.shut();
    run.job("meanwhile", &["9,0,0", "0,9,0", "0,0,9"]);
    until("it is under way", || run.store.fetching.now() == 3).await;
    run.store.gate.let_pass(1);
    until("an image is fetched", || run.store.fetching.now() == 2).await;
    *run.store.refusal.lock().unwrap() = Some(refusal);
    run.store.gate.open();
    outage.began().await;
    // It is mended before the job would have been told.
    *run.store.refusal.lock().unwrap() = None;
    run.finished().await;
    let given_back = [("meanwhile".to_owned(), Settlement::Requeue)];
    assert!(
        given_back.iter().all(|settled| run.settled().contains(settled)),
        "{:?}",
        run.settled()
    );
    let result = run.result("meanwhile");
    assert_eq!((result.attempt, verdicts(&result)), (1, verdicts_of(["red", "green", "blue"])));
}

fn verdicts_of(labels: [&str; 3]) -> Vec<String> {
    labels.map(str::to_owned).to_vec()
}

#[tokio::test(start_paused = true)]
async fn no_image_of_an_outage_is_told_even_at_the_last_attempt() {
    a_refusal_in_the_middle(ImageError::credentials("as told")).await;
}

#[tokio::test(start_paused = true)]
async fn no_denial_of_everything_is_told() {
    a_refusal_in_the_middle(ImageError::new(ImageErrorCode::AccessDenied, "as told")).await;
}

#[tokio::test(start_paused = true)]
async fn a_denial_is_told_at_once_if_an_image_of_the_job_could_be_read() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.outage = Some(Arc::default());
    let mut run = rig.start();
    run.job("a", &["access_denied", "9,0,0+200ms"]);
    let result = run.only_result().await;
    assert_eq!(result.attempt, 1);
    assert_eq!(verdicts(&result), ["access_denied", "red"]);
}

#[tokio::test(start_paused = true)]
async fn a_denial_while_nothing_was_ever_read_is_told_after_the_last_attempt() {
    let _clock = ticking();
    let mut rig = Rig::default();
    rig.outage = Some(Arc::default());
    let mut run = rig.start();
    run.job("a", &["access_denied", "access_denied"]);
    let result = run.only_result().await;
    assert_eq!(result.attempt, 3);
    assert_eq!(verdicts(&result), ["access_denied"; 2]);
}
