//! What changes for users when version B of class vectors takes the place of version A.
//!
//! Both score the same embeddings, so every difference is the versions'. What counts is the label
//! that an image gets, or *unknown*, by each version's own thresholds; a *flip* is an image that
//! gets another one. Where the truth is known, a flip fixes, breaks, or neither.
//!
//! Images are added one by one and forgotten. What stays is bounded by the pairs of labels that
//! images move between, and by a list of examples.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use angler_wire::error::ImageError;
use angler_wire::job::LabelScore;

use super::evaluate::{Failed, Thresholds, given, margin};
use super::statistics::{Examples, Histogram, Rate, Shift, ShiftSummary, Worst};

/// One of the two versions.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// Its distinct labels.
    pub labels: &'a [String],
    /// Its thresholds.
    pub threshold: Thresholds<'a>,
}

/// An image as both versions see it.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// Where it lies.
    pub uri: &'a str,
    /// What it shows, if that is known.
    pub truth: Option<&'a str>,
    /// A's best classes, best first; at least two if A has two.
    pub a: &'a [LabelScore],
    /// B's, likewise.
    pub b: &'a [LabelScore],
}

/// What is different.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Images that both scored.
    pub images: u64,
    /// Images that neither could, and why.
    pub errors: Examples<Failed>,
    /// Images that get the same label of both, or of both none.
    pub agreement: Rate,
    /// Images whose nearest class is the same, whatever the thresholds.
    pub nearest_agreement: Rate,
    /// Images that get no label of A.
    pub unknown_a: Rate,
    /// Images that get no label of B.
    pub unknown_b: Rate,
    /// How often each is right, over images whose truth is known.
    pub truth: TruthComparison,
    /// Images that get another label; those that break first, then those that both versions are
    /// surest of.
    pub flips: Examples<Flip>,
    /// From which label to which, the most images first. The total counts kinds, not images.
    pub transitions: Examples<Transition>,
    /// How the margins moved from A to B; images of a version with one class have none.
    pub margin_shift: Option<ShiftSummary>,
    /// How the best scores moved from A to B.
    pub score_shift: Option<ShiftSummary>,
    /// Margins by A.
    pub margins_a: Histogram,
    /// Margins by B.
    pub margins_b: Histogram,
    /// Labels that B no longer has, in A's order.
    pub only_in_a: Vec<String>,
    /// Labels that A did not have, in B's order.
    pub only_in_b: Vec<String>,
}

/// Both versions against the truth. Right is the true label; for an image of a class of neither
/// version, right is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TruthComparison {
    /// Images that A is right about.
    pub right_a: Rate,
    /// Images that B is right about.
    pub right_b: Rate,
    /// A was wrong, B is right.
    pub fixed: u64,
    /// A was right, B is wrong.
    pub broken: u64,
}

/// An image that gets another label.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flip {
    /// Where it lies.
    pub uri: String,
    /// What it shows, if that is known.
    pub truth: Option<String>,
    /// What it means; none if the truth is not known.
    pub effect: Option<Effect>,
    /// What A says.
    pub a: Verdict,
    /// What B says.
    pub b: Verdict,
}

/// What a flip means for somebody who knows the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, strum::Display)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Effect {
    /// It was wrong and is right.
    Fixed,
    /// It was right and is wrong.
    Broken,
    /// It was wrong and is wrong in another way.
    Neutral,
}

/// What one version says of an image.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// The label that it gets; null: unknown.
    pub label: Option<String>,
    /// The nearest class.
    pub nearest: String,
    /// Its score.
    pub score: f32,
    /// Its score less the runner-up's.
    pub margin: Option<f32>,
}

/// How many images moved from one label to another; null is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transition {
    /// A's label.
    pub from: Option<String>,
    /// B's label.
    pub to: Option<String>,
    /// How many images.
    pub count: u64,
}

/// Adds images up.
pub struct Comparer<'a> {
    a: Side<'a>,
    b: Side<'a>,
    either: HashSet<&'a str>,
    flips: Worst<Flip>,
    transitions: BTreeMap<(Option<String>, Option<String>), u64>,
    margin_shift: Shift,
    score_shift: Shift,
    /// With everything that is final already.
    comparison: Comparison,
}

