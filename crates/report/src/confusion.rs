//! What was taken for what: a confusion matrix as a heat map.
//!
//! A cell's shade is its share of its row, in steps. The diagonal is shaded evenly; errors by the square
//! root, because one in a hundred has to be seen beside ninety-nine that are right. A row ends
//! with its images and the share that is right, so the shades need no measuring.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::{Html, count, note, percent};

/// The most classes shown: more cells than that are wallpaper.
const CLASSES: usize = 40;
/// With more columns than that, cells are smaller.
const DENSE: usize = 20;
/// The most characters of a head.
const HEAD: usize = 25;
/// The steps of shading, without none.
const SHADES: f64 = 7.0;

/// A heat map of `counts`: (row, column, images), by index into `rows` (the true classes) and
/// `columns` (the labels given, and what stands for none, last). Counts of one cell add up; those
/// outside the lists are not shown. Where row and column have the same name, the label was right.
///
/// Of more than 40 rows those with the most errors are shown, their own or others taken for them; of
/// more columns than fit, theirs and those that most errors went to. The rest of a row is one
/// column, `other classes`, and a note says what was left out.
pub fn confusion(rows: &[String], columns: &[String], counts: &[(usize, usize, u64)]) -> Html {
    if rows.is_empty() || columns.is_empty() {
        return note("There are no classes to show.");
    }
    let matrix = Matrix::new(rows, columns, counts);
    let rest = matrix.has_rest.then_some("other classes");
    let heads = matrix.columns.iter().map(|c| columns[*c].as_str()).chain(rest);
    let html = Html(html! {
        div.scroll.tall tabindex="0" {
            table.matrix.dense[matrix.columns.len() > DENSE] {
                thead {
                    tr {
                        th.corner { span { "true class" } span { "given label" } }
                        @for head in heads.clone() {
                            th scope="col" title=(head) { span { (brief(head)) } }
                        }
                        th.sum scope="col" { span { "images" } }
                        th.sum scope="col" { span { "right" } }
                    }
                }
                tbody {
                    @for row in &matrix.rows { (matrix.row(*row, &rows[*row], heads.clone())) }
                }
            }
        }
    });
    let left_out = matrix.left_out(rows.len(), columns.len()).map(|text| note(&text));
    html.and(left_out.unwrap_or_default()).and(note(
        "A row is a true class, a column the label that its images got. Shade: share of the row; \
         errors are shaded more strongly, so that single ones show.",
    ))
}

/// A label that fits a head: of a long one the middle goes, since names of one kind begin alike and
/// differ at the end. The whole one is the head's title.
fn brief(label: &str) -> String {
    let length = label.chars().count();
    if length <= HEAD {
        return label.to_owned();
    }
    let (start, end) = (HEAD / 2, HEAD - HEAD / 2 - 1);
    let first = label.chars().take(start);
    first.chain(['…']).chain(label.chars().skip(length - end)).collect()
}

fn cell(truth: &str, given: &str, images: u64, total: u64, diagonal: bool) -> Markup {
    if images == 0 {
        return html! { @if diagonal { td.good { "0" } } @else { td {} } };
    }
    let share = images as f64 / total.max(1) as f64;
    let (class, strength) = if diagonal { ("good", share) } else { ("bad", share.sqrt()) };
    let shade = (strength * SHADES).ceil().clamp(1.0, SHADES);
    let (images, total, share) = (count(images), count(total), percent(share));
    html! {
        td class={ (class) " s" (shade as u8) }
            title={ (truth) " → " (given) ": " (images) " of " (total) " (" (share) ")" } {
            (images)
        }
    }
}

/// What is shown, and sums over everything.
struct Matrix {
    /// Indices of the rows shown, in their order.
    rows: Vec<usize>,
    /// Indices of the columns shown, in their order.
    columns: Vec<usize>,
    /// Whether columns are left out; their images lie at the place after the last.
    has_rest: bool,
    /// Images by row and by place among the columns shown.
    cells: BTreeMap<(usize, usize), u64>,
    /// Images of each row, shown or not.
    totals: Vec<u64>,
    /// Those of them that are right.
    right: Vec<u64>,
}

