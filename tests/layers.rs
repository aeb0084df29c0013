//! The layers of ARCHITECTURE.md, read off the source as text.
//!
//! Every module under `src/` has a layer, and names only modules of its own layer or below:
//!
//! 1. **values**: what things are. No tokio, nothing that reads a file, a socket or the environment.
//! 2. **ports**: the four traits, and the folder of the model that an embedder is opened from.
//! 3. **core**: the job's way. It names no adapter and no settings.
//! 4. **adapters**: what speaks to a broker, a store, a disk or a GPU.
//! 5. **top**: settings, commands, and the one place that puts the parts together.
//!
//! Unit tests (`#[cfg(test)]` at a file's end) and comments may name anything.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Values,
    Ports,
    Core,
    Adapters,
    Top,
}

use Layer::{Adapters, Core, Ports, Top, Values};

/// A module has the layer of the longest path here that is its own or an ancestor's, except that
/// below a port everything is an adapter.
const LAYERS: &[(&str, Layer)] = &[
    ("error", Values),
    ("job", Values),
    ("score", Values),
    ("retry", Values),
    ("preprocess", Values),
    ("classes", Values),
    ("classes::file", Values),
    ("classes::vectors", Values),
    ("classes::active", Values),
    ("classes::shadow", Values),
    ("classes::neighbours", Values),
    ("control", Values),
    ("words", Values),
    ("classes::load", Core),
    ("classes::publish", Core),
    ("classes::evaluate", Values),
    ("classes::calibrate", Values),
    ("classes::compare", Values),
    ("classes::statistics", Values),
    ("classes::embedded", Values),
    ("classes::medoids", Values),
    ("classes::outliers", Values),
    // An image's time, which the store's adapters stop while they make it wait.
    ("stopwatch", Ports),
    // How much a worker holds: images in the core, deliveries in the broker's adapter.
    ("pace", Ports),
    ("source", Ports),
    ("store", Ports),
    ("sink", Ports),
    ("embed", Ports),
    // What an embedder runs: read from a folder, and the graph in it edited.
    ("model", Ports),
    ("worker", Core),
    ("pipeline", Core),
    ("outage", Core),
    ("watchdog", Core),
    ("engine", Core),
    // Recorded by all of these; exposed by `health`.
    ("metrics", Core),
    // Made by the worker and the engine; sent by `telemetry`.
    ("trace", Core),
    ("classes::catalog", Core),
    ("classes::build", Core),
    ("amqp", Adapters),
    // Runs: through the broker, on disk.
    ("bulk", Adapters),
    // Reads certificates, for the broker's and the store's adapter.
    ("tls", Adapters),
    // Served over HTTP, and told by the AMQP source whether jobs are consumed.
    ("health", Adapters),
    ("lib", Top),
    ("main", Top),
    ("cli", Top),
    ("app", Top),
    ("config", Top),
    ("page", Top),
    ("shutdown", Top),
    ("telemetry", Top),
];

/// Modules that name one above them, and why that is right.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("embed", "embed::onnxruntime", "`embed::open` chooses among the back ends"),
    ("embed", "embed::tract", "`embed::open` chooses among the back ends"),
    ("model::graph", "tract_onnx::pb", "a graph is edited as protobuf, and these are its types"),
    ("model::fused", "tract_onnx::pb", "a graph is edited as protobuf, and these are its types"),
];

/// Paths of other crates that a layer and all below it do without.
const FORBIDDEN: &[(&str, Layer, &str)] = &[
    ("tokio", Values, "values are plain data and pure functions"),
    ("std::fs", Values, "values are plain data and pure functions"),
    ("std::net", Values, "values are plain data and pure functions"),
    ("std::env", Values, "values are plain data and pure functions"),
    ("std::process", Values, "values are plain data and pure functions"),
    ("std::thread", Values, "values are plain data and pure functions"),
    ("async_trait", Values, "values are plain data and pure functions"),
    ("lapin", Core, "only adapters know the broker"),
    ("aws_sdk_s3", Core, "only adapters know S3"),
    ("aws_config", Core, "only adapters know S3"),
    ("axum", Core, "only adapters know HTTP"),
    ("opentelemetry", Ports, "spans are made in `trace`"),
    ("opentelemetry_sdk", Adapters, "where spans go is decided at the top"),
    ("opentelemetry_otlp", Adapters, "where spans go is decided at the top"),
    ("ort", Core, "only adapters know ONNX Runtime"),
    ("tract_onnx", Core, "only adapters know tract"),
    ("anyhow", Adapters, "errors are closed sets, but at the edge"),
    ("indicatif", Adapters, "only commands talk to a person"),
    ("comfy_table", Adapters, "only commands talk to a person"),
];

