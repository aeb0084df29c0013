//! Pictures with captions, in a grid.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use maud::{Markup, html};

use super::{Html, count, note};

/// The most cards of a gallery: about 4 MB of thumbnails. Nobody looks at more.
const CARDS: usize = 500;

/// Whether what a card shows is as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Tone {
    /// In the accent colour.
    Good,
    /// In the colour of errors, with a heavier line.
    Bad,
    /// Neither.
    Neutral,
}

/// One picture and what there is to say of it.
#[derive(Debug, Clone)]
pub struct Card {
    /// A small JPEG, as [`thumbnail`](super::thumbnail()) makes them; or why there is none, which is
    /// shown in its place.
    pub thumbnail: Result<Vec<u8>, String>,
    /// Where the image is from; what follows the last `/` is shown as its name.
    pub uri: String,
    /// Name and value, a line each.
    pub lines: Vec<(String, String)>,
    /// How the card looks.
    pub tone: Tone,
}

/// The cards, as many side by side as there is room for. Of more than 500 the first are shown, and a
/// note says how many more there are: put first what must be seen.
pub fn gallery(cards: &[Card]) -> Html {
    let html = Html(html! {
        ul.gallery { @for card in cards.iter().take(CARDS) { (one(card)) } }
    });
    match cards.len().saturating_sub(CARDS) {
        0 => html,
        more => html.and(note(&format!("… and {} more", count(more as u64)))),
    }
}

fn one(card: &Card) -> Markup {
    let class: &str = card.tone.into();
    let (folder, name) = parts(&card.uri);
    html! {
        li class=(class) {
            @match &card.thumbnail {
                Ok(jpeg) => {
                    div.picture {
                        img alt=(name) decoding="async"
                            src={ "data:image/jpeg;base64," (STANDARD.encode(jpeg)) };
                    }
                }
                Err(why) => { div.picture.none { p { (why) } } }
            }
            p.uri title=(card.uri) { b { (name) } " " span { (folder) } }
            @if !card.lines.is_empty() {
                dl {
                    @for (label, value) in &card.lines {
                        div title={ (label) ": " (value) } { dt { (label) } dd { (value) } }
                    }
                }
            }
        }
    }
}

/// A URI as folder and name: the name is what tells images of one folder apart.
fn parts(uri: &str) -> (&str, &str) {
    match uri.rsplit_once('/') {
        Some((_, "")) | None => ("", uri),
        Some((folder, name)) => (folder, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_a_folder_and_a_name() {
        assert_eq!(parts("s3://b/x/y.jpg"), ("s3://b/x", "y.jpg"));
        assert_eq!(parts("y.jpg"), ("", "y.jpg"));
        assert_eq!(parts("s3://b/x/"), ("", "s3://b/x/"));
        assert_eq!(parts(""), ("", ""));
    }

    #[test]
    fn a_long_gallery_ends_and_says_so() {
        let card = Card {
            thumbnail: Err("not_found: no such key".into()),
            uri: "s3://b/a.jpg".into(),
            lines: vec![("label".into(), "cola".into())],
            tone: Tone::Neutral,
        };
        let html = gallery(&vec![card; CARDS + 1_200]).to_string();
        assert_eq!(html.matches("<li ").count(), CARDS);
        assert!(html.contains("… and 1,200 more"));
        assert!(html.contains("not_found: no such key"));
    }
}
