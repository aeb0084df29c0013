//! Keeps passwords out of messages.

use config::ConfigError;

/// A URL without its password, for logs and messages.
pub fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "(not a URL)".to_owned() };
    // The last `@` of all: a password that was not escaped may hold a `/` or a `?`.
    match rest.rfind('@') {
        None => format!("{scheme}://{rest}"),
        Some(at) => {
            let user = rest[..at].split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:***{}", &rest[at..])
        }
    }
}

/// A text that may quote URLs, without what stands between a scheme and the last `@` of its line.
pub fn hidden(text: &str) -> String {
    let line = |line: &str| {
        let begin = ["://", "amqp:", "amqps:"]
            .iter()
            .filter_map(|mark| line.find(mark).map(|at| at + mark.len()))
            .min();
        match (begin, line.rfind('@')) {
            (Some(begin), Some(end)) if begin <= end => {
                format!("{}***{}", &line[..begin], &line[end..])
            }
            _ => line.to_owned(),
        }
    };
    text.split_inclusive('\n').map(line).collect()
}

/// What is wrong with the settings. Values of a wrong type and lines of a file are not quoted, since
/// they may hold a password.
pub(super) fn told(error: &ConfigError) -> String {
    let place = |key: &Option<String>, origin: &Option<String>| {
        let key = key.as_ref().map(|key| format!(" for key `{key}`")).unwrap_or_default();
        let origin = origin.as_ref().map(|origin| format!(" in {origin}")).unwrap_or_default();
        format!("{key}{origin}")
    };
    let text = match error {
        ConfigError::At { error, origin, key } => {
            format!("{}{}", told(error), place(key, origin))
        }
        ConfigError::FileParse { uri, cause } => {
            let cause = without_source(&cause.to_string());
            format!("{cause}{}", place(&None, uri))
        }
        other => without_value(&other.to_string()),
    };
    hidden(&text)
}

/// `invalid type: string "secret", expected u16` without the string.
fn without_value(text: &str) -> String {
    let parts = ["invalid type: ", "invalid value: "].into_iter().find_map(|begin| {
        let (found, expected) = text.strip_prefix(begin)?.rsplit_once(", expected ")?;
        let kind = found.split(['"', '`']).next().unwrap_or_default().trim_end();
        Some(format!("{begin}{kind}, expected {expected}"))
    });
    parts.unwrap_or_else(|| text.to_owned())
}

/// What TOML's parser says, without the line that it shows: `3 | url = "amqp://…`.
fn without_source(text: &str) -> String {
    let source = |line: &str| {
        line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).starts_with([' ', '|'])
            && line.contains('|')
    };
    let kept: Vec<&str> =
        text.lines().map(str::trim_end).filter(|l| !l.is_empty() && !source(l)).collect();
    kept.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_its_password() {
        assert_eq!(redacted("amqp://u:p@ss@h:5672/v"), "amqp://u:***@h:5672/v");
        assert_eq!(redacted("amqp://h/v"), "amqp://h/v");
        assert_eq!(redacted("http://u:p/w?d@h:4318/v1"), "http://u:***@h:4318/v1");
        assert_eq!(redacted("secret"), "(not a URL)");
    }

    #[test]
    fn a_quoted_url_loses_user_and_password() {
        for (text, without) in [
            ("no `http://u:p@h/v` there", "no `http://***@h/v` there"),
            ("\"amqp://u:p@ss/@h\", \"amqp://u:q@i\"", "\"amqp:***@i\""),
            ("amqp:u:p@h\nmore @ here\n", "amqp:***@h\nmore @ here\n"),
            ("a@b", "a@b"),
            ("a@b http://c", "a@b http://c"),
        ] {
            assert_eq!(hidden(text), without);
        }
    }

    #[test]
    fn values_of_a_wrong_type_are_left_out() {
        for (text, without) in [
            (
                "invalid type: string \"a, expected b\", expected u16",
                "invalid type: string, expected u16",
            ),
            (
                "invalid value: integer `-5`, expected u16 for key `a`",
                "invalid value: integer, expected u16 for key `a`",
            ),
            ("invalid type: map, expected a string", "invalid type: map, expected a string"),
            ("another", "another"),
        ] {
            assert_eq!(without_value(text), without);
        }
    }

    #[test]
    fn lines_of_a_file_are_left_out() {
        let text = "TOML parse error at line 12, column 7\n   |\n12 | url = \"secret | x\n   |       \
                    ^^^\ninvalid basic string\n";
        assert_eq!(
            without_source(text),
            "TOML parse error at line 12, column 7: invalid basic string"
        );
    }
}
