//! Bulk runs, by the real commands: they are killed and started again, and two of a kind meet.
//!
//! Run after run has the same id, as a nightly run has, so that late results of an earlier one would
//! be noticed. In the end each run's file must hold each image exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Mutex as TurnMutex, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::soak::process::{Exit, Process};
use crate::soak::world::World;
use crate::support::tiny;

const PAUSE: Duration = Duration::from_millis(300);

/// What became of all runs and their commands.
#[derive(Default)]
pub struct Tally {
    pub complete: usize,
    pub cancelled: usize,
    pub images: usize,
    pub jobs: usize,
    pub senders_killed: usize,
    pub collectors_killed: usize,
    /// Commands that failed while another of their kind was at work.
    pub gave_way: usize,
    /// `angler runs list` and `angler dead list`.
    pub looks: usize,
    /// What commands said that gave up, without its figures.
    pub said: BTreeMap<String, usize>,
    /// The most memory that a command had, in KiB.
    pub peak_kib: u64,
}

/// Starts runs, one after another, until it is stopped.
pub struct Driver {
    pub world: Arc<World>,
    pub tally: Arc<Mutex<Tally>>,
    pub number: u64,
}

impl Driver {
    pub async fn drive(self, stop: CancellationToken) {
        let mut random = fastrand::Rng::with_seed(self.world.seed ^ (0xb01d + self.number));
        let mut round = 0;
        while !stop.is_cancelled() {
            let name = format!("nightly-{}", self.number);
            let run = Run::new(&self, &mut random, name, round);
            Box::pin(run.live(&mut random)).await;
            round += 1;
        }
    }
}

/// Looks at runs and dead letters at any time until it is stopped.
pub async fn look(world: Arc<World>, tally: Arc<Mutex<Tally>>, stop: CancellationToken) {
    let mut random = fastrand::Rng::with_seed(world.seed ^ 0x100c);
    loop {
        let pause = Duration::from_secs_f64(1.0 + 4.0 * random.f64());
        if stop.run_until_cancelled(sleep(pause)).await.is_none() {
            return;
        }
        let command = match random.usize(0..4) {
            0 => ["dead", "list", "--json"],
            _ => ["runs", "list", "--json"],
        };
        let (exit, _) = Process::start(&world, &command).ended(&world, &tally).await;
        // No dead letters is exit code 1, as is a broker that is away.
        let fine = matches!(exit, Exit::Done | Exit::Failed(_));
        if !fine {
            world.ledger.wrong(format!("{command:?}: {exit:?}"));
        }
        tally.lock().unwrap().looks += 1;
    }
}

/// One run.
struct Run<'a> {
    world: &'a World,
    tally: &'a Mutex<Tally>,
    id: String,
    list: PathBuf,
    out: PathBuf,
    /// What must come of each image, by its id; in the order of the list.
    images: Vec<(String, Value)>,
    per_job: usize,
    is_cancelled: bool,
    /// `true` while collectors may be at work.
    gate: watch::Sender<bool>,
    /// Held while collectors are at work.
    at_work: TurnMutex<()>,
}

impl<'a> Run<'a> {
    fn new(driver: &'a Driver, random: &mut fastrand::Rng, id: String, round: usize) -> Self {
        let world = &*driver.world;
        let most = if world.is_quick() { 200 } else { 2_000 };
        let (mut images, mut list) = (Vec::new(), String::new());
        for number in 0..random.usize(50..most) {
            let name = format!("{round}-{number:04}");
            let pick = random.usize(0..30);
            let (uri, verdict) = match pick {
                29 => ("s3://soak/no-such-object.png", "not_found"),
                _ => (world.images[pick % 3].as_str(), tiny::LABELS[pick % 3]),
            };
            list += &format!("{}\n", json!({"uri": uri, "id": name}));
            images.push((name, json!(verdict)));
        }
        let file = |ending: &str| world.folder.join(format!("{id}-{round}.{ending}"));
        let (path, out) = (file("images.jsonl"), file("jsonl"));
        std::fs::write(&path, list).unwrap();
        let per_job = random.usize(2..8);
        let is_cancelled = !world.is_quick() && random.usize(0..5) == 0;
        Self {
            world,
            tally: &driver.tally,
            id,
            list: path,
            out,
            images,
            per_job,
            is_cancelled,
            gate: watch::Sender::new(true),
            at_work: TurnMutex::default(),
        }
    }

