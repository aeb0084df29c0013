//! The report as a page. What is looked at first comes first; the pictures of all classes, of which there
//! are many, come last.

use angler_report::{
    self, Align, Card, Cell, Html, Page, Series, Tone, count, gallery, group, histogram, note,
    paragraph, percent, spreads, table,
};
use angler_vectors::statistics::Examples;

use super::Report;
use super::pictures::{LEAST_CERTAIN, Pictures, UNKNOWN};
use super::summary::{Class, Example, Failures, Spread, Summary};
use super::text::share;
use crate::commands::html::{UNKNOWN as NO_LABEL, first_rows, number, zoomed};

/// Rows of the table of classes; more of them are in the machine form.
const CLASSES: usize = 200;
/// Classes whose scores are drawn.
const SPREADS: usize = 20;

impl Report {
    /// The whole file; without pictures there are tables in their place.
    pub(super) fn page(&self, pictures: Option<&Pictures>) -> String {
        let s = &self.summary;
        let mut page = Page::new("Results", &self.subtitle());
        page.with_contents();
        page.facts(&facts(s));
        if let Some(html) = self.remarks(pictures) {
            page.section("To be noted", html);
        }
        if !s.classes.is_empty() {
            page.section("Classes", self.class_table());
        }
        if s.scores.is_some() || s.unknown_scores.is_some() {
            page.section("Scores", scores(s));
        }
        if s.least_certain.total > 0 {
            let order = "by margin, the smallest first: there the second best class came closest";
            let html = images(&s.least_certain, pictures, LEAST_CERTAIN, order);
            page.section("Least certain", html);
        }
        if s.unknown > 0 {
            let order = "by score, the highest first: these came closest to a label";
            page.section("Unknown", images(&s.unknown_images, pictures, UNKNOWN, order));
        }
        if s.failed > 0 {
            page.section("Errors", failures("image", &s.errors));
        }
        if s.failed_jobs > 0 {
            page.section("Jobs that failed", failures("job", &s.job_errors));
        }
        page.section("What answered", answered(s));
        if let Some(pictures) = pictures.filter(|_| !s.classes.is_empty()) {
            page.section("Images by class", by_class(s, pictures));
        }
        page.finish()
    }

    fn subtitle(&self) -> String {
        let mut parts = vec![self.source.clone()];
        match &self.summary.answered[..] {
            [] => {}
            [one] => parts.extend(one.names()),
            many => parts.push(format!("{} versions, models or back ends", many.len())),
        }
        parts.join(" · ")
    }

    /// What is missing on this page, or may be.
    fn remarks(&self, pictures: Option<&Pictures>) -> Option<Html> {
        let s = &self.summary;
        let unreadable = s.unreadable.first.as_ref().map(|first| {
            format!(
                "{} of {} lines could not be read and are not counted; the first is line {}: {}",
                count(s.unreadable.lines),
                count(s.lines),
                first.line,
                first.message
            )
        });
        let uncounted = (s.other_classes > 0).then(|| format!("{}.", self.uncounted()));
        let missing = pictures.and_then(Pictures::missing);
        let all: Vec<Html> = [unreadable, uncounted, missing]
            .into_iter()
            .flatten()
            .map(|text| paragraph(&text))
            .collect();
        (!all.is_empty()).then(|| all.into_iter().collect())
    }

    fn class_table(&self) -> Html {
        let s = &self.summary;
        let rows: Vec<Vec<Cell>> = s
            .classes
            .iter()
            .take(CLASSES)
            .map(|class| {
                let mut row = vec![
                    Cell::from(class.label.as_str()),
                    Cell::count(class.images),
                    Cell::share(share(class.images, s.classified).unwrap_or(f64::NAN)),
                ];
                row.extend(values(class.scores.as_ref()));
                row.push(value(class.margins.as_ref().map(|m| m.median)));
                row
            })
            .collect();
        let right = Align::Right;
        let headers =
            ["class", "images", "of the classified", "median score", "5%", "95%", "median margin"];
        let alignments = [Align::Left, right, right, right, right, right, right];
        let html = table(&headers, &rows, &alignments);
        match s.classes.len().saturating_sub(CLASSES) {
            0 => html,
            more => html.and(note(&format!("… and {} more classes", count(more as u64)))),
        }
    }
}

