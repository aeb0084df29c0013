//! Cosine similarity of a whole batch against a class set, and the best labels of each image.
//!
//! Both sides are unit vectors, so cosine similarity is the plain product: one matrix product
//! scores the batch. It runs over blocks of rows with a running top-k behind it, so memory does
//! not grow with batch × classes, and a block's scores are still in the cache when they are read.
//!
//! The rule for labels is the one of metric learning with several vectors a class (sub-centre
//! ArcFace, Deng et al., ECCV 2020): a class scores as its best vector. Ties go to the class that
//! comes first in the set.

use ndarray::{Array2, ArrayView2, linalg::general_mat_mul, s};
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::rows::{Precision, Vectors};

/// Rows of f32 that are scored at once: 1,024 rows × 1,280 values are 5 MB, about a core's share of
/// cache, and 1,024 scores for each of 32 images are 128 kB.
const BLOCK_ROWS: usize = 1024;

/// Values of f16 that are converted and scored at once: as f32 they are 512 kB, which stays in a
/// core's second-level cache between the conversion and the product.
const BLOCK_HALVES: usize = 128 * 1024;

/// Multiplications under which a product is not worth waking other threads for: about a
/// millisecond on one core.
const PARALLEL_FROM: usize = 1 << 25;

/// One class and how near it is to an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScore {
    /// Index into the class set's distinct labels.
    pub class: u32,
    /// Cosine similarity, in [-1, 1].
    pub score: f32,
}

/// The threads that large products are spread over. Cheap to clone; clones share the threads.
#[derive(Clone, Default)]
pub struct Scorer {
    /// None: the calling thread alone.
    pool: Option<std::sync::Arc<rayon::ThreadPool>>,
}

impl std::fmt::Debug for Scorer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scorer").field("threads", &self.threads()).finish()
    }
}

impl Scorer {
    /// A scorer of this many threads. Where the system gives none, it scores on the caller's.
    pub fn new(threads: usize) -> Self {
        let name = |index| format!("angler-score-{index}");
        let pool = (threads > 1)
            .then(|| rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build())
            .and_then(Result::ok);
        Self { pool: pool.map(std::sync::Arc::new) }
    }

    /// How many threads score at once.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// The best `top_k` classes of each image, best first, each class once.
    ///
    /// * `embeddings`: [N, D], unit rows.
    /// * `rows`: the class vectors, [rows, D].
    pub fn top_classes(
        &self,
        embeddings: ArrayView2<'_, f32>,
        rows: ClassRows<'_>,
        top_k: usize,
    ) -> Vec<Vec<ClassScore>> {
        let count = rows.vectors.rows();
        debug_assert_eq!(count, rows.row_class.len());
        let work = count.saturating_mul(rows.vectors.dim()).saturating_mul(embeddings.nrows());
        let best = match &self.pool {
            Some(pool) if work >= PARALLEL_FROM => {
                // Several parts a thread: a core that is busy with something else takes fewer.
                let parts = (4 * pool.current_num_threads()).min(count.div_ceil(rows.block()));
                let part = count.div_ceil(parts.max(1)).next_multiple_of(rows.block());
                pool.install(|| {
                    (0..count.div_ceil(part))
                        .into_par_iter()
                        .map(|n| n * part..count.min((n + 1) * part))
                        .map(|range| best_of(embeddings, rows, range, top_k))
                        .reduce(Vec::new, merge)
                })
            }
            _ => best_of(embeddings, rows, 0..count, top_k),
        };
        let mut best = best;
        // A set without rows is refused when it is read; still, every image has an answer.
        best.resize_with(embeddings.nrows(), || TopK::new(top_k));
        best.into_iter().map(TopK::into_sorted).collect()
    }
}

/// Class vectors, ready to be multiplied.
#[derive(Debug, Clone, Copy)]
pub struct ClassRows<'a> {
    /// [rows, D]: unit rows, or with `scales` rows of any length.
    pub vectors: &'a Vectors,
    /// What makes each row a unit row; empty if they are.
    pub scales: &'a [f32],
    /// The class of each row, numbered in the order of first appearance.
    pub row_class: &'a [u32],
}

impl ClassRows<'_> {
    /// Rows that are scored at once.
    fn block(&self) -> usize {
        match self.vectors.precision() {
            Precision::F32 => BLOCK_ROWS,
            Precision::F16 => (BLOCK_HALVES / self.vectors.dim().max(1)).clamp(16, BLOCK_ROWS),
        }
    }
}

/// The best classes of each image among a range of rows.
fn best_of(
    embeddings: ArrayView2<'_, f32>,
    rows: ClassRows<'_>,
    range: std::ops::Range<usize>,
    top_k: usize,
) -> Vec<TopK> {
    let images = embeddings.nrows();
    let mut best: Vec<TopK> = (0..images).map(|_| TopK::new(top_k)).collect();
    let block = rows.block().min(range.len());
    let dim = rows.vectors.dim();
    let mut scores = Array2::<f32>::zeros((images, block));
    let mut converted = match rows.vectors.precision() {
        Precision::F32 => Array2::zeros((0, dim)),
        Precision::F16 => Array2::zeros((block, dim)),
    };
    for first in range.clone().step_by(block.max(1)) {
        let count = block.min(range.end - first);
        let vectors = match rows.vectors.view(first, count) {
            Some(view) => view,
            None => {
                let mut part = converted.slice_mut(s![..count, ..]);
                if let Some(part) = part.as_slice_mut() {
                    rows.vectors.copy_rows(first, part);
                }
                converted.slice(s![..count, ..])
            }
        };
        let mut product = scores.slice_mut(s![.., ..count]);
        // classes · batchᵀ, written transposed: the class matrix is read once and in order, which
        // measured a third faster than batch · classesᵀ, and each image's scores lie in one row.
        let mut transposed = product.view_mut().reversed_axes();
        general_mat_mul(1.0, &vectors, &embeddings.t(), 0.0, &mut transposed);
        let classes = &rows.row_class[first..first + count];
        let scales = rows.scales.get(first..first + count);
        for (row, top) in product.rows_mut().into_iter().zip(&mut best) {
            let Some(row) = row.into_slice() else { continue };
            if let Some(scales) = scales {
                row.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
            }
            top.offer_all(classes, row);
        }
    }
    best
}

