//! .safetensors: f32, f16, bf16 or f64. The header comes first, so the vectors are read into their
//! final place, and a large file is in memory once.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};

use anyhow::{Context, Result, anyhow, bail};
use half::bf16;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::DeserializeOwned;

use angler_vectors::rows::{Precision, Vectors};

use super::Foreign;

/// The tensor that holds the vectors, if the file has several.
const NAME: &str = "vectors";

/// The largest header that is read, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Values that are converted at once.
const CHUNK: usize = 16 * 1024;

/// Reads a file of `size` bytes: the tensor `vectors` or the only matrix, and what its metadata
/// says of labels, model and thresholds.
pub(super) fn read(mut reader: impl Read + Seek, size: u64) -> Result<Foreign> {
    let (header, data_start) = read_header(&mut reader, size)?;
    let info = tensor(&header)?;
    let &[rows, dim] = &info.shape[..] else {
        bail!("`{NAME}` must be [rows, dim], its shape is {:?}", info.shape);
    };
    let (start, _) = info.data_offsets;
    reader.seek(SeekFrom::Start(data_start + start as u64))?;
    let vectors = match info.dtype {
        Dtype::F32 => whole(&mut reader, Vectors::zeros(Precision::F32, rows, dim))?,
        Dtype::F16 => whole(&mut reader, Vectors::zeros(Precision::F16, rows, dim))?,
        Dtype::BF16 => {
            converted(&mut reader, (rows, dim), |bytes| bf16::from_le_bytes(bytes).to_f32())?
        }
        Dtype::F64 => {
            converted(&mut reader, (rows, dim), |bytes| f64::from_le_bytes(bytes) as f32)?
        }
        other => bail!("its tensor must be f32, f16, bf16 or f64, it is {other:?}"),
    };
    let none = HashMap::new();
    let metadata = header.metadata().as_ref().unwrap_or(&none);
    let mut foreign = Foreign::new(vectors, json(metadata, "labels", "a JSON array of strings")?);
    foreign.model = metadata.get("model").cloned();
    foreign.min_score = json(metadata, "min_score", "a number")?;
    let thresholds = json(metadata, "min_scores", "a JSON object of label and number")?;
    foreign.min_scores = thresholds.unwrap_or_default();
    Ok(foreign)
}

/// The header, and where the data begins.
fn read_header(reader: &mut impl Read, size: u64) -> Result<(Metadata, u64)> {
    let mut length = [0; 8];
    reader.read_exact(&mut length).context("not a safetensors file")?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length + 8 > size {
        bail!("not a whole safetensors file: its header would have {length} bytes");
    }
    // Small enough for memory, as it was just compared.
    let mut header = vec![0; length as usize];
    reader.read_exact(&mut header).context("not a whole safetensors file")?;
    let header: Metadata = serde_json::from_slice(&header).context("not a safetensors file")?;
    let whole = (8 + length).saturating_add(header.data_len() as u64);
    if whole != size {
        bail!(
            "not a whole safetensors file: its header promises {whole} bytes, it has {size}; copy it anew"
        );
    }
    Ok((header, 8 + length))
}

fn tensor(header: &Metadata) -> Result<&TensorInfo> {
    if let Some(info) = header.info(NAME) {
        return Ok(info);
    }
    let tensors = header.tensors();
    let mut names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut matrices = tensors.values().filter(|info| info.shape.len() == 2);
    match (matrices.next(), matrices.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => {
            Err(anyhow!("it holds several matrices ({}); name one `{NAME}`", names.join(", ")))
        }
        _ => Err(anyhow!("none of its tensors ({}) is a matrix [rows, dim]", names.join(", "))),
    }
}

/// Bytes that are already as they lie in memory.
fn whole(reader: &mut impl Read, mut vectors: Vectors) -> Result<Vectors> {
    reader.read_exact(vectors.bytes_mut())?;
    Ok(vectors)
}

/// Values of N bytes as f32, some at a time.
fn converted<const N: usize>(
    reader: &mut impl Read,
    (rows, dim): (usize, usize),
    value: impl Fn([u8; N]) -> f32,
) -> Result<Vectors> {
    let mut vectors = Vectors::zeros(Precision::F32, rows, dim);
    let mut buffer = vec![0; N * CHUNK];
    for out in vectors.bytes_mut().chunks_mut(size_of::<f32>() * CHUNK) {
        let (out, _) = out.as_chunks_mut::<{ size_of::<f32>() }>();
        let part = &mut buffer[..N * out.len()];
        reader.read_exact(part)?;
        let (part, _) = part.as_chunks::<N>();
        for (out, bytes) in out.iter_mut().zip(part) {
            // In memory as on every machine that the back ends run on.
            *out = value(*bytes).to_le_bytes();
        }
    }
    Ok(vectors)
}

