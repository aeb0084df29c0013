//! Class vectors: one immutable version of one class set, ready to score against.
//!
//! A version comes from a file ([`file`]), from images ([`build`]), or out of the [`catalog`],
//! which finds the active version and keeps what it loaded. Whoever holds an `Arc<ClassVectors>`
//! keeps its version alive; nothing is ever changed in place.

pub mod build;
pub mod calibrate;
pub mod catalog;
pub mod compare;
pub mod evaluate;
pub mod file;
pub mod statistics;

use ndarray::{Array2, ArrayView2};
use std::collections::HashMap;

use crate::error::{Failure, FailureCode, JobError};
use crate::job::check_name;
use crate::score::{ClassScore, normalise, top_classes};

/// Why a version of class vectors cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClassesError {
    /// No such set, or none of its versions is active.
    #[error("class set {set:?} is unknown: {reason}")]
    UnknownSet {
        /// The set.
        set: String,
        /// What was looked for, and where.
        reason: String,
    },
    /// The set has no such version.
    #[error("class set {set:?} has no version {version:?}: {reason}")]
    UnknownVersion {
        /// The set.
        set: String,
        /// The version.
        version: String,
        /// What was looked for, and where.
        reason: String,
    },
    /// Made with another model: its vectors lie in another space.
    #[error(
        "{place} was made with model {made_with}, but model {running} runs: build it anew with this model, or run the other"
    )]
    ModelMismatch {
        /// The file.
        place: String,
        /// The fingerprint in the file.
        made_with: String,
        /// The fingerprint of the model that runs.
        running: String,
    },
    /// The file does not follow the format.
    #[error("{place}: {reason}")]
    Invalid {
        /// The file.
        place: String,
        /// What is wrong in it, and where.
        reason: String,
    },
    /// The store did not answer: a later attempt may succeed.
    #[error("class vectors cannot be read now: {0}")]
    Unavailable(String),
}

/// What it means for a job that names the version.
impl From<ClassesError> for JobError {
    fn from(error: ClassesError) -> Self {
        let code = match &error {
            ClassesError::Unavailable(_) => return Self::Transient(error.to_string()),
            ClassesError::UnknownSet { .. } => FailureCode::UnknownClassSet,
            // A version that cannot be read is as good as none.
            ClassesError::UnknownVersion { .. } | ClassesError::Invalid { .. } => {
                FailureCode::UnknownVersion
            }
            ClassesError::ModelMismatch { .. } => FailureCode::ModelMismatch,
        };
        Self::Failed(Failure::new(code, error.to_string()))
    }
}

/// One version of a class set.
#[derive(Debug)]
pub struct ClassVectors {
    set: String,
    version: String,
    model: String,
    labels: Vec<String>,
    row_class: Vec<u32>,
    vectors: Array2<f32>,
    min_score: Option<f32>,
}

impl ClassVectors {
    /// Checks and normalises class vectors.
    ///
    /// * `labels`: one a row; a repeated label has several vectors.
    /// * `vectors`: [rows, dim], finite, no row zero; they need not be normalised.
    ///
    /// # Errors
    /// [`ClassesError::Invalid`] with the first row that is wrong.
    pub fn new(
        name: (&str, &str),
        model: String,
        labels: Vec<String>,
        mut vectors: Array2<f32>,
        min_score: Option<f32>,
    ) -> Result<Self, ClassesError> {
        let (set, version) = name;
        let invalid = |reason: String| ClassesError::Invalid {
            place: format!("class vectors {set}@{version}"),
            reason,
        };
        check_name(set).and_then(|()| check_name(version)).map_err(&invalid)?;
        if vectors.is_empty() {
            return Err(invalid(format!("no vectors: shape {:?}", vectors.shape())));
        }
        if labels.len() != vectors.nrows() {
            return Err(invalid(format!(
                "{} labels for {} rows: there must be one label a row",
                labels.len(),
                vectors.nrows()
            )));
        }
        if min_score.is_some_and(|s| !(-1.0..=1.0).contains(&s)) {
            return Err(invalid("min_score must lie in [-1, 1]".to_owned()));
        }
        for (row, mut vector) in vectors.rows_mut().into_iter().enumerate() {
            if let Some(column) = vector.iter().position(|x| !x.is_finite()) {
                let value = vector[column];
                return Err(invalid(format!(
                    "row {row} ({:?}) holds {value} in column {column}",
                    labels[row]
                )));
            }
            if !normalise(vector.view_mut()) {
                return Err(invalid(format!("row {row} ({:?}) is zero", labels[row])));
            }
        }
        let (labels, row_class) = number(labels);
        Ok(Self {
            set: set.to_owned(),
            version: version.to_owned(),
            model,
            labels,
            row_class,
            vectors,
            min_score,
        })
    }

