//! A version's vectors as they lie in memory: f32, or f16 for large sets.
//!
//! f32 rows are scaled to unit length in place. f16 rows stay as they came, with one factor a row
//! beside them: scaling them would round every value a second time, and a score is scaled by one
//! multiplication.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1};

use super::unit::{norm, normalise};

/// How the values are stored, in files and in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits a value.
    #[default]
    F32,
    /// 16 bits a value: half the memory, 11 bits of mantissa.
    F16,
}

impl Precision {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        })
    }
}

/// Vectors in one piece, [rows, dim], row after row.
#[derive(Debug, Clone, PartialEq)]
pub struct Vectors {
    values: Values,
    dim: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl From<Array2<f32>> for Vectors {
    fn from(matrix: Array2<f32>) -> Self {
        let (len, dim) = (matrix.len(), matrix.ncols());
        // The copy is only for other layouts: a large matrix is not held twice.
        let matrix = match matrix.is_standard_layout() {
            true => matrix,
            false => matrix.as_standard_layout().into_owned(),
        };
        let (mut values, offset) = matrix.into_raw_vec_and_offset();
        // A matrix may be a part of its buffer.
        values.drain(..offset.unwrap_or(0));
        values.truncate(len);
        Self { values: Values::F32(values), dim }
    }
}

impl Vectors {
    /// [rows, dim] zeros, to be filled through [`Self::bytes_mut`].
    pub fn zeros(precision: Precision, rows: usize, dim: usize) -> Self {
        let values = match precision {
            Precision::F32 => Values::F32(vec![0.0; rows * dim]),
            Precision::F16 => Values::F16(vec![f16::ZERO; rows * dim]),
        };
        Self { values, dim }
    }

    /// No rows yet, with room for `rows`: what is pushed up to there moves nothing.
    pub fn with_capacity(precision: Precision, rows: usize, dim: usize) -> Self {
        let values = match precision {
            Precision::F32 => Values::F32(Vec::with_capacity(rows * dim)),
            Precision::F16 => Values::F16(Vec::with_capacity(rows * dim)),
        };
        Self { values, dim }
    }

    /// Appends a row of `dim` values; to f16 they are rounded as they are.
    pub fn push(&mut self, row: &[f32]) {
        debug_assert_eq!(row.len(), self.dim);
        match &mut self.values {
            Values::F32(values) => values.extend_from_slice(row),
            Values::F16(values) => values.extend(row.iter().map(|x| f16::from_f32(*x))),
        }
    }

    /// The same vectors in another precision. To f16 they are scaled to unit length first, which
    /// fits its range; a row without a direction stays as it is.
    pub fn to_precision(&self, precision: Precision) -> Self {
        let mut row = vec![0.0; self.dim];
        let values = match precision {
            _ if precision == self.precision() => self.values.clone(),
            Precision::F32 => {
                let mut values = Vec::with_capacity(self.rows() * self.dim);
                for index in 0..self.rows() {
                    self.copy_rows(index, &mut row);
                    values.extend_from_slice(&row);
                }
                Values::F32(values)
            }
            Precision::F16 => {
                let mut values = Vec::with_capacity(self.rows() * self.dim);
                for index in 0..self.rows() {
                    self.copy_rows(index, &mut row);
                    normalise(ArrayViewMut1::from(&mut row[..]));
                    values.extend(row.iter().map(|x| f16::from_f32(*x)));
                }
                Values::F16(values)
            }
        };
        Self { values, dim: self.dim }
    }

    /// How the values are stored.
    pub fn precision(&self) -> Precision {
        match self.values {
            Values::F32(_) => Precision::F32,
            Values::F16(_) => Precision::F16,
        }
    }

    /// How many vectors there are.
    pub fn rows(&self) -> usize {
        let values = match &self.values {
            Values::F32(values) => values.len(),
            Values::F16(values) => values.len(),
        };
        values.checked_div(self.dim).unwrap_or(0)
    }

