//! The most that the slowest resource allows, out of what each part was measured to need alone.
//!
//! Two bounds, and the lower one counts. The cores: every part of an image's way takes core time, and
//! all parts share the same cores, so no more images a second can pass than `cores / (the sum of their
//! core-seconds an image)`. And each part by itself: an image passes all of them, so the whole is no
//! faster than the slowest one alone (a GPU's embedding, a store's answers).

use serde::Serialize;

use super::figures::Figure;

/// One part of an image's way.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Step {
    pub part: &'static str,
    #[serde(flatten)]
    pub figure: Figure,
}

/// The ceiling of a way, and why it is there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Ceiling {
    /// The lower of the two bounds.
    pub images_per_second: f64,
    /// What the cores allow; none where core time is not measured.
    pub by_cores: Option<f64>,
    /// The rate of the slowest part alone.
    pub by_slowest_part: f64,
    /// `cores`, or the name of the slowest part.
    pub limited_by: &'static str,
    /// The part that takes most of the cores' time, and its share; none where it is not measured.
    pub heaviest: Option<Heaviest>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Heaviest {
    pub part: &'static str,
    pub share: f64,
}

impl Ceiling {
    /// None without steps.
    pub(super) fn of(cores: usize, steps: &[Step]) -> Option<Self> {
        let slowest = steps
            .iter()
            .min_by(|a, b| a.figure.images_per_second.total_cmp(&b.figure.images_per_second))?;
        let by_slowest_part = slowest.figure.images_per_second;
        let needs: Option<Vec<f64>> = steps.iter().map(|s| s.figure.core_ms_per_image).collect();
        // A part without a core time would be left out of the sum: better no bound than a wrong one.
        let sum = needs.iter().flatten().sum::<f64>();
        let by_cores = (sum > 0.0).then(|| cores as f64 * 1000.0 / sum);
        let heaviest = steps
            .iter()
            .filter_map(|step| {
                let share = by_cores.and(step.figure.core_ms_per_image)? / sum;
                Some(Heaviest { part: step.part, share })
            })
            .max_by(|a, b| a.share.total_cmp(&b.share));
        let (images_per_second, limited_by) = match by_cores {
            Some(rate) if rate <= by_slowest_part => (rate, "cores"),
            _ => (by_slowest_part, slowest.part),
        };
        Some(Self { images_per_second, by_cores, by_slowest_part, limited_by, heaviest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(part: &'static str, images_per_second: f64, core_ms: Option<f64>) -> Step {
        let figure = Figure {
            images_per_second,
            ms_per_image: 1000.0 / images_per_second,
            core_ms_per_image: core_ms,
            own_core_ms_per_image: core_ms,
        };
        Step { part, figure }
    }

    #[test]
    fn parts_that_share_the_cores_add_up() {
        let steps = [step("decode", 400.0, Some(5.0)), step("embed", 133.0, Some(15.0))];
        let ceiling = Ceiling::of(2, &steps).unwrap();
        assert_eq!((ceiling.images_per_second, ceiling.limited_by), (100.0, "cores"));
        assert_eq!(ceiling.by_slowest_part, 133.0);
        assert_eq!(ceiling.heaviest, Some(Heaviest { part: "embed", share: 0.75 }));
    }

    #[test]
    fn a_part_that_leaves_the_cores_idle_is_a_bound_of_its_own() {
        let steps = [step("decode", 400.0, Some(5.0)), step("embed", 300.0, Some(0.1))];
        let ceiling = Ceiling::of(2, &steps).unwrap();
        assert_eq!((ceiling.images_per_second, ceiling.limited_by), (300.0, "embed"));
        assert!(ceiling.by_cores > Some(390.0));
    }

    #[test]
    fn without_core_times_the_slowest_part_is_the_bound() {
        let steps = [step("decode", 400.0, Some(5.0)), step("embed", 500.0, None)];
        let ceiling = Ceiling::of(2, &steps[1..]).unwrap();
        assert_eq!((ceiling.images_per_second, ceiling.by_cores), (500.0, None));
        assert_eq!(Ceiling::of(2, &steps).unwrap().limited_by, "decode");
        assert_eq!(Ceiling::of(2, &[]), None);
    }
}