    /// `set@version`.
    pub fn id(&self) -> String {
        format!("{}@{}", self.set, self.version)
    }

    /// The set's name.
    pub fn set(&self) -> &str {
        &self.set
    }

    /// The version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Fingerprint of the model that the vectors were made with.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The distinct labels, in the order of their first row. [`ClassScore::class`] counts them.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// [rows, dim], unit rows.
    pub fn vectors(&self) -> ArrayView2<'_, f32> {
        self.vectors.view()
    }

    /// The label number of each row.
    pub fn row_classes(&self) -> &[u32] {
        &self.row_class
    }

    /// Length of a vector.
    pub fn dim(&self) -> usize {
        self.vectors.ncols()
    }

    /// The threshold under which an image's label is unknown, unless its job says otherwise.
    pub fn min_score(&self) -> Option<f32> {
        self.min_score
    }

    /// What the vectors take in memory, in bytes.
    pub fn bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|l| l.len() + size_of::<String>()).sum();
        self.vectors.len() * size_of::<f32>() + self.row_class.len() * size_of::<u32>() + labels
    }

    /// The best classes of each embedding; `embeddings` is [N, dim] with unit rows.
    pub fn score(&self, embeddings: ArrayView2<'_, f32>, top_k: usize) -> Vec<Vec<ClassScore>> {
        top_classes(embeddings, self.vectors.view(), &self.row_class, top_k)
    }
}

/// Distinct labels in the order of first appearance, and each row's number among them.
fn number(labels: Vec<String>) -> (Vec<String>, Vec<u32>) {
    let mut numbers: HashMap<String, u32> = HashMap::with_capacity(labels.len());
    let mut distinct = Vec::new();
    let row_class = labels
        .into_iter()
        .map(|label| {
            let next = distinct.len() as u32;
            *numbers.entry(label).or_insert_with_key(|label| {
                distinct.push(label.clone());
                next
            })
        })
        .collect();
    (distinct, row_class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn make(labels: &[&str], vectors: Array2<f32>) -> Result<ClassVectors, ClassesError> {
        let labels = labels.iter().map(|l| (*l).to_owned()).collect();
        ClassVectors::new(("set", "1"), "m@0".into(), labels, vectors, None)
    }

    #[test]
    fn rows_are_normalised_and_labels_numbered_in_their_order() {
        let classes = make(&["b", "a", "b"], array![[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]).unwrap();
        assert_eq!(classes.labels(), ["b", "a"]);
        assert_eq!(classes.row_classes(), [0, 1, 0]);
        assert_eq!(classes.vectors().row(0).to_vec(), [0.6, 0.8]);
        assert_eq!(classes.id(), "set@1");
    }

    #[test]
    fn what_cannot_be_scored_is_refused_with_its_place() {
        for (vectors, labels, words) in [
            (array![[1.0, f32::NAN]], &["a"][..], ["row 0", "column 1"]),
            (array![[1.0, 0.0], [0.0, 0.0]], &["a", "b"], ["row 1", "\"b\""]),
            (array![[1.0, f32::INFINITY]], &["a"], ["row 0", "inf"]),
            (array![[1.0, 0.0]], &["a", "b"], ["2 labels", "1 rows"]),
            (Array2::zeros((0, 4)), &[], ["no vectors", "[0, 4]"]),
        ] {
            let message = make(labels, vectors).unwrap_err().to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{message}");
        }
    }
}
