//! A cluster of three brokers whose nodes are killed, frozen and restarted under three workers, a
//! steady load and bulk runs: every job has one outcome, and nobody is set apart for it.
//!
//! It takes minutes: `tests/cluster.sh` runs it, on whichever RabbitMQ is chosen.

mod load;
mod nodes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use angler_amqp::AmqpOptions;
use angler_core::class_sets::load::version_key;

use self::load::{Outcomes, collect, produce};
use self::nodes::{Cluster, NODES};
use crate::support::{Bucket, Setup, Worker, eventually, tiny};

const WORKERS: usize = 3;
const PACE: Duration = Duration::from_millis(100);
const LEADER_KILLS: usize = 5;
/// Runs that are begun around each kill, and jobs in each.
const RUNS: usize = 3;
const JOBS_IN_RUN: usize = 200;
/// How long the majority is away.
const MINORITY: Duration = Duration::from_secs(20);
/// No results for longer than that after a fault is a failure. On a quiet machine it takes 15 s at
/// most.
const RECOVERY: Duration = Duration::from_secs(60);
/// From the last fault to the last outcome.
const CALM: Duration = Duration::from_secs(180);
/// The share of jobs that may be set apart.
const SET_APART: f64 = 0.1;
const QUEUES: [&str; 2] = ["angler.jobs", "angler.results"];

struct World {
    cluster: Cluster,
    setup: Setup,
    images: Vec<String>,
    folder: tempfile::TempDir,
    runs: Vec<Run>,
    outcomes: Arc<Outcomes>,
    recoveries: Vec<(String, Duration)>,
}

/// A bulk run, and the command that sends it.
struct Run {
    id: String,
    command: Child,
    log: PathBuf,
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.command.kill();
        let _ = self.command.wait();
    }
}

