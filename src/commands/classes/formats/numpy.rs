//! .npy and .npz: f16, f32 or f64, in either byte order and either memory order.

use std::io::{Read, Seek, Write};

use anyhow::{Context, Result, anyhow, bail};
use ndarray::Array2;
use ndarray_npy::{NpzWriter, WriteNpyExt};
use zip::ZipArchive;

use angler_vectors::ClassVectors;
use angler_vectors::rows::Vectors;

use super::super::npy::{Npy, NpyError};
use super::{Foreign, unit_rows};

/// The array of an .npz file that holds the vectors, if it has several.
const NAME: &str = "vectors";

pub(super) fn read_npy(reader: impl Read) -> Result<Foreign> {
    let matrix = Npy::open(reader).and_then(Npy::matrix).map_err(refused)?;
    Ok(Foreign::new(Vectors::from(matrix), None))
}

/// What is wrong with a .npy file, and what it should be.
fn refused(error: NpyError) -> anyhow::Error {
    let wanted = match &error {
        // Its data was cut off or goes on: the rest is as it should be.
        NpyError::Short | NpyError::Long(_) => "must be a whole .npy file",
        NpyError::Read(_) => "cannot be read as a .npy file",
        _ => "must be a .npy file of f16, f32 or f64, [rows, dim]",
    };
    anyhow!(error).context(wanted)
}

pub(super) fn read_npz(reader: impl Read + Seek) -> Result<Foreign> {
    let mut npz = ZipArchive::new(reader).context("must be a .npz file")?;
    let names: Vec<String> =
        npz.file_names().map(|name| name.strip_suffix(".npy").unwrap_or(name).to_owned()).collect();
    let matrix = match names.iter().position(|name| name == NAME) {
        Some(at) => array(&mut npz, at, NAME)?.map_err(|e| in_array(NAME, e))?,
        None => the_only_matrix(&mut npz, &names)?,
    };
    Ok(Foreign::new(Vectors::from(matrix), None))
}

fn in_array(name: &str, error: NpyError) -> anyhow::Error {
    refused(error).context(format!("array `{name}`"))
}

/// The array at this place of the archive; the inner error is about what it holds.
fn array(
    npz: &mut ZipArchive<impl Read + Seek>,
    at: usize,
    name: &str,
) -> Result<Result<Array2<f32>, NpyError>> {
    let file = npz.by_index(at).with_context(|| format!("array `{name}`"))?;
    Ok(Npy::open(file).and_then(Npy::matrix))
}

/// Labels are often kept beside the vectors: what is no matrix of numbers is passed over.
fn the_only_matrix(
    npz: &mut ZipArchive<impl Read + Seek>,
    names: &[String],
) -> Result<Array2<f32>> {
    let mut found = None;
    for (at, name) in names.iter().enumerate() {
        let matrix = match array(npz, at, name)? {
            Ok(matrix) => matrix,
            Err(error @ (NpyError::Short | NpyError::Long(_) | NpyError::Read(_))) => {
                return Err(in_array(name, error));
            }
            Err(_) => continue,
        };
        if found.replace(matrix).is_some() {
            bail!("it holds several matrices ({}); name one `{NAME}`", names.join(", "));
        }
    }
    found.ok_or_else(|| {
        let names = names.join(", ");
        anyhow!("none of its arrays ({names}) is a matrix [rows, dim] of f16, f32 or f64")
    })
}

pub(super) fn write_npy(classes: &ClassVectors, writer: impl Write) -> Result<()> {
    Ok(unit_rows(classes).write_npy(writer)?)
}

