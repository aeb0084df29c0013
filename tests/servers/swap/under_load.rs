//! Versions are swapped back and forth while jobs keep coming.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::support::{Client, Results, Worker, eventually};
use crate::swap::world::{File, SET, World, status};

/// Jobs that must be done under each version, sent after it was confirmed and done before the next
/// activation begins.
const BETWEEN: usize = 10;
/// Ends the results.
const END: &str = "the end";

/// A number by which a person asks for more than the test needs.
fn ask(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn jobs_per_second() -> usize {
    ask("ANGLER_SWAP_JOBS_PER_SECOND", 40)
}

/// What was sent and what came back.
#[derive(Default)]
struct Ledger {
    /// When each job was sent, by its number.
    sent: Mutex<Vec<Instant>>,
    done: Mutex<Vec<Done>>,
}

struct Done {
    /// The job's number.
    job: usize,
    at: Instant,
    result: Value,
}

/// One run of the command.
struct Activation {
    version: &'static str,
    began: Instant,
    ended: Instant,
    /// From the announcement to the last confirmation, as the command says.
    seconds: f64,
}

impl Ledger {
    fn sent(&self) -> usize {
        self.sent.lock().unwrap().len()
    }

    /// Waits until every job before this one is done.
    async fn done_before(&self, job: usize) {
        eventually(&format!("the first {job} jobs are done"), async || {
            let done = self.done.lock().unwrap().iter().filter(|d| d.job < job).count();
            (done >= job).then_some(())
        })
        .await;
    }
}

/// Sends jobs at a steady pace, however long they take, until it is stopped.
async fn send(client: Client, images: Vec<String>, ledger: Arc<Ledger>, stop: CancellationToken) {
    let mut pace = interval(Duration::from_secs(1) / jobs_per_second() as u32);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(pace.tick()).await.is_some() {
        let job = {
            let mut sent = ledger.sent.lock().unwrap();
            sent.push(Instant::now());
            sent.len() - 1
        };
        let id = format!("load/{job}");
        client.job(&json!({"id": id, "images": images, "classes": SET, "top_k": 3})).await;
    }
}

/// Keeps all results until the last message of the queue.
async fn receive(mut results: Results, ledger: Arc<Ledger>) {
    loop {
        let result = results.next().await.body;
        let at = Instant::now();
        let id = result["id"].as_str().unwrap();
        if id == END {
            return;
        }
        let job = id.strip_prefix("load/").unwrap().parse().unwrap();
        ledger.done.lock().unwrap().push(Done { job, at, result });
    }
}

/// A version whose labels end with its name. Rows beyond the three colours look away from every
/// image: they are there to be loaded and freed.
fn version(world: &World, version: &str, rows: usize) -> File {
    let mut labels: Vec<String> =
        ["red", "green", "blue"].map(|colour| format!("{colour}-{version}")).into();
    let mut values: Vec<f32> = (0..9).map(|i| f32::from(i % 4 == 0)).collect();
    for row in labels.len()..rows {
        labels.push(format!("filler-{row}-{version}"));
        values.extend([-1.0, -1.0, -1.0]);
    }
    File { labels, values, ..world.file(&[]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_job_is_scored_with_one_version_and_none_is_lost_however_often_it_changes() {
    let activations = ask("ANGLER_SWAP_ACTIVATIONS", 20);
    let mut world = World::new().await;
    let images = world.images().await;
    for name in ["1", "2"] {
        let file = version(&world, name, ask("ANGLER_SWAP_ROWS", 3));
        world.put_version(SET, name, file).await;
    }
    world.put_active(SET, r#"{"version":"1"}"#).await;
    world.setup.set("classes.preload", SET).set("classes.poll_seconds", "3600");
    let mut workers = [world.setup.start().await, world.setup.start().await];

    let ledger = Arc::new(Ledger::default());
    let stop = CancellationToken::new();
    let results = world.broker.connect().await.consume("angler.results").await;
    let receiving = tokio::spawn(receive(results, Arc::clone(&ledger)));
    let client = world.broker.connect().await;
    let sending = tokio::spawn(send(client, images, Arc::clone(&ledger), stop.clone()));

    ledger.done_before(20).await;
    let (warm, memory) = (ledger.sent(), workers.each_ref().map(resident_kib));
    ledger.done_before(warm + ask("ANGLER_SWAP_SECONDS", 2) * jobs_per_second()).await;
    let baseline = warm..ledger.sent();

    let mut history = Vec::new();
    for version in ["2", "1"].into_iter().cycle().take(activations) {
        let began = Instant::now();
        let id = format!("{SET}@{version}");
        let ran = world.run(&["classes", "activate", &id, "--json"]).await;
        let ended = Instant::now();
        assert_eq!(ran.code, 0, "{}\n{}", ran.out, ran.log);
        let said = ran.json();
        confirmed_by_both(&said, version);
        let seconds = said["seconds"].as_f64().unwrap();
        history.push(Activation { version, began, ended, seconds });
        ledger.done_before(ledger.sent() + BETWEEN).await;
    }
    let swapping = baseline.end..ledger.sent();
    stop.cancel();
    sending.await.unwrap();
    ledger.done_before(ledger.sent()).await;

    let last = history.last().unwrap().version;
    let memory = [memory, workers.each_ref().map(resident_kib)];
    for worker in &workers {
        let status = status(worker, SET);
        assert_eq!(status["version"], last, "{status}");
        assert_eq!((&status["swaps"], &status["refusals"]), (&json!(activations), &json!(0)));
    }
    // What stands behind the last result would be a second one.
    for worker in &mut workers {
        worker.signal("TERM");
        assert!(worker.ended().await.success(), "{}", worker.log());
    }
    let client = world.broker.connect().await;
    let end = json!({"id": END}).to_string();
    client.publish("angler.results", end.as_bytes(), Default::default()).await;
    receiving.await.unwrap();
    assert!(client.get("angler.jobs").await.is_none() && client.get("angler.dead").await.is_none());

    check(&ledger, &history);
    report("before", &ledger, baseline);
    report("during swaps", &ledger, swapping);
    let mut seconds: Vec<f64> = history.iter().map(|a| a.seconds).collect();
    let (median, _, most) = spread(&mut seconds);
    println!("{activations} activations: median {:.1} ms, most {:.1} ms", 1e3 * median, 1e3 * most);
    println!("VmRSS of the workers: {:?} KiB before, {:?} KiB after", memory[0], memory[1]);
}

fn confirmed_by_both(said: &Value, version: &str) {
    assert_eq!((&said["version"], &said["changed"]), (&json!(version), &json!(true)), "{said}");
    let workers = &said["workers"];
    assert_eq!((&workers["live"], &workers["silent"]), (&json!(2), &json!(0)), "{said}");
    assert_eq!((&workers["idle"], &workers["missing"]), (&json!([]), &json!([])), "{said}");
    let confirmed = workers["confirmed"].as_array().unwrap();
    assert_eq!(confirmed.len(), 2, "{said}");
    assert_ne!(confirmed[0]["instance"], confirmed[1]["instance"], "{said}");
}

fn check(ledger: &Ledger, history: &[Activation]) {
    let (sent, done) = (ledger.sent.lock().unwrap(), ledger.done.lock().unwrap());
    let mut jobs: Vec<usize> = done.iter().map(|d| d.job).collect();
    jobs.sort_unstable();
    assert!(jobs.iter().copied().eq(0..sent.len()), "not one result a job: {jobs:?}");

    let mut determined = 0;
    for Done { job, at, result } in done.iter() {
        assert_eq!(result["status"], "done", "{result}");
        let (_, version) = result["classes"].as_str().unwrap().split_once('@').unwrap();
        let suffix = format!("-{version}");
        for (entry, colour) in
            result["images"].as_array().unwrap().iter().zip(["red", "green", "blue"])
        {
            assert_eq!(entry["label"], format!("{colour}{suffix}"), "{result}");
            let mut top = entry["top"].as_array().unwrap().iter();
            assert!(top.all(|t| t["label"].as_str().unwrap().ends_with(&suffix)), "{result}");
        }
        let possible = possible(history, sent[*job], *at);
        assert!(possible.contains(&version), "{version}, not one of {possible:?}: {result}");
        determined += usize::from(possible.len() == 1);
    }
    // The rule says something: between two activations there is only one answer.
    assert!(determined >= BETWEEN * history.len(), "{determined} of {}", done.len());
}

/// Versions that a job may be scored with which was sent and done at these times: those that may
/// have been active in between. A version may be active from the moment that its activation began
/// until the next one is confirmed.
fn possible<'a>(history: &[Activation], sent: Instant, done: Instant) -> Vec<&'a str> {
    let mut versions: Vec<&str> = Vec::new();
    let begins = std::iter::once(None).chain(history.iter().map(|a| Some(a.began)));
    let ends = history.iter().map(|a| Some(a.ended)).chain(std::iter::once(None));
    let names = std::iter::once("1").chain(history.iter().map(|a| a.version));
    for ((began, ended), name) in begins.zip(ends).zip(names) {
        let overlaps = began.is_none_or(|b| b <= done) && ended.is_none_or(|e| e >= sent);
        if overlaps && !versions.contains(&name) {
            versions.push(name);
        }
    }
    versions
}

/// Prints the latencies of these jobs.
fn report(when: &str, ledger: &Ledger, jobs: std::ops::Range<usize>) {
    let sent = ledger.sent.lock().unwrap();
    let done = ledger.done.lock().unwrap();
    let taken = done.iter().filter(|d| jobs.contains(&d.job));
    let mut taken: Vec<f64> = taken.map(|d| (d.at - sent[d.job]).as_secs_f64()).collect();
    let count = taken.len();
    let (median, p99, most) = spread(&mut taken);
    println!(
        "{when}: {count} jobs, median {:.1} ms, p99 {:.1} ms, most {:.1} ms",
        1e3 * median,
        1e3 * p99,
        1e3 * most
    );
}

/// Median, 99th percentile and maximum.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[(share * (values.len() - 1) as f64).round() as usize];
    (at(0.5), at(0.99), at(1.0))
}

fn resident_kib(worker: &Worker) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
