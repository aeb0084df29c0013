//! Two things that need an environment of ONNX Runtime of their own, and that exists once a process:
//! this program runs again for them, and takes orders on standard input until that ends.
//!
//! * **bare**: a session of the model's graph with nothing around it. Its pixels lie on the device
//!   before the time begins, its embeddings stay there. No code of angler's runs but the edit that
//!   the graph begins with (u8 to f32, which a session has to do anywhere).
//! * **ballast**: takes memory of the device until only so much is left.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ort::ep::ArenaExtendStrategy;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::Tensor;
use serde::{Deserialize, Serialize};

use angler_inference::embed::BackendChoice;
use angler_inference::model::{Model, PIXELS_INPUT};

use crate::stage::{Stage, nvidia_smi};

/// Tells the child what it is.
const ORDERS: &str = "ANGLER_BENCH_GPU_CHILD";
/// Begins an answer that says why there is none.
const FAILED: &str = "failed: ";
/// Calls that are not timed, when the size of a batch changes.
const WARM: usize = 3;
/// What ballast is taken in.
const CHUNK: usize = 64 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    library: PathBuf,
    graph: PathBuf,
    output: String,
    /// The GPU's number; none: a CPU.
    gpu: Option<i32>,
    /// [H, W] of the pixels.
    size: (usize, usize),
    /// Take memory until this many bytes are left; none: be the bare session.
    leave: Option<usize>,
}

/// What this process has to be, if it is a child.
pub fn orders() -> Result<Option<Orders>> {
    let Ok(text) = std::env::var(ORDERS) else { return Ok(None) };
    Ok(Some(serde_json::from_str(&text).with_context(|| format!("{ORDERS} is not from here"))?))
}

pub fn run(orders: &Orders) -> Result<()> {
    obey(orders).or_else(|error| answer(&format!("{FAILED}{error:#}").replace('\n', " ")))
}

fn obey(orders: &Orders) -> Result<()> {
    if orders.gpu.is_some() {
        preload(&orders.library);
    }
    let environment = ort::init_from(&orders.library)?.with_telemetry(false).build()?;
    let text = |e: ort::Error<SessionBuilder>| anyhow!("{e}");
    let mut builder = Session::builder(&environment)?;
    if let Some(device) = orders.gpu {
        let cuda = ort::ep::CUDA::default().with_device_id(device).with_tf32(false);
        // Ballast is taken as it is asked for, not in powers of two.
        let strategy = ArenaExtendStrategy::SameAsRequested;
        let cuda = match orders.leave {
            Some(_) => cuda.with_arena_extend_strategy(strategy),
            None => cuda,
        };
        builder = builder
            .with_execution_providers([cuda.build().error_on_failure()])
            .map_err(text)?
            .with_disable_cpu_fallback()
            .map_err(text)?;
    } else {
        // As angler has it: threads that spin are slow wherever something else runs.
        builder = builder.with_intra_op_spinning(false).map_err(text)?;
    }
    let session = builder.commit_from_file(&orders.graph)?;
    match (orders.leave, orders.gpu) {
        (Some(leave), Some(device)) => ballast(&session, device, leave),
        (Some(_), None) => bail!("ballast is for GPUs"),
        (None, _) => bare(session, orders),
    }
}

/// CUDA's libraries from the wheels beside ONNX Runtime's, as angler does it.
fn preload(library: &Path) {
    let Some(packages) = library.ancestors().find(|p| p.ends_with("site-packages")) else { return };
    let folder = |name: &str| Some(packages.join(name)).filter(|folder| folder.is_dir());
    let (cuda, cudnn) = (folder("nvidia/cu13/lib"), folder("nvidia/cudnn/lib"));
    // What is missing is left to the linker, whose error names it.
    let _ = ort::ep::cuda::preload_dylibs(cuda.as_deref(), cudnn.as_deref());
}

