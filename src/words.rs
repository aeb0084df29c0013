//! Words of the sentences that people read.

use std::fmt::Display;

/// `1 image`, `2 images`.
pub(crate) fn plural<N: Display + PartialEq + From<u8>>(count: N, what: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {what}{ending}")
}
