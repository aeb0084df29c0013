//! A candidate version that runs beside the one that is served: every image of its set is scored
//! against both, from one embedding, and what would change is counted. Nothing of it reaches a
//! result.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use angler_vectors::{ClassVectors, Opinion};
use angler_wire::control::shadow::{Example, ShadowReport, Transition, sort};
use angler_wire::job::ClassSelector;

/// Kinds of flips that are counted one by one; what is beyond is counted together.
const TRANSITIONS: usize = 10_000;
/// Flips that are kept as examples, the latest.
const EXAMPLES: usize = 20;
/// Kinds of flips that a report names.
const REPORTED: usize = 50;

/// The candidate and its counts.
#[derive(Debug)]
pub struct Shadow {
    selector: ClassSelector,
    candidate: OnceLock<Arc<ClassVectors>>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// The version that was served when these were counted.
    served: String,
    images: u64,
    flips: u64,
    became_unknown: u64,
    became_known: u64,
    margin_shift: f64,
    transitions: HashMap<(Option<String>, Option<String>), u64>,
    other_transitions: u64,
    examples: VecDeque<Example>,
}

impl Shadow {
    /// A candidate that is still to be loaded. `selector` names a version.
    pub fn new(selector: ClassSelector) -> Self {
        Self { selector, candidate: OnceLock::new(), counts: Mutex::default() }
    }

    /// What is to be loaded.
    pub fn selector(&self) -> &ClassSelector {
        &self.selector
    }

    /// From now on images are scored against it.
    pub fn set_candidate(&self, classes: Arc<ClassVectors>) {
        // A second one would be the same: a version is immutable.
        let _ = self.candidate.set(classes);
    }

    /// What images that are scored against `served` are scored against as well: the candidate, if
    /// it is loaded, of the same set, and another version.
    pub fn beside(&self, served: &ClassVectors) -> Option<Arc<ClassVectors>> {
        let candidate = self.candidate.get()?;
        (candidate.set() == served.set() && candidate.version() != served.version())
            .then(|| Arc::clone(candidate))
    }

