//! The pages under docs/ are true: their commands and programs run, in their order.

use std::path::Path;
use std::process::Command;

use crate::support::{Broker, Setup, management, repository, var};

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
    crate::support::eventually("the worker consumes", async || consumers().filter(|n| *n > 0))
        .await;

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

/// What they measure takes minutes and packages of their own; that they parse, and that their flags are those that the page
/// shows, can be had here.
#[test]
fn the_scripts_of_the_comparison_parse_and_know_what_the_page_shows() {
    let folder = repository("benches/peer");
    let mut scripts = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "py") {
            continue;
        }
        let parse = "import ast, sys; ast.parse(open(sys.argv[1]).read())";
        let output = Command::new(var("ANGLER_TEST_PYTHON"))
            .args(["-c", parse])
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{path:?}: {}", String::from_utf8_lossy(&output.stderr));
        scripts += 1;
    }
    assert!(scripts >= 4, "only {scripts} scripts were found");

    let page = std::fs::read_to_string(repository("docs/performance.md")).unwrap();
    let run = std::fs::read_to_string(folder.join("run.py")).unwrap();
    let commands = page.lines().filter_map(|line| line.split_once("benches/peer/run.py "));
    let flags: Vec<_> = commands
        .flat_map(|(_, arguments)| {
            arguments.split_whitespace().filter(|word| word.starts_with("--"))
        })
        .collect();
    assert!(flags.len() >= 2, "the page shows {flags:?}");
    for flag in flags {
        assert!(run.contains(&format!("add_argument(\"{flag}\"")), "{flag}");
    }
    let tunables: Vec<_> = page
        .split('`')
        .filter_map(|code| code.strip_prefix("PEER_"))
        .map(|code| code.split('=').next().unwrap())
        .collect();
    assert!(tunables.len() >= 8, "the page shows {tunables:?}");
    let peers = ["worker.py", "server.py"]
        .map(|name| std::fs::read_to_string(folder.join(name)).unwrap())
        .concat();
    for name in tunables {
        assert!(peers.contains(&format!("tunable(\"{name}\"")), "PEER_{name}");
    }
}
