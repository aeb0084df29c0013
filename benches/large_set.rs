//! What a large class set takes: memory and time to load, of the program as it is shipped.
//!
//! ```sh
//! cargo bench --bench large_set                       # 1,000,000 × 512 in f16: 1.1 GB on disk, for a minute
//! cargo bench --bench large_set -- --rows 100000
//! eval "$(tests/services.sh up)"                      # before it: `angler worker` is measured as well
//! ```
//!
//! Two sets with random unit vectors are written for the model `tests/data/models/tiny-512`: a
//! small one of 1,000 rows, and the large one, row by row. Then each command runs with either, as a
//! process of its own: `angler classify` of three images, and, where a broker is there,
//! `angler worker` with the set preloaded, until it is ready and has classified one job.
//!
//! A process's peak is `VmHWM`, the most memory that it ever had. What the large set takes is the
//! difference of the two peaks; it may be 1.3 times the vectors' own bytes (the rest are labels, a
//! number and a factor a row, and what reading a header needs for a moment). The program ends with
//! an error if it is more. The time is the difference, too; the file is in the page cache.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // As the tests' support.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::ArrayViewMut1;
use serde_json::json;
use support::{Broker, Bucket, Setup, files, repository};

use angler_core::class_sets::load::version_key;
use angler_inference::model::Model;
use angler_vectors::file::FORMAT;

const MODEL: &str = "tests/data/models/tiny-512";
const SMALL: usize = 1_000;
/// Between two looks at a process. `VmHWM` never falls, so only what comes in the last moment
/// before the exit can be missed, long after the load.
const LOOK: Duration = Duration::from_millis(5);
/// The most that a set may take, over its vectors' own bytes.
const LIMIT: f64 = 1.3;

/// Measure what a large class set takes.
#[derive(Parser)]
struct Options {
    /// Vectors in the large set
    #[arg(long, default_value_t = 1_000_000)]
    rows: usize,
    /// Each command runs so often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where the sets are written for the time being [default: the system's temporary folder]
    #[arg(long)]
    folder: Option<std::path::PathBuf>,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one process took.
#[derive(Clone, Copy)]
struct Taken {
    peak: u64,
    seconds: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.rounds > 0 && options.rows > SMALL, "nothing to measure: --rounds, --rows");
    let model = Model::load(repository(MODEL).to_str().context("a path in UTF-8")?)?;
    let parent = options.folder.unwrap_or_else(std::env::temp_dir);
    let root = tempfile::tempdir_in(parent)?;
    let sets = [("small", SMALL), ("large", options.rows)];
    for (set, rows) in sets {
        write_set(&root.path().join(version_key(set, "1")), rows, model.dim, &model.fingerprint)?;
    }
    let vectors = options.rows * model.dim * 2;
    println!(
        "{} × {} in f16: the vectors are {} MB\n",
        options.rows,
        model.dim,
        megabytes(vectors as u64)
    );
    println!("| command | small set | large set | the set takes | of its vectors | loads in |");
    println!("|---|---|---|---|---|---|");
    let root = root.path().to_str().context("a path in UTF-8")?;

    let mut within = Vec::new();
    let mut runs = [Vec::new(), Vec::new()];
    for _ in 0..options.rounds {
        for ((set, _), runs) in sets.iter().zip(&mut runs) {
            runs.push(classify(root, set).await?);
        }
    }
    within.push(report("angler classify", &runs, vectors));

    if std::env::var_os("ANGLER_TEST_AMQP_URL").is_some() {
        let broker = Broker::new().await;
        let bucket = Bucket::new().await;
        let images = bucket.upload("q", &files("samples/fashion/query")[..3]).await;
        let mut runs = [Vec::new(), Vec::new()];
        for _ in 0..options.rounds {
            for ((set, _), runs) in sets.iter().zip(&mut runs) {
                runs.push(worker(&broker, root, set, &images).await?);
            }
        }
        within.push(report("angler worker", &runs, vectors));
    }
    ensure!(within.iter().all(|ok| *ok), "a set takes more than {LIMIT} times its vectors' bytes");
    Ok(())
}

