//! The report on a terminal of 80 columns.

use angler_report::count;

use super::Report;
use super::summary::{Answered, Class, Example, Failures, Spread};
use crate::commands::tables::{
    address, label, narrow_address, narrow_given, number, one_line, percent, table,
};

/// Images of a list: those that are most worth a look. A page shows more.
const IMAGES: u64 = 10;

impl Report {
    pub(super) fn text(&self) -> String {
        let s = &self.summary;
        let mut text = format!(
            "{}: {} image{}\n",
            one_line(&self.source),
            count(s.images),
            if s.images == 1 { "" } else { "s" }
        );
        text += &self.counts();
        let rows = s.answered.iter().map(|a| {
            let mut row = a.names().to_vec();
            row.push(count(a.images));
            row
        });
        let headers = ["answered by", "model", "back end", "images"];
        text += &table("", &headers, 3, rows, s.answered.len() as u64);
        text += &self.classes();
        text += &examples("least certain", &s.least_certain.first, s.least_certain.total);
        text +=
            &examples("unknown, the nearest to a label first", &s.unknown_images.first, s.unknown);
        text += &failures("images that could not be classified", "image", &s.errors);
        text += &failures("jobs that failed", "job", &s.job_errors);
        text
    }

    fn counts(&self) -> String {
        let s = &self.summary;
        let row = |name: &str, count_of: u64, scores: &Option<Spread>| {
            let mut row =
                vec![name.to_owned(), count(count_of), percent(share(count_of, s.images))];
            row.extend(spread(scores.as_ref()));
            row
        };
        let mut rows = vec![row("classified", s.classified, &s.scores)];
        rows.push(row("unknown", s.unknown, &s.unknown_scores));
        rows.push(row("errors", s.failed, &None));
        table("", &["", "images", "share", "median score", "5%", "95%"], 1, rows, 0)
    }

    fn classes(&self) -> String {
        let s = &self.summary;
        let row = |class: &Class| {
            let mut row = vec![
                label(&one_line(&class.label)),
                count(class.images),
                percent(share(class.images, s.classified)),
            ];
            row.extend(spread(class.scores.as_ref()));
            row.push(number(class.margins.as_ref().map(|m| m.median)));
            row
        };
        let headers = ["class", "images", "share", "median score", "5%", "95%", "margin"];
        let mut text = table("", &headers, 1, s.classes.iter().map(row), s.classes.len() as u64);
        if s.other_classes > 0 {
            text += &format!(" {}\n", self.uncounted());
        }
        text
    }

    /// What is said when there are more classes than are counted.
    pub(super) fn uncounted(&self) -> String {
        format!(
            "{} images have a class beyond the first {} that were met, which alone are counted by name",
            count(self.summary.other_classes),
            count(self.summary.classes.len() as u64)
        )
    }
}

/// Of images, with a digit less than in a list of them: these are right to the width of a bin.
fn spread(spread: Option<&Spread>) -> [String; 3] {
    let value = |value: Option<f32>| value.map(|value| format!("{value:.2}")).unwrap_or_default();
    [spread.map(|s| s.median), spread.map(|s| s.p5), spread.map(|s| s.p95)].map(value)
}

/// The share of a count; none of nothing.
pub(super) fn share(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

/// What answered; a line may not say it.
fn name(name: &str) -> String {
    if name.is_empty() { "(not said)".to_owned() } else { one_line(name) }
}

impl Answered {
    /// Its parts, as far as they are known.
    pub(super) fn names(&self) -> [String; 3] {
        [&self.classes, &self.model, &self.backend].map(|text| name(text))
    }
}

fn examples(title: &str, examples: &[Example], total: u64) -> String {
    let rows = examples.iter().take(IMAGES as usize).map(|e| {
        let given = e.label.as_deref().or(e.nearest.as_deref()).map(one_line);
        let second = e.runner_up.as_deref().map(one_line);
        vec![
            narrow_address(&one_line(&e.uri)),
            given.map(|given| narrow_given(Some(&given))).unwrap_or_default(),
            second.map(|second| narrow_given(Some(&second))).unwrap_or_default(),
            number(Some(e.score)),
            number(e.margin),
        ]
    });
    let best = if examples.iter().any(|e| e.label.is_some()) { "label" } else { "nearest" };
    table(title, &["image", best, "second", "score", "margin"], 3, rows, total)
}

fn failures(title: &str, what: &str, failures: &[Failures]) -> String {
    let rows = failures.iter().map(|f| {
        let first = f.examples.first().map(|e| address(&one_line(&e.name)));
        vec![one_line(&f.code), first.unwrap_or_default(), count(f.count)]
    });
    let plural = format!("{what}s");
    table(title, &["error", "for example", &plural], 2, rows, failures.len() as u64)
}

/// The start of a text, cut to so many characters.
pub(super) fn cut(text: &str, most: usize) -> String {
    // A character has at least a byte: most texts need no count.
    if text.len() <= most { text.to_owned() } else { crate::commands::tables::start(text, most) }
}
