//! `active.json`: which version of a set is active.

use serde::{Deserialize, Serialize};

use angler_wire::job::{NameError, check_name};

/// Why an `active.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActiveError {
    /// Not its JSON.
    #[error("not readable")]
    Json(#[from] serde_json::Error),
    /// The active version is not a name.
    #[error("`version`")]
    Version(#[source] NameError),
    /// The version before it is not a name.
    #[error("`previous`")]
    Previous(#[source] NameError),
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// The active version.
    pub version: String,
    /// SHA-256 of its file; a file with another is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The version that was active before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// When it became active, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activated_at: Option<String>,
    /// Who activated it, for people: user and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activated_by: Option<String>,
}

impl Active {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ActiveError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ActiveError> {
        let active: Self = serde_json::from_slice(bytes)?;
        check_name(&active.version).map_err(ActiveError::Version)?;
        if let Some(previous) = &active.previous {
            check_name(previous).map_err(ActiveError::Previous)?;
        }
        Ok(active)
    }
}

impl AsRef<Active> for Active {
    fn as_ref(&self) -> &Active {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_tools_write_is_read() {
        let active = Active::parse(br#"{"version": "7", "note": "by hand"}"#).unwrap();
        assert_eq!((active.version.as_str(), active.sha256), ("7", None));
        let all = br#"{"version":"7","sha256":"ab","previous":"6","activated_at":"t"}"#;
        assert_eq!(Active::parse(all).unwrap().previous.as_deref(), Some("6"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["{", "[]", "{}", r#"{"version": "../7"}"#, r#"{"version":"7","previous":"/"}"#]
        {
            assert!(Active::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
