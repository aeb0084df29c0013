//! Files of vectors as other tools write and read them; the ending says which.
//!
//! Values become f32, whatever they were; f16 in safetensors stays as it is, so that a version that
//! was exported comes back bit by bit.

mod numpy;
mod safetensors;
mod table;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use angler_vectors::ClassVectors;
use angler_vectors::rows::Vectors;

use crate::commands::UsageError;

/// What a file holds.
#[derive(Debug)]
pub(super) struct Foreign {
    /// [rows, dim], of any length.
    pub vectors: Vectors,
    /// One a row, if the file has them.
    pub labels: Option<Vec<String>>,
    /// The fingerprint of the model that made them, if the file says so.
    pub model: Option<String>,
    /// The file's threshold.
    pub min_score: Option<f32>,
    /// The file's thresholds of single classes.
    pub min_scores: BTreeMap<String, f32>,
}

impl Foreign {
    fn new(vectors: impl Into<Vectors>, labels: Option<Vec<String>>) -> Self {
        Self {
            vectors: vectors.into(),
            labels,
            model: None,
            min_score: None,
            min_scores: BTreeMap::new(),
        }
    }
}

/// A format, by a file's ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Npy,
    Npz,
    Csv,
    Safetensors,
}

impl Format {
    pub(super) fn of(flag: &str, path: &Path) -> Result<Self, UsageError> {
        let ending = path.extension().map(|ending| ending.to_ascii_lowercase());
        match ending.as_ref().and_then(|ending| ending.to_str()) {
            Some("npy") => Ok(Self::Npy),
            Some("npz") => Ok(Self::Npz),
            Some("csv") => Ok(Self::Csv),
            Some("safetensors") => Ok(Self::Safetensors),
            _ => Err(UsageError(format!(
                "{flag} {}: must end in .npy, .npz, .csv or .safetensors",
                path.display()
            ))),
        }
    }

    /// Reads a file; `labels_elsewhere`: a table has no column of labels.
    pub(super) fn read(self, path: &Path, labels_elsewhere: bool) -> Result<Foreign> {
        let place = || path.display().to_string();
        if path.is_dir() {
            bail!("{}: it is a folder", place());
        }
        let file = File::open(path).with_context(place)?;
        let size = file.metadata().with_context(place)?.len();
        match self {
            Self::Npy => numpy::read_npy(BufReader::new(file)),
            Self::Npz => numpy::read_npz(BufReader::new(file)),
            Self::Csv => table::read(BufReader::new(file), labels_elsewhere),
            Self::Safetensors => safetensors::read(BufReader::new(file), size),
        }
        .with_context(place)
    }

    /// Whether the labels lie in a file of their own.
    pub(super) fn labels_beside(self) -> bool {
        matches!(self, Self::Npy | Self::Npz)
    }

    /// Writes unit rows as f32, a table with labels. Not for safetensors, whose files are copied.
    pub(super) fn write(self, classes: &ClassVectors, file: &File) -> Result<()> {
        let mut writer = BufWriter::new(file);
        match self {
            Self::Npy => numpy::write_npy(classes, &mut writer)?,
            Self::Npz => numpy::write_npz(classes, &mut writer)?,
            Self::Csv => table::write(classes, &mut writer)?,
            Self::Safetensors => bail!("a safetensors file is exported as it is"),
        }
        Ok(writer.flush()?)
    }
}

/// The rows as unit vectors: [rows, dim].
fn unit_rows(classes: &ClassVectors) -> ndarray::CowArray<'_, f32, ndarray::Ix2> {
    let (rows, dim) = (classes.vectors().rows(), classes.dim());
    match classes.vectors().view(0, rows) {
        // f32 rows are unit rows already.
        Some(view) => view.into(),
        None => {
            let mut matrix = ndarray::Array2::zeros((rows, dim));
            for (index, mut row) in matrix.rows_mut().into_iter().enumerate() {
                row.assign(&ndarray::Array1::from(classes.unit_row(index)));
            }
            matrix.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use angler_vectors::Contents;
    use angler_vectors::rows::Precision;

    use super::*;

    fn classes(precision: Precision) -> ClassVectors {
        let vectors = Vectors::from(ndarray::array![[3.0, 4.0], [0.0, -2.0], [0.1, 0.7]]);
        let labels = ["a, \"b\"", "ü\n2", "3"].map(str::to_owned).to_vec();
        let contents = Contents::new(labels, vectors.to_precision(precision), "m@1");
        ClassVectors::new(("s", "1"), contents).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_exactly() {
        let folder = tempfile::tempdir().unwrap();
        for precision in [Precision::F32, Precision::F16] {
            let classes = classes(precision);
            let unit = Vectors::from(unit_rows(&classes).into_owned());
            assert!((unit.row(0)[0] - 0.6).abs() < 1e-3);
            for ending in ["npy", "npz", "csv"] {
                let path = folder.path().join(format!("v.{ending}"));
                let format = Format::of("--out", &path).unwrap();
                format.write(&classes, &File::create(&path).unwrap()).unwrap();
                let read = format.read(&path, false).unwrap();
                assert_eq!(read.vectors, unit, "{ending}");
                let labels = ["a, \"b\"", "ü\n2", "3"].map(str::to_owned).to_vec();
                assert_eq!(read.labels, (ending == "csv").then_some(labels));
            }
        }
    }

    #[test]
    fn the_ending_says_the_format() {
        assert_eq!(Format::of("--out", Path::new("a/B.NPY")).unwrap(), Format::Npy);
        for wrong in ["v", "v.", "v.txt", "v.npy.gz", ".npy"] {
            let message = Format::of("--out", Path::new(wrong)).unwrap_err().to_string();
            assert!(message.contains(wrong) && message.contains(".safetensors"), "{message}");
        }
    }

    #[test]
    fn what_is_no_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone.npz");
        let message = format!("{:#}", Format::Npz.read(&path, false).unwrap_err());
        assert!(message.contains("gone.npz: No such file"), "{message}");
        let message = format!("{:#}", Format::Csv.read(folder.path(), false).unwrap_err());
        assert!(message.contains("it is a folder"), "{message}");
    }
}