/// `angler classify` of three images, from start to exit.
async fn classify(root: &str, set: &str) -> Result<Taken> {
    let mut setup = Setup::default();
    setup.set("model.path", MODEL).set("embedder.backend", "tract").set("classes.root", root);
    let classes = format!("{set}@1");
    let mut command =
        setup.command(&["classify", "samples/photos/astronaut.png", "samples/photos/brick.png"]);
    command.args(["samples/photos/camera.png", "--classes", &classes, "--top-k", "5"]);
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let (id, mut peak) = (child.id(), 0);
    let status = loop {
        peak = peak_of(id).unwrap_or(0).max(peak);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        tokio::time::sleep(LOOK).await;
    };
    let seconds = start.elapsed().as_secs_f64();
    // Three lines fit the pipe. That they hold scores shows that the set was there and was used.
    let output = std::io::read_to_string(child.stdout.take().context("its output")?)?;
    let scored = output.lines().filter(|line| line.contains("\"label\":\"class-")).count();
    ensure!(status.success() && scored == 3, "classify ended with {status}:\n{output}");
    ensure!(peak > 0, "/proc/{id}/status could not be read");
    Ok(Taken { peak, seconds })
}

/// `angler worker` with the set preloaded: the time until it is ready, the peak after a job.
async fn worker(broker: &Broker, root: &str, set: &str, images: &[String]) -> Result<Taken> {
    let mut setup = Setup::worker(broker, root);
    setup.set("model.path", MODEL).set("embedder.backend", "tract");
    setup.set("classes.preload", &format!("{set}@1"));
    let start = Instant::now();
    let mut worker = setup.start().await;
    let seconds = start.elapsed().as_secs_f64();
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    client.job(&json!({"id": "one", "images": images, "classes": format!("{set}@1")})).await;
    let result = results.next().await.body;
    let scored = result["images"]
        .as_array()
        .map_or(0, |all| all.iter().filter(|image| image["score"].is_number()).count());
    ensure!(scored == images.len(), "the job's result: {result}");
    let peak = peak_of(worker.pid()).context("/proc/…/status could not be read")?;
    client.close().await;
    worker.signal("TERM");
    worker.ended().await;
    Ok(Taken { peak, seconds })
}

/// A line of the table; whether the set takes no more than it may.
fn report(command: &str, [small, large]: &[Vec<Taken>; 2], vectors: usize) -> bool {
    let peak = |runs: &[Taken]| median(runs.iter().map(|run| run.peak as f64));
    let seconds = |runs: &[Taken]| median(runs.iter().map(|run| run.seconds));
    let takes = (peak(large) - peak(small)).max(0.0);
    let ratio = takes / vectors as f64;
    println!(
        "| `{command}` | {} MB | {} MB | {} MB | {ratio:.3} × | {:.1} s |",
        megabytes(peak(small) as u64),
        megabytes(peak(large) as u64),
        megabytes(takes as u64),
        seconds(large) - seconds(small),
    );
    ratio <= LIMIT
}

/// The most resident memory that a process has had, in bytes; none once it has ended.
fn peak_of(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Writes a version row by row: 8 bytes that say how long the header is, the header (JSON, padded
/// with spaces), the values.
fn write_set(path: &Path, rows: usize, dim: usize, model: &str) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("a folder")?)?;
    let labels: Vec<String> = (0..rows).map(|row| format!("class-{row:06}")).collect();
    let labels = serde_json::to_string(&labels)?;
    let mut header = serde_json::to_vec(&json!({
        "__metadata__": { "format": FORMAT, "labels": labels, "model": model },
        "vectors": { "dtype": "F16", "shape": [rows, dim], "data_offsets": [0, rows * dim * 2] },
    }))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random = fastrand::Rng::with_seed(rows as u64);
    let (mut row, mut halves) = (vec![0.0_f32; dim], vec![f16::ZERO; dim]);
    for _ in 0..rows {
        row.fill_with(|| random.f32() - 0.5);
        ensure!(
            angler_vectors::unit::normalise(ArrayViewMut1::from(&mut row[..])),
            "a row was zero"
        );
        halves.convert_from_f32_slice(&row);
        file.write_all(bytemuck::cast_slice(&halves))?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn megabytes(bytes: u64) -> u64 {
    (bytes + 500_000) / 1_000_000
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
