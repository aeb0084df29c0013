//! Quantities beside each other: bars from the left, with their numbers behind them.
//!
//! Places are percentages of the width and the SVG has no `viewBox`, so that on a phone bars get shorter
//! and letters keep their size.

use std::fmt::Write;

use angler_wire::text::cut;

use super::{Html, count, escape};

/// Pixels of a row's name, of a bar and of what is between rows.
const NAME: u32 = 20;
const BAR: u32 = 16;
const GAP: u32 = 14;
/// Percent of the width that the longest bar takes; its number stands behind it.
const LONGEST: f64 = 76.0;
/// Characters of a row's name that a phone has room for.
const NAME_CHARS: usize = 40;
/// The most rows; the rest is left out, and the chart says so.
const ROWS: usize = 40;

/// How a row's values are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A bar each, one below the other.
    Beside,
    /// Parts of one bar.
    Stacked,
}

/// A row: its name and a value of each series. What is no number has no bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What it is about.
    pub name: String,
    /// In the order of the series.
    pub values: Vec<f64>,
}

/// Values of several series, not below zero, by rows. `unit` is what they are measured in.
pub fn bars(title: &str, unit: &str, series: &[&str], rows: &[Bar], shape: Shape) -> Html {
    let mut html = format!("<figure class=\"bars\">\n<figcaption>{}", escape(title));
    let _ = write!(html, " <small>{}</small><ul class=\"legend\">", escape(unit));
    for (i, name) in series.iter().enumerate() {
        let _ = write!(
            html,
            "<li><svg class=\"swatch\" aria-hidden=\"true\"><rect class=\"{}\" width=\"100%\" \
             height=\"100%\"/></svg>{}</li>",
            class(i, shape),
            escape(name)
        );
    }
    html.push_str("</ul></figcaption>\n");
    let shown = &rows[..rows.len().min(ROWS)];
    let longest = shown.iter().map(|row| length(row, shape)).fold(0.0, f64::max);
    if longest <= 0.0 {
        html.push_str("<p class=\"note\">There are no values to show.</p>\n</figure>\n");
        return Html(html);
    }
    let tall = match shape {
        Shape::Beside => BAR * series.len().max(1) as u32,
        Shape::Stacked => BAR,
    };
    let height = (NAME + tall + GAP) * shown.len() as u32;
    let label = escape(&describe(title, unit, series, shown));
    let _ = writeln!(
        html,
        "<svg class=\"plot\" role=\"img\" aria-label=\"{label}\" width=\"100%\" height=\"{height}\">"
    );
    for (number, row) in shown.iter().enumerate() {
        let top = (NAME + tall + GAP) * number as u32;
        let _ = writeln!(
            html,
            "<text class=\"label\" y=\"{}\">{}</text>",
            top + NAME - 6,
            escape(&cut(&row.name, NAME_CHARS))
        );
        match shape {
            Shape::Beside => beside(&mut html, series, row, top + NAME, longest),
            Shape::Stacked => stacked(&mut html, series, row, top + NAME, longest),
        }
    }
    html.push_str("</svg>\n");
    if rows.len() > ROWS {
        let _ = writeln!(html, "<p class=\"note\">… and {} more</p>", rows.len() - ROWS);
    }
    html.push_str("</figure>\n");
    Html(html)
}

/// The first two of bars beside each other differ as elsewhere; the parts of one bar are told apart by
/// shades, each beside one that is far from it.
fn class(series: usize, shape: Shape) -> String {
    match shape {
        Shape::Beside => format!("bar-{}", series.min(3)),
        Shape::Stacked => format!("part-{}", series % 5),
    }
}

fn known(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then_some(value)
}

/// The longest bar of a row.
fn length(row: &Bar, shape: Shape) -> f64 {
    let values = row.values.iter().copied().filter_map(known);
    match shape {
        Shape::Beside => values.fold(0.0, f64::max),
        Shape::Stacked => values.sum(),
    }
}

