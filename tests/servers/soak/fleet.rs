//! Workers, as a supervisor keeps them.

use crate::support::{Setup, Worker};

/// What a drain that takes too long logs before it exits 1.
const DRAIN_TIMED_OUT: &str = "of shutdown.grace_seconds";

/// Workers that are replaced when they end.
pub struct Fleet {
    setup: Setup,
    pub workers: Vec<Worker>,
    /// Logs of those that have ended.
    past: Vec<String>,
    peak_kib: u64,
    /// Drains that took longer than the grace period.
    pub slow_drains: usize,
}

impl Fleet {
    pub async fn start(setup: Setup, count: usize) -> Self {
        let mut fleet =
            Self { setup, workers: Vec::new(), past: Vec::new(), peak_kib: 0, slow_drains: 0 };
        for _ in 0..count {
            fleet.workers.push(fleet.setup.start().await);
        }
        fleet
    }

    fn note_memory(&mut self) {
        for worker in &self.workers {
            self.peak_kib = self.peak_kib.max(peak_kib(worker.pid()));
        }
    }

    /// Kills a worker and starts another; it need not be ready, since what it needs may be away.
    pub async fn kill(&mut self, number: usize) {
        self.note_memory();
        let mut old = self.workers.swap_remove(number);
        old.kill();
        self.past.push(old.log());
        self.workers.push(self.setup.launch().await);
    }

    /// Drains a worker and starts another.
    pub async fn drain(&mut self, number: usize) {
        self.note_memory();
        let old = self.workers.swap_remove(number);
        self.end(old).await;
        self.workers.push(self.setup.launch().await);
    }

    async fn end(&mut self, mut worker: Worker) {
        worker.signal("TERM");
        let ended = worker.ended().await;
        if !ended.success() {
            let log = worker.log();
            let slow = ended.code() == Some(1) && log.contains(DRAIN_TIMED_OUT);
            assert!(slow, "a drained worker ended with {ended}:\n{log}");
            self.slow_drains += 1;
        }
        self.past.push(worker.log());
    }

    /// No worker may end by itself, whatever happens around it.
    pub fn look_after(&mut self) {
        for worker in &mut self.workers {
            if let Some(status) = worker.has_ended() {
                panic!("a worker ended with {status}:\n{}", worker.log());
            }
        }
    }

    /// The most memory that one of them had, in KiB.
    pub fn peak_kib(&mut self) -> u64 {
        self.note_memory();
        self.peak_kib
    }

    /// Drains all.
    pub async fn stop(&mut self) {
        self.note_memory();
        while let Some(worker) = self.workers.pop() {
            self.end(worker).await;
        }
    }

    /// All logs, those of ended workers first.
    pub fn logs(&self) -> impl Iterator<Item = String> + '_ {
        self.past.iter().cloned().chain(self.workers.iter().map(Worker::log))
    }
}

/// The most memory that a process had so far, in KiB; 0 if it is gone.
pub fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok()
    });
    peak.unwrap_or(0)
}
