//! What evaluating and comparing count with: shares with their uncertainty, histograms, the
//! distribution of a difference, and lists that keep only their worst entries.
//!
//! Nothing here grows with the number of images, and the order of the images changes no result but
//! the last digits of a mean.

use serde::Serialize;
use serde::ser::SerializeStruct;

/// The 97.5th percentile of the standard normal distribution: two-sided 95%.
const Z_95: f64 = 1.959_963_984_540_054;

/// How many of how many, and how sure that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// How many.
    pub count: u64,
    /// Of how many.
    pub of: u64,
}

impl Rate {
    /// `count` of `of`.
    pub fn new(count: u64, of: u64) -> Self {
        Self { count, of }
    }

    /// Counts one more, that is one or is not.
    pub fn add(&mut self, hit: bool) {
        self.count += u64::from(hit);
        self.of += 1;
    }

    /// The share in [0, 1]; none of nothing.
    pub fn share(&self) -> Option<f64> {
        (self.of > 0).then(|| self.count as f64 / self.of as f64)
    }

    /// The 95% score interval of the share (E. B. Wilson, "Probable inference, the law of
    /// succession, and statistical inference", JASA 22, 1927). Unlike the normal approximation it
    /// holds for shares near 0 and for small counts, which is what a low error rate is.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let share = self.share()?;
        let n = self.of as f64;
        let z2 = Z_95 * Z_95;
        let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z_95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
        // At the ends the formula is exact, its rounding is not.
        let low = if self.count == 0 { 0.0 } else { (centre - half).max(0.0) };
        let high = if self.count == self.of { 1.0 } else { (centre + half).min(1.0) };
        Some((low, high))
    }
}

/// `{"count", "of", "share", "low", "high"}`; the last three are null of nothing.
impl Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rate = serializer.serialize_struct("Rate", 5)?;
        rate.serialize_field("count", &self.count)?;
        rate.serialize_field("of", &self.of)?;
        rate.serialize_field("share", &self.share())?;
        rate.serialize_field("low", &self.interval().map(|i| i.0))?;
        rate.serialize_field("high", &self.interval().map(|i| i.1))?;
        rate.end()
    }
}

/// Counts in bins of equal width. What lies outside is counted in the nearest bin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Where the first bin begins.
    pub low: f32,
    /// Where the last bin ends.
    pub high: f32,
    /// How many lie in each; a value on a border belongs to the bin that begins there.
    pub bins: Vec<u64>,
}

impl Histogram {
    fn new(low: f32, high: f32, bins: usize) -> Self {
        Self { low, high, bins: vec![0; bins] }
    }

    /// Of cosine similarities: [-1, 1], 100 bins.
    pub fn of_scores() -> Self {
        Self::new(-1.0, 1.0, 100)
    }

    /// Of margins between two classes: [0, 1], 100 bins. Larger ones hardly occur.
    pub fn of_margins() -> Self {
        Self::new(0.0, 1.0, 100)
    }

    /// Counts a value.
    pub fn add(&mut self, value: f32) {
        let width = f64::from(self.high - self.low) / self.bins.len() as f64;
        // `as` carries what is below the first bin to 0.
        let bin = ((f64::from(value) - f64::from(self.low)) / width) as usize;
        let last = self.bins.len() - 1;
        self.bins[bin.min(last)] += 1;
    }

    /// How many values were counted.
    pub fn total(&self) -> u64 {
        self.bins.iter().sum()
    }

    /// About the value that this share of all values is below, right to the width of a bin: those in a
    /// bin are taken to be spread evenly. None of nothing.
    pub fn quantile(&self, share: f64) -> Option<f32> {
        let rank = share.clamp(0.0, 1.0) * self.total() as f64;
        let width = f64::from(self.high - self.low) / self.bins.len() as f64;
        let mut before = 0.0;
        for (bin, count) in self.bins.iter().enumerate().filter(|(_, count)| **count > 0) {
            let count = *count as f64;
            if before + count >= rank {
                let place = bin as f64 + (rank - before) / count;
                return Some((f64::from(self.low) + width * place) as f32);
            }
            before += count;
        }
        None
    }
}

/// Steps a unit of a [`Shift`]'s counts.
const STEPS: f64 = 4096.0;
/// Scores lie in [-1, 1] and margins in [0, 2], so no shift is larger.
const LARGEST: f64 = 2.0;

