//! How well a version of class vectors names images whose class is known.
//!
//! The truth of an image is a label of the set, and the image is *known*, or it is not, and the
//! image is a *stranger*: right is then to call it unknown. Two questions are kept apart: which
//! class is nearest ([`Evaluation::top_1`], no threshold), and what a user is told, the label or
//! *unknown* ([`Evaluation::right`], the confusion matrix, recall and precision). A score is
//! accepted when it is at or above the threshold, here as everywhere.
//!
//! Images are added one by one and forgotten: what stays is counts, two or three scores an image
//! for [`super::calibrate`], and a bounded list of examples.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use angler_wire::error::ImageError;
use angler_wire::job::LabelScore;

use super::calibrate::Scores;
use super::statistics::{Examples, Histogram, Rate, Worst};

/// The threshold of a label, if it has one.
pub type Thresholds<'a> = &'a (dyn Fn(&str) -> Option<f32> + Sync);

/// An image whose class is known, and its scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled {
    /// Where it lies.
    pub uri: String,
    /// Its class; not necessarily one of the set.
    pub truth: String,
    /// Best first, each label once; at least two if the set has two classes.
    pub top: Vec<LabelScore>,
}

/// How well a version does.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// Images that have scores: known ones and strangers.
    pub images: u64,
    /// Images whose class is one of the set.
    pub known: u64,
    /// Images whose class is not.
    pub strangers: u64,
    /// Images without scores, and why.
    pub errors: Examples<Failed>,
    /// Known images whose nearest class is right, whatever the threshold.
    pub top_1: Rate,
    /// How many classes [`Self::top_k`] looks at.
    pub k: usize,
    /// Known images whose class is among the `k` nearest.
    pub top_k: Rate,
    /// Known images that get their label: right and accepted.
    pub right: Rate,
    /// Known images that get another one: wrong and accepted.
    pub wrong: Rate,
    /// Known images that get none.
    pub unknown: Rate,
    /// Strangers that get a label.
    pub strangers_accepted: Rate,
    /// One entry a class of the set, in its order.
    pub per_class: Vec<ClassEvaluation>,
    /// Which class gets which label.
    pub confusion: Confusion,
    /// Classes that get another's label, the most frequent pairs first.
    pub confused: Examples<Confused>,
    /// Best scores of known images whose nearest class is right.
    pub genuine: Histogram,
    /// Every image's best score among the classes that are not its own.
    pub impostor: Histogram,
    /// Known images whose nearest class is wrong, and strangers that get a label; accepted ones
    /// first, then by score.
    pub mistakes: Examples<Mistake>,
    /// What a threshold is calibrated with.
    #[serde(skip)]
    pub scores: Scores,
}

/// An image that has no scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failed {
    /// Where it lies.
    pub uri: String,
    /// Why.
    pub error: ImageError,
}

/// How well one class does, with the threshold.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassEvaluation {
    /// The class.
    pub label: String,
    /// Images of the class.
    pub images: u64,
    /// Its images that get its label, of all its images.
    pub recall: Rate,
    /// Its images that get its label, of all images that get it, strangers too.
    pub precision: Rate,
    /// Its images that get no label.
    pub unknown: u64,
    /// Mean over its images of the best score, whosever it is.
    pub mean_score: Option<f64>,
    /// Mean over its images of the best score less the runner-up's; none for a set of one class.
    pub mean_margin: Option<f64>,
}

/// The confusion matrix, sparse.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Confusion {
    /// The classes that images are of: labels in the set's order, then the strangers', sorted.
    pub rows: Vec<String>,
    /// How many of the rows are labels of the set.
    pub known_rows: usize,
    /// The labels that images get, in the set's order; the last one is null: unknown.
    pub columns: Vec<Option<String>>,
    /// The cells that are not zero, row by row.
    pub cells: Vec<Cell>,
}

/// A cell of the confusion matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Index into [`Confusion::rows`].
    pub row: usize,
    /// Index into [`Confusion::columns`].
    pub column: usize,
    /// How many images.
    pub count: u64,
}