    /// Counts one image. The counts begin anew when another version is served.
    pub fn count(&self, uri: &str, served: &str, now: Opinion<'_>, candidate: Opinion<'_>) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.served != served {
            *counts = Counts { served: served.to_owned(), ..Counts::default() };
        }
        counts.images += 1;
        if let (Some(a), Some(b)) = (now.margin, candidate.margin) {
            counts.margin_shift += f64::from(b) - f64::from(a);
        }
        if now.label == candidate.label {
            return;
        }
        counts.flips += 1;
        counts.became_unknown += u64::from(candidate.label.is_none());
        counts.became_known += u64::from(now.label.is_none());
        let key = (now.label.map(str::to_owned), candidate.label.map(str::to_owned));
        if counts.transitions.len() < TRANSITIONS || counts.transitions.contains_key(&key) {
            *counts.transitions.entry(key.clone()).or_default() += 1;
        } else {
            counts.other_transitions += 1;
        }
        if counts.examples.len() == EXAMPLES {
            counts.examples.pop_front();
        }
        counts.examples.push_back(Example {
            uri: uri.to_owned(),
            from: key.0,
            to: key.1,
            scores: (now.score, candidate.score),
        });
    }

    /// The counts so far.
    pub fn report(&self) -> ShadowReport {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut transitions: Vec<Transition> = counts
            .transitions
            .iter()
            .map(|((from, to), count)| Transition {
                from: from.clone(),
                to: to.clone(),
                count: *count,
            })
            .collect();
        sort(&mut transitions);
        let named: u64 = transitions.iter().take(REPORTED).map(|t| t.count).sum();
        transitions.truncate(REPORTED);
        ShadowReport {
            candidate: self.selector.to_string(),
            loaded: self.candidate.get().is_some(),
            served: counts.served.clone(),
            images: counts.images,
            flips: counts.flips,
            became_unknown: counts.became_unknown,
            became_known: counts.became_known,
            mean_margin_shift: counts.margin_shift / (counts.images.max(1) as f64),
            other_flips: counts.flips - named,
            transitions,
            examples: counts.examples.iter().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use angler_vectors::Contents;
    use angler_vectors::score::ClassScore;

    use super::*;

    fn classes(version: &str, min_score: Option<f32>) -> ClassVectors {
        let vectors = array![[1.0, 0.0], [0.0, 1.0]];
        let mut contents = Contents::new(vec!["a".into(), "b".into()], vectors, "m@0");
        contents.min_score = min_score;
        ClassVectors::new(("set", version), contents).unwrap()
    }

    fn opinion(label: Option<&str>, score: f32, margin: f32) -> Opinion<'_> {
        Opinion { label, score, margin: Some(margin) }
    }

    #[test]
    fn an_opinion_follows_the_thresholds() {
        let top = [ClassScore { class: 1, score: 0.5 }, ClassScore { class: 0, score: 0.25 }];
        let (plain, strict) = (classes("1", None), classes("2", Some(0.6)));
        let of = |classes, min_score| {
            let opinion = Opinion::of(classes, &top, min_score);
            (opinion.label, opinion.score, opinion.margin)
        };
        assert_eq!(of(&plain, None), (Some("b"), 0.5, Some(0.25)));
        assert_eq!(of(&strict, None).0, None);
        assert_eq!(of(&strict, Some(0.4)).0, Some("b"));
        assert_eq!(Opinion::of(&plain, &[], None).label, None);
    }

    #[test]
    fn it_runs_beside_other_versions_of_its_set_alone() {
        let shadow = Shadow::new(ClassSelector::parse("set@2").unwrap());
        assert!(shadow.beside(&classes("1", None)).is_none());
        shadow.set_candidate(Arc::new(classes("2", None)));
        assert!(shadow.beside(&classes("1", None)).is_some());
        assert!(shadow.beside(&classes("2", None)).is_none());
    }

    #[test]
    fn flips_are_counted_by_kind_and_anew_for_another_version() {
        let shadow = Shadow::new(ClassSelector::parse("set@2").unwrap());
        let (a, b, unknown) =
            (opinion(Some("a"), 0.9, 0.3), opinion(Some("b"), 0.8, 0.1), opinion(None, 0.2, 0.1));
        shadow.count("0", "set@0", a, b);
        for (uri, now, then) in
            [("1", a, a), ("2", a, b), ("3", a, b), ("4", a, unknown), ("5", unknown, b)]
        {
            shadow.count(uri, "set@1", now, then);
        }
        let report = shadow.report();
        assert_eq!((report.served.as_str(), report.images, report.flips), ("set@1", 5, 4));
        assert_eq!((report.became_unknown, report.became_known), (1, 1));
        assert_eq!(report.transitions[0].count, 2);
        assert_eq!(report.transitions[0].from.as_deref(), Some("a"));
        assert_eq!(report.examples.len(), 4);
        assert!((report.mean_margin_shift + 0.12).abs() < 1e-6, "{report:?}");
        let mut sum = report.clone();
        sum.add(&report);
        assert_eq!((sum.images, sum.flips, sum.transitions[0].count), (10, 8, 4));
        assert!((sum.mean_margin_shift + 0.12).abs() < 1e-6);
    }

    #[test]
    fn what_it_keeps_is_bounded() {
        let shadow = Shadow::new(ClassSelector::parse("set@2").unwrap());
        for n in 0..TRANSITIONS + 500 {
            let label = n.to_string();
            shadow.count(
                "u",
                "set@1",
                opinion(Some("a"), 0.0, 0.0),
                opinion(Some(&label), 0.0, 0.0),
            );
        }
        let report = shadow.report();
        assert_eq!(report.flips, (TRANSITIONS + 500) as u64);
        assert_eq!(report.other_flips, report.flips - REPORTED as u64);
        assert_eq!((report.transitions.len(), report.examples.len()), (REPORTED, EXAMPLES));
        assert_eq!(shadow.counts.lock().unwrap().transitions.len(), TRANSITIONS);
    }
}
