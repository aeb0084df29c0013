//! What scoring costs beside the bare matrix product that it cannot do without.
//!
//! ```sh
//! cargo bench --bench score                              # the sizes below; 1,000,000×512 needs 3.3 GB
//! cargo bench --bench score -- 100000x512 --rounds 31    # one size
//! ```
//!
//! For each size and number of threads, in interleaved rounds:
//!
//! * **bare**: the product of the f32 class vectors, [rows, D], and a batch of 32 unit embeddings, by
//!   `ndarray`'s `general_mat_mul`, in blocks of rows spread over as many rayon threads. Nothing is
//!   done with the scores. The blocks are tried in several heights, and the fastest is the measure.
//! * **f32**, **f16**: `ClassVectors::score_with`, top 5, as a worker does it.
//!
//! A row shows medians in milliseconds, and in brackets the median over the rounds of the ratio to
//! the same round's bare product: a machine that is busy with something else slows both.
//! `--parts` shows where the time of f16 goes: conversion alone, and the product of a block that
//! has just been converted; what is left is the scan.

#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, s};
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use angler_vectors::rows::{Precision, Vectors};
use angler_vectors::score::Scorer;
use angler_vectors::unit::normalise;
use angler_vectors::{ClassVectors, Contents};

/// Images in a batch: the default of `embedder.max_batch`.
const BATCH: usize = 32;
const TOP_K: usize = 5;
const SIZES: [&str; 4] = ["1000x1280", "10000x512", "100000x512", "1000000x512"];
/// Rows in a block of the bare product; the last is about as many as a thread gets at all.
const BARE_BLOCKS: [usize; 4] = [256, 1024, 4096, 1 << 16];

/// Time scoring against the bare matrix product.
#[derive(Parser)]
struct Options {
    /// Sets of class vectors, ROWSxDIM
    #[arg(default_values = SIZES)]
    sizes: Vec<Size>,
    /// Rounds; 0: as many as take about 15 seconds a size, 7 at least
    #[arg(long, default_value_t = 0)]
    rounds: usize,
    /// Numbers of threads [default: 1 and all cores]
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Leave f32 out, which is only there to be compared
    #[arg(long)]
    no_f32: bool,
    /// Show where the time of f16 goes, on one thread
    #[arg(long)]
    parts: bool,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    dim: usize,
}

impl std::str::FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (rows, dim) = text.split_once('x').context("a size is ROWSxDIM, as 100000x512")?;
        let (rows, dim) = (rows.parse()?, dim.parse()?);
        anyhow::ensure!(rows > 0 && dim > 0, "a size of zero has nothing to measure");
        Ok(Self { rows, dim })
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let cores = std::thread::available_parallelism()?.get();
    let mut threads = options.threads.clone();
    if threads.is_empty() {
        threads = vec![1, cores];
        threads.dedup();
    }
    println!("batch {BATCH}, top {TOP_K}; medians in ms (median ratio to bare), {cores} cores\n");
    println!("| rows × D | threads | bare | f32 | f16 |");
    println!("|---|---|---|---|---|");
    let mut shares = Vec::new();
    for size in &options.sizes {
        let vectors = random(size.rows, size.dim);
        let halves = class_vectors(vectors.to_precision(Precision::F16))?;
        let singles = class_vectors(vectors)?;
        let batch = embeddings(size.dim)?;
        for &threads in &threads {
            let rounds = compare(&options, &singles, &halves, batch.view(), threads)?;
            println!(
                "| {} × {} | {threads} | {:.2} | {} | {} |",
                size.rows,
                size.dim,
                median(rounds.iter().map(|round| round[0])),
                if options.no_f32 { "".to_owned() } else { cell(&rounds, 1) },
                cell(&rounds, 2),
            );
        }
        if options.parts {
            shares.push(parts(&halves, batch.view()));
        }
    }
    for (size, parts) in options.sizes.iter().zip(shares) {
        println!("\n{} × {} in f16, on one thread:\n{parts}", size.rows, size.dim);
    }
    Ok(())
}

/// [bare, f32, f16] of each round, in ms.
fn compare(
    options: &Options,
    singles: &ClassVectors,
    halves: &ClassVectors,
    batch: ArrayView2<'_, f32>,
    threads: usize,
) -> Result<Vec<[f64; 3]>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let scorer = Scorer::new(threads);
    let bare = |block| time(|| product(&pool, singles.vectors(), batch, block));
    let f32 = || time(|| drop(black_box(singles.score_with(&scorer, batch, TOP_K))));
    let f16 = || time(|| drop(black_box(halves.score_with(&scorer, batch, TOP_K))));
    // Once for the caches and the threads, then the height of block that is fastest here.
    let mut trials: Vec<[f64; BARE_BLOCKS.len()]> = Vec::new();
    f16();
    for _ in 0..4 {
        trials.push(BARE_BLOCKS.map(bare));
    }
    let best = |n: &usize| trials[1..].iter().map(|trial| trial[*n]).fold(f64::INFINITY, f64::min);
    let fastest = (0..BARE_BLOCKS.len()).min_by(|a, b| best(a).total_cmp(&best(b))).unwrap_or(0);
    let block = BARE_BLOCKS[fastest];

    let rounds = match options.rounds {
        0 => ((15e3 / (3.0 * best(&fastest))) as usize).clamp(7, 301),
        rounds => rounds,
    };
    Ok((0..rounds)
        .map(|_| [bare(block), if options.no_f32 { f64::NAN } else { f32() }, f16()])
        .collect())
}