/// Images of one class that get another's label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Confused {
    /// What they show.
    pub truth: String,
    /// What they are said to show.
    pub label: String,
    /// How many.
    pub count: u64,
}

/// An image whose nearest class is wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mistake {
    /// Where it lies.
    pub uri: String,
    /// What it shows.
    pub truth: String,
    /// The nearest class.
    pub label: String,
    /// Its score.
    pub score: f32,
    /// Its score less the runner-up's.
    pub margin: Option<f32>,
    /// The score of the true class, if that is among those listed.
    pub truth_score: Option<f32>,
    /// Whether the score reaches the threshold: the wrong label is given.
    pub accepted: bool,
}

/// The best score less that of the runner-up, which is another class; none without one.
pub fn margin(top: &[LabelScore]) -> Option<f32> {
    match top {
        [best, second, ..] => Some(best.score - second.score),
        _ => None,
    }
}

/// The best class, if its score is accepted: the label that an image gets.
pub fn given<'a>(top: &'a [LabelScore], threshold: Thresholds<'_>) -> Option<&'a LabelScore> {
    top.first().filter(|best| threshold(&best.label).is_none_or(|limit| best.score >= limit))
}

#[derive(Default)]
struct Sums {
    images: u64,
    right: u64,
    unknown: u64,
    given: u64,
    score: f64,
    margin: f64,
    margins: u64,
}

/// What an image is of: the number of a label, or a stranger's class.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    Known(usize),
    Stranger(String),
}

/// Adds images up.
pub struct Evaluator<'a> {
    labels: &'a [String],
    numbers: HashMap<&'a str, usize>,
    threshold: Thresholds<'a>,
    sums: Vec<Sums>,
    /// By truth and column; columns are the labels and, last, unknown.
    cells: BTreeMap<(Truth, usize), u64>,
    mistakes: Worst<Mistake>,
    /// With everything that is final already.
    evaluation: Evaluation,
}

impl<'a> Evaluator<'a> {
    /// Nothing added yet. `labels` are the set's, in order; `k` is that of the top-k accuracy.
    pub fn new(labels: &'a [String], threshold: Thresholds<'a>, k: usize) -> Self {
        let columns = labels.iter().cloned().map(Some).chain([None]).collect();
        let confusion = Confusion { rows: Vec::new(), known_rows: 0, columns, cells: Vec::new() };
        let evaluation = Evaluation {
            images: 0,
            known: 0,
            strangers: 0,
            errors: Examples::default(),
            top_1: Rate::default(),
            k,
            top_k: Rate::default(),
            right: Rate::default(),
            wrong: Rate::default(),
            unknown: Rate::default(),
            strangers_accepted: Rate::default(),
            per_class: Vec::new(),
            confusion,
            confused: Examples::default(),
            genuine: Histogram::of_scores(),
            impostor: Histogram::of_scores(),
            mistakes: Examples::default(),
            scores: Scores::default(),
        };
        Self {
            labels,
            numbers: labels.iter().enumerate().map(|(i, label)| (label.as_str(), i)).collect(),
            threshold,
            sums: labels.iter().map(|_| Sums::default()).collect(),
            cells: BTreeMap::new(),
            mistakes: Worst::default(),
            evaluation,
        }
    }

    /// Adds an image that has no scores.
    pub fn failed(&mut self, uri: &str, error: &ImageError) {
        let failed = || Failed { uri: uri.to_owned(), error: error.clone() };
        self.evaluation.errors.push(failed);
    }

