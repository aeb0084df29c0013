//! Class vectors: one immutable version of one class set, ready to score against.
//!
//! An `Arc<ClassVectors>` keeps its version alive; nothing is ever changed in place.

use std::collections::{BTreeMap, HashMap};

use ndarray::ArrayView2;

use angler_wire::error::{Failure, FailureCode, JobError, Reason};
use angler_wire::job::{Classified, LabelScore, check_name};
use angler_wire::text::chain;

use crate::rows::{Norms, Precision, Vectors};
use crate::score::{ClassRows, ClassScore, Scorer};

/// Why a version of class vectors cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
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
        #[source]
        reason: Reason,
    },
    /// The store did not answer: a later attempt may succeed.
    #[error("class vectors cannot be read now: {0}")]
    Unavailable(#[source] Reason),
}

/// What it means for a job that names the version.
impl From<ClassesError> for JobError {
    fn from(error: ClassesError) -> Self {
        let code = match &error {
            ClassesError::Unavailable(_) => return Self::transient(chain(&error)),
            ClassesError::UnknownSet { .. } => FailureCode::UnknownClassSet,
            // A version that cannot be read is as good as none.
            ClassesError::UnknownVersion { .. } | ClassesError::Invalid { .. } => {
                FailureCode::UnknownVersion
            }
            ClassesError::ModelMismatch { .. } => FailureCode::ModelMismatch,
        };
        Self::Failed(Failure::new(code, chain(&error)))
    }
}

/// What a version consists of: what a file is written from, and what is read from one.
#[derive(Debug, Clone)]
pub struct Contents {
    /// One label a row; a repeated label has several vectors.
    pub labels: Vec<String>,
    /// [rows, dim]; need not be normalised.
    pub vectors: Vectors,
    /// Fingerprint of the model that made the vectors.
    pub model: String,
    /// Below it an image's label is unknown, unless its job says otherwise.
    pub min_score: Option<f32>,
    /// Thresholds of single classes, which win over `min_score`.
    pub min_scores: BTreeMap<String, f32>,
    /// When the version was made, RFC 3339; none: not known.
    pub created_at: Option<String>,
    /// Where the vectors came from, for people.
    pub source: Option<String>,
}

impl Contents {
    /// Contents with nothing but what every version has.
    pub fn new(labels: Vec<String>, vectors: impl Into<Vectors>, model: &str) -> Self {
        Self {
            labels,
            vectors: vectors.into(),
            model: model.to_owned(),
            min_score: None,
            min_scores: BTreeMap::new(),
            created_at: None,
            source: None,
        }
    }

    /// Checks all but the values of the vectors.
    pub(crate) fn check(&self, (set, version): (&str, &str)) -> Result<(), Reason> {
        check_name(set).and_then(|()| check_name(version)).map_err(Reason::of)?;
        let (rows, dim) = (self.vectors.rows(), self.vectors.dim());
        if rows == 0 {
            return Err(format!("no vectors: shape [{rows}, {dim}]").into());
        }
        if self.labels.len() != rows {
            return Err(label_count(self.labels.len(), rows).into());
        }
        let score = |s: f32| (-1.0..=1.0).contains(&s);
        if self.min_score.is_some_and(|s| !score(s)) {
            return Err("min_score must lie in [-1, 1]".into());
        }
        if let Some((label, _)) = self.min_scores.iter().find(|(_, s)| !score(**s)) {
            return Err(format!("min_scores: that of {label:?} must lie in [-1, 1]").into());
        }
        Ok(())
    }
}

pub(crate) fn label_count(labels: usize, rows: usize) -> String {
    format!("{labels} labels for {rows} rows: there must be one label a row")
}

/// One version of a class set.
#[derive(Debug)]
pub struct ClassVectors {
    set: String,
    version: String,
    model: String,
    labels: Labels,
    row_class: Vec<u32>,
    vectors: Vectors,
    scales: Vec<f32>,
    norms: Norms,
    min_score: Option<f32>,
    min_scores: HashMap<u32, f32>,
    created_at: Option<String>,
    source: Option<String>,
}

