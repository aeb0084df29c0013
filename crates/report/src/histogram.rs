//! How values are spread: bars of several series over one axis.
//!
//! Each series is drawn as shares of its own total. A few wrong images beside thousands of right ones
//! would be a flat line by count; the question that the picture answers is where each kind lies.
//!
//! The SVG has no `viewBox`: places are percentages of the width, so that on a phone the plot gets
//! narrower and its letters keep their size. Only the bars themselves are stretched.

use std::fmt::Write;

use angler_wire::text::cut;
use maud::{Markup, html};

use super::svg::{no_values, plot, swatch, wide};
use super::{Html, count, percent};

/// Pixels above the plot, for the marker's label.
const TOP: u32 = 22;
/// The plot's height in pixels.
const PLOT: u32 = 190;
/// Pixels below the plot, for the axis.
pub(super) const BOTTOM: u32 = 40;
/// Units of the plot's height in which bars are drawn.
const FULL: f64 = 1000.0;
/// More characters of a marker's label would leave a phone's screen.
const LABEL: usize = 36;

/// One set of values, counted.
#[derive(Debug, Clone)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// How many values lie in each of equal parts of the range, from its low end.
    pub bins: Vec<u64>,
}

impl Series {
    pub(super) fn total(&self) -> u64 {
        self.bins.iter().sum()
    }

    /// The share of a bin in this series.
    fn share(&self, bin: usize) -> f64 {
        let part = self.bins.get(bin).copied().unwrap_or_default();
        part as f64 / self.total().max(1) as f64
    }

    /// The fullest bin: its place and share.
    pub(super) fn peak(&self) -> (usize, f64) {
        let shares = (0..self.bins.len()).map(|bin| (bin, self.share(bin)));
        shares.fold((0, 0.0), |best, next| if next.1 > best.1 { next } else { best })
    }
}

/// The series over each other. The first has the accent colour, the second that of errors, more are
/// grey and dashed. `axis_label` says what is measured, `range` is the axis from the low end of the
/// first bin to the high end of the last. `marker` is a value to compare with, a threshold, and what it
/// is called; outside of the range it stands at its end.
pub fn histogram(
    title: &str,
    axis_label: &str,
    series: &[Series],
    range: (f32, f32),
    marker: Option<(f32, &str)>,
) -> Html {
    let axis = Axis { low: range.0.into(), span: f64::from(range.1) - f64::from(range.0) };
    let highest = series.iter().map(|s| s.peak().1).fold(0.0, f64::max);
    let is_empty = highest == 0.0 || !axis.span.is_finite() || axis.span <= 0.0;
    let marker = marker.filter(|(value, _)| value.is_finite());
    Html(html! {
        figure.histogram {
            figcaption {
                (title)
                ul.legend {
                    @for (i, one) in series.iter().enumerate() {
                        li { (swatch(class(i))) (one.name) " " small { (count(one.total())) } }
                    }
                }
            }
            @if is_empty {
                (no_values())
            } @else {
                @let label = describe(title, axis_label, series, &axis, marker);
                @let parts = chart(axis_label, series, &axis, highest, marker);
                (plot(&label, TOP + PLOT + BOTTOM, &parts))
                p.note { "Height: share of each kind's values." }
            }
        }
    })
}

/// The grid, the bars, the axis and what a pointer reads; `highest` is the largest share of a bin.
fn chart(
    axis_label: &str,
    series: &[Series],
    axis: &Axis,
    highest: f64,
    marker: Option<(f32, &str)>,
) -> Markup {
    let step = nice_step(highest, 4.0);
    let top = (highest / step).ceil() * step;
    let shares = (1..).map(|i| f64::from(i) * step).take_while(|share| *share <= top);
    let lines: Vec<(f64, f64)> = shares
        .map(|share| (share, f64::from(TOP) + (1.0 - share / top) * f64::from(PLOT)))
        .collect();
    html! {
        @for (_, y) in &lines {
            @let y = format!("{y:.1}");
            line.grid x2="100%" y1=(y) y2=(y) {}
        }
        @for (i, one) in series.iter().enumerate() { (bars(one, class(i), top, (TOP, PLOT))) }
        @for (share, y) in &lines {
            text.scale y=(format_args!("{:.1}", y - 4.0)) {
                (number(share * 100.0, step * 100.0)) "%"
            }
        }
        (ticks(axis_label, axis, TOP + PLOT))
        (tips(series, axis))
        @if let Some((value, label)) = marker { (mark(axis, value, label)) }
    }
}

fn class(series: usize) -> &'static str {
    match series {
        0 => "first",
        1 => "second",
        _ => "other",
    }
}

pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) span: f64,
}

