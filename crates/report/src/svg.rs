//! What the charts have in common.

use maud::{Markup, html};

/// Returns a share of a chart's width, as an attribute.
pub(super) fn wide(percent: f64) -> String {
    format!("{percent:.2}%")
}

/// Draws the sample of a colour in a legend.
pub(super) fn swatch(class: &str) -> Markup {
    html! {
        svg.swatch aria-hidden="true" { rect class=(class) width="100%" height="100%" {} }
    }
}

/// Draws the frame of a chart around its parts; `label` is the chart in words.
pub(super) fn plot(label: &str, height: u32, parts: &Markup) -> Markup {
    html! {
        svg.plot role="img" aria-label=(label) width="100%" height=(height) { (parts) }
    }
}

/// Stands in the place of a chart.
pub(super) fn no_values() -> Markup {
    html! { p.note { "There are no values to show." } }
}
