//! How the values of many kinds are spread: a small histogram each, one below the other, over one axis.
//!
//! Each has its own height, since what is compared is where they lie. As in a large histogram, places are
//! percentages of the width: on a phone the plots get narrower and letters keep their size.

use std::fmt::Write;

use angler_wire::text::cut;
use maud::{Markup, html};

use super::histogram::{Axis, BOTTOM, bars, number, ticks};
use super::svg::{no_values, plot, wide};
use super::{Html, Series, count, note};

/// Pixels of a row's name, of its plot and of what is between rows.
const NAME: u32 = 18;
const PLOT: u32 = 30;
const GAP: u32 = 12;
/// Characters of a row's name that a phone has room for, beside its count.
const NAME_CHARS: usize = 32;
/// The most rows; the rest is left out, and the chart says so.
const ROWS: usize = 40;

/// A row: its values, counted, and the one in their middle, which gets a mark.
#[derive(Debug, Clone)]
pub struct Spread {
    /// Its name and bins.
    pub series: Series,
    /// The median; none if there are no values.
    pub middle: Option<f32>,
}

/// A row for each of `rows`, all over the axis from the low end of the first bin to the high end of the last.
pub fn spreads(title: &str, axis_label: &str, rows: &[Spread], range: (f32, f32)) -> Html {
    let axis = Axis { low: range.0.into(), span: f64::from(range.1) - f64::from(range.0) };
    let shown = &rows[..rows.len().min(ROWS)];
    let is_empty = shown.is_empty() || !axis.span.is_finite() || axis.span <= 0.0;
    let html = Html(html! {
        figure.histogram {
            figcaption { (title) }
            @if is_empty {
                (no_values())
            } @else {
                (chart(&describe(title, axis_label, shown), axis_label, shown, &axis))
            }
        }
    });
    match rows.len() - shown.len() {
        more if more > 0 && !is_empty => {
            html.and(note(&format!("… and {} more", count(more as u64))))
        }
        _ => html,
    }
}

fn chart(label: &str, axis_label: &str, rows: &[Spread], axis: &Axis) -> Markup {
    let step = NAME + PLOT + GAP;
    let floor = step * rows.len() as u32 - GAP;
    let parts = html! {
        @for (row, top) in rows.iter().zip((0..).map(|number| step * number)) {
            (one(row, axis, top))
        }
        (ticks(axis_label, axis, floor))
    };
    plot(label, floor + BOTTOM, &parts)
}

fn one(row: &Spread, axis: &Axis, top: u32) -> Markup {
    let (upper, floor) = (top + NAME, top + NAME + PLOT);
    let highest = row.series.peak().1.max(f64::MIN_POSITIVE);
    let middle = row.middle.filter(|middle| middle.is_finite());
    html! {
        text.label y=(upper - 5) { (cut(&row.series.name, NAME_CHARS)) }
        text x="100%" y=(upper - 5) text-anchor="end" { (count(row.series.total())) }
        line.grid x2="100%" y1=(floor) y2=(floor) {}
        (bars(&row.series, "first", highest, (upper, PLOT)))
        @if let Some(middle) = middle {
            @let x = wide(axis.x(middle.into()));
            line.middle x1=(x) x2=(x) y1=(upper - 2) y2=(floor + 3) {}
        }
        rect.tip y=(top) width="100%" height=(NAME + PLOT) { title { (words(row)) } }
    }
}

/// `cola: 1,200, half of them below 0.83`.
fn words(row: &Spread) -> String {
    let text = format!("{}: {}", row.series.name, count(row.series.total()));
    match row.middle {
        Some(middle) => format!("{text}, half of them below {}", number(middle.into(), 0.01)),
        None => text,
    }
}

/// The picture in words, for who cannot see it.
fn describe(title: &str, axis_label: &str, rows: &[Spread]) -> String {
    let mut text = format!("{title}. Small histograms of {axis_label}.");
    for row in rows {
        let _ = write!(text, " {}.", words(row));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, bins: &[u64], middle: Option<f32>) -> Spread {
        Spread { series: Series { name: name.into(), bins: bins.to_vec() }, middle }
    }

    #[test]
    fn each_row_has_its_own_height_and_a_mark_in_its_middle() {
        let rows = [row("a", &[0, 1, 4, 0], Some(0.625)), row("b", &[9_000, 0, 0, 0], None)];
        let html = spreads("T", "cosine", &rows, (0.0, 1.0)).to_string();
        // The fullest bin of each reaches the top.
        assert_eq!(html.matches("V0.0H").count(), 2, "{html}");
        assert_eq!(html.matches("<line class=\"middle\"").count(), 1);
        assert!(html.contains("x1=\"62.50%\""), "{html}");
        let words = "T. Small histograms of cosine. a: 5, half of them below 0.62. b: 9,000.";
        assert!(html.contains(words) || html.contains(&words.replace("0.62", "0.63")), "{html}");
    }

    #[test]
    fn nothing_to_show_is_said_and_much_is_cut() {
        let none = spreads("T", "x", &[], (0.0, 1.0)).to_string();
        assert!(none.contains("no values") && !none.contains("<svg"));
        let rows = vec![row(&"n".repeat(60), &[1], None); ROWS + 1_002];
        let html = spreads("T", "x", &rows, (0.0, 1.0)).to_string();
        assert!(html.contains("… and 1,002 more"));
        assert!(html.contains(&format!(">{}…<", "n".repeat(NAME_CHARS))));
        assert!(spreads("T", "x", &rows, (1.0, 1.0)).to_string().contains("no values"));
    }
}