impl Axis {
    /// Percent of the width.
    pub(super) fn x(&self, value: f64) -> f64 {
        ((value - self.low) / self.span * 100.0).clamp(0.0, 100.0)
    }

    /// What a bin spans: `0.40 to 0.45`.
    fn bin(&self, bin: usize, bins: usize) -> String {
        let width = self.span / bins.max(1) as f64;
        let edge = |i: usize| number(self.low + width * i as f64, width / 10.0);
        format!("{} to {}", edge(bin), edge(bin + 1))
    }
}

/// The outline of a series' bars, filled. Empty bins have none: it would cover the axis.
/// `top` is the share at the upper end of the place, which is a y and a height in pixels.
pub(super) fn bars(series: &Series, class: &str, top: f64, place: (u32, u32)) -> Markup {
    let mut path = String::new();
    let mut open = false;
    for (bin, part) in series.bins.iter().enumerate() {
        if *part > 0 {
            let start = if open { String::new() } else { format!("M{bin} {FULL}") };
            let y = (1.0 - series.share(bin) / top) * FULL;
            let _ = write!(path, "{start}V{y:.1}H{}", bin + 1);
        } else if open {
            let _ = write!(path, "V{FULL}Z");
        }
        open = *part > 0;
    }
    if open {
        let _ = write!(path, "V{FULL}Z");
    }
    let (y, height) = place;
    let bins = series.bins.len().max(1);
    html! {
        svg y=(y) width="100%" height=(height) viewBox=(format_args!("0 0 {bins} {FULL}"))
            preserveAspectRatio="none" {
            path class=(class) d=(path) {}
        }
    }
}

/// The axis at `floor` pixels, with its numbers and its name in the [`BOTTOM`] pixels below.
pub(super) fn ticks(axis_label: &str, axis: &Axis, floor: u32) -> Markup {
    let step = nice_step(axis.span, 6.0);
    // Half a thousandth of a step forgives what f32 lost of the ends.
    let first = (axis.low / step - 0.0005).ceil() as i64;
    let last = ((axis.low + axis.span) / step + 0.0005).floor() as i64;
    html! {
        line.axis x2="100%" y1=(floor) y2=(floor) {}
        @for value in (first..=last).map(|i| i as f64 * step) {
            @let at = axis.x(value);
            @let x = wide(at);
            line.axis x1=(x) x2=(x) y1=(floor) y2=(floor + 4) {}
            text x=(x) y=(floor + 18) text-anchor=(anchor(at, 4.0)) { (number(value, step)) }
        }
        text.label x="50%" y=(floor + 35) text-anchor="middle" { (axis_label) }
    }
}

/// What a pointer over a bin reads, if all series have the same bins.
fn tips(series: &[Series], axis: &Axis) -> Markup {
    let bins = series.iter().map(|s| s.bins.len()).max().unwrap_or_default();
    let is_same = series.iter().all(|s| s.bins.len() == bins);
    let width = 100.0 / bins.max(1) as f64;
    html! {
        @for bin in 0..if is_same { bins } else { 0 } {
            rect.tip x=(format_args!("{:.3}%", width * bin as f64)) y=(TOP)
                width=(format_args!("{width:.3}%")) height=(PLOT) {
                title {
                    (axis.bin(bin, bins))
                    @for one in series {
                        @let part = one.bins.get(bin).copied().unwrap_or_default();
                        "\n" (one.name) ": " (count(part)) " (" (percent(one.share(bin))) ")"
                    }
                }
            }
        }
    }
}

fn mark(axis: &Axis, value: f32, label: &str) -> Markup {
    let at = axis.x(value.into());
    let x = wide(at);
    html! {
        line.marker x1=(x) x2=(x) y1=(TOP - 5) y2=(TOP + PLOT) {}
        text.marker x=(x) y=(TOP - 9) text-anchor=(anchor(at, 35.0)) { (marked(value, label)) }
    }
}

/// `threshold 0.35`; a long name is cut.
fn marked(value: f32, label: &str) -> String {
    let value = number(value.into(), 0.001);
    format!("{} {value}", cut(label, LABEL))
}

/// Where a text at `x` percent hangs, so that near an end it stays in the picture.
fn anchor(x: f64, margin: f64) -> &'static str {
    if x < margin {
        "start"
    } else if x > 100.0 - margin {
        "end"
    } else {
        "middle"
    }
}

/// The smallest of 1, 2, 5, 10, … (and their tenths) that divides `span` into at most `parts`.
fn nice_step(span: f64, parts: f64) -> f64 {
    let ten = 10f64.powf((span / parts).log10().floor());
    let enough = |step: f64| span / step <= parts * 1.000_001;
    [1.0, 2.0, 5.0].map(|m| m * ten).into_iter().find(|s| enough(*s)).unwrap_or(10.0 * ten)
}