    /// Adds an image. One whose `top` is empty, which no set yields, is passed over.
    pub fn add(&mut self, image: &Labelled) {
        let Some(best) = image.top.first() else { return };
        let known = self.numbers.get(image.truth.as_str()).copied();
        let nearest_is_right = best.label == image.truth;
        let accepted = given(&image.top, self.threshold).is_some();
        let column = match self.numbers.get(best.label.as_str()) {
            Some(number) if accepted => *number,
            _ => self.labels.len(),
        };
        let e = &mut self.evaluation;
        e.images += 1;
        let impostor = image.top.iter().find(|t| t.label != image.truth).map(|t| t.score);
        if let Some(score) = impostor {
            e.impostor.add(score);
        }
        match known {
            Some(number) => {
                e.known += 1;
                e.top_1.add(nearest_is_right);
                e.top_k.add(image.top.iter().take(e.k).any(|t| t.label == image.truth));
                e.right.add(accepted && nearest_is_right);
                e.wrong.add(accepted && !nearest_is_right);
                e.unknown.add(!accepted);
                let right = nearest_is_right.then_some(best.score);
                if let Some(score) = right {
                    e.genuine.add(score);
                }
                e.scores.known(right, impostor);
                self.sums[number].add(image, accepted, nearest_is_right);
            }
            None => {
                e.strangers += 1;
                e.strangers_accepted.add(accepted);
                e.scores.stranger(best.score);
            }
        }
        if let Some(sums) = self.sums.get_mut(column) {
            sums.given += 1;
        }
        let truth = known.map_or_else(|| Truth::Stranger(image.truth.clone()), Truth::Known);
        *self.cells.entry((truth, column)).or_default() += 1;
        if !nearest_is_right && (known.is_some() || accepted) {
            let mistake = Mistake {
                uri: image.uri.clone(),
                truth: image.truth.clone(),
                label: best.label.clone(),
                score: best.score,
                margin: margin(&image.top),
                truth_score: image.top.iter().find(|t| t.label == image.truth).map(|t| t.score),
                accepted,
            };
            self.mistakes.push((accepted, best.score), mistake);
        }
    }

    /// What it comes to.
    pub fn finish(mut self) -> Evaluation {
        self.matrix();
        let classes = self.labels.iter().zip(&self.sums);
        let per_class = classes.map(|(label, sums)| sums.finish(label)).collect();
        Evaluation { per_class, mistakes: self.mistakes.finish(), ..self.evaluation }
    }

    fn matrix(&mut self) {
        let Confusion { rows, known_rows, cells, .. } = &mut self.evaluation.confusion;
        let mut confused: Vec<Confused> = Vec::new();
        for ((truth, column), count) in std::mem::take(&mut self.cells) {
            // Sorted: the labels in the set's order, then the strangers' classes.
            let (name, known) = match truth {
                Truth::Known(number) => (self.labels[number].clone(), true),
                Truth::Stranger(name) => (name, false),
            };
            if rows.last() != Some(&name) {
                rows.push(name.clone());
                *known_rows += usize::from(known);
            }
            cells.push(Cell { row: rows.len() - 1, column, count });
            if let Some(label) = self.labels.get(column).filter(|label| **label != name) {
                confused.push(Confused { truth: name, label: label.clone(), count });
            }
        }
        // Stable: pairs of the same count stay in the order of the rows.
        confused.sort_by_key(|pair| std::cmp::Reverse(pair.count));
        for pair in confused {
            self.evaluation.confused.push(|| pair);
        }
    }
}

impl Sums {
    fn add(&mut self, image: &Labelled, accepted: bool, right: bool) {
        self.images += 1;
        self.right += u64::from(accepted && right);
        self.unknown += u64::from(!accepted);
        self.score += image.top.first().map_or(0.0, |best| f64::from(best.score));
        if let Some(margin) = margin(&image.top) {
            self.margin += f64::from(margin);
            self.margins += 1;
        }
    }

    fn finish(&self, label: &str) -> ClassEvaluation {
        let mean = |sum: f64, count: u64| (count > 0).then(|| sum / count as f64);
        ClassEvaluation {
            label: label.to_owned(),
            images: self.images,
            recall: Rate::new(self.right, self.images),
            precision: Rate::new(self.right, self.given),
            unknown: self.unknown,
            mean_score: mean(self.score, self.images),
            mean_margin: mean(self.margin, self.margins),
        }
    }
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageErrorCode;

    use super::*;
    use crate::statistics::EXAMPLES;

    fn image(uri: &str, truth: &str, top: &[(&str, f32)]) -> Labelled {
        let top =
            top.iter().map(|(label, score)| LabelScore { label: (*label).into(), score: *score });
        Labelled { uri: uri.into(), truth: truth.into(), top: top.collect() }
    }

