//! `angler completions` and `angler man`: what they write works where it is used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn angler(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_angler")).args(arguments).output().unwrap()
}

fn printed(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn script(shell: &str) -> String {
    printed(angler(&["completions", shell]))
}

/// Whether there is a program of this name.
fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// What a bash that has read the script offers for the last word.
fn completed(script: &Path, words: &[&str]) -> BTreeSet<String> {
    let program = r#"
        source "$1"; shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        _angler angler "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let output = Command::new("bash")
        .args(["--norc", "-euc", program, "bash"])
        .arg(script)
        .args(words)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    printed(output).lines().map(str::to_owned).collect()
}

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("angler");
    std::fs::write(&path, script("bash")).unwrap();
    assert!(Command::new("bash").arg("-n").arg(&path).status().unwrap().success());
    assert_eq!(completed(&path, &["angler", "cl"]), set(&["classes", "classify"]));
    assert_eq!(completed(&path, &["angler", "classes", "ro"]), set(&["rollback"]));
    assert_eq!(completed(&path, &["angler", "dead", "list", "--rea"]), set(&["--reason"]));
    let backends = completed(&path, &["angler", "worker", "--backend", ""]);
    assert_eq!(backends, set(&["auto", "cuda", "tensorrt", "onnxruntime", "tract"]));
    let shells = completed(&path, &["angler", "completions", ""]);
    assert!(shells.is_superset(&set(&["bash", "zsh", "fish"])), "{shells:?}");
}

#[test]
fn scripts_for_zsh_and_fish_know_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for (shell, first) in [("zsh", "#compdef angler"), ("fish", "")] {
        let script = script(shell);
        assert!(script.starts_with(first), "{shell}");
        for command in [
            "classify",
            "worker",
            "classes",
            "rollback",
            "redrive",
            "default-settings",
            "completions",
            "man",
        ] {
            assert!(script.contains(command), "{shell}: {command}");
        }
        if have(shell) {
            let path = folder.path().join(shell);
            std::fs::write(&path, script).unwrap();
            assert!(
                Command::new(shell).arg("-n").arg(&path).status().unwrap().success(),
                "{shell}"
            );
        }
    }
    assert_eq!(angler(&["completions", "tcsh"]).status.code(), Some(2));
}

/// The subcommands that a command's help lists.
fn subcommands(path: &[&str]) -> Vec<String> {
    let help = printed(angler(&[path, &["--help"]].concat()));
    let Some((_, rest)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    let lines = rest.lines().take_while(|line| !line.is_empty());
    // What goes on from the line before is indented further.
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help").map(str::to_owned).collect()
}

fn pages(folder: &Path) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_command_has_a_man_page_that_groff_reads_without_a_warning() {
    let parent = tempfile::tempdir().unwrap();
    let folder: PathBuf = parent.path().join("man/man1"); // It is made.
    assert_eq!(printed(angler(&["man", folder.to_str().unwrap()])), "");
    let mut expected = set(&["angler.1"]);
    for command in subcommands(&[]) {
        expected
            .extend(subcommands(&[&command]).iter().map(|sub| format!("angler-{command}-{sub}.1")));
        expected.insert(format!("angler-{command}.1"));
    }
    assert!(expected.len() > 20, "{expected:?}");
    assert_eq!(pages(&folder), expected);
    for page in &expected {
        let text = std::fs::read_to_string(folder.join(page)).unwrap();
        assert!(text.contains(&format!(".TH {} 1", page.trim_end_matches(".1"))), "{page}");
        assert!(text.contains(".SH DESCRIPTION") && text.contains("angler"), "{page}");
        if have("groff") {
            // -k: UTF-8, as `man` tells it.
            let groff = Command::new("groff")
                .args(["-k", "-man", "-Tutf8", "-ww", "-z"])
                .arg(folder.join(page))
                .output();
            let warnings = groff.unwrap().stderr;
            assert_eq!(String::from_utf8_lossy(&warnings), "", "{page}");
        }
    }
    // The first page leads to all the others.
    let first = std::fs::read_to_string(folder.join("angler.1")).unwrap();
    for command in subcommands(&[]) {
        assert!(
            first.contains(&format!("angler\\-{}(1)", command.replace('-', "\\-"))),
            "{command}"
        );
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = angler(&["man", file.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains(file.to_str().unwrap()), "{error}");
}

/// They are for the first minute with angler, when settings may be wrong yet.
#[test]
fn neither_reads_settings() {
    let output = Command::new(env!("CARGO_BIN_EXE_angler"))
        .args(["completions", "bash"])
        .env("ANGLER__NO__SUCH", "setting")
        .output()
        .unwrap();
    assert!(printed(output).contains("_angler()"));
}
