//! `/`: what `/status` says, for people; one page with its style and its script inside.
//!
//! Text that comes from elsewhere (URIs, messages) is set as text by the script, never as markup, and
//! the state that the page begins with lies in an element that the browser does not run. The policy
//! lets nothing run but this script, by its digest, and nothing load but `/status`.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;
use sha2::{Digest, Sha256};

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
    let html = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                link rel="icon" href="data:,";
                title { "angler worker" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "angler " span #worker { "worker" } }
                    p #state .state role="status" {}
                    p #why .why {}
                }
                noscript {
                    p { "Without JavaScript: the state when this page was loaded." }
                    pre { (plain) }
                }
                (sections())
                footer {
                    @for link in ["/status", "/metrics", "/readyz", "/livez"] {
                        a href=(link) { (link) } " "
                    }
                    span #fresh {}
                }
                script #now type="application/json" { (PreEscaped(state)) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    html.into_string()
}

/// The places that the script fills.
fn sections() -> Markup {
    let listed = |heading: &str, what: &str| {
        html! {
            section {
                h2 { (heading) }
                p.note id={ "no-" (what) } hidden {}
                ul.list id=(what) {}
            }
        }
    };
    html! {
        main #main hidden {
            dl #facts .facts {}
            div.halves {
                section {
                    h2 { "Where images spend their time" }
                    p #waits .note {}
                    dl #steps .bars {}
                }
                section {
                    h2 { "Batches" }
                    p #fill .note {}
                    dl #batches .bars {}
                }
            }
            (listed("Class vectors served", "classes"))
            (listed("Last errors", "errors"))
            section {
                h2 { "What runs" }
                dl #about .about {}
            }
        }
    }
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
