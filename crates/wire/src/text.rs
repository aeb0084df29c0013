//! Words of the sentences that people read.

use std::error::Error;
use std::fmt::Display;

/// An error with its causes, `cannot read a.toml: permission denied`. Skips a cause that the text
/// holds already: the errors of some libraries say their cause themselves, or end in a line break.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string().trim_end().to_owned();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        let said = said.trim_end();
        if !text.contains(said) {
            text.push_str(": ");
            text.push_str(said);
        }
        next = cause.source();
    }
    text
}

/// `1 image`, `2 images`.
pub fn plural<N: Display + PartialEq + From<u8>>(count: N, what: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {what}{ending}")
}

/// At most so many characters of a text; an ellipsis says that there were more.
pub fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[derive(Debug, thiserror::Error)]
    #[error("{said}")]
    struct Told {
        said: &'static str,
        source: std::io::Error,
    }

    #[test]
    fn a_reason_keeps_the_type_of_its_cause() {
        let reason = Reason::new("cannot write", std::io::Error::other("no disk"));
        assert!(reason.source().is_some_and(|cause| cause.is::<std::io::Error>()));
        assert_eq!(chain(&reason), "cannot write: no disk");
        assert_eq!(chain(&Reason::of(reason)), "cannot write: no disk");
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        let told = |said| chain(&Told { said, source: std::io::Error::other("no disk") });
        assert_eq!(told("cannot write"), "cannot write: no disk");
        assert_eq!(told("cannot write: no disk\n"), "cannot write: no disk");
    }
}
