//! The pictures of a page, each fetched once, and what became of those that are not there.

use std::collections::{BTreeMap, HashMap};

use angler_report::count;
use angler_wire::error::ImageErrorCode;

use super::summary::{Example, Summary};
use crate::app::App;
use crate::commands::thumbnails::{Thumbnail, thumbnails};

/// How many of the least certain images, and of the unknown ones, have a picture.
pub(super) const LEAST_CERTAIN: usize = 36;
pub(super) const UNKNOWN: usize = 24;

/// Small JPEGs by URI.
pub(super) struct Pictures(HashMap<String, Thumbnail>);

/// The images with a picture.
fn shown(summary: &Summary) -> impl Iterator<Item = &Example> {
    let of_classes = summary.classes.iter().flat_map(|class| &class.sample);
    of_classes
        .chain(summary.least_certain.first.iter().take(LEAST_CERTAIN))
        .chain(summary.unknown_images.first.iter().take(UNKNOWN))
}

impl Pictures {
    pub(super) async fn fetch(app: &App, summary: &Summary) -> Self {
        let mut uris: Vec<&str> = shown(summary).map(|example| example.uri.as_str()).collect();
        uris.sort_unstable();
        uris.dedup();
        let made = thumbnails(app, &uris).await;
        Self(uris.into_iter().map(str::to_owned).zip(made).collect())
    }

    /// What a card shows: the reason why there is no picture is told once for all.
    pub(super) fn of(&self, uri: &str) -> Result<Vec<u8>, String> {
        match self.0.get(uri) {
            Some(Ok(jpeg)) => Ok(jpeg.clone()),
            Some(Err(_)) | None => Err("no picture".to_owned()),
        }
    }

    /// How many pictures are not there, why, and one of them as an example.
    pub(super) fn missing(&self) -> Option<String> {
        let missing = || self.0.iter().filter_map(|(uri, made)| Some((uri, made.as_ref().err()?)));
        let (uri, error) = missing().min_by_key(|(uri, _)| *uri)?;
        let mut codes = BTreeMap::<ImageErrorCode, u64>::new();
        missing().for_each(|(_, error)| *codes.entry(error.code).or_default() += 1);
        let counted: Vec<String> =
            codes.iter().map(|(code, n)| format!("{code} {}", count(*n))).collect();
        Some(format!(
            "{} of {} pictures are not there ({}); for example {uri}: {}",
            count(codes.values().sum()),
            count(self.0.len() as u64),
            counted.join(", "),
            error.message
        ))
    }
}

#[cfg(test)]
mod tests {
    use angler_wire::error::ImageError;

    use super::*;

    #[test]
    fn what_is_missing_is_said_once() {
        let gone = |code| Err(ImageError::new(code, "gone"));
        let (missing, denied) = (ImageErrorCode::NotFound, ImageErrorCode::AccessDenied);
        let made =
            [("a", Ok(vec![1])), ("b", gone(missing)), ("c", gone(denied)), ("d", gone(missing))];
        let pictures = Pictures(made.map(|(uri, made)| (uri.to_owned(), made)).into());
        assert_eq!(
            pictures.missing().unwrap(),
            "3 of 4 pictures are not there (not_found 2, access_denied 1); for example b: gone"
        );
        assert_eq!((pictures.of("a"), pictures.of("b").is_err()), (Ok(vec![1]), true));
        assert_eq!(Pictures(HashMap::new()).missing(), None);
    }
}