/// The product and nothing else, a block of rows at a time.
fn product(pool: &rayon::ThreadPool, vectors: &Vectors, batch: ArrayView2<'_, f32>, block: usize) {
    let rows = vectors.rows();
    // A part a thread, or several where one may be slower.
    let part = rows.div_ceil(4 * pool.current_num_threads()).next_multiple_of(block.min(rows));
    let run = |first: usize, last: usize| {
        let mut scores = Array2::<f32>::zeros((batch.nrows(), block.min(last - first)));
        for first in (first..last).step_by(block) {
            let count = block.min(last - first);
            let mut scores = scores.slice_mut(s![.., ..count]).reversed_axes();
            if let Some(vectors) = vectors.view(first, count) {
                general_mat_mul(1.0, &vectors, &batch.t(), 0.0, &mut scores);
            }
        }
        black_box(&scores);
    };
    if pool.current_num_threads() == 1 {
        return run(0, rows);
    }
    pool.install(|| {
        let parts = (0..rows.div_ceil(part)).into_par_iter();
        parts.with_max_len(1).for_each(|n| run(n * part, rows.min((n + 1) * part)));
    });
}

/// Where one thread's time goes with f16: a line for each height of block.
fn parts(classes: &ClassVectors, batch: ArrayView2<'_, f32>) -> String {
    let (rows, dim) = (classes.vectors().rows(), classes.dim());
    let blocks: Vec<usize> = [64, 128, 256, 512, 1024].into_iter().filter(|b| *b <= rows).collect();
    let mut rounds = vec![Vec::new(); blocks.len()];
    for _ in 0..7 {
        for (block, rounds) in blocks.iter().zip(&mut rounds) {
            let mut converted = Array2::<f32>::zeros((*block, dim));
            let mut scores = Array2::<f32>::zeros((batch.nrows(), *block));
            let mut run = |convert: bool, multiply: bool| {
                time(|| {
                    for n in 0..rows / block {
                        if let Some(out) = converted.as_slice_mut().filter(|_| convert) {
                            classes.vectors().copy_rows(n * block, out);
                        }
                        if multiply {
                            let mut scores = scores.view_mut().reversed_axes();
                            general_mat_mul(1.0, &converted, &batch.t(), 0.0, &mut scores);
                        }
                        black_box((&converted, &scores));
                    }
                })
            };
            rounds.push([run(true, false), run(false, true), run(true, true)]);
        }
    }
    let line = |(block, rounds): (&usize, &Vec<[f64; 3]>)| {
        let [conversion, product, both] =
            [0, 1, 2].map(|part| median(rounds.iter().map(|round| round[part])));
        format!(
            "  blocks of {block:4} rows: conversion {conversion:.2}, product {product:.2}, both {both:.2} ms"
        )
    };
    blocks.iter().zip(&rounds).map(line).collect::<Vec<_>>().join("\n")
}

/// Milliseconds that `work` takes.
fn time(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn cell(rounds: &[[f64; 3]], column: usize) -> String {
    let time = median(rounds.iter().map(|round| round[column]));
    let ratio = median(rounds.iter().map(|round| round[column] / round[0]));
    format!("{time:.2} ({ratio:.2})")
}

/// [rows, dim] random values around zero, the same each time.
fn random(rows: usize, dim: usize) -> Vectors {
    let mut random = fastrand::Rng::with_seed(1);
    Array2::from_shape_simple_fn((rows, dim), || random.f32() - 0.5).into()
}

fn class_vectors(vectors: Vectors) -> Result<ClassVectors> {
    let labels = (0..vectors.rows()).map(|row| format!("class-{row:06}")).collect();
    Ok(ClassVectors::new(("bench", "1"), Contents::new(labels, vectors, "bench@0"))?)
}

/// [BATCH, dim] unit rows.
fn embeddings(dim: usize) -> Result<Array2<f32>> {
    let mut random = fastrand::Rng::with_seed(2);
    let mut batch = Array2::from_shape_simple_fn((BATCH, dim), || random.f32() - 0.5);
    let whole = batch.rows_mut().into_iter().all(normalise);
    anyhow::ensure!(whole, "a random row was zero");
    Ok(batch)
}
