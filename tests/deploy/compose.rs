//! `deploy/compose.yaml` and the workflows, by their schemas and by what the parts must agree in.

use std::process::Command;

use serde_json::{Value, json};

use angler::app::AFTER_DRAIN;
use angler::config::Settings;

use crate::support::{files, repository};
use crate::{python_tool, said, text, yaml};

const COMPOSE: &str = "deploy/compose.yaml";

fn schema(name: &str, file: &std::path::Path) -> (bool, String) {
    said(python_tool("check-jsonschema").args(["--builtin-schema", name]).arg(file))
}

#[test]
fn the_compose_file_fits_the_specification() {
    let (passed, output) = schema("vendor.compose-spec", &repository(COMPOSE));
    assert!(passed, "{output}");
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("compose.yaml");
    std::fs::write(&broken, text(COMPOSE).replace("stop_grace_period", "stop_grace_perod"))
        .unwrap();
    let (passed, output) = schema("vendor.compose-spec", &broken);
    assert!(!passed && output.contains("stop_grace_perod"), "{output}");
}

#[test]
fn the_workflows_fit_their_schema() {
    let workflows = files(".github/workflows");
    assert!(!workflows.is_empty());
    for workflow in workflows {
        let (passed, output) = schema("vendor.github-workflows", &workflow);
        assert!(passed, "{output}");
    }
}

/// The services that run `angler worker`.
fn workers(compose: &Value) -> Vec<(&String, &Value)> {
    let services = compose["services"].as_object().unwrap();
    services.iter().filter(|(name, _)| name.starts_with("worker-")).collect()
}

#[test]
fn workers_run_as_nobody_on_a_file_system_that_is_not_theirs_and_end_in_order() {
    let compose = yaml(COMPOSE);
    assert_eq!(workers(&compose).len(), 2);
    for (name, worker) in workers(&compose) {
        assert_eq!(worker["user"], "65532:65532", "{name}");
        assert_eq!(worker["read_only"], true, "{name}");
        assert_eq!(worker["cap_drop"], json!(["ALL"]), "{name}");
        assert_eq!(worker["security_opt"], json!(["no-new-privileges:true"]), "{name}");
        assert!(worker["mem_limit"].is_string() && worker["cpus"].is_number(), "{name}");
        let check = &worker["healthcheck"]["test"];
        assert_eq!(*check, json!(["CMD", "/usr/local/bin/angler", "probe"]), "{name}");

        // Every variable is a setting, and none has a value that is refused.
        let variables = worker["environment"].as_object().unwrap();
        let flags: Vec<(String, String)> = variables
            .iter()
            .filter_map(|(variable, value)| {
                let key = variable.strip_prefix("ANGLER__")?.to_lowercase().replace("__", ".");
                Some((key, value.as_str().unwrap().replace("${ANGLER_PASSWORD:-angler-try}", "x")))
            })
            .collect();
        assert!(flags.len() > 5, "{flags:?}");
        let settings = Settings::load(None, &flags).unwrap();
        let grace = worker["stop_grace_period"].as_str().unwrap().strip_suffix('s').unwrap();
        let taken = settings.shutdown.grace_seconds + AFTER_DRAIN.as_secs();
        assert!(grace.parse::<u64>().unwrap() > taken, "{name}");
    }
}

/// Compose refuses to copy a configuration into a container that it may not write to.
#[test]
fn what_writes_can_write() {
    let compose = yaml(COMPOSE);
    let services = compose["services"].as_object().unwrap();
    let mut copied = 0;
    for (name, service) in services {
        for config in service["configs"].as_array().into_iter().flatten() {
            let source = config["source"].as_str().unwrap();
            if compose["configs"][source].get("content").is_some() {
                assert_ne!(service["read_only"], true, "{name} is given {source}");
                copied += 1;
            }
        }
    }
    assert!(copied > 0);
    // `enqueue` keeps the list of its images in a file.
    assert_eq!(services["cli"]["read_only"], true);
    assert_eq!(services["cli"]["tmpfs"], json!(["/tmp"]));
}

#[test]
fn prometheus_asks_every_worker() {
    let compose = yaml(COMPOSE);
    let wanted: Vec<String> =
        workers(&compose).iter().map(|(name, _)| format!("{name}:8080")).collect();
    let scraped = &yaml("deploy/prometheus/prometheus.yml")["scrape_configs"];
    let angler =
        scraped.as_array().unwrap().iter().find(|job| job["job_name"] == "angler").unwrap();
    assert_eq!(angler["static_configs"][0]["targets"], json!(wanted));
}

#[test]
fn files_that_the_compose_file_mounts_exist() {
    let compose = yaml(COMPOSE);
    let mut seen = 0;
    for service in compose["services"].as_object().unwrap().values() {
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let from = volume.as_str().unwrap().split(':').next().unwrap();
            if from.starts_with('.') {
                assert!(repository("deploy").join(from).exists(), "{from}");
                seen += 1;
            } else {
                assert!(compose["volumes"].get(from).is_some(), "{from} is no volume");
            }
        }
    }
    assert!(seen >= 4, "only {seen} folders are mounted");
}

#[test]
fn the_scripts_are_bash() {
    for script in ["deploy/smoke.sh", "deploy/package.sh", "tests/npm.sh", "tests/services.sh"] {
        let (passed, output) = said(Command::new("bash").arg("-n").arg(repository(script)));
        assert!(passed && output.is_empty(), "{script}: {output}");
    }
}
