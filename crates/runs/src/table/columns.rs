//! Results as Parquet: the columns of [`super::Row`], with types.
//!
//! Columns of few different values are dictionaries, so that pandas makes categories of them. A row group
//! is closed when it has some megabytes, since all of it is held until then: with embeddings of a thousand
//! values that is some thousand rows. Embeddings are neither compressed nor given a dictionary or
//! statistics: their bits are as good as random.

use std::io::{Error, Result, Write};
use std::sync::Arc;

use arrow_array::builder::{Float32Builder, StringBuilder, StringDictionaryBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, FixedSizeListArray, Float32Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{ArrowError, DataType, Field, Fields, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::Row;
use crate::result::Embeddings;

/// A row group has at most so many bytes and rows.
const GROUP_BYTES: usize = 16 << 20;
const GROUP_ROWS: usize = 1 << 17;
/// Rows are handed on when they have so many bytes, or are so many.
const BATCH_BYTES: usize = 2 << 20;
const BATCH_ROWS: usize = 1024;

/// Writes rows as Parquet.
pub struct Columns<W: Write + Send> {
    writer: ArrowWriter<W>,
    schema: SchemaRef,
    rows: usize,
    bytes: usize,
    uri: StringBuilder,
    id: StringBuilder,
    label: Words,
    score: Float32Builder,
    margin: Float32Builder,
    error: Words,
    message: StringBuilder,
    top: Top,
    job: StringBuilder,
    classes: Words,
    model: Words,
    backend: Words,
    embedding: Option<Vectors>,
}

type Words = StringDictionaryBuilder<Int32Type>;

impl<W: Write + Send> Columns<W> {
    /// Columns to `writer`; `embedding` is among them if there are any.
    pub(super) fn new(embeddings: &Embeddings, writer: W) -> Result<Self> {
        let embedding = (embeddings.rows > 0).then(|| Vectors::new(embeddings));
        let schema = Arc::new(schema(embedding.as_ref()));
        let vectors = ColumnPath::new(["embedding", "list", "element"].map(str::to_owned).to_vec());
        let properties = WriterProperties::builder()
            .set_created_by(concat!("angler version ", env!("CARGO_PKG_VERSION")).to_owned())
            .set_compression(Compression::SNAPPY)
            .set_max_row_group_bytes(Some(GROUP_BYTES))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_column_compression(vectors.clone(), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(vectors.clone(), false)
            .set_column_statistics_enabled(vectors, EnabledStatistics::None)
            .build();
        let writer = ArrowWriter::try_new(writer, schema.clone(), Some(properties));
        Ok(Self {
            writer: writer.map_err(of_parquet)?,
            schema,
            rows: 0,
            bytes: 0,
            uri: StringBuilder::new(),
            id: StringBuilder::new(),
            label: Words::new(),
            score: Float32Builder::new(),
            margin: Float32Builder::new(),
            error: Words::new(),
            message: StringBuilder::new(),
            top: Top::default(),
            job: StringBuilder::new(),
            classes: Words::new(),
            model: Words::new(),
            backend: Words::new(),
            embedding,
        })
    }

    /// Appends a row.
    pub(super) fn push(&mut self, row: &Row<'_>) -> Result<()> {
        self.uri.append_option(row.uri);
        self.id.append_option(row.id);
        self.label.append_option(row.label);
        self.score.append_option(row.score);
        self.margin.append_option(row.margin);
        self.error.append_option(row.error);
        self.message.append_option(row.message);
        self.top.push(row);
        self.job.append_value(row.job);
        self.classes.append_option(row.classes);
        self.model.append_option(row.model);
        self.backend.append_option(row.backend);
        if let Some(vectors) = &mut self.embedding {
            vectors.push(row.embedding);
        }
        self.rows += 1;
        self.bytes += row.embedding.map_or(0, size_of_val)
            + [row.uri, row.id, row.message].iter().flatten().map(|text| text.len()).sum::<usize>();
        match self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES {
            true => self.hand_on(),
            false => Ok(()),
        }
    }

    /// What was appended goes to the writer.
    fn hand_on(&mut self) -> Result<()> {
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(self.uri.finish()),
            Arc::new(self.id.finish()),
            Arc::new(self.label.finish()),
            Arc::new(self.score.finish()),
            Arc::new(self.margin.finish()),
            Arc::new(self.error.finish()),
            Arc::new(self.message.finish()),
            self.top.finish().map_err(of_arrow)?,
            Arc::new(self.job.finish()),
            Arc::new(self.classes.finish()),
            Arc::new(self.model.finish()),
            Arc::new(self.backend.finish()),
        ];
        if let Some(vectors) = &mut self.embedding {
            columns.push(vectors.finish().map_err(of_arrow)?);
        }
        (self.rows, self.bytes) = (0, 0);
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(of_arrow)?;
        self.writer.write(&batch).map_err(of_parquet)
    }

    /// All rows are there.
    pub(super) fn finish(mut self) -> Result<W> {
        self.hand_on()?;
        let mut writer = self.writer.into_inner().map_err(of_parquet)?;
        writer.flush()?;
        Ok(writer)
    }
}

fn schema(embedding: Option<&Vectors>) -> Schema {
    let words = || DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let mut fields = vec![
        Field::new("uri", DataType::Utf8, true),
        Field::new("id", DataType::Utf8, true),
        Field::new("label", words(), true),
        Field::new("score", DataType::Float32, true),
        Field::new("margin", DataType::Float32, true),
        Field::new("error", words(), true),
        Field::new("message", DataType::Utf8, true),
        Field::new_list("top", element(DataType::Struct(of_top())), true),
        Field::new("job", DataType::Utf8, false),
        Field::new("classes", words(), true),
        Field::new("model", words(), true),
        Field::new("backend", words(), true),
    ];
    if let Some(vectors) = embedding {
        let value = element(DataType::Float32);
        fields.push(match vectors.same {
            Some(dim) => Field::new_fixed_size_list("embedding", value, dim, true),
            None => Field::new_list("embedding", value, true),
        });
    }
    Schema::new(fields)
}

/// What a list consists of, under the name that Parquet's specification gives it.
fn element(kind: DataType) -> Field {
    Field::new("element", kind, false)
}

fn of_top() -> Fields {
    vec![Field::new("label", DataType::Utf8, false), Field::new("score", DataType::Float32, false)]
        .into()
}

/// The best classes of some rows.
#[derive(Default)]
struct Top {
    labels: StringBuilder,
    scores: Vec<f32>,
    lengths: Vec<usize>,
    valid: Vec<bool>,
}

impl Top {
    fn push(&mut self, row: &Row<'_>) {
        let top = row.top.unwrap_or_default();
        for best in top {
            self.labels.append_value(&best.label);
            self.scores.push(best.score);
        }
        self.lengths.push(top.len());
        self.valid.push(row.top.is_some());
    }

    fn finish(&mut self) -> std::result::Result<ArrayRef, ArrowError> {
        let Self { labels, scores, lengths, valid } = std::mem::take(self);
        let labels: StringArray = { labels }.finish();
        let columns: Vec<ArrayRef> = vec![Arc::new(labels), Arc::new(Float32Array::from(scores))];
        let values = StructArray::try_new(of_top(), columns, None)?;
        let field = Arc::new(element(DataType::Struct(of_top())));
        let offsets = OffsetBuffer::from_lengths(lengths);
        let nulls = Some(NullBuffer::from(valid));
        Ok(Arc::new(ListArray::try_new(field, offsets, Arc::new(values), nulls)?))
    }
}

/// The embeddings of some rows.
struct Vectors {
    /// The length of each, if they are alike.
    same: Option<i32>,
    values: Vec<f32>,
    lengths: Vec<usize>,
    valid: Vec<bool>,
}

impl Vectors {
    fn new(embeddings: &Embeddings) -> Self {
        let same = embeddings.other.is_none().then(|| i32::try_from(embeddings.dim).ok()).flatten();
        Self { same, values: Vec::new(), lengths: Vec::new(), valid: Vec::new() }
    }

    fn push(&mut self, embedding: Option<&[f32]>) {
        let before = self.values.len();
        self.values.extend_from_slice(embedding.unwrap_or_default());
        if let (None, Some(dim)) = (embedding, self.same) {
            // A list of a fixed size has values where it is null, too.
            self.values.resize(before + dim as usize, 0.0);
        }
        self.lengths.push(self.values.len() - before);
        self.valid.push(embedding.is_some());
    }

    fn finish(&mut self) -> std::result::Result<ArrayRef, ArrowError> {
        let values = Arc::new(Float32Array::from(std::mem::take(&mut self.values)));
        let lengths = std::mem::take(&mut self.lengths);
        let nulls = Some(NullBuffer::from(std::mem::take(&mut self.valid)));
        let field = Arc::new(element(DataType::Float32));
        Ok(match self.same {
            Some(dim) => Arc::new(FixedSizeListArray::try_new(field, dim, values, nulls)?),
            None => {
                let offsets = OffsetBuffer::from_lengths(lengths);
                Arc::new(ListArray::try_new(field, offsets, values, nulls)?)
            }
        })
    }
}

fn of_arrow(error: ArrowError) -> Error {
    Error::other(error)
}

/// A full disk is told as such.
fn of_parquet(error: ParquetError) -> Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<Error>() {
            Ok(error) => *error,
            Err(other) => Error::other(other),
        },
        other => Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use arrow_array::Array;
    use arrow_array::cast::AsArray;
    use arrow_array::types::Float32Type;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use angler_wire::job::LabelScore;

    use super::*;

    fn read_back(file: File) -> (SchemaRef, usize, Vec<RecordBatch>) {
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        let (schema, groups) = (builder.schema().clone(), builder.metadata().num_row_groups());
        (schema, groups, builder.build().unwrap().map(|batch| batch.unwrap()).collect())
    }

    fn written(embeddings: &Embeddings, rows: &[Row<'_>]) -> (SchemaRef, RecordBatch) {
        let file = tempfile::tempfile().unwrap();
        let mut columns = Columns::new(embeddings, file).unwrap();
        rows.iter().for_each(|row| columns.push(row).unwrap());
        let (schema, _, mut batches) = read_back(columns.finish().unwrap());
        (schema, batches.remove(0))
    }

    #[test]
    fn embeddings_are_lists_of_a_fixed_size_only_if_all_are_alike() {
        let rows = |last: &'static [f32]| {
            [Some(&[1.0, 2.0][..]), None, Some(last)].map(|embedding| Row {
                embedding,
                job: "n/0",
                ..Row::default()
            })
        };
        let alike = Embeddings { rows: 2, dim: 2, other: None };
        let (schema, batch) = written(&alike, &rows(&[3.0, 4.0]));
        let field = schema.field_with_name("embedding").unwrap();
        let fixed = Field::new_fixed_size_list("embedding", element(DataType::Float32), 2, true);
        assert_eq!(*field, fixed);
        let column = batch.column_by_name("embedding").unwrap().as_fixed_size_list();
        assert!(column.is_null(1));
        assert_eq!(column.value(2).as_primitive::<Float32Type>().values(), &[3.0, 4.0]);

        let mixed = Embeddings { other: Some(3), ..alike };
        let (schema, batch) = written(&mixed, &rows(&[3.0, 4.0, 5.0]));
        let field = schema.field_with_name("embedding").unwrap();
        assert_eq!(*field, Field::new_list("embedding", element(DataType::Float32), true));
        let column = batch.column_by_name("embedding").unwrap().as_list::<i32>();
        assert!(column.is_null(1));
        assert_eq!(column.value(2).as_primitive::<Float32Type>().values(), &[3.0, 4.0, 5.0]);

        let none = [Row { job: "n/0", ..Row::default() }];
        let (schema, _) = written(&Embeddings::default(), &none);
        assert!(schema.field_with_name("embedding").is_err());
        assert_eq!(schema.fields().len(), 12);
    }

    #[test]
    fn no_rows_are_a_file_with_columns() {
        let columns = Columns::new(&Embeddings::default(), tempfile::tempfile().unwrap()).unwrap();
        let (schema, _, batches) = read_back(columns.finish().unwrap());
        assert_eq!((schema.fields().len(), batches.len()), (12, 0));
    }

    #[test]
    fn what_is_held_does_not_grow_with_the_rows() {
        const ROWS: usize = 30_000;
        const DIM: usize = 512;
        let embeddings = Embeddings { rows: ROWS as u64, dim: DIM, other: None };
        let mut columns = Columns::new(&embeddings, tempfile::tempfile().unwrap()).unwrap();
        let top = [LabelScore { label: "red".to_owned(), score: 0.5 }];
        let mut embedding = [0.25; DIM];
        let mut most = 0;
        for number in 0..ROWS {
            let uri = format!("s3://photos/{number:012}.jpg");
            embedding[0] = number as f32;
            columns
                .push(&Row {
                    uri: Some(&uri),
                    label: Some("red"),
                    score: Some(0.5),
                    top: Some(&top),
                    job: "n/0",
                    embedding: Some(&embedding),
                    ..Row::default()
                })
                .unwrap();
            most = most.max(columns.writer.memory_size() + columns.bytes);
        }
        // 60 MB have passed through.
        assert!(most > GROUP_BYTES / 2 && most < 2 * GROUP_BYTES, "{most}");
        let (_, groups, batches) = read_back(columns.finish().unwrap());
        assert!((3..8).contains(&groups), "{groups}");
        let first = |batch: &RecordBatch| -> Vec<f32> {
            let column = batch.column_by_name("embedding").unwrap().as_fixed_size_list();
            let values = column.values().as_primitive::<Float32Type>().values();
            values.iter().step_by(DIM).copied().collect()
        };
        let numbers: Vec<f32> = batches.iter().flat_map(first).collect();
        assert!(numbers.iter().copied().eq((0..ROWS).map(|number| number as f32)));
    }
}