impl<'a> Comparer<'a> {
    /// Nothing added yet.
    pub fn new(a: Side<'a>, b: Side<'a>) -> Self {
        let set = |side: Side<'a>| side.labels.iter().map(String::as_str).collect::<HashSet<_>>();
        let (in_a, in_b) = (set(a), set(b));
        let missing = |side: Side<'a>, other: &HashSet<&str>| {
            side.labels.iter().filter(|l| !other.contains(l.as_str())).cloned().collect()
        };
        let comparison = Comparison {
            images: 0,
            errors: Examples::default(),
            agreement: Rate::default(),
            nearest_agreement: Rate::default(),
            unknown_a: Rate::default(),
            unknown_b: Rate::default(),
            truth: TruthComparison::default(),
            flips: Examples::default(),
            transitions: Examples::default(),
            margin_shift: None,
            score_shift: None,
            margins_a: Histogram::of_margins(),
            margins_b: Histogram::of_margins(),
            only_in_a: missing(a, &in_b),
            only_in_b: missing(b, &in_a),
        };
        Self {
            a,
            b,
            either: in_a.union(&in_b).copied().collect(),
            flips: Worst::default(),
            transitions: BTreeMap::new(),
            margin_shift: Shift::default(),
            score_shift: Shift::default(),
            comparison,
        }
    }

    /// Whether either version has this label.
    pub fn has_label(&self, label: &str) -> bool {
        self.either.contains(label)
    }

    /// Adds an image that has no scores.
    pub fn failed(&mut self, uri: &str, error: &ImageError) {
        let failed = || Failed { uri: uri.to_owned(), error: error.clone() };
        self.comparison.errors.push(failed);
    }

    /// Adds an image. One without any score, which no set yields, is passed over.
    pub fn add(&mut self, image: Pair<'_>) {
        let (Some(best_a), Some(best_b)) = (image.a.first(), image.b.first()) else { return };
        let label_a = given(image.a, self.a.threshold).map(|best| best.label.as_str());
        let label_b = given(image.b, self.b.threshold).map(|best| best.label.as_str());
        let (margin_a, margin_b) = (margin(image.a), margin(image.b));
        let c = &mut self.comparison;
        c.images += 1;
        c.agreement.add(label_a == label_b);
        c.nearest_agreement.add(best_a.label == best_b.label);
        c.unknown_a.add(label_a.is_none());
        c.unknown_b.add(label_b.is_none());
        self.score_shift.add(best_a.score, best_b.score);
        margin_a.iter().for_each(|margin| c.margins_a.add(*margin));
        margin_b.iter().for_each(|margin| c.margins_b.add(*margin));
        if let (Some(a), Some(b)) = (margin_a, margin_b) {
            self.margin_shift.add(a, b);
        }
        let effect = image.truth.map(|truth| {
            let right = if self.either.contains(truth) { Some(truth) } else { None };
            c.truth.add(label_a == right, label_b == right)
        });
        if label_a == label_b {
            return;
        }
        let verdict = |label: Option<&str>, best: &LabelScore, margin| Verdict {
            label: label.map(str::to_owned),
            nearest: best.label.clone(),
            score: best.score,
            margin,
        };
        let flip = Flip {
            uri: image.uri.to_owned(),
            truth: image.truth.map(str::to_owned),
            effect,
            a: verdict(label_a, best_a, margin_a),
            b: verdict(label_b, best_b, margin_b),
        };
        let moved = (flip.a.label.clone(), flip.b.label.clone());
        *self.transitions.entry(moved).or_default() += 1;
        let surest = margin_a.unwrap_or(0.0).min(margin_b.unwrap_or(0.0));
        self.flips.push((effect == Some(Effect::Broken), surest), flip);
    }

    /// What it comes to.
    pub fn finish(self) -> Comparison {
        let mut sorted: Vec<Transition> = self
            .transitions
            .into_iter()
            .map(|((from, to), count)| Transition { from, to, count })
            .collect();
        // Stable: of equal counts, the order of the labels.
        sorted.sort_by_key(|transition| std::cmp::Reverse(transition.count));
        let mut transitions = Examples::default();
        sorted.into_iter().for_each(|transition| transitions.push(|| transition));
        Comparison {
            flips: self.flips.finish(),
            transitions,
            margin_shift: self.margin_shift.summary(),
            score_shift: self.score_shift.summary(),
            ..self.comparison
        }
    }
}

