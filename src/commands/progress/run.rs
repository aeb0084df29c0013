//! The progress of a run: images, rate, time left and a few words, on one line of a terminal.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// Times a second that a bar is drawn.
const HZ: u8 = 8;
/// Columns of the bar itself, and of rate and time left: "  12345/s, 12m left".
const BAR: usize = 10;
const RATE: usize = 19;
/// Columns that the line keeps to, wherever it is shown.
const WIDTH: usize = 80;

/// Bars under each other.
pub(in crate::commands) fn bars() -> MultiProgress {
    MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(HZ))
}

/// The line of a run's progress.
pub(in crate::commands) struct RunBar {
    bar: ProgressBar,
    what: &'static str,
    rate: Arc<Mutex<Rate>>,
}

impl RunBar {
    /// Among other bars, and of so many images if that is known.
    pub(in crate::commands) fn new(
        bars: &MultiProgress,
        total: Option<u64>,
        what: &'static str,
    ) -> Self {
        // Shown only once it has its place, or its first line would stay where it was.
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        let bar = bars.add(bar);
        let rate = Arc::new(Mutex::new(Rate::default()));
        let (of_bar, template) =
            (rate.clone(), format!("{{bar:{BAR}}} {{count}} {what}{{rate}}  {{wide_msg}}"));
        if let Ok(style) = ProgressStyle::with_template(&template) {
            let style = style
                .with_key("count", |state: &ProgressState, w: &mut dyn std::fmt::Write| {
                    let _ = w.write_str(&count(state.pos(), state.len()));
                })
                .with_key("rate", move |state: &ProgressState, w: &mut dyn std::fmt::Write| {
                    let rate = of_bar.lock().unwrap_or_else(PoisonError::into_inner);
                    let _ = w.write_str(&rate.text(Instant::now(), state.pos(), state.len()));
                });
            bar.set_style(style.progress_chars("█▌ "));
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, what, rate }
    }

    /// Now it begins; so many were done by an earlier command.
    pub(in crate::commands) fn begin(&self, before: u64) {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner).begin(Instant::now(), before);
        self.bar.set_position(before);
    }

    /// So many are done, of so many as far as that is known; and words, the most important first.
    pub(in crate::commands) fn set(&self, done: u64, total: Option<u64>, words: &[String]) {
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.rate.lock().unwrap_or_else(PoisonError::into_inner).add(Instant::now(), done);
        self.bar.set_position(done);
        let used = BAR + 1 + count(done, self.bar.length()).len() + 1 + self.what.len() + RATE + 2;
        self.bar.set_message(fitting(words, WIDTH.saturating_sub(used)));
    }

    /// It is over: nothing of it stays on the screen.
    pub(in crate::commands) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn count(done: u64, all: Option<u64>) -> String {
    match all {
        Some(all) => format!("{done}/{all}"),
        None => done.to_string(),
    }
}

/// As many of the words as fit: none of them is cut, since half a number is a wrong one.
fn fitting(words: &[String], width: usize) -> String {
    let mut text = String::new();
    for (at, word) in words.iter().enumerate() {
        let comma = if at == 0 { "" } else { ", " };
        // Room for ", …", unless this is the last.
        let rest = if at + 1 == words.len() { 0 } else { 3 };
        if text.chars().count() + comma.len() + word.chars().count() + rest > width {
            let _ = write!(text, "{comma}…");
            break;
        }
        let _ = write!(text, "{comma}{word}");
    }
    text
}

/// Images a second over the last minute: workers come and go in the course of a run.
#[derive(Default)]
struct Rate {
    /// What was done when; the last is of now, the others are a second apart.
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    const WINDOW: usize = 60;
    const APART: Duration = Duration::from_secs(1);

    fn begin(&mut self, now: Instant, done: u64) {
        self.samples = [(now, done)].into();
    }

    fn add(&mut self, now: Instant, done: u64) {
        match self.samples.back() {
            // Until the first of them came, nobody worked on it.
            Some((_, first)) if self.samples.len() == 1 && done > *first => {
                self.samples = [(now, done)].into();
                self.samples.push_back((now, done));
                return;
            }
            Some((_, last)) if self.samples.len() == 1 && done == *last => return,
            _ => {}
        }
        let before = self.samples.len().checked_sub(2).and_then(|at| self.samples.get(at));
        if before.is_some_and(|(then, _)| now.duration_since(*then) < Self::APART) {
            self.samples.pop_back();
        }
        self.samples.push_back((now, done));
        if self.samples.len() > Self::WINDOW {
            self.samples.pop_front();
        }
    }

    fn a_second(&self, now: Instant) -> Option<f64> {
        let ((then, before), (_, done)) = (self.samples.front()?, self.samples.back()?);
        let seconds = now.duration_since(*then).as_secs_f64();
        (done > before && seconds > 0.0).then(|| (done - before) as f64 / seconds)
    }

    fn text(&self, now: Instant, done: u64, all: Option<u64>) -> String {
        let rate = match self.a_second(now) {
            Some(rate) if all != Some(done) => rate,
            _ => return String::new(),
        };
        let mut text = format!("  {rate:.0}/s");
        if let Some(all) = all {
            let left = Duration::try_from_secs_f64((all.saturating_sub(done) as f64 / rate).ceil());
            if let Ok(left) = left {
                let _ = write!(text, ", {:#} left", indicatif::HumanDuration(left));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_last_minutes_and_does_not_count_what_was_done_before() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut rate = Rate::default();
        rate.begin(start, 5000);
        assert_eq!(rate.text(at(9.0), 5000, Some(9000)), "");
        // Nobody worked for 100 s; then 64 images ten times a second.
        for tick in 0..=600 {
            rate.add(at(100.0 + f64::from(tick) / 10.0), 5064 + tick as u64 * 64);
        }
        let done = 5064 + 600 * 64;
        assert_eq!(rate.text(at(160.0), done, Some(done + 6400)), "  640/s, 10s left");
        assert_eq!(rate.text(at(160.0), done, None), "  640/s");
        assert_eq!(rate.text(at(160.0), done, Some(done)), "");
        assert!(rate.samples.len() <= Rate::WINDOW);
        // Half as many workers: believed after a minute, and a standstill shows as well.
        for tick in 0..=1200 {
            rate.add(at(160.0 + f64::from(tick) / 10.0), done + tick as u64 * 32);
        }
        let done = done + 1200 * 32;
        assert_eq!(rate.text(at(280.0), done, None), "  320/s");
        assert_eq!(rate.text(at(340.0), done, None).len(), "  160/s".len());
    }

    #[test]
    fn words_that_do_not_fit_are_left_out_whole() {
        let words = ["timeout 12", "not_found 3", "x 1"].map(str::to_owned);
        assert_eq!(fitting(&words, 80), "timeout 12, not_found 3, x 1");
        assert_eq!(fitting(&words, 28), "timeout 12, not_found 3, x 1");
        assert_eq!(fitting(&words, 27), "timeout 12, not_found 3, …");
        assert_eq!(fitting(&words, 20), "timeout 12, …");
        assert_eq!(fitting(&words, 5), "…");
        assert_eq!(fitting(&[], 5), "");
    }
}