/// The module that a path leads to: as many of its segments as there is a file for.
fn module_of<'a>(path: &'a str, modules: &BTreeMap<String, PathBuf>) -> &'a str {
    let ends = path.match_indices("::").map(|(end, _)| end).chain([path.len()]);
    ends.map(|end| &path[..end]).filter(|m| modules.contains_key(*m)).last().unwrap_or("lib")
}

fn layer(module: &str) -> Option<Layer> {
    let path: Vec<&str> = module.split("::").collect();
    let known = |path: &str| LAYERS.iter().find(|(m, _)| *m == path).map(|(_, layer)| *layer);
    let (depth, found) =
        (1..=path.len()).rev().find_map(|n| Some((n, known(&path[..n].join("::"))?)))?;
    let below_a_port = depth < path.len() && found == Ports && !module.starts_with("model::");
    Some(if below_a_port { Adapters } else { found })
}

/// A path that a module names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    line: usize,
    path: String,
}

/// The source without comments, string literals and the unit tests at its end; lines are kept.
fn code(source: &str) -> String {
    let tests = source.find("\n#[cfg(test)]\nmod ").unwrap_or(source.len());
    let mut code = String::new();
    for line in source[..tests].lines() {
        let mut in_text = false;
        let mut previous = ' ';
        for c in line.chars() {
            match c {
                '"' if previous != '\\' && previous != '\'' => in_text = !in_text,
                '/' if !in_text && previous == '/' => {
                    code.pop();
                    break;
                }
                _ if in_text => {}
                _ => code.push(c),
            }
            previous = c;
        }
        code.push('\n');
    }
    code
}

/// Every path of at least two segments, as absolute as it can be made: of a module of this crate
/// (`crate::`, `super::`, `self::`, `angler::`, a child module), else as written.
fn paths(module: &str, code: &str) -> Vec<Named> {
    let children: Vec<&str> = code
        .lines()
        .filter_map(|line| line.trim().trim_start_matches("pub ").strip_prefix("mod "))
        .filter_map(|rest| rest.strip_suffix(';'))
        .collect();
    let ident = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = code[at..].find(ident).map(|i| i + at) {
        let end = code[start..].find(|c| !ident(c)).map_or(code.len(), |i| i + start);
        at = end;
        if !code[end..].starts_with("::") || code[..start].ends_with("::") {
            continue;
        }
        let line = code[..start].lines().count().max(1);
        let line = if code[..start].ends_with('\n') { line + 1 } else { line };
        let mut all = Vec::new();
        at = end.max(tree(code, start, "", &mut all));
        for path in all {
            found.push(Named { line, path: absolute(module, &children, &path) });
        }
    }
    found
}

/// Reads `a::b::{c, d::e}` from `start`, as far as it goes; yields where it ended.
fn tree(code: &str, start: usize, prefix: &str, all: &mut Vec<String>) -> usize {
    let ident = |c: char| c.is_alphanumeric() || c == '_';
    let end = code[start..].find(|c| !ident(c)).map_or(code.len(), |i| i + start);
    let path = match prefix {
        "" => code[start..end].to_owned(),
        _ => format!("{prefix}::{}", &code[start..end]),
    };
    let Some(rest) = code[end..].strip_prefix("::") else {
        all.push(path);
        return end;
    };
    let after = end + 2;
    if rest.starts_with(ident) {
        return tree(code, after, &path, all);
    }
    if !rest.starts_with('{') {
        all.push(path); // a glob, a turbofish
        return after;
    }
    let mut at = after + 1;
    while let Some(next) = code[at..].find(|c| c == '}' || ident(c)).map(|i| i + at) {
        if code[next..].starts_with('}') {
            return next + 1;
        }
        at = tree(code, next, &path, all);
    }
    code.len()
}

fn absolute(module: &str, children: &[&str], path: &str) -> String {
    let mut base: Vec<&str> = module.split("::").filter(|m| *m != "lib" && *m != "main").collect();
    let mut rest: Vec<&str> = path.split("::").collect();
    match rest[0] {
        "crate" | "angler" => base.clear(),
        "self" => {}
        child if children.contains(&child) => rest.insert(0, "self"),
        "super" => {
            while rest.get(1) == Some(&"super") {
                base.pop();
                rest.remove(0);
            }
            base.pop();
        }
        _ => return path.to_owned(),
    }
    base.extend(&rest[1..]);
    format!("crate::{}", base.join("::"))
}