impl TruthComparison {
    fn add(&mut self, right_a: bool, right_b: bool) -> Effect {
        self.right_a.add(right_a);
        self.right_b.add(right_b);
        match (right_a, right_b) {
            (false, true) => {
                self.fixed += 1;
                Effect::Fixed
            }
            (true, false) => {
                self.broken += 1;
                Effect::Broken
            }
            _ => Effect::Neutral,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::EXAMPLES;

    fn top(scores: &[(&str, f32)]) -> Vec<LabelScore> {
        scores.iter().map(|(l, s)| LabelScore { label: (*l).into(), score: *s }).collect()
    }

    fn strings(labels: &[&str]) -> Vec<String> {
        labels.iter().map(|l| (*l).to_owned()).collect()
    }

    type Image<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, f32)], &'a [(&'a str, f32)]);

    /// A knows a, b, old and accepts from 0.5; B knows a, b, new and accepts everything.
    fn compare(images: &[Image<'_>]) -> Comparison {
        let (in_a, in_b) = (strings(&["a", "b", "old"]), strings(&["new", "a", "b"]));
        let a = Side { labels: &in_a, threshold: &|_| Some(0.5) };
        let b = Side { labels: &in_b, threshold: &|_| None };
        let mut comparer = Comparer::new(a, b);
        for (uri, truth, a, b) in images {
            comparer.add(Pair { uri, truth: *truth, a: &top(a), b: &top(b) });
        }
        comparer.finish()
    }

    #[test]
    fn labels_flip_and_truth_says_what_that_means() {
        let c = compare(&[
            ("same", Some("a"), &[("a", 0.9), ("b", 0.1)], &[("a", 0.8), ("b", 0.3)]),
            ("fixed", Some("b"), &[("a", 0.9), ("b", 0.1)], &[("b", 0.8), ("a", 0.7)]),
            ("broken", Some("a"), &[("a", 0.9), ("b", 0.8)], &[("b", 0.8), ("a", 0.7)]),
            ("neutral", Some("b"), &[("a", 0.9), ("b", 0.1)], &[("new", 0.8), ("a", 0.7)]),
            ("found", None, &[("a", 0.4), ("b", 0.1)], &[("a", 0.4), ("b", 0.1)]),
            ("added", Some("new"), &[("a", 0.4), ("b", 0.1)], &[("new", 0.9), ("b", 0.1)]),
            ("stranger", Some("x"), &[("a", 0.4), ("b", 0.1)], &[("a", 0.4), ("b", 0.1)]),
        ]);
        assert_eq!((c.images, c.agreement), (7, Rate::new(1, 7)));
        assert_eq!(c.nearest_agreement, Rate::new(3, 7));
        assert_eq!((c.unknown_a, c.unknown_b), (Rate::new(3, 7), Rate::new(0, 7)));
        let t = c.truth;
        assert_eq!((t.right_a, t.right_b), (Rate::new(3, 6), Rate::new(3, 6)));
        assert_eq!((t.fixed, t.broken), (2, 2));
        let flips: BTreeMap<&str, Option<Effect>> =
            c.flips.first.iter().map(|f| (f.uri.as_str(), f.effect)).collect();
        let expected = [
            ("added", Some(Effect::Fixed)),
            ("broken", Some(Effect::Broken)),
            ("fixed", Some(Effect::Fixed)),
            ("found", None),
            ("neutral", Some(Effect::Neutral)),
            ("stranger", Some(Effect::Broken)), // it was unknown, which is right
        ];
        assert_eq!(flips, expected.into());
        assert_eq!((c.only_in_a, c.only_in_b), (strings(&["old"]), strings(&["new"])));
    }

    #[test]
    fn what_breaks_comes_first_and_then_what_both_are_surest_of() {
        let c = compare(&[
            ("unsure", None, &[("a", 0.9), ("b", 0.8)], &[("b", 0.8), ("a", 0.1)]),
            ("sure", None, &[("a", 0.9), ("b", 0.3)], &[("b", 0.8), ("a", 0.3)]),
            ("broken", Some("a"), &[("a", 0.9), ("b", 0.89)], &[("b", 0.8), ("a", 0.79)]),
        ]);
        let uris: Vec<&str> = c.flips.first.iter().map(|f| f.uri.as_str()).collect();
        assert_eq!(uris, ["broken", "sure", "unsure"]);
        let sure = &c.flips.first[1];
        assert_eq!((sure.a.label.as_deref(), sure.b.label.as_deref()), (Some("a"), Some("b")));
        assert_eq!((sure.a.score, sure.b.score, sure.truth.as_ref()), (0.9, 0.8, None));
        assert!((sure.b.margin.unwrap() - 0.5).abs() < 1e-6);
    }

    #[test]
    fn transitions_are_counted_and_the_examples_bounded() {
        let labels = strings(&["a", "b"]);
        let side = Side { labels: &labels, threshold: &|_| Some(0.5) };
        let mut comparer = Comparer::new(side, side);
        let (a, b, low) = (
            top(&[("a", 0.9), ("b", 0.1)]),
            top(&[("b", 0.9), ("a", 0.1)]),
            top(&[("b", 0.4), ("a", 0.1)]),
        );
        for i in 0..900 {
            let to = if i % 3 == 0 { &low } else { &b };
            comparer.add(Pair { uri: &i.to_string(), truth: None, a: &a, b: to });
        }
        let c = comparer.finish();
        assert_eq!((c.flips.total, c.flips.first.len()), (900, EXAMPLES));
        let expected = [
            Transition { from: Some("a".into()), to: Some("b".into()), count: 600 },
            Transition { from: Some("a".into()), to: None, count: 300 },
        ];
        assert_eq!((c.transitions.total, c.transitions.first), (2, expected.into()));
    }

    #[test]
    fn shifts_go_from_a_to_b_and_a_version_against_itself_has_none() {
        let c = compare(&[
            ("1", None, &[("a", 0.9), ("b", 0.5)], &[("a", 0.8), ("b", 0.3)]),
            ("2", None, &[("a", 0.6), ("b", 0.5)], &[("a", 0.7), ("b", 0.3)]),
        ]);
        let (margin, score) = (c.margin_shift.unwrap(), c.score_shift.unwrap());
        assert!(
            (margin.mean - 0.2).abs() < 1e-6 && score.mean.abs() < 1e-6,
            "{margin:?} {score:?}"
        );
        assert!((margin.p5 - 0.1).abs() < 2e-4 && (margin.p95 - 0.3).abs() < 2e-4, "{margin:?}");
        assert_eq!((c.margins_a.total(), c.margins_b.total()), (2, 2));

        let labels = strings(&["a", "b"]);
        let side = Side { labels: &labels, threshold: &|_| Some(0.5) };
        let mut comparer = Comparer::new(side, side);
        for i in 0..50 {
            let scores = top(&[("a", i as f32 / 50.0), ("b", -0.1)]);
            comparer.add(Pair { uri: "u", truth: Some("a"), a: &scores, b: &scores });
        }
        let c = comparer.finish();
        assert_eq!((c.agreement, c.flips.total), (Rate::new(50, 50), 0));
        assert_eq!((c.truth.fixed, c.truth.broken), (0, 0));
        let shift = c.margin_shift.unwrap();
        assert_eq!((shift.p5, shift.median, shift.p95, shift.mean), (0.0, 0.0, 0.0, 0.0));
        assert!(c.only_in_a.is_empty() && c.only_in_b.is_empty());
    }

    #[test]
    fn a_version_of_one_class_has_no_margins() {
        let (one, two) = (strings(&["a"]), strings(&["a", "b"]));
        let mut comparer = Comparer::new(
            Side { labels: &one, threshold: &|_| None },
            Side { labels: &two, threshold: &|_| None },
        );
        let (a, b) = (top(&[("a", 0.9)]), top(&[("b", 0.9), ("a", 0.1)]));
        comparer.add(Pair { uri: "u", truth: None, a: &a, b: &b });
        let c = comparer.finish();
        assert_eq!(c.margin_shift, None);
        assert_eq!((c.margins_a.total(), c.margins_b.total()), (0, 1));
        assert_eq!((c.flips.total, c.flips.first[0].a.margin), (1, None));
        let json = serde_json::to_value(&c).unwrap();
        assert!(json["flips"]["first"][0]["effect"].is_null(), "{json}");
        assert_eq!(json["score_shift"]["count"], 1);
    }
}
