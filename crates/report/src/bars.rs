//! Quantities beside each other: bars from the left, with their numbers behind them.
//!
//! Places are percentages of the width and the SVG has no `viewBox`, so that on a phone bars get shorter
//! and letters keep their size.

use std::fmt::Write;

use angler_wire::text::cut;
use maud::{Markup, html};

use super::svg::{no_values, plot, swatch, wide};
use super::{Html, count};

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
    let shown = &rows[..rows.len().min(ROWS)];
    let longest = shown.iter().map(|row| length(row, shape)).fold(0.0, f64::max);
    Html(html! {
        figure.bars {
            figcaption {
                (title) " " small { (unit) }
                ul.legend {
                    @for (i, name) in series.iter().enumerate() {
                        li { (swatch(&class(i, shape))) (name) }
                    }
                }
            }
            @if longest > 0.0 {
                (chart(&describe(title, unit, series, shown), series, shown, shape, longest))
                @if rows.len() > ROWS { p.note { "… and " (rows.len() - ROWS) " more" } }
            } @else {
                (no_values())
            }
        }
    })
}

fn chart(label: &str, series: &[&str], rows: &[Bar], shape: Shape, longest: f64) -> Markup {
    let tall = match shape {
        Shape::Beside => BAR * series.len().max(1) as u32,
        Shape::Stacked => BAR,
    };
    let step = NAME + tall + GAP;
    let parts = html! {
        @for (row, top) in rows.iter().zip((0..).map(|number| step * number)) {
            text.label y=(top + NAME - 6) { (cut(&row.name, NAME_CHARS)) }
            @match shape {
                Shape::Beside => (beside(series, row, top + NAME, longest)),
                Shape::Stacked => (stacked(series, row, top + NAME, longest)),
            }
        }
    };
    plot(label, step * rows.len() as u32, &parts)
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

fn beside(series: &[&str], row: &Bar, top: u32, longest: f64) -> Markup {
    html! {
        @for (i, value) in row.values.iter().enumerate() {
            @if let Some(value) = known(*value) {
                @let (y, width) = (top + BAR * i as u32, wide(value / longest * LONGEST));
                rect class=(class(i, Shape::Beside)) y=(y) width=(width) height=(BAR - 3) {
                    title { (series.get(i).copied().unwrap_or_default()) ": " (number(value)) }
                }
                text x=(width) dx="6" y=(y + 11) { (number(value)) }
            }
        }
    }
}

fn stacked(series: &[&str], row: &Bar, top: u32, longest: f64) -> Markup {
    let mut end = 0.0;
    let parts: Vec<_> = row
        .values
        .iter()
        .enumerate()
        .filter_map(|(i, value)| {
            let value = known(*value)?;
            let (start, width) = (end, value / longest * LONGEST);
            end += width;
            Some((i, value, start, width))
        })
        .collect();
    html! {
        @for (i, value, start, width) in parts {
            rect class=(class(i, Shape::Stacked)) x=(wide(start)) y=(top) width=(wide(width))
                height=(BAR - 3) {
                title { (series.get(i).copied().unwrap_or_default()) ": " (number(value)) }
            }
        }
        text x=(wide(end)) dx="6" y=(top + 11) { (number(length(row, Shape::Stacked))) }
    }
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
