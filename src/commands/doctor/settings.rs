//! Settings that can be used, and still contradict each other.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use angler_inference::embed::BackendChoice;

use super::report::Check;
use crate::config::{DEFAULT_FILE, Settings};

/// The prefix of the environment's settings.
const PREFIX: &str = "ANGLER__";

/// Where the settings come from, and what does not go together.
pub(super) fn check(settings: &Settings, file: Option<&Path>) -> Vec<Check> {
    let names: Vec<String> =
        std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    let mut checks = vec![sources(file, &names)];
    checks.extend(unread(&names));
    checks.extend(names_twice(settings));
    checks.extend(contradictions(settings));
    checks
}

fn sources(file: Option<&Path>, names: &[String]) -> Check {
    let mut from = vec!["built-in defaults".to_owned()];
    match file {
        Some(path) => from.push(path.display().to_string()),
        None if Path::new(DEFAULT_FILE).exists() => from.push(DEFAULT_FILE.to_owned()),
        None => {}
    }
    // Only names: values may be secret.
    let mut set: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| name.starts_with(PREFIX)).collect();
    set.sort_unstable();
    from.extend(set.into_iter().map(str::to_owned));
    Check::ok("sources", from.join(", "))
}

/// Variables that look like settings and are none: one underscore is missing.
fn unread(names: &[String]) -> Vec<Check> {
    const SECTIONS: [&str; 10] = [
        "MODEL", "EMBEDDER", "CLASSES", "AMQP", "S3", "LIMITS", "RETRY", "HTTP", "SHUTDOWN", "LOG",
    ];
    let meant = |name: &String| {
        let (section, key) =
            name.strip_prefix("ANGLER_")?.trim_start_matches('_').split_once('_')?;
        let key = key.trim_start_matches('_');
        let right = format!("{PREFIX}{section}__{key}");
        (SECTIONS.contains(&section) && right != *name).then_some((name.clone(), right))
    };
    let wrong = names.iter().filter(|name| !name.starts_with(PREFIX)).filter_map(meant);
    wrong
        .map(|(name, right)| {
            Check::warning(
                name.clone(),
                "is in the environment and is not read",
                format!("Two underscores separate the parts: {right}."),
            )
        })
        .collect()
}

fn names_twice(settings: &Settings) -> Vec<Check> {
    let mut uses: BTreeMap<String, usize> = BTreeMap::new();
    let amqp = &settings.amqp;
    let own = amqp.jobs_queue.iter().flat_map(|lane| {
        let shared = [&amqp.results_queue, &amqp.dead_queue];
        let mut names = settings.topology_of(lane).queue_names();
        names.retain(|name| name == &lane.queue || !shared.contains(&name));
        names
    });
    for name in own.chain([amqp.results_queue.clone(), amqp.dead_queue.clone()]) {
        *uses.entry(name).or_default() += 1;
    }
    let twice = uses.into_iter().filter(|(_, count)| *count > 1);
    twice
        .map(|(name, _)| {
            Check::problem(
                "amqp",
                format!("two queues have the same name, {name}"),
                "Give amqp.jobs_queue, amqp.results_queue and amqp.dead_queue different names.",
            )
        })
        .collect()
}

/// Limits that defeat each other. None of them loses a job.
fn contradictions(settings: &Settings) -> Vec<Check> {
    let (limits, embedder) = (&settings.limits, &settings.embedder);
    let mut found = Vec::new();
    let mut warn = |name: &str, message: String, remedy: &str| {
        found.push(Check::warning(name, message, remedy));
    };
    let gpu = matches!(embedder.backend, BackendChoice::Cuda | BackendChoice::Tensorrt);
    let devices = if gpu { embedder.devices.len().max(1) } else { 1 };
    let at_once = embedder.max_batch.saturating_mul(devices);
    if limits.images_in_flight < at_once {
        let each = if devices > 1 { format!(" on {devices} devices") } else { String::new() };
        warn(
            "limits.images_in_flight",
            format!(
                "{} images in flight never fill a batch of embedder.max_batch = {}{each}",
                limits.images_in_flight, embedder.max_batch
            ),
            "Raise limits.images_in_flight to some batches, or lower embedder.max_batch.",
        );
    }
    if limits.bytes_in_flight / 2 < limits.image_bytes as usize {
        warn(
            "limits.bytes_in_flight",
            format!(
                "{} bytes hold only one image of limits.image_bytes = {} at a time",
                limits.bytes_in_flight, limits.image_bytes
            ),
            "Raise limits.bytes_in_flight, or lower limits.image_bytes.",
        );
    }
    if limits.image_seconds > limits.job_seconds {
        warn(
            "limits.image_seconds",
            format!(
                "an image may take {} s, but its whole job only limits.job_seconds = {}",
                limits.image_seconds, limits.job_seconds
            ),
            "Lower limits.image_seconds, or raise limits.job_seconds.",
        );
    }
    if limits.stall_seconds < limits.image_seconds {
        warn(
            "limits.stall_seconds",
            format!(
                "/livez turns red after {} s without progress, before an image's own time of \
                 limits.image_seconds = {} is over",
                limits.stall_seconds, limits.image_seconds
            ),
            "Raise limits.stall_seconds above limits.image_seconds: a worker that is only slow \
             would be restarted.",
        );
    }
    // "s3://b/k", is as short as an image can be named.
    if limits.message_bytes / limits.images_per_job < 11 {
        warn(
            "limits.message_bytes",
            format!(
                "{} bytes cannot name limits.images_per_job = {} images",
                limits.message_bytes, limits.images_per_job
            ),
            "Raise limits.message_bytes, or lower limits.images_per_job.",
        );
    }
    if settings.retry.max_attempts > 1 && settings.retry.delays_seconds.is_empty() {
        warn(
            "retry.delays_seconds",
            format!(
                "is empty, so nothing is tried again although retry.max_attempts = {}",
                settings.retry.max_attempts
            ),
            "Name a delay, or set retry.max_attempts = 1.",
        );
    }
    let grace = settings.shutdown.grace_seconds;
    if grace == 0 {
        warn(
            "shutdown.grace_seconds",
            "is 0: a worker that stops finishes nothing, and all its jobs begin anew elsewhere"
                .to_owned(),
            "Raise it to what some batches take.",
        );
    } else if Duration::from_secs(grace).as_secs_f64() > limits.job_seconds {
        warn(
            "shutdown.grace_seconds",
            format!(
                "a drain may take {grace} s, but no job takes longer than limits.job_seconds = {}",
                limits.job_seconds
            ),
            "Lower shutdown.grace_seconds to limits.job_seconds at most: what is not done by then \
             does not move, and holds up the stop.",
        );
    }
    found
}