    fn labels() -> Vec<String> {
        ["b", "a", "c"].map(str::to_owned).into()
    }

    fn evaluate(threshold: Thresholds<'_>, images: &[Labelled]) -> Evaluation {
        let labels = labels();
        let mut evaluator = Evaluator::new(&labels, threshold, 2);
        images.iter().for_each(|image| evaluator.add(image));
        evaluator.finish()
    }

    fn sample() -> Vec<Labelled> {
        vec![
            image("1", "a", &[("a", 0.9), ("b", 0.5), ("c", 0.1)]), // right
            image("2", "a", &[("b", 0.8), ("a", 0.7), ("c", 0.1)]), // wrong, second
            image("3", "a", &[("c", 0.3), ("b", 0.2), ("a", 0.1)]), // wrong, third, refused
            image("4", "b", &[("b", 0.5), ("a", 0.3), ("c", 0.0)]), // right, at the threshold
            image("5", "b", &[("b", 0.45), ("c", 0.3), ("a", 0.0)]), // right, refused
            image("6", "x", &[("b", 0.6), ("a", 0.3), ("c", 0.0)]), // stranger, accepted
            image("7", "w", &[("c", 0.4), ("a", 0.3), ("b", 0.0)]), // stranger, refused
        ]
    }

    #[test]
    fn every_image_is_counted_once_on_each_side_of_the_threshold() {
        let e = evaluate(&|_| Some(0.5), &sample());
        assert_eq!((e.images, e.known, e.strangers), (7, 5, 2));
        assert_eq!((e.top_1, e.top_k), (Rate::new(3, 5), Rate::new(4, 5)));
        assert_eq!(
            (e.right, e.wrong, e.unknown),
            (Rate::new(2, 5), Rate::new(1, 5), Rate::new(2, 5))
        );
        assert_eq!(e.strangers_accepted, Rate::new(1, 2));
        assert_eq!((e.genuine.total(), e.impostor.total()), (3, 7));
        let none = evaluate(&|_| None, &sample());
        assert_eq!((none.right, none.wrong, none.unknown.count), (none.top_1, Rate::new(2, 5), 0));
        assert_eq!(none.strangers_accepted, Rate::new(2, 2));
    }

    #[test]
    fn a_class_has_the_recall_and_the_precision_of_what_is_said() {
        let e = evaluate(&|_| Some(0.5), &sample());
        let [b, a, c] = &e.per_class[..] else { panic!("{:?}", e.per_class) };
        assert_eq!((b.label.as_str(), b.images, b.unknown), ("b", 2, 1));
        assert_eq!((b.recall, b.precision), (Rate::new(1, 2), Rate::new(1, 3)));
        assert_eq!((a.recall, a.precision, a.unknown), (Rate::new(1, 3), Rate::new(1, 1), 1));
        assert!((a.mean_score.unwrap() - 2.0 / 3.0).abs() < 1e-6, "{a:?}");
        assert!((a.mean_margin.unwrap() - 0.2).abs() < 1e-6, "{a:?}");
        assert_eq!((c.images, c.mean_score, c.recall.share()), (0, None, None));
    }

    #[test]
    fn a_label_may_have_a_threshold_of_its_own() {
        let e = evaluate(&|label| (label == "b").then_some(0.7), &sample());
        assert_eq!(e.right, Rate::new(1, 5));
        assert_eq!(e.wrong, Rate::new(2, 5)); // "b" at 0.8, and "c", which has none
        assert_eq!(e.unknown, Rate::new(2, 5));
    }

