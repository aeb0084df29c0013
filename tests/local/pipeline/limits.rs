//! Everything is bounded: what is in flight is counted, what takes too long is cut off.

use std::time::Duration;

use angler_core::source::Settlement;
use angler_wire::error::ImageErrorCode;

use super::rig::*;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn images_in_flight_are_as_many_as_allowed_and_not_one_more() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.images_in_flight = 5;
    let mut run = rig.start();
    run.store.gate.shut();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0", "0,9,0", "0,0,9", "9,0,0"]);
    }
    until("the places are taken", || run.store.fetching.now() == 5).await;
    quiet().await;
    assert_eq!(run.store.fetching.started(), 5);
    // The second job is being admitted; until it is, the third is left to other workers.
    assert_eq!(run.queue.depth(), (1, 2));

    // One ends, one comes after it.
    run.store.gate.let_pass(1);
    until("another image is started", || run.store.fetching.started() == 6).await;
    quiet().await;
    assert_eq!((run.store.fetching.started(), run.store.fetching.now()), (6, 5));

    run.store.gate.open();
    run.finished().await;
    assert_eq!((run.store.fetching.peak(), run.store.fetching.started()), (5, 12));
    for id in ["a", "b", "c"] {
        assert_eq!(verdicts(&run.result(id)), ["red", "green", "blue", "red"]);
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_that_wait_for_the_sink_hold_the_next_ones_back() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.jobs_in_flight = 3;
    let mut run = rig.start();
    run.sink.gate.shut();
    for number in 0..10 {
        run.job(&number.to_string(), &["9,0,0"]);
    }
    until("the sink is full", || run.sink.publishing.now() == 3).await;
    quiet().await;
    assert_eq!(run.queue.depth(), (7, 3));
    assert_eq!(run.store.fetching.started(), 3);
    assert!(run.settled().is_empty(), "settled before the result was safe");

    run.sink.gate.let_pass(1);
    until("one more job is taken", || run.sink.publishing.started() == 4).await;
    quiet().await;
    assert_eq!((run.queue.depth(), run.sink.publishing.now()), ((6, 3), 3));

    run.sink.gate.open();
    run.finished().await;
    assert_eq!((run.sink.publishing.peak(), run.sink.results().len()), (3, 10));
}

#[tokio::test(start_paused = true)]
async fn finished_jobs_that_wait_for_the_sink_hold_no_place_for_images() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.images_in_flight = 1;
    let mut run = rig.start();
    run.sink.gate.shut();
    for id in ["a", "b", "c"] {
        run.job(id, &["9,0,0", "0,9,0"]);
    }
    until("all wait for the sink", || run.sink.publishing.now() == 3).await;
    run.sink.gate.open();
    run.finished().await;
    assert_eq!(run.store.fetching.peak(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_never_fetched_times_out_alone() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.image_time = 10 * SECOND;
    rig.limits.images_in_flight = 1; // so that the first is done when the second begins
    let mut run = rig.start();
    run.job("a", &["9,0,0", "stuck", "0,9,0"]);
    until("the second is started", || run.store.fetching.started() == 2).await;
    tokio::time::advance(9 * SECOND).await;
    quiet().await;
    assert_eq!(run.store.fetching.now(), 1, "given up too early");
    tokio::time::advance(2 * SECOND).await;
    let result = run.only_result().await;
    assert_eq!(verdicts(&result), ["red", "timeout", "green"]);
    let message = message(&entries(&result)[1]);
    assert_eq!(message, "not fetched within 10 s (limits.image_seconds)");
    // What was given up took its time, too.
    assert_eq!((run.timed("fetch"), run.timed("decode"), run.timed("embed")), (3, 2, 2));
    // A slow image is not a reason to try the job again.
    assert_eq!(run.settled(), [("a".to_owned(), Settlement::Ack)]);
}

/// The runtime has one blocking thread, and the clock's guard sits on it: no decoder ever starts.
#[test]
fn an_image_that_is_not_decoded_in_time_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let _clock = Frozen::clock();
        let mut rig = Rig::default();
        rig.limits.image_time = 10 * SECOND;
        let mut run = rig.start();
        run.job("a", &["9,0,0"]);
        until("it was fetched", || {
            (run.store.fetching.started(), run.store.fetching.now()) == (1, 0)
        })
        .await;
        quiet().await;
        tokio::time::advance(11 * SECOND).await;
        let result = run.only_result().await;
        let message = message(&entries(&result)[0]);
        assert_eq!(message, "not decoded within 10 s (limits.image_seconds)");
    });
}

#[tokio::test(start_paused = true)]
async fn an_image_that_waits_too_long_for_the_engine_says_so() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.image_time = 10 * SECOND;
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("a", &["9,0,0"]);
    until("the engine has it", || run.batches() == [1]).await;
    quiet().await;
    tokio::time::advance(11 * SECOND).await;
    until("the result is there", || run.sink.ids() == ["a"]).await;
    drop(hold);
    let result = run.only_result().await;
    let message = message(&entries(&result)[0]);
    assert_eq!(message, "not classified within 10 s (limits.image_seconds)");
}

