//! NVIDIA GPUs, as the driver tells of them.

use std::path::Path;
use std::process::{Command, Stdio};

use super::report::Check;
use super::within;

/// Which GPUs there are, and what there is to say of it.
pub(super) async fn check(asked: bool, devices: &[i32]) -> (Check, usize) {
    let looking = tokio::task::spawn_blocking(gpus);
    let found = match within(looking).await {
        Ok(Ok(found)) => found,
        Ok(Err(_)) => Vec::new(),
        Err(silent) => {
            let remedy = "Look at the driver: nvidia-smi should answer at once.";
            return (Check::problem(NAME, silent.to_string(), remedy), 0);
        }
    };
    let count = found.len();
    let known = |device: &i32| usize::try_from(*device).is_ok_and(|device| device < count);
    let check = match devices.iter().find(|device| !known(device)) {
        _ if count == 0 && asked => Check::problem(
            NAME,
            "no NVIDIA GPU, or no driver: there is no /proc/driver/nvidia and no nvidia-smi",
            "Install the driver (in a container: --gpus all), or set embedder.backend = \"auto\", \
             which takes a GPU where there is one.",
        ),
        _ if count == 0 => Check::ok(NAME, "no NVIDIA GPU: the model runs on the CPU"),
        Some(missing) if asked => Check::problem(
            NAME,
            format!("{}; embedder.devices names {missing}", found.join(", ")),
            "Correct embedder.devices: GPUs are counted from 0.",
        ),
        _ => Check::ok(NAME, found.join(", ")),
    };
    (check, count)
}

const NAME: &str = "GPUs";

/// From the driver's own files, else by asking its tool: a container may have only that.
fn gpus() -> Vec<String> {
    let from_driver = listed(Path::new("/proc/driver/nvidia/gpus"));
    if !from_driver.is_empty() {
        return from_driver;
    }
    let asked = Command::new("nvidia-smi").arg("-L").stdin(Stdio::null()).output();
    let Ok(answer) = asked else { return Vec::new() };
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    // GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-…)
    let lines = text.lines().filter(|line| answer.status.success() && line.starts_with("GPU "));
    lines.map(|line| line.split(" (UUID").next().unwrap_or(line).to_owned()).collect()
}

fn listed(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("information")).ok())
        .map(|text| {
            let model = text.lines().find_map(|line| line.strip_prefix("Model:"));
            model.unwrap_or("a GPU without a name").trim().to_owned()
        })
        .collect();
    names.sort();
    names.iter().enumerate().map(|(number, name)| format!("GPU {number}: {name}")).collect()
}