    /// Length of a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// What the values take in memory.
    pub fn bytes(&self) -> usize {
        self.rows() * self.dim * self.precision().bytes()
    }

    /// The values in memory order. In files they are little-endian, as on every machine that the
    /// back ends run on.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.values {
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::F16(values) => bytemuck::cast_slice(values),
        }
    }

    /// The values' bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.values {
            Values::F32(values) => bytemuck::cast_slice_mut(values),
            Values::F16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// Fills `out`, a whole number of rows, with the rows from `first` on, as f32.
    pub fn copy_rows(&self, first: usize, out: &mut [f32]) {
        let range = first * self.dim..first * self.dim + out.len();
        match &self.values {
            Values::F32(values) => out.copy_from_slice(&values[range]),
            Values::F16(values) => values[range].convert_to_f32_slice(out),
        }
    }

    /// One row as f32.
    pub fn row(&self, index: usize) -> Vec<f32> {
        let mut row = vec![0.0; self.dim];
        self.copy_rows(index, &mut row);
        row
    }

    /// Rows as they lie in memory, [count, dim]; none for f16, whose rows must be copied.
    pub fn view(&self, first: usize, count: usize) -> Option<ArrayView2<'_, f32>> {
        match &self.values {
            Values::F32(values) => {
                let range = first * self.dim..(first + count) * self.dim;
                ArrayView2::from_shape((count, self.dim), &values[range]).ok()
            }
            Values::F16(_) => None,
        }
    }

    /// Checks every row and gives each unit length: f32 rows in place; for f16 rows the factors are
    /// returned, one a row. Also yields the lengths that the rows had.
    ///
    /// # Errors
    /// The first row that is not finite or zero, and what is wrong with it.
    pub fn make_unit(&mut self) -> Result<(Vec<f32>, Norms), (usize, RowFault)> {
        let (rows, dim) = (self.rows(), self.dim);
        let mut norms = Norms::default();
        let mut scales = Vec::new();
        let mut buffer = vec![0.0; dim];
        if let Values::F16(_) = self.values {
            scales.reserve_exact(rows);
        }
        for row in 0..rows {
            self.copy_rows(row, &mut buffer);
            let length = length(ArrayView1::from(&buffer)).map_err(|what| (row, what))?;
            norms.add(length);
            match &mut self.values {
                Values::F32(values) => {
                    normalise(ArrayViewMut1::from(&mut values[row * dim..(row + 1) * dim]));
                }
                Values::F16(_) => scales.push((1.0 / length) as f32),
            }
        }
        Ok((scales, norms))
    }

    /// Checks every row as [`Self::make_unit`] does, and changes nothing.
    ///
    /// # Errors
    /// The first row that is not finite or zero, and what is wrong with it.
    pub fn check(&self) -> Result<(), (usize, RowFault)> {
        let mut buffer = vec![0.0; self.dim];
        for row in 0..self.rows() {
            self.copy_rows(row, &mut buffer);
            length(ArrayView1::from(&buffer)).map_err(|what| (row, what))?;
        }
        Ok(())
    }
}

/// Why a row has no direction.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum RowFault {
    /// All its values are zero.
    #[error("is zero")]
    Zero,
    /// One of them is not a number.
    #[error("holds {value} in column {column}")]
    NotFinite {
        /// NaN or an infinity.
        value: f32,
        /// Where it is.
        column: usize,
    },
}

/// The length of a row that has a direction.
fn length(row: ArrayView1<'_, f32>) -> Result<f64, RowFault> {
    let length = norm(row);
    if length.is_finite() && length > 0.0 {
        return Ok(length);
    }
    Err(match row.iter().position(|x| !x.is_finite()) {
        Some(column) => RowFault::NotFinite { value: row[column], column },
        None => RowFault::Zero,
    })
}

/// The lengths that rows had before they were made unit vectors.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Norms {
    /// The shortest row.
    pub min: f64,
    /// The mean.
    pub mean: f64,
    /// The longest row.
    pub max: f64,
    #[serde(skip)]
    count: usize,
}