fn beside(html: &mut String, series: &[&str], row: &Bar, top: u32, longest: f64) {
    for (i, value) in row.values.iter().enumerate() {
        let Some(value) = known(*value) else { continue };
        let y = top + BAR * i as u32;
        let width = value / longest * LONGEST;
        let name = escape(series.get(i).copied().unwrap_or_default());
        let _ = writeln!(
            html,
            "<rect class=\"{}\" y=\"{y}\" width=\"{width:.2}%\" height=\"{}\"><title>{name}: {}</title></rect>\
             <text x=\"{width:.2}%\" dx=\"6\" y=\"{}\">{}</text>",
            class(i, Shape::Beside),
            BAR - 3,
            escape(&number(value)),
            y + 11,
            escape(&number(value))
        );
    }
}

fn stacked(html: &mut String, series: &[&str], row: &Bar, top: u32, longest: f64) {
    let mut x = 0.0;
    for (i, value) in row.values.iter().enumerate() {
        let Some(value) = known(*value) else { continue };
        let width = value / longest * LONGEST;
        let name = escape(series.get(i).copied().unwrap_or_default());
        let _ = writeln!(
            html,
            "<rect class=\"{}\" x=\"{x:.2}%\" y=\"{top}\" width=\"{width:.2}%\" height=\"{}\">\
             <title>{name}: {}</title></rect>",
            class(i, Shape::Stacked),
            BAR - 3,
            escape(&number(value))
        );
        x += width;
    }
    let sum = escape(&number(length(row, Shape::Stacked)));
    let _ = writeln!(html, "<text x=\"{x:.2}%\" dx=\"6\" y=\"{}\">{sum}</text>", top + 11);
}

/// Three digits that count.
fn number(value: f64) -> String {
    if value >= 100.0 {
        count(value.round() as u64)
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else if value >= 0.01 || value == 0.0 {
        format!("{value:.2}")
    } else {
        "<0.01".to_owned()
    }
}

/// The picture in words, for who cannot see it.
fn describe(title: &str, unit: &str, series: &[&str], rows: &[Bar]) -> String {
    let mut text = format!("{title}, in {unit}.");
    for row in rows {
        let values: Vec<String> = series
            .iter()
            .zip(&row.values)
            .filter_map(|(name, value)| Some(format!("{name} {}", number(known(*value)?))))
            .collect();
        let _ = write!(text, " {}: {}.", row.name, values.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, values: &[f64]) -> Bar {
        Bar { name: name.into(), values: values.to_vec() }
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let rows = [row("a", &[50.0, 200.0]), row("b", &[100.0, f64::NAN])];
        let html = bars("T", "images/s", &["x", "y"], &rows, Shape::Beside).to_string();
        for width in ["19.00%", "76.00%", "38.00%"] {
            assert!(html.contains(&format!("width=\"{width}\"")), "{width}: {html}");
        }
        assert_eq!(html.matches("<rect class=\"bar-").count(), 2 + 3); // legend, bars
        assert!(
            html.contains("aria-label=\"T, in images/s. a: x 50.0, y 200. b: x 100.\""),
            "{html}"
        );
    }

    #[test]
    fn the_parts_of_a_stack_follow_each_other() {
        let rows = [row("a", &[1.0, 0.0, 3.0]), row("b", &[2.0])];
        let html = bars("T", "ms", &["x", "y", "z"], &rows, Shape::Stacked).to_string();
        assert!(html.contains("x=\"19.00%\" y=\"20\" width=\"57.00%\""), "{html}");
        assert!(html.contains(">4.00</text>") && html.contains(">2.00</text>"), "{html}");
    }

    #[test]
    fn nothing_to_show_is_said_and_much_is_cut() {
        let none = bars("T", "s", &["x"], &[row("a", &[f64::NAN])], Shape::Beside).to_string();
        assert!(none.contains("no values") && !none.contains("class=\"plot\""));
        let long = "n".repeat(60);
        let rows: Vec<Bar> = (0..43).map(|_| row(&long, &[1.0])).collect();
        let html = bars("T", "s", &["x"], &rows, Shape::Beside).to_string();
        assert!(html.contains("… and 3 more") && html.contains(&format!(">{}…<", &long[..40])));
        assert_eq!(
            ["0.00", "<0.01", "0.25", "12.3", "1,234"],
            [0.0, 0.001, 0.25, 12.34, 1234.4].map(number).each_ref().map(|s| s.as_str())
        );
    }
}