impl ClassVectors {
    /// Checks and normalises class vectors: finite, no row zero, a label a row.
    ///
    /// # Errors
    /// [`ClassesError::Invalid`] with the first row that is wrong.
    pub fn new(name: (&str, &str), contents: Contents) -> Result<Self, ClassesError> {
        let (set, version) = name;
        let invalid = |reason: Reason| ClassesError::Invalid {
            place: format!("class vectors {set}@{version}"),
            reason,
        };
        contents.check(name).map_err(invalid)?;
        let Contents { labels, mut vectors, model, min_score, min_scores, created_at, source } =
            contents;
        let (scales, norms) = vectors.make_unit().map_err(|(row, what)| {
            let label = labels.get(row).map_or("", String::as_str);
            invalid(format!("row {row} ({label:?}) {what}").into())
        })?;
        let (labels, row_class) = number(labels);
        let min_scores = labels
            .iter()
            .enumerate()
            .filter_map(|(class, label)| Some((class as u32, *min_scores.get(label)?)))
            .collect();
        Ok(Self {
            set: set.to_owned(),
            version: version.to_owned(),
            model,
            labels,
            row_class,
            vectors,
            scales,
            norms,
            min_score,
            min_scores,
            created_at,
            source,
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
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// [rows, dim], unit rows, or for f16 rows as they are in the file.
    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// Row `row` as a unit vector.
    pub fn unit_row(&self, row: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.dim()];
        self.copy_unit_row(row, &mut values);
        values
    }

    /// Fills `out`, `dim` values, with row `row` as a unit vector.
    pub fn copy_unit_row(&self, row: usize, out: &mut [f32]) {
        self.vectors.copy_rows(row, out);
        if let Some(scale) = self.scales.get(row) {
            out.iter_mut().for_each(|value| *value *= scale);
        }
    }

    /// The label number of each row.
    pub fn row_classes(&self) -> &[u32] {
        &self.row_class
    }

    /// The lengths of the rows in the file.
    pub fn norms(&self) -> Norms {
        self.norms
    }

    /// How the values are stored.
    pub fn precision(&self) -> Precision {
        self.vectors.precision()
    }

    /// Length of a vector.
    pub fn dim(&self) -> usize {
        self.vectors.dim()
    }

    /// The set's threshold.
    pub fn min_score(&self) -> Option<f32> {
        self.min_score
    }

    /// The threshold of a class: its own, else the set's. Below it an image whose best class this
    /// is is unknown, unless its job says otherwise.
    pub fn threshold(&self, class: u32) -> Option<f32> {
        self.min_scores.get(&class).copied().or(self.min_score)
    }

    /// The thresholds that single classes have of their own.
    pub fn min_scores(&self) -> BTreeMap<String, f32> {
        let label = |class: &u32| self.labels.get(*class as usize).to_owned();
        self.min_scores.iter().map(|(class, score)| (label(class), *score)).collect()
    }

    /// When the version was made, RFC 3339, if its file says so.
    pub fn created_at(&self) -> Option<&str> {
        self.created_at.as_deref()
    }

    /// Where the vectors came from, if the file says so.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// What the version takes in memory, in bytes.
    pub fn bytes(&self) -> usize {
        self.vectors.bytes()
            + self.labels.bytes()
            + self.row_class.len() * size_of::<u32>()
            + self.scales.len() * size_of::<f32>()
    }

    /// What a new version with the same vectors is written from.
    pub fn contents(&self) -> Contents {
        let labels = self.row_class.iter().map(|c| self.labels.get(*c as usize).to_owned());
        Contents {
            labels: labels.collect(),
            vectors: self.vectors.clone(),
            model: self.model.clone(),
            min_score: self.min_score,
            min_scores: self.min_scores(),
            created_at: None,
            source: self.source.clone(),
        }
    }

    /// The best classes of each embedding, on the calling thread; `embeddings` is [N, dim] with
    /// unit rows.
    pub fn score(&self, embeddings: ArrayView2<'_, f32>, top_k: usize) -> Vec<Vec<ClassScore>> {
        self.score_with(&Scorer::default(), embeddings, top_k)
    }

    /// The best classes of each embedding, on a scorer's threads.
    pub fn score_with(
        &self,
        scorer: &Scorer,
        embeddings: ArrayView2<'_, f32>,
        top_k: usize,
    ) -> Vec<Vec<ClassScore>> {
        let rows =
            ClassRows { vectors: &self.vectors, scales: &self.scales, row_class: &self.row_class };
        scorer.top_classes(embeddings, rows, top_k)
    }
}

/// What one version says of an image.
#[derive(Debug, Clone, Copy)]
pub struct Opinion<'a> {
    /// The label; none: unknown.
    pub label: Option<&'a str>,
    /// Cosine similarity of the best class.
    pub score: f32,
    /// By how much it beats the runner-up, in a set of more than one class.
    pub margin: Option<f32>,
}

impl<'a> Opinion<'a> {
    /// What `classes` say, by its best classes, best first. `min_score` is the job's threshold, if
    /// it has one.
    pub fn of(classes: &'a ClassVectors, top: &[ClassScore], min_score: Option<f32>) -> Self {
        let best = top.first();
        let score = best.map_or(-1.0, |best| best.score);
        let threshold = min_score.or(best.and_then(|best| classes.threshold(best.class)));
        Self {
            label: best
                .filter(|best| threshold.is_none_or(|t| best.score >= t))
                .map(|best| classes.labels().get(best.class as usize)),
            score,
            margin: top.get(1).map(|second| score - second.score),
        }
    }
}

impl ClassVectors {
    /// An image's entry in a result. `top` holds its best classes, best first, two at least where
    /// the set has two; `top_k` of them are listed. `min_score` is the job's threshold, if it has
    /// one; else the class's counts, else the set's.
    pub fn classified(
        &self,
        top: &[ClassScore],
        top_k: usize,
        min_score: Option<f32>,
    ) -> Classified {
        let Opinion { label, score, margin } = Opinion::of(self, top, min_score);
        let listed = top.iter().take(top_k).map(|best| LabelScore {
            label: self.labels.get(best.class as usize).to_owned(),
            score: best.score,
        });
        Classified {
            label: label.map(str::to_owned),
            score,
            margin,
            top: listed.collect(),
            embedding: None,
        }
    }
}

/// The distinct labels of a set, in one piece: a million strings of their own would take as much
/// memory as their vectors' tenth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels {
    text: String,
    /// Where each label ends in `text`.
    ends: Vec<usize>,
}

