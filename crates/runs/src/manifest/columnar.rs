//! A list as a Parquet file.
//!
//! Only the two columns are read, some rows at a time. Their types are taken from Parquet's own schema and
//! not from the Arrow schema that may be embedded: so strings, large strings and dictionaries of them all
//! read as strings.

use std::borrow::Cow;
use std::fs::File;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{Array, BinaryArray, Int32Array, Int64Array, StringArray};
use arrow_schema::Schema;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;

use angler_wire::error::Reason;
use angler_wire::job::ImageRef;

use super::ManifestError;

/// Rows that are read at once.
const ROWS: usize = 1024;

/// A column of a few rows.
enum Column<'a> {
    Text(&'a StringArray),
    /// What writers without Parquet's string type wrote.
    Bytes(&'a BinaryArray),
    Int32(&'a Int32Array),
    Int64(&'a Int64Array),
}

impl<'a> Column<'a> {
    fn of(name: &str, array: &'a dyn Array) -> Result<Self, Reason> {
        if let Some(text) = array.as_string_opt() {
            return Ok(Self::Text(text));
        }
        if let Some(bytes) = array.as_binary_opt() {
            return Ok(Self::Bytes(bytes));
        }
        let numbers = match array.as_primitive_opt::<Int32Type>() {
            Some(numbers) => Some(Self::Int32(numbers)),
            None => array.as_primitive_opt::<Int64Type>().map(Self::Int64),
        };
        match numbers {
            // People number their images.
            Some(numbers) if name == "id" => Ok(numbers),
            _ => {
                let of = array.data_type();
                Err(format!("its column `{name}` is of {of}, not of strings").into())
            }
        }
    }

    /// The value of a row; none if it is null.
    fn get(&self, row: usize) -> Result<Option<Cow<'a, str>>, Reason> {
        let null = match self {
            Self::Text(column) => column.is_null(row),
            Self::Bytes(column) => column.is_null(row),
            Self::Int32(column) => column.is_null(row),
            Self::Int64(column) => column.is_null(row),
        };
        if null {
            return Ok(None);
        }
        Ok(Some(match self {
            Self::Text(column) => Cow::Borrowed(column.value(row)),
            Self::Bytes(column) => Cow::Borrowed(
                std::str::from_utf8(column.value(row)).map_err(|e| Reason::new("not UTF-8", e))?,
            ),
            Self::Int32(column) => Cow::Owned(column.value(row).to_string()),
            Self::Int64(column) => Cow::Owned(column.value(row).to_string()),
        }))
    }
}

/// Hands each row to `push`, with its number from 1.
pub(super) fn read(
    file: File,
    place: &str,
    mut push: impl FnMut(u64, ImageRef) -> Result<(), ManifestError>,
) -> Result<(), ManifestError> {
    let wrong = |reason: Reason| ManifestError::Parquet { place: place.to_owned(), reason };
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)
        .map_err(|e| wrong(Reason::new("cannot be read", e)))?;
    let columns = columns(builder.schema()).map_err(wrong)?;
    decoded(builder.metadata()).map_err(wrong)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), columns);
    let reader = builder.with_projection(mask).with_batch_size(ROWS).build();
    let mut number = 0;
    for batch in reader.map_err(|e| wrong(Reason::new("cannot be read", e)))? {
        let batch = batch.map_err(|e| wrong(Reason::new("cannot be read", e)))?;
        let column = |name| batch.column_by_name(name).map(|array| Column::of(name, array));
        let Some(uris) = column("uri").transpose().map_err(wrong)? else { continue };
        let ids = column("id").transpose().map_err(wrong)?;
        for row in 0..batch.num_rows() {
            number += 1;
            let of_row =
                |reason| ManifestError::Row { place: place.to_owned(), row: number, reason };
            let uri = uris.get(row).map_err(of_row)?;
            let uri = uri.ok_or_else(|| of_row("`uri` is null".into()))?.into_owned();
            let id = ids.as_ref().map_or(Ok(None), |ids| ids.get(row)).map_err(of_row)?;
            let id = id.map(Cow::into_owned).filter(|id| !id.is_empty());
            push(number, ImageRef { uri, id })?;
        }
    }
    Ok(())
}

/// Where the columns stand that are read.
fn columns(schema: &Schema) -> Result<Vec<usize>, Reason> {
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    if !names.contains(&"uri") {
        return Err(format!("has no column `uri`, but {}", names.join(", ")).into());
    }
    Ok((0..names.len()).filter(|at| ["uri", "id"].contains(&names[*at])).collect())
}

