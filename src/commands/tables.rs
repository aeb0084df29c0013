//! Tables for people, good to read at 80 columns.

use std::io::Write;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use angler_vectors::evaluate::Failed;
use angler_vectors::statistics::{Examples, Rate};

/// The most rows of a list that are shown.
pub(super) const ROWS: usize = 20;
/// The longest label, and the longest address, in a column.
const LABEL: usize = 18;
const ADDRESS: usize = 34;
/// The same where two verdicts stand side by side.
const NARROW_LABEL: usize = 12;
const NARROW_ADDRESS: usize = 26;

/// Prints to standard output. A reader that has seen enough, such as `head`, is no error.
pub(super) fn show(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

/// A table under a title: the first rows, and how many more there are. Columns from `numbers` on
/// are aligned to the right. Nothing, if there are no rows.
pub(super) fn table(
    title: &str,
    headers: &[&str],
    numbers: usize,
    rows: impl IntoIterator<Item = Vec<String>>,
    total: u64,
) -> String {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new().header_separator(LineStyle::none().fill('─')))
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headers.iter().copied());
    if !table.is_tty() {
        table.set_width(80);
    }
    let mut shown = 0;
    for row in rows.into_iter().take(ROWS) {
        table.add_row(row);
        shown += 1;
    }
    if shown == 0 {
        return String::new();
    }
    for column in numbers..headers.len() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let title = if title.is_empty() { String::new() } else { format!("{title}\n") };
    let more = match total.saturating_sub(shown) {
        0 => String::new(),
        more => format!(" … and {more} more\n"),
    };
    format!("\n{title}{}\n{more}", table.trim_fmt())
}

/// A share with its counts and its interval: three cells.
pub(super) fn rate(rate: &Rate) -> [String; 3] {
    let interval =
        rate.interval().map(|(low, high)| format!("{:.1} to {:.1}%", 100.0 * low, 100.0 * high));
    [format!("{} of {}", rate.count, rate.of), percent(rate.share()), interval.unwrap_or_default()]
}

/// `93.1%`, or nothing.
pub(super) fn percent(share: Option<f64>) -> String {
    share.map(|share| format!("{:.1}%", 100.0 * share)).unwrap_or_default()
}

/// A score or a margin, or nothing.
pub(super) fn number(value: Option<impl Into<f64>>) -> String {
    value.map(|value| format!("{:.3}", value.into())).unwrap_or_default()
}

/// A label, cut if it is long.
pub(super) fn label(label: &str) -> String {
    start(label, LABEL)
}

/// A label that may be unknown.
pub(super) fn given(given: Option<&str>) -> String {
    given.map_or_else(|| "(unknown)".to_owned(), label)
}

/// The same beside another.
pub(super) fn narrow_given(given: Option<&str>) -> String {
    start(given.unwrap_or("(unknown)"), NARROW_LABEL)
}

/// An address: of a long one the end, which tells it from others.
pub(super) fn address(uri: &str) -> String {
    end(uri, ADDRESS)
}

/// The same where there is little room.
pub(super) fn narrow_address(uri: &str) -> String {
    end(uri, NARROW_ADDRESS)
}

/// The start of a text, cut to `width` characters.
pub(super) fn start(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let start: String = text.chars().take(width - 1).collect();
    format!("{start}…")
}

/// The end of a text, cut to `width` characters.
pub(super) fn end(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let end: String = text.chars().skip(length - width + 1).collect();
    format!("…{end}")
}

/// A text that somebody else wrote, safe for a terminal: a control character could rewrite the
/// screen.
pub(super) fn plain(text: &str) -> String {
    let safe = |c: char| if c.is_control() && c != '\n' { '\u{fffd}' } else { c };
    text.chars().map(safe).collect()
}

/// The same on one line.
pub(super) fn one_line(text: &str) -> String {
    plain(text).replace('\n', " ")
}

/// Images without scores.
pub(super) fn errors(errors: &Examples<Failed>) -> String {
    let rows = errors.first.iter().map(|failed| {
        let Failed { uri, error } = failed;
        vec![address(uri), error.code.to_string(), error.message.clone()]
    });
    table("images that could not be read", &["image", "error", ""], 3, rows, errors.total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_the_first_rows_and_counts_the_rest() {
        let rows = (0..50).map(|i| vec![format!("row {i}"), i.to_string()]);
        let text = table("things", &["what", "number"], 1, rows, 50);
        assert!(text.contains("row 19") && !text.contains("row 20"), "{text}");
        assert!(text.contains("… and 30 more"), "{text}");
        let nothing = table("things", &["what"], 1, Vec::<Vec<String>>::new(), 0);
        assert_eq!(nothing, "");
    }

    #[test]
    fn long_texts_are_cut_where_it_tells_least() {
        let cut = address(&format!("s3://bucket/{}/a.jpg", "x".repeat(80)));
        assert!(cut.starts_with('…') && cut.ends_with("/a.jpg"), "{cut}");
        assert_eq!(cut.chars().count(), ADDRESS);
        assert_eq!(label(&"ä".repeat(30)).chars().count(), LABEL);
        assert_eq!((given(None), given(Some("a"))), ("(unknown)".to_owned(), "a".to_owned()));
    }

    #[test]
    fn what_others_wrote_cannot_rewrite_the_screen() {
        assert_eq!(plain("a\x1b[2Jb\u{9b}31m\nc"), "a\u{fffd}[2Jb\u{fffd}31m\nc");
        assert_eq!(one_line("a\nb\r"), "a b\u{fffd}");
    }

    #[test]
    fn a_rate_of_nothing_is_left_open() {
        assert_eq!(rate(&Rate::default()), ["0 of 0", "", ""]);
        assert_eq!(rate(&Rate::new(81, 263))[1..], ["30.8%", "25.5 to 36.6%"]);
    }
}
