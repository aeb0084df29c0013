//! A table: text, numbers, and shares with a bar below the number.

use maud::{Markup, html};

use super::svg::wide;
use super::{Html, count, note, percent};

/// The most rows that a table shows; the rest is counted.
const ROWS: usize = 1_000;

/// How the cells of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers: digits stand below each other.
    Right,
}

/// What stands in a cell.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    text: String,
    share: Option<f64>,
}

impl Cell {
    /// A share in [0, 1]: as a percentage, and as a bar. What is no number shows as a dash.
    pub fn share(share: f64) -> Self {
        Self { text: percent(share), share: share.is_finite().then(|| share.clamp(0.0, 1.0)) }
    }

    /// The text, and the bar of a share.
    fn html(&self) -> Markup {
        html! {
            (self.text)
            @if let Some(share) = self.share {
                svg.bar aria-hidden="true" {
                    rect.rail width="100%" height="4" {}
                    rect width=(wide(share * 100.0)) height="4" {}
                }
            }
        }
    }

    /// A count, with separators.
    pub fn count(number: u64) -> Self {
        count(number).into()
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, share: None }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// A table with a line for each of `rows`; the first cell of a row names it. Columns without an entry
/// in `alignments` stand left. A wide table scrolls in its box. Of more than 1,000 rows the first are
/// shown, and a note says how many more there are.
pub fn table(headers: &[&str], rows: &[Vec<Cell>], alignments: &[Align]) -> Html {
    let class = |column| (alignments.get(column) == Some(&Align::Right)).then_some("number");
    let html = Html(html! {
        div.scroll tabindex="0" {
            table.plain {
                thead {
                    tr {
                        @for (column, header) in headers.iter().enumerate() {
                            th scope="col" class=[class(column)] { (header) }
                        }
                    }
                }
                tbody {
                    @for row in rows.iter().take(ROWS) {
                        tr {
                            @for (column, cell) in row.iter().enumerate() {
                                @if column == 0 {
                                    th scope="row" class=[class(column)] { (cell.html()) }
                                } @else {
                                    td class=[class(column)] { (cell.html()) }
                                }
                            }
                        }
                    }
                }
            }
        }
    });
    match rows.len().saturating_sub(ROWS) {
        0 => html,
        more => html.and(note(&format!("… and {} more rows", count(more as u64)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_bars_and_long_tables_end() {
        let rows: Vec<Vec<Cell>> =
            (0..1_003).map(|n| vec![Cell::count(n), Cell::share(0.25)]).collect();
        let html = table(&["n", "share"], &rows, &[Align::Left, Align::Right]).to_string();
        assert_eq!(html.matches("<tr>").count(), 1 + ROWS);
        assert!(html.contains("<th scope=\"row\">999</th>"));
        assert!(html.contains("<td class=\"number\">25.0%<svg"));
        assert!(html.contains("<rect width=\"25.00%\""));
        assert!(html.contains("… and 3 more rows"));
        assert!(!table(&["x"], &[vec![Cell::share(f64::NAN)]], &[]).to_string().contains("<svg"));
    }
}
