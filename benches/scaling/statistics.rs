//! Medians, percentiles, and the time that cores were busy.

use std::time::Duration;

use anyhow::{Context, Result};

/// Clock ticks a second in `/proc`: the same on every Linux there is.
const TICKS: f64 = 100.0;

/// The value in the middle; of two, the smaller.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    percentile(&sorted(values), 0.5)
}

pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The least value that at least this share of `sorted` does not exceed; NaN of nothing.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Seconds that processes have spent on cores so far.
pub fn cpu_seconds(processes: &[u32]) -> Result<f64> {
    let of = |id: &u32| {
        let path = format!("/proc/{id}/stat");
        let stat =
            std::fs::read_to_string(&path).with_context(|| format!("{path}: a worker ended"))?;
        // Behind the name, which may hold anything: state is the first, utime and stime are the
        // 12th and 13th.
        let (_, fields) = stat.rsplit_once(')').context("/proc: no name in stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
    };
    processes.iter().map(of).sum()
}

/// Seconds that all cores of the machine have been busy so far, whoever kept them so.
pub fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> =
        line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal; guests count in user already.
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum::<f64>();
    Ok(busy / TICKS)
}
