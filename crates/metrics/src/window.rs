//! The last minute: numbers of then beside numbers of now.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use strum::EnumCount;

use super::{CloseReason, ImageEnd, JobEnd, Stage};

/// How far back is looked.
const SPAN: Duration = Duration::from_secs(60);

/// What was counted up to a moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// In the order of [`JobEnd`].
    pub jobs: [u64; JobEnd::COUNT],
    /// In the order of [`ImageEnd`].
    pub images: [u64; ImageEnd::COUNT],
    /// Batches in the order of [`CloseReason`].
    pub batches: [u64; CloseReason::COUNT],
    /// Images in them.
    pub batch_images: f64,
    /// Seconds in the order of [`Stage`].
    pub steps: [f64; Stage::COUNT],
    /// How long decoders held their place only because there was no frame.
    pub frame_waits: Duration,
    /// Seconds that all sessions worked.
    pub busy_seconds: f64,
    /// Jobs that took at most so many seconds.
    pub job_buckets: Vec<(f64, u64)>,
    /// Jobs that ended with a result.
    pub ended_jobs: u64,
    /// Encoded bytes.
    pub fetched_bytes: u64,
}

/// Snapshots of the last minute, added now and then.
#[derive(Debug, Default)]
pub struct Window(VecDeque<(Instant, Snapshot)>);

impl Window {
    /// Adds one, and forgets those that are too old; one of a minute ago stays.
    pub fn add(&mut self, at: Instant, snapshot: Snapshot) {
        self.0.push_back((at, snapshot));
        while self.0.get(1).is_some_and(|(second, _)| at.duration_since(*second) >= SPAN) {
            self.0.pop_front();
        }
    }

    /// What happened between the oldest and now.
    pub fn until(&self, at: Instant, now: &Snapshot) -> Minute {
        let nothing = (at, now.clone());
        let (since, then) = self.0.front().unwrap_or(&nothing);
        Minute::between(then, now, at.saturating_duration_since(*since))
    }
}

/// What happened in a time of about a minute, or since the start if that is less.
#[derive(Debug, Clone, PartialEq)]
pub struct Minute {
    /// How long it was.
    pub seconds: f64,
    /// Jobs that ended with a result.
    pub jobs: u64,
    /// Images in the order of [`ImageEnd`].
    pub images: [u64; ImageEnd::COUNT],
    /// Batches by why they closed.
    pub batches: [u64; CloseReason::COUNT],
    /// Images in a batch, on average.
    pub mean_batch: Option<f64>,
    /// Image-seconds in the order of [`Stage`].
    pub steps: [f64; Stage::COUNT],
    /// Seconds that all sessions worked.
    pub busy_seconds: f64,
    /// Encoded bytes.
    pub fetched_bytes: u64,
    /// How long jobs took; none if none ended.
    pub latency: Option<Latency>,
    decoders_blocked: f64,
}

/// How long jobs took, in seconds, read off buckets: between their bounds a straight line is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    /// Half of the jobs were faster.
    pub p50: f64,
    /// One of a hundred was slower.
    pub p99: f64,
}

impl Minute {
    fn between(then: &Snapshot, now: &Snapshot, time: Duration) -> Self {
        let batches: [u64; CloseReason::COUNT] = difference(&then.batches, &now.batches);
        let count: u64 = batches.iter().sum();
        let mut steps = now.steps;
        steps.iter_mut().zip(then.steps).for_each(|(now, then)| *now = (*now - then).max(0.0));
        // Without the bucket of those that took longer than the last bound.
        let mut buckets = now.job_buckets.clone();
        buckets.iter_mut().zip(&then.job_buckets).for_each(|(n, t)| n.1 = n.1.saturating_sub(t.1));
        let jobs = now.ended_jobs.saturating_sub(then.ended_jobs);
        let latency = (jobs > 0).then(|| Latency {
            p50: quantile(&buckets, jobs, 0.5),
            p99: quantile(&buckets, jobs, 0.99),
        });
        Self {
            seconds: time.as_secs_f64(),
            jobs,
            images: difference(&then.images, &now.images),
            batches,
            mean_batch: (count > 0).then(|| (now.batch_images - then.batch_images) / count as f64),
            steps,
            busy_seconds: (now.busy_seconds - then.busy_seconds).max(0.0),
            fetched_bytes: now.fetched_bytes.saturating_sub(then.fetched_bytes),
            latency,
            decoders_blocked: now.frame_waits.saturating_sub(then.frame_waits).as_secs_f64(),
        }
    }

    /// Something a second.
    pub fn rate(&self, count: u64) -> f64 {
        if self.seconds > 0.0 { count as f64 / self.seconds } else { 0.0 }
    }

    /// The share of the images' time that each step took, in the order of [`Stage`]; none if no
    /// time went by.
    pub fn shares(&self) -> Option<[f64; Stage::COUNT]> {
        let all: f64 = self.steps.iter().sum();
        (all > 0.0).then(|| self.steps.map(|seconds| seconds / all))
    }

