//! Reads `.npy` matrices: the whole matrix, or the rows of a file that may be larger than memory.
//!
//! The format is a magic string, a version, the length of a header and the header, a Python dict
//! literal with `descr`, `fortran_order` and `shape` (numpy.lib.format); then the data. Values of any
//! width and byte order become f32, some at a time: a file of f64 is never in memory as f64, and
//! memory is taken as data arrives and not as a header promises it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use half::f16;
use ndarray::{Array2, ShapeBuilder};
use py_literal::Value;

/// The longest header: numpy's are below 200 bytes.
const HEADER_BYTES: usize = 4096;
/// Values that are converted at once.
const CHUNK: usize = 16 * 1024;

/// Why something is not a matrix of floats.
#[derive(Debug, thiserror::Error)]
pub(super) enum NpyError {
    #[error("not a .npy file: {0}")]
    Header(&'static str),
    #[error("not a .npy file: its header is not a Python literal: {0}")]
    Literal(#[source] Box<py_literal::ParseError>),
    #[error("its values are {0}: they must be f2, f4 or f8")]
    Values(Value),
    #[error("its shape is {0}: it must be (rows, dim)")]
    Shape(Value),
    #[error("its data ends early")]
    Short,
    #[error("{0} bytes follow its data")]
    Long(u64),
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Appends stored values as f32.
type Append = fn(&[u8], &mut Vec<f32>);

/// How a value is stored.
#[derive(Clone, Copy)]
struct Element {
    bytes: usize,
    append: Append,
}

impl Element {
    fn of(descriptor: &str) -> Option<Self> {
        let (bytes, append): (_, Append) = match descriptor {
            "<f2" => (2, |b, all| extend(b, all, |b| f16::from_le_bytes(b).to_f32())),
            ">f2" => (2, |b, all| extend(b, all, |b| f16::from_be_bytes(b).to_f32())),
            "<f4" => (4, |b, all| extend(b, all, f32::from_le_bytes)),
            ">f4" => (4, |b, all| extend(b, all, f32::from_be_bytes)),
            "<f8" => (8, |b, all| extend(b, all, |b| f64::from_le_bytes(b) as f32)),
            ">f8" => (8, |b, all| extend(b, all, |b| f64::from_be_bytes(b) as f32)),
            _ => return None,
        };
        Some(Self { bytes, append })
    }
}

fn extend<const N: usize>(bytes: &[u8], all: &mut Vec<f32>, value: fn([u8; N]) -> f32) {
    all.extend(bytes.as_chunks().0.iter().map(|bytes| value(*bytes)));
}

/// A matrix of which the header is read.
pub(super) struct Npy<R> {
    reader: R,
    element: Element,
    is_fortran: bool,
    rows: usize,
    dim: usize,
    /// Bytes before the data.
    before: u64,
}

impl<R: Read> Npy<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// If it is not that of a matrix of floats.
    pub(super) fn open(mut reader: R) -> Result<Self, NpyError> {
        let (header, before) = header(&mut reader)?;
        let header: Value = header.trim().parse().map_err(|e| NpyError::Literal(Box::new(e)))?;
        let Value::Dict(header) = header else {
            return Err(NpyError::Header("its header is not a dict"));
        };
        let entry = |key: &str| {
            let found = header.iter().find(|(k, _)| k.as_string().is_some_and(|k| k == key));
            found.map(|(_, value)| value)
        };
        let (Some(descr), Some(Value::Boolean(is_fortran)), Some(shape)) =
            (entry("descr"), entry("fortran_order"), entry("shape"))
        else {
            return Err(NpyError::Header("its header lacks descr, fortran_order or shape"));
        };
        let element = descr.as_string().and_then(|text| Element::of(text));
        let element = element.ok_or_else(|| NpyError::Values(descr.clone()))?;
        let (rows, dim) = matrix_shape(shape).ok_or_else(|| NpyError::Shape(shape.clone()))?;
        Ok(Self { reader, element, is_fortran: *is_fortran, rows, dim, before })
    }

    /// Reads all values, which nothing may follow.
    ///
    /// # Errors
    /// If the data is not as long as the header says, or cannot be read.
    pub(super) fn matrix(mut self) -> Result<Array2<f32>, NpyError> {
        let values = self.values(self.rows * self.dim)?;
        match io::copy(&mut self.reader, &mut io::sink())? {
            0 => {}
            more => return Err(NpyError::Long(more)),
        }
        let shape = (self.rows, self.dim).set_f(self.is_fortran);
        Array2::from_shape_vec(shape, values).map_err(|_| NpyError::Short)
    }

    /// Reads the next `count` values.
    fn values(&mut self, count: usize) -> Result<Vec<f32>, NpyError> {
        let Element { bytes, append } = self.element;
        let mut all = Vec::new();
        let mut buffer = vec![0; bytes * CHUNK.min(count)];
        while all.len() < count {
            let part = &mut buffer[..bytes * CHUNK.min(count - all.len())];
            self.reader.read_exact(part).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => NpyError::Short,
                _ => error.into(),
            })?;
            append(part, &mut all);
        }
        Ok(all)
    }
}

