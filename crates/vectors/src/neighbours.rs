//! Which classes lie so near each other that they are easily confused.

use std::collections::HashMap;

use ndarray::Array2;

use super::ClassVectors;
use crate::score::Scorer;

/// Vectors whose neighbours are looked up at once.
const BATCH: usize = 64;
/// Multiplications that a look at a set may cost: some seconds on two cores.
const WORK: usize = 200_000_000_000;

/// Two classes and how near they are.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Pair {
    /// The one that comes first in the set.
    pub a: String,
    /// The other.
    pub b: String,
    /// The cosine similarity of their nearest vectors.
    pub score: f32,
}

/// The nearest pairs of classes, and how many vectors were looked at to find them.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Neighbours {
    /// The nearest first.
    pub pairs: Vec<Pair>,
    /// Vectors whose neighbours were looked up: all, or an even sample of a large set.
    pub looked_at: usize,
    /// The mean over these of the score of the nearest other class.
    pub mean_nearest: f32,
}

/// Finds the `count` nearest pairs of classes: each class's vectors against all others.
pub fn neighbours(classes: &ClassVectors, scorer: &Scorer, count: usize) -> Neighbours {
    let (rows, dim) = (classes.vectors().rows(), classes.dim());
    let affordable = (WORK / (rows * dim).max(1)).max(BATCH);
    let step = rows.div_ceil(affordable).max(1);
    let looked_at: Vec<usize> = (0..rows).step_by(step).collect();
    let mut pairs: HashMap<(u32, u32), f32> = HashMap::new();
    let (mut sum, mut counted) = (0.0_f64, 0_usize);
    for batch in looked_at.chunks(BATCH) {
        let mut queries = Array2::zeros((batch.len(), dim));
        for (mut query, row) in queries.rows_mut().into_iter().zip(batch) {
            query.iter_mut().zip(classes.unit_row(*row)).for_each(|(to, from)| *to = from);
        }
        let found = classes.score_with(scorer, queries.view(), 2);
        for (row, top) in batch.iter().zip(found) {
            let own = classes.row_classes()[*row];
            let Some(other) = top.iter().find(|best| best.class != own) else { continue };
            let pair = (own.min(other.class), own.max(other.class));
            let score = pairs.entry(pair).or_insert(f32::NEG_INFINITY);
            *score = score.max(other.score);
            sum += f64::from(other.score);
            counted += 1;
        }
    }
    let mut nearest: Vec<((u32, u32), f32)> = pairs.into_iter().collect();
    nearest.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let label = |class: u32| classes.labels().get(class as usize).to_owned();
    Neighbours {
        pairs: nearest
            .into_iter()
            .take(count)
            .map(|((a, b), score)| Pair { a: label(a), b: label(b), score })
            .collect(),
        looked_at: looked_at.len(),
        mean_nearest: (sum / counted.max(1) as f64) as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Contents;
    use ndarray::array;

    #[test]
    fn the_nearest_pairs_come_first_and_a_class_is_no_neighbour_of_itself() {
        let vectors = array![[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.5]];
        let labels = ["a", "a", "b", "c"].map(str::to_owned).to_vec();
        let classes = ClassVectors::new(("s", "1"), Contents::new(labels, vectors, "m")).unwrap();
        let found = neighbours(&classes, &Scorer::default(), 10);
        assert_eq!((found.pairs[0].a.as_str(), found.pairs[0].b.as_str()), ("b", "c"));
        assert!((found.pairs[0].score - 0.874).abs() < 1e-3);
        assert_eq!((found.pairs[1].a.as_str(), found.pairs[1].b.as_str()), ("a", "b"));
        assert_eq!((found.pairs.len(), found.looked_at), (2, 4));
    }

    #[test]
    fn one_class_has_no_neighbours() {
        let contents = Contents::new(vec!["a".into()], array![[1.0, 0.0]], "m");
        let classes = ClassVectors::new(("s", "1"), contents).unwrap();
        let found = neighbours(&classes, &Scorer::default(), 10);
        assert!(found.pairs.is_empty() && found.mean_nearest == 0.0);
    }
}
