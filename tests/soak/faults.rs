//! What is done to workers, broker, store, and the ways between them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep;

use crate::load::Ledger;
use crate::support::proxy::{Fault, Proxy};
use crate::support::servers::Server;
use crate::support::{Broker, Setup, Worker};

/// Workers, as a supervisor keeps them.
pub struct Fleet {
    setup: Setup,
    workers: Vec<Worker>,
    /// What those who are gone have logged.
    past: Vec<String>,
    peak_kib: u64,
}

impl Fleet {
    pub async fn start(setup: Setup, count: usize) -> Self {
        let mut fleet = Self { setup, workers: Vec::new(), past: Vec::new(), peak_kib: 0 };
        for _ in 0..count {
            fleet.workers.push(fleet.setup.start().await);
        }
        fleet
    }

    fn note_memory(&mut self) {
        for worker in &self.workers {
            let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid()));
            let peak = status.unwrap_or_default().lines().find_map(|line| {
                line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok()
            });
            self.peak_kib = self.peak_kib.max(peak.unwrap_or(0));
        }
    }

    /// Replaces a worker; it need not be ready, since what it needs may be away.
    async fn replace(&mut self, number: usize, how: &str) {
        self.note_memory();
        let mut old = self.workers.swap_remove(number);
        if how == "KILL" {
            old.kill();
        } else {
            old.signal(how);
            let ended = old.ended().await;
            assert!(ended.success(), "a worker ended with {ended}:\n{}", old.log());
        }
        self.past.push(old.log());
        drop(old);
        self.workers.push(self.setup.launch().await);
    }

    /// None may end by itself, whatever happens around it.
    pub fn look_after(&mut self) {
        for number in 0..self.workers.len() {
            if let Some(status) = self.workers[number].has_ended() {
                panic!("a worker ended with {status}:\n{}", self.workers[number].log());
            }
        }
    }

    pub fn peak_kib(&mut self) -> u64 {
        self.note_memory();
        self.peak_kib
    }

    pub fn logs(&self) -> String {
        let past = self.past.iter().cloned();
        past.chain(self.workers.iter().map(Worker::log)).collect::<Vec<_>>().join("\n---\n")
    }

    /// In order, so that nothing is done twice.
    pub async fn stop(&mut self) {
        for mut worker in self.workers.drain(..) {
            worker.signal("TERM");
            let ended = worker.ended().await;
            assert!(ended.success(), "a worker ended with {ended}:\n{}", worker.log());
        }
    }
}

/// Injects faults, one at a time, each with an end.
pub struct Injector<'a> {
    random: fastrand::Rng,
    rabbitmq: &'a Server,
    seaweedfs: &'a Server,
    to_broker: &'a Proxy,
    to_store: &'a Proxy,
    broker: &'a Broker,
    done: BTreeMap<&'static str, usize>,
    /// From a broker that serves again to the first result.
    recoveries: Vec<Duration>,
    restarted: Option<Instant>,
    upcoming: Vec<&'static str>,
}

const FAULTS: [&str; 19] = [
    "worker killed",
    "worker stopped and continued",
    "worker ended in order",
    "broker killed",
    "broker stopped and continued",
    "broker short of memory",
    "broker connections closed",
    "way to the broker cut",
    "way to the broker slow",
    "way to the broker silent",
    "results queue full",
    "store killed",
    "store stopped and continued",
    "way to the store cut",
    "way to the store slow",
    "way to the store narrow",
    "way to the store silent",
    "way to the store closed",
    "answers of the store broken off",
];

