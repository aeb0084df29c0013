//! `/`: what `/status` says, for people; one page with its style and its script inside.
//!
//! Text that comes from elsewhere (URIs, messages) is set as text by the script, never as markup, and
//! the state that the page begins with lies in an element that the browser does not run. The policy
//! lets nothing run but this script, by its digest, and nothing load but `/status`.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page.html");
/// Colours and type are those of the pages that commands write.
const STYLE: &str =
    concat!(include_str!("../../crates/report/src/base.css"), include_str!("page.css"));
const SCRIPT: &str = include_str!("page.js");

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digest = STANDARD.encode(Sha256::digest(SCRIPT.as_bytes()));
    format!(
        "default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; \
         connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; \
         frame-ancestors 'self'"
    )
});

/// What the browser may do with it.
pub(super) fn policy() -> &'static str {
    &POLICY
}

/// The page with the state of now.
pub(super) fn html(status: &Value) -> String {
    // No `<` is left, so nothing ends the element or begins another. Inside JSON it stands only in
    // strings, where the escape means the same.
    let state = status.to_string().replace('<', "\\u003c");
    // Without a script it is shown as it is.
    let plain = serde_json::to_string_pretty(status).unwrap_or_default();
    let plain = plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // Each mark is there once, and the last is replaced first: state may hold the marks' text.
    let parts = [("<!--plain-->", plain.as_str()), ("<!--state-->", &state)];
    let mut html = PAGE.replacen("/*style*/", STYLE, 1).replacen("/*script*/", SCRIPT, 1);
    let mut places: Vec<(usize, &str, &str)> = parts
        .iter()
        .filter_map(|(mark, text)| html.find(mark).map(|at| (at, *mark, *text)))
        .collect();
    places.sort_by_key(|(at, ..)| std::cmp::Reverse(*at));
    for (at, mark, text) in places {
        html.replace_range(at..at + mark.len(), text);
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn state_cannot_become_markup() {
        let nasty = "</script><script>alert(1)</script><!--state--><!--plain-->&amp;";
        let page = html(&json!({ "errors": [{ "message": nasty }] }));
        assert_eq!(page.matches("<script").count(), 2, "the state's and our own");
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.contains("&lt;!--state--&gt;&lt;!--plain--&gt;&amp;amp;"), "{page}");
        let state = page.split("type=\"application/json\">").nth(1).unwrap();
        let state: Value = serde_json::from_str(state.split("</script>").next().unwrap()).unwrap();
        assert_eq!(state["errors"][0]["message"], nasty);
        assert!(!page.contains("/*style*/") && !page.contains("/*script*/"));
    }

    #[test]
    fn the_script_makes_no_markup() {
        for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!SCRIPT.contains(forbidden), "{forbidden}");
        }
        assert!(
            policy().contains("script-src 'sha256-") && !policy().contains("script-src 'unsafe")
        );
    }
}
