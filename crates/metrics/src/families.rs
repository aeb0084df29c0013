//! Makes metrics of constant names and label values, all of them from the start.

use prometheus::core::Collector;
use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry,
};
use strum::VariantNames;

/// Metrics that belong together.
#[derive(Default)]
pub(super) struct Families(Registry);

/// Names, labels and buckets are constants of this crate, so whether they are valid and each is made
/// once does not depend on anything that happens; the unit tests make all of them.
fn sound<T>(made: prometheus::Result<T>) -> T {
    made.unwrap_or_else(|error| unreachable!("a metric was declared wrongly: {error}"))
}

impl Families {
    fn kept<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = sound(made);
        sound(self.0.register(Box::new(metric.clone())));
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.kept(IntCounter::new(name, help))
    }

    /// A counter of time.
    pub fn seconds(&self, name: &str, help: &str) -> Counter {
        self.kept(Counter::new(name, help))
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.kept(IntGauge::new(name, help))
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.kept(Histogram::with_opts(options))
    }

    /// Makes a counter per variant of `E`, whose names are the values of the label.
    pub fn counters<E: VariantNames, const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> [IntCounter; N] {
        let family = self.kept(IntCounterVec::new(Opts::new(name, help), &[label]));
        std::array::from_fn(|i| sound(family.get_metric_with_label_values(&[E::VARIANTS[i]])))
    }

    /// Makes a histogram per variant of `E`, whose names are the values of the label.
    pub fn histograms<E: VariantNames, const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        buckets: &[f64],
    ) -> [Histogram; N] {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let family = self.kept(HistogramVec::new(options, &[label]));
        std::array::from_fn(|i| sound(family.get_metric_with_label_values(&[E::VARIANTS[i]])))
    }

    /// Where all that was made is registered.
    pub fn registry(self) -> Registry {
        self.0
    }
}