impl Matrix {
    fn new(rows: &[String], columns: &[String], counts: &[(usize, usize, u64)]) -> Self {
        let mut totals = vec![0_u64; rows.len()];
        let mut right = vec![0_u64; rows.len()];
        // By name: a class's errors as a row and as a column count together.
        let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
        let inside = || counts.iter().filter(|(r, c, _)| *r < rows.len() && *c < columns.len());
        for (row, column, images) in inside() {
            let (truth, given) = (rows[*row].as_str(), columns[*column].as_str());
            totals[*row] += images;
            if truth == given {
                right[*row] += images;
            } else {
                *errors.entry(truth).or_default() += images;
                *errors.entry(given).or_default() += images;
            }
        }
        let errors_of = |label: &String| errors.get(label.as_str()).copied().unwrap_or_default();
        let shown_rows = worst(rows, CLASSES, errors_of);
        let shown_columns = choose_columns(rows, columns, &shown_rows, errors_of);
        let places: BTreeMap<usize, usize> =
            shown_columns.iter().enumerate().map(|(place, column)| (*column, place)).collect();
        let mut cells = BTreeMap::new();
        for (row, column, images) in inside() {
            let place = places.get(column).copied().unwrap_or(shown_columns.len());
            *cells.entry((*row, place)).or_default() += images;
        }
        let has_rest = shown_columns.len() < columns.len();
        Self { rows: shown_rows, columns: shown_columns, has_rest, cells, totals, right }
    }

    /// Draws the row at this index, whose class is `label`, under these heads.
    fn row<'a>(&self, row: usize, label: &str, heads: impl Iterator<Item = &'a str>) -> Markup {
        let (total, right) = (self.totals[row], self.right[row]);
        html! {
            tr {
                th scope="row" title=(label) { span { (brief(label)) } }
                @for (place, head) in heads.enumerate() {
                    @let diagonal = place < self.columns.len() && head == label;
                    @let images = self.cells.get(&(row, place)).copied().unwrap_or_default();
                    (cell(label, head, images, total, diagonal))
                }
                td.sum { (count(total)) }
                td.sum { (percent(right as f64 / total as f64)) }
            }
        }
    }

    /// What the picture does not show, in a sentence.
    fn left_out(&self, rows: usize, columns: usize) -> Option<String> {
        if self.rows.len() < rows {
            let shown: BTreeSet<usize> = self.rows.iter().copied().collect();
            let others = || (0..rows).filter(|row| !shown.contains(row));
            let images: u64 = others().map(|row| self.totals[row]).sum();
            let right: u64 = others().map(|row| self.right[row]).sum();
            return Some(format!(
                "Shown are the {} of {} classes with the most errors. The others have {} images, \
                 {} of them wrong.",
                self.rows.len(),
                count(rows as u64),
                count(images),
                count(images - right)
            ));
        }
        let more = columns - self.columns.len();
        (more > 0).then(|| {
            format!(
                "{} labels that were given more rarely are one column, other classes.",
                count(more as u64)
            )
        })
    }
}

/// The indices of the `most` labels with the most errors, in the order of the labels.
fn worst(labels: &[String], most: usize, errors_of: impl Fn(&String) -> u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..labels.len()).collect();
    all.sort_by_key(|i| std::cmp::Reverse(errors_of(&labels[*i]))); // stable: ties keep their order
    all.truncate(most);
    all.sort_unstable();
    all
}

