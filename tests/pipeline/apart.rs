//! Suspects: jobs that a worker held when it ended run alone.

use angler::source::JobSource;
use angler::source::memory::MemoryQueue;
use serde_json::json;

use super::rig::*;

fn job(id: &str, images: usize) -> String {
    json!({"id": id, "images": vec!["9,0,0"; images], "classes": "colours"}).to_string()
}

/// Makes suspects of these jobs: a worker takes them and dies.
async fn die_with(queue: &MemoryQueue, jobs: impl IntoIterator<Item = String>) {
    let mut source = queue.source(JOB_LIMITS);
    for job in jobs {
        queue.push(job);
        drop(source.receive().await.unwrap().unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspect_runs_alone_and_a_few_images_at_a_time() {
    let _clock = Frozen::clock();
    let queue = MemoryQueue::with_suspects();
    die_with(&queue, [job("suspect", 10)]).await;
    let mut rig = Rig::default();
    rig.queue = queue;
    let mut run = rig.start();
    run.store.gate.shut();
    for id in ["a", "b", "c"] {
        run.job(id, &["0,9,0"; 3]);
    }
    until("the suspect is at work", || run.store.fetching.now() == 4).await;
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
    run.job("late", &["0,9,0"]);
    until("the third is, too", || run.store.fetching.now() == 3).await;
    die_with(&queue, [job("suspect", 1), job("another", 1)]).await;
    quiet().await;
    // They wait, and nothing new is begun.
    assert_eq!(run.queue.depth(), (2, 3));
    run.job("later", &["0,9,0"]);
    run.store.gate.let_pass(2);
    until("two are done", || run.sink.ids().len() == 2).await;
    quiet().await;
    assert_eq!(run.store.fetching.started(), 3, "one job is still in flight");
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
        if working {
            until("the suspect is at work", || run.store.fetching.now() == 1).await;
        }
        quiet().await;
        run.stop.cancel();
        run.store.gate.open();
        run.ended().await.unwrap();
        assert_eq!(run.sink.ids(), [if working { "suspect" } else { "a" }]);
        assert_eq!(run.queue.depth(), (usize::from(!working), 0));
    }
}
