//! Results that are not accepted for too long: jobs are given back, and none are taken.

use std::sync::atomic::Ordering;

use super::rig::*;

#[tokio::test(start_paused = true)]
async fn while_results_are_not_accepted_jobs_are_given_back_and_then_all_are_done() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.jobs_in_flight = 2;
    let mut run = rig.start();
    run.sink.gate.shut();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0"]);
    }
    // All places are held, so the worker waits for one and for nothing else.
    until("two results wait", || run.sink.publishing.now() == 2).await;
    quiet().await;
    run.sink.stuck.send_replace(true);
    until("both are given back", || run.queue.depth() == (3, 0)).await;
    run.job("d", &["9,0,0"]);
    quiet().await;
    assert_eq!((run.queue.depth(), run.store.fetching.started()), ((4, 0), 2), "none is taken");
    run.sink.stuck.send_replace(false);
    run.sink.gate.open();
    run.finished().await;
    let mut ids = run.sink.ids();
    ids.sort();
    assert_eq!(ids, ["a", "b", "c", "d"]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_meanwhile_changes_nothing() {
    let _clock = ticking();
    let outage = std::sync::Arc::new(angler_core::outage_detector::Outage::default());
    let mut rig = Rig::default();
    rig.outage = Some(std::sync::Arc::clone(&outage));
    let mut run = rig.start();
    run.job("before", &["9,0,0"]);
    until("it is done", || run.sink.ids().len() == 1).await;
    run.store.away.store(true, Ordering::SeqCst);
    for number in 0..5 {
        run.job(&number.to_string(), &["9,0,0"]);
    }
    outage.began().await;
    run.sink.stuck.send_replace(true);
    run.store.away.store(false, Ordering::SeqCst);
    outage.over().await;
    quiet().await;
    assert_eq!(run.sink.ids().len(), 1, "none is taken yet");
    run.sink.stuck.send_replace(false);
    run.finished().await;
    assert_eq!(run.sink.ids().len(), 6);
}