    fn tally(&self, add: impl FnOnce(&mut Tally)) {
        add(&mut self.tally.lock().unwrap());
    }

    fn start(&self, arguments: &[&str]) -> Process {
        Process::start(self.world, arguments)
    }

    fn sender(&self, random: &mut fastrand::Rng) -> Process {
        let (list, per_job) = (self.list.to_str().unwrap(), self.per_job.to_string());
        let mut arguments =
            vec!["enqueue", list, "--classes", "colours", "--run", &self.id, "--per-job", &per_job];
        if random.usize(0..3) == 0 {
            arguments.extend(["--max-queued", "10"]);
        }
        self.start(&arguments)
    }

    fn collector(&self, out: &Path) -> Process {
        let out = out.to_str().unwrap();
        self.start(&["collect", "--run", &self.id, "--out", out, "--silence", "30"])
    }

    /// From the first sender to the file.
    async fn live(&self, random: &mut fastrand::Rng) {
        let (mut of_senders, mut of_collectors) = (random.fork(), random.fork());
        tokio::join!(
            self.send(&mut of_senders),
            self.collect(&mut of_collectors),
            self.cancel(random)
        );
        self.verify(&self.out);
        self.tally(|tally| match self.is_cancelled {
            true => tally.cancelled += 1,
            false => tally.complete += 1,
        });
    }

    /// Until a sender says that all jobs are sent, or that the run was cancelled.
    ///
    /// Nothing remembers a run that was collected: its id is free, and a sender that is started again
    /// begins a new run. So collectors are kept from finishing the run meanwhile.
    async fn send(&self, random: &mut fastrand::Rng) {
        let mut is_first = true;
        loop {
            let has_second = random.usize(0..4) == 0;
            if has_second || !is_first {
                self.gate.send_replace(false);
                let _none_at_work = self.at_work.lock().await;
                if self.out.exists() {
                    break;
                }
            }
            let is_killed = random.usize(0..5) < 2 || (is_first && self.world.is_quick());
            is_first = false;
            if self.send_once(has_second, is_killed, random).await {
                break;
            }
            sleep(PAUSE).await;
        }
        self.gate.send_replace(true);
    }

    /// `true` if all jobs are sent, or no more will be.
    async fn send_once(
        &self,
        has_second: bool,
        is_killed: bool,
        random: &mut fastrand::Rng,
    ) -> bool {
        let mut sender = self.sender(random);
        let second = has_second.then(|| self.sender(random));
        if is_killed {
            sleep(Duration::from_secs_f64(2.0 * random.f64())).await;
            if sender.kill(self.tally) {
                self.tally(|tally| tally.senders_killed += 1);
            }
        }
        let (exit, said) = sender.ended(self.world, self.tally).await;
        self.judge("enqueue", &exit);
        if let Some(mut second) = second {
            let (exit, _) = second.ended(self.world, self.tally).await;
            self.judge("enqueue", &exit);
            self.tally(|tally| tally.gave_way += usize::from(matches!(exit, Exit::Failed(_))));
        }
        exit == Exit::Done || (self.is_cancelled && said.contains("was cancelled"))
    }

    /// Until a collector says that the file is written.
    async fn collect(&self, random: &mut fastrand::Rng) {
        sleep(Duration::from_secs_f64(3.0 * random.f64())).await;
        let mut gate = self.gate.subscribe();
        loop {
            gate.wait_for(|is_open| *is_open).await.unwrap();
            let at_work = self.at_work.lock().await;
            if self.collect_once(&mut gate, random).await {
                return;
            }
            drop(at_work);
            sleep(PAUSE).await;
        }
    }

