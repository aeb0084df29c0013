//! A version's vectors as one matrix for a product that is made elsewhere: in the model's graph.
//!
//! The rows are f32 unit vectors, sorted by class. What comes back of the product is a list of
//! the best rows, and one rule makes classes of it:
//!
//! * A class has at most `m` rows, so of any `(k - 1) * m + 1` rows the distinct classes are at
//!   least `k`: so many best rows hold the `k` best classes, each first seen at its best vector.
//! * Rows in the order of their classes settle ties between rows as ties between classes are:
//!   whatever comes first in the set wins ([`crate::score`]).

use super::ClassVectors;
use crate::score::ClassScore;

/// What the rows of a matrix mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowClasses {
    /// The class of each row, ascending.
    row_class: Vec<u32>,
    classes: usize,
    /// The most rows that a class has.
    most: usize,
}

/// The unit rows of a version, [rows, dim] row after row, and what they mean.
pub fn unit_rows(classes: &ClassVectors) -> (Vec<f32>, RowClasses) {
    let dim = classes.dim();
    let row_class = classes.row_classes();
    let mut order: Vec<usize> = (0..row_class.len()).collect();
    order.sort_by_key(|row| row_class[*row]); // Stable.
    let mut values = vec![0.0; row_class.len() * dim];
    for (row, out) in order.iter().zip(values.chunks_exact_mut(dim.max(1))) {
        classes.copy_unit_row(*row, out);
    }
    (values, RowClasses::new(order.into_iter().map(|row| row_class[row]).collect()))
}

impl RowClasses {
    fn new(row_class: Vec<u32>) -> Self {
        let runs = || row_class.chunk_by(|a, b| a == b);
        let (classes, most) = (runs().count(), runs().map(<[u32]>::len).max().unwrap_or(0));
        Self { row_class, classes, most }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.row_class.len()
    }

    /// As many of the best rows as hold the best `top_k` classes, whatever the image.
    pub fn needed(&self, top_k: usize) -> usize {
        let k = top_k.clamp(1, self.classes.max(1));
        (k - 1).saturating_mul(self.most).saturating_add(1).min(self.rows())
    }

    /// The best `top_k` classes by an image's best rows, best first. None if a row does not exist:
    /// whoever made the list is broken.
    pub fn best(&self, rows: &[i64], scores: &[f32], top_k: usize) -> Option<Vec<ClassScore>> {
        let mut top: Vec<ClassScore> = Vec::with_capacity(top_k.min(self.classes));
        for (row, score) in rows.iter().zip(scores) {
            if top.len() == top_k {
                break;
            }
            let class = *self.row_class.get(usize::try_from(*row).ok()?)?;
            if top.iter().all(|entry| entry.class != class) {
                top.push(ClassScore { class, score: *score });
            }
        }
        // On a GPU rows with equal scores may be listed in any order.
        top.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.class.cmp(&b.class)));
        // Rounding can carry the product of two unit vectors a hair past 1.
        top.iter_mut().for_each(|entry| entry.score = entry.score.clamp(-1.0, 1.0));
        Some(top)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Contents;
    use crate::rows::{Precision, Vectors};
    use ndarray::array;

    fn labelled(labels: &[&str], vectors: impl Into<Vectors>) -> ClassVectors {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        ClassVectors::new(("set", "1"), Contents::new(labels, vectors, "m@0")).unwrap()
    }

    #[test]
    fn rows_are_sorted_by_class_and_have_unit_length_in_either_precision() {
        let vectors = Vectors::from(array![[0.0, 2.0], [3.0, 4.0], [5.0, 0.0]]);
        for precision in [Precision::F32, Precision::F16] {
            let mut rounded = Vectors::zeros(precision, 0, 2);
            (0..3).for_each(|row| rounded.push(&vectors.row(row)));
            let classes = labelled(&["a", "b", "a"], rounded);
            let (values, rows) = unit_rows(&classes);
            assert_eq!(values, [0.0, 1.0, 1.0, 0.0, 0.6, 0.8]);
            assert_eq!(rows, RowClasses { row_class: vec![0, 0, 1], classes: 2, most: 2 });
        }
    }

    #[test]
    fn enough_rows_are_asked_for_and_never_more_than_there_are() {
        let rows = RowClasses::new(vec![0, 0, 0, 1, 2, 2]);
        assert_eq!([1, 2, 3, 100].map(|k| rows.needed(k)), [1, 4, 6, 6]);
        let single = RowClasses::new((0..1000).collect());
        assert_eq!([1, 5, 2000].map(|k| single.needed(k)), [1, 5, 1000]);
        assert_eq!(RowClasses::new(vec![0; 9]).needed(5), 1);
    }

    #[test]
    fn rows_become_classes_each_once_and_ties_go_to_the_first() {
        let rows = RowClasses::new(vec![0, 0, 1, 2, 2]);
        let best = |list: &[i64], scores: &[f32], k| -> Vec<(u32, f32)> {
            let top = rows.best(list, scores, k).unwrap();
            top.iter().map(|entry| (entry.class, entry.score)).collect()
        };
        assert_eq!(best(&[3, 4, 2, 0], &[0.9, 0.8, 0.7, 0.1], 2), [(2, 0.9), (1, 0.7)]);
        assert_eq!(best(&[4, 1, 2], &[0.5; 3], 3), [(0, 0.5), (1, 0.5), (2, 0.5)]);
        assert_eq!(best(&[2], &[1.000_000_1], 5), [(1, 1.0)]);
        for unknown in [5, -1, i64::MAX] {
            assert_eq!(rows.best(&[unknown], &[0.5], 1), None);
        }
    }
}
