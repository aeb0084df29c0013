//! .csv: a label and its values in each line, or values alone where the labels lie elsewhere.

use std::io::{Read, Write};

use anyhow::{Context, Result, anyhow, bail};
use csv::{ReaderBuilder, StringRecord};

use angler_vectors::ClassVectors;
use angler_vectors::rows::{Precision, Vectors};

use super::{Foreign, unit_rows};

/// Reads lines of the same length; the first may be a header, which is one whose second cell is no
/// number.
pub(super) fn read(reader: impl Read, labels_elsewhere: bool) -> Result<Foreign> {
    let mut lines = ReaderBuilder::new().has_headers(false).from_reader(reader);
    let mut record = StringRecord::new();
    let mut labels = Vec::new();
    let mut vectors: Option<Vectors> = None;
    let mut row = Vec::new();
    let mut first_line = true;
    let values_from = usize::from(!labels_elsewhere);
    while lines.read_record(&mut record).context("must be a table of UTF-8, lines of one length")? {
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() <= values_from {
            bail!("line {line}: there must be a label, and its values after commas");
        }
        let second = record.get(1).or(record.get(0)).unwrap_or_default();
        if std::mem::take(&mut first_line) && number(second).is_none() {
            continue;
        }
        row.clear();
        for (column, cell) in record.iter().enumerate().skip(values_from) {
            let value = number(cell);
            row.push(value.ok_or_else(|| {
                anyhow!("line {line}, column {}: {cell:?} is no number", column + 1)
            })?);
        }
        if !labels_elsewhere {
            labels.push(record.get(0).unwrap_or_default().to_owned());
        }
        let empty = || Vectors::with_capacity(Precision::F32, 0, row.len());
        vectors.get_or_insert_with(empty).push(&row);
    }
    let vectors = vectors.context("it has no line with values")?;
    Ok(Foreign::new(vectors, (!labels_elsewhere).then_some(labels)))
}

fn number(cell: &str) -> Option<f32> {
    cell.trim().parse().ok()
}

/// A header, then a label and its values in each line; the values are the shortest decimals that
/// read back as the same f32.
pub(super) fn write(classes: &ClassVectors, writer: impl Write) -> Result<()> {
    let mut lines = csv::Writer::from_writer(writer);
    lines.write_field("label")?;
    for column in 0..classes.dim() {
        lines.write_field(format!("v{column}"))?;
    }
    lines.write_record(None::<&[u8]>)?;
    for (row, class) in unit_rows(classes).rows().into_iter().zip(classes.row_classes()) {
        lines.write_field(classes.labels().get(*class as usize))?;
        for value in row {
            lines.write_field(value.to_string())?;
        }
        lines.write_record(None::<&[u8]>)?;
    }
    Ok(lines.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rows = (Vec<Vec<f32>>, Option<Vec<String>>);

    fn read(text: &str, labels_elsewhere: bool) -> Result<Rows, String> {
        let read = super::read(text.as_bytes(), labels_elsewhere).map_err(|e| format!("{e:#}"))?;
        let rows = (0..read.vectors.rows()).map(|row| read.vectors.row(row));
        Ok((rows.collect(), read.labels))
    }

    #[test]
    fn a_label_and_its_values_are_a_line() {
        let labels = |labels: &[&str]| Some(labels.iter().map(|l| (*l).to_owned()).collect());
        let rows = vec![vec![1.0, -2.5], vec![0.0003, 4.0]];
        for text in [
            "cola,1,-2.5\n7,3e-4,4\n",
            "label,x,y\ncola,1,-2.5\n7,3e-4,4",
            "\u{feff}label,x,y\r\ncola, 1 ,-2.5\r\n\"7\",3e-4,4.0\r\n\r\n",
        ] {
            assert_eq!(read(text, false), Ok((rows.clone(), labels(&["cola", "7"]))), "{text}");
        }
        let quoted = read("\"a, \"\"b\"\"\nc\",1\n", false);
        assert_eq!(quoted, Ok((vec![vec![1.0]], labels(&["a, \"b\"\nc"]))));
    }

    #[test]
    fn values_alone_need_labels_from_elsewhere() {
        let rows = vec![vec![1.0, 2.0], vec![3.0, 4.0]];
        for text in ["1,2\n3,4\n", "x,y\n1,2\n3,4\n"] {
            assert_eq!(read(text, true), Ok((rows.clone(), None)));
        }
        assert_eq!(read("5\n6\n", true), Ok((vec![vec![5.0], vec![6.0]], None)));
    }

    #[test]
    fn what_is_no_table_of_numbers_is_refused_with_its_place() {
        for (text, elsewhere, words) in [
            ("", false, "no line with values"),
            ("label,x\n", false, "no line with values"),
            ("a\n", false, "line 1: there must be a label"),
            ("a,1,2\nb,1\n", false, "lines of one length"),
            ("a,1,2\nb,1,two\n", false, "line 2, column 3: \"two\" is no number"),
            ("label,x\na,\n", false, "line 2, column 2: \"\" is no number"),
            ("a,1\nb,2\n", true, "line 1, column 1: \"a\" is no number"),
        ] {
            let message = read(text, elsewhere).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
        let message = super::read(&b"\xff,1\n"[..], false).unwrap_err();
        assert!(format!("{message:#}").contains("UTF-8"), "{message:#}");
    }
}
