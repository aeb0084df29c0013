//! The pages under docs/ are true: their commands and programs run, in their order.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

mod support;

use std::path::Path;
use std::process::Command;

use support::{Broker, Setup, management, repository, var};

/// The fenced blocks of a page: language and text.
fn blocks(page: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(repository(page)).unwrap();
    let mut parts = text.split("```");
    parts.next();
    let mut found = Vec::new();
    while let (Some(block), Some(_prose)) = (parts.next(), parts.next()) {
        let (language, code) = block.split_once('\n').unwrap();
        found.push((language.to_owned(), code.to_owned()));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_class_vectors_can_be_followed() {
    let broker = Broker::new().await;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("classes");
    std::os::unix::fs::symlink(repository("samples"), folder.path().join("samples")).unwrap();
    let mut setup = Setup::worker(&broker, root.to_str().unwrap());
    setup.set("classes.shadow", "fashion@3");
    let worker = setup.start().await;
    let consumers = || {
        let queue = management("GET", &format!("queues/{}/angler.jobs", broker.vhost), None);
        queue["consumers"].as_u64()
    };
    support::eventually("the worker consumes", async || consumers().filter(|n| *n > 0)).await;

    let binary = Path::new(env!("CARGO_BIN_EXE_angler")).parent().unwrap().to_owned();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let mut outputs = String::new();
    let mut ran = 0;
    for (language, code) in blocks("docs/class-vectors.md") {
        let mut command = match language.as_str() {
            "sh" => Command::new("bash"),
            "python" => Command::new(var("ANGLER_TEST_PYTHON")),
            other => panic!("nobody runs {other:?}"),
        };
        if language == "sh" {
            command.args(["-e", "-u"]);
        }
        let output = command
            .args(["-c", &code])
            .current_dir(folder.path())
            .env("PATH", &path)
            .env("ANGLER__CLASSES__ROOT", &root)
            .env("ANGLER__AMQP__URL", &broker.url)
            .env("ANGLER__EMBEDDER__ONNXRUNTIME_LIBRARY", var("ANGLER_TEST_ONNXRUNTIME"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{code}\n{text}\n{errors}");
        outputs += &text;
        ran += 1;
    }
    assert!(ran >= 8, "only {ran} blocks were found");
    for words in [
        "fashion@1 is active, the first of its set",
        "fashion@3 is active; before it: 1",
        "fashion@1 is active; before it: 3",
    ] {
        assert!(outputs.contains(words), "{words}\n{outputs}");
    }
    for file in ["evaluation.html", "comparison.html", "rescored.jsonl"] {
        assert!(folder.path().join(file).is_file(), "{file}");
    }
    drop(worker);
}
