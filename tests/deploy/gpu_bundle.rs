//! `tests/gpu.sh`: a bundle's parts are whole again where they are unpacked, and a damaged or missing
//! one is refused before anything of it runs. What runs here is a script in the program's place;
//! `tests/gpu.sh cpu` runs the program.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::repository;

/// Says what it was given, where libraries are looked for, and what the library is.
const PROGRAM: &str = "#!/bin/sh\n\
    echo \"arguments: $*\"\necho \"libraries: $LD_LIBRARY_PATH\"\nsha256sum <\"$2\"\n";
/// The size of a part, in bytes.
const PART: u64 = 1_000_000;

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
            .args(["--part", "1M", "--binary"])
            .arg(&program)
            .arg("--library")
            .arg(&bundle.library)
            .env("ANGLER_GPU_XZ", "0")
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made.stderr));
        bundle
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("bundle")
    }

    /// The folders of its parts, in order.
    fn parts(&self) -> Vec<PathBuf> {
        (1..)
            .map(|number| self.path().join(number.to_string()))
            .take_while(|p| p.exists())
            .collect()
    }

    /// Takes every part to a folder elsewhere, changes what is there, and runs it.
    fn run(&self, change: impl Fn(&Path), arguments: &[&str]) -> Output {
        let elsewhere = tempfile::tempdir().unwrap();
        let at = elsewhere.path().join("all of it");
        for part in self.parts() {
            let taken = Command::new(part.join("run.sh")).arg("take").arg(&at).output().unwrap();
            assert!(taken.status.success(), "{}", text(&taken.stderr));
        }
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

fn piece(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("piece-{number:03}"))
}

#[test]
fn parts_become_a_bundle_again_and_a_damaged_or_missing_one_is_refused() {
    let bundle = Bundle::new();
    let parts = bundle.parts();
    assert!(parts.len() >= 3, "the library alone is 2.5 MB: {parts:?}");
    for (at, part) in parts.iter().enumerate() {
        let bytes = piece(part, at + 1).metadata().unwrap().len();
        assert!(bytes == PART || at + 1 == parts.len() && bytes < PART, "{part:?}: {bytes}");
    }

    // A Python's packages, with CUDA 13 and cuDNN among them.
    let packages = |at: &Path| {
        for library in ["cu13", "cudnn", "nccl"] {
            std::fs::create_dir_all(at.join(format!("packages/nvidia/{library}/lib"))).unwrap();
        }
    };
    let ran = bundle.run(packages, &["step", "2", "--quick"]);
    let (out, log) = (text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success(), "{log}");
    let [arguments, libraries, sum] = out.lines().collect::<Vec<_>>()[..] else { panic!("{out}") };
    assert!(arguments.contains("/images --only fused,pipeline,swap --json /"), "{out}");
    assert!(arguments.ends_with("/step-2.json --quick"), "{out}");
    assert!(log.contains("libonnxruntime.so.1.0.0"), "{log}");
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
    let changes: [(&str, Change); 2] = [("piece-001", flip), ("piece-002", lose)];
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
    assert!(["bundle DIR", "take FOLDER", "cpu"].iter().all(|word| help.contains(word)), "{help}");
    for (arguments, words) in [
        (&["bundle"][..], "which folder"),
        (&["bundle", "/", "--binary", "/bin/true"], "not empty"),
        (&["nothing"], "bundle DIR"),
    ] {
        let (code, output) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {output}");
        assert!(output.contains(words), "{arguments:?}: {output}");
    }
}

/// A library as one_architecture.py reads it: kernels of two architectures among other bytes.
#[test]
fn a_library_keeps_the_kernels_of_one_architecture_and_its_size() {
    let kernel = |architecture: u32, fill: u8| {
        let mut entry = [2_u16.to_le_bytes(), 1_u16.to_le_bytes()].concat();
        entry.extend(64_u32.to_le_bytes());
        entry.extend(100_u64.to_le_bytes());
        entry.resize(28, 0);
        entry.extend(architecture.to_le_bytes());
        entry.resize(64, 0);
        entry.resize(164, fill);
        entry
    };
    let kernels = [kernel(80, 0x80), kernel(90, 0x90), kernel(80, 0x81)].concat();
    let mut library = vec![0x55; 1_000];
    library.extend([0x50, 0xed, 0x55, 0xba, 1, 0, 16, 0]);
    library.extend((kernels.len() as u64).to_le_bytes());
    library.extend(&kernels);
    library.extend(vec![0xaa; 1_000]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("library.so");
    let keep = |architecture: &str| {
        std::fs::write(&path, &library).unwrap();
        let script = repository("tests/gpu/one_architecture.py");
        Command::new("python3").arg(script).arg(&path).arg(architecture).output().unwrap()
    };
    let kept = keep("90");
    assert!(kept.status.success(), "{}", text(&kept.stderr));
    let now = std::fs::read(&path).unwrap();
    let of = |fill: u8| now.iter().filter(|byte| **byte == fill).count();
    assert_eq!((now.len(), of(0x90), of(0x80), of(0x81)), (library.len(), 100, 0, 0));
    assert_eq!((of(0x55), of(0xaa)), (1_001, 1_000), "nothing else is touched");
    let none = keep("75");
    assert!(!none.status.success());
    assert!(text(&none.stderr).contains("no kernels for sm_75, only for sm_80, sm_90"));
}