fn facts(s: &Summary) -> Vec<(&'static str, String, Option<String>)> {
    let of = |part: u64| {
        Some(format!("{} of all images", percent(share(part, s.images).unwrap_or(f64::NAN))))
    };
    let codes: Vec<&str> = s.errors.iter().take(3).map(|e| e.code.as_str()).collect();
    let mut facts = vec![
        ("images", count(s.images), None),
        ("classified", count(s.classified), of(s.classified)),
        ("unknown", count(s.unknown), of(s.unknown)),
        ("errors", count(s.failed), (s.failed > 0).then(|| codes.join(", "))),
    ];
    if s.failed_jobs > 0 {
        facts.push(("failed jobs", count(s.failed_jobs), Some("without any image".to_owned())));
    }
    let busiest = s.classes.first().map(|class| format!("most often {}", class.label));
    let more = if s.other_classes > 0 { "+" } else { "" };
    facts.push(("classes", format!("{}{more}", count(s.classes.len() as u64)), busiest));
    let typical = s.scores.as_ref();
    facts.push((
        "median score",
        typical.map_or_else(|| "–".to_owned(), |scores| format!("{:.2}", scores.median)),
        typical.map(|scores| format!("90% from {:.2} to {:.2}", scores.p5, scores.p95)),
    ));
    facts
}

fn value(value: Option<f32>) -> Cell {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}")).into()
}

/// Median, 5% and 95%: right to the width of a histogram's bin, so with two digits.
fn values(spread: Option<&Spread>) -> [Cell; 3] {
    [spread.map(|s| s.median), spread.map(|s| s.p5), spread.map(|s| s.p95)].map(value)
}

fn scores(s: &Summary) -> Html {
    let named = |name, spread: &'_ Option<Spread>| {
        spread.as_ref().map(|spread| (name, spread.histogram.clone()))
    };
    let all: Vec<_> = [named("classified", &s.scores), named("unknown", &s.unknown_scores)]
        .into_iter()
        .flatten()
        .collect();
    let borrowed: Vec<_> = all.iter().map(|(name, histogram)| (*name, histogram)).collect();
    let (series, range) = zoomed(&borrowed, None);
    let overall = histogram("Score of the best class", "cosine", &series, range, None);
    let classes: Vec<(&Class, &Spread)> =
        s.classes.iter().filter_map(|c| Some((c, c.scores.as_ref()?))).take(SPREADS).collect();
    if classes.len() < 2 {
        return overall;
    }
    let histograms: Vec<_> =
        classes.iter().map(|(c, s)| (c.label.as_str(), &s.histogram)).collect();
    let (series, range) = zoomed(&histograms, None);
    let rows: Vec<angler_report::Spread> = series
        .into_iter()
        .zip(&classes)
        .map(|(series, (_, spread)): (Series, _)| angler_report::Spread {
            series,
            middle: Some(spread.median),
        })
        .collect();
    let which = match s.classes.len() > classes.len() {
        true => format!("The {} classes with the most images. ", classes.len()),
        false => String::new(),
    };
    overall.and(spreads("Score by class", "cosine", &rows, range)).and(note(&format!(
        "{which}Each row has its own height and its number of images; the line is the median."
    )))
}

/// Pictures of the first of these, or a table of them.
fn images(all: &Examples<Example>, pictures: Option<&Pictures>, most: usize, order: &str) -> Html {
    let Some(pictures) = pictures else { return listed(all) };
    let cards: Vec<Card> =
        all.first.iter().take(most).map(|example| card(example, pictures, true)).collect();
    let shown = match all.total > cards.len() as u64 {
        true => format!("{} of {}, {order}.", cards.len(), count(all.total)),
        false => format!("{}{}.", order[..1].to_uppercase(), &order[1..]),
    };
    note(&shown).and(gallery(&cards))
}