fn answer(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// An order is `IMAGES SECONDS`, the answer the images a second in batches of so many.
fn bare(mut session: Session, orders: &Orders) -> Result<()> {
    answer("ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (images, seconds) = line.split_once(' ').context("an order is IMAGES SECONDS")?;
        let (images, time) = (images.parse()?, Duration::from_secs_f64(seconds.parse()?));
        answer(&bare_rate(&mut session, orders, images, time)?.to_string())?;
    }
    Ok(())
}

fn bare_rate(session: &mut Session, orders: &Orders, images: usize, time: Duration) -> Result<f64> {
    let (height, width) = orders.size;
    let mut random = fastrand::Rng::with_seed(images as u64);
    let mut values = vec![0_u8; images * height * width * 3];
    random.fill(&mut values);
    // Owned tensors only: binding or copying one that borrows hangs in this release of `ort`.
    let pixels = Tensor::from_array(([images, height, width, 3], values))?;
    let mut binding = session.create_binding()?;
    let (pixels, device) = match orders.gpu {
        Some(gpu) => (pixels.to(AllocationDevice::CUDA, gpu)?, AllocationDevice::CUDA),
        None => (pixels, AllocationDevice::CPU),
    };
    binding.bind_input(PIXELS_INPUT, &pixels)?;
    let memory = MemoryInfo::new(
        device,
        orders.gpu.unwrap_or(0),
        AllocatorType::Device,
        MemoryType::Default,
    )?;
    binding.bind_output_to_device(&orders.output, &memory)?;
    for _ in 0..WARM {
        session.run_binding(&binding)?;
    }
    binding.synchronize_outputs()?;
    let started = Instant::now();
    let mut done = 0;
    while done == 0 || started.elapsed() < time {
        session.run_binding(&binding)?;
        binding.synchronize_outputs()?;
        done += images;
    }
    Ok(done as f64 / started.elapsed().as_secs_f64())
}

/// Holds what it took until standard input ends.
fn ballast(session: &Session, device: i32, leave: usize) -> Result<()> {
    let memory = MemoryInfo::new(
        AllocationDevice::CUDA,
        device,
        AllocatorType::Device,
        MemoryType::Default,
    )?;
    let allocator = Allocator::new(session, memory)?;
    let mut held = Vec::new();
    let free = || -> Result<usize> {
        let answer = nvidia_smi(device, "memory.free")?;
        let mebibytes = answer.split_whitespace().next().unwrap_or_default();
        Ok(mebibytes.parse::<usize>().with_context(|| answer.clone())? << 20)
    };
    loop {
        let more = free()?.saturating_sub(leave) / CHUNK;
        if more == 0 {
            break;
        }
        for _ in 0..more {
            held.push(Tensor::<u8>::new(&allocator, [CHUNK])?);
        }
    }
    answer(&free()?.to_string())?;
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
    drop(held);
    Ok(())
}

/// A child that runs; it ends when this is dropped.
struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    fn start(stage: &Stage, model: &Model, leave: Option<usize>) -> Result<Self> {
        let library = stage.library.clone();
        let library = library.or_else(|| std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from));
        let library = library.context("the library must be named for this: --library")?;
        let name: String =
            model.fingerprint.chars().filter(|c| c.is_ascii_alphanumeric()).collect();
        let graph = stage.folder.path().join(format!("{name}.onnx"));
        if !graph.exists() {
            std::fs::write(&graph, &model.graph)?;
        }
        let orders = Orders {
            library,
            graph,
            output: model.output.clone(),
            gpu: stage.on_a_gpu().then_some(stage.device),
            size: (model.pixels.height as usize, model.pixels.width as usize),
            leave,
        };
        let mut child = Command::new(std::env::current_exe()?)
            .env(ORDERS, serde_json::to_string(&orders)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("a pipe was asked for")?);
        Ok(Self { child, orders, answers })
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the other process ended early; what it said is above");
        match line.trim().strip_prefix(FAILED) {
            Some(reason) => bail!("the other process: {reason}"),
            None => Ok(line.trim().to_owned()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.orders.take());
        // It ends as soon as it sees that; whoever hangs in a driver is not waited for.
        for _ in 0..100 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A session with nothing around it.
pub struct Bare(Process);

impl Bare {
    /// None on tract, which has none.
    pub fn start(stage: &Stage, model: &Model) -> Result<Option<Self>> {
        if stage.choice == BackendChoice::Tract {
            return Ok(None);
        }
        let mut process = Process::start(stage, model, None)?;
        process.answer()?;
        Ok(Some(Self(process)))
    }

    /// Images a second, in batches of `images`.
    pub fn rate(&mut self, images: usize, time: Duration) -> Result<f64> {
        let orders = self.0.orders.as_mut().context("it takes orders until it is dropped")?;
        writeln!(orders, "{images} {}", time.as_secs_f64())?;
        orders.flush()?;
        Ok(self.0.answer()?.parse()?)
    }
}

/// Memory of the device that is taken by somebody else, until this is dropped.
pub struct Ballast {
    _process: Process,
    /// What was left, in bytes.
    pub left: usize,
}

impl Ballast {
    pub fn new(stage: &Stage, leave: usize) -> Result<Self> {
        let mut process = Process::start(stage, &stage.default, Some(leave))?;
        let left = process.answer()?.parse()?;
        Ok(Self { _process: process, left })
    }
}
