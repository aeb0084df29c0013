//! The pages for contributors are true: paths and links lead somewhere, the diagram shows the crates
//! as they are, and what CONTRIBUTING.md marks with ✓ holds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use clap::CommandFactory;
use serde_json::Value;

use angler::commands::Cli;

use crate::support::{files, repository};

/// Top-level folders that a path in a text may begin with.
const FOLDERS: [&str; 11] = [
    ".ci", "benches", "crates", "deploy", "docs", "examples", "fuzz", "models", "samples", "src",
    "tests",
];

fn text(path: &str) -> String {
    std::fs::read_to_string(repository(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The pages, relative to the repository.
fn pages() -> Vec<String> {
    let records = std::fs::read_dir(repository("docs/decisions")).unwrap();
    let records = records.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut pages: Vec<String> = records.map(|name| format!("docs/decisions/{name}")).collect();
    pages.extend(["ARCHITECTURE.md", "CONTRIBUTING.md"].map(str::to_owned));
    pages
}

#[test]
fn every_path_that_the_pages_name_exists() {
    let sources = files("crates").into_iter().chain(files("src"));
    let sources: BTreeSet<String> = sources
        .filter_map(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
        .collect();
    let (mut paths, mut names) = (0, 0);
    for page in pages() {
        let text = text(&page);
        let other = |c: char| !(c.is_alphanumeric() || "_-./".contains(c));
        for word in text.split(other).map(|word| word.trim_end_matches(['.', '/'])) {
            match word.split_once('/') {
                Some((folder, _)) if FOLDERS.contains(&folder) => {
                    assert!(repository(word).exists(), "{page} names {word}");
                    paths += 1;
                }
                // A file of the crate that the paragraph is about.
                None if word.ends_with(".rs") => {
                    assert!(sources.contains(word), "{page} names {word}");
                    names += 1;
                }
                _ => {}
            }
        }
    }
    assert!(paths > 100 && names > 20, "only {paths} paths and {names} names were found");
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let mut followed = 0;
    for page in pages() {
        let source = text(&page);
        let folder = Path::new(&page).parent().unwrap();
        for link in source.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            if file.starts_with("http") {
                continue;
            }
            let target = if file.is_empty() { page.clone().into() } else { folder.join(file) };
            let target = repository(target.to_str().unwrap());
            assert!(target.is_file(), "{page}: {link}");
            let target = std::fs::read_to_string(&target).unwrap();
            let mut headings = target.lines().filter(|line| line.starts_with('#')).map(anchor_of);
            assert!(anchor.is_empty() || headings.any(|found| found == anchor), "{page}: {link}");
            followed += 1;
        }
    }
    assert!(followed > 50, "only {followed} links were followed");
}

/// The anchor that GitHub gives a heading.
fn anchor_of(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.chars().filter(kept).collect::<String>().replace(' ', "-")
}

#[test]
fn the_index_lists_every_decision_under_its_title() {
    let index = text("docs/decisions/README.md");
    let listed = index.lines().filter(|line| line.starts_with("- [")).count();
    let records: Vec<String> = pages().into_iter().filter(|page| page.contains("/0")).collect();
    assert_eq!(listed, records.len());
    for record in records {
        let name = record.rsplit('/').next().unwrap();
        let number = &name[..4];
        let text = text(&record);
        let title = text.lines().next().and_then(|line| line.split_once(". ")).unwrap().1;
        assert!(index.contains(&format!("- [{number}]({name}) {title}\n")), "{record}");
        for heading in ["## Context\n", "## Decision\n", "## Consequences\n"] {
            assert!(text.contains(heading), "{record} has no {heading}");
        }
    }
}

/// The crates that each crate names as dependencies, those of its tests excepted.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let crates = std::fs::read_dir(repository("crates")).unwrap();
    let crates = crates.map(|folder| folder.unwrap().file_name().into_string().unwrap());
    let of = |manifest: &str| {
        let manifest: toml::Table = text(manifest).parse().unwrap();
        let names = manifest["dependencies"].as_table().unwrap().keys();
        names.filter_map(|name| name.strip_prefix("angler-").map(str::to_owned)).collect()
    };
    let mut all: BTreeMap<_, _> =
        crates.map(|name| (name.clone(), of(&format!("crates/{name}/Cargo.toml")))).collect();
    all.insert("program".to_owned(), of("Cargo.toml"));
    all
}

#[test]
fn the_diagram_shows_the_crates_as_they_are() {
    let page = text("ARCHITECTURE.md");
    let diagram = page.split("```mermaid").nth(1).and_then(|rest| rest.split("```").next());
    let mut arrows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in diagram.unwrap().lines().filter_map(|line| line.split_once("-->")) {
        let from = from.trim().split('[').next().unwrap();
        arrows.entry(from).or_default().insert(to.trim());
    }
    let below = |top: &str| {
        let (mut found, mut next) = (BTreeSet::new(), vec![top.to_owned()]);
        while let Some(name) = next.pop() {
            let names = arrows.get(name.as_str()).into_iter().flatten().map(|to| (*to).to_owned());
            next.extend(names.filter(|name| found.insert(name.clone())));
        }
        found
    };
    for (name, used) in dependencies() {
        let drawn = arrows.get(name.as_str()).cloned().unwrap_or_default();
        for to in &drawn {
            assert!(used.contains(*to), "{name} does not use {to}");
        }
        let (shown, all) = (below(&name), used);
        assert!(shown.is_superset(&all), "{name} uses {all:?}, the diagram shows {shown:?}");
        assert!(!shown.contains(&name), "{name} is in a circle");
    }
}

#[test]
fn every_crate_has_a_paragraph() {
    let page = text("ARCHITECTURE.md");
    for name in dependencies().keys().filter(|name| *name != "program") {
        assert!(page.contains(&format!("\n**`{name}`** ")), "{name} has no paragraph");
    }
}

#[test]
fn image_formats_are_named_where_the_list_says() {
    let limits = angler_pixels::PixelLimits { max_pixels: 1 };
    let refused = angler_pixels::decode(b"no image", limits).unwrap_err().to_string();
    let formats = refused.split_once("supported are ").unwrap().1.replace(" and ", ", ");
    let formats: Vec<&str> = formats.split(", ").collect();
    assert!(formats.len() >= 6, "{formats:?}");
    let (readme, endings) = (text("README.md"), text("src/commands/image_paths.rs"));
    for format in formats {
        assert!(readme.contains(format), "the README does not name {format}");
        let ending = format!("\"{}\"", format.to_lowercase());
        assert!(endings.contains(&ending), "image_paths.rs has no {ending}");
    }
}

#[test]
fn every_field_of_the_messages_has_a_description() {
    fn check(schema: &Value, place: &str) -> usize {
        let Value::Object(schema) = schema else { return 0 };
        let mut fields = 0;
        for (key, value) in schema.iter().filter(|(key, _)| *key != "examples") {
            let place = format!("{place}/{key}");
            let Some(inner) = value.as_object().filter(|_| key == "properties") else {
                let parts = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                fields += parts.iter().map(|part| check(part, &place)).sum::<usize>();
                continue;
            };
            for (name, field) in inner {
                let said =
                    ["description", "$ref", "const"].iter().any(|key| field.get(key).is_some());
                assert!(said || field.is_boolean(), "{place}/{name} has no description");
                fields += 1 + check(field, &place);
            }
        }
        fields
    }
    for name in ["job.v1.json", "result.v1.json"] {
        let schema = serde_json::from_str(&text(&format!("docs/schemas/{name}"))).unwrap();
        assert!(check(&schema, name) > 5, "{name} has no fields");
    }
}

/// Settings that share the comment of the one above, or whose names say everything.
const EXPLAINED: [&str; 6] = [
    "results_queue",
    "dead_queue",
    "control_exchange",
    "client_cert_file",
    "client_key_file",
    "service_name",
];

#[test]
fn every_setting_has_a_comment() {
    let (mut settings, mut above) = (0, "");
    for line in angler::config::DEFAULTS.lines() {
        if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            let said = above.starts_with('#') || EXPLAINED.contains(&key);
            assert!(said, "{key} has no comment above it");
            settings += 1;
        }
        above = line;
    }
    assert!(settings > 40, "only {settings} settings were found");
}

#[test]
fn every_command_has_a_file_and_an_example() {
    let readme = text("README.md");
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        let file = match name {
            "completions" | "man" => "shell.rs".to_owned(),
            "default-settings" => continue, // It prints one file.
            _ => format!("{name}.rs"),
        };
        assert!(repository(&format!("src/commands/{file}")).is_file(), "{name}: no {file}");
        assert!(readme.contains(&format!("angler {name}")), "the README never runs {name}");
    }
}

#[test]
fn every_back_end_is_explained_where_it_is_set() {
    let section = angler::config::DEFAULTS.split("[embedder]").nth(1).unwrap();
    let comment = section.split("backend = ").next().unwrap();
    let cli = Cli::command();
    let backend = cli.get_arguments().find(|argument| argument.get_id() == "backend").unwrap();
    let values = backend.get_possible_values();
    assert!(values.len() >= 5, "{values:?}");
    for value in values {
        let name = value.get_name();
        assert!(comment.contains(name), "the comment does not explain {name}");
    }
}
