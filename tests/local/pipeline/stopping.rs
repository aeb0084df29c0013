//! How a worker ends: told to, or because it cannot go on. No job is lost by it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use angler_core::source::{Delivery, JobSource, Settlement};
use angler_inference::embed::fake::FakeEmbedder;
use angler_wire::error::FatalError;

use super::rig::*;

#[tokio::test(start_paused = true)]
async fn a_job_that_is_being_admitted_when_the_stop_comes_goes_back() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.images_in_flight = 3;
    let mut run = rig.start();
    run.store.gate.shut();
    run.job("small", &["9,0,0"]);
    run.job("large", &["0,9,0", "0,9,0", "0,9,0", "0,9,0"]);
    run.job("next", &["0,0,9"]);
    until("the places are taken", || run.store.fetching.now() == 3).await;
    run.stop.cancel();
    until("the large one's images are given up", || run.store.fetching.now() == 1).await;
    run.store.gate.open();
    run.ended().await.unwrap();
    assert_eq!(run.sink.ids(), ["small"]);
    let settled = run.settled();
    assert_eq!(settled.len(), 2);
    assert!(settled.contains(&("large".to_owned(), Settlement::Requeue)));
    assert!(settled.contains(&("small".to_owned(), Settlement::Ack)));
    assert_eq!(run.queue.depth(), (2, 0));
    assert_eq!(run.store.fetching.started(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_is_admitted_and_takes_nothing_new() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.jobs_in_flight = 2;
    let mut run = rig.start();
    run.store.gate.shut();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0", "0,9,0"]);
    }
    until("two are admitted", || run.store.fetching.now() == 4).await;
    run.stop.cancel();
    quiet().await;
    assert!(run.sink.ids().is_empty());
    run.store.gate.open();
    run.ended().await.unwrap();
    assert_eq!(verdicts(&run.result("a")), ["red", "green"]);
    assert_eq!(verdicts(&run.result("b")), ["red", "green"]);
    assert_eq!(run.queue.depth(), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_outlasts_the_grace_period_is_an_error_and_loses_nothing() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.grace = Duration::from_secs(30);
    let mut run = rig.start();
    run.job("done", &["9,0,0"]);
    until("one is done", || run.queue.settled().len() == 1).await;
    run.job("a", &["stuck"]);
    run.job("b", &["9,0,0", "stuck"]);
    until("the others are admitted", || run.store.fetching.started() == 4).await;
    run.stop.cancel();
    quiet().await;
    tokio::time::advance(Duration::from_secs(29)).await;
    quiet().await;
    assert_eq!(run.queue.depth(), (0, 2), "given up too early");
    tokio::time::advance(Duration::from_secs(2)).await;
    let error = run.ended().await.unwrap_err();
    assert!(matches!(error, FatalError::DrainTimedOut { jobs: 2, seconds: 30 }), "{error}");
    assert_eq!(run.sink.ids(), ["done"]);
    assert_eq!(run.queue.depth(), (2, 0), "what is not settled comes back");
    assert_eq!(run.settled().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_back_end_that_breaks_ends_the_worker_and_its_jobs_come_back() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.embedder = FakeEmbedder { breaks_on: Some(200), ..FakeEmbedder::new(3) };
    rig.policy.max_batch = 2;
    rig.policy.linger = LONG;
    let mut run = rig.start();
    run.job("stuck", &["stuck"]);
    run.job("a", &["9,0,0"]);
    run.job("b", &["200,0,0", "not_found"]);
    let error = run.ended().await.unwrap_err();
    assert!(
        matches!(&error, FatalError::Engine(why) if why.to_string().contains("broke")),
        "{error}"
    );
    assert!(run.sink.ids().is_empty(), "something was said of a job that nothing is known of");
    assert_eq!(run.queue.depth(), (3, 0), "all come back");
    for (id, how) in run.settled() {
        assert_eq!(how, Settlement::Requeue, "{id}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_back_end_that_breaks_during_an_admission_or_a_drain_ends_the_worker_too() {
    let _clock = Frozen::clock();
    for draining in [false, true] {
        let mut rig = Rig::default();
        rig.embedder = FakeEmbedder { breaks_on: Some(200), ..FakeEmbedder::new(3) };
        rig.limits.images_in_flight = if draining { 9 } else { 2 };
        let hold = rig.hold_engine();
        let mut run = rig.start();
        run.job("a", &["200,0,0", "stuck", "9,0,0", "9,0,0"]);
        until("the engine is at work", || run.batches().len() == 1).await;
        if draining {
            run.stop.cancel();
            quiet().await;
        }
        drop(hold);
        let error = run.ended().await.unwrap_err();
        assert!(matches!(error, FatalError::Engine(_)), "draining {draining}: {error}");
        assert!(run.sink.ids().is_empty());
        assert_eq!(run.queue.depth(), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_is_gone_ends_the_worker_and_its_jobs_come_back() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.sink.broken = true;
    let mut run = rig.start();
    run.job("a", &["9,0,0"]);
    let error = run.ended().await.unwrap_err();
    assert!(matches!(error, FatalError::Sink(_)), "{error}");
    assert_eq!((run.queue.depth(), run.settled()), ((1, 0), vec![]));
}

/// Hands on what it receives and keeps the tokens that say that a delivery is lost.
struct Tapped {
    inner: Box<dyn JobSource>,
    lost: Arc<Mutex<Vec<CancellationToken>>>,
}

#[async_trait]
impl JobSource for Tapped {
    async fn receive(&mut self) -> Result<Option<Delivery>, FatalError> {
        let delivery = self.inner.receive().await?;
        self.lost.lock().unwrap().extend(delivery.iter().map(|d| d.lost.clone()));
        Ok(delivery)
    }

    async fn stop(&mut self) {
        self.inner.stop().await;
    }

    async fn close(&mut self) {
        self.inner.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_delivery_whose_connection_is_gone_is_let_go_and_done_when_it_comes_again() {
    let _clock = Frozen::clock();
    let lost = Arc::new(Mutex::new(Vec::<CancellationToken>::new()));
    let tokens = Arc::clone(&lost);
    let mut rig = Rig::default();
    rig.limits.images_in_flight = 3;
    let mut run = rig.start_with(|inner| Box::new(Tapped { inner, lost: tokens }));
    run.store.gate.shut();
    run.job("admitted", &["9,0,0"]);
    run.job("half-way", &["0,9,0", "0,9,0", "0,9,0"]);
    until("the places are taken", || run.store.fetching.now() == 3).await;
    quiet().await;
    for token in lost.lock().unwrap().drain(..) {
        token.cancel();
    }
    until("both are taken anew", || run.store.fetching.started() == 6).await;
    assert!(run.sink.ids().is_empty());
    run.store.gate.open();
    run.finished().await;
    assert_eq!(verdicts(&run.result("admitted")), ["red"]);
    assert_eq!(verdicts(&run.result("half-way")), ["green"; 3]);
    // Not given back as well: it would come twice.
    let settled = run.settled();
    assert!(
        settled.len() == 2 && settled.iter().all(|(_, how)| *how == Settlement::Ack),
        "{settled:?}"
    );
}