impl<'a> Injector<'a> {
    pub fn new(
        seed: u64,
        rabbitmq: &'a Server,
        seaweedfs: &'a Server,
        to_broker: &'a Proxy,
        to_store: &'a Proxy,
        broker: &'a Broker,
    ) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            rabbitmq,
            seaweedfs,
            to_broker,
            to_store,
            broker,
            done: BTreeMap::new(),
            recoveries: Vec::new(),
            restarted: None,
            upcoming: Vec::new(),
        }
    }

    /// How often each fault was there.
    pub fn done(&self) -> &BTreeMap<&'static str, usize> {
        &self.done
    }

    pub fn recoveries(&self) -> &[Duration] {
        &self.recoveries
    }

    /// Faults after which a job may be done twice.
    pub fn explains_duplicates(&self) -> usize {
        let harmless = ["slow", "narrow", "in order", "full", "store"];
        let crash = |fault: &&str| !harmless.iter().any(|word| fault.contains(word));
        self.done.iter().filter(|(fault, _)| crash(fault)).map(|(_, times)| times).sum()
    }

    /// One fault, and a pause. All kinds come once before any comes again.
    pub async fn one(&mut self, fleet: &mut Fleet, ledger: &Ledger) {
        if self.upcoming.is_empty() {
            self.upcoming = FAULTS.to_vec();
            self.random.shuffle(&mut self.upcoming);
        }
        let fault = self.upcoming.pop().unwrap();
        *self.done.entry(fault).or_default() += 1;
        println!("{fault}");
        self.inject(fault, fleet).await;
        let pause = Duration::from_secs_f64(0.5 + 1.5 * self.random.f64());
        sleep(pause).await;
        fleet.look_after();
        if let Some(restarted) = self.restarted.take() {
            // The pause may be over before: it is waited for.
            let waited = Instant::now();
            while ledger.last().is_none_or(|last| last < restarted) {
                assert!(waited.elapsed() < Duration::from_secs(60), "no result\n{}", fleet.logs());
                sleep(Duration::from_millis(20)).await;
            }
            self.recoveries.push(ledger.last().unwrap() - restarted);
        }
    }

    async fn inject(&mut self, fault: &'static str, fleet: &mut Fleet) {
        let a_while = Duration::from_secs_f64(0.5 + 3.0 * self.random.f64());
        // Longer than the broker waits for heartbeats.
        let long = Duration::from_secs_f64(6.0 + 3.0 * self.random.f64());
        let worker = self.random.usize(0..fleet.workers.len());
        let quiet = Fault::default();
        match fault {
            "worker killed" => fleet.replace(worker, "KILL").await,
            "worker ended in order" => fleet.replace(worker, "TERM").await,
            "worker stopped and continued" => {
                fleet.workers[worker].signal("STOP");
                sleep(long).await;
                fleet.workers[worker].signal("CONT");
            }
            "broker killed" => {
                self.rabbitmq.kill();
                sleep(a_while).await;
                self.rabbitmq.start();
                self.restarted = Some(Instant::now());
            }
            "broker stopped and continued" => {
                self.rabbitmq.signal("STOP");
                sleep(long).await;
                self.rabbitmq.signal("CONT");
            }
            "broker short of memory" => {
                self.rabbitmq.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
                sleep(a_while).await;
                self.rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.6"]);
            }
            "broker connections closed" => {
                for (name, own) in self.broker.connections() {
                    if own.starts_with("angler ") {
                        self.broker.cut(&name);
                    }
                }
            }
            "way to the broker cut" => self.to_broker.cut(),
            "way to the broker slow" => {
                let latency = Duration::from_millis(60);
                self.passing(self.to_broker, Fault { latency, ..quiet }, a_while).await;
            }
            "way to the broker silent" => {
                self.passing(self.to_broker, Fault { black_hole: true, ..quiet }, long).await;
            }
            "results queue full" => {
                let policy = format!("policies/{}/full", self.broker.vhost);
                let full = json!({
                    "pattern": "^angler.results$", "apply-to": "queues",
                    "definition": {"max-length": 1, "overflow": "reject-publish"},
                });
                self.broker.manage("PUT", &policy, Some(&full.to_string()));
                sleep(a_while).await;
                self.broker.manage("DELETE", &policy, None);
            }
            "store killed" => {
                self.seaweedfs.kill();
                sleep(a_while).await;
                self.seaweedfs.start();
            }
            "store stopped and continued" => {
                self.seaweedfs.signal("STOP");
                sleep(a_while).await;
                self.seaweedfs.signal("CONT");
            }
            "way to the store cut" => self.to_store.cut(),
            "way to the store slow" => {
                let latency = Duration::from_millis(100);
                self.passing(self.to_store, Fault { latency, ..quiet }, a_while).await;
            }
            "way to the store narrow" => {
                let narrow = Fault { bytes_per_second: Some(50_000), ..quiet };
                self.passing(self.to_store, narrow, a_while).await;
            }
            "way to the store silent" => {
                self.passing(self.to_store, Fault { black_hole: true, ..quiet }, a_while).await;
            }
            "way to the store closed" => {
                let closed = Fault { refuse: true, ..quiet };
                self.to_store.cut();
                self.passing(self.to_store, closed, long).await;
            }
            "answers of the store broken off" => {
                let broken = Fault { cut_after: Some(2_000), ..quiet };
                self.passing(self.to_store, broken, a_while).await;
            }
            other => unreachable!("{other}"),
        }
    }

    async fn passing(&self, proxy: &Proxy, fault: Fault, time: Duration) {
        proxy.fault(fault);
        sleep(time).await;
        proxy.heal();
    }
}
