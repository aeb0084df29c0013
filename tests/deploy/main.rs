//! What is in `deploy/`, by the validators of those who will read it: hadolint, the compose schema, promtool, Helm and the
//! schemas of Kubernetes and KEDA, systemd, dpkg. Each is shown something broken as well, so that silence means something.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

mod chart;
mod compose;
mod dockerfile;
mod gpu_bundle;
mod guide;
mod monitoring;
mod package;
mod rolling;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{repository, var};

fn text(path: &str) -> String {
    std::fs::read_to_string(repository(path)).unwrap()
}

/// A program that came with the tests' Python packages.
fn python_tool(name: &str) -> Command {
    Command::new(Path::new(&var("ANGLER_TEST_PYTHON")).with_file_name(name))
}

/// Runs it; yields whether it succeeded, and all that it said.
fn said(command: &mut Command) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = [stdout, stderr].concat();
    (status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A YAML file as JSON, anchors and merges resolved.
fn yaml(path: &str) -> Value {
    let program =
        "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)";
    let output = Command::new(var("ANGLER_TEST_PYTHON"))
        .args(["-c", program])
        .arg(repository(path))
        .output()
        .unwrap();
    assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
