//! The comparison as a page.

use angler_report::{
    Align, Card, Cell, Html, Page, Tone, count, gallery, histogram, note, paragraph, table,
};
use angler_vectors::compare::{Comparison, Effect, Flip, Verdict};

use super::Report;
use crate::app::App;
use crate::commands::html::{
    ROWS, UNKNOWN, fact, failures, first_rows, number, share, shown, with_pictures, zoomed,
};
use crate::commands::thumbnails::IMAGES;

impl Report<'_> {
    pub(super) async fn page(&self, app: &App) -> String {
        let c = &self.comparison;
        let subtitle = format!(
            "A {} → B {} · model {} · images of {}",
            self.a, self.b, self.model, self.source
        );
        let mut page = Page::new("Comparison", &subtitle);
        facts(&mut page, c);
        for (heading, labels) in
            [("Labels only in A", &c.only_in_a), ("Labels only in B", &c.only_in_b)]
        {
            if !labels.is_empty() {
                page.section(heading, names(labels));
            }
        }
        if c.flips.total > 0 {
            page.section("Labels that change", transitions(c));
            page.section("Images whose label changes", flips(app, c).await);
        } else {
            page.section("Images whose label changes", paragraph("There are none."));
        }
        page.section("Margins", margins(c));
        if c.errors.total > 0 {
            page.section("Images that could not be read", failures(&c.errors));
        }
        page.finish()
    }
}

fn facts(page: &mut Page, c: &Comparison) {
    let errors = c.errors.total;
    let unread = (errors > 0).then(|| format!("{} could not be read", count(errors)));
    let shift = match &c.margin_shift {
        Some(s) => (
            format!("{:+.3}", s.mean),
            Some(format!("median {:+.3}; 90% from {:+.3} to {:+.3}", s.median, s.p5, s.p95)),
        ),
        None => ("–".to_owned(), Some("a version of one class has no margins".to_owned())),
    };
    let mut facts = vec![
        ("images", count(c.images), unread),
        fact("same label", &c.agreement),
        ("another label", count(c.flips.total), Some("images that flip from A to B".to_owned())),
    ];
    let known = c.truth.right_a.of;
    if known > 0 {
        let of = || Some(format!("of {} whose class is known", count(known)));
        facts.push(("fixed by B", count(c.truth.fixed), of()));
        facts.push(("broken by B", count(c.truth.broken), of()));
        facts.push(fact("right by A", &c.truth.right_a));
        facts.push(fact("right by B", &c.truth.right_b));
    }
    let unknown = format!("{} by A", share(&c.unknown_a));
    facts.push(("unknown by B", share(&c.unknown_b), Some(unknown)));
    facts.push(("mean margin shift", shift.0, shift.1));
    page.facts(&facts);
}

/// Labels in one paragraph: there may be thousands.
fn names(labels: &[String]) -> Html {
    let most = 10 * ROWS;
    let first: Vec<&str> = labels.iter().take(most).map(String::as_str).collect();
    let text = paragraph(&first.join(", "));
    match labels.len().saturating_sub(most) {
        0 => text,
        more => text.and(note(&format!("… and {} more", count(more as u64)))),
    }
}

fn transitions(c: &Comparison) -> Html {
    let name = |label: &Option<String>| Cell::from(label.as_deref().unwrap_or(UNKNOWN));
    let rows = c.transitions.first.iter().map(|t| {
        let share = t.count as f64 / c.flips.total as f64;
        vec![name(&t.from), name(&t.to), Cell::count(t.count), Cell::share(share)]
    });
    let headers = ["from A's", "to B's", "images", "of all changes"];
    first_rows(&headers, rows.collect(), c.transitions.total, 2)
}

fn margins(c: &Comparison) -> Html {
    let (series, range) = zoomed(&[("A", &c.margins_a), ("B", &c.margins_b)], None);
    let html = histogram("Margins by A and by B", "margin", &series, range, None).and(note(
        "The best score less the runner-up's: how sure a version is of its nearest class.",
    ));
    let shifts: Vec<Vec<Cell>> = [("best score", &c.score_shift), ("margin", &c.margin_shift)]
        .into_iter()
        .filter_map(|(name, shift)| Some((name, shift.as_ref()?)))
        .map(|(name, s)| {
            let values = [s.mean, s.median.into(), s.p5.into(), s.p95.into()];
            let cells = values.iter().map(|v: &f64| Cell::from(format!("{v:+.3}")));
            std::iter::once(name.into()).chain(cells).collect()
        })
        .collect();
    let right = Align::Right;
    let headers = ["from A to B", "mean", "median", "5%", "95%"];
    html.and(table(&headers, &shifts, &[Align::Left, right, right, right, right]))
}

async fn flips(app: &App, c: &Comparison) -> Html {
    let cards: Vec<Card> = c.flips.first.iter().take(IMAGES).map(card).collect();
    let order = match c.truth.broken > 0 {
        true => "what B breaks first, then by the margin of the version that is less sure",
        false => "by the margin of the version that is less sure, the largest first",
    };
    let note = shown(cards.len(), c.flips.total, order);
    gallery(&with_pictures(app, cards).await).and(note)
}

fn card(flip: &Flip) -> Card {
    let line = |name: &str, value: String| (name.to_owned(), value);
    let label = |v: &Verdict| match &v.label {
        Some(label) => label.clone(),
        None => format!("{UNKNOWN}, nearest {}", v.nearest),
    };
    let both = |a: Option<f32>, b: Option<f32>| format!("{} → {}", number(a), number(b));
    let mut lines = Vec::new();
    if let (Some(truth), Some(effect)) = (&flip.truth, flip.effect) {
        lines.push(line("true class", truth.clone()));
        lines.push(line("B's effect", effect.to_string()));
    }
    lines.push(line("A", label(&flip.a)));
    lines.push(line("B", label(&flip.b)));
    lines.push(line("score", both(Some(flip.a.score), Some(flip.b.score))));
    lines.push(line("margin", both(flip.a.margin, flip.b.margin)));
    let tone = match flip.effect {
        Some(Effect::Fixed) => Tone::Good,
        Some(Effect::Broken) => Tone::Bad,
        Some(Effect::Neutral) | None => Tone::Neutral,
    };
    Card { thumbnail: Err(String::new()), uri: flip.uri.clone(), lines, tone }
}
