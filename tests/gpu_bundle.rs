//! `tests/gpu.sh`: a bundle is whole again where it is unpacked, and a damaged one is refused before
//! anything of it runs. What runs here is a script in the program's place; `tests/gpu.sh cpu` runs the
//! program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the report.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use support::repository;

/// Says what it was given, where libraries are looked for, and what the library is.
const PROGRAM: &str = "#!/bin/sh\n\
    echo \"arguments: $*\"\necho \"libraries: $LD_LIBRARY_PATH\"\nsha256sum <\"$2\"\n";
/// Above it a file is in pieces.
const PIECE: &str = "1m";

/// What befalls a copy.
type Change = fn(&Path);

/// A bundle with a program and a library of our own.
struct Bundle {
    folder: tempfile::TempDir,
    library: PathBuf,
}

impl Bundle {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        std::fs::write(&program, PROGRAM).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let library = folder.path().join("build/libonnxruntime.so.1.0.0");
        std::fs::create_dir(library.parent().unwrap()).unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(2_500_000).collect();
        std::fs::write(&library, bytes).unwrap();
        let bundle = Self { folder, library };
        let made = Command::new(repository("tests/gpu.sh"))
            .arg("bundle")
            .arg(bundle.path())
            .args(["--piece", PIECE, "--binary"])
            .arg(&program)
            .arg("--library")
            .arg(&bundle.library)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made.stderr));
        bundle
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("bundle")
    }

    /// Runs a copy of it, changed before, from elsewhere.
    fn run(&self, change: impl Fn(&Path), arguments: &[&str]) -> Output {
        let copy = tempfile::tempdir().unwrap();
        let at = copy.path().join("copy of it");
        let copied = Command::new("cp").arg("-r").arg(self.path()).arg(&at).status().unwrap();
        assert!(copied.success());
        change(&at);
        Command::new(at.join("run.sh"))
            .args(arguments)
            .current_dir("/")
            .env("PYTHONPATH", at.join("packages"))
            .env("LD_LIBRARY_PATH", "/of/the/system")
            .output()
            .unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn piece(bundle: &Path, number: usize) -> PathBuf {
    bundle.join(format!("lib/libonnxruntime.so.1.0.0.piece-00{number}"))
}

#[test]
fn a_bundle_is_joined_where_it_runs_and_a_damaged_one_is_refused() {
    let bundle = Bundle::new();
    let at = bundle.path();
    assert!(!at.join("lib/libonnxruntime.so.1.0.0").exists(), "it is there in pieces only");
    assert_eq!([0, 1, 2, 3].map(|n| piece(&at, n).exists()), [true, true, true, false]);
    let large = walkdir::WalkDir::new(&at).into_iter().map(|entry| entry.unwrap());
    let large: Vec<_> = large.filter(|e| e.metadata().unwrap().len() > 1 << 20).collect();
    assert!(large.iter().all(|entry| entry.file_type().is_dir()), "{large:?}");

    // A Python's packages, with CUDA 13 and cuDNN among them.
    let packages = |at: &Path| {
        for library in ["cu13", "cudnn", "nccl"] {
            std::fs::create_dir_all(at.join(format!("packages/nvidia/{library}/lib"))).unwrap();
        }
    };
    let ran = bundle.run(packages, &["--only", "parity"]);
    let (out, log) = (text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success(), "{log}");
    let [arguments, libraries, sum] = out.lines().collect::<Vec<_>>()[..] else { panic!("{out}") };
    assert!(arguments.ends_with("/images --only parity"), "{out}");
    let found = ["packages/nvidia/cu13/lib:", "packages/nvidia/cudnn/lib:", ":/of/the/system"];
    assert!(found.iter().all(|folder| libraries.contains(folder)), "{out}");
    let whole = Command::new("sha256sum")
        .stdin(std::fs::File::open(&bundle.library).unwrap())
        .output()
        .unwrap();
    assert_eq!(sum, text(&whole.stdout).trim_end(), "the library is what it was");

    let flip = |at: &Path| {
        let mut bytes = std::fs::read(piece(at, 1)).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(piece(at, 1), bytes).unwrap();
    };
    let lose = |at: &Path| std::fs::remove_file(piece(at, 2)).unwrap();
    // What is in no piece counts as well.
    let cut = |at: &Path| std::fs::write(at.join("images/SOURCES.md"), "x").unwrap();
    let changes: [(&str, Change); 3] =
        [("piece-001", flip), ("piece-002", lose), ("SOURCES.md", cut)];
    for (named, change) in changes {
        let ran = bundle.run(change, &[]);
        let (out, log) = (text(&ran.stdout), text(&ran.stderr) + &text(&ran.stdout));
        assert_eq!(ran.status.code(), Some(2), "{log}");
        assert!(log.contains(named) && log.contains("copy it again"), "{log}");
        assert!(!out.contains("arguments:"), "it ran: {out}");
    }
}

#[test]
fn what_is_asked_wrongly_is_answered_with_what_to_do() {
    let script = repository("tests/gpu.sh");
    let run = |arguments: &[&str]| {
        let output = Command::new(&script).args(arguments).output().unwrap();
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    };
    let (code, help) = run(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(["bundle DIR", "run DIR", "cpu"].iter().all(|word| help.contains(word)), "{help}");
    for (arguments, words) in [
        (&["run"][..], "which folder"),
        (&["bundle"], "which folder"),
        (&["bundle", "/", "--binary", "/bin/true"], "not empty"),
        (&["run", "/usr"], "is no bundle"),
        (&["nothing"], "bundle DIR"),
    ] {
        let (code, output) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {output}");
        assert!(output.contains(words), "{arguments:?}: {output}");
    }
}