impl World {
    async fn new() -> Self {
        let cluster = Cluster::start();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("classes").join(version_key("colours", "1"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, tiny::version("colours", "1")).unwrap();
        let images = tiny::images(&Bucket::new().await).await;
        let mut setup = Setup::store();
        setup.env.insert("ANGLER__AMQP__URL".into(), cluster.url());
        setup.set("http.listen", "127.0.0.1:0");
        setup.set("classes.root", folder.path().join("classes").to_str().unwrap());
        setup.set("model.path", tiny::MODEL).set("embedder.backend", "tract");
        setup.set("classes.preload", "colours@1");
        let lines = (0..JOBS_IN_RUN)
            .map(|n| format!("{{\"uri\": \"{}\", \"id\": \"{n}\"}}\n", images[n % images.len()]));
        std::fs::write(folder.path().join("list.jsonl"), lines.collect::<String>()).unwrap();
        let (runs, recoveries) = (Vec::new(), Vec::new());
        Self { cluster, setup, images, folder, runs, outcomes: Arc::default(), recoveries }
    }

    fn options(&self) -> AmqpOptions {
        AmqpOptions {
            url: self.cluster.url(),
            ca_file: None,
            client_cert_file: None,
            client_key_file: None,
            name: "load".to_owned(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// Begins to send a run.
    fn enqueue(&mut self) {
        let id = format!("run-{}", self.runs.len());
        let list = self.path("list.jsonl");
        let log = PathBuf::from(self.path(&format!("{id}.log")));
        let arguments = ["enqueue", &list, "--classes", "colours@1", "--run", &id];
        let mut command = self.setup.command(&[&arguments[..], &["--per-job", "1"]].concat());
        let file = std::fs::File::create(&log).unwrap();
        let command = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
        self.runs.push(Run { id, command, log });
    }

    /// Until results come again; notes how long none came.
    async fn recovered(&mut self, fault: String) {
        let begin = Instant::now();
        eventually(&format!("results come again after {fault}"), async || {
            (self.outcomes.last()? > begin).then_some(())
        })
        .await;
        self.cluster.whole(&QUEUES).await;
        let gap = self.outcomes.gap();
        println!("{fault}: {gap:.1?} without a result");
        self.recoveries.push((fault, gap));
    }

    async fn leader_killed(&mut self, number: usize) {
        let leader = self.cluster.leader("angler.jobs").await;
        for at in 0..RUNS {
            self.enqueue();
            // The kill comes while the second is being sent.
            if at + 1 == RUNS {
                self.outcomes.watch();
                self.cluster.kill(&[leader]);
            }
            sleep(Duration::from_millis(fastrand::u64(200..1200))).await;
        }
        self.cluster.bring_back(&[leader]);
        self.recovered(format!("kill {number} of the leader, n{leader}")).await;
    }

    /// Two of three nodes are away: nothing can be confirmed.
    async fn minority(&mut self, how: &str) {
        let leader = self.cluster.leader("angler.jobs").await;
        let away = [leader, leader % NODES.len() + 1];
        self.enqueue();
        if how == "frozen" {
            self.cluster.freeze(&away, MINORITY).await;
        } else {
            self.cluster.kill(&away);
            sleep(MINORITY).await;
            self.cluster.bring_back(&away);
        }
        self.outcomes.watch();
        self.recovered(format!("a majority {how}")).await;
    }

    async fn rolling_restart(&mut self) {
        for node in NODES {
            self.enqueue();
            self.outcomes.watch();
            self.cluster.shut_down(node);
            self.cluster.bring_back(&[node]);
            self.recovered(format!("restart of n{node}")).await;
        }
    }

    /// Waits for the commands that send runs; each must have sent all.
    async fn sent(&mut self) {
        let begin = Instant::now();
        for Run { id, command, log } in &mut self.runs {
            let status = loop {
                let status = command.try_wait().unwrap();
                if status.is_some() || begin.elapsed() > CALM {
                    break status;
                }
                sleep(Duration::from_millis(100)).await;
            };
            let said = std::fs::read_to_string(log).unwrap();
            assert!(status.is_some_and(|s| s.success()), "{id}: {status:?}\n{said}");
        }
    }

    /// Collects the runs; yields those that are not complete.
    fn incomplete(&self) -> Vec<String> {
        let mut incomplete = Vec::new();
        for Run { id, .. } in &self.runs {
            let out = self.path(&format!("{id}.jsonl"));
            let arguments = ["collect", "--run", id, "--out", &out, "--silence", "60"];
            let (code, _, log) = self.setup.run(&arguments);
            let ids = if code == 0 { labelled(Path::new(&out)) } else { BTreeSet::new() };
            if ids.len() != JOBS_IN_RUN {
                incomplete.push(format!("{id}: {} of {JOBS_IN_RUN}, {code}: {log}", ids.len()));
            }
        }
        incomplete
    }
}

/// The ids of the images that have a label, each once.
fn labelled(file: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(file).unwrap();
    let mut ids = BTreeSet::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let id = row["id"].as_str().unwrap().to_owned();
        if row["label"].is_string() {
            assert!(ids.insert(id), "twice in {}: {row}", file.display());
        }
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes minutes: tests/cluster.sh"]
async fn whatever_node_fails_every_job_and_every_run_is_whole() {
    let mut world = World::new().await;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(world.setup.start().await);
    }
    let (stop_producing, stop_collecting) = (CancellationToken::new(), CancellationToken::new());
    let collecting = {
        let (options, outcomes) = (world.options(), Arc::clone(&world.outcomes));
        let stop = stop_collecting.clone();
        tokio::spawn(async move { collect(options, &outcomes, stop).await })
    };
    let producing = {
        let (options, outcomes) = (world.options(), Arc::clone(&world.outcomes));
        let (images, stop) = (world.images.clone(), stop_producing.clone());
        tokio::spawn(async move { produce(options, &images, PACE, &outcomes, stop).await })
    };
    world.cluster.whole(&QUEUES).await;
    for number in 1..=LEADER_KILLS {
        world.leader_killed(number).await;
    }
    world.minority("frozen").await;
    world.minority("killed").await;
    world.rolling_restart().await;
    world.sent().await;
    stop_producing.cancel();
    producing.await.unwrap();

    let calm = Instant::now();
    while !world.outcomes.missing().is_empty() {
        assert!(
            calm.elapsed() < CALM,
            "without an outcome: {:?}\nqueues: {:#?}\n{}",
            world.outcomes.missing(),
            world.cluster.queues(),
            logs(&workers)
        );
        sleep(Duration::from_millis(100)).await;
    }
    let calm = calm.elapsed();
    let incomplete = world.incomplete();
    stop_collecting.cancel();
    collecting.await.unwrap();

    let (jobs, duplicates) = world.outcomes.counts();
    let all_jobs = jobs + world.runs.len() * JOBS_IN_RUN;
    let set_apart = logs(&workers).matches("which now runs alone").count();
    let dead = world.cluster.queue("angler.dead")["messages"].clone();
    println!(
        "{jobs} jobs and {} runs of {JOBS_IN_RUN}; {duplicates} second results, {set_apart} jobs set \
         apart, {dead} dead letters, {} results of runs elsewhere; last outcome {calm:.1?} after the \
         last fault",
        world.runs.len(),
        world.outcomes.strays().len()
    );
    for worker in &mut workers {
        assert_eq!(worker.has_ended(), None, "a worker ended:\n{}", worker.log());
    }
    assert_eq!(world.outcomes.wrong(), Vec::<String>::new());
    assert_eq!(incomplete, Vec::<String>::new(), "elsewhere: {:?}", world.outcomes.strays());
    assert!(
        dead.as_u64().is_none_or(|count| count == 0),
        "{dead} dead letters: {}",
        logs(&workers)
    );
    let most = world.recoveries.iter().max_by_key(|(_, gap)| *gap).unwrap();
    assert!(most.1 < RECOVERY, "{most:?}");
    assert!((set_apart as f64) < SET_APART * all_jobs as f64, "{set_apart} jobs were set apart");
}

fn logs(workers: &[Worker]) -> String {
    workers.iter().map(Worker::log).collect::<Vec<_>>().join("\n---\n")
}
