//! Embeddings that were kept: the JSON lines of `angler classify --embeddings`, whole results of
//! jobs, or a `.npy` matrix. Read piece by piece: memory does not grow with the file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use ndarray::{Array2, ArrayViewMut1};
use serde::Deserialize;

use angler_runs::embeddings::id_of;
use angler_vectors::unit::normalise;
use angler_wire::error::ImageError;
use angler_wire::job::decode_embedding;

use super::npy::NpyRows;

/// Embeddings that are scored together.
pub(super) const BATCH: usize = 256;

/// The longest line: a result of 1,000 images with embeddings of 4,096 values has 22 MB.
const LINE_BYTES: u64 = 64 << 20;

/// An image's embedding, or why there is none.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) uri: String,
    pub(super) id: Option<String>,
    /// What made the embedding, if the file says so.
    pub(super) backend: Option<String>,
    /// Unit length.
    pub(super) embedding: Result<Vec<f32>, ImageError>,
}

/// What embeddings must be to be scored.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    /// The class vectors, for messages.
    pub(super) classes: String,
    /// The model's fingerprint.
    pub(super) model: String,
    pub(super) dim: usize,
}

/// A file of embeddings.
pub(super) struct KeptFile {
    path: PathBuf,
    expected: Expected,
    source: Source,
    /// Embeddings that do not say which model made them.
    without_model: u64,
    /// Results of jobs that failed as a whole: they have no images.
    failed_jobs: u64,
}

enum Source {
    Lines { reader: BufReader<File>, line: u64, waiting: VecDeque<Kept> },
    Npy { rows: NpyRows, ids: Option<std::io::Lines<BufReader<File>>>, row: u64 },
}

/// A line, or an image in it: whatever is there of a result.
#[derive(Deserialize)]
struct Draft {
    uri: Option<String>,
    id: Option<String>,
    model: Option<String>,
    backend: Option<String>,
    embedding: Option<String>,
    error: Option<serde_json::Value>,
    status: Option<String>,
    images: Option<Vec<Draft>>,
}

impl KeptFile {
    /// Opens a `.npy` file, with one id a line in `ids`, or else a file of JSON lines.
    ///
    /// # Errors
    /// If it cannot be read, or a matrix is not one of embeddings of this dimension.
    pub(super) fn open(path: &Path, ids: Option<&Path>, expected: Expected) -> Result<Self> {
        let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
        let source = if path.extension().is_some_and(|ending| ending == "npy") {
            let rows = NpyRows::open(path)?;
            if rows.dim() != expected.dim {
                bail!(
                    "{}: its embeddings have {} values, the vectors of {} have {}",
                    path.display(),
                    rows.dim(),
                    expected.classes,
                    expected.dim
                );
            }
            let ids = ids.map(open).transpose()?.map(|file| BufReader::new(file).lines());
            Source::Npy { rows, ids, row: 0 }
        } else {
            let reader = BufReader::new(open(path)?);
            Source::Lines { reader, line: 0, waiting: VecDeque::new() }
        };
        Ok(Self { path: path.to_owned(), expected, source, without_model: 0, failed_jobs: 0 })
    }

    /// The next embeddings, at most [`BATCH`]; none at the end.
    ///
    /// # Errors
    /// The place in the file, what is wrong there and what to do.
    pub(super) fn next_batch(&mut self) -> Result<Vec<Kept>> {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH {
            match self.next()? {
                Some(kept) => batch.push(kept),
                None => break,
            }
        }
        Ok(batch)
    }

    /// What a person should know of the file once it is read, on standard error.
    pub(super) fn remarks(&self) {
        if self.without_model > 0 {
            eprintln!(
                "{} embeddings do not say which model made them: taken to be {}",
                self.without_model, self.expected.model
            );
        }
        if self.failed_jobs > 0 {
            eprintln!("{} failed jobs have no images and were passed over", self.failed_jobs);
        }
    }

