//! What was found, a line each, for people and as JSON.

use std::fmt::Write;

use serde::Serialize;

use angler_wire::text::plural;

use crate::commands::tables::plain;

/// Columns of a terminal.
const WIDTH: usize = 80;
/// Where a finding's text begins: behind its state.
const INDENT: usize = 11;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Nothing to do.
    Ok,
    /// It works, and not as somebody may think.
    Warning,
    /// A worker will not start, or will not do its work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    /// What it belongs to; set by [`Report::add`].
    section: &'static str,
    /// What was looked at: a setting, a queue, a bucket, a set.
    pub name: String,
    pub state: State,
    /// What was found.
    pub message: String,
    /// What to do. Lines that begin with two spaces are commands.
    pub remedy: Option<String>,
}

impl Check {
    pub(super) fn ok(name: impl Into<String>, message: impl Into<String>) -> Self {
        let (name, message) = (name.into(), message.into());
        Self { section: "", name, state: State::Ok, message, remedy: None }
    }

    pub(super) fn warning(
        name: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Warning, remedy: Some(remedy.into()), ..Self::ok(name, message) }
    }

    pub(super) fn problem(
        name: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Problem, ..Self::warning(name, message, remedy) }
    }
}

/// Everything that was found.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    checks: Vec<Check>,
    pub problems: usize,
    warnings: usize,
}

impl Report {
    /// Adds what was found about one section.
    pub(super) fn add(&mut self, section: &'static str, checks: Vec<Check>) {
        for mut check in checks {
            check.section = section;
            // Brokers, stores and files are quoted, and could rewrite the screen.
            check.name = plain(&check.name);
            check.message = plain(&check.message);
            check.remedy = check.remedy.map(|remedy| plain(&remedy));
            self.problems += usize::from(check.state == State::Problem);
            self.warnings += usize::from(check.state == State::Warning);
            self.checks.push(check);
        }
    }

    /// For people; `colours` if a terminal shows them.
    pub(super) fn text(&self, colours: bool) -> String {
        let mut text = String::new();
        let mut section = "";
        for check in &self.checks {
            if check.section != section {
                let space = if section.is_empty() { "" } else { "\n" };
                section = check.section;
                let _ = writeln!(text, "{space}{}", bold(section, colours));
            }
            let state = match check.state {
                State::Ok => paint("ok     ", "32", colours),
                State::Warning => paint("warning", "33", colours),
                State::Problem => paint("problem", "1;31", colours),
            };
            let _ = write!(text, "  {state}  ");
            wrapped(&mut text, &format!("{}: {}", check.name, check.message), INDENT, "");
            if let Some(remedy) = &check.remedy {
                text.push_str(&" ".repeat(INDENT));
                wrapped(&mut text, remedy, INDENT, "→ ");
            }
        }
        let count = |count: usize, what: &str| match count {
            0 => format!("no {what}s"),
            _ => plural(count, what),
        };
        let (problems, warnings) =
            (count(self.problems, "problem"), count(self.warnings, "warning"));
        let _ = writeln!(text, "\n{}", bold(&format!("{problems}, {warnings}"), colours));
        text
    }
}

fn paint(text: &str, code: &str, colours: bool) -> String {
    if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn bold(text: &str, colours: bool) -> String {
    paint(text, "1", colours)
}

/// Writes words behind `mark`, broken at the width; following lines are indented to where the text
/// begins. A command stands on a line of its own, unbroken, so that it can be copied.
fn wrapped(text: &mut String, words: &str, indent: usize, mark: &str) {
    text.push_str(mark);
    let indent = indent + mark.chars().count();
    let fresh = format!("\n{}", " ".repeat(indent));
    for (number, line) in words.lines().enumerate() {
        if number > 0 {
            text.push_str(&fresh);
        }
        if let Some(command) = line.strip_prefix("  ") {
            let _ = write!(text, "  {command}");
            continue;
        }
        let mut column = indent;
        for (position, word) in line.split_whitespace().enumerate() {
            let length = word.chars().count();
            if position > 0 && column + 1 + length > WIDTH {
                text.push_str(&fresh);
                column = indent;
            } else if position > 0 {
                text.push(' ');
                column += 1;
            }
            text.push_str(word);
            column += length;
        }
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        let long = "words that go on ".repeat(10);
        let command = format!("do this:\n  run {}", "x".repeat(90));
        report.add("broker", vec![Check::ok("a", "fine"), Check::warning("b", &*long, &*long)]);
        report.add("store", vec![Check::problem("c\x1b[2J", "bad\x1b[2J", command)]);
        report
    }

    #[test]
    fn lines_keep_to_the_width_but_for_commands() {
        let text = report().text(false);
        for line in text.lines().filter(|line| !line.contains("run xxx")) {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        assert!(text.contains(&format!("run {}", "x".repeat(90))), "{text}");
        assert!(text.starts_with("broker\n  ok       a: fine\n  warning  b: words"), "{text}");
        assert!(text.ends_with("\n1 problem, 1 warning\n"), "{text}");
    }

    #[test]
    fn what_is_quoted_cannot_rewrite_the_screen() {
        assert!(!report().text(false).contains('\x1b'));
        assert!(report().text(true).contains("\x1b[1;31mproblem\x1b[0m"));
    }
}
