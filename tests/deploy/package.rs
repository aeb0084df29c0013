//! The systemd unit, the Debian package, the crate, and `angler probe` as a process.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::support::repository;
use crate::{said, text};

const ANGLER: &str = env!("CARGO_BIN_EXE_angler");

/// The unit in a folder of its own, with the program that was built, with and without `cpu.conf`.
fn unit(folder: &Path, unit: &str, cpu: bool) -> std::path::PathBuf {
    let path = folder.join("angler.service");
    std::fs::write(&path, unit.replace("/usr/bin/angler", ANGLER)).unwrap();
    if cpu {
        let drop_in = folder.join("angler.service.d");
        std::fs::create_dir(&drop_in).unwrap();
        std::fs::copy(repository("deploy/systemd/cpu.conf"), drop_in.join("cpu.conf")).unwrap();
    }
    path
}

fn analyze(arguments: &[&str], unit: &Path) -> (bool, String) {
    said(Command::new("systemd-analyze").args(arguments).arg(unit))
}

#[test]
fn systemd_accepts_the_unit_and_finds_little_exposed() {
    let text = text("deploy/systemd/angler.service");
    // Systemd's scale goes from 0 to 10; a unit without any of it has 9.6.
    for (cpu, most) in [(false, 16), (true, 12)] {
        let folder = tempfile::tempdir().unwrap();
        let path = unit(folder.path(), &text, cpu);
        let (passed, output) = analyze(&["verify", "--man=no"], &path);
        assert!(passed && output.is_empty(), "{output}");
        let threshold = format!("--threshold={most}");
        let (passed, output) = analyze(&["security", "--offline=true", &threshold], &path);
        assert!(passed, "{output}");
    }

    let folder = tempfile::tempdir().unwrap();
    let misspelt = text.replace("ProtectSystem=", "ProtectSytem=");
    let path = unit(folder.path(), &misspelt, false);
    let (_, output) = analyze(&["verify", "--man=no"], &path);
    assert!(output.contains("ProtectSytem"), "{output}");
    let (passed, _) = analyze(&["security", "--offline=true", "--threshold=16"], &path);
    assert!(!passed, "a unit that may write everywhere is as little exposed");
}

#[test]
fn systemd_waits_longer_than_a_drain_takes() {
    let unit = text("deploy/systemd/angler.service");
    let (_, rest) = unit.split_once("TimeoutStopSec=").unwrap();
    let seconds: u64 = rest.lines().next().unwrap().parse().unwrap();
    let settings = angler::config::Settings::load(None, &[]).unwrap();
    assert!(seconds > settings.shutdown.grace_seconds + angler::app::AFTER_DRAIN.as_secs());
}

#[test]
fn one_command_makes_a_package_with_all_that_belongs_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new(repository("deploy/package.sh"))
        .args(["--compression", "none", "--binary", ANGLER, "--out"])
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ending = |ending: &str| {
        let mut files = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path());
        files.find(|f| f.to_str().unwrap().ends_with(ending)).unwrap()
    };
    let package = ending(".deb");

    let root = folder.path().join("root");
    let (passed, output) =
        said(Command::new("dpkg-deb").arg("--raw-extract").arg(&package).arg(&root));
    assert!(passed, "{output}");
    for file in [
        "usr/bin/angler",
        "usr/share/man/man1/angler.1.gz",
        "usr/share/man/man1/angler-classes-build.1.gz",
        "usr/share/bash-completion/completions/angler",
        "usr/share/zsh/vendor-completions/_angler",
        "usr/share/fish/vendor_completions.d/angler.fish",
        "usr/lib/systemd/system/angler.service",
        "usr/lib/sysusers.d/angler.conf",
        "etc/angler/angler.env",
        "usr/share/doc/angler/copyright",
        "usr/share/doc/angler/operations.md",
        "usr/share/doc/angler/cpu.conf",
    ] {
        assert!(root.join(file).metadata().unwrap().len() > 0, "{file}");
    }
    let control = std::fs::read_to_string(root.join("DEBIAN/control")).unwrap();
    assert!(control.contains(&format!("\nVersion: {}\n", env!("CARGO_PKG_VERSION"))), "{control}");
    for script in ["postinst", "prerm", "postrm"] {
        let script = root.join("DEBIAN").join(script);
        let (passed, output) = said(Command::new("sh").arg("-n").arg(&script));
        assert!(passed, "{}: {output}", script.display());
    }

    // The settings file changes nothing as it is, and has each setting as a comment with its default.
    let file = root.join("etc/angler/angler.toml");
    let settings = std::fs::read_to_string(&file).unwrap();
    angler::config::Settings::load(Some(&file), &[]).unwrap();
    let set: toml::Table = toml::from_str(&settings).unwrap();
    assert!(set.values().all(|section| section.as_table().unwrap().is_empty()), "{set:?}");
    let uncommented: Vec<&str> = settings
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => rest,
            _ => line,
        })
        .collect();
    let uncommented: toml::Table = toml::from_str(&uncommented.join("\n")).unwrap();
    assert_eq!(uncommented, toml::from_str(angler::config::DEFAULTS).unwrap());

    // The tarball has the same files, in a folder of its own.
    let output = Command::new("tar").arg("-tzf").arg(ending(".tar.gz")).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let packed: BTreeSet<&str> = listed
        .lines()
        .filter(|line| !line.ends_with('/'))
        .map(|line| line.split_once('/').unwrap().1)
        .collect();
    assert!(packed.contains("usr/bin/angler") && packed.len() > 40, "{packed:?}");
}

/// As `cargo publish --dry-run` does before it builds, without a network.
#[test]
fn the_crate_packs_without_a_warning_and_fits_a_registry() {
    let folder = tempfile::tempdir().unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "package",
        "--workspace",
        "--no-verify",
        "--allow-dirty",
        "--offline",
        "--target-dir",
    ]);
    let (passed, output) = said(cargo.arg(folder.path()).current_dir(env!("CARGO_MANIFEST_DIR")));
    assert!(passed && !output.contains("warning"), "{output}");
    let name =
        concat!("package/", env!("CARGO_PKG_NAME"), "-", env!("CARGO_PKG_VERSION"), ".crate");
    let bytes = folder.path().join(name).metadata().unwrap().len();
    // What the public registry takes at most.
    assert!(bytes < 10 << 20, "{bytes} bytes");
}

#[test]
fn a_probe_of_nobody_fails_and_of_nothing_is_wrong_usage() {
    let probe = |listen: &str| {
        let set = format!("http.listen={listen}");
        let output = Command::new(ANGLER).args(["probe", "--setting", &set]).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, said) = probe(&free.to_string());
    assert!(code == Some(1) && said.contains("no worker answers"), "{code:?} {said}");
    let (code, said) = probe("");
    assert!(code == Some(2) && said.contains("without HTTP"), "{code:?} {said}");
}
