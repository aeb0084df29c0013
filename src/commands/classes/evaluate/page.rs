//! The evaluation as a page.

use angler_report::{
    Align, Card, Cell, Html, Page, Tone, confusion, count, gallery, histogram, note, table,
};
use angler_vectors::evaluate::{Evaluation, Mistake};
use angler_vectors::statistics::Rate;

use super::{Report, seen};
use crate::app::App;
use crate::commands::html::{
    UNKNOWN, fact, failures, first_rows, number, share, shown, spelled, with_pictures, zoomed,
};
use crate::commands::thumbnails::IMAGES;

impl Report<'_> {
    /// `own_thresholds`: how many classes have one of their own. `why_not`: why there is no
    /// calibration although it was asked for.
    pub(super) async fn page(
        &self,
        app: &App,
        own_thresholds: usize,
        why_not: Option<String>,
    ) -> String {
        let e = self.evaluation;
        let subtitle = format!(
            "{} on {} · model {} · back end {}",
            self.classes, self.source, self.model, self.backend
        );
        let mut page = Page::new("Evaluation", &subtitle);
        self.facts(&mut page, own_thresholds);
        if self.calibration.is_some() || why_not.is_some() {
            page.section("Calibration", self.calibrated(why_not));
        }
        if e.known > 0 {
            page.section("What was taken for what", matrix(e));
        }
        if e.strangers > 0 {
            page.section("Strangers", strangers(e));
        }
        page.section("Scores", self.scores());
        if e.mistakes.total > 0 {
            page.section("Mistakes", mistakes(app, e).await);
        }
        if e.confused.total > 0 {
            page.section("Most confused", confused(e));
        }
        page.section("Classes", classes(e));
        if e.errors.total > 0 {
            page.section("Images that could not be read", failures(&e.errors));
        }
        page.finish()
    }

    fn facts(&self, page: &mut Page, own_thresholds: usize) {
        let e = self.evaluation;
        let unread = match e.errors.total {
            0 => String::new(),
            errors => format!("; {} could not be read", count(errors)),
        };
        let of = format!("{} known, {} strangers{unread}", count(e.known), count(e.strangers));
        let among = format!("among the {} nearest", e.k);
        let mut facts = vec![
            ("images", count(e.images), Some(of)),
            fact("nearest class is right", &e.top_1),
            fact(&among, &e.top_k),
            fact("unknown", &e.unknown),
        ];
        if self.min_score.is_some() || own_thresholds > 0 {
            facts.push(fact("right and accepted", &e.right));
            facts.push(fact("wrong and accepted", &e.wrong));
        }
        if e.strangers > 0 {
            facts.push(fact("strangers accepted", &e.strangers_accepted));
        }
        let own = (own_thresholds > 0)
            .then(|| format!("{} classes have their own", count(own_thresholds as u64)));
        let threshold = self.min_score.map_or_else(|| "none".to_owned(), |t| number(Some(t)));
        facts.push(("threshold", threshold, own));
        if let Some(c) = &self.calibration {
            let accepts = format!("accepts of wrong matches {}", spelled(&c.false_positives));
            facts.push(("calibrated threshold", number(Some(c.threshold)), Some(accepts)));
        }
        page.facts(&facts);
    }

    fn calibrated(&self, why_not: Option<String>) -> Html {
        let Some(c) = &self.calibration else {
            return angler_report::paragraph(&format!(
                "No threshold was found: {}.",
                why_not.unwrap_or_default()
            ));
        };
        let mut rows = vec![("wrong matches accepted", &c.false_positives)];
        if c.false_positives_strangers.of > 0 {
            rows.push(("strangers alone", &c.false_positives_strangers));
        }
        rows.push(("right and accepted", &c.right_and_accepted));
        let saved = match &self.saved {
            Some(saved) => format!(" It is that of {}.", saved.classes),
            None => String::new(),
        };
        let found = format!(
            "With a threshold of {}, at most {} of wrong matches are accepted.{saved}",
            c.threshold,
            angler_report::percent(c.rate),
        );
        angler_report::paragraph(&found).and(rates(&rows))
    }

    fn scores(&self) -> Html {
        let e = self.evaluation;
        let marker = match (&self.calibration, self.min_score) {
            (Some(c), _) => Some((c.threshold, "calibrated")),
            (None, Some(t)) => Some((t, "threshold")),
            (None, None) => None,
        };
        let (series, range) = zoomed(
            &[("right class", &e.genuine), ("best wrong class", &e.impostor)],
            marker.map(|(value, _)| value),
        );
        histogram("Right and wrong matches", "cosine", &series, range, marker).and(note(
            "Right class: images whose nearest class is theirs, by its score. Best wrong class: every \
             image, by its score with the nearest class that is not its own. A threshold parts the two \
             as far as they do not overlap.",
        ))
    }
}

