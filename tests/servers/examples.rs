//! The programs in `examples/` do what they are there to show, against a real broker and a real worker.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::LazyLock;

use crate::support::{Broker, Bucket, Client, Setup, Worker, eventually, repository, tiny, var};
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::json;

/// How the examples of a language are run.
#[derive(Clone, Copy)]
enum Language {
    Python,
    Rust,
}

impl Language {
    fn producer(self, broker: &Broker, id: &str, images: &[&str]) -> Output {
        let (mut command, classes) = (self.command("producer"), "colours@1");
        match self {
            Self::Python => command.args(["--classes", classes, "--id", id]),
            Self::Rust => command.args([classes, id]),
        };
        command.args(images).env("AMQP_URL", &broker.url).output().unwrap()
    }

    fn consumer(self, broker: &Broker, count: usize) -> Output {
        let mut command = self.command("consumer");
        if let Self::Python = self {
            command.arg("--count");
        }
        command.arg(count.to_string()).env("AMQP_URL", &broker.url).output().unwrap()
    }

    fn command(self, name: &str) -> Command {
        match self {
            Self::Python => {
                let mut command = Command::new(var("ANGLER_TEST_PYTHON"));
                command.arg(repository("examples/python").join(format!("{name}.py")));
                command
            }
            Self::Rust => Command::new(built(name)),
        }
    }
}

/// The program of an example. Cargo builds examples for some ways to run tests and not for others, so it is asked; most
/// often it finds nothing to do.
fn built(name: &str) -> PathBuf {
    static BUILT: LazyLock<()> = LazyLock::new(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--locked", "--examples"]).current_dir(repository(""));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success());
    });
    LazyLock::force(&BUILT);
    let angler = PathBuf::from(env!("CARGO_BIN_EXE_angler"));
    angler.parent().unwrap().join("examples").join(name)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Standard output of a program that did well.
fn printed(output: &Output) -> &str {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// A worker that tells three colours apart, and an image of each.
struct World {
    broker: Broker,
    client: Client,
    images: Vec<String>,
    _root: tempfile::TempDir,
    _worker: Worker,
}

impl World {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let set = root.path().join("colours");
        std::fs::create_dir(&set).unwrap();
        std::fs::write(set.join("1.safetensors"), tiny::version("colours", "1")).unwrap();
        let broker = Broker::new().await;
        let images = tiny::images(&Bucket::new().await).await;
        let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
        setup.set("model.path", tiny::MODEL);
        let worker = setup.start().await;
        let client = broker.connect().await;
        Self { broker, client, images, _root: root, _worker: worker }
    }

    /// How many results wait, as the queue itself counts them.
    async fn results(&self) -> u32 {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = self.client.channel.queue_declare(
            "angler.results".into(),
            passive,
            FieldTable::default(),
        );
        declared.await.unwrap().message_count()
    }

    async fn wait_for_results(&self, count: u32) {
        eventually("the results", async || (self.results().await == count).then_some(())).await;
    }
}

/// Lines as the consumers print them, without the scores.
fn without_scores(lines: &str) -> Vec<String> {
    let trim = |line: &str| {
        line.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.').trim_end().to_owned()
    };
    lines.lines().map(trim).collect()
}

async fn a_job_goes_there_and_back(language: Language) {
    let world = World::new().await;
    let World { broker, client, images, .. } = &world;
    let missing = format!("{}-missing", images[1]);

    let sent = language.producer(broker, "pair", &[&images[0], &images[2]]);
    assert_eq!(printed(&sent), "pair\n");
    world.wait_for_results(1).await;
    let sent = language.producer(broker, "half", &[&images[1], &missing]);
    assert_eq!(printed(&sent), "half\n");
    world.wait_for_results(2).await;
    let taken = language.consumer(broker, 2);
    let lines = printed(&taken);
    let expected = [
        format!("pair: {}: red", images[0]),
        format!("pair: {}: blue", images[2]),
        format!("half: {}: green", images[1]),
    ];
    assert_eq!(without_scores(lines)[..3], expected, "{lines}");
    assert!(
        lines.lines().take(3).all(|line| line.rsplit(' ').next().unwrap().starts_with("0.9")),
        "{lines}"
    );
    let last = lines.lines().last().unwrap();
    assert!(last.starts_with(&format!("half: {missing}: not_found: ")), "{lines}");
    assert_eq!(lines.lines().count(), 4);
    // Acked, each of them.
    world.wait_for_results(0).await;

    // The same job twice, and what is no result: each is taken from the queue, and handled at most once.
    let foreign = BasicProperties::default().with_type("gossip.v1".into());
    client.publish("angler.results", b"psst", foreign).await;
    for (already, id) in [(1, "twice"), (2, "twice"), (3, "last")] {
        printed(&language.producer(broker, id, &[&images[0]]));
        world.wait_for_results(already + 1).await;
    }
    let taken = language.consumer(broker, 2);
    let expected = ["twice", "last"].map(|id| format!("{id}: {}: red", images[0]));
    assert_eq!(without_scores(printed(&taken)), expected);
    let passed_over = text(&taken.stderr);
    assert!(
        passed_over.contains("gossip.v1") && passed_over.contains("twice again"),
        "{passed_over}"
    );
    world.wait_for_results(0).await;

    // A job that fails as a whole.
    client.job(&json!({"id": "none", "images": [], "classes": "colours@1"})).await;
    world.wait_for_results(1).await;
    let taken = language.consumer(broker, 1);
    assert!(printed(&taken).starts_with("none: failed: malformed_job: "), "{}", printed(&taken));
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_go_there_and_back_in_python() {
    a_job_goes_there_and_back(Language::Python).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_go_there_and_back_in_rust() {
    a_job_goes_there_and_back(Language::Rust).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_says_that_there_is_no_queue_and_a_consumer_too() {
    let broker = Broker::new().await;
    for language in [Language::Python, Language::Rust] {
        let sent = language.producer(&broker, "j", &["s3://b/k"]);
        let errors = text(&sent.stderr);
        assert_eq!(sent.status.code(), Some(1), "{errors}");
        assert!(errors.contains("there is no queue angler.jobs"), "{errors}");
        assert_eq!(text(&sent.stdout), "");
        let taken = language.consumer(&broker, 1);
        let errors = text(&taken.stderr);
        assert_eq!(taken.status.code(), Some(1), "{errors}");
        assert!(errors.contains("angler.results"), "{errors}");
    }
}

#[test]
fn every_example_has_a_test_here() {
    let of = |folder: &str| {
        let files = std::fs::read_dir(repository(folder)).unwrap().map(|file| file.unwrap().path());
        let mut names: Vec<String> = files
            .filter(|path| path.is_file())
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(of("examples"), ["consumer.rs", "producer.rs"]);
    assert_eq!(of("examples/python"), ["consumer.py", "producer.py"]);
}
