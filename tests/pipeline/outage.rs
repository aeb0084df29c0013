//! A store that is away costs no attempts: the worker stops taking jobs until it is back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use angler::outage::Outage;
use angler::source::Settlement;
use tokio::time::sleep;

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