/// A number with the decimals that tell multiples of `step` apart, none of them idle.
pub(super) fn number(value: f64, step: f64) -> String {
    let decimals = (-step.log10()).ceil().clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    if text == "-0" { "0".to_owned() } else { text.replace('-', "−") }
}

/// The picture in words, for who cannot see it.
fn describe(
    title: &str,
    axis_label: &str,
    series: &[Series],
    axis: &Axis,
    marker: Option<(f32, &str)>,
) -> String {
    let end = |value: f64| number(value, axis.span / 100.0);
    let mut text = format!(
        "{title}. Histogram of {axis_label}, {} to {}.",
        end(axis.low),
        end(axis.low + axis.span)
    );
    for one in series {
        let _ = write!(text, " {}: {}", one.name, count(one.total()));
        let (bin, share) = one.peak();
        if share > 0.0 {
            let _ =
                write!(text, ", most ({}) at {}", percent(share), axis.bin(bin, one.bins.len()));
        }
        text.push('.');
    }
    if let Some((value, label)) = marker {
        let _ = write!(text, " Marked: {}.", marked(value, label));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, bins: &[u64]) -> Series {
        Series { name: name.into(), bins: bins.to_vec() }
    }

    #[test]
    fn steps_are_round_and_numbers_short() {
        for (span, parts, step) in [
            (2.0, 6.0, 0.5),
            (1.0, 6.0, 0.2),
            (0.34, 4.0, 0.1),
            (0.8, 4.0, 0.2),
            (600.0, 6.0, 100.0),
        ] {
            assert!((nice_step(span, parts) - step).abs() < 1e-9, "{span} in {parts}");
        }
        assert_eq!(number(0.35, 0.001), "0.35");
        assert_eq!(number(-0.5, 0.5), "−0.5");
        assert_eq!(number(-0.000_000_1, 0.5), "0");
        assert_eq!(number(100.0, 100.0), "100");
        assert_eq!(number(0.025, 0.0025), "0.025");
    }

    #[test]
    fn bars_are_shares_of_their_own_series() {
        let all = [series("right", &[0, 300, 100]), series("wrong", &[1, 3, 0])];
        let html = histogram("Scores", "cosine", &all, (0.0, 0.6), Some((0.3, "threshold")));
        let html = html.to_string();
        // Both peak at 75%, the axis ends at 80%: 62.5 of 1,000 units from the top.
        assert_eq!(html.matches("V62.5H2").count(), 2, "{html}");
        assert!(html.contains("class=\"first\" d=\"M1 1000V62.5H2V687.5H3V1000Z\""));
        assert!(html.contains("<title>0.2 to 0.4\nright: 300 (75.0%)\nwrong: 3 (75.0%)</title>"));
        assert!(html.contains("class=\"marker\" x1=\"50.00%\""));
        assert!(html.contains(
            "aria-label=\"Scores. Histogram of cosine, 0 to 0.6. right: 400, most (75.0%) at \
             0.2 to 0.4. wrong: 4, most (75.0%) at 0.2 to 0.4. Marked: threshold 0.3.\""
        ));
    }

    #[test]
    fn the_axis_holds_both_ends_and_a_marker_outside_stands_at_one() {
        let all = [series("all", &[1; 40])];
        let html = histogram("t", "a", &all, (-1.0, 1.0), Some((7.0, "far"))).to_string();
        for tick in [
            "x=\"0.00%\" y=\"230\" text-anchor=\"start\">−1<",
            "x=\"50.00%\" y=\"230\" text-anchor=\"middle\">0<",
            "x=\"100.00%\" y=\"230\" text-anchor=\"end\">1<",
        ] {
            assert!(html.contains(tick), "{tick}\n{html}");
        }
        assert!(html.contains("class=\"marker\" x1=\"100.00%\""));
        assert!(marked(0.5, &"é".repeat(100)).ends_with("é… 0.5"));
    }

    #[test]
    fn nothing_to_show_is_said() {
        let one = [series("all", &[1])];
        for (all, range) in [
            (&[][..], (0.0, 1.0)),
            (&[series("none", &[0, 0])][..], (0.0, 1.0)),
            (&[series("none", &[])][..], (0.0, 1.0)),
            (&one[..], (1.0, 1.0)),
            (&one[..], (f32::NAN, 1.0)),
            (&one[..], (0.0, f32::INFINITY)),
        ] {
            let html = histogram("t", "a", all, range, None).to_string();
            assert!(html.contains("no values to show") && !html.contains("role=\"img\""), "{html}");
        }
        let html = histogram("t", "a", &one, (0.0, 1.0), Some((f32::NAN, "m"))).to_string();
        assert!(!html.contains("NaN") && !html.contains("marker"), "{html}");
    }
}