impl Labels {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The label of this number; empty if there is none.
    pub fn get(&self, class: usize) -> &str {
        let start = match class.checked_sub(1) {
            Some(before) => self.ends.get(before).copied().unwrap_or(0),
            None => 0,
        };
        let end = self.ends.get(class).copied().unwrap_or(start);
        self.text.get(start..end).unwrap_or_default()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|class| self.get(class))
    }

    fn push(&mut self, label: &str) {
        self.text.push_str(label);
        self.ends.push(self.text.len());
    }

    fn bytes(&self) -> usize {
        self.text.len() + self.ends.len() * size_of::<usize>()
    }
}

/// Distinct labels in the order of first appearance, and each row's number among them.
fn number(labels: Vec<String>) -> (Labels, Vec<u32>) {
    let mut numbers: HashMap<&str, u32> = HashMap::with_capacity(labels.len());
    let mut distinct = Labels::default();
    let row_class = labels
        .iter()
        .map(|label| {
            let next = distinct.len() as u32;
            *numbers.entry(label).or_insert_with(|| {
                distinct.push(label);
                next
            })
        })
        .collect();
    (distinct, row_class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    fn make(labels: &[&str], vectors: Array2<f32>) -> Result<ClassVectors, ClassesError> {
        let labels = labels.iter().map(|l| (*l).to_owned()).collect();
        ClassVectors::new(("set", "1"), Contents::new(labels, vectors, "m@0"))
    }

    #[test]
    fn rows_are_normalised_and_labels_numbered_in_their_order() {
        let classes = make(&["b", "a", "b"], array![[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]).unwrap();
        assert_eq!(classes.labels().iter().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(classes.row_classes(), [0, 1, 0]);
        assert_eq!(classes.unit_row(0), [0.6, 0.8]);
        assert_eq!(classes.id(), "set@1");
    }

    #[test]
    fn the_threshold_of_a_class_wins_over_the_sets() {
        let mut contents =
            Contents::new(vec!["a".into(), "b".into()], array![[1.0, 0.0], [0.0, 1.0]], "m@0");
        contents.min_score = Some(0.3);
        contents.min_scores = [("b".to_owned(), 0.5), ("not there".to_owned(), 0.9)].into();
        let classes = ClassVectors::new(("set", "1"), contents.clone()).unwrap();
        assert_eq!((classes.threshold(0), classes.threshold(1)), (Some(0.3), Some(0.5)));
        assert_eq!(classes.min_scores(), [("b".to_owned(), 0.5)].into());
        contents.min_scores.insert("b".into(), 1.5);
        let message = ClassVectors::new(("set", "1"), contents).unwrap_err().to_string();
        assert!(message.contains("min_scores") && message.contains("\"b\""), "{message}");
    }

    #[test]
    fn labels_lie_in_one_piece_and_are_found_by_number() {
        let (labels, rows) = number(["ü", "", "x", "ü"].map(str::to_owned).to_vec());
        assert_eq!(labels.iter().collect::<Vec<_>>(), ["ü", "", "x"]);
        assert_eq!((labels.get(0), labels.get(2), labels.get(9)), ("ü", "x", ""));
        assert_eq!(rows, [0, 1, 2, 0]);
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
