//! Results, counted one after the other. Memory is bounded by what is shown and not by what is read: counts,
//! histograms, the images that matter most, and a few that are drawn by lot.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use angler_vectors::statistics::{Examples, Histogram, Worst};
use angler_wire::text::chain;

use super::read::{Classified, Content, Error, Image, Line, Verdict};
use super::sample::{Sample, plan};
use super::summary::{
    Answered, Class, Example, Failed, Failures, Faulty, OTHER, Spread, Summary, Unreadable,
};
use super::text::cut;

/// The most classes that are counted by name, each with its histograms (about 2 kB). Of more the first ones
/// that are met are, and what is left is counted together.
const CLASSES: usize = 10_000;
/// The most codes of errors, and of what answered: both are closed sets, but files are not.
const KINDS: usize = 100;
/// Examples of each error.
const OF_ERROR: usize = 5;
/// The longest label, id or message that is kept, in characters, and the longest URI: a key in S3 has 1,024
/// bytes, a path 4,096.
const TEXT: usize = 300;
const URI: usize = 4_096 + 64;

/// Values while they are counted.
#[derive(Debug)]
struct Values {
    histogram: Histogram,
    range: (f32, f32),
}

impl Values {
    fn new(histogram: Histogram) -> Self {
        Self { histogram, range: (f32::INFINITY, f32::NEG_INFINITY) }
    }

    fn add(&mut self, value: f32) {
        self.histogram.add(value);
        self.range = (self.range.0.min(value), self.range.1.max(value));
    }

    fn finish(self) -> Option<Spread> {
        let (lowest, highest) = self.range;
        // Of few values a bin's place says less than where they begin and end.
        let at = |share| Some(self.histogram.quantile(share)?.clamp(lowest, highest));
        let (median, p5, p95) = (at(0.5)?, at(0.05)?, at(0.95)?);
        Some(Spread { median, p5, p95, lowest, highest, histogram: self.histogram })
    }
}

#[derive(Debug)]
struct Counted {
    images: u64,
    scores: Values,
    margins: Values,
    sample: Sample,
}

/// Counts results. `per_class` images of each class are drawn to be shown.
#[derive(Debug)]
pub(super) struct Collector {
    per_class: usize,
    lines: u64,
    images: u64,
    unknown: u64,
    scores: Values,
    margins: Values,
    unknown_scores: Values,
    answered: BTreeMap<(String, String, String), u64>,
    classes: HashMap<String, Counted>,
    other_classes: u64,
    errors: BTreeMap<String, Failures>,
    job_errors: BTreeMap<String, Failures>,
    least_certain: Worst<Example>,
    unknown_images: Worst<Example>,
    unreadable: Unreadable,
}

impl Collector {
    pub(super) fn new(per_class: usize) -> Self {
        Self {
            per_class,
            lines: 0,
            images: 0,
            unknown: 0,
            scores: Values::new(Histogram::of_scores()),
            margins: Values::new(Histogram::of_margins()),
            unknown_scores: Values::new(Histogram::of_scores()),
            answered: BTreeMap::new(),
            classes: HashMap::new(),
            other_classes: 0,
            errors: BTreeMap::new(),
            job_errors: BTreeMap::new(),
            least_certain: Worst::default(),
            unknown_images: Worst::default(),
            unreadable: Unreadable::default(),
        }
    }

    /// Counts a line, or that it cannot be read.
    pub(super) fn add(&mut self, number: u64, line: anyhow::Result<Line>) {
        self.lines += 1;
        match line {
            Err(error) => {
                self.unreadable.lines += 1;
                self.unreadable.first.get_or_insert_with(|| Faulty {
                    line: number,
                    message: cut(&chain(error.as_ref()), TEXT),
                });
            }
            Ok(Line { content: Content::FailedJob { job, error }, .. }) => {
                count_error(&mut self.job_errors, &job, error);
            }
            Ok(Line { classes, model, backend, content: Content::Images(images) }) => {
                let text = |text: Option<String>| cut(&text.unwrap_or_default(), TEXT);
                let key = bounded(&self.answered, (text(classes), text(model), text(backend)));
                *self.answered.entry(key).or_default() += images.len() as u64;
                images.into_iter().for_each(|image| self.image(image));
            }
        }
    }

    fn image(&mut self, Image { uri, id, verdict }: Image) {
        self.images += 1;
        let classified = match verdict {
            Verdict::Failed(error) => return count_error(&mut self.errors, &uri, error),
            Verdict::Classified(classified) => classified,
        };
        let Classified { label, score, margin, nearest, runner_up } = classified;
        let short = |text: Option<String>| text.map(|text| cut(&text, TEXT));
        let label = short(label);
        let example = Example {
            uri: cut(&uri, URI),
            id: short(id),
            nearest: short(nearest).filter(|_| label.is_none()),
            label: label.clone(),
            score,
            margin,
            runner_up: short(runner_up),
        };
        let Some(label) = label else {
            self.unknown += 1;
            self.unknown_scores.add(score);
            return self.unknown_images.push((true, score), example);
        };
        self.scores.add(score);
        if let Some(margin) = margin {
            self.margins.add(margin);
        }
        self.class(label, &example);
        self.least_certain.push((margin.is_some(), -margin.unwrap_or(score)), example);
    }