/// Returns rows and columns, if an array in memory can have so many.
fn matrix_shape(shape: &Value) -> Option<(usize, usize)> {
    let [rows, dim] = shape.as_tuple()?.as_slice() else { return None };
    let size = |value: &Value| value.as_integer()?.try_into().ok();
    let (rows, dim): (usize, usize) = (size(rows)?, size(dim)?);
    let bytes = rows.checked_mul(dim)?.checked_mul(size_of::<f64>())?;
    isize::try_from(bytes).is_ok().then_some((rows, dim))
}

/// The header's text, and where the data begins.
fn header(reader: &mut impl Read) -> Result<(String, u64), NpyError> {
    let cut = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => NpyError::Header("it ends in its header"),
        _ => error.into(),
    };
    let mut start = [0; 8];
    reader.read_exact(&mut start).map_err(cut)?;
    if &start[..6] != b"\x93NUMPY" {
        return Err(NpyError::Header("it begins otherwise"));
    }
    let (length, before) = match start[6] {
        1 => {
            let mut length = [0; 2];
            reader.read_exact(&mut length).map_err(cut)?;
            (usize::from(u16::from_le_bytes(length)), 10)
        }
        2 | 3 => {
            let mut length = [0; 4];
            reader.read_exact(&mut length).map_err(cut)?;
            (u32::from_le_bytes(length) as usize, 12)
        }
        _ => return Err(NpyError::Header("its version is not 1, 2 or 3")),
    };
    if length > HEADER_BYTES {
        return Err(NpyError::Header("its header is too long for that of one matrix"));
    }
    let mut text = vec![0; length];
    reader.read_exact(&mut text).map_err(cut)?;
    let text = String::from_utf8(text).map_err(|_| NpyError::Header("its header is not UTF-8"))?;
    Ok((text, before + length as u64))
}

/// Reads [rows, dim] of f16, f32 or f64, row by row.
pub(super) struct NpyRows {
    path: PathBuf,
    npy: Npy<BufReader<File>>,
    left: usize,
}

impl NpyRows {
    /// Opens the file and checks its header and its length.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let file = File::open(path).with_context(place)?;
        let length = file.metadata().with_context(place)?.len();
        let npy = Npy::open(BufReader::new(file)).with_context(place)?;
        let Npy { rows, dim, before, .. } = npy;
        if npy.is_fortran {
            bail!("{}: its order is Fortran's: save numpy.ascontiguousarray(embeddings)", place());
        }
        if dim == 0 || before + (rows * dim * npy.element.bytes) as u64 != length {
            bail!("{}: its {length} bytes are not those of [{rows}, {dim}] values", place());
        }
        Ok(Self { path: path.to_owned(), npy, left: rows })
    }

    /// Length of a row.
    pub(super) fn dim(&self) -> usize {
        self.npy.dim
    }

    /// The next row; none at the end.
    ///
    /// # Errors
    /// If the file ends early.
    pub(super) fn next(&mut self) -> Result<Option<Vec<f32>>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let row = self.npy.values(self.npy.dim);
        Ok(Some(row.with_context(|| self.path.display().to_string())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, Array2, ArrayBase, array};
    use ndarray_npy::{WritableElement, WriteNpyExt};
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn npy<A: WritableElement, S: ndarray::Data<Elem = A>, D: ndarray::Dimension>(
        array: &ArrayBase<S, D>,
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        array.write_npy(&mut bytes).unwrap();
        bytes
    }

    fn rows(bytes: &[u8]) -> Result<Vec<Vec<f32>>> {
        let file = file(bytes);
        let mut rows = NpyRows::open(file.path())?;
        std::iter::from_fn(|| rows.next().transpose()).collect()
    }

    #[test]
    fn rows_come_in_their_order_whatever_the_width_of_a_value() {
        let matrix = array![[1.0, -2.5, 3.0], [0.5, 0.0, -1.0]];
        let expected = [[1.0, -2.5, 3.0], [0.5, 0.0, -1.0]];
        assert_eq!(rows(&npy(&matrix)).unwrap(), expected);
        assert_eq!(rows(&npy(&matrix.mapv(|x: f64| x as f32))).unwrap(), expected);
        let mut half = b"\x93NUMPY\x01\x00\x46\x00".to_vec();
        half.extend(
            format!("{:<69}\n", "{'descr': '<f2', 'fortran_order': False, 'shape': (1, 2), }")
                .bytes(),
        );
        half.extend([1.0, -2.0].map(f16::from_f64).iter().flat_map(|x| x.to_le_bytes()));
        assert_eq!(rows(&half).unwrap(), [[1.0, -2.0]]);
    }

    #[test]
    fn what_is_not_a_matrix_of_floats_is_refused() {
        let whole = npy(&Array2::<f32>::zeros((3, 4)));
        let fortran = npy(&Array2::<f32>::zeros((3, 4)).reversed_axes());
        for (bytes, words) in [
            (whole[..whole.len() - 1].to_vec(), "are not those of [3, 4]"),
            (npy(&Array1::<f32>::zeros(3)), "must be (rows, dim)"),
            (npy(&Array2::<i64>::zeros((3, 4))), "<i8"),
            (fortran, "Fortran"),
            (npy(&Array2::<f32>::zeros((3, 0))), "[3, 0]"),
            (b"hello, this is text".to_vec(), "not a .npy file"),
            (Vec::new(), "not a .npy file"),
        ] {
            let error = format!("{:#}", rows(&bytes).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