fn json<T: DeserializeOwned>(
    metadata: &HashMap<String, String>,
    key: &str,
    what: &str,
) -> Result<Option<T>> {
    let Some(text) = metadata.get(key) else { return Ok(None) };
    let value = serde_json::from_str(text);
    value.map(Some).with_context(|| format!("`{key}` in its metadata is not {what}"))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use half::f16;
    use safetensors::tensor::TensorView;

    use super::*;

    type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

    fn file(tensors: &[Tensor<'_>], metadata: &[(&str, &str)]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        });
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Foreign, String> {
        super::read(Cursor::new(bytes), bytes.len() as u64).map_err(|e| format!("{e:#}"))
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn every_float_is_read() {
        let values = [1.0_f32, -2.0, 0.5, 0.25, 3.0, 4.0];
        let all = |encode: fn(f32) -> Vec<u8>| values.iter().flat_map(|x| encode(*x)).collect();
        for (dtype, data) in [
            (Dtype::F32, all(|x| x.to_le_bytes().to_vec())),
            (Dtype::F16, all(|x| f16::from_f32(x).to_le_bytes().to_vec())),
            (Dtype::BF16, all(|x| bf16::from_f32(x).to_le_bytes().to_vec())),
            (Dtype::F64, all(|x| f64::from(x).to_le_bytes().to_vec())),
        ] {
            let other = ("a", Dtype::I64, &[1][..], vec![7; 8]);
            let foreign = read(&file(&[other, ("x", dtype, &[2, 3], data)], &[])).unwrap();
            let rows = [foreign.vectors.row(0), foreign.vectors.row(1)].concat();
            assert_eq!(rows, values, "{dtype:?}");
            let kept = if dtype == Dtype::F16 { Precision::F16 } else { Precision::F32 };
            assert_eq!(foreign.vectors.precision(), kept);
            assert!(foreign.labels.is_none() && foreign.model.is_none());
        }
    }

    #[test]
    fn more_values_than_are_converted_at_once_are_all_read() {
        let values: Vec<f64> = (0..2 * CHUNK + 6).map(|x| x as f64).collect();
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let bytes = file(&[("x", Dtype::F64, &[CHUNK + 3, 2], data)], &[]);
        let vectors = read(&bytes).unwrap().vectors;
        let last = (2 * CHUNK + 4) as f32;
        assert_eq!(vectors.row(CHUNK + 2), [last, last + 1.0]);
        assert_eq!(vectors.row(CHUNK / 2), [CHUNK as f32, CHUNK as f32 + 1.0]);
    }

    #[test]
    fn what_the_metadata_says_is_kept() {
        let metadata = [
            ("labels", "[\"a\"]"),
            ("model", "m@1"),
            ("min_score", "0.35"),
            ("min_scores", "{\"a\": 0.5}"),
        ];
        let tensor = |name| (name, Dtype::F32, &[1, 2][..], f32s(&[1.0, 2.0]));
        let foreign = read(&file(&[tensor("vectors"), tensor("other")], &metadata)).unwrap();
        assert_eq!(foreign.labels.unwrap(), ["a"]);
        assert_eq!((foreign.model.as_deref(), foreign.min_score), (Some("m@1"), Some(0.35)));
        assert_eq!(foreign.min_scores, [("a".to_owned(), 0.5)].into());
        for (at, key) in ["labels", "min_score", "min_scores"].into_iter().enumerate() {
            let mut wrong = metadata;
            wrong[[0, 2, 3][at]].1 = "{";
            let message = read(&file(&[tensor("vectors")], &wrong)).unwrap_err();
            assert!(message.contains(&format!("`{key}` in its metadata is not")), "{message}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_reason() {
        let tensor = |name| (name, Dtype::F32, &[1, 2][..], f32s(&[1.0, 2.0]));
        let good = file(&[tensor("vectors")], &[]);
        for (bytes, words) in [
            (good[..good.len() - 1].to_vec(), "its header promises"),
            ([&good[..], b"x"].concat(), "its header promises"),
            (good[..20].to_vec(), "its header would have"),
            (vec![255; 64], "its header would have"),
            (Vec::new(), "not a safetensors file"),
            (file(&[tensor("x"), tensor("y")], &[]), "several matrices (x, y)"),
            (file(&[("x", Dtype::F32, &[2], f32s(&[1.0, 2.0]))], &[]), "none of its tensors (x)"),
            (file(&[("vectors", Dtype::F32, &[1], f32s(&[1.0]))], &[]), "[rows, dim]"),
            (file(&[("x", Dtype::I32, &[1, 2], vec![0; 8])], &[]), "it is I32"),
        ] {
            let message = read(&bytes).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }
}
