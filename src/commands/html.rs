//! What the pages of several commands have in common.

use std::path::Path;

use anyhow::Result;

use angler_report::{self, Align, Card, Cell, Html, Series, count, note, percent, table};
use angler_vectors::evaluate::Failed;
use angler_vectors::statistics::{Examples, Histogram, Rate};

use super::thumbnails::thumbnails;
use super::{UsageError, output};
use crate::app::App;

/// Rows of a list of pairs, labels or errors.
pub(super) const ROWS: usize = 30;
/// What stands for no label. In brackets: a class may be called `unknown`.
pub(super) const UNKNOWN: &str = "(unknown)";

/// Whether a page can be written there, before the work that it shows is done.
pub(super) fn check(html: Option<&Path>) -> Result<(), UsageError> {
    if html == Some(Path::new("-")) {
        return Err(UsageError("--html -: a page goes to a file".to_owned()));
    }
    output::check("--html", html)
}

/// Writes a page and says where it is. Not on standard output: there may be JSON.
pub(super) fn write(path: &Path, html: &str) -> Result<()> {
    tokio::task::block_in_place(|| angler_report::write(path, html))?;
    eprintln!("page in {}", path.display());
    Ok(())
}

/// Gives each card the picture of its URI, or why there is none.
pub(super) async fn with_pictures(app: &App, mut cards: Vec<Card>) -> Vec<Card> {
    let uris: Vec<&str> = cards.iter().map(|card| card.uri.as_str()).collect();
    let pictures = thumbnails(app, &uris).await;
    for (card, picture) in cards.iter_mut().zip(pictures) {
        card.thumbnail = picture.map_err(|error| format!("{}: {}", error.code, error.message));
    }
    cards
}

/// A share as a fact: the share, and its counts and interval.
pub(super) fn fact<'a>(name: &'a str, rate: &Rate) -> (&'a str, String, Option<String>) {
    (name, share(rate), Some(spelled(rate)))
}

pub(super) fn share(rate: &Rate) -> String {
    percent(rate.share().unwrap_or(f64::NAN))
}

/// `74 of 100, 95% interval 64.6 to 81.6%`.
pub(super) fn spelled(rate: &Rate) -> String {
    let counts = format!("{} of {}", count(rate.count), count(rate.of));
    match rate.interval() {
        Some((low, high)) => {
            format!("{counts}, 95% interval {:.1} to {:.1}%", 100.0 * low, 100.0 * high)
        }
        None => counts,
    }
}

/// A score or a margin, or a dash.
pub(super) fn number(value: Option<f32>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"))
}

/// The bins in which anything lies, and `value`'s, out to whole tenths: most of the axis is empty, and
/// what is to be seen would be a few pixels wide. The histograms have the same bins.
pub(super) fn zoomed(
    histograms: &[(&str, &Histogram)],
    value: Option<f32>,
) -> (Vec<Series>, (f32, f32)) {
    let Some((_, first)) = histograms.first() else { return (Vec::new(), (0.0, 1.0)) };
    let (low, bins) = (f64::from(first.low), first.bins.len());
    let width = (f64::from(first.high) - low) / bins.max(1) as f64;
    let tenth = ((0.1 / width).round() as usize).max(1);
    // `as` carries what is outside to the ends.
    let marked = value.map(|v| (((f64::from(v) - low) / width) as usize).min(bins.max(1) - 1));
    let filled = |bin: &usize| histograms.iter().any(|(_, h)| h.bins.get(*bin) > Some(&0));
    let seen = || (0..bins).filter(filled).chain(marked);
    let start = seen().min().unwrap_or(0) / tenth * tenth;
    let end = seen().max().map_or(bins, |last| ((last / tenth + 1) * tenth).min(bins));
    let series = histograms.iter().map(|(name, h)| Series {
        name: (*name).to_owned(),
        bins: h.bins.get(start..end).map(<[u64]>::to_vec).unwrap_or_default(),
    });
    let at = |bin: usize| (low + width * bin as f64) as f32;
    (series.collect(), (at(start), at(end)))
}

/// A table of at most [`ROWS`] rows out of `total`, and how many more there are.
pub(super) fn first_rows(headers: &[&str], rows: Vec<Vec<Cell>>, total: u64, left: usize) -> Html {
    let shown: Vec<Vec<Cell>> = rows.into_iter().take(ROWS).collect();
    let alignments: Vec<Align> = (0..headers.len())
        .map(|column| if column < left { Align::Left } else { Align::Right })
        .collect();
    let html = table(headers, &shown, &alignments);
    match total.saturating_sub(shown.len() as u64) {
        0 => html,
        more => html.and(note(&format!("… and {} more", count(more)))),
    }
}

/// Images without scores.
pub(super) fn failures(errors: &Examples<Failed>) -> Html {
    let rows = errors.first.iter().map(|Failed { uri, error }| {
        vec![uri.as_str().into(), error.code.as_str().into(), error.message.as_str().into()]
    });
    first_rows(&["image", "error", "what was wrong"], rows.collect(), errors.total, 3)
}

/// What the first of them are, if there are more.
pub(super) fn shown(shown: usize, total: u64, order: &str) -> Html {
    match total > shown as u64 {
        true => note(&format!("Shown are {shown} of {}: {order}.", count(total))),
        false => note(&format!("{}{}.", order[..1].to_uppercase(), &order[1..])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cut_to_what_is_filled_and_keeps_its_places() {
        let (mut a, mut b) = (Histogram::of_scores(), Histogram::of_scores());
        a.add(0.55);
        b.add(0.31);
        let (series, range) = zoomed(&[("a", &a), ("b", &b)], None);
        assert!((range.0 - 0.3).abs() < 1e-6 && (range.1 - 0.6).abs() < 1e-6, "{range:?}");
        let filled = |s: &Series| s.bins.iter().position(|n| *n == 1);
        // Bins of 0.02: 0.55 lies in that from 0.54, 0.31 in that from 0.3.
        assert_eq!(
            (series[0].bins.len(), filled(&series[0]), filled(&series[1])),
            (15, Some(12), Some(0))
        );
        let (series, range) = zoomed(&[("a", &a), ("b", &b)], Some(0.72));
        assert!((range.1 - 0.8).abs() < 1e-6 && series[0].bins.len() == 25, "{range:?}");
        a.add(1.0);
        b.add(-1.0);
        let (_, range) = zoomed(&[("a", &a), ("b", &b)], Some(7.0));
        assert_eq!(range, (-1.0, 1.0));
        let empty = Histogram::of_margins();
        assert_eq!(zoomed(&[("e", &empty)], None).1, (0.0, 1.0));
    }

    #[test]
    fn a_list_that_is_cut_says_so() {
        let rows = |n: u64| (0..n).map(|i| vec![Cell::count(i)]).collect::<Vec<_>>();
        let html = first_rows(&["n"], rows(50), 5_000, 0).to_string();
        assert!(html.contains("… and 4,970 more"), "{html}");
        assert_eq!(html.matches("<tr>").count(), 1 + ROWS);
        assert!(!first_rows(&["n"], rows(3), 3, 0).to_string().contains("more"));
        assert!(shown(60, 1_200, "the surest first").to_string().contains("60 of 1,200: the"));
        assert!(shown(6, 6, "the surest first").to_string().contains("The surest first."));
    }
}
