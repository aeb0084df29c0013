//! Samples, and what is said of several: the median.

use serde::Serialize;

/// One measurement: so many images in so much time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub images: f64,
    pub seconds: f64,
    /// Core time of the whole machine, in ms.
    pub machine_ms: Option<f64>,
    /// Core time of this process, in ms.
    pub own_ms: Option<f64>,
    /// Which share of a decoder's time went into decoding, and not into resizing.
    pub decode_share: Option<f64>,
}

/// The medians of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figure {
    pub images_per_second: f64,
    /// Time on the clock for each image, while as many as fit are worked on at once.
    pub ms_per_image: f64,
    /// Core time of the whole machine; none where the system does not tell.
    pub core_ms_per_image: Option<f64>,
    /// Core time of this process.
    pub own_core_ms_per_image: Option<f64>,
}

impl Figure {
    /// None without samples.
    pub(super) fn of(samples: &[Sample]) -> Option<Self> {
        let each = |of: &dyn Fn(&Sample) -> Option<f64>| median(samples.iter().filter_map(of));
        let images_per_second = each(&|s| Some(s.images / s.seconds.max(1e-9)))?;
        let an_image = |ms: Option<f64>, s: &Sample| ms.map(|ms| ms / s.images.max(1.0));
        Some(Self {
            images_per_second,
            ms_per_image: 1000.0 / images_per_second,
            core_ms_per_image: each(&|s| an_image(s.machine_ms, s)),
            own_core_ms_per_image: each(&|s| an_image(s.own_ms, s)),
        })
    }
}

/// The middle value; of an even number the mean of the two in the middle. Order does not matter.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => values.get(middle).copied(),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Samples of the rounds by what was measured, in the order in which it first was.
#[derive(Debug, Clone)]
pub(super) struct Samples<K> {
    all: Vec<(K, Vec<Sample>)>,
}

impl<K> Default for Samples<K> {
    fn default() -> Self {
        Self { all: Vec::new() }
    }
}

impl<K: PartialEq> Samples<K> {
    pub(super) fn add(&mut self, key: K, sample: Sample) {
        match self.all.iter_mut().find(|(known, _)| *known == key) {
            Some((_, samples)) => samples.push(sample),
            None => self.all.push((key, vec![sample])),
        }
    }

    /// What was measured, and its medians.
    pub(super) fn figures(&self) -> impl Iterator<Item = (&K, Figure)> {
        self.all.iter().filter_map(|(key, samples)| Some((key, Figure::of(samples)?)))
    }

    /// The medians of what fits.
    pub(super) fn figure(&self, fits: impl Fn(&K) -> bool) -> Option<Figure> {
        self.figures().find(|(key, _)| fits(key)).map(|(_, figure)| figure)
    }

    /// The median of the decoding shares.
    pub(super) fn decode_share(&self, key: &K) -> Option<f64> {
        let (_, samples) = self.all.iter().find(|(known, _)| known == key)?;
        median(samples.iter().filter_map(|sample| sample.decode_share))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(images: f64, seconds: f64, machine_ms: f64) -> Sample {
        let own_ms = Some(machine_ms / 2.0);
        Sample { images, seconds, machine_ms: Some(machine_ms), own_ms, decode_share: None }
    }

    #[test]
    fn the_median_is_the_middle_and_not_a_number_does_not_count() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([f64::NAN, 7.0]), Some(7.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn one_slow_round_does_not_move_a_figure() {
        let figure = Figure::of(&[
            sample(100.0, 1.0, 500.0),
            sample(50.0, 50.0, 9e9),
            sample(40.0, 0.4, 200.0),
        ])
        .unwrap();
        assert_eq!(figure.images_per_second, 100.0);
        assert_eq!(figure.ms_per_image, 10.0);
        assert_eq!(figure.core_ms_per_image, Some(5.0));
        assert_eq!(figure.own_core_ms_per_image, Some(2.5));
        assert_eq!(Figure::of(&[]), None);
        let blind = Sample { machine_ms: None, own_ms: None, ..sample(1.0, 1.0, 0.0) };
        assert_eq!(Figure::of(&[blind]).unwrap().core_ms_per_image, None);
    }

    #[test]
    fn rounds_are_gathered_by_what_was_measured() {
        let mut samples = Samples::default();
        for (key, seconds) in [("b", 1.0), ("a", 2.0), ("b", 3.0), ("b", 2.0)] {
            samples.add(key, sample(6.0, seconds, 1.0));
        }
        let rates: Vec<_> = samples.figures().map(|(k, f)| (*k, f.images_per_second)).collect();
        assert_eq!(rates, [("b", 3.0), ("a", 3.0)]);
        assert_eq!(samples.figure(|key| *key == "c"), None);
        let halves = Sample { decode_share: Some(0.5), ..sample(1.0, 1.0, 1.0) };
        samples.add("a", halves);
        assert_eq!(samples.decode_share(&"a"), Some(0.5));
        assert_eq!(samples.decode_share(&"b"), None);
    }
}
