//! How the values of many kinds are spread: a small histogram each, one below the other, over one axis.
//!
//! Each has its own height, since what is compared is where they lie. As in a large histogram, places are
//! percentages of the width: on a phone the plots get narrower and letters keep their size.

use std::fmt::Write;

use angler_wire::text::cut;

use super::histogram::{Axis, BOTTOM, bars, number, ticks};
use super::{Html, Series, count, escape, note};

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
    let mut html = format!("<figure class=\"histogram\">\n<figcaption>{}", escape(title));
    html.push_str("</figcaption>\n");
    let shown = &rows[..rows.len().min(ROWS)];
    if shown.is_empty() || !axis.span.is_finite() || axis.span <= 0.0 {
        html.push_str("<p class=\"note\">There are no values to show.</p>\n</figure>\n");
        return Html(html);
    }
    let floor = (NAME + PLOT + GAP) * shown.len() as u32 - GAP;
    let label = escape(&describe(title, axis_label, shown));
    let _ = writeln!(
        html,
        "<svg class=\"plot\" role=\"img\" aria-label=\"{label}\" width=\"100%\" height=\"{}\">",
        floor + BOTTOM
    );
    for (i, row) in shown.iter().enumerate() {
        one(&mut html, row, &axis, (NAME + PLOT + GAP) * i as u32);
    }
    ticks(&mut html, axis_label, &axis, floor);
    html.push_str("</svg>\n</figure>\n");
    let html = Html(html);
    match rows.len() - shown.len() {
        0 => html,
        more => html.and(note(&format!("… and {} more", count(more as u64)))),
    }
}

fn one(html: &mut String, row: &Spread, axis: &Axis, top: u32) {
    let (plot, floor) = (top + NAME, top + NAME + PLOT);
    let _ = writeln!(
        html,
        "<text class=\"label\" y=\"{}\">{}</text>\
         <text x=\"100%\" y=\"{0}\" text-anchor=\"end\">{}</text>",
        plot - 5,
        escape(&cut(&row.series.name, NAME_CHARS)),
        count(row.series.total())
    );
    let _ = writeln!(html, "<line class=\"grid\" x2=\"100%\" y1=\"{floor}\" y2=\"{floor}\"/>");
    bars(html, &row.series, "first", row.series.peak().1.max(f64::MIN_POSITIVE), (plot, PLOT));
    if let Some(middle) = row.middle.filter(|middle| middle.is_finite()) {
        let x = axis.x(middle.into());
        let _ = writeln!(
            html,
            "<line class=\"middle\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{}\" y2=\"{}\"/>",
            plot - 2,
            floor + 3
        );
    }
    let _ = writeln!(
        html,
        "<rect class=\"tip\" y=\"{top}\" width=\"100%\" height=\"{}\"><title>{}</title></rect>",
        NAME + PLOT,
        escape(&words(row))
    );
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
