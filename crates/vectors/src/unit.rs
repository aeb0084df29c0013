//! Lengths of vectors, and vectors of unit length.

use ndarray::{ArrayView1, ArrayViewMut1};

/// The length of a vector, in f64: the squares of 1,280 values of up to 1e19 would overflow an f32
/// sum.
pub fn norm(vector: ArrayView1<'_, f32>) -> f64 {
    let Some(values) = vector.as_slice() else { return squares(vector.iter()).sqrt() };
    // Several sums side by side: one alone waits for each of its additions, and every row of a
    // set that is loaded comes through here.
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = squares(chunks.remainder());
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    (sums.iter().sum::<f64>() + rest).sqrt()
}

fn squares<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    values.into_iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Scales `vector` to unit length. False, with the vector unchanged, if its length is zero or not
/// finite: such a vector has no direction to compare.
pub fn normalise(mut vector: ArrayViewMut1<'_, f32>) -> bool {
    let norm = norm(vector.view());
    if !norm.is_finite() || norm == 0.0 {
        return false;
    }
    vector.mapv_inplace(|x| (f64::from(x) / norm) as f32);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, Array2, array};

    #[test]
    fn a_length_counts_every_value_however_they_lie() {
        for dim in [1, 7, 8, 9, 40, 41] {
            let columns = Array2::from_shape_fn((dim, 2), |(row, _)| (row + 1) as f32);
            let n = dim as f64;
            let wanted = (n * (n + 1.0) * (2.0 * n + 1.0) / 6.0).sqrt();
            // A row in one piece, and a column with gaps.
            for vector in [columns.column(0), columns.column(0).to_owned().view()] {
                assert!((norm(vector) - wanted).abs() < 1e-9 * wanted, "{dim}");
            }
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