    fn class(&mut self, label: String, example: &Example) {
        let known = self.classes.len();
        let class = match self.classes.entry(label) {
            Entry::Occupied(class) => class.into_mut(),
            Entry::Vacant(_) if known >= CLASSES => {
                self.other_classes += 1;
                return;
            }
            Entry::Vacant(free) => free.insert(Counted {
                images: 0,
                scores: Values::new(Histogram::of_scores()),
                margins: Values::new(Histogram::of_margins()),
                sample: Sample::default(),
            }),
        };
        class.images += 1;
        class.scores.add(example.score);
        if let Some(margin) = example.margin {
            class.margins.add(margin);
        }
        // No more than would be shown were these all classes.
        let most = plan(known.max(1), self.per_class).1;
        class.sample.add(most, &example.uri, || example.clone());
    }

    pub(super) fn finish(self) -> Summary {
        let (shown, each) = plan(self.classes.len(), self.per_class);
        let mut counted: Vec<(String, Counted)> = self.classes.into_iter().collect();
        counted.sort_by(|(a, x), (b, y)| y.images.cmp(&x.images).then_with(|| a.cmp(b)));
        let classes = counted.into_iter().enumerate().map(|(rank, (label, class))| Class {
            label,
            images: class.images,
            scores: class.scores.finish(),
            margins: class.margins.finish(),
            sample: class.sample.finish(if rank < shown { each } else { 0 }),
        });
        let mut answered: Vec<Answered> = self
            .answered
            .into_iter()
            .map(|((classes, model, backend), images)| Answered { classes, model, backend, images })
            .collect();
        answered.sort_by_key(|answered| std::cmp::Reverse(answered.images));
        let (errors, job_errors) = (by_count(self.errors), by_count(self.job_errors));
        let total = |failures: &[Failures]| failures.iter().map(|f| f.count).sum::<u64>();
        Summary {
            lines: self.lines,
            images: self.images,
            classified: self.images - self.unknown - total(&errors),
            unknown: self.unknown,
            failed: total(&errors),
            failed_jobs: total(&job_errors),
            scores: self.scores.finish(),
            margins: self.margins.finish(),
            unknown_scores: self.unknown_scores.finish(),
            answered,
            classes: classes.collect(),
            other_classes: self.other_classes,
            errors,
            job_errors,
            least_certain: once_each(self.least_certain.finish()),
            unknown_images: once_each(self.unknown_images.finish()),
            unreadable: self.unreadable,
        }
    }
}

/// The key, or what stands for those that there is no room for.
fn bounded(
    known: &BTreeMap<(String, String, String), u64>,
    key: (String, String, String),
) -> (String, String, String) {
    match known.len() < KINDS || known.contains_key(&key) {
        true => key,
        false => (OTHER.to_owned(), String::new(), String::new()),
    }
}

fn count_error(errors: &mut BTreeMap<String, Failures>, name: &str, error: Error) {
    let mut code = cut(&error.code, TEXT);
    if errors.len() >= KINDS && !errors.contains_key(&code) {
        OTHER.clone_into(&mut code);
    }
    let failures = errors.entry(code).or_insert_with_key(|code| Failures {
        code: code.clone(),
        count: 0,
        examples: Vec::new(),
    });
    failures.count += 1;
    if failures.examples.len() < OF_ERROR {
        let message = cut(&error.message, TEXT);
        failures.examples.push(Failed { name: cut(name, URI), message });
    }
}

fn by_count(errors: BTreeMap<String, Failures>) -> Vec<Failures> {
    let mut errors: Vec<Failures> = errors.into_values().collect();
    errors.sort_by_key(|failures| std::cmp::Reverse(failures.count));
    errors
}