/// The columns of the rows shown; then, while there is room, those that are no row at all, the most
/// errors first: what stands for no label is one of them.
fn choose_columns(
    rows: &[String],
    columns: &[String],
    shown: &[usize],
    errors_of: impl Fn(&String) -> u64,
) -> Vec<usize> {
    let most = CLASSES + 1;
    if columns.len() <= most {
        return (0..columns.len()).collect();
    }
    let is_row: BTreeSet<&String> = rows.iter().collect();
    let is_shown: BTreeSet<&String> = shown.iter().map(|row| &rows[*row]).collect();
    let rank = |label: &String| match (is_shown.contains(label), is_row.contains(label)) {
        (true, _) => 0,
        (_, false) => 1,
        _ => 2,
    };
    let mut all: Vec<usize> = (0..columns.len()).filter(|c| rank(&columns[*c]) < 2).collect();
    all.sort_by_key(|c| (rank(&columns[*c]), std::cmp::Reverse(errors_of(&columns[*c]))));
    all.truncate(most);
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("class-{n}")).collect()
    }

    #[test]
    fn right_and_wrong_are_told_by_name_and_rows_add_up() {
        let rows = ["cola".to_owned(), "fanta".into(), "empty".into()];
        let columns = ["fanta".to_owned(), "cola".into(), "unknown".into()];
        let counts = [(0, 1, 90), (0, 0, 1), (0, 2, 9), (1, 0, 5), (1, 0, 5), (9, 9, 1)];
        let html = confusion(&rows, &columns, &counts).to_string();
        assert!(html.contains("<td class=\"bad s1\" title=\"cola → fanta: 1 of 100 (1.0%)\">1<"));
        assert!(
            html.contains("<td class=\"good s7\" title=\"cola → cola: 90 of 100 (90.0%)\">90<")
        );
        assert!(html.contains("title=\"fanta → fanta: 10 of 10 (100%)\">10<"));
        assert!(html.contains("<td class=\"sum\">100</td><td class=\"sum\">90.0%</td>"));
        assert!(html.contains("<td class=\"sum\">0</td><td class=\"sum\">–</td>"), "{html}");
        assert!(!html.contains("other classes"));
    }

    #[test]
    fn many_classes_become_those_with_the_most_errors() {
        let rows = labels(120);
        let mut columns = rows.clone();
        columns.push("unknown".into());
        // All are right ten times; 0..40 are taken for 40..80, three times each.
        let mut counts: Vec<_> = (0..120).map(|n| (n, n, 10)).collect();
        counts.extend((0..40).map(|n| (n, n + 40, 3)));
        counts.extend([(100, 50, 2), (0, 120, 4)]);
        let matrix = Matrix::new(&rows, &columns, &counts);
        // 50 was given wrongly five times; of the classes with three errors, the first.
        let expected: Vec<usize> = (0..39).chain([50]).collect();
        assert_eq!(matrix.rows, expected);
        let columns_shown: Vec<usize> = (0..39).chain([50, 120]).collect();
        assert_eq!(matrix.columns, columns_shown, "unknown stays");
        assert_eq!(matrix.cells[&(10, 39)], 3, "taken for 50");
        assert_eq!(matrix.cells[&(0, 41)], 3, "taken for 40, which is not shown");
        assert_eq!(matrix.totals[0], 17);
        assert_eq!(
            matrix.left_out(120, 121).unwrap(),
            "Shown are the 40 of 120 classes with the most errors. The others have 805 images, 5 \
             of them wrong."
        );
        let html = confusion(&rows, &columns, &counts).to_string();
        assert_eq!(html.matches("<tr>").count(), 1 + CLASSES);
        assert!(html.contains("title=\"class-0 → other classes: 3 of 17 (17.6%)\""));
    }

    #[test]
    fn few_rows_against_many_labels_keep_the_labels_that_matter() {
        let rows = labels(3);
        let mut columns = labels(1_000);
        columns.push("unknown".into());
        let counts = [(0, 0, 5), (0, 700, 2), (1, 1_000, 1), (2, 999, 1)];
        let matrix = Matrix::new(&rows, &columns, &counts);
        assert_eq!(matrix.rows, [0, 1, 2]);
        assert_eq!(matrix.columns.len(), CLASSES + 1);
        for column in [0, 1, 2, 700, 999, 1_000] {
            assert!(matrix.columns.contains(&column), "{column}");
        }
        assert!(matrix.left_out(3, 1_001).unwrap().starts_with("960 labels"));
    }

    #[test]
    fn long_labels_keep_both_ends() {
        assert_eq!(brief("a-class-with-a-rather-long-name-22"), "a-class-with…long-name-22");
        assert_eq!(brief(&"é".repeat(25)), "é".repeat(25));
    }

    #[test]
    fn nothing_is_a_sentence() {
        assert!(confusion(&[], &labels(1), &[]).to_string().contains("no classes"));
        assert!(confusion(&labels(1), &[], &[]).to_string().contains("no classes"));
    }
}