    #[test]
    fn the_matrix_lists_classes_in_order_and_strangers_after_them() {
        let e = evaluate(&|_| Some(0.5), &sample());
        assert_eq!(e.confusion.rows, ["b", "a", "w", "x"]);
        assert_eq!(e.confusion.known_rows, 2);
        assert_eq!(e.confusion.columns.last(), Some(&None));
        let cells: Vec<_> = e.confusion.cells.iter().map(|c| (c.row, c.column, c.count)).collect();
        let expected =
            [(0, 0, 1), (0, 3, 1), (1, 0, 1), (1, 1, 1), (1, 3, 1), (2, 3, 1), (3, 0, 1)];
        assert_eq!(cells, expected);
        let pairs: Vec<_> = e
            .confused
            .first
            .iter()
            .map(|p| (p.truth.as_str(), p.label.as_str(), p.count))
            .collect();
        assert_eq!(pairs, [("a", "b", 1), ("x", "b", 1)]);

        let mut more = sample();
        more.extend((0..3).map(|i| image(&format!("m{i}"), "x", &[("c", 0.9), ("a", 0.1)])));
        let e = evaluate(&|_| Some(0.5), &more);
        assert_eq!((e.confused.total, e.confused.first[0].count), (3, 3));
    }

    #[test]
    fn mistakes_that_are_told_come_before_those_that_are_not() {
        let e = evaluate(&|_| Some(0.5), &sample());
        let uris: Vec<&str> = e.mistakes.first.iter().map(|m| m.uri.as_str()).collect();
        assert_eq!(uris, ["2", "6", "3"]);
        let [two, six, three] = &e.mistakes.first[..] else { panic!() };
        assert!(two.accepted && six.accepted && !three.accepted);
        assert_eq!(
            (two.truth_score, six.truth_score, three.truth_score),
            (Some(0.7), None, Some(0.1))
        );
        assert!((two.margin.unwrap() - 0.1).abs() < 1e-6);
    }

    #[test]
    fn memory_for_examples_is_bounded_and_all_are_counted() {
        let labels = labels();
        let mut evaluator = Evaluator::new(&labels, &|_| None, 1);
        for i in 0..3 * EXAMPLES {
            let score = (i % 100) as f32 / 100.0;
            evaluator.add(&image(&i.to_string(), "a", &[("b", score), ("a", -1.0)]));
            let error = ImageError::new(ImageErrorCode::NotFound, "no such file");
            evaluator.failed(&i.to_string(), &error);
        }
        let e = evaluator.finish();
        assert_eq!((e.mistakes.total, e.mistakes.first.len()), (600, EXAMPLES));
        assert_eq!((e.errors.total, e.errors.first.len()), (600, EXAMPLES));
        assert!(e.mistakes.first.windows(2).all(|w| w[0].score >= w[1].score));
        assert_eq!(e.mistakes.first[0].score, 0.99);
    }

    #[test]
    fn the_impostor_of_an_image_is_another_class_and_a_set_of_one_has_none() {
        let images = [
            image("1", "a", &[("a", 0.9), ("b", 0.5)]),
            image("2", "a", &[("b", 0.8), ("a", 0.7)]),
            image("3", "x", &[("b", 0.6), ("a", 0.3)]),
        ];
        let found = evaluate(&|_| None, &images).scores.calibrate(0.34).unwrap();
        // Impostors: 0.5, 0.8, 0.6; one may pass.
        assert_eq!((found.threshold, found.false_positives), (0.6_f32.next_up(), Rate::new(1, 3)));
        let alone = vec!["a".to_owned()];
        let mut evaluator = Evaluator::new(&alone, &|_| None, 5);
        evaluator.add(&image("1", "a", &[("a", 0.9)]));
        evaluator.add(&image("2", "x", &[("a", 0.2)]));
        let e = evaluator.finish();
        assert_eq!((e.impostor.total(), e.per_class[0].mean_margin), (1, None));
        assert_eq!(e.top_k, Rate::new(1, 1));
    }

    #[test]
    fn it_is_written_as_json_without_the_raw_scores() {
        let json = serde_json::to_value(evaluate(&|_| Some(0.5), &sample())).unwrap();
        assert_eq!(json["top_1"]["count"], 3);
        assert_eq!(json["top_1"]["share"], 0.6);
        assert!(json["confusion"]["columns"][3].is_null());
        assert_eq!(json["mistakes"]["first"][0]["uri"], "2");
        assert!(json.get("scores").is_none());
    }
}
