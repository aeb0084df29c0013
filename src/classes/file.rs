//! The class vectors file, `angler.class-vectors/1`: one safetensors file a version.
//!
//! Tensor `vectors`, f32 or f16, [rows, dim]. String metadata: `format`, `labels` (a JSON array,
//! one label a row), `model` (the fingerprint), and optionally `min_score`, `created_at`,
//! `source`. Safetensors was chosen because any tool can write it and nothing in it executes.

use std::collections::HashMap;

use half::f16;
use ndarray::Array2;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{ClassVectors, ClassesError};

/// The metadata's `format`. Version 1 exists because there was none before it.
pub const FORMAT: &str = "angler.class-vectors/1";

/// What a file is written from.
#[derive(Debug, Clone)]
pub struct Contents {
    /// One label a row.
    pub labels: Vec<String>,
    /// [rows, dim]
    pub vectors: Array2<f32>,
    /// Fingerprint of the model that made the vectors.
    pub model: String,
    /// The set's threshold, if it has one.
    pub min_score: Option<f32>,
    /// Where the vectors came from, for people.
    pub source: Option<String>,
}

/// Reads one version and checks everything that can be checked without a model.
///
/// # Errors
/// [`ClassesError::Invalid`], which says what is wrong and where.
pub fn read(bytes: &[u8], name: (&str, &str), place: &str) -> Result<ClassVectors, ClassesError> {
    let invalid = |reason: String| ClassesError::Invalid { place: place.to_owned(), reason };
    let (_, header) = SafeTensors::read_metadata(bytes)
        .map_err(|e| invalid(format!("not a whole safetensors file: {e}")))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let text = |key: &str| {
        metadata.get(key).ok_or_else(|| invalid(format!("its metadata has no `{key}`")))
    };
    let format = text("format")?;
    if format != FORMAT {
        return Err(invalid(format!("its format is {format:?}, this angler reads {FORMAT:?}")));
    }
    let model = text("model")?.clone();
    let labels: Vec<String> = serde_json::from_str(text("labels")?)
        .map_err(|e| invalid(format!("`labels` is not a JSON array of strings: {e}")))?;
    let min_score = metadata
        .get("min_score")
        .map(|s| s.parse::<f32>().map_err(|e| invalid(format!("`min_score` = {s:?}: {e}"))))
        .transpose()?;
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|e| invalid(format!("not a whole safetensors file: {e}")))?;
    let tensor =
        tensors.tensor("vectors").map_err(|_| invalid("it has no tensor `vectors`".to_owned()))?;
    let vectors = matrix(&tensor).map_err(invalid)?;
    ClassVectors::new(name, model, labels, vectors, min_score).map_err(|e| match e {
        ClassesError::Invalid { reason, .. } => invalid(reason),
        other => other,
    })
}

fn matrix(tensor: &TensorView<'_>) -> Result<Array2<f32>, String> {
    let &[rows, dim] = tensor.shape() else {
        return Err(format!("`vectors` must be [rows, dim], its shape is {:?}", tensor.shape()));
    };
    let values: Vec<f32> = match tensor.dtype() {
        Dtype::F32 => {
            tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
        Dtype::F16 => tensor
            .data()
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        other => return Err(format!("`vectors` must be f32 or f16, it is {other:?}")),
    };
    Array2::from_shape_vec((rows, dim), values)
        .map_err(|e| format!("`vectors` does not fit its shape: {e}"))
}

/// Writes one version: what [`read`] reads.
///
/// # Errors
/// [`ClassesError::Invalid`] if the contents would not be readable again.
pub fn write(contents: &Contents, name: (&str, &str)) -> Result<Vec<u8>, ClassesError> {
    // What cannot be read is not written.
    ClassVectors::new(
        name,
        contents.model.clone(),
        contents.labels.clone(),
        contents.vectors.clone(),
        contents.min_score,
    )?;
    let invalid = |reason: String| ClassesError::Invalid {
        place: format!("class vectors {}@{}", name.0, name.1),
        reason,
    };
    let labels = serde_json::to_string(&contents.labels).map_err(|e| invalid(e.to_string()))?;
    let created = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let mut metadata: HashMap<String, String> = [
        ("format", FORMAT.to_owned()),
        ("labels", labels),
        ("model", contents.model.clone()),
        ("created_at", created),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let Some(min_score) = contents.min_score {
        metadata.insert("min_score".to_owned(), min_score.to_string());
    }
    if let Some(source) = &contents.source {
        metadata.insert("source".to_owned(), source.clone());
    }
    let data: Vec<u8> = contents.vectors.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, contents.vectors.shape().to_vec(), &data)
        .map_err(|e| invalid(e.to_string()))?;
    safetensors::serialize([("vectors", tensor)], Some(metadata))
        .map_err(|e| invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn contents() -> Contents {
        Contents {
            labels: vec!["cola".into(), "fritz \"kola\"".into(), "cola".into()],
            vectors: array![[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]],
            model: "m@0123456789ab".into(),
            min_score: Some(0.35),
            source: Some("a test".into()),
        }
    }

    /// A file made by hand, so that the reader is not tested by the writer alone.
    fn raw(dtype: Dtype, shape: &[usize], data: &[u8], metadata: &[(&str, &str)]) -> Vec<u8> {
        let tensor = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize([("vectors", tensor)], Some(metadata)).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = write(&contents(), ("s", "7")).unwrap();
        let classes = read(&bytes, ("s", "7"), "here").unwrap();
        assert_eq!(classes.labels(), ["cola", "fritz \"kola\""]);
        assert_eq!(classes.model(), "m@0123456789ab");
        assert_eq!(classes.min_score(), Some(0.35));
        assert_eq!(classes.vectors().row(0).to_vec(), [0.6, 0.8]);
    }

    #[test]
    fn f16_is_read() {
        let data: Vec<u8> =
            [0.0, 2.0].into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
        let metadata = [("format", FORMAT), ("labels", "[\"a\"]"), ("model", "m")];
        let classes = read(&raw(Dtype::F16, &[1, 2], &data, &metadata), ("s", "1"), "h").unwrap();
        assert_eq!(classes.vectors().row(0).to_vec(), [0.0, 1.0]);
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
        for (bytes, word) in [
            (whole[..whole.len() - 3].to_vec(), "not a whole safetensors file"),
            (b"garbage".to_vec(), "not a whole safetensors file"),
            (changed(0, "angler.class-vectors/9"), "this angler reads"),
            (changed(1, "[1]"), "`labels`"),
            (changed(1, "[\"a\",\"b\"]"), "2 labels for 1 rows"),
            (raw(Dtype::F32, &[1, 1], &data, &good[..2]), "no `model`"),
            (raw(Dtype::F32, &[1], &data, &good), "[rows, dim]"),
            (raw(Dtype::I32, &[1, 1], &data, &good), "I32"),
        ] {
            let message = read(&bytes, ("s", "7"), "root/s/7.safetensors").unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
            assert!(message.contains("root/s/7.safetensors"), "{message}");
        }
    }
}
