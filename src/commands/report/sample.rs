//! A few images out of any number, by lot, and how many pictures a page has room for.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::summary::Example;

/// Pictures of all classes together: about 2 MB.
pub(super) const PICTURES: usize = 240;
/// So many, at least, a class has before there are pictures of another.
const LEAST: usize = 4;

/// Images that were drawn. Those whose URI has the smallest hash win: so every image has the same chance,
/// the order of the lines changes nothing, one that is listed twice is drawn once, and fewer can be asked
/// for later without losing any of that.
#[derive(Debug, Default)]
pub(super) struct Sample(BTreeMap<u64, Example>);

impl Sample {
    /// Draws anew with one more; keeps at most `most`.
    pub(super) fn add(&mut self, most: usize, uri: &str, example: impl FnOnce() -> Example) {
        let mut hasher = DefaultHasher::new();
        uri.hash(&mut hasher);
        let lot = hasher.finish();
        if self.0.len() < most || self.0.last_key_value().is_some_and(|(last, _)| lot < *last) {
            self.0.insert(lot, example());
        }
        while self.0.len() > most {
            self.0.pop_last();
        }
    }

    /// How many are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The best scores first.
    pub(super) fn finish(self, most: usize) -> Vec<Example> {
        let mut drawn: Vec<Example> = self.0.into_values().take(most).collect();
        drawn.sort_by(|a, b| b.score.total_cmp(&a.score));
        drawn
    }
}

/// Of how many classes there are pictures, and how many of each, if `wanted` are asked for: fewer of each
/// when there are more classes, until it would be too few to tell what the class looks like.
pub(super) fn plan(classes: usize, wanted: usize) -> (usize, usize) {
    let least = wanted.clamp(1, LEAST);
    let shown = classes.min(PICTURES / least);
    (shown, wanted.min(PICTURES / shown.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(number: usize) -> Example {
        Example { uri: number.to_string(), score: number as f32, ..Example::default() }
    }

    fn draw(numbers: impl Iterator<Item = usize>, most: usize) -> Sample {
        let mut sample = Sample::default();
        numbers.for_each(|n| sample.add(most, &n.to_string(), || example(n)));
        sample
    }

    fn drawn(sample: Sample, most: usize) -> Vec<usize> {
        sample.finish(most).iter().map(|e| e.uri.parse().unwrap()).collect()
    }

    #[test]
    fn the_same_few_are_drawn_in_any_order_and_the_surest_come_first() {
        let forwards = drawn(draw(0..10_000, 12), 12);
        let twice = drawn(draw((0..10_000).rev().chain(0..10_000), 12), 12);
        assert_eq!(forwards, twice);
        assert!(forwards.len() == 12 && forwards.is_sorted_by(|a, b| a > b), "{forwards:?}");
        // Fewer of them are those that would have been drawn alone.
        assert_eq!(drawn(draw(0..10_000, 12), 4), drawn(draw(0..10_000, 4), 4));
        // From everywhere, not from an end.
        assert!(forwards[0] > 5_000 && forwards[11] < 5_000, "{forwards:?}");
    }

    #[test]
    fn what_is_kept_is_bounded_and_shrinks_when_it_must() {
        let mut sample = draw(0..10_000, 100);
        assert_eq!(sample.0.len(), 100);
        sample.add(4, "one more", || example(1));
        assert_eq!(sample.0.len(), 4);
    }

    #[test]
    fn many_classes_have_fewer_pictures_each_and_all_together_no_more() {
        assert_eq!(plan(0, 12), (0, 12));
        assert_eq!(plan(3, 12), (3, 12));
        assert_eq!(plan(20, 12), (20, 12));
        assert_eq!(plan(40, 12), (40, 6));
        assert_eq!(plan(10_000, 12), (60, 4));
        assert_eq!(plan(10_000, 1), (240, 1));
        assert_eq!(plan(1, 240), (1, 240));
        for (classes, wanted) in (0..300).flat_map(|c| [1, 2, 3, 12, 240].map(|w| (c, w))) {
            let (shown, each) = plan(classes, wanted);
            assert!(shown * each <= PICTURES && each <= wanted, "{classes} {wanted}");
        }
    }
}