/// A job may have been done twice, and its images need no second look.
fn once_each(mut examples: Examples<Example>) -> Examples<Example> {
    let mut seen = HashSet::new();
    examples.first.retain(|example| seen.insert(example.uri.clone()));
    examples
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(per_class: usize, images: impl Iterator<Item = Image>) -> Collector {
        let mut collector = Collector::new(per_class);
        for (number, image) in images.enumerate() {
            let line = Line {
                classes: Some(format!("s@{}", number % 3 / 2)),
                model: Some("m".into()),
                backend: None,
                content: Content::Images(vec![image]),
            };
            collector.add(number as u64 + 1, Ok(line));
        }
        collector
    }

    fn image(number: usize, label: Option<String>, score: f32, margin: Option<f32>) -> Image {
        let (nearest, runner_up) = (Some("n".to_owned()), None);
        let verdict = Verdict::Classified(Classified { label, score, margin, nearest, runner_up });
        Image { uri: format!("{number}.jpg"), id: None, verdict }
    }

    fn failed(number: usize, code: &str) -> Image {
        let error = Error { code: code.to_owned(), message: format!("m{number}") };
        Image { uri: format!("{number}.jpg"), id: None, verdict: Verdict::Failed(error) }
    }

    #[test]
    fn every_image_is_counted_once() {
        let images = (0..100).map(|n| match n % 10 {
            0 => failed(n, "not_found"),
            1 => image(n, None, 0.1, None),
            2 => image(n, Some("b".into()), 0.5, Some(0.2)),
            _ => image(n, Some("a".into()), 0.9, Some(0.4)),
        });
        let mut collector = collect(5, images);
        collector.add(101, Err(anyhow::anyhow!("no")));
        collector.add(102, Err(anyhow::anyhow!("nor that")));
        let s = collector.finish();
        assert_eq!((s.lines, s.images, s.classified), (102, 100, 80));
        assert_eq!((s.unknown, s.failed, s.failed_jobs), (10, 10, 0));
        let classes: Vec<(&str, u64, usize)> =
            s.classes.iter().map(|c| (c.label.as_str(), c.images, c.sample.len())).collect();
        assert_eq!(classes, [("a", 70, 5), ("b", 10, 5)]);
        let spread = s.classes[0].scores.as_ref().unwrap();
        // All are the same, so the percentiles are not those of a bin.
        assert_eq!((spread.median, spread.p5, spread.p95), (0.9, 0.9, 0.9));
        assert_eq!((s.errors[0].count, s.errors[0].examples.len()), (10, OF_ERROR));
        let answered: Vec<(&str, u64)> =
            s.answered.iter().map(|a| (a.classes.as_str(), a.images)).collect();
        assert_eq!(answered, [("s@0", 67), ("s@1", 33)]);
        assert_eq!(s.unreadable.lines, 2);
        let first = s.unreadable.first.unwrap();
        assert_eq!((first.line, first.message.as_str()), (101, "no"));
    }

    #[test]
    fn the_least_certain_have_the_smallest_margins_and_then_the_lowest_scores() {
        let all = [
            image(1, Some("a".into()), 0.9, Some(0.4)),
            image(2, Some("a".into()), 0.2, None),
            image(3, Some("a".into()), 0.8, Some(0.01)),
            image(4, Some("a".into()), 0.7, None),
            image(3, Some("a".into()), 0.8, Some(0.01)), // the job was done twice
            image(5, None, 0.3, Some(0.0)),
            image(6, None, 0.1, None),
        ];
        let s = collect(1, all.into_iter()).finish();
        let uris = |e: &Examples<Example>| {
            e.first.iter().map(|e| e.uri.replace(".jpg", "")).collect::<String>()
        };
        assert_eq!(uris(&s.least_certain), "3124");
        assert_eq!(uris(&s.unknown_images), "56");
        assert_eq!((s.least_certain.total, s.unknown_images.total), (5, 2));
        assert_eq!(s.unknown_images.first[0].nearest.as_deref(), Some("n"));
    }

    #[test]
    fn what_is_held_does_not_grow_with_what_is_read() {
        let labels = 2 * CLASSES;
        let all = (0..5 * labels).map(|n| match n % 50 {
            0 => failed(n, &format!("code-{n}")),
            _ => image(n, Some(format!("class-{}", n % labels)), 0.5, Some(0.1)),
        });
        let collector = collect(240, all);
        assert_eq!(collector.classes.len(), CLASSES);
        assert_eq!(collector.errors.len(), KINDS + 1);
        let mut sizes: Vec<usize> = collector.classes.values().map(|c| c.sample.len()).collect();
        sizes.sort_unstable();
        // The first classes may hold as many as are asked for; each later one holds fewer.
        assert!(sizes.iter().sum::<usize>() < 50_000, "{:?}", sizes.last());
        let s = collector.finish();
        assert!(s.classes.iter().map(|c| c.sample.len()).sum::<usize>() <= 240);
        assert_eq!(s.classes.iter().map(|c| c.images).sum::<u64>() + s.other_classes, s.classified);
        let other = s.errors.iter().find(|e| e.code == OTHER).unwrap();
        assert_eq!(other.count + KINDS as u64, s.failed);
    }

    #[test]
    fn long_texts_are_cut() {
        let long = "ä".repeat(100_000);
        let s = collect(1, [image(1, Some(long.clone()), 0.5, None), failed(2, &long)].into_iter());
        let s = s.finish();
        assert_eq!(s.classes[0].label.chars().count(), TEXT);
        assert_eq!(s.errors[0].code.chars().count(), TEXT);
    }
}