    /// `true` if the file is written and the run is gone.
    async fn collect_once(
        &self,
        gate: &mut watch::Receiver<bool>,
        random: &mut fastrand::Rng,
    ) -> bool {
        let mut collectors = vec![self.collector(&self.out)];
        if random.usize(0..3) == 0 {
            collectors.push(self.collector(&self.out));
        }
        let has_second = collectors.len() > 1;
        let killed_after = (random.usize(0..5) < 2).then(|| 3.0 * random.f64());
        let limit = Duration::from_secs_f64(killed_after.unwrap_or(1e6));
        let mut is_over = false;
        for (number, mut collector) in collectors.into_iter().enumerate() {
            let stopped = async {
                tokio::select! {
                    _ = gate.wait_for(|is_open| !is_open) => {}
                    () = sleep(limit), if number == 0 => {}
                }
            };
            let ended = tokio::select! {
                ended = collector.ended(self.world, self.tally) => Some(ended),
                () = stopped => None,
            };
            let (exit, said) = match ended {
                Some(ended) => ended,
                None => {
                    if collector.kill(self.tally) {
                        self.tally(|tally| tally.collectors_killed += 1);
                    }
                    collector.ended(self.world, self.tally).await
                }
            };
            self.judge("collect", &exit);
            let is_done = self.is_over(&exit, &said);
            is_over |= is_done;
            let gave_way = has_second && matches!(exit, Exit::Failed(_));
            self.tally(|tally| tally.gave_way += usize::from(gave_way));
        }
        is_over
    }

    fn is_over(&self, exit: &Exit, said: &str) -> bool {
        *exit == Exit::Done || (said.contains("it was cancelled when") && self.out.exists())
    }

    async fn cancel(&self, random: &mut fastrand::Rng) {
        if !self.is_cancelled {
            return;
        }
        sleep(Duration::from_secs_f64(0.5 + 4.0 * random.f64())).await;
        loop {
            let (exit, said) =
                self.start(&["runs", "cancel", &self.id]).ended(self.world, self.tally).await;
            self.judge("runs cancel", &exit);
            let is_late = self.out.exists() && said.contains("there is no run");
            if exit == Exit::Done || is_late {
                return;
            }
            sleep(PAUSE).await;
        }
    }

    /// A command may fail, and be killed by this test; nothing else.
    fn judge(&self, command: &str, exit: &Exit) {
        if let Exit::Wrong(how) = exit {
            self.world.ledger.wrong(format!("{command} of run {}: {how}", self.id));
        }
    }

    /// Each image once, with the right outcome; of a cancelled run whole jobs, once each.
    fn verify(&self, path: &Path) {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut seen: BTreeSet<String> = BTreeSet::new();
        let expected: BTreeMap<&str, &Value> =
            self.images.iter().map(|(id, verdict)| (id.as_str(), verdict)).collect();
        let mut jobs = BTreeSet::new();
        let wrong = |what: String| {
            self.world.ledger.wrong(format!("{}: {what}", path.display()));
        };
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            if let Some(job) = row["job"].as_str() {
                let cancelled = self.is_cancelled && row["error"]["code"] == "cancelled";
                if !cancelled || !jobs.insert(job.to_owned()) {
                    wrong(format!("a job's row {row}"));
                }
                let index: usize = job.rsplit_once('/').unwrap().1.parse().unwrap();
                for (id, _) in self.images.iter().skip(index * self.per_job).take(self.per_job) {
                    if !seen.insert(id.clone()) {
                        wrong(format!("image {id} of {job} has two outcomes"));
                    }
                }
                continue;
            }
            let id = row["id"].as_str().unwrap_or_default();
            let verdict = match &row["label"] {
                Value::Null => &row["error"]["code"],
                label => label,
            };
            if expected.get(id) != Some(&verdict) {
                wrong(format!("{row} instead of {:?}", expected.get(id)));
            }
            if !seen.insert(id.to_owned()) {
                wrong(format!("image {id} is there twice"));
            }
        }
        // Jobs are sent in their order: of a cancelled run the first ones are there, and whole.
        let whole = |count: usize| count.is_multiple_of(self.per_job) || count == self.images.len();
        let first = self.images.iter().take(seen.len()).all(|(id, _)| seen.contains(id));
        if !first || !whole(seen.len()) || (!self.is_cancelled && seen.len() < self.images.len()) {
            wrong(format!("{} of {} images", seen.len(), self.images.len()));
        }
        self.tally(|tally| {
            tally.images += seen.len();
            tally.jobs += seen.len().div_ceil(self.per_job);
        });
    }
}
