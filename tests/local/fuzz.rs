//! A hundred million bytes of garbage into each parser of foreign bytes: no panic, and no input that takes
//! seconds.
//!
//! Garbage is what a seeded mutator makes of the corpus, which is replayed first. What libFuzzer
//! finds in longer runs (`fuzz/`) goes into the corpus. `ANGLER_FUZZ_BYTES` and `ANGLER_FUZZ_SEED`
//! ask for more or other garbage.

mod targets;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer inputs only take longer.
const LONGEST: usize = 6_000;
/// For an input of that length, in a debug build on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

fn ask(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn corpus(folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    assert!(!files.is_empty(), "{}", folder.display());
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Feeds one input; one that panics or takes too long is kept.
fn feed(name: &str, target: fn(&[u8]), input: &[u8], from: &str) {
    let start = Instant::now();
    let whole = catch_unwind(|| target(input)).is_ok();
    if whole && start.elapsed() < PATIENCE {
        return;
    }
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
    std::fs::write(&kept, input).unwrap();
    let what = if whole { format!("took {:?}", start.elapsed()) } else { "panicked".to_owned() };
    panic!(
        "{name} {what} on an input of {} bytes ({from}), kept in {}; to replay it, copy it to \
         tests/local/fuzz/corpus/{name}/",
        input.len(),
        kept.display()
    );
}

fn fuzz(name: &str, target: fn(&[u8]), more: &[&str]) {
    let mut seeds = corpus(&format!("tests/local/fuzz/corpus/{name}"));
    seeds.extend(more.iter().flat_map(|folder| corpus(folder)));
    for (path, bytes) in &seeds {
        feed(name, target, bytes, &path.display().to_string());
    }
    let seeds: Vec<Vec<u8>> = seeds.into_iter().map(|(_, bytes)| bytes).collect();
    let seed = ask("ANGLER_FUZZ_SEED", 1);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut left, mut inputs) = (ask("ANGLER_FUZZ_BYTES", 100_000_000), 0_u64);
    while left > 0 {
        let input = mutated(&seeds, &mut random);
        feed(name, target, &input, &format!("seed {seed}, input {inputs}"));
        left = left.saturating_sub(input.len().max(1) as u64);
        inputs += 1;
    }
    println!("{name}: {} seeds, {inputs} inputs made of them", seeds.len());
}

/// A seed after some changes; now and then nothing but noise.
fn mutated(seeds: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    if random.u8(..) < 8 {
        let length = random.usize(..LONGEST);
        return noise(length, random);
    }
    let mut input = seeds[random.usize(..seeds.len())].clone();
    input.truncate(LONGEST);
    for _ in 0..1 << random.u32(0..5) {
        if input.is_empty() {
            input.push(random.u8(..));
        }
        let at = random.usize(..input.len());
        // Headers decide more than pixels do.
        let at = if random.bool() { at % input.len().min(64) } else { at };
        match random.u8(..9) {
            0 => input[at] ^= 1 << random.u8(..8),
            1 => input[at] = random.u8(..),
            2 => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.usize(..5)],
            3 => input.truncate(at),
            4 => {
                // A number that lengths and offsets are made of, in either order of bytes.
                let number = [0, 1, 0x7fff_ffff, u32::MAX, random.u32(..), 1 << random.u32(..32)]
                    [random.usize(..6)];
                let bytes = if random.bool() { number.to_le_bytes() } else { number.to_be_bytes() };
                let end = input.len().min(at + 4);
                input[at..end].copy_from_slice(&bytes[..end - at]);
            }
            5 => {
                // A piece of itself, doubled.
                let end = random.usize(at..=input.len().min(at + 64));
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            6 => drop(input.drain(at..random.usize(at..=input.len().min(at + 64)))),
            7 => {
                // The head of this, the tail of another.
                let other = &seeds[random.usize(..seeds.len())];
                let from = random.usize(..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let length = random.usize(..16);
                input.splice(at..at, noise(length, random));
            }
        }
    }
    input.truncate(LONGEST);
    if random.bool() {
        mend_png(&mut input);
    }
    input
}

/// Puts right the checksums of a PNG, which would else be all that is ever looked at.
fn mend_png(input: &mut [u8]) {
    if !input.starts_with(b"\x89PNG\r\n\x1a\n") {
        return;
    }
    let mut at = 8;
    while let Some(length) = input.get(at..at + 4) {
        let length = u32::from_be_bytes(length.try_into().unwrap()) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= input.len()) else {
            return;
        };
        let mut crc = flate2::Crc::new();
        crc.update(&input[at + 4..end]);
        input[end..end + 4].copy_from_slice(&crc.sum().to_be_bytes());
        at = end + 4;
    }
}

fn noise(length: usize, random: &mut fastrand::Rng) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

#[test]
fn job() {
    fuzz("job", targets::job, &[]);
}

#[test]
fn class_vectors() {
    fuzz("class_vectors", targets::class_vectors, &[]);
}

#[test]
fn preprocess() {
    fuzz("preprocess", targets::preprocess, &["tests/data/images", "tests/data/images/bad"]);
}

#[test]
fn sanitize() {
    fuzz("sanitize", targets::sanitize, &[]);
}
