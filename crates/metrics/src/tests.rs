//! Every name can be made, closed sets are there from the start, and what is off stays at zero.

use super::*;

fn text(metrics: &Metrics) -> String {
    prometheus::TextEncoder::new().encode_to_string(&metrics.gather()).unwrap()
}

#[test]
fn every_end_is_counted_under_its_name() {
    let ends = [
        JobEnd::Done,
        JobEnd::Failed,
        JobEnd::DeadLettered(FailureCode::MalformedJob),
        JobEnd::Retried,
        JobEnd::Requeued,
        JobEnd::Lost,
    ];
    assert_eq!(ends.len(), JobEnd::COUNT);
    for end in ends {
        let metrics = Arc::new(Metrics::default());
        let name = metrics.job().ended(end);
        let counted = format!("angler_jobs_total{{outcome=\"{name}\"}} 1");
        assert!(text(&metrics).contains(&counted), "{counted}");
    }
}

#[test]
fn closed_sets_are_there_before_anything_happens() {
    let text = text(&Metrics::default());
    for line in [
        "angler_jobs_total{outcome=\"dead_lettered\"} 0",
        "angler_job_failures_total{code=\"retries_exhausted\"} 0",
        "angler_image_errors_total{code=\"storage_unavailable\"} 0",
        "angler_step_seconds_count{step=\"publish\"} 0",
        "angler_batches_total{reason=\"linger\"} 0",
        "angler_dead_letters_total{reason=\"malformed_job\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
}

#[test]
fn what_is_recorded_counts_once_and_in_its_place() {
    let metrics = Arc::new(Metrics::default());
    let job = metrics.job();
    let image = metrics.image();
    assert_eq!(metrics.in_flight(), (1, 1));
    metrics.step_of(Stage::Embed, Duration::from_millis(3), 4);
    metrics.image_failed("j", "s3://b/k", &ImageError::new(ImageErrorCode::TooLarge, "large"));
    let failure = Failure::new(FailureCode::RetriesExhausted, "no more");
    metrics.job_failed("j", &failure);
    job.ended(JobEnd::DeadLettered(failure.code));
    drop((job, image));
    assert_eq!(metrics.in_flight(), (0, 0));
    metrics.limit_batches(32);
    metrics.limit_batches(8);
    metrics.limit_batches(16);
    let text = text(&metrics);
    for line in [
        "angler_step_seconds_bucket{step=\"embed\",le=\"0.0025\"} 0",
        "angler_step_seconds_bucket{step=\"embed\",le=\"0.005\"} 4",
        "angler_image_errors_total{code=\"too_large\"} 1",
        "angler_jobs_total{outcome=\"dead_lettered\"} 1",
        "angler_jobs_total{outcome=\"failed\"} 0",
        "angler_job_failures_total{code=\"retries_exhausted\"} 1",
        "angler_dead_letters_total{reason=\"retries_exhausted\"} 1",
        "angler_job_seconds_count 1",
        "angler_batch_limit 8",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    assert_eq!(metrics.recent().len(), 2);
}

#[test]
fn a_cancelled_run_counts_and_drives_out_no_error() {
    let metrics = Metrics::default();
    metrics.job_failed("j", &Failure::new(FailureCode::RetriesExhausted, "no more"));
    (0..100).for_each(|_| metrics.job_failed("j", &Failure::new(FailureCode::Cancelled, "run r")));
    assert_eq!(metrics.recent().len(), 1);
    let line = "angler_job_failures_total{code=\"cancelled\"} 100";
    assert!(text(&metrics).contains(line));
}

#[test]
fn what_is_off_records_nothing() {
    let metrics = Arc::new(Metrics::off());
    let job = metrics.job();
    metrics.step_of(Stage::Embed, Duration::from_millis(3), 4);
    metrics.classified(true);
    job.ended(JobEnd::Done);
    let snapshot = metrics.snapshot();
    assert_eq!((snapshot.images, snapshot.jobs), ([0; 3], [0; 6]));
    assert_eq!(metrics.clock().spent(), Duration::ZERO);
}
