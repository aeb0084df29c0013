//! Bulk runs against a real broker, store and worker: enqueued, killed, continued, collected.

mod collecting;
mod files;
mod lanes;
mod runs;
mod sending;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::support::{Broker, Bucket, Client, Received, Setup, eventually, repository, tiny};
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::{Value, json};

struct World {
    broker: Broker,
    client: Client,
    setup: Setup,
    folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        Self::of(Broker::new().await).await
    }

    async fn of(broker: Broker) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("classes/colours")).unwrap();
        let file = folder.path().join("classes/colours/1.safetensors");
        std::fs::write(file, tiny::version("colours", "1")).unwrap();
        let mut setup = Setup::worker(&broker, folder.path().join("classes").to_str().unwrap());
        setup.set("model.path", repository(tiny::MODEL).to_str().unwrap());
        setup.set("embedder.backend", "tract");
        let client = broker.connect().await;
        Self { broker, client, setup, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A list of so many images that nobody will fetch.
    fn list(&self, images: usize) -> String {
        let path = self.path(&format!("{images}.txt"));
        let uris: Vec<String> =
            (0..images).map(|n| format!("s3://photos/a/{n:07}.jpg\n")).collect();
        std::fs::write(&path, uris.concat()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn enqueue(&self, source: &str, run: &str, more: &[&str]) -> (i32, String, String) {
        let arguments = ["enqueue", source, "--classes", "colours@1", "--run", run];
        self.setup.run(&[&arguments, more].concat())
    }

    fn collect(&self, run: &str, out: &str, more: &[&str]) -> (i32, String, String) {
        let out = self.path(out);
        let arguments = ["collect", "--run", run, "--out", out.to_str().unwrap()];
        self.setup.run(&[&arguments, more].concat())
    }

    fn spawn(&self, arguments: &[&str]) -> Running {
        let mut command = self.setup.command(arguments);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Messages in a queue that nobody holds; none if there is no such queue.
    async fn ready(&self, queue: &str) -> Option<u32> {
        let client = self.broker.connect().await;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared =
            client.channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
        let count = declared.ok().map(|queue| queue.message_count());
        client.close().await;
        count
    }

    async fn until_ready(&self, queue: &str, count: u32) {
        eventually(&format!("{count} in {queue}"), async || {
            (self.ready(queue).await? >= count).then_some(())
        })
        .await;
    }

    /// The queues that the broker has for a run's id.
    fn queues(&self, run: &str) -> Vec<String> {
        let all = self.broker.manage("GET", &format!("queues/{}", self.broker.vhost), None);
        let names = all.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap());
        let of_run = format!("angler.run.{run}@");
        names.filter(|name| name.starts_with(&of_run)).map(str::to_owned).collect()
    }

    /// The queue of a run's results.
    fn results(&self, run: &str) -> String {
        let nonce = |name: &String| {
            let nonce = name.rsplit_once('@').unwrap().1;
            nonce.len() == 12 && nonce.chars().all(|c| c.is_ascii_hexdigit())
        };
        let found = self.queues(run);
        found.iter().find(|name| nonce(name)).unwrap_or_else(|| panic!("{found:?}")).clone()
    }

    /// Answers a job as a worker would.
    async fn answer(&self, job: &Received) {
        let images: Vec<Value> =
            job.body["images"].as_array().unwrap().iter().map(answered).collect();
        let result = json!({
            "id": job.body["id"], "status": "done", "classes": "colours@1", "model": "tiny@1",
            "backend": "fake", "images": images, "run": job.body["run"], "attempt": 1,
            "worker": "test", "finished_at": "2026-01-31T12:00:00.000Z",
        });
        let reply_to = job.properties.reply_to().as_ref().unwrap().to_string();
        self.client.publish(&reply_to, result.to_string().as_bytes(), persistent()).await;
    }
}

/// A command that is killed with the test.
struct Running(Child);

impl Running {
    fn kill(mut self) -> u64 {
        let peak = peak_memory(self.0.id());
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        peak
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The most memory that a process had so far, in MB.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000
}

fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

fn answered(image: &Value) -> Value {
    json!({"uri": image["uri"], "label": "red", "score": 0.9, "margin": 0.5, "top": [{"label": "red", "score": 0.9}]})
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_images_survive_kills_of_both_commands_and_come_out_once_each() {
    const IMAGES: usize = 100_000;
    const JOBS: u32 = 1563;
    let world = World::new().await;
    let list = world.list(IMAGES);
    let command = ["enqueue", &list, "--classes", "colours@1", "--run", "big"];
    let mut peak = 0;
    for sent in [200, 700] {
        // It stops there, so that it is killed on its way however fast it is.
        let most = ["--max-queued", &sent.to_string()];
        let running = world.spawn(&[&command[..], &most].concat());
        world.until_ready("angler.jobs", sent).await;
        peak = peak.max(running.kill());
    }
    let (code, _, log) = world.enqueue(&list, "big", &[]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("100000 images in 1563 jobs, ") && log.contains(" before, "), "{log}");
    world.until_ready("angler.jobs", JOBS).await;
    // A sender that is killed before it marks what it sent leaves those jobs to the next one as well.
    let sent = world.ready("angler.jobs").await.unwrap();
    // Once more: nothing is left to send. With other images it is another run.
    let (code, _, log) = world.enqueue(&list, "big", &[]);
    assert_eq!((code, world.ready("angler.jobs").await), (0, Some(sent)), "{log}");
    assert!(log.contains("all 1563 jobs had been sent before"), "{log}");
    let (code, _, log) = world.enqueue(&world.list(64), "big", &[]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("begun with other images") && log.contains("1563 of 1563"), "{log}");

    let mut jobs = world.client.consume("angler.jobs").await;
    let mut indices = BTreeSet::new();
    for number in 0..sent {
        let job = jobs.next().await;
        let run = &job.body["run"];
        assert_eq!((&run["id"], &run["jobs"]), (&json!("big"), &json!(JOBS)));
        assert_eq!(job.body["id"], format!("big/{}", run["index"]));
        assert_eq!(job.properties.kind().as_ref().unwrap().as_str(), "classify.v1");
        indices.insert(run["index"].as_u64().unwrap());
        world.answer(&job).await;
        if number % 100 == 0 {
            world.answer(&job).await; // As a worker that was killed before its ack.
        }
    }
    assert_eq!(world.ready("angler.jobs").await, Some(0));
    assert_eq!(indices.len(), JOBS as usize);

    let out = world.path("out.jsonl");
    let journal = world.path(".out.jsonl@big.results");
    let collecting = world.spawn(&["collect", "--run", "big", "--out", out.to_str().unwrap()]);
    eventually("a part is collected", async || {
        let length = std::fs::metadata(&journal).ok()?.len();
        (length > 2_000_000).then_some(())
    })
    .await;
    peak = peak.max(collecting.kill());
    assert!(!out.exists(), "half a file");
    let (code, told, log) = world.collect("big", "out.jsonl", &["--json"]);
    assert_eq!(code, 0, "{log}");
    let summary: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&summary["complete"], &summary["images"]), (&json!(true), &json!(IMAGES)));
    assert_eq!(summary["labels"], json!({"red": IMAGES}));
    let text = std::fs::read_to_string(&out).unwrap();
    let uris: BTreeSet<String> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["uri"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!((text.lines().count(), uris.len()), (IMAGES, IMAGES));
    assert!(peak < 200, "{peak} MB");
    // Nothing is left of the run.
    assert!(!journal.exists());
    assert_eq!(world.queues("big"), [] as [String; 0]);
    let (code, _, log) = world.collect("big", "out.jsonl", &[]);
    assert_eq!(code, 1);
    assert!(log.contains("there is no run big"), "{log}");
    assert!(!journal.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_is_enqueued_classified_and_collected_in_one_command() {
    let world = World::new().await;
    let bucket = Bucket::new().await;
    let images = tiny::images(&bucket).await;
    bucket.put("broken.jpg", b"no image".to_vec()).await;
    bucket.put("notes.txt", b"no image either".to_vec()).await;
    let prefix = images[0].trim_end_matches("red.png").to_owned();
    let _worker = world.setup.start().await;
    let out = world.path("out.csv");
    let wait = ["--wait", "--out", out.to_str().unwrap(), "--per-job", "2", "--json"];
    let (code, told, log) = world.enqueue(&prefix, "colours", &wait);
    assert_eq!(code, 0, "{log}");
    let summary: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(summary["labels"], json!({"red": 1, "green": 1, "blue": 1}), "{log}");
    assert_eq!(summary["errors"].as_object().unwrap().values().collect::<Vec<_>>(), [&json!(1)]);
    assert_eq!((&summary["jobs"], &summary["complete"]), (&json!(2), &json!(true)));
    let csv = std::fs::read_to_string(&out).unwrap();
    let mut rows: Vec<&str> = csv.lines().collect();
    assert_eq!(
        rows.remove(0),
        "uri,id,label,score,margin,error,message,top,job,classes,model,backend"
    );
    assert_eq!(rows.len(), 4, "{csv}");
    let red = rows.iter().find(|row| row.starts_with(&images[0])).unwrap();
    assert!(
        red.contains(",,red,0.") && red.contains("colours@1") && red.ends_with(",tract-cpu"),
        "{red}"
    );
    let broken = rows.iter().find(|row| row.contains("broken.jpg")).unwrap();
    assert!(
        broken.contains(",unsupported_format,") || broken.contains(",corrupt_image,"),
        "{broken}"
    );
    // Only what matches.
    let globs = ["--include", "*.png", "--exclude", "g*", "--dry-run", "--json"];
    let (code, told, log) = world.enqueue(&prefix, "some", &globs);
    assert_eq!(code, 0, "{log}");
    let plan: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&plan["images"], &plan["classes"]), (&json!(2), &json!("colours@1")));
    assert_eq!(plan["first"].as_array().unwrap().len(), 2);
    assert_eq!(world.queues("some"), [] as [String; 0], "a dry run leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_not_complete_says_what_is_missing_and_goes_on_later() {
    let world = World::new().await;
    let (code, _, log) = world.enqueue(&world.list(10), "part", &["--per-job", "1"]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("angler collect --run part"), "{log}");
    let mut jobs = world.client.consume("angler.jobs").await;
    let mut held = Vec::new();
    for _ in 0..10 {
        let job = jobs.next().await;
        match job.body["run"]["index"].as_u64().unwrap() {
            2 | 3 | 7 => held.push(job),
            _ => world.answer(&job).await,
        }
    }
    let (code, _, log) = world.collect("part", "part.jsonl", &["--silence", "2"]);
    assert_eq!(code, 1, "{log}");
    assert!(
        log.contains("no result for 2 s: 3 of 10 jobs have no result, numbers 2-3, 7"),
        "{log}"
    );
    assert!(log.contains("0 jobs wait in angler.jobs"), "{log}");
    assert!(!world.path("part.jsonl").exists());
    // One of them failed whole, so there is no image to name.
    let failed = held.pop().unwrap();
    for job in &held {
        world.answer(job).await;
    }
    let result = json!({
        "id": failed.body["id"], "status": "failed", "run": failed.body["run"], "attempt": 1,
        "error": {"code": "unknown_version", "message": "gone"}, "worker": "test",
        "finished_at": "2026-01-31T12:00:00.000Z",
    });
    world.client.publish(&world.results("part"), result.to_string().as_bytes(), persistent()).await;
    let (code, _, log) = world.collect("part", "part.jsonl", &[]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("failed jobs   unknown_version 1"), "{log}");
    let rows = lines(&world.path("part.jsonl"));
    assert_eq!(rows.len(), 10);
    let whole = rows.iter().find(|row| row["uri"].is_null()).unwrap();
    assert_eq!(
        (&whole["job"], &whole["error"]["code"]),
        (&failed.body["id"], &json!("unknown_version"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_failures_end_the_collecting_early() {
    let world = World::new().await;
    let (code, _, log) = world.enqueue(&world.list(300), "bad", &["--per-job", "100"]);
    assert_eq!(code, 0, "{log}");
    let mut jobs = world.client.consume("angler.jobs").await;
    let job = jobs.next().await;
    let error = json!({"code": "not_found", "message": "no such key"});
    let images = job.body["images"].as_array().unwrap().iter();
    let images: Vec<Value> =
        images.map(|image| json!({"uri": image["uri"], "error": error})).collect();
    let result = json!({
        "id": job.body["id"], "status": "done", "classes": "colours@1", "model": "tiny@1",
        "backend": "fake", "images": images, "run": job.body["run"], "attempt": 1, "worker": "test",
        "finished_at": "2026-01-31T12:00:00.000Z",
    });
    world.client.publish(&world.results("bad"), result.to_string().as_bytes(), persistent()).await;
    let (code, _, log) = world.collect("bad", "bad.csv", &["--max-failure-rate", "0.5"]);
    assert_eq!(code, 1, "{log}");
    assert!(
        log.contains("too many failures") && log.contains("errors        not_found 100"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_queue_holds_the_sending_up_and_a_shorter_one_lets_it_go_on() {
    let world = World::new().await;
    let list = world.list(60);
    let more = ["--per-job", "1", "--max-queued", "10"];
    let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", "slow"];
    let mut sending = world.spawn(&[&arguments[..], &more].concat());
    world.until_ready("angler.jobs", 10).await;
    let mut jobs = world.client.consume("angler.jobs").await;
    let mut taken = 0;
    while taken < 60 {
        jobs.next().await;
        taken += 1;
    }
    eventually("the command ends", async || sending.0.try_wait().unwrap()).await;
    assert_eq!(world.ready("angler.jobs").await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_become_a_run_is_refused_before_a_job_is_sent() {
    let world = World::new().await;
    let bucket = Bucket::new().await;
    let image = bucket.put("a.png", b"x".to_vec()).await;
    let prefix = image.trim_end_matches("a.png");
    let list = |name: &str, text: &str| {
        std::fs::write(world.path(name), text).unwrap();
        world.path(name).to_str().unwrap().to_owned()
    };
    let wrong = list("wrong.txt", "s3://photos/a.jpg\n/home/me/b.jpg\n");
    let empty = list("empty.csv", "uri\n");
    let good = world.list(1);
    let folder = world.folder.path().to_str().unwrap().to_owned();
    for (code, source, more, words) in [
        (1, wrong.as_str(), &[][..], "line 2: "),
        (1, &empty, &[], "holds no image"),
        (1, &format!("{prefix}nothing/"), &[], "holds no image"),
        (1, "nowhere.txt", &[], "nowhere.txt"),
        (2, &folder, &[], "workers fetch images from S3"),
        (2, &good, &["--include", "*.jpg"], "go with an S3 prefix"),
        (2, prefix, &["--include", "["], "--include: "),
        (2, &good, &["--run", "a b"], "cannot be used multiple times"),
        (2, &good, &["--out", "x.csv"], "--wait"),
        (2, &good, &["--wait", "--out", "x.xlsx"], ".jsonl, .csv or .parquet"),
        (2, &good, &["--top-k", "0"], "must be 1 to 100"),
        (2, &good, &["--per-job", "0"], "per-job"),
    ] {
        let (found, out, log) = world.enqueue(source, "none", more);
        assert_eq!((found, out.as_str()), (code, ""), "{source} {more:?}: {log}");
        assert!(log.contains(words), "{source} {more:?}: {log}");
    }
    for (classes, words) in [
        ("colours", "no class set colours with an active version"),
        ("colours@2", "colours/2.safetensors does not exist"),
        ("no such", "not a name"),
    ] {
        let arguments = ["enqueue", &good, "--classes", classes, "--run", "none"];
        let (code, _, log) = world.setup.run(&arguments);
        assert!(code > 0 && log.contains(words), "{classes}: {log}");
    }
    assert_eq!(world.queues("none"), [] as [String; 0]);
}
