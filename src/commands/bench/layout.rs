//! Numbers as people read them, and words and tables that keep to a terminal of 80 columns.

use std::fmt::Write;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use angler_report::count;

/// Columns of a terminal.
const WIDTH: u16 = 80;

/// A rate: `12.3`, `1,234`.
pub(super) fn rate(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { count(value.round() as u64) }
}

/// Milliseconds, with three digits that count; a dash if they were not measured.
pub(super) fn ms(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 100.0 => count(value.round() as u64),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) if value >= 1.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.3}"),
    }
}

/// `22 kB`.
pub(super) fn bytes(value: u64) -> String {
    match value {
        0..10_000 => format!("{value} B"),
        10_000..10_000_000 => format!("{} kB", count(value.div_ceil(1000))),
        10_000_000..10_000_000_000 => format!("{} MB", count(value.div_ceil(1_000_000))),
        _ => format!("{:.1} GB", value as f64 / 1e9),
    }
}

/// A heading, and what stands below it in a sentence.
pub(super) fn section(text: &mut String, heading: &str, what: &str) {
    let _ = writeln!(text, "\n{heading}");
    let _ = writeln!(text, "{}", "─".repeat(heading.chars().count()));
    paragraph(text, what);
}

/// Words, broken at the width.
pub(super) fn paragraph(text: &mut String, words: &str) {
    let mut column = 0;
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > usize::from(WIDTH) {
            text.push('\n');
            column = 0;
        }
        if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text.push('\n');
}

/// A table: columns of names, then columns of figures.
pub(super) fn table(text: &mut String, names: &[&str], figures: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new().header_separator(LineStyle::none().fill('─')))
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(names.iter().chain(figures));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(names.len()) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for line in table.to_string().lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_count() {
        assert_eq!([9.96, 99.94, 99.96, 12_345.6].map(rate), ["10.0", "99.9", "100.0", "12,346"]);
        let times = [Some(0.01234), Some(1.234), Some(12.34), Some(1234.0), None].map(ms);
        assert_eq!(times, ["0.012", "1.23", "12.3", "1,234", "–"]);
        let sizes = [999, 21_300, 56_000_000, 2_560_000_000, 12_000_000_000].map(bytes);
        assert_eq!(sizes, ["999 B", "22 kB", "56 MB", "2,560 MB", "12.0 GB"]);
    }

    #[test]
    fn words_and_tables_keep_to_the_width() {
        let mut text = String::new();
        section(&mut text, "Heading", &"some words ".repeat(40));
        let long = "a name that is much too long for a column of a terminal".to_owned();
        let row = vec![long.clone(), long, rate(1e9), ms(Some(1e9)), ms(None), ms(None)];
        table(&mut text, &["way", "images"], &["a", "b", "c", "d"], vec![row]);
        for line in text.lines() {
            assert!(line.chars().count() <= usize::from(WIDTH), "{line}");
        }
    }
}