pub(super) fn write_npz(classes: &ClassVectors, writer: impl Write + Seek) -> Result<()> {
    let mut npz = NpzWriter::new(writer);
    npz.add_array(NAME, &unit_rows(classes))?;
    npz.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use half::f16;
    use ndarray::{Array1, array};

    use super::*;

    /// A .npy file, format version 1.0, by hand.
    fn npy(descriptor: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descriptor}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
        let header = format!("{header:<117}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vectors, String> {
        let read = read_npy(bytes).map_err(|e| format!("{e:#}"))?;
        assert!(read.labels.is_none());
        Ok(read.vectors)
    }

    #[test]
    fn every_float_is_read_in_both_orders() {
        let rows = array![[1.0_f32, -2.0, 0.5], [0.25, 3.0, 4.0]];
        let columns: Vec<f32> = rows.t().iter().copied().collect();
        let plain: Vec<f32> = rows.iter().copied().collect();
        type Encode = fn(f32) -> Vec<u8>;
        let kinds: [(&str, Encode); 6] = [
            ("<f2", |x| f16::from_f32(x).to_le_bytes().to_vec()),
            (">f2", |x| f16::from_f32(x).to_be_bytes().to_vec()),
            ("<f4", |x| x.to_le_bytes().to_vec()),
            (">f4", |x| x.to_be_bytes().to_vec()),
            ("<f8", |x| f64::from(x).to_le_bytes().to_vec()),
            (">f8", |x| f64::from(x).to_be_bytes().to_vec()),
        ];
        for (descriptor, encode) in kinds {
            for (fortran, values) in [("False", &plain), ("True", &columns)] {
                let data: Vec<u8> = values.iter().flat_map(|x| encode(*x)).collect();
                let file = npy(descriptor, fortran, "(2, 3)", &data);
                assert_eq!(read(&file), Ok(Vectors::from(rows.clone())), "{descriptor} {fortran}");
                let message = read(&file[..file.len() - 1]).unwrap_err();
                assert!(message.contains("must be a whole .npy file"), "{message}");
                let message = read(&[&file[..], &[0; 2]].concat()).unwrap_err();
                assert!(message.contains("must be a whole .npy file"), "{message}");
            }
        }
    }

    #[test]
    fn more_values_than_are_converted_at_once_are_all_read() {
        // 16,384 values are converted at once.
        let matrix = Array2::from_shape_fn((7_000, 5), |(r, c)| (r * 5 + c) as f32);
        let mut file = Vec::new();
        matrix.write_npy(&mut file).unwrap();
        assert_eq!(read(&file), Ok(Vectors::from(matrix)));
    }

    #[test]
    fn what_is_no_matrix_of_floats_is_refused() {
        for file in [
            npy("<i4", "False", "(1, 2)", &[0; 8]),
            npy("<f4", "False", "(2,)", &[0; 8]),
            npy("<f4", "False", "(1, 1, 2)", &[0; 8]),
            b"garbage".to_vec(),
            // A shape that no memory holds.
            npy("<f4", "False", "(4000000000000, 4000000000000)", &[0; 8]),
        ] {
            let message = read(&file).unwrap_err();
            assert!(message.contains(".npy file"), "{message}");
        }
        let promised = npy("<f8", "False", "(1000000000, 1000)", &[0; 64]);
        assert!(read(&promised).unwrap_err().contains("must be a whole .npy file"));
    }

    type Writer = NpzWriter<Cursor<Vec<u8>>>;

    /// Adds an array under a name.
    type Add<'a> = &'a dyn Fn(&mut Writer, &str);

    fn npz(arrays: &[(&str, Add<'_>)]) -> Vec<u8> {
        let mut writer = NpzWriter::new(Cursor::new(Vec::new()));
        arrays.iter().for_each(|(name, add)| add(&mut writer, name));
        writer.finish().unwrap().into_inner()
    }

    #[test]
    fn the_matrix_called_vectors_or_the_only_one_is_taken() {
        let one = |w: &mut Writer, n: &str| w.add_array(n, &array![[1.0, 2.0]]).unwrap();
        let two = |w: &mut Writer, n: &str| w.add_array(n, &array![[3.0_f32, 4.0]]).unwrap();
        let ids = |w: &mut Writer, n: &str| w.add_array(n, &array![[7_i64, 8]]).unwrap();
        let line = |w: &mut Writer, n: &str| w.add_array(n, &Array1::<f32>::zeros(3)).unwrap();
        let read = |file: Vec<u8>| {
            let read = read_npz(Cursor::new(file)).map_err(|e| format!("{e:#}"));
            read.map(|foreign| foreign.vectors.row(0))
        };
        assert_eq!(read(npz(&[("other", &one), ("vectors", &two)])), Ok(vec![3.0, 4.0]));
        assert_eq!(read(npz(&[("ids", &ids), ("x", &one), ("y", &line)])), Ok(vec![1.0, 2.0]));
        for (file, words) in [
            (npz(&[("x", &one), ("y", &two)]), "several matrices (x, y)"),
            (npz(&[("ids", &ids), ("y", &line)]), "none of its arrays (ids, y)"),
            (npz(&[]), "none of its arrays"),
            (npz(&[("vectors", &ids), ("x", &one)]), "array `vectors`: must be a .npy file of f16"),
            (b"garbage".to_vec(), "must be a .npz file"),
        ] {
            let message = read(file).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }
}