impl Default for Norms {
    fn default() -> Self {
        Self { min: f64::INFINITY, mean: 0.0, max: 0.0, count: 0 }
    }
}

impl Norms {
    fn add(&mut self, norm: f64) {
        self.count += 1;
        self.min = self.min.min(norm);
        self.max = self.max.max(norm);
        self.mean += (norm - self.mean) / self.count as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn half(rows: &[&[f32]]) -> Vectors {
        let mut vectors = Vectors::zeros(Precision::F16, rows.len(), rows[0].len());
        let bytes: Vec<u8> = rows
            .iter()
            .flat_map(|r| r.iter())
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect();
        vectors.bytes_mut().copy_from_slice(&bytes);
        vectors
    }

    #[test]
    fn f32_rows_become_unit_rows_in_place_and_their_lengths_are_kept() {
        let mut vectors = Vectors::from(array![[3.0, 4.0], [0.0, 2.0]]);
        let (scales, norms) = vectors.make_unit().unwrap();
        assert!(scales.is_empty());
        assert_eq!((vectors.row(0), vectors.row(1)), (vec![0.6, 0.8], vec![0.0, 1.0]));
        assert_eq!((norms.min, norms.mean, norms.max), (2.0, 3.5, 5.0));
    }

    #[test]
    fn f16_rows_stay_as_they_are_and_get_a_factor() {
        let mut vectors = half(&[&[3.0, 4.0], &[0.0, 2.0]]);
        let (scales, norms) = vectors.make_unit().unwrap();
        assert_eq!(scales, [0.2, 0.5]);
        assert_eq!(vectors.row(0), [3.0, 4.0]);
        assert_eq!((norms.min, norms.max), (2.0, 5.0));
        assert_eq!((vectors.bytes(), vectors.rows(), vectors.dim()), (8, 2, 2));
        assert!(vectors.view(0, 1).is_none());
    }

    #[test]
    fn any_layout_of_a_matrix_becomes_row_after_row() {
        let whole = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        let part = whole.clone().slice_move(ndarray::s![1..2, ..]);
        assert_eq!(Vectors::from(part), Vectors::from(array![[3.0, 4.0]]));
        let columns = whole.clone().reversed_axes();
        assert_eq!(Vectors::from(columns).row(1), [2.0, 4.0, 6.0]);
        let mut pushed = Vectors::with_capacity(Precision::F32, 3, 2);
        whole.rows().into_iter().for_each(|row| pushed.push(&row.to_vec()));
        assert_eq!(Vectors::from(whole), pushed);
    }

    #[test]
    fn rows_without_a_direction_are_named() {
        for (vectors, row, words) in [
            (Vectors::from(array![[1.0, f32::NAN]]), 0, "NaN in column 1"),
            (Vectors::from(array![[1.0, 0.0], [0.0, 0.0]]), 1, "is zero"),
            (half(&[&[1.0, 1.0], &[f32::INFINITY, 1.0]]), 1, "inf in column 0"),
        ] {
            let (at, what) = vectors.check().unwrap_err();
            assert_eq!(at, row);
            assert!(what.to_string().contains(words), "{what}");
            let (again, same) = vectors.clone().make_unit().unwrap_err();
            assert_eq!((again, same.to_string()), (at, what.to_string()));
        }
    }

    #[test]
    fn a_change_of_precision_keeps_directions() {
        let long = Vectors::from(array![[3e8_f32, 4e8], [0.0, 2.0]]);
        let halves = long.to_precision(Precision::F16);
        assert_eq!(halves.precision(), Precision::F16);
        assert!((halves.row(0)[0] - 0.6).abs() < 1e-3 && (halves.row(0)[1] - 0.8).abs() < 1e-3);
        assert_eq!(halves.to_precision(Precision::F32).row(1), [0.0, 1.0]);
    }
}