#[tokio::test(start_paused = true)]
async fn a_job_that_takes_too_long_ends_with_what_it_has() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.job_time = 20 * SECOND;
    rig.limits.images_in_flight = 1;
    let mut run = rig.start();
    run.job("a", &["9,0,0", "stuck"]);
    until("the stuck one is started", || run.store.fetching.started() == 2).await;
    tokio::time::advance(15 * SECOND).await;
    run.job("b", &["0,9,0"]); // waits for the place that the stuck image holds
    quiet().await;
    assert_eq!((run.queue.depth(), run.store.fetching.started()), ((0, 2), 2));
    tokio::time::advance(6 * SECOND).await;
    run.finished().await;
    let result = run.result("a");
    assert_eq!(verdicts(&result), ["red", "timeout"]);
    let message = message(&entries(&result)[1]);
    assert_eq!(message, "its job was not finished within 20 s (limits.job_seconds)");
    assert_eq!(verdicts(&run.result("b")), ["green"], "the stuck image was given up");
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_job_ends_its_admission_too() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.job_time = 20 * SECOND;
    rig.limits.images_in_flight = 2;
    let mut run = rig.start();
    // The third image never gets a place.
    run.job("a", &["stuck", "stuck", "9,0,0", "not_found"]);
    run.job("b", &["0,9,0"]); // is not even received before that
    until("the places are taken", || run.store.fetching.now() == 2).await;
    tokio::time::advance(21 * SECOND).await;
    run.finished().await;
    assert_eq!(verdicts(&run.result("a")), ["timeout"; 4]);
    assert_eq!(verdicts(&run.result("b")), ["green"]);
}

#[tokio::test(start_paused = true)]
async fn an_image_over_the_limits_is_told_so() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.image_bytes = 40; // a PNG's head alone has 33
    let mut run = rig.start();
    run.job("a", &["9,0,0", "garbage"]);
    let result = run.only_result().await;
    assert_eq!(verdicts(&result), ["too_large", "unsupported_format"]);
    assert!(message(&entries(&result)[0]).contains("limits.image_bytes"), "{result:?}");
    assert_eq!(ImageErrorCode::TooLarge.as_str(), "too_large");
}

#[tokio::test(start_paused = true)]
async fn images_that_wait_for_others_have_all_the_time_of_their_job() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.image_time = 10 * SECOND;
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("held", &["9,0,0"]);
    until("the engine is busy", || run.batches() == [1]).await;
    run.job("waits", &["0,9,0"; 60]);
    until("all are fetched", || {
        (run.store.fetching.started(), run.store.fetching.now()) == (61, 0)
    })
    .await;
    // An image that a thread still decodes would spend the time that follows.
    settled().await;
    tokio::time::advance(1000 * SECOND).await;
    until("the one that is being embedded is given up", || run.sink.ids() == ["held"]).await;
    drop(hold);
    run.finished().await;
    assert_eq!(verdicts(&run.result("held")), ["timeout"]);
    assert_eq!(verdicts(&run.result("waits")), ["green"; 60]);
}

#[tokio::test(start_paused = true)]
async fn of_its_batchs_time_an_image_spends_its_part() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.image_time = 10 * SECOND;
    rig.policy.linger = LONG;
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("a", &["9,0,0"; 8]);
    until("the engine has all", || run.batches() == [8]).await;
    quiet().await;
    tokio::time::advance(70 * SECOND).await;
    quiet().await;
    assert!(run.sink.ids().is_empty(), "10 s for each of 8");
    drop(hold);
    assert_eq!(verdicts(&run.only_result().await), ["red"; 8]);
}

#[tokio::test(start_paused = true)]
async fn images_whose_job_is_over_are_not_embedded() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.options.job_time = 20 * SECOND;
    let hold = rig.hold_engine();
    let mut run = rig.start();
    run.job("held", &["9,0,0"]);
    until("the engine is busy", || run.batches() == [1]).await;
    // More than a batch.
    run.job("over", &["0,9,0"; 12]);
    until("all are fetched", || {
        (run.store.fetching.started(), run.store.fetching.now()) == (13, 0)
    })
    .await;
    quiet().await;
    tokio::time::advance(21 * SECOND).await;
    until("both are over", || run.sink.ids().len() == 2).await;
    drop(hold);
    run.job("after", &["0,0,9"]);
    run.finished().await;
    assert_eq!(verdicts(&run.result("over")), ["timeout"; 12]);
    assert_eq!(verdicts(&run.result("after")), ["blue"]);
    assert_eq!(run.batches(), [1, 1], "only what somebody waits for");
}

#[tokio::test(start_paused = true)]
async fn images_in_flight_follow_the_rate_so_that_a_job_is_not_admitted_long_before_its_turn() {
    let _clock = Frozen::clock();
    let mut rig = Rig::default();
    rig.limits.images_at_least = 8;
    rig.options.job_time = 130 * SECOND;
    let mut run = rig.start();
    run.store.gate.shut();
    // Until the rate is known, the second job is admitted 64 s before its first image has its turn.
    let ids = ["a", "b", "c", "d"];
    for id in ids {
        run.job(id, &["9,0,0"; 100]);
    }
    while run.sink.ids() != ids {
        let before = (run.timed("embed"), run.sink.ids().len());
        tokio::time::advance(SECOND).await;
        run.store.gate.let_pass(1);
        until("an image or a job ends", || (run.timed("embed"), run.sink.ids().len()) != before)
            .await;
        quiet().await;
    }
    assert_eq!(run.store.fetching.peak(), 64);
    run.finished().await;
    for id in ["c", "d"] {
        assert_eq!(verdicts(&run.result(id)), ["red"; 100], "{id}");
    }
}
