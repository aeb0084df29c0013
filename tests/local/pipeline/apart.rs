//! Suspects: jobs that workers held when they died run alone, on one worker at a time.

use std::time::Duration;

use serde_json::json;
use tokio::time::advance;

use angler_core::source::JobSource;
use angler_core::source::memory::MemoryQueue;

use super::rig::*;

fn job(id: &str, images: usize) -> String {
    json!({"id": id, "images": vec!["9,0,0"; images], "classes": "colours"}).to_string()
}

/// Makes suspects of these jobs: two workers take them, one after the other, and die.
async fn die_with(queue: &MemoryQueue, jobs: impl IntoIterator<Item = String>) {
    let mut source = queue.source(JOB_LIMITS);
    for job in jobs {
        queue.push(job);
        drop(source.receive().await.unwrap().unwrap());
        drop(source.receive().await.unwrap().unwrap());
    }
}

/// More than any worker waits before it asks for the turn.
const DUE: Duration = Duration::from_secs(7);

#[tokio::test(start_paused = true)]
async fn a_suspect_runs_alone_and_a_few_images_at_a_time() {
    let _clock = Frozen::clock();
    let queue = MemoryQueue::with_suspects();
    die_with(&queue, [job("suspect", 10)]).await;
    let mut rig = Rig::default();
    rig.queue = queue;
    let mut run = rig.start();
    run.store.gate.shut();
    quiet().await;
    advance(DUE).await;
    until("the suspect is at work", || run.store.fetching.now() == 4).await;
    for id in ["a", "b", "c"] {
        run.job(id, &["0,9,0"; 3]);
    }
    quiet().await;
    assert_eq!((run.store.fetching.started(), run.queue.depth()), (4, (3, 1)));
    run.store.gate.let_pass(10);
    until("the others come", || run.store.fetching.started() == 19).await;
    assert_eq!(run.sink.ids(), ["suspect"]);
    run.store.gate.open();
    run.finished().await;
    assert_eq!(run.sink.ids().len(), 4);
    assert_eq!(verdicts(&run.result("suspect")), ["red"; 10]);
}

#[tokio::test(start_paused = true)]
async fn a_suspect_is_not_taken_while_other_jobs_are_in_flight() {
    let _clock = Frozen::clock();
    let queue = MemoryQueue::with_suspects();
    let mut rig = Rig::default();
    rig.queue = queue.clone();
    let mut run = rig.start();
    run.store.gate.shut();
    for id in ["a", "b"] {
        run.job(id, &["0,9,0"]);
    }
    until("both are at work", || run.store.fetching.now() == 2).await;
    die_with(&queue, [job("suspect", 1), job("another", 1)]).await;
    run.job("late", &["0,9,0"]);
    until("jobs are still begun", || run.store.fetching.now() == 3).await;
    quiet().await;
    advance(DUE).await;
    quiet().await;
    run.job("later", &["0,9,0"]);
    run.store.gate.let_pass(2);
    until("two are done", || run.sink.ids().len() == 2).await;
    quiet().await;
    assert_eq!(run.store.fetching.started(), 3, "one job is still in flight");
    assert_eq!(run.queue.depth(), (3, 1), "nothing new is begun");
    run.store.gate.let_pass(1);
    until("a suspect is at work", || run.store.fetching.started() == 4).await;
    quiet().await;
    assert_eq!((run.store.fetching.now(), run.queue.depth()), (1, (2, 1)));
    run.store.gate.open();
    run.finished().await;
    let ids = run.sink.ids();
    assert_eq!(ids.len(), 6);
    assert_eq!(ids[3..5], ["suspect", "another"], "one after the other: {ids:?}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_jobs_do_not_end_gives_the_turn_up_and_begins_others() {
    let _clock = Frozen::clock();
    let queue = MemoryQueue::with_suspects();
    let mut rig = Rig::default();
    rig.queue = queue.clone();
    let mut run = rig.start();
    run.store.gate.shut();
    run.job("long", &["0,9,0"]);
    until("it is at work", || run.store.fetching.now() == 1).await;
    die_with(&queue, [job("suspect", 1)]).await;
    quiet().await;
    advance(DUE).await;
    quiet().await;
    run.job("next", &["0,9,0"]);
    quiet().await;
    assert_eq!(run.store.fetching.started(), 1, "it waits for the long one");
    advance(Duration::from_secs(31)).await;
    until("the next one is begun", || run.store.fetching.now() == 2).await;
    let mut other = queue.source(JOB_LIMITS);
    assert!(other.take_turn().await, "another worker may have the turn");
    drop(other);
    run.store.gate.open();
    until("both are done", || run.sink.ids().len() == 2).await;
    quiet().await;
    advance(Duration::from_secs(31)).await;
    quiet().await;
    advance(DUE).await;
    until("the suspect is done", || run.sink.ids().len() == 3).await;
    run.finished().await;
}

#[tokio::test(start_paused = true)]
async fn while_one_worker_runs_a_suspect_the_others_take_jobs() {
    let _clock = Frozen::clock();
    let queue = MemoryQueue::with_suspects();
    die_with(&queue, [job("suspect", 1), job("another", 1)]).await;
    let start = || {
        let mut rig = Rig::default();
        rig.queue = queue.clone();
        rig.start()
    };
    let mut first = start();
    first.store.gate.shut();
    quiet().await;
    advance(DUE).await;
    until("a suspect is at work", || first.store.fetching.now() == 1).await;
    let mut second = start();
    for number in 0..50 {
        second.job(&number.to_string(), &["0,9,0"]);
        quiet().await;
        advance(Duration::from_secs(1)).await;
    }
    until("all others are done", || second.sink.ids().len() == 50).await;
    assert_eq!((first.sink.ids().len(), queue.depth()), (0, (1, 1)));
    first.store.gate.open();
    until("the suspect is done", || first.sink.ids() == ["suspect"]).await;
    // Its stretch is over: jobs come first, and then the other one runs, on either worker.
    for _ in 0..30 {
        quiet().await;
        advance(Duration::from_secs(1)).await;
    }
    until("both are done", || first.sink.ids().len() + second.sink.ids().len() == 52).await;
    first.finished().await;
    second.ended().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_a_suspect_waits_for_its_turn_or_works_loses_nothing() {
    for working in [false, true] {
        let _clock = Frozen::clock();
        let queue = MemoryQueue::with_suspects();
        let mut rig = Rig::default();
        rig.queue = queue.clone();
        let mut run = rig.start();
        run.store.gate.shut();
        if !working {
            run.job("a", &["0,9,0"]);
            until("it is at work", || run.store.fetching.now() == 1).await;
        }
        die_with(&queue, [job("suspect", 1)]).await;
        quiet().await;
        advance(DUE).await;
        if working {
            until("the suspect is at work", || run.store.fetching.now() == 1).await;
        }
        quiet().await;
        run.stop.cancel();
        run.store.gate.open();
        run.ended().await.unwrap();
        assert_eq!(run.sink.ids(), [if working { "suspect" } else { "a" }]);
        assert_eq!(run.queue.depth(), (usize::from(!working), 0));
        assert!(queue.source(JOB_LIMITS).take_turn().await, "the turn is free");
    }
}
