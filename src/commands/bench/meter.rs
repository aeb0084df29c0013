//! What a piece of work costs: time on the clock, core time of this process, and core time of the
//! whole machine, in which a broker and a store on the same machine count, and so does any other load.
//!
//! Linux tells both in `/proc`, in ticks of a hundredth of a second. Elsewhere only the clock counts.

use std::time::{Duration, Instant};

use super::figures::Sample;

/// The kernel's unit of time in `/proc`: `USER_HZ` is 100 on every platform that angler is built for.
const TICK_MS: f64 = 10.0;

/// Runs from its start until it is stopped.
pub(super) struct Meter {
    started: Instant,
    machine: Option<u64>,
    own: Option<u64>,
}

impl Meter {
    pub(super) fn start() -> Self {
        Self { machine: machine(), own: own(), started: Instant::now() }
    }

    /// How long it has run.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What so many images cost.
    pub(super) fn stop(self, images: u64) -> Sample {
        let seconds = self.started.elapsed().as_secs_f64();
        let spent = |before: Option<u64>, after: Option<u64>| {
            Some(after?.saturating_sub(before?) as f64 * TICK_MS)
        };
        Sample {
            images: images as f64,
            seconds,
            machine_ms: spent(self.machine, machine()),
            own_ms: spent(self.own, own()),
            decode_share: None,
        }
    }
}

/// How many cores' worth of work the machine does by itself, looked at for so long.
pub(super) async fn busy_cores(look: Duration) -> Option<f64> {
    let (before, started) = (machine()?, Instant::now());
    tokio::time::sleep(look).await;
    let busy = machine()?.saturating_sub(before) as f64 * TICK_MS / 1000.0;
    Some(busy / started.elapsed().as_secs_f64())
}

/// The processors that `/proc/stat` counts: in a container those of the host, which may be more than
/// the process may use.
pub(super) fn processors() -> Option<usize> {
    Some(count_processors(&std::fs::read_to_string("/proc/stat").ok()?))
}

/// What the machine could give to a process without swapping, in bytes.
pub(super) fn available_memory() -> Option<u64> {
    available_bytes(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024)
}

fn machine() -> Option<u64> {
    busy_ticks(&std::fs::read_to_string("/proc/stat").ok()?)
}

fn own() -> Option<u64> {
    own_ticks(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

/// User, nice, system, interrupts and soft interrupts, all processors together. Not idle, not waiting
/// for a disk, and not what a hypervisor gave to somebody else.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find(|line| line.starts_with("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some(user + nice + system + irq + softirq)
}

fn count_processors(stat: &str) -> usize {
    let numbered = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    stat.lines().filter(numbered).count()
}

/// User and system time of a process. Its name stands in brackets and may hold anything.
fn own_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    // The first field behind the name is number 3; user time is 14, system time 15.
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  100 20 30 9000 400 5 6 70 8 9\n\
                        cpu0 50 10 15 4500 200 2 3 35 4 4\n\
                        cpu1 50 10 15 4500 200 3 3 35 4 5\n\
                        intr 1 2 3\n";

    #[test]
    fn busy_is_neither_idle_nor_waiting_nor_stolen() {
        assert_eq!(busy_ticks(STAT), Some(100 + 20 + 30 + 5 + 6));
        assert_eq!(count_processors(STAT), 2);
        assert_eq!(busy_ticks("cpu  1 2 3\n"), None);
        assert_eq!(busy_ticks("intr 1\n"), None);
    }

    #[test]
    fn memory_that_is_left_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemFree: 5 kB\nMemAvailable:   22000000 kB\n";
        assert_eq!(available_bytes(text), Some(22_000_000 * 1024));
        assert_eq!(available_bytes("MemTotal: 24 kB\n"), None);
    }

    #[test]
    fn a_process_may_be_called_anything() {
        let line = "12 (a) b (c) R 1 2 3 4 5 6 7 8 9 10 70 8 0 0 20 0 9 0 100";
        assert_eq!(own_ticks(line), Some(78));
        assert_eq!(own_ticks("12 (cut) R 1 2"), None);
        assert_eq!(own_ticks(""), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn work_is_seen_on_this_machine() {
        let meter = Meter::start();
        let mut sum = 0_u64;
        // Until both counters have moved, which takes some ticks of work.
        let sample = loop {
            sum = (0..1_000_000_u64).fold(sum, |a, n| a.wrapping_mul(31).wrapping_add(n));
            let now = (machine().zip(meter.machine), own().zip(meter.own));
            if matches!(now, (Some((a, b)), Some((c, d))) if a > b && c > d) {
                break meter.stop(10);
            }
        };
        assert!(sum != 1 && sample.seconds > 0.0 && sample.images == 10.0);
        assert!(sample.machine_ms >= Some(10.0) && sample.own_ms >= Some(10.0), "{sample:?}");
        assert!(processors().is_some_and(|count| count >= 1));
    }
}