    fn next(&mut self) -> Result<Option<Kept>> {
        match &mut self.source {
            Source::Npy { rows, ids, row } => {
                let Some(mut embedding) = rows.next()? else {
                    if ids.as_mut().is_some_and(|ids| ids.next().is_some()) {
                        bail!("--ids has more than the {row} rows of {}", self.path.display());
                    }
                    return Ok(None);
                };
                let place = || format!("{} row {row}", self.path.display());
                unit(&mut embedding).map_err(|e| anyhow!("{}: {e}", place()))?;
                let uri = match ids {
                    None => row.to_string(),
                    Some(ids) => {
                        let id = ids.next().transpose().context("--ids")?;
                        let id = id.ok_or_else(|| anyhow!("{} has no id in --ids", place()))?;
                        id_of(id.trim_end_matches('\r'))
                    }
                };
                *row += 1;
                self.without_model += 1;
                Ok(Some(Kept { uri, id: None, backend: None, embedding: Ok(embedding) }))
            }
            Source::Lines { .. } => self.next_of_lines(),
        }
    }

    fn next_of_lines(&mut self) -> Result<Option<Kept>> {
        loop {
            let Source::Lines { reader, line, waiting } = &mut self.source else { return Ok(None) };
            if let Some(kept) = waiting.pop_front() {
                return Ok(Some(kept));
            }
            let mut text = Vec::new();
            reader
                .by_ref()
                .take(LINE_BYTES)
                .read_until(b'\n', &mut text)
                .with_context(|| self.path.display().to_string())?;
            if text.is_empty() {
                return Ok(None);
            }
            *line += 1;
            let place = format!("{} line {line}", self.path.display());
            if text.len() as u64 == LINE_BYTES && !text.ends_with(b"\n") {
                bail!("{place} has more than {} MiB: this is no file of results", LINE_BYTES >> 20);
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            let draft: Draft = serde_json::from_slice(&text)
                .with_context(|| format!("{place} is not a result as JSON"))?;
            let kept = self.read(draft, &place)?;
            if let Source::Lines { waiting, .. } = &mut self.source {
                waiting.extend(kept);
            }
        }
    }

    /// The images of a line: one, or those of a whole job.
    fn read(&mut self, mut draft: Draft, place: &str) -> Result<Vec<Kept>> {
        let (model, backend) = (draft.model.take(), draft.backend.take());
        let images = match draft.images.take() {
            Some(images) => images,
            None if draft.uri.is_some() => vec![draft],
            None if draft.status.as_deref() == Some("failed") => {
                self.failed_jobs += 1;
                Vec::new()
            }
            None => bail!("{place} has neither `uri` nor `images`: it is no result"),
        };
        if let Some(model) = model.as_ref().filter(|model| **model != self.expected.model) {
            bail!(
                "{place}: its embeddings were made with model {model}, the vectors of {} with {}: \
                 embed the images with that model, or name vectors of this one",
                self.expected.classes,
                self.expected.model
            );
        }
        let images = images.into_iter().map(|image| {
            let uri = image.uri.ok_or_else(|| anyhow!("{place}: an image has no `uri`"))?;
            let embedding = match (image.embedding, image.error) {
                (Some(text), _) => {
                    self.without_model += u64::from(model.is_none());
                    Ok(embedding(&text, &self.expected)
                        .map_err(|e| anyhow!("{place} ({uri}): {e}"))?)
                }
                (None, Some(error)) => Err(serde_json::from_value::<ImageError>(error)
                    .with_context(|| format!("{place} ({uri}): `error`"))?),
                (None, None) => bail!(
                    "{place} ({uri}) has no embedding: write the file with `angler classify \
                     --embeddings --out FILE`, or give jobs \"embeddings\": true"
                ),
            };
            Ok(Kept { uri, id: image.id, backend: backend.clone(), embedding })
        });
        images.collect()
    }
}

fn embedding(text: &str, expected: &Expected) -> Result<Vec<f32>> {
    let mut values = decode_embedding(text)
        .ok_or_else(|| anyhow!("its embedding is not base64 of little-endian f32"))?;
    if values.len() != expected.dim {
        bail!(
            "its embedding has {} values, the vectors of {} have {}",
            values.len(),
            expected.classes,
            expected.dim
        );
    }
    unit(&mut values)?;
    Ok(values)
}

/// Scales to unit length what is not; what is stays as it is, to the bit, so that its scores do.
fn unit(values: &mut [f32]) -> Result<()> {
    let square: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    if (square - 1.0).abs() < 1e-5 || normalise(ArrayViewMut1::from(values)) {
        return Ok(());
    }
    bail!("its embedding has no direction: it is zero or not finite")
}

/// [N, D] of those that have an embedding, in order.
pub(super) fn matrix(batch: &[Kept], dim: usize) -> Result<Array2<f32>> {
    let rows = batch.iter().filter_map(|kept| kept.embedding.as_ref().ok());
    let values: Vec<f32> = rows.flatten().copied().collect();
    Ok(Array2::from_shape_vec((values.len() / dim.max(1), dim), values)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use angler_wire::job::Embedding;

    use super::*;

    fn expected() -> Expected {
        Expected { classes: "s@1".into(), model: "m@1".into(), dim: 2 }
    }

    fn read(text: &str) -> Result<(Vec<Kept>, KeptFile)> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let mut kept = KeptFile::open(file.path(), None, expected())?;
        let mut all = Vec::new();
        loop {
            let batch = kept.next_batch()?;
            assert!(batch.len() <= BATCH);
            if batch.is_empty() {
                return Ok((all, kept));
            }
            all.extend(batch);
        }
    }

    fn encoded() -> String {
        Embedding(vec![0.6, 0.8]).to_string()
    }

    #[test]
    fn lines_and_whole_results_are_read_alike() {
        let e = encoded();
        let lines = format!(
            "{{\"uri\":\"1\",\"embedding\":\"{e}\",\"model\":\"m@1\",\"backend\":\"x\"}}\n\n\
             {{\"id\":\"job\",\"status\":\"done\",\"model\":\"m@1\",\"backend\":\"y\",\"images\":[\
             {{\"uri\":\"2\",\"id\":\"sku\",\"embedding\":\"{e}\"}},\
             {{\"uri\":\"3\",\"error\":{{\"code\":\"not_found\",\"message\":\"gone\"}}}}]}}\n\
             {{\"id\":\"job\",\"status\":\"failed\",\"error\":{{\"code\":\"malformed_job\",\"message\":\"x\"}}}}\n\
             {{\"uri\":\"4\",\"embedding\":\"{e}\"}}"
        );
        let (kept, file) = read(&lines).unwrap();
        let uris: Vec<&str> = kept.iter().map(|k| k.uri.as_str()).collect();
        assert_eq!(uris, ["1", "2", "3", "4"]);
        assert_eq!((kept[1].id.as_deref(), kept[1].backend.as_deref()), (Some("sku"), Some("y")));
        assert_eq!(kept[2].embedding.as_ref().unwrap_err().message, "gone");
        assert_eq!(matrix(&kept, 2).unwrap().dim(), (3, 2));
        assert_eq!((file.without_model, file.failed_jobs), (1, 1));
    }

    #[test]
    fn batches_are_bounded_whatever_a_line_holds() {
        let image = format!("{{\"uri\":\"1\",\"embedding\":\"{}\"}}", encoded());
        let images = vec![image.as_str(); 3 * BATCH + 1].join(",");
        let (kept, _) =
            read(&format!("{{\"model\":\"m@1\",\"images\":[{images}]}}\n{image}")).unwrap();
        assert_eq!(kept.len(), 3 * BATCH + 2);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let good = format!("{{\"uri\":\"1\",\"embedding\":\"{}\"}}\n", encoded());
        let with = |text: &str| format!("{{\"uri\":\"u\",\"embedding\":\"{text}\"}}");
        for (line, words) in [
            ("{\"uri\":\"u\",\"label\":\"a\"}".to_owned(), "--embeddings --out FILE"),
            ("{\"uri\":".to_owned(), "is not a result"),
            ("{\"a\":1}".to_owned(), "neither `uri` nor `images`"),
            (with("AAA"), "not base64"),
            (with(&Embedding(vec![1.0]).to_string()), "has 1 values"),
            (with(&Embedding(vec![0.0, 0.0]).to_string()), "no direction"),
            (with(&Embedding(vec![f32::NAN, 0.0]).to_string()), "no direction"),
            (
                format!("{{\"uri\":\"u\",\"embedding\":\"{}\",\"model\":\"n@2\"}}", encoded()),
                "model n@2",
            ),
        ] {
            let error = format!("{:#}", read(&format!("{good}{line}\n")).err().expect(&line));
            assert!(error.contains(words) && error.contains(" line 2"), "{error}");
        }
    }

    #[test]
    fn what_has_unit_length_stays_as_it_is() {
        let mut values = [0.6_f32, 0.8];
        unit(&mut values).unwrap();
        assert_eq!(values, [0.6, 0.8]);
        let mut long = [3.0_f32, 4.0];
        unit(&mut long).unwrap();
        assert_eq!(long, [0.6, 0.8]);
    }
}