/// What is wrong with a module: a line each, with its place and the rule.
fn violations(
    file: &str,
    module: &str,
    source: &str,
    modules: &BTreeMap<String, PathBuf>,
) -> Vec<String> {
    let Some(own) = layer(module) else {
        return vec![format!("{file}: `{module}` has no layer: give it one in tests/layers.rs")];
    };
    let excepted =
        |path: &str| EXCEPTIONS.iter().any(|(m, t, _)| *m == module && path.starts_with(*t));
    let mut wrong = Vec::new();
    for Named { line, path } in paths(module, &code(source)) {
        if let Some(target) = path.strip_prefix("crate::") {
            let target = module_of(target, modules);
            let Some(its) = layer(target) else { continue };
            if its > own && !excepted(target) {
                wrong.push(format!(
                    "{file}:{line}: `{module}` ({own:?}) names `{target}` ({its:?}): \
                     a layer names only those below it"
                ));
            }
        }
        for (crate_path, layer, why) in FORBIDDEN {
            let names = path == *crate_path || path.starts_with(&format!("{crate_path}::"));
            if names && own <= *layer && !excepted(&path) {
                wrong.push(format!("{file}:{line}: `{module}` ({own:?}) names `{path}`: {why}"));
            }
        }
    }
    wrong
}

/// Every file under `src/` by its module's path.
fn sources() -> BTreeMap<String, PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    walkdir::WalkDir::new(&root)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| {
            let module = path.strip_prefix(&root).unwrap().with_extension("");
            let module = module.to_str().unwrap().replace('/', "::");
            (module.trim_end_matches("::mod").to_owned(), path)
        })
        .collect()
}

#[test]
fn each_layer_names_only_those_below() {
    let sources = sources();
    assert!(sources.len() > 30, "the source is not where this test looks for it");
    let mut wrong = Vec::new();
    for (module, path) in &sources {
        let file = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
        let source = std::fs::read_to_string(path).unwrap();
        wrong.extend(violations(&file, module, &source, &sources));
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn what_is_listed_here_exists_and_is_needed() {
    let sources = sources();
    for (module, _) in LAYERS {
        assert!(sources.contains_key(*module), "LAYERS lists `{module}`, which is gone");
    }
    for (module, target, _) in EXCEPTIONS {
        let source = std::fs::read_to_string(&sources[*module]).unwrap();
        let named = paths(module, &code(&source));
        let needed = named.iter().any(|named| {
            named.path.strip_prefix("crate::").unwrap_or(&named.path).starts_with(target)
        });
        assert!(needed, "EXCEPTIONS lets `{module}` name `{target}`, which it does not");
    }
}

#[test]
fn a_violation_is_found_however_it_is_written() {
    for (module, source, place) in [
        ("worker", "use crate::source::amqp::AmqpSource;\n", 1),
        ("worker", "//! Docs.\n\nuse crate::{job::Job, source::{Delivery, amqp}};\n", 3),
        ("worker", "fn f() {\n    let _ = crate::config::Settings::default();\n}\n", 2),
        ("engine::batcher", "use super::super::amqp::AmqpOptions;\n", 1),
        ("classes::catalog", "use super::super::store::s3;\n", 1),
        ("pipeline", "use crate::{\n    error::ImageError,\n    app,\n};\n", 1),
        ("source", "fn f() { memory::MemoryQueue::default(); }\npub mod memory;\n", 1),
        ("sink::amqp", "use crate::cli::Cli;\n", 1),
        ("score", "use crate::engine::Want;\n", 1),
        ("job", "\n\nfn f() { tokio::spawn(async {}); }\n", 3),
        ("preprocess::decode", "use std::{io, fs::File};\n", 1),
        ("classes", "use crate::classes::catalog::Catalog;\n", 1),
        ("classes::file", "use super::build::Built;\n", 1),
        ("worker", "use lapin::Channel;\n", 1),
        ("store::s3", "use anyhow::Result;\n", 1),
    ] {
        let found = violations("src/x.rs", module, source, &sources());
        assert_eq!(found.len(), 1, "{source}: {found:?}");
        assert!(found[0].starts_with(&format!("src/x.rs:{place}: `{module}`")), "{found:?}");
    }
    let unknown = violations("src/new.rs", "new", "", &sources());
    assert!(unknown[0].contains("has no layer"), "{unknown:?}");
}

#[test]
fn what_is_allowed_is_let_be() {
    for (module, source) in [
        ("worker", "use crate::source::{Delivery, JobSource};\nuse tokio::sync::Semaphore;\n"),
        ("worker", "//! [`crate::source::amqp`]\nfn f() {} // see crate::config::Settings\n"),
        ("worker", "const URL: &str = \"crate::amqp::x // amqp://h\";\n"),
        ("worker", "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::source::memory;\n}\n"),
        ("source::amqp", "use super::{Delivery, JobSource};\nuse crate::amqp::short;\n"),
        ("app", "use crate::{config::Settings, sink::amqp::AmqpSink};\nuse anyhow::Result;\n"),
        ("engine", "mod executor;\nfn f() { executor::spawn(); }\n"),
        ("classes::build", "use super::file::FORMAT;\nuse crate::pipeline::Pipeline;\n"),
        ("classes", "pub mod catalog;\npub mod file;\n"),
    ] {
        assert_eq!(violations("src/x.rs", module, source, &sources()), [""; 0], "{source}");
    }
}