/// How a score or a margin moved: mean and percentiles of differences in [-2, 2].
///
/// Differences are counted in steps of 1/4096, so that millions of images need no more memory than
/// ten: a percentile is right to 1/8192, and exact for differences of zero.
#[derive(Debug, Clone)]
pub struct Shift {
    steps: Vec<u64>,
    count: u64,
    sum: f64,
    range: (f32, f32),
}

/// What [`Shift`] comes to; none of nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ShiftSummary {
    /// How many differences.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half of them are at or below it.
    pub median: f32,
    /// One in twenty is at or below it.
    pub p5: f32,
    /// One in twenty is above it.
    pub p95: f32,
}

impl Default for Shift {
    fn default() -> Self {
        let steps = vec![0; 2 * (LARGEST * STEPS) as usize + 1];
        Self { steps, count: 0, sum: 0.0, range: (f32::INFINITY, f32::NEG_INFINITY) }
    }
}

impl Shift {
    /// Counts the way from `a` to `b`.
    pub fn add(&mut self, a: f32, b: f32) {
        let shift = (b - a).clamp(-LARGEST as f32, LARGEST as f32);
        // Not negative after the clamp.
        let step = ((f64::from(shift) + LARGEST) * STEPS).round() as usize;
        self.steps[step] += 1;
        self.count += 1;
        self.sum += f64::from(shift);
        self.range = (self.range.0.min(shift), self.range.1.max(shift));
    }

    /// Mean and percentiles; none if nothing was counted.
    pub fn summary(&self) -> Option<ShiftSummary> {
        (self.count > 0).then(|| ShiftSummary {
            count: self.count,
            mean: self.sum / self.count as f64,
            median: self.percentile(0.5),
            p5: self.percentile(0.05),
            p95: self.percentile(0.95),
        })
    }

    /// The smallest difference that at least this share is at or below (nearest rank).
    fn percentile(&self, share: f64) -> f32 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let step = self.steps.iter().position(|n| {
            seen += n;
            seen >= rank
        });
        let value = step.unwrap_or(0) as f64 / STEPS - LARGEST;
        (value as f32).clamp(self.range.0, self.range.1)
    }
}

/// How many entries a list of examples keeps.
pub const EXAMPLES: usize = 200;

/// The entries that matter most out of any number: all are counted, [`EXAMPLES`] are kept.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Examples<T> {
    /// How many there were.
    pub total: u64,
    /// Those that matter most, the most important first; of equals, the earlier ones.
    pub first: Vec<T>,
}

impl<T> Default for Examples<T> {
    fn default() -> Self {
        Self { total: 0, first: Vec::new() }
    }
}

impl<T> Examples<T> {
    /// Counts an entry; keeps it if there is room, so that the first ones stay.
    pub fn push(&mut self, entry: impl FnOnce() -> T) {
        self.total += 1;
        if self.first.len() < EXAMPLES {
            self.first.push(entry());
        }
    }
}

/// Collects [`Examples`] by importance, in memory for twice as many as are kept.
#[derive(Debug)]
pub struct Worst<T> {
    total: u64,
    /// Importance, and the entry: two tiers (true first), then the number, the largest first.
    entries: Vec<((bool, f32), T)>,
}

impl<T> Default for Worst<T> {
    fn default() -> Self {
        Self { total: 0, entries: Vec::new() }
    }
}

impl<T> Worst<T> {
    /// Counts an entry and keeps it while it is among the most important.
    pub fn push(&mut self, importance: (bool, f32), entry: T) {
        self.total += 1;
        self.entries.push((importance, entry));
        if self.entries.len() >= 2 * EXAMPLES {
            self.shorten();
        }
    }

