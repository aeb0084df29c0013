//! The rows of a `.npy` matrix, one after the other.
//!
//! ndarray-npy reads whole arrays; a file of embeddings may be larger than memory. The format is a
//! magic string, a version, the length of a header and the header, a Python dict literal with
//! `descr`, `fortran_order` and `shape` (numpy.lib.format); then the data.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use half::f16;

/// The longest header: numpy's are below 200 bytes.
const HEADER_BYTES: usize = 4096;

#[derive(Clone, Copy)]
enum Value {
    F16,
    F32,
    F64,
}

impl Value {
    fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// Reads [rows, dim] of f16, f32 or f64, row by row.
pub(super) struct NpyRows {
    path: PathBuf,
    reader: BufReader<File>,
    value: Value,
    left: u64,
    dim: usize,
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
        let mut reader = BufReader::new(file);
        let (header, data_at) = header(&mut reader).with_context(place)?;
        let (value, rows, dim) = parse(&header).with_context(place)?;
        let data = (dim as u64).checked_mul(value.bytes() as u64).and_then(|b| b.checked_mul(rows));
        let whole =
            data.and_then(|data| data.checked_add(data_at)).is_some_and(|all| all == length);
        if dim == 0 || !whole {
            bail!("{}: its {length} bytes are not those of [{rows}, {dim}] values", place());
        }
        Ok(Self { path: path.to_owned(), reader, value, left: rows, dim })
    }

    /// Length of a row.
    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// The next row; none at the end.
    ///
    /// # Errors
    /// If the file ends early.
    pub(super) fn next(&mut self) -> Result<Option<Vec<f32>>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; self.dim * self.value.bytes()];
        self.reader.read_exact(&mut bytes).with_context(|| self.path.display().to_string())?;
        self.left -= 1;
        let row = match self.value {
            Value::F16 => {
                bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            Value::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Value::F64 => {
                bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect()
            }
        };
        Ok(Some(row))
    }
}

/// The header's text, and where the data begins.
fn header(reader: &mut impl Read) -> Result<(String, u64)> {
    let mut start = [0; 8];
    reader.read_exact(&mut start).context("not a .npy file")?;
    if &start[..6] != b"\x93NUMPY" {
        bail!("not a .npy file");
    }
    let (length, before) = match start[6] {
        1 => {
            let mut length = [0; 2];
            reader.read_exact(&mut length)?;
            (usize::from(u16::from_le_bytes(length)), 10)
        }
        2 | 3 => {
            let mut length = [0; 4];
            reader.read_exact(&mut length)?;
            (u32::from_le_bytes(length) as usize, 12)
        }
        version => bail!("a .npy file of version {version}; 1 to 3 are known"),
    };
    if length > HEADER_BYTES {
        bail!("its header has {length} bytes: not a .npy file of one matrix");
    }
    let mut text = vec![0; length];
    reader.read_exact(&mut text)?;
    let text = String::from_utf8(text).map_err(|_| anyhow!("its header is not UTF-8"))?;
    Ok((text, before + length as u64))
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (100, 1280), }`
fn parse(header: &str) -> Result<(Value, u64, usize)> {
    let after = |key: &str| {
        let at = header.find(&format!("'{key}':")).map(|at| at + key.len() + 3);
        at.map(|at| header[at..].trim_start()).ok_or_else(|| anyhow!("its header has no {key}"))
    };
    let kind = after("descr")?.split('\'').nth(1).unwrap_or_default();
    let value = match kind {
        "<f2" => Value::F16,
        "<f4" => Value::F32,
        "<f8" => Value::F64,
        other => bail!("its values are {other:?}: they must be f2, f4 or f8, little-endian"),
    };
    if !after("fortran_order")?.starts_with("False") {
        bail!("its order is Fortran's: save numpy.ascontiguousarray(embeddings)");
    }
    let shape = after("shape")?.trim_start_matches('(').split(')').next().unwrap_or_default();
    let sizes: Vec<&str> = shape.split(',').map(str::trim).filter(|s| !s.is_empty()).collect();
    let [rows, dim] = sizes[..] else {
        bail!("its shape is ({shape}): it must be (rows, dim)");
    };
    let wrong = || format!("its shape is ({shape})");
    Ok((value, rows.parse().with_context(wrong)?, dim.parse().with_context(wrong)?))
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