    /// What most of the images' time is spent on: `fetch`, `decode`, `engine` or `publish`.
    ///
    /// A decoder keeps its place until there is a frame for its image, so that images wait for
    /// decoders when the engine is what is slow. Their time in that queue is divided as the decoders'
    /// own time is: decoding, or blocked by the engine.
    pub fn waits_for(&self) -> Option<&'static str> {
        let of = |stage: Stage| self.steps[stage as usize];
        let decoders = of(Stage::Decode) + self.decoders_blocked;
        let blocked = if decoders > 0.0 { self.decoders_blocked / decoders } else { 0.0 };
        let queue = of(Stage::Queue);
        let engine = of(Stage::Wait) + of(Stage::Embed) + of(Stage::Score) + queue * blocked;
        let most = [
            ("fetch", of(Stage::Fetch)),
            ("decode", of(Stage::Decode) + queue * (1.0 - blocked)),
            ("engine", engine),
            ("publish", of(Stage::Publish)),
        ]
        .into_iter()
        .max_by(|a, b| a.1.total_cmp(&b.1))?;
        (most.1 > 0.0).then_some(most.0)
    }
}

fn difference<const N: usize>(then: &[u64; N], now: &[u64; N]) -> [u64; N] {
    let mut difference = *now;
    difference.iter_mut().zip(then).for_each(|(now, then)| *now = now.saturating_sub(*then));
    difference
}

/// Where that share of `count` values lies. `buckets` count what is at most their bound; what is
/// beyond the last bound is taken to be there.
fn quantile(buckets: &[(f64, u64)], count: u64, share: f64) -> f64 {
    let rank = share * count as f64;
    let (mut lower, mut below) = (0.0, 0);
    for (upper, within) in buckets {
        if *within as f64 >= rank && *within > below {
            return lower + (upper - lower) * (rank - below as f64) / (within - below) as f64;
        }
        (lower, below) = (*upper, *within);
    }
    lower
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> (Snapshot, Instant) {
        let start = Instant::now();
        (Snapshot::default(), start + Duration::from_secs(seconds))
    }

    #[test]
    fn quantiles_lie_between_bounds() {
        let buckets = [(1.0, 50), (2.0, 90), (4.0, 98)];
        assert!((quantile(&buckets, 100, 0.5) - 1.0).abs() < 1e-9);
        assert!((quantile(&buckets, 100, 0.7) - 1.5).abs() < 1e-9);
        assert!((quantile(&buckets, 100, 0.94) - 3.0).abs() < 1e-9);
        assert!((quantile(&buckets, 100, 0.99) - 4.0).abs() < 1e-9, "beyond the last bound");
        assert!((quantile(&[(1.0, 0), (2.0, 4)], 4, 0.5) - 1.5).abs() < 1e-9, "none in the first");
    }

    #[test]
    fn rates_are_of_the_last_minute_and_older_ones_are_forgotten() {
        let mut window = Window::default();
        let (nothing, start) = at(0);
        for seconds in 0..300 {
            let images = [10 * seconds, 0, seconds];
            let moment = start + Duration::from_secs(seconds);
            window.add(moment, Snapshot { images, ..nothing.clone() });
        }
        assert!(window.0.len() <= 62, "{}", window.0.len());
        let now = Snapshot { images: [3000, 0, 300], ..nothing.clone() };
        let minute = window.until(start + Duration::from_secs(300), &now);
        assert!((60.0..=62.0).contains(&minute.seconds), "{}", minute.seconds);
        assert!((minute.rate(minute.images[0]) - 10.0).abs() < 1e-9);
        assert_eq!((minute.latency, minute.mean_batch), (None, None));
        assert_eq!(Window::default().until(start, &now).images, [0; 3]);
    }

    #[test]
    fn the_queue_before_the_decoders_is_the_fault_of_whom_they_wait_for() {
        let minute = |steps: [f64; Stage::COUNT], blocked: u64| {
            let (then, moment) = at(0);
            let mut window = Window::default();
            window.add(moment, then.clone());
            let frame_waits = Duration::from_secs(blocked);
            let now = Snapshot { steps, frame_waits, ..then };
            window.until(moment + Duration::from_secs(1), &now)
        };
        // fetch, queue, decode, wait, embed, score, publish
        assert_eq!(minute([1.0, 50.0, 9.0, 2.0, 3.0, 0.0, 0.0], 0).waits_for(), Some("decode"));
        assert_eq!(minute([1.0, 50.0, 9.0, 2.0, 3.0, 0.0, 0.0], 90).waits_for(), Some("engine"));
        assert_eq!(minute([9.0, 1.0, 1.0, 2.0, 3.0, 0.0, 0.0], 0).waits_for(), Some("fetch"));
        assert_eq!(minute([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0], 0).waits_for(), Some("publish"));
        assert_eq!(minute([0.0; 7], 0).waits_for(), None);
        let shares = minute([1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0], 0).shares().unwrap();
        assert!((shares[3] - 0.5).abs() < 1e-9);
    }
}
