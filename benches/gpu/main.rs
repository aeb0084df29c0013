//! What scoring in the graph is worth on a GPU, and that it is right there: a proof that runs anywhere.
//!
//! ```sh
//! tests/gpu.sh bundle target/gpu-bundle --arch 90   # parts to copy to a machine with an H100 or H200
//! 1/run.sh take /tmp/proof; /tmp/proof/run.sh step 1   # there: neither cargo nor a network
//! tests/gpu.sh cpu                                  # here: the same program on the CPU provider, short
//! ```
//!
//! docs/gpu.md says what each line means. Each section opens its own back ends, so that one that fails
//! takes nothing with it; everything ends up in one table of what was measured beside what is wanted,
//! and the exit code is 1 if something wanted was missed.
//!
//! With `--backend onnxruntime` or `tract` the same code runs on a CPU, with scoring forced into the
//! graph where the back end can do that. What says something only of a GPU is not judged there.

#![allow(missing_docs)]

#[path = "../common/photos.rs"]
mod photos;

mod batches;
mod child;
mod figures;
mod fused;
mod memory;
mod parity;
mod pipeline;
mod report;
mod resnet;
mod stage;
mod swap;
mod ways;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use angler_inference::embed::BackendChoice;

use crate::report::Report;
use crate::stage::Stage;

/// Prove what runs on a GPU.
#[derive(Parser)]
pub struct Options {
    /// What executes: cuda, tensorrt, onnxruntime (the CPU), tract
    #[arg(long, default_value = "cuda", value_parser = backend)]
    backend: BackendChoice,
    /// ONNX Runtime's library [default: where angler looks for it]
    #[arg(long)]
    library: Option<PathBuf>,
    /// The folder with efficientnet-lite0
    #[arg(long, default_value = "models")]
    models: PathBuf,
    /// Images, in a folder for each class; large ones in its folder `photos`
    #[arg(long, default_value = "samples")]
    images: PathBuf,
    /// Sections, by comma [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// Small sizes: it shows that everything runs, and its times are worth little
    #[arg(long)]
    quick: bool,
    /// Rounds; medians count [default: 5, with --quick 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Each time is taken over so many seconds [default: 0.5, with --quick 0.2]
    #[arg(long)]
    seconds: Option<f64>,
    /// The GPU's number
    #[arg(long, default_value_t = 0)]
    device: i32,
    /// Everything as JSON, written after each section
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// The same labels as on a CPU, in the graph as on the host
    Parity,
    /// Scoring in the graph against scoring on the host, by the size of the set
    Fused,
    /// One by one, in batches, in batches with the cosine in the graph
    Ways,
    /// Images a second by the size of a batch, beside the bare session
    Batches,
    /// Decode, embed and score, as a worker does
    Pipeline,
    /// Another version of a large set, under load
    Swap,
    /// What does not fit the device
    Memory,
}

impl Section {
    fn run(self, stage: &Stage, report: &mut Report) -> Result<()> {
        match self {
            Self::Parity => parity::measure(stage, report),
            Self::Fused => fused::measure(stage, report),
            Self::Ways => ways::measure(stage, report),
            Self::Batches => batches::measure(stage, report),
            Self::Pipeline => pipeline::measure(stage, report),
            Self::Swap => swap::measure(stage, report),
            Self::Memory => memory::measure(stage, report),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }
}

/// A back end by its name in settings.
fn backend(name: &str) -> Result<BackendChoice, serde_json::Error> {
    serde_json::from_value(name.into())
}

fn main() -> Result<ExitCode> {
    if let Some(orders) = child::orders()? {
        child::run(&orders)?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse();
    ensure!(options.backend != BackendChoice::Auto, "--backend auto proves nothing: name one");
    ensure!(options.rounds != Some(0), "nothing to measure: --rounds");
    ensure!(options.seconds.is_none_or(|s| s > 0.0), "nothing to measure: --seconds");
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .init();
    let stage = Stage::new(&options)?;
    let mut report = Report::new(&stage);
    println!("{}\n", report.head());
    let sections =
        if options.only.is_empty() { Section::value_variants() } else { options.only.as_slice() };
    for section in sections {
        eprintln!("{} …", section.name());
        report.section = section.name();
        if let Err(error) = section.run(&stage, &mut report) {
            report.failed(&error);
        }
        if let Some(path) = &options.json {
            std::fs::write(path, report.json()?)
                .with_context(|| format!("{} cannot be written", path.display()))?;
        }
    }
    println!("{}", report.table());
    Ok(if report.missed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