fn rates(rows: &[(&str, &Rate)]) -> Html {
    let rows: Vec<Vec<Cell>> = rows
        .iter()
        .map(|(name, rate)| vec![(*name).into(), share(rate).into(), spelled(rate).into()])
        .collect();
    table(&["", "share", "images"], &rows, &[Align::Left, Align::Right, Align::Left])
}

/// Known classes only: for a stranger *unknown* is right, which no diagonal shows.
fn matrix(e: &Evaluation) -> Html {
    let c = &e.confusion;
    let name = |label: &Option<String>| label.clone().unwrap_or_else(|| UNKNOWN.to_owned());
    let columns: Vec<String> = c.columns.iter().map(name).collect();
    let known = c.cells.iter().filter(|cell| cell.row < c.known_rows);
    let counts: Vec<_> = known.map(|cell| (cell.row, cell.column, cell.count)).collect();
    confusion(&c.rows[..c.known_rows], &columns, &counts)
}

/// Classes that the set does not have, those with the most labels given first.
fn strangers(e: &Evaluation) -> Html {
    let c = &e.confusion;
    let mut rows: Vec<(&str, Rate, Option<&str>)> = c.rows[c.known_rows..]
        .iter()
        .enumerate()
        .map(|(place, name)| {
            let cells = || c.cells.iter().filter(move |cell| cell.row == c.known_rows + place);
            let labelled = || {
                cells().filter_map(|cell| Some((c.columns[cell.column].as_deref()?, cell.count)))
            };
            let rate =
                Rate::new(labelled().map(|(_, n)| n).sum(), cells().map(|cell| cell.count).sum());
            // Of equals the first, in the set's order.
            let most = labelled().reduce(|best, next| if next.1 > best.1 { next } else { best });
            (name.as_str(), rate, most.map(|(label, _)| label))
        })
        .collect();
    let total = rows.len() as u64;
    rows.sort_by_key(|(_, rate, _)| std::cmp::Reverse(rate.count));
    let rows = rows.into_iter().map(|(name, rate, most)| {
        vec![
            name.into(),
            most.unwrap_or("–").into(),
            Cell::count(rate.of),
            Cell::count(rate.count),
            Cell::share(rate.share().unwrap_or(f64::NAN)),
        ]
    });
    let headers = ["folder", "mostly taken for", "images", "accepted", "share"];
    first_rows(&headers, rows.collect(), total, 2)
        .and(note("Images of classes that the set does not have. Right is to call them unknown."))
}

fn classes(e: &Evaluation) -> Html {
    let mean = |value: Option<f64>| number(value.map(|value| value as f32)).into();
    let rows: Vec<Vec<Cell>> = seen(e)
        .iter()
        .map(|c| {
            vec![
                c.label.as_str().into(),
                Cell::count(c.images),
                Cell::share(c.recall.share().unwrap_or(f64::NAN)),
                Cell::share(c.precision.share().unwrap_or(f64::NAN)),
                Cell::count(c.unknown),
                mean(c.mean_score),
                mean(c.mean_margin),
            ]
        })
        .collect();
    let headers =
        ["class", "images", "recall", "precision", "unknown", "mean score", "mean margin"];
    let right = Align::Right;
    let alignments = [Align::Left, right, right, right, right, right, right];
    table(&headers, &rows, &alignments).and(note(
        "The lowest recall first. Recall: its images that get its label. Precision: of the images that \
         get its label, those that are its own. Margin: the best score less the runner-up's.",
    ))
}

fn confused(e: &Evaluation) -> Html {
    let rows = e.confused.first.iter().map(|pair| {
        vec![pair.truth.as_str().into(), pair.label.as_str().into(), Cell::count(pair.count)]
    });
    first_rows(&["class", "gets the label", "images"], rows.collect(), e.confused.total, 2)
}

async fn mistakes(app: &App, e: &Evaluation) -> Html {
    let cards: Vec<Card> = e.mistakes.first.iter().take(IMAGES).map(card).collect();
    let order = match e.mistakes.first.iter().any(|m| !m.accepted) {
        true => "those that get a wrong label first, then by score",
        false => "the highest score first",
    };
    let note = shown(cards.len(), e.mistakes.total, order);
    gallery(&with_pictures(app, cards).await).and(note)
}

fn card(m: &Mistake) -> Card {
    let line = |name: &str, value: String| (name.to_owned(), value);
    let mut lines = vec![line("true class", m.truth.clone())];
    if m.accepted {
        lines.push(line("label", m.label.clone()));
    } else {
        lines.push(line("label", UNKNOWN.to_owned()));
        lines.push(line("nearest", m.label.clone()));
    }
    lines.push(line("score", number(Some(m.score))));
    lines.push(line("margin", number(m.margin)));
    Card {
        thumbnail: Err(String::new()),
        uri: m.uri.clone(),
        lines,
        tone: if m.accepted { Tone::Bad } else { Tone::Neutral },
    }
}
