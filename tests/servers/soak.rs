//! Faults of every kind at random, often two at once, under steady load: in the end every job has one
//! outcome, the right one, every run its file, and nothing is left anywhere.
//!
//! `tests/soak.sh --minutes N --seed S` runs it for longer than the tests do.

mod bulk;
mod clients;
mod faults;
mod fleet;
mod ledger;
mod load;
mod process;
mod report;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::soak::faults::Injector;
use crate::soak::fleet::Fleet;
use crate::soak::load::Load;
use crate::soak::process::{Exit, Process};
use crate::soak::report::Report;
use crate::soak::world::World;

const WORKERS: usize = 3;
const JOBS_PER_SECOND: f64 = 12.0;
/// After the last fault, until the last outcome of a job and of a run.
const CALM: Duration = Duration::from_secs(180);
/// The only reason to give up on a job here: its producer's.
const REASON: &str = "malformed_job";

fn ask(variable: &str, default: f64) -> f64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_every_job_ends_once() {
    let minutes = ask("ANGLER_SOAK_MINUTES", 0.5);
    let seed = ask("ANGLER_SOAK_SEED", 1.0) as u64;
    let world = Arc::new(World::new(seed, minutes).await);
    println!("logs of commands: {}", world.folder.display());
    let fleet = Arc::new(Mutex::new(Fleet::start(world.setup.clone(), WORKERS).await));
    let evidence = Evidence { world: Arc::clone(&world), fleet: Arc::clone(&fleet) };
    let mut traffic = Traffic::start(&world).await;

    let mut injector = Injector::new(&world, &fleet);
    let until = Instant::now() + Duration::from_secs_f64(60.0 * minutes);
    while Instant::now() < until {
        injector.round().await;
        traffic.look_after().await;
    }
    let calm = Instant::now();
    traffic.stop.cancel();
    await_outcomes(&world, &fleet, calm, &mut traffic).await;
    let quiet = calm.elapsed();
    let dead = dead_letters(&world, &traffic.runs).await;
    await_empty_queues(&world).await;
    let fleet_totals = {
        let mut fleet = fleet.lock().await;
        fleet.stop().await;
        (fleet.peak_kib(), fleet.slow_drains)
    };
    traffic.stop_collecting.cancel();
    traffic.end().await;

    let report = Report {
        world: &world,
        broker_version: world.broker_version().await,
        workers: WORKERS,
        faults: &injector.tally,
        jobs: world.ledger.summary(),
        runs: &traffic.runs.lock().unwrap(),
        dead,
        quiet,
        fleet: fleet_totals,
    };
    println!("{report}");
    let wrong = world.ledger.all_wrong();
    let first = wrong.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(
        "
",
    );
    assert!(wrong.is_empty(), "seed {seed}: {} things went wrong:\n{first}", wrong.len());
    let is_expected = report.dead.keys().all(|reason| reason == REASON);
    assert!(is_expected, "seed {seed}: dead letters {:?}", report.dead);
    drop(evidence);
    std::fs::remove_dir_all(&world.folder).unwrap();
}

/// Everything that publishes, consumes and looks.
struct Traffic {
    tasks: JoinSet<()>,
    /// Of new jobs and runs.
    stop: CancellationToken,
    stop_collecting: CancellationToken,
    runs: Arc<std::sync::Mutex<bulk::Tally>>,
}

impl Traffic {
    async fn start(world: &Arc<World>) -> Self {
        clients::declare_replies(&world.broker.url).await;
        let runs = Arc::default();
        let (stop, stop_collecting) = (CancellationToken::new(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        let load = Load::new(world.seed, world.images.clone());
        let pace = Duration::from_secs_f64(1.0 / JOBS_PER_SECOND);
        tasks.spawn(clients::produce(Arc::clone(world), load, pace, stop.clone()));
        tasks.spawn(clients::collect(Arc::clone(world), stop_collecting.clone()));
        tasks.spawn(bulk::look(Arc::clone(world), Arc::clone(&runs), stop.clone()));
        for number in 0..if world.is_quick() { 1 } else { 2 } {
            let driver =
                bulk::Driver { world: Arc::clone(world), tally: Arc::clone(&runs), number };
            tasks.spawn(driver.drive(stop.clone()));
        }
        Self { tasks, stop, stop_collecting, runs }
    }

    /// Panics with a task that has.
    async fn look_after(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            ended.unwrap();
        }
    }

    /// Only the collecting goes on.
    fn is_over(&self) -> bool {
        self.tasks.len() <= 1
    }

    async fn end(&mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// Waits until each job has its outcome and each run its file.
async fn await_outcomes(world: &World, fleet: &Mutex<Fleet>, calm: Instant, traffic: &mut Traffic) {
    loop {
        fleet.lock().await.look_after();
        traffic.look_after().await;
        let missing = world.ledger.missing();
        if missing.is_empty() && traffic.is_over() {
            return;
        }
        assert!(
            calm.elapsed() < CALM,
            "seed {}: without an outcome {CALM:?} after the last fault: {missing:?}, open tasks {}, \
             results of runs in the common queue {}; queues {:?}",
            world.seed,
            traffic.tasks.len(),
            world.ledger.summary().of_runs,
            world.broker.depths(),
        );
        sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until nothing is left: no message but dead letters and results that are being read, no
/// queue of a run.
async fn await_empty_queues(world: &World) {
    let calm = Instant::now();
    loop {
        let queues = world.queues().await;
        let is_left = |(name, messages): &&(String, u64)| {
            name.starts_with("angler.run.") || (*messages > 0 && name != "angler.dead")
        };
        let left: Vec<_> = queues.iter().filter(is_left).collect();
        if left.is_empty() {
            return;
        }
        assert!(calm.elapsed() < CALM, "seed {}: left in queues: {left:?}", world.seed);
        sleep(Duration::from_millis(300)).await;
    }
}

/// How many dead letters there are, by reason, as `angler dead list` counts them; and the list of runs
/// is read once more, which tidies it.
async fn dead_letters(
    world: &World,
    tally: &std::sync::Mutex<bulk::Tally>,
) -> BTreeMap<String, u64> {
    let (exit, said) = Process::start(world, &["runs", "list", "--json"]).ended(world, tally).await;
    assert_eq!(exit, Exit::Done, "{said}");
    let mut list = Process::start(world, &["dead", "list", "--json", "--limit", "1"]);
    let out = list.output();
    let (exit, said) = list.ended(world, tally).await;
    assert_eq!(exit, Exit::Done, "{said}");
    let text = std::fs::read_to_string(out).unwrap();
    let listed: serde_json::Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(listed["reasons"].clone()).unwrap()
}

/// Writes the workers' logs and the broker's where the commands' are, if the soak fails.
struct Evidence {
    world: Arc<World>,
    fleet: Arc<Mutex<Fleet>>,
}

impl Drop for Evidence {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let folder = &self.world.folder;
        if let Ok(fleet) = self.fleet.try_lock() {
            for (number, log) in fleet.logs().enumerate() {
                let _ = std::fs::write(folder.join(format!("worker-{number:03}.log")), log);
            }
        }
        let broker = self.world.rabbitmq.folder().join("log/rabbit.log");
        let _ = std::fs::copy(broker, folder.join("rabbit.log"));
        eprintln!("logs of workers, commands and the broker: {}", folder.display());
    }
}
