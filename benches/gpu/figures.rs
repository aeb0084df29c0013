//! Rates in alternating rounds, and their medians.

use std::time::{Duration, Instant};

use anyhow::Result;

/// The value in the middle; of two, the smaller; NaN of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// Images a second: `work` is done, so many images a call, until the time is over.
pub fn rate(time: Duration, images: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    let mut done = 0;
    while done == 0 || started.elapsed() < time {
        work()?;
        done += images;
    }
    Ok(done as f64 / started.elapsed().as_secs_f64())
}

/// The median rate of each of `count` ways, which take turns within a round: a machine that slows
/// down, or warms up, does so for all of them. The first round is for warming up alone.
pub fn in_turns(
    rounds: usize,
    count: usize,
    mut measure: impl FnMut(usize) -> Result<f64>,
) -> Result<Vec<f64>> {
    for way in 0..count {
        measure(way)?;
    }
    let mut rates = vec![Vec::new(); count];
    for _ in 0..rounds {
        for (way, rates) in rates.iter_mut().enumerate() {
            rates.push(measure(way)?);
        }
    }
    Ok(rates.into_iter().map(median).collect())
}

/// With as many digits as say something.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => {
            let digits = format!("{value:.0}");
            let mut text = String::new();
            for (index, digit) in digits.chars().enumerate() {
                if index > 0 && (digits.len() - index).is_multiple_of(3) {
                    text.push(',');
                }
                text.push(digit);
            }
            text
        }
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
