//! The commands, one file each, and what they share: flags, settings, exit codes.

mod bench;
mod class_set;
mod classes;
mod classify;
mod collect;
mod dead;
mod doctor;
mod enqueue;
mod html;
mod image_paths;
mod label_args;
mod output;
mod probe;
mod progress;
mod report;
mod run_images;
mod runs;
mod shell;
mod tables;
mod thumbnails;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use angler_wire::text::chain;

use crate::app::App;
use crate::config::{LogFormat, Settings, SettingsError, hidden};
use crate::telemetry;

/// Classify images by metric learning: embeddings compared with versioned class vectors.
#[derive(Parser)]
#[command(name = "angler", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
#[command(next_help_heading = "Settings")]
struct Global {
    /// Settings file [default: angler.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, for example amqp.prefetch=4; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    setting: Vec<String>,
    /// Model folder, or "builtin" (model.path)
    #[arg(long, global = true, value_name = "FOLDER")]
    model: Option<String>,
    /// What runs the model (embedder.backend)
    #[arg(long, global = true)]
    backend: Option<Backend>,
}

/// What runs the model, as `embedder.backend` names it.
#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    /// The best that works: cuda, then onnxruntime on the CPU, then tract
    Auto,
    /// ONNX Runtime on an NVIDIA GPU
    Cuda,
    /// ONNX Runtime with TensorRT on an NVIDIA GPU
    Tensorrt,
    /// ONNX Runtime on the CPU
    Onnxruntime,
    /// tract, in pure Rust, on the CPU
    Tract,
}

#[derive(Subcommand)]
enum Command {
    // The commands' own types carry their help.
    Classify(classify::Classify),
    Report(report::ReportCommand),
    Worker(worker::WorkerCommand),
    Enqueue(enqueue::Enqueue),
    Collect(collect::Collect),
    #[command(subcommand)]
    Runs(runs::RunsCommand),
    #[command(subcommand)]
    Classes(classes::ClassesCommand),
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    Doctor(doctor::Doctor),
    Probe(probe::Probe),
    Bench(bench::Bench),
    /// Print the default settings, with what each means: a start for angler.toml
    DefaultSettings,
    Completions(shell::CompletionsCommand),
    Man(shell::ManCommand),
}

/// Not by clap, whose error would quote the text: it may be a password.
fn key_value(text: &str) -> Result<(String, String), UsageError> {
    let wrong = || UsageError("--setting expects KEY=VALUE, such as amqp.prefetch=4".to_owned());
    let (key, value) = text.split_once('=').ok_or_else(wrong)?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

/// Wrong usage that clap cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub String);

impl UsageError {
    /// An error that needs no other words than its own.
    pub(crate) fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// The command has told already what was wrong; only its exit code is left.
#[derive(Debug, thiserror::Error)]
#[error("exit code {0}")]
pub(crate) struct Said(pub u8);

/// Reads the command line. Wrong usage ends the process with code 2, and so do `--help` and
/// `--version` with 0.
pub fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        let text = error.to_string();
        let shown = hidden(&text);
        if shown == text {
            error.exit();
        }
        // It quotes a URL with a password.
        eprint!("{shown}");
        std::process::exit(error.exit_code())
    })
}

/// Runs the command; yields the exit code.
pub fn main(cli: Cli) -> ExitCode {
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(Said(code)) = error.downcast_ref() {
                return ExitCode::from(*code);
            }
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let usage = error.chain().any(|e| e.is::<SettingsError>() || e.is::<UsageError>());
    if usage { 2 } else { 1 }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // These tell of angler itself and read no settings.
    match &cli.command {
        Command::DefaultSettings => {
            print!("{}", crate::config::DEFAULTS);
            return Ok(());
        }
        Command::Completions(command) => return command.run(),
        Command::Man(command) => return command.run(),
        _ => {}
    }
    let Global { config, setting, model, backend } = cli.global;
    let mut set = setting.iter().map(|text| key_value(text)).collect::<Result<Vec<_>, _>>()?;
    if let Some(model) = model {
        set.push(("model.path".to_owned(), model));
    }
    if let Some(backend) = backend {
        let name = backend.to_possible_value();
        let name = name.map(|v| v.get_name().to_owned()).unwrap_or_default();
        set.push(("embedder.backend".to_owned(), name));
    }
    // Settings that cannot be used are one of the doctor's findings.
    let unusable = |error: anyhow::Error| match &cli.command {
        Command::Doctor(doctor) => doctor.unusable(&error.to_string()),
        _ => error,
    };
    let mut settings =
        Settings::load(config.as_deref(), &set).map_err(|error| unusable(error.into()))?;
    // It opens back ends and connections by the dozen, and its report says what ran.
    if matches!(cli.command, Command::Bench(_)) && settings.log.level == "info" {
        settings.log.level = "warn".to_owned();
    }
    // What a library has to say of a back end that is missing is in its report, too.
    if matches!(cli.command, Command::Doctor(_)) && settings.log.level == "info" {
        settings.log.level = "off".to_owned();
    }
    telemetry::start(&settings.log)
        .map_err(|error| unusable(UsageError(chain(error.as_ref())).into()))?;
    let machines_read =
        matches!(cli.command, Command::Worker(_)) && settings.log.format == LogFormat::Json;
    let app = App::new(settings);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Classify(command) => command.run(&app).await,
            Command::Report(command) => command.run(&app).await,
            Command::Doctor(command) => command.run(&app, config.as_deref()).await,
            Command::Probe(command) => command.run(&app).await,
            Command::Bench(command) => command.run(&app).await,
            Command::Worker(command) => command.run(&app).await,
            Command::Enqueue(command) => Box::pin(command.run(&app)).await,
            Command::Collect(command) => Box::pin(command.run(&app)).await,
            Command::Runs(command) => command.run(&app).await,
            Command::Classes(command) => command.run(&app).await,
            Command::Dead(command) => command.run(&app).await,
            // Done above.
            Command::DefaultSettings | Command::Completions(_) | Command::Man(_) => Ok(()),
        }
    });
    // Where machines read the log, its last line is one of theirs, too.
    let outcome = match outcome {
        Err(error) if machines_read && !error.is::<Said>() => {
            tracing::error!("{}", chain(error.as_ref()));
            Err(Said(exit_code(&error)).into())
        }
        outcome => outcome,
    };
    // Blocking threads that still decode an image nobody waits for do not hold up the exit.
    runtime.shutdown_background();
    outcome
}
