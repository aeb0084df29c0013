//! The class vectors file, `angler.class-vectors/1`: one safetensors file a version.
//!
//! Tensor `vectors`, f32 or f16, [rows, dim]. String metadata: `format`, `labels` (a JSON array,
//! one label a row), `model` (the fingerprint), and optionally `min_score`, `min_scores` (a JSON
//! object, label to threshold), `created_at`, `source`. Safetensors was chosen because any tool can
//! write it and nothing in it executes.
//!
//! A file is read as it arrives, chunk by chunk into the vectors' final place: a set of a million
//! classes is never in memory twice. What its header says is checked before its data is waited for.

use std::collections::{BTreeMap, HashMap};
use std::num::ParseFloatError;

use safetensors::tensor::{Dtype, Metadata, TensorView};
use serde::de::DeserializeOwned;

use angler_wire::error::Reason;

use super::{ClassVectors, ClassesError, Contents};
use crate::class_vectors::label_count;
use crate::rows::{Precision, Vectors};

/// The metadata's `format`. Version 1 exists because there was none before it.
pub const FORMAT: &str = "angler.class-vectors/1";

/// The largest header that is read, as in the safetensors format's own library: a million labels
/// are about 15 MB.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The model that a version must have been made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its fingerprint.
    pub model: String,
    /// Length of its embeddings.
    pub dim: usize,
}

impl Expected {
    /// Refuses vectors of another model or length.
    ///
    /// # Errors
    /// [`ClassesError::ModelMismatch`], [`ClassesError::Invalid`].
    pub fn check(&self, place: &str, model: &str, dim: usize) -> Result<(), ClassesError> {
        if model != self.model {
            return Err(ClassesError::ModelMismatch {
                place: place.to_owned(),
                made_with: model.to_owned(),
                running: self.model.clone(),
            });
        }
        if dim != self.dim {
            return Err(ClassesError::Invalid {
                place: place.to_owned(),
                reason: format!("its vectors have {dim} values, the model's {}", self.dim).into(),
            });
        }
        Ok(())
    }
}

/// Reads one version as its bytes arrive.
pub struct Reader {
    place: String,
    /// Bytes of the whole file.
    size: u64,
    /// Bytes taken so far.
    seen: u64,
    expected: Option<Expected>,
    /// The 8 bytes of the header's length, then the header; empty once it is read.
    header: Vec<u8>,
    contents: Option<Contents>,
    /// Where the vectors lie, counted from the file's start.
    data: std::ops::Range<u64>,
}

