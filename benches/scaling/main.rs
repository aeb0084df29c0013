//! Throughput and latency of whole workers, as processes, through a real broker and a real store.
//!
//! ```sh
//! eval "$(tests/services.sh up)"
//! cargo bench --bench scaling                              # about eight minutes
//! cargo bench --bench scaling -- --only scaling --workers 1,2
//! cargo bench --bench scaling -- --json target/scaling.json
//! tests/services.sh down
//! ```
//!
//! The workers are this program, run again: the daemon as `angler worker` puts it together, but
//! with an embedder that sleeps as a GPU lets its host sleep (a fixed time a batch of up to 32), or
//! that takes no time. Images are JPEGs of 10 kB at most, made of the sample photos.
//!
//! * `overhead`: a worker whose embedder takes no time, beside what the store and the broker give
//!   without any work, in the same rounds. What is left is angler itself, decoding included.
//! * `scaling`: images a second of 1, 2, 4 and 8 workers.
//! * `latency`: from a job's time of arrival to its result, at 10, 50 and 90 % of what was measured
//!   as capacity just before. Arrivals are a Poisson process that does not wait for anybody: a job
//!   that is held up counts from when it was due.
//! * `lanes`: one-image jobs in a queue of their own, while another has more jobs than can be done.
//! * `runs`, only when it is named: a million keys listed and enqueued, and a run of 100,000 images
//!   whose commands are killed on their way.
//! * `idle`: one-image jobs, one at a time, to `angler worker` with its default model, beside the
//!   time of the parts, each measured alone.
//!
//! * `metrics`, `traces` (only if named): the worker of `overhead` with and without recording metrics, or
//!   sending a trace of each job to a collector on this machine, in turn.
//!
//! Each figure is the median of alternating rounds; latencies are taken from all rounds together.
//! Everything shares this machine's cores: workers, broker, store, and this program.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // As the tests' support.

#[path = "../common/messages.rs"]
mod messages;
#[path = "../common/photos.rs"]
mod photos;
#[path = "../../tests/support/mod.rs"]
mod support;

mod ceilings;
mod costs;
mod idle;
mod lanes;
mod latency;
mod load;
mod overhead;
mod runs;
mod statistics;
mod throughput;
mod worker;
mod world;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value};

use crate::costs::Cost;
use crate::support::var;
use crate::world::World;

/// Measure whole workers.
#[derive(Parser)]
pub struct Options {
    /// Sections, by comma
    #[arg(long, value_delimiter = ',', default_values = ["overhead", "scaling", "latency", "lanes", "idle"])]
    only: Vec<Section>,
    /// Rounds; medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Each rate is taken over so many seconds, after a warm-up
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Numbers of workers, ascending
    #[arg(long, value_delimiter = ',', default_values = ["1", "2", "4", "8"])]
    workers: Vec<usize>,
    /// What a batch takes in the section `scaling`: a fast GPU, and one that leaves these cores room
    #[arg(long, value_delimiter = ',', default_values = ["20", "160"])]
    batch_ms: Vec<u64>,
    /// What a batch takes in the sections `latency` and `lanes`
    #[arg(long, default_value_t = 40)]
    latency_batch_ms: u64,
    /// Each load of the sections `latency` and `lanes` lasts so many seconds a round
    #[arg(long, default_value_t = 7.0)]
    latency_seconds: f64,
    /// One-image jobs a round in the section `idle`
    #[arg(long, default_value_t = 100)]
    idle_jobs: usize,
    /// Distinct images
    #[arg(long, default_value_t = 512)]
    images: usize,
    /// The figures as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    Overhead,
    Scaling,
    Latency,
    Lanes,
    Idle,
    Metrics,
    Traces,
    /// Only when it is named: it takes minutes and a release build of angler
    Runs,
}

impl Options {
    fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

fn main() -> Result<()> {
    let orders = worker::orders()?;
    let runtime = tokio::runtime::Runtime::new()?;
    if let Some(orders) = orders {
        return runtime.block_on(worker::run(orders));
    }
    let options = Options::parse();
    ensure!(options.rounds > 0 && options.seconds > 0.0, "nothing to measure: --rounds, --seconds");
    ensure!(options.images > 0, "nothing to measure: --images");
    ensure!(
        options.workers.is_sorted() && options.workers.first() > Some(&0),
        "--workers must be ascending numbers from 1"
    );
    ensure!(
        std::env::var_os("ANGLER_TEST_AMQP_URL").is_some(),
        "no servers: eval \"$(tests/services.sh up)\" starts them"
    );
    with_credentials()?;
    runtime.block_on(run(&options))
}

/// The S3 client takes its credentials from the environment, which a running program must not
/// change: it starts itself anew with them.
fn with_credentials() -> Result<()> {
    let (key, secret) = (var("ANGLER_TEST_S3_KEY"), var("ANGLER_TEST_S3_SECRET"));
    if std::env::var("AWS_ACCESS_KEY_ID").is_ok_and(|own| own == key) {
        return Ok(());
    }
    let error = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env("AWS_ACCESS_KEY_ID", key)
        .env("AWS_SECRET_ACCESS_KEY", secret)
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env_remove("AWS_PROFILE")
        .env_remove("AWS_REGION")
        .exec();
    Err(error).context("this program cannot be started anew")
}

async fn run(options: &Options) -> Result<()> {
    let world = World::new(options.images).await?;
    println!(
        "{} cores; {} JPEGs of {} × {}, {:.1} kB on average\n",
        std::thread::available_parallelism()?,
        world.uris.len(),
        world::SIZE.0,
        world::SIZE.1,
        world.image_bytes / 1e3,
    );
    let mut report = Map::new();
    for section in &options.only {
        let (name, figures): (_, Value) = match section {
            Section::Overhead => ("overhead", overhead::measure(&world, options).await?),
            Section::Scaling => ("scaling", throughput::measure(&world, options).await?),
            Section::Latency => ("latency", latency::measure(&world, options).await?),
            Section::Lanes => ("lanes", lanes::measure(&world, options).await?),
            Section::Idle => ("idle", idle::measure(&world, options).await?),
            Section::Runs => ("runs", runs::measure(&world, options).await?),
            Section::Metrics => ("metrics", costs::measure(&world, options, Cost::Metrics).await?),
            Section::Traces => ("traces", costs::measure(&world, options, Cost::Traces).await?),
        };
        report.insert(name.to_owned(), figures);
        // After each, so that a later one that fails takes nothing with it.
        if let Some(path) = &options.json {
            let text = serde_json::to_string_pretty(&report)?;
            std::fs::write(path, text + "\n")
                .with_context(|| format!("{} cannot be written", path.display()))?;
        }
    }
    Ok(())
}
