//! The container files: the Dockerfile has no finding, installs what the README says, and gets all that
//! the build reads and nothing else.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{files, repository};
use crate::{python_tool, said, text};

const DOCKERFILE: &str = "deploy/Dockerfile";

fn hadolint(dockerfile: &std::path::Path) -> (bool, String) {
    said(
        python_tool("hadolint")
            .args(["--no-color", "--failure-threshold", "style"])
            .arg(dockerfile),
    )
}

#[test]
fn the_dockerfile_has_no_finding() {
    assert_eq!(hadolint(&repository(DOCKERFILE)), (true, String::new()));
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("Dockerfile");
    std::fs::write(&broken, text(DOCKERFILE).replace("debian:12-slim", "debian")).unwrap();
    let (passed, found) = hadolint(&broken);
    assert!(!passed && found.contains("DL3006"), "{found}");
}

#[test]
fn both_images_ask_the_worker_for_its_health_and_tell_nobody_that_they_run() {
    let dockerfile = text(DOCKERFILE);
    for target in ["AS cpu", "AS cuda"] {
        let (_, stage) = dockerfile.split_once(target).unwrap();
        let stage = stage.split("\nFROM ").next().unwrap();
        assert!(stage.contains(r#"CMD ["/usr/local/bin/angler", "probe"]"#), "{target}");
        assert!(stage.contains("ORT_DISABLE_TELEMETRY=1"), "{target}");
    }
}

#[test]
fn images_hold_the_onnx_runtime_that_the_readme_installs() {
    let (readme, dockerfile) = (text("README.md"), text(DOCKERFILE));
    let installed: Vec<&str> = readme
        .lines()
        .filter_map(|line| line.split_once("bin/pip install "))
        .map(|(_, package)| package.trim())
        .filter(|package| package.contains("onnxruntime"))
        .collect();
    assert_eq!(installed.len(), 2, "{installed:?}");
    for package in installed {
        let line = dockerfile.lines().find(|line| line.ends_with(&format!(" {package}")));
        assert!(line.is_some(), "{DOCKERFILE} does not install {package}");
    }
}

/// The files that `.dockerignore` lets in: it begins by leaving out everything.
fn context() -> Vec<PathBuf> {
    let ignore = text(".dockerignore");
    let mut lines = ignore.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    assert_eq!(lines.next(), Some("*"));
    lines
        .flat_map(|line| {
            let path = line.strip_prefix('!').expect(line);
            let found = match path.split_once("/*") {
                Some((folder, ending)) => {
                    let folder = repository(folder);
                    let mut all = files(folder.to_str().unwrap());
                    all.retain(|file| {
                        file.parent() == Some(&folder) && file.to_str().unwrap().ends_with(ending)
                    });
                    all
                }
                None => files(path),
            };
            assert!(!found.is_empty(), ".dockerignore: there is no {path}");
            found
        })
        .collect()
}

#[test]
fn the_build_gets_what_it_reads() {
    let root = repository("");
    let files = context();
    // Nothing large slips in: the model inside the binary is most of it.
    let bytes: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
    assert!(bytes < 12_000_000, "{bytes} bytes");

    let copy = tempfile::tempdir().unwrap();
    for file in &files {
        let to = copy.path().join(file.strip_prefix(&root).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(file, to).unwrap();
    }
    // Each target of Cargo.toml must have its file, even those that are not built.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--locked", "--format-version", "1"])
        .current_dir(copy.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    // What is compiled in.
    let mut included = 0;
    for file in files.iter().filter(|file| file.extension().is_some_and(|e| e == "rs")) {
        let source = std::fs::read_to_string(file).unwrap();
        for macro_name in ["include_str!(\"", "include_bytes!(\""] {
            for rest in source.split(macro_name).skip(1) {
                let wanted = file.parent().unwrap().join(rest.split('"').next().unwrap());
                let wanted = wanted.canonicalize().unwrap();
                let there = files.iter().any(|file| file.canonicalize().unwrap() == wanted);
                assert!(there, ".dockerignore leaves out {}", wanted.display());
                included += 1;
            }
        }
    }
    assert!(included >= 4, "only {included} includes were found");

    // What the Dockerfile copies out of the context.
    for line in text(DOCKERFILE).lines().filter(|line| line.starts_with("COPY ")) {
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        if words[0].starts_with("--from") || words[0] == "." {
            continue;
        }
        for path in &words[..words.len() - 1] {
            assert!(files.contains(&repository(path)), ".dockerignore leaves out {path}");
        }
    }
}