/// Both parts' best, image by image. The order of the parts does not matter: ties are settled by
/// the class's number.
fn merge(a: Vec<TopK>, b: Vec<TopK>) -> Vec<TopK> {
    // The empty start of the reduction.
    if a.is_empty() {
        return b;
    }
    let mut merged = a;
    for (top, other) in merged.iter_mut().zip(b) {
        other.entries.iter().for_each(|entry| top.offer(entry.class, entry.score));
    }
    merged
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

    /// Offers a block's scores. Almost none enter, so they are first looked at 32 at a time, which
    /// the compiler turns into a few vector instructions.
    fn offer_all(&mut self, classes: &[u32], scores: &[f32]) {
        const WIDTH: usize = 32;
        for (classes, scores) in classes.chunks(WIDTH).zip(scores.chunks(WIDTH)) {
            let mut best = f32::NEG_INFINITY;
            for &score in scores {
                best = if score > best { score } else { best };
            }
            if best >= self.threshold {
                for (&class, &score) in classes.iter().zip(scores) {
                    self.offer(class, score);
                }
            }
        }
    }

    #[inline]
    fn offer(&mut self, class: u32, score: f32) {
        // On a tie with the last entry the class number decides, so equality goes on.
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
    use crate::unit::normalise;
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
        let stored = Vectors::from(vectors.clone());
        let rows = ClassRows { vectors: &stored, scales: &[], row_class: &classes };
        let found = Scorer::default().top_classes(images.view(), rows, 7);
        for (image, top) in images.rows().into_iter().zip(&found) {
            let wanted = reference(&image.to_owned(), &vectors, &classes, 7);
            assert_eq!(top.iter().map(|e| e.class).collect::<Vec<_>>(), wanted);
            assert!(top.windows(2).all(|w| w[0].score >= w[1].score));
        }
    }

    /// What `classes` says of a few rows.
    fn top(image: [f32; 2], vectors: Array2<f32>, row_class: &[u32], k: usize) -> Vec<ClassScore> {
        let vectors = Vectors::from(vectors);
        let rows = ClassRows { vectors: &vectors, scales: &[], row_class };
        Scorer::default().top_classes(array![image].view(), rows, k).remove(0)
    }

    #[test]
    fn many_threads_find_what_one_finds() {
        let rows = 40_000;
        let (images, vectors) = (unit(32, 48, 3), unit(rows, 48, 4));
        // Two equal vectors far apart: the tie must not depend on which thread is faster.
        let mut vectors = vectors;
        let first = vectors.row(17).to_owned();
        vectors.row_mut(rows - 5).assign(&first);
        let classes: Vec<u32> = (0..rows as u32).collect();
        let vectors = Vectors::from(vectors);
        let rows = ClassRows { vectors: &vectors, scales: &[], row_class: &classes };
        let mut images = images;
        images.row_mut(0).assign(&first);
        let scorer = Scorer::new(3);
        assert_eq!(scorer.threads(), 3);
        let found = scorer.top_classes(images.view(), rows, 5);
        assert_eq!(found, Scorer::default().top_classes(images.view(), rows, 5));
        assert_eq!((found[0][0].class, found[0][1].class), (17, 39_995));
    }

    #[test]
    fn halves_score_as_their_own_values_do() {
        let rows = 3 * BLOCK_HALVES / 40 + 7;
        let images = unit(5, 40, 5);
        let halves = Vectors::from(unit(rows, 40, 6) * 3.0).to_precision(Precision::F16);
        let mut exact = halves.to_precision(Precision::F32);
        exact.make_unit().unwrap();
        let mut halves = halves;
        let (scales, _) = halves.make_unit().unwrap();
        let classes: Vec<u32> = (0..rows as u32).map(|row| row % 1000).collect();
        let of = |vectors, scales| {
            let rows = ClassRows { vectors, scales, row_class: &classes };
            Scorer::default().top_classes(images.view(), rows, 6)
        };
        for (a, b) in of(&halves, &scales).iter().zip(&of(&exact, &[])) {
            for (a, b) in a.iter().zip(b) {
                assert!(a.class == b.class && (a.score - b.score).abs() < 1e-6, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn a_class_is_listed_once_and_scores_as_its_best_vector() {
        let vectors = array![[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]];
        assert_eq!(
            top([0.0, 1.0], vectors, &[0, 1, 0], 5),
            [ClassScore { class: 1, score: 1.0 }, ClassScore { class: 0, score: 0.8 }]
        );
    }

    #[test]
    fn a_tie_goes_to_the_class_that_comes_first_in_the_set() {
        let vectors = array![[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]];
        for k in 1..=3 {
            let found = top([1.0, 0.0], vectors.clone(), &[0, 1, 2, 3], k);
            let classes: Vec<u32> = found.iter().map(|e| e.class).collect();
            assert_eq!(classes, [1, 2, 3][..k]);
        }
    }
}
