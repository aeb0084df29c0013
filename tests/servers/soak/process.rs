//! Commands as processes, with a log each.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::soak::bulk::Tally;
use crate::soak::fleet::peak_kib;
use crate::soak::world::World;

/// No command may take longer, whatever fails meanwhile. In a soak of 20 minutes alarms alone may block
/// publishers for more than half of ten minutes.
const DEADLINE: Duration = Duration::from_secs(1200);
const LOOK: Duration = Duration::from_millis(30);

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// Exit code 1, with what it said last.
    Failed(String),
    /// By this test.
    Killed,
    Wrong(String),
}

/// A running command; killed when dropped.
pub struct Process {
    child: Child,
    what: String,
    log: PathBuf,
    is_killed: bool,
}

impl Process {
    pub fn start(world: &World, arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let log = world.folder.join(format!("{number:05}-{}.log", arguments[0]));
        let mut command = world.commands.command(arguments);
        command.stdout(File::create(log.with_extension("out")).unwrap()); // as `output`
        command.stderr(File::create(&log).unwrap()).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        Self { child, what: arguments.join(" "), log, is_killed: false }
    }

    /// The file of its standard output.
    pub fn output(&self) -> PathBuf {
        self.log.with_extension("out")
    }

    /// SIGKILL; `false` if it has ended before.
    pub fn kill(&mut self, tally: &Mutex<Tally>) -> bool {
        self.note_memory(tally);
        if self.child.try_wait().unwrap().is_some() {
            return false;
        }
        self.child.kill().unwrap();
        self.is_killed = true;
        true
    }

    fn note_memory(&self, tally: &Mutex<Tally>) {
        let peak = peak_kib(self.child.id());
        let mut tally = tally.lock().unwrap();
        tally.peak_kib = tally.peak_kib.max(peak);
    }

    /// Waits for its end; yields that and all that it wrote to standard error.
    pub async fn ended(&mut self, world: &World, tally: &Mutex<Tally>) -> (Exit, String) {
        let started = Instant::now();
        let status = loop {
            self.note_memory(tally);
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                started.elapsed() < DEADLINE,
                "seed {}: angler {} has not ended after {DEADLINE:?}; its log is {}",
                world.seed,
                self.what,
                self.log.display()
            );
            sleep(LOOK).await;
        };
        let said = std::fs::read_to_string(&self.log).unwrap();
        let last = said.lines().last().unwrap_or_default().to_owned();
        let exit = match status.code() {
            Some(0) => Exit::Done,
            Some(1) => {
                *tally.lock().unwrap().said.entry(without_figures(&last)).or_default() += 1;
                Exit::Failed(last)
            }
            None if self.is_killed => Exit::Killed,
            _ => Exit::Wrong(format!("{status}, {}: {last}", self.log.display())),
        };
        (exit, said)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The beginning of a sentence, so that equal ones are counted together.
fn without_figures(sentence: &str) -> String {
    let mut text = String::new();
    for c in sentence.chars() {
        let c = if c.is_ascii_digit() { '#' } else { c };
        if !(c == '#' && text.ends_with('#')) {
            text.push(c);
        }
    }
    text.chars().take(110).collect()
}