impl Reader {
    /// A reader for a file of `size` bytes at `place`; vectors of another model than `expected`
    /// are refused as soon as the header is there.
    pub fn new(place: &str, size: u64, expected: Option<Expected>) -> Self {
        Self {
            place: place.to_owned(),
            size,
            seen: 0,
            expected,
            header: Vec::new(),
            contents: None,
            data: 0..0,
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`ClassesError`], as soon as something is wrong.
    pub fn push(&mut self, mut chunk: &[u8]) -> Result<(), ClassesError> {
        while self.contents.is_none() && !chunk.is_empty() {
            let missing = self.header_size()?.saturating_sub(self.seen);
            let take = usize::try_from(missing).unwrap_or(usize::MAX).min(chunk.len());
            let (head, rest) = chunk.split_at(take);
            self.header.extend_from_slice(head);
            self.seen += head.len() as u64;
            chunk = rest;
            // A header may have no bytes: then it is read, and refused, as soon as its length is there.
            if self.header.len() >= 8 && self.seen == self.header_size()? {
                let header = std::mem::take(&mut self.header);
                self.read_header(&header[8..])?;
            }
        }
        if let Some(contents) = &mut self.contents {
            // The overlap of the chunk and the vectors; other tensors are passed over.
            let start = self.data.start.max(self.seen);
            let end = self.data.end.min(self.seen + chunk.len() as u64);
            if start < end {
                // Both differences are smaller than what is in memory.
                let to = (start - self.data.start) as usize..(end - self.data.start) as usize;
                let from = (start - self.seen) as usize..(end - self.seen) as usize;
                contents.vectors.bytes_mut()[to].copy_from_slice(&chunk[from]);
            }
        }
        self.seen += chunk.len() as u64;
        if self.seen > self.size {
            return Err(self.invalid(format!("it is longer than the {} bytes it had", self.size)));
        }
        Ok(())
    }

    /// What was read.
    ///
    /// # Errors
    /// [`ClassesError::Invalid`] if the file ended early.
    pub fn finish(self) -> Result<Contents, ClassesError> {
        if self.seen < self.size || self.contents.is_none() {
            let reason = format!("not a whole safetensors file: it ends after {} bytes", self.seen);
            return Err(ClassesError::Invalid { place: self.place, reason: reason.into() });
        }
        self.contents.ok_or_else(|| ClassesError::Invalid {
            place: self.place,
            reason: "not a whole safetensors file: it has no header".into(),
        })
    }

    /// Bytes up to the end of the header, as far as that is known: its length comes first.
    fn header_size(&self) -> Result<u64, ClassesError> {
        let Some(length) = self.header.first_chunk::<8>() else { return Ok(8) };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES || length + 8 > self.size {
            return Err(self.invalid(format!(
                "not a whole safetensors file: its header would have {length} bytes, the file has {}",
                self.size
            )));
        }
        Ok(8 + length)
    }

    fn read_header(&mut self, header: &[u8]) -> Result<(), ClassesError> {
        let invalid = |reason: String| self.invalid(reason);
        let header: Metadata = serde_json::from_slice(header)
            .map_err(|e| self.because("not a whole safetensors file", e))?;
        let data_start = self.seen;
        let whole = data_start.saturating_add(header.data_len() as u64);
        if whole != self.size {
            return Err(invalid(format!(
                "not a whole safetensors file: its header promises {whole} bytes, it has {}",
                self.size
            )));
        }
        let none = HashMap::new();
        let metadata = header.metadata().as_ref().unwrap_or(&none);
        let text = |key: &str| {
            metadata.get(key).ok_or_else(|| invalid(format!("its metadata has no `{key}`")))
        };
        let format = text("format")?;
        if format != FORMAT {
            return Err(invalid(format!("its format is {format:?}, this angler reads {FORMAT:?}")));
        }
        let model = text("model")?;
        let info =
            header.info("vectors").ok_or_else(|| invalid("it has no tensor `vectors`".into()))?;
        let &[rows, dim] = &info.shape[..] else {
            let reason = format!("`vectors` must be [rows, dim], its shape is {:?}", info.shape);
            return Err(invalid(reason));
        };
        let precision = match info.dtype {
            Dtype::F32 => Precision::F32,
            Dtype::F16 => Precision::F16,
            other => return Err(invalid(format!("`vectors` must be f32 or f16, it is {other:?}"))),
        };
        if let Some(expected) = &self.expected {
            expected.check(&self.place, model, dim)?;
        }
        let labels: Vec<String> = json(text("labels")?)
            .map_err(|e| self.because("`labels` is not a JSON array of strings", e))?;
        if labels.len() != rows {
            return Err(invalid(label_count(labels.len(), rows)));
        }
        let min_score = metadata
            .get("min_score")
            .map(|s| {
                s.parse()
                    .map_err(|e: ParseFloatError| self.because(format!("`min_score` = {s:?}"), e))
            })
            .transpose()?;
        let min_scores: BTreeMap<String, f32> = metadata
            .get("min_scores")
            .map(|text| json(text))
            .transpose()
            .map_err(|e| self.because("`min_scores` is not a JSON object of label and number", e))?
            .unwrap_or_default();
        let (start, end) = info.data_offsets;
        self.data = data_start + start as u64..data_start + end as u64;
        let mut contents = Contents::new(labels, Vectors::zeros(precision, rows, dim), model);
        contents.min_score = min_score;
        contents.min_scores = min_scores;
        contents.created_at = metadata.get("created_at").cloned();
        contents.source = metadata.get("source").cloned();
        self.contents = Some(contents);
        Ok(())
    }

    fn invalid(&self, reason: String) -> ClassesError {
        ClassesError::Invalid { place: self.place.clone(), reason: reason.into() }
    }

    fn because(
        &self,
        reason: impl Into<String>,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> ClassesError {
        ClassesError::Invalid { place: self.place.clone(), reason: Reason::new(reason, cause) }
    }
}

fn json<T: DeserializeOwned>(text: &str) -> Result<T, serde_json::Error> {
    serde_json::from_str(text)
}

/// Reads one version that is in memory and checks everything that can be checked without a model.
///
/// # Errors
/// [`ClassesError::Invalid`], which says what is wrong and where.
pub fn read(bytes: &[u8], name: (&str, &str), place: &str) -> Result<ClassVectors, ClassesError> {
    let mut reader = Reader::new(place, bytes.len() as u64, None);
    reader.push(bytes)?;
    check(reader.finish()?, name, place)
}

/// Checks what a [`Reader`] has read, row by row; takes seconds for a million rows.
///
/// # Errors
/// [`ClassesError::Invalid`], which says what is wrong and where.
pub fn check(
    contents: Contents,
    name: (&str, &str),
    place: &str,
) -> Result<ClassVectors, ClassesError> {
    ClassVectors::new(name, contents).map_err(|e| match e {
        ClassesError::Invalid { reason, .. } => {
            ClassesError::Invalid { place: place.to_owned(), reason }
        }
        other => other,
    })
}

/// Writes one version: what [`read`] reads.
///
/// # Errors
/// [`ClassesError::Invalid`] if the contents would not be readable again.
pub fn write(contents: &Contents, name: (&str, &str)) -> Result<Vec<u8>, ClassesError> {
    let invalid = |reason: Reason| ClassesError::Invalid {
        place: format!("class vectors {}@{}", name.0, name.1),
        reason,
    };
    // What cannot be read is not written.
    contents.check(name).map_err(invalid)?;
    contents
        .vectors
        .check()
        .map_err(|(row, what)| format!("row {row} ({:?}) {what}", contents.labels[row]))
        .map_err(|reason| invalid(reason.into()))?;
    let text = |json: Result<String, serde_json::Error>| json.map_err(|e| invalid(Reason::of(e)));
    let now = || humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let mut metadata: HashMap<String, String> = [
        ("format", FORMAT.to_owned()),
        ("labels", text(serde_json::to_string(&contents.labels))?),
        ("model", contents.model.clone()),
        ("created_at", contents.created_at.clone().unwrap_or_else(now)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let Some(min_score) = contents.min_score {
        metadata.insert("min_score".to_owned(), min_score.to_string());
    }
    if !contents.min_scores.is_empty() {
        let min_scores = text(serde_json::to_string(&contents.min_scores))?;
        metadata.insert("min_scores".to_owned(), min_scores);
    }
    if let Some(source) = &contents.source {
        metadata.insert("source".to_owned(), source.clone());
    }
    let dtype = match contents.vectors.precision() {
        Precision::F32 => Dtype::F32,
        Precision::F16 => Dtype::F16,
    };
    let shape = vec![contents.vectors.rows(), contents.vectors.dim()];
    let tensor = TensorView::new(dtype, shape, contents.vectors.as_bytes())
        .map_err(|e| invalid(Reason::of(e)))?;
    safetensors::serialize([("vectors", tensor)], Some(metadata))
        .map_err(|e| invalid(Reason::of(e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use ndarray::array;

    fn contents() -> Contents {
        let labels = vec!["cola".into(), "fritz \"kola\"".into(), "cola".into()];
        let vectors = array![[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]];
        let mut contents = Contents::new(labels, vectors, "m@0123456789ab");
        contents.min_score = Some(0.35);
        contents.min_scores = [("cola".to_owned(), 0.5)].into();
        contents.source = Some("a test".into());
        contents
    }

    /// A file made by hand, so that the reader is not tested by the writer alone.
    fn raw(dtype: Dtype, shape: &[usize], data: &[u8], metadata: &[(&str, &str)]) -> Vec<u8> {
        let tensor = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        // Another tensor before it: what is not asked for is passed over.
        let before = TensorView::new(Dtype::F32, vec![3], &[7; 12]).unwrap();
        safetensors::serialize([("a", before), ("vectors", tensor)], Some(metadata)).unwrap()
    }

    fn in_pieces(bytes: &[u8], piece: usize) -> Result<Contents, ClassesError> {
        let mut reader = Reader::new("here", bytes.len() as u64, None);
        bytes.chunks(piece).try_for_each(|chunk| reader.push(chunk))?;
        reader.finish()
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = write(&contents(), ("s", "7")).unwrap();
        let classes = read(&bytes, ("s", "7"), "here").unwrap();
        assert_eq!(classes.labels().iter().collect::<Vec<_>>(), ["cola", "fritz \"kola\""]);
        assert_eq!(classes.model(), "m@0123456789ab");
        assert_eq!(classes.min_score(), Some(0.35));
        assert_eq!(classes.threshold(0), Some(0.5));
        assert_eq!((classes.source(), classes.created_at().is_some()), (Some("a test"), true));
        assert_eq!(classes.unit_row(0), [0.6, 0.8]);
    }

    #[test]
    fn f16_is_read_and_written_as_f16() {
        let data: Vec<u8> =
            [0.0, 2.0].into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
        let metadata = [("format", FORMAT), ("labels", "[\"a\"]"), ("model", "m")];
        let classes = read(&raw(Dtype::F16, &[1, 2], &data, &metadata), ("s", "1"), "h").unwrap();
        assert_eq!((classes.unit_row(0), classes.precision()), (vec![0.0, 1.0], Precision::F16));
        let again = write(&classes.contents(), ("s", "2")).unwrap();
        assert_eq!(read(&again, ("s", "2"), "h").unwrap().vectors(), classes.vectors());
    }

    #[test]
    fn a_file_may_arrive_in_pieces_of_any_size() {
        let data: Vec<u8> = (0..6).flat_map(|x| (x as f32 + 0.5).to_le_bytes()).collect();
        let metadata = [("format", FORMAT), ("labels", "[\"a\",\"b\"]"), ("model", "m")];
        let bytes = raw(Dtype::F32, &[2, 3], &data, &metadata);
        for piece in [1, 2, 3, 7, 8, 9, 64, bytes.len() - 1, bytes.len()] {
            let contents = in_pieces(&bytes, piece).unwrap();
            assert_eq!(contents.vectors.row(1), [3.5, 4.5, 5.5], "{piece}");
        }
        for cut in 0..bytes.len() {
            let mut reader = Reader::new("here", bytes.len() as u64, None);
            reader.push(&bytes[..cut]).unwrap();
            assert!(reader.finish().is_err(), "{cut}");
            assert!(in_pieces(&bytes[..cut], 5).is_err(), "{cut}");
        }
    }

    #[test]
    fn another_model_is_refused_before_the_data_is_there() {
        let bytes = write(&contents(), ("s", "7")).unwrap();
        let header = bytes.len() - 24;
        let refused = |model: &str, dim| {
            let expected = Expected { model: model.into(), dim };
            let mut reader = Reader::new("here", bytes.len() as u64, Some(expected));
            reader.push(&bytes[..header]).unwrap_err().to_string()
        };
        assert!(refused("m@9", 2).contains("m@0123456789ab"));
        assert!(refused("m@0123456789ab", 3).contains("2 values, the model's 3"));
    }

    #[test]
    fn a_header_that_promises_the_moon_is_refused_before_anything_is_allocated() {
        let header = format!(
            "{{\"__metadata__\":{{\"format\":\"{FORMAT}\",\"labels\":\"[]\",\"model\":\"m\"}},\
             \"vectors\":{{\"dtype\":\"F32\",\"shape\":[1000000000000,512],\
             \"data_offsets\":[0,2048000000000000]}}}}"
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        let message = in_pieces(&bytes, 64).unwrap_err().to_string();
        assert!(message.contains("its header promises 2048000000000"), "{message}");
        let message = in_pieces(&[255; 64], 64).unwrap_err().to_string();
        assert!(message.contains("its header would have"), "{message}");
    }

    #[test]
    fn broken_files_are_refused_with_the_reason() {
        let whole = write(&contents(), ("s", "7")).unwrap();
        let data = [0_u8, 0, 128, 63];
        let good = [("format", FORMAT), ("labels", "[\"a\"]"), ("model", "m")];
        let changed = |at: usize, value: &'static str| {
            let mut metadata = good;
            metadata[at].1 = value;
            raw(Dtype::F32, &[1, 1], &data, &metadata)
        };
        let mut thresholds = good.to_vec();
        thresholds.push(("min_scores", "{\"a\": \"high\"}"));
        for (bytes, word) in [
            (whole[..whole.len() - 3].to_vec(), "not a whole safetensors file"),
            (b"garbage".to_vec(), "not a whole safetensors file"),
            (b"garbage that is longer than a length".to_vec(), "not a whole safetensors file"),
            (Vec::new(), "not a whole safetensors file"),
            (changed(0, "angler.class-vectors/9"), "this angler reads"),
            (changed(1, "[1]"), "`labels`"),
            (changed(1, "[\"a\",\"b\"]"), "2 labels for 1 rows"),
            (raw(Dtype::F32, &[1, 1], &data, &good[..2]), "no `model`"),
            (raw(Dtype::F32, &[1], &data, &good), "[rows, dim]"),
            (raw(Dtype::I32, &[1, 1], &data, &good), "I32"),
            (raw(Dtype::F32, &[1, 1], &data, &thresholds), "`min_scores`"),
            (raw(Dtype::F32, &[1, 1], &f32::NAN.to_le_bytes(), &good), "row 0 (\"a\") holds NaN"),
            (raw(Dtype::F32, &[1, 1], &[0; 4], &good), "row 0 (\"a\") is zero"),
        ] {
            let message = read(&bytes, ("s", "7"), "root/s/7.safetensors").unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
            assert!(message.contains("root/s/7.safetensors"), "{message}");
        }
    }
}