/// Whether the columns that are read are compressed in a way that is known here.
fn decoded(metadata: &ParquetMetaData) -> Result<(), Reason> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let name = column.column_path().parts().first().map_or("", String::as_str);
        let known = match column.compression() {
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) => true,
            _ => !["uri", "id"].contains(&name),
        };
        if !known {
            return Err(format!(
                "its column `{name}` is compressed with {}, which is not read here: write the file with snappy, gzip or no compression",
                column.compression()
            )
            .into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use angler_wire::text::chain;

    use super::*;
    use std::sync::Arc;

    use arrow_array::types::Int8Type;
    use arrow_array::{
        ArrayRef, DictionaryArray, Float64Array, LargeStringArray, RecordBatch, StringViewArray,
    };
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;

    type Found = Result<Vec<(u64, String, Option<String>)>, String>;

    fn read_back(columns: Vec<(&str, ArrayRef)>) -> Found {
        let batch = RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, column)| (name, column, true)),
        );
        let batch = batch.unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        images(file)
    }

    fn images(file: File) -> Found {
        let mut found = Vec::new();
        let push = |number, ImageRef { uri, id }| {
            found.push((number, uri, id));
            Ok(())
        };
        read(file, "list.parquet", push).map_err(|e| chain(&e))?;
        Ok(found)
    }

    #[test]
    fn every_kind_of_string_is_read_and_ids_may_be_numbers() {
        let uris = ["s3://b/1", "s3://b/ö, 2"];
        let dictionary: DictionaryArray<Int8Type> = uris.into_iter().collect();
        let kinds: [ArrayRef; 5] = [
            Arc::new(StringArray::from(uris.to_vec())),
            Arc::new(LargeStringArray::from(uris.to_vec())),
            Arc::new(StringViewArray::from(uris.to_vec())),
            Arc::new(BinaryArray::from(uris.map(str::as_bytes).to_vec())),
            Arc::new(dictionary),
        ];
        let wanted = |ids: [Option<&str>; 2]| {
            let rows = uris.iter().zip(ids).zip(1..);
            rows.map(|((uri, id), row)| (row, (*uri).to_owned(), id.map(str::to_owned))).collect()
        };
        for uris in kinds {
            let size: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 2.0]));
            let found = read_back(vec![("size", size), ("uri", uris)]);
            assert_eq!(found, Ok(wanted([None, None])));
        }
        let uri: ArrayRef = Arc::new(StringArray::from(uris.to_vec()));
        let ids: [(ArrayRef, _); 3] = [
            (Arc::new(StringArray::from(vec![Some("sku"), Some("")])), [Some("sku"), None]),
            (Arc::new(Int64Array::from(vec![None, Some(-7)])), [None, Some("-7")]),
            (Arc::new(Int32Array::from(vec![7, 8])), [Some("7"), Some("8")]),
        ];
        for (id, ids) in ids {
            assert_eq!(read_back(vec![("id", id), ("uri", uri.clone())]), Ok(wanted(ids)));
        }
    }

    #[test]
    fn more_rows_than_are_read_at_once_come_in_their_order() {
        let uris: Vec<String> = (0..3 * ROWS + 5).map(|n| format!("s3://b/{n}")).collect();
        let found = read_back(vec![("uri", Arc::new(StringArray::from(uris.clone())))]).unwrap();
        assert_eq!(found.iter().map(|(_, uri, _)| uri.clone()).collect::<Vec<_>>(), uris);
        assert!(found.iter().map(|(number, ..)| *number).eq(1..=uris.len() as u64));
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_reason() {
        let text =
            |values: Vec<Option<&'static str>>| -> ArrayRef { Arc::new(StringArray::from(values)) };
        let one = || text(vec![Some("s3://b/1")]);
        let float: ArrayRef = Arc::new(Float64Array::from(vec![1.5]));
        let number: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"\xff"[..]]));
        for (columns, words) in [
            (
                vec![("uri", text(vec![Some("s3://b/1"), None]))],
                "list.parquet, row 2: `uri` is null",
            ),
            (vec![("url", one()), ("n", number.clone())], "has no column `uri`, but url, n"),
            (vec![("uri", number)], "column `uri` is of Int64, not of strings"),
            (vec![("uri", one()), ("id", float)], "column `id` is of Float64"),
            (vec![("uri", bytes)], "row 1: not UTF-8"),
        ] {
            let error = read_back(columns).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        for bytes in [&b"uri\ns3://b/1\n"[..], b"", b"PAR1 and then nothing PAR1"] {
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, bytes).unwrap();
            let error = images(file).unwrap_err();
            assert!(error.starts_with("list.parquet cannot be read: "), "{error}");
        }
    }
}
