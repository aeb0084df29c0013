//! Embeddings of a run as numpy and others read them: a `.npy` matrix, and the id of each row in a text
//! file beside it.
//!
//! An id is the image's own, or else its URI. A line is the id itself, unless it would not come back as it
//! was: an id that holds a line break or another control character, begins with a quotation mark or is
//! empty stands there as a JSON string.

use std::io::{Error, Result, Write};
use std::path::{Path, PathBuf};

use super::result::Embeddings;

/// Writes a matrix of which the shape is known, and its ids.
pub struct EmbeddingFiles<M: Write, I: Write> {
    matrix: M,
    ids: I,
    shape: (u64, usize),
    rows: u64,
}

/// The file of ids beside a matrix: `x.ids.txt` beside `x.npy`.
pub fn ids_path(matrix: &Path) -> PathBuf {
    matrix.with_extension("ids.txt")
}

impl<M: Write, I: Write> EmbeddingFiles<M, I> {
    /// Begins both.
    ///
    /// # Errors
    /// What the system said, or that lengths differ.
    pub fn new(embeddings: &Embeddings, mut matrix: M, ids: I) -> Result<Self> {
        let Embeddings { rows, dim, other } = *embeddings;
        if let Some(other) = other {
            let error = format!(
                "embeddings of {dim} and of {other} values do not make one matrix: they are of several models"
            );
            return Err(Error::other(error));
        }
        // numpy.lib.format: magic, version 1.0, the header's length, a header that ends at a multiple of 64.
        let shape =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}");
        let length = (10 + shape.len() + 1).next_multiple_of(64) - 10;
        let header = format!("{shape:<width$}\n", width = length - 1);
        matrix.write_all(b"\x93NUMPY\x01\x00")?;
        // Two numbers of at most 20 digits: some 100 bytes.
        matrix.write_all(&(length as u16).to_le_bytes())?;
        matrix.write_all(header.as_bytes())?;
        Ok(Self { matrix, ids, shape: (rows, dim), rows: 0 })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// What the system said.
    pub fn push(&mut self, id: &str, embedding: &[f32]) -> Result<()> {
        if embedding.len() != self.shape.1 {
            return Err(self.other_shape());
        }
        if cfg!(target_endian = "little") {
            self.matrix.write_all(bytemuck::cast_slice(embedding))?;
        } else {
            embedding.iter().try_for_each(|value| self.matrix.write_all(&value.to_le_bytes()))?;
        }
        self.ids.write_all(id_line(id).as_bytes())?;
        self.ids.write_all(b"\n")?;
        self.rows += 1;
        Ok(())
    }

    /// All rows are there.
    ///
    /// # Errors
    /// What the system said, or that the matrix is not what its header says.
    pub fn finish(mut self) -> Result<(M, I)> {
        if self.rows != self.shape.0 {
            return Err(self.other_shape());
        }
        self.matrix.flush()?;
        self.ids.flush()?;
        Ok((self.matrix, self.ids))
    }

    fn other_shape(&self) -> Error {
        let (rows, dim) = self.shape;
        Error::other(format!("the embeddings are not the [{rows}, {dim}] that were counted before"))
    }
}

/// The line of an id.
fn id_line(id: &str) -> std::borrow::Cow<'_, str> {
    // Beyond control characters: where Python's splitlines() breaks a line.
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    if !id.is_empty() && !id.starts_with('"') && !id.contains(breaks) {
        return id.into();
    }
    let mut line = String::from("\"");
    for c in id.chars() {
        match c {
            '"' | '\\' => line.extend(['\\', c]),
            c if breaks(c) => line.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => line.push(c),
        }
    }
    line.push('"');
    line.into()
}

/// The id that a line stands for.
pub fn id_of(line: &str) -> String {
    let quoted = line.starts_with('"').then(|| serde_json::from_str(line).ok()).flatten();
    quoted.unwrap_or_else(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_line_and_comes_back_as_it_was() {
        for id in [
            "sku-1",
            "s3://b/ö, 2.jpg",
            " a\t",
            "\"a\"",
            "\"",
            "a\"b",
            "",
            "two\nlines",
            "end\r",
            "\u{85}\u{2028}\u{b}",
            "back\\slash",
            "\n\\n\"",
            "\u{1f4f7}\n",
        ] {
            let line = id_line(id);
            assert!(!line.contains(['\n', '\r', '\u{85}', '\u{2028}', '\u{b}']), "{line}");
            assert_eq!(id_of(&line), id, "{line}");
        }
        for plain in ["sku-1", "s3://b/ö, 2.jpg", "a\"b", "back\\slash"] {
            assert_eq!(id_line(plain), plain);
        }
        // Lists of ids that others wrote.
        for plain in ["\"a", "\"a\" b", "\"\\x\""] {
            assert_eq!(id_of(plain), plain);
        }
    }

    #[test]
    fn the_header_is_numpys() {
        let embeddings = Embeddings { rows: 2, dim: 3, other: None };
        let mut files = EmbeddingFiles::new(&embeddings, Vec::new(), Vec::new()).unwrap();
        files.push("a", &[1.0, 2.0, 3.0]).unwrap();
        files.push("b\n", &[4.0, 5.0, 6.0]).unwrap();
        let (matrix, ids) = files.finish().unwrap();
        assert_eq!(ids, b"a\n\"b\\u000a\"\n");
        assert_eq!(matrix.len(), 128 + 24);
        let array: ndarray::Array2<f32> =
            ndarray_npy::ReadNpyExt::read_npy(matrix.as_slice()).unwrap();
        assert_eq!(array, ndarray::array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    }

    #[test]
    fn a_matrix_of_another_shape_than_was_counted_is_an_error() {
        let files =
            |embeddings: Embeddings| EmbeddingFiles::new(&embeddings, Vec::new(), Vec::new());
        let error = files(Embeddings { rows: 2, dim: 3, other: Some(4) }).err().unwrap();
        assert!(error.to_string().contains("of 3 and of 4 values"), "{error}");
        let mut short = files(Embeddings { rows: 2, dim: 1, other: None }).unwrap();
        assert!(short.push("a", &[1.0, 2.0]).is_err());
        short.push("a", &[1.0]).unwrap();
        assert!(short.finish().err().unwrap().to_string().contains("[2, 1]"));
    }
}