fn listed(all: &Examples<Example>) -> Html {
    let known = |text: &Option<String>| Cell::from(text.as_deref().unwrap_or("–"));
    let unknown = all.first.iter().all(|e| e.label.is_none());
    let rows = all.first.iter().map(|e| {
        vec![
            Cell::from(e.uri.as_str()),
            known(if unknown { &e.nearest } else { &e.label }),
            known(&e.runner_up),
            number(Some(e.score)).into(),
            number(e.margin).into(),
        ]
    });
    let best = if unknown { "nearest class" } else { "label" };
    first_rows(&["image", best, "second", "score", "margin"], rows.collect(), all.total, 3)
}

/// `whole`: with its label and what came second, which a heading does not say.
fn card(example: &Example, pictures: &Pictures, whole: bool) -> Card {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
    let score = number(Some(example.score));
    if whole {
        let best = match (&example.label, &example.nearest) {
            (Some(label), _) => ("label", label.as_str()),
            (None, Some(nearest)) => ("nearest", nearest.as_str()),
            (None, None) => ("label", NO_LABEL),
        };
        line(best.0, format!("{} {score}", best.1));
        if let Some(second) = second(example) {
            line("second", second);
        }
        if let Some(margin) = example.margin {
            line("margin", number(Some(margin)));
        }
    } else {
        line("score", score);
    }
    if let Some(id) = &example.id {
        line("id", id.clone());
    }
    let thumbnail = pictures.of(&example.uri);
    Card { thumbnail, uri: example.uri.clone(), lines, tone: Tone::Neutral }
}

/// The class that came second and its score, as far as they are known.
fn second(example: &Example) -> Option<String> {
    let score = example.margin.map(|margin| number(Some(example.score - margin)));
    match (example.runner_up.as_deref(), score) {
        (Some(label), Some(score)) => Some(format!("{label} {score}")),
        (label, score) => label.map(str::to_owned).or(score),
    }
}

fn failures(what: &str, failures: &[Failures]) -> Html {
    let total: u64 = failures.iter().map(|f| f.count).sum();
    let counts: Vec<Vec<Cell>> = failures
        .iter()
        .map(|f| {
            let share = share(f.count, total).unwrap_or(f64::NAN);
            vec![f.code.as_str().into(), Cell::count(f.count), Cell::share(share)]
        })
        .collect();
    let plural = format!("{what}s");
    let right = Align::Right;
    let html = table(&["error", &plural, "of all errors"], &counts, &[Align::Left, right, right]);
    let examples: Vec<Vec<Cell>> = failures
        .iter()
        .flat_map(|f| {
            f.examples.iter().map(|e| {
                vec![e.name.as_str().into(), f.code.as_str().into(), e.message.as_str().into()]
            })
        })
        .collect();
    let shown = examples.len() as u64;
    html.and(table(&[what, "error", "what was wrong"], &examples, &[])).and(match total > shown {
        true => note("The first of each."),
        false => Html::default(),
    })
}

fn answered(s: &Summary) -> Html {
    let rows: Vec<Vec<Cell>> = s
        .answered
        .iter()
        .map(|a| a.names().into_iter().map(Cell::from).chain([Cell::count(a.images)]).collect())
        .collect();
    let left = Align::Left;
    let headers = ["class vectors", "model", "back end", "images"];
    table(&headers, &rows, &[left, left, left, Align::Right])
}

fn by_class(s: &Summary, pictures: &Pictures) -> Html {
    let shown: Vec<&Class> = s.classes.iter().filter(|c| !c.sample.is_empty()).collect();
    let groups: Html = shown
        .iter()
        .map(|class| {
            let cards: Vec<Card> =
                class.sample.iter().map(|example| card(example, pictures, false)).collect();
            let typical = class.scores.as_ref().map(|s| format!(", median score {:.2}", s.median));
            let images = if class.images == 1 { "image" } else { "images" };
            let aside = format!("{} {images}{}", count(class.images), typical.unwrap_or_default());
            group(&class.label, &aside, gallery(&cards))
        })
        .collect();
    let some = shown.iter().any(|class| class.images > class.sample.len() as u64);
    let mut text = String::from(match some {
        true => "Of each class a few images, drawn by lot, the highest score first.",
        false => "All images, the highest score first.",
    });
    if shown.len() < s.classes.len() {
        text += &format!(
            " The {} classes with the most images of {}.",
            shown.len(),
            count(s.classes.len() as u64)
        );
    }
    note(&text).and(groups)
}