    fn shorten(&mut self) {
        // A stable sort: of equals the earlier one stays.
        self.entries.sort_by(|(a, _), (b, _)| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)));
        self.entries.truncate(EXAMPLES);
    }

    /// The most important, in order.
    pub fn finish(mut self) -> Examples<T> {
        self.shorten();
        let first = self.entries.into_iter().map(|(_, entry)| entry).collect();
        Examples { total: self.total, first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_intervals_are_those_of_the_literature() {
        // R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics
        // in Medicine 17, 1998, table I, method 3.
        for (count, of, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let (l, h) = Rate::new(count, of).interval().unwrap();
            assert!((l - low).abs() < 5e-5 && (h - high).abs() < 5e-5, "{count}/{of}: {l} {h}");
        }
        assert_eq!(Rate::new(0, 0).interval(), None);
        let json = serde_json::to_value(Rate::new(0, 0)).unwrap();
        assert!(json["share"].is_null() && json["low"].is_null(), "{json}");
    }

    #[test]
    fn values_fall_into_the_bin_that_begins_there() {
        let mut histogram = Histogram::of_margins();
        for value in [0.0, 0.009, 0.5, 0.999, 1.0, 1.7, -0.2] {
            histogram.add(value);
        }
        let filled: Vec<(usize, u64)> =
            histogram.bins.iter().copied().enumerate().filter(|(_, n)| *n > 0).collect();
        assert_eq!(filled, [(0, 3), (50, 1), (99, 3)]);
        assert_eq!(histogram.total(), 7);
    }

    #[test]
    fn a_quantile_is_right_to_the_width_of_a_bin() {
        assert_eq!(Histogram::of_scores().quantile(0.5), None);
        let mut random = fastrand::Rng::with_seed(2);
        let (mut histogram, mut all) = (Histogram::of_scores(), Vec::new());
        for _ in 0..5000 {
            let value = random.f32() * random.f32() * 2.0 - 1.0;
            histogram.add(value);
            all.push(value);
        }
        all.sort_by(f32::total_cmp);
        for (share, at) in [(0.0, 0), (0.05, 250), (0.5, 2500), (0.95, 4750), (1.0, 4999)] {
            let found = histogram.quantile(share).unwrap();
            assert!((found - all[at]).abs() <= 0.02, "{share}: {found} {}", all[at]);
        }
    }

    #[test]
    fn percentiles_agree_with_the_sorted_list() {
        let mut random = fastrand::Rng::with_seed(1);
        let (mut shift, mut all) = (Shift::default(), Vec::new());
        for _ in 0..5000 {
            let (a, b) = (random.f32(), random.f32());
            shift.add(a, b);
            all.push(b - a);
        }
        all.sort_by(f32::total_cmp);
        let summary = shift.summary().unwrap();
        for (found, at) in [(summary.p5, 250), (summary.median, 2500), (summary.p95, 4750)] {
            assert!((found - all[at - 1]).abs() <= 1.0 / 8192.0 + 1e-6, "{found} {}", all[at - 1]);
        }
        let mean = all.iter().map(|x| f64::from(*x)).sum::<f64>() / 5000.0;
        assert!((summary.mean - mean).abs() < 1e-9);
    }

    #[test]
    fn a_shift_of_nothing_is_exactly_zero() {
        assert_eq!(Shift::default().summary(), None);
        let mut shift = Shift::default();
        (0..9).for_each(|i| shift.add(0.1 * i as f32, 0.1 * i as f32));
        let summary = shift.summary().unwrap();
        assert_eq!((summary.p5, summary.median, summary.p95), (0.0, 0.0, 0.0));
        assert_eq!(summary.mean, 0.0);
        // The ends of what can be, and what cannot.
        let mut ends = Shift::default();
        for (a, b) in [(2.0, 0.0), (0.0, 2.0), (-9.0, 9.0)] {
            ends.add(a, b);
        }
        let summary = ends.summary().unwrap();
        assert_eq!((summary.p5, summary.median, summary.p95), (-2.0, 2.0, 2.0));
    }

    #[test]
    fn the_worst_are_kept_whatever_their_order() {
        let mut order: Vec<u32> = (0..5000).collect();
        fastrand::Rng::with_seed(3).shuffle(&mut order);
        let mut worst = Worst::default();
        for i in order {
            worst.push((i % 10 == 0, i as f32), i);
        }
        let kept = worst.finish();
        assert_eq!((kept.total, kept.first.len()), (5000, EXAMPLES));
        let expected: Vec<u32> = (0..EXAMPLES as u32).map(|i| 4990 - 10 * i).collect();
        assert_eq!(kept.first, expected);

        let mut equals = Worst::default();
        (0..1000).for_each(|i| equals.push((true, 0.5), i));
        assert_eq!(equals.finish().first, (0..EXAMPLES).collect::<Vec<_>>());
    }
}
