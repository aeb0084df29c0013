//! Cosine similarity of a whole batch against a class set, and the best labels of each image.
//!
//! Both sides are unit vectors, so cosine similarity is the plain product: one matrix product
//! scores the batch. It runs over blocks of rows with a running top-k behind it, so memory does
//! not grow with batch × classes, and a block's scores are still in the cache when they are read.
//!
//! The rule for labels is the one of metric learning with several vectors a class (sub-centre
//! ArcFace, Deng et al., ECCV 2020): a class scores as its best vector. Ties go to the class that
//! comes first in the set.

use ndarray::{Array2, ArrayView2, ArrayViewMut1, linalg::general_mat_mul, s};

/// Rows of the class matrix that are scored at once: 1,024 rows × 1,280 values of f32 are 5 MB,
/// about a core's share of cache, and 1,024 scores for each of 32 images are 128 kB.
const BLOCK_ROWS: usize = 1024;

/// One class and how near it is to an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScore {
    /// Index into the class set's distinct labels.
    pub class: u32,
    /// Cosine similarity, in [-1, 1].
    pub score: f32,
}

/// Scales `vector` to unit length. False, with the vector unchanged, if its length is zero or not
/// finite: such a vector has no direction to compare.
pub fn normalise(mut vector: ArrayViewMut1<'_, f32>) -> bool {
    // f64: the squares of 1,280 values of up to 1e19 would overflow an f32 sum.
    let norm = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if !norm.is_finite() || norm == 0.0 {
        return false;
    }
    vector.mapv_inplace(|x| (f64::from(x) / norm) as f32);
    true
}

/// The best `top_k` classes of each image, best first, each class once.
///
/// * `embeddings`: [N, D], unit rows.
/// * `vectors`: [rows, D], unit rows.
/// * `row_class`: the class of each row of `vectors`, numbered in the order of first appearance.
pub fn top_classes(
    embeddings: ArrayView2<'_, f32>,
    vectors: ArrayView2<'_, f32>,
    row_class: &[u32],
    top_k: usize,
) -> Vec<Vec<ClassScore>> {
    debug_assert_eq!(vectors.nrows(), row_class.len());
    let images = embeddings.nrows();
    let mut best: Vec<TopK> = (0..images).map(|_| TopK::new(top_k)).collect();
    let mut scores = Array2::<f32>::zeros((images, BLOCK_ROWS.min(vectors.nrows())));
    for first in (0..vectors.nrows()).step_by(BLOCK_ROWS) {
        let rows = BLOCK_ROWS.min(vectors.nrows() - first);
        let block = vectors.slice(s![first..first + rows, ..]);
        let mut product = scores.slice_mut(s![.., ..rows]);
        // classes · batchᵀ, written transposed: the class matrix is read once and in order, which
        // measured a third faster than batch · classesᵀ, and each image's scores lie in one row.
        general_mat_mul(1.0, &block, &embeddings.t(), 0.0, &mut product.view_mut().reversed_axes());
        for (row, top) in product.rows().into_iter().zip(&mut best) {
            for (&score, &class) in row.iter().zip(&row_class[first..first + rows]) {
                top.offer(class, score);
            }
        }
    }
    best.into_iter().map(TopK::into_sorted).collect()
}

/// The running best `k` distinct classes, kept sorted; `k` is at most 100, so a sorted list beats
/// a heap.
struct TopK {
    k: usize,
    /// What a score must reach to enter; -∞ until the list is full.
    threshold: f32,
    entries: Vec<ClassScore>,
}

impl TopK {
    fn new(k: usize) -> Self {
        Self { k, threshold: f32::NEG_INFINITY, entries: Vec::with_capacity(k + 1) }
    }

    #[inline]
    fn offer(&mut self, class: u32, score: f32) {
        // Almost every score ends here. On a tie with the last entry the class number decides, so
        // equality goes on.
        if score < self.threshold {
            return;
        }
        self.insert(class, score);
    }

