//! What is measured, how often and for how long.

use std::collections::BTreeSet;
use std::time::Duration;

/// Images in a job that goes through the broker.
pub(super) const IMAGES_PER_JOB: usize = 64;
/// The batches that back ends are measured with.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const FEW_BATCHES: [usize; 3] = [1, 8, 32];
/// The sizes of class sets that scoring is measured with.
const CLASSES: [usize; 6] = [10, 100, 1_000, 10_000, 100_000, 1_000_000];
const FEW_CLASSES: [usize; 3] = [10, 1_000, 100_000];
/// How much longer the whole is measured than a part: it begins with an empty pipeline and ends with
/// one, which a short run would feel.
const WHOLE: u32 = 10;

/// What `--only` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Section {
    /// All parts: fetch, decode, embed, score, publish
    Parts,
    Fetch,
    Decode,
    Embed,
    Score,
    Publish,
    /// The pipeline, and the parts that its ceiling is computed from
    Whole,
    /// One by one, batched, and batched with the cosine in the graph
    Ways,
}

/// What is measured, how often and for how long.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub rounds: usize,
    /// How long one measurement of a part takes.
    pub time: Duration,
    pub quick: bool,
    sections: BTreeSet<Section>,
    /// The sizes of batches, in order.
    pub batches: Vec<usize>,
    /// The sizes of class sets, in order.
    pub class_counts: Vec<usize>,
}

impl Plan {
    /// `only`: empty for everything. `max_batch` and `classes` are what the pipeline runs with, so they
    /// are always measured.
    pub(super) fn new(
        only: &[Section],
        quick: bool,
        (rounds, seconds): (Option<usize>, Option<f64>),
        (max_batch, classes): (usize, usize),
    ) -> Self {
        use Section::{Decode, Embed, Fetch, Parts, Publish, Score, Ways, Whole};
        let parts = [Fetch, Decode, Embed, Score, Publish];
        let mut sections: BTreeSet<Section> = only.iter().copied().collect();
        if only.is_empty() {
            sections.extend([Parts, Whole, Ways]);
        }
        if sections.contains(&Parts) {
            sections.extend(parts);
        }
        let sweep = |section, all: &[usize], few: &[usize], own: usize| {
            let swept = if quick { few } else { all };
            let swept = if sections.contains(&section) { swept } else { &[] };
            let sizes: BTreeSet<usize> = swept.iter().copied().chain([own]).collect();
            sizes.into_iter().collect()
        };
        Self {
            rounds: rounds.unwrap_or(if quick { 1 } else { 3 }).max(1),
            time: Duration::from_secs_f64(seconds.unwrap_or(if quick { 0.2 } else { 1.0 })),
            quick,
            batches: sweep(Embed, &BATCHES, &FEW_BATCHES, max_batch),
            class_counts: sweep(Score, &CLASSES, &FEW_CLASSES, classes),
            sections,
        }
    }

    /// Whether a person wants to see the section.
    pub(super) fn shows(&self, section: Section) -> bool {
        self.sections.contains(&section)
    }

    /// Whether a part is measured: because it is wanted, or because the ceiling needs it.
    pub(super) fn measures(&self, part: Section) -> bool {
        self.shows(part) || self.shows(Section::Whole)
    }

    /// How long one measurement of the whole takes, about.
    pub(super) fn whole_time(&self) -> Duration {
        self.time * WHOLE
    }

    /// How many images of a recipe are made.
    pub(super) fn distinct(&self, pixels: u64) -> usize {
        let many: usize = if pixels > 4_000_000 {
            2
        } else if pixels > 500_000 {
            16
        } else {
            64
        };
        if self.quick { many.div_ceil(4) } else { many }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(only: &[Section], quick: bool) -> Plan {
        Plan::new(only, quick, (None, None), (24, 1_000))
    }

    #[test]
    fn everything_is_measured_unless_something_is_named() {
        let all = plan(&[], false);
        assert!(
            all.shows(Section::Decode) && all.shows(Section::Ways) && all.shows(Section::Whole)
        );
        assert_eq!(all.batches, [1, 2, 4, 8, 16, 24, 32]);
        assert_eq!((all.rounds, all.class_counts.len()), (3, 6));
        let quick = plan(&[], true);
        assert_eq!((quick.batches.as_slice(), quick.rounds), (&[1, 8, 24, 32][..], 1));
        assert!(quick.time < all.time);
    }

    #[test]
    fn the_whole_brings_the_parts_of_its_ceiling_and_no_more() {
        let whole = plan(&[Section::Whole], false);
        assert!(whole.measures(Section::Embed) && !whole.shows(Section::Embed));
        assert_eq!(whole.batches, [24]);
        assert_eq!(whole.class_counts, [1_000]);
        assert!(!whole.shows(Section::Ways));
        let score = plan(&[Section::Score], false);
        assert!(score.shows(Section::Score) && !score.measures(Section::Embed));
        assert!(plan(&[Section::Parts], false).shows(Section::Publish));
    }
}