    fn insert(&mut self, class: u32, score: f32) {
        if let Some(at) = self.entries.iter().position(|e| e.class == class) {
            if self.entries[at].score >= score {
                return;
            }
            self.entries.remove(at);
        }
        let at = self
            .entries
            .partition_point(|e| e.score > score || (e.score == score && e.class < class));
        self.entries.insert(at, ClassScore { class, score });
        self.entries.truncate(self.k);
        if self.entries.len() == self.k {
            self.threshold = self.entries.last().map_or(f32::NEG_INFINITY, |e| e.score);
        }
    }

    /// Rounding can carry the product of two unit vectors a hair past 1.
    fn into_sorted(mut self) -> Vec<ClassScore> {
        for entry in &mut self.entries {
            entry.score = entry.score.clamp(-1.0, 1.0);
        }
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, array};

    fn unit(rows: usize, dim: usize, seed: u64) -> Array2<f32> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut matrix = Array2::from_shape_simple_fn((rows, dim), || random.f32() - 0.5);
        matrix.rows_mut().into_iter().for_each(|row| assert!(normalise(row)));
        matrix
    }

    /// Every class's best score, sorted: slow and plain.
    fn reference(
        image: &Array1<f32>,
        vectors: &Array2<f32>,
        classes: &[u32],
        k: usize,
    ) -> Vec<u32> {
        let count = *classes.iter().max().unwrap() + 1;
        let mut all: Vec<(f64, u32)> = (0..count)
            .map(|class| {
                let best = vectors
                    .rows()
                    .into_iter()
                    .zip(classes)
                    .filter(|(_, c)| **c == class)
                    .map(|(v, _)| v.iter().zip(image).map(|(a, b)| f64::from(a * b)).sum::<f64>())
                    .fold(f64::NEG_INFINITY, f64::max);
                (best, class)
            })
            .collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        all.into_iter().take(k).map(|(_, class)| class).collect()
    }

    #[test]
    fn agrees_with_a_plain_loop_over_several_blocks_and_vectors_a_class() {
        let rows = 2 * BLOCK_ROWS + 77;
        let (images, vectors) = (unit(9, 24, 1), unit(rows, 24, 2));
        // The rows of a class lie in different blocks.
        let classes: Vec<u32> = (0..rows as u32).map(|row| row % 700).collect();
        let found = top_classes(images.view(), vectors.view(), &classes, 7);
        for (image, top) in images.rows().into_iter().zip(&found) {
            let wanted = reference(&image.to_owned(), &vectors, &classes, 7);
            assert_eq!(top.iter().map(|e| e.class).collect::<Vec<_>>(), wanted);
            assert!(top.windows(2).all(|w| w[0].score >= w[1].score));
        }
    }

    #[test]
    fn a_class_is_listed_once_and_scores_as_its_best_vector() {
        let vectors = array![[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]];
        let found = top_classes(array![[0.0, 1.0]].view(), vectors.view(), &[0, 1, 0], 5);
        assert_eq!(
            found,
            [[ClassScore { class: 1, score: 1.0 }, ClassScore { class: 0, score: 0.8 }]]
        );
    }

    #[test]
    fn a_tie_goes_to_the_class_that_comes_first_in_the_set() {
        let vectors = array![[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]];
        for k in 1..=3 {
            let found = top_classes(array![[1.0, 0.0]].view(), vectors.view(), &[0, 1, 2, 3], k);
            let classes: Vec<u32> = found[0].iter().map(|e| e.class).collect();
            assert_eq!(classes, [1, 2, 3][..k]);
        }
    }

    #[test]
    fn what_has_no_direction_is_not_normalised() {
        let mut zero = Array1::<f32>::zeros(3);
        assert!(!normalise(zero.view_mut()));
        let mut bad = array![1.0, f32::NAN];
        assert!(!normalise(bad.view_mut()));
        let mut huge = array![3e30_f32, 4e30];
        assert!(normalise(huge.view_mut()));
        assert!((huge[0] - 0.6).abs() < 1e-6 && (huge[1] - 0.8).abs() < 1e-6);
    }
}
