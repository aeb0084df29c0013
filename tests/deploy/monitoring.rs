//! Alerts and dashboard: promtool understands them, the alerts' own tests notice a broken alert, and every metric exists.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::repository;
use crate::{said, text, yaml};

const ALERTS: &str = "deploy/prometheus/alerts.yml";
const DASHBOARD: &str = "deploy/grafana/dashboards/angler.json";

fn promtool(arguments: &[&str], folder: &Path) -> (bool, String) {
    said(Command::new("promtool").args(arguments).current_dir(folder))
}

#[test]
fn promtool_accepts_the_configuration_and_the_alerts_pass_their_tests() {
    let folder = repository("deploy/prometheus");
    for arguments in [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ] {
        let (passed, output) = promtool(&arguments, &folder);
        assert!(passed, "{arguments:?}: {output}");
    }
}

/// Where the expression of each alert stands in the file.
fn expressions(rules: &str) -> Vec<(String, Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(begin) = rules[at..].find("- alert: ").map(|i| at + i + "- alert: ".len()) {
        let name = rules[begin..].lines().next().unwrap().to_owned();
        let from = begin + rules[begin..].find("expr: ").unwrap() + "expr: ".len();
        let to = ["\n        for:", "\n        labels:"]
            .iter()
            .filter_map(|next| rules[from..].find(next))
            .min()
            .unwrap();
        found.push((name, from..from + to));
        at = from + to;
    }
    found
}

#[test]
fn the_tests_notice_an_alert_that_never_fires_or_always() {
    let rules = text(ALERTS);
    let alerts = expressions(&rules);
    assert!(alerts.len() >= 12, "only {} alerts were found", alerts.len());
    let folder = tempfile::tempdir().unwrap();
    let tests = repository("deploy/prometheus/alerts_test.yml");
    std::fs::copy(tests, folder.path().join("alerts_test.yml")).unwrap();
    for (name, expression) in alerts {
        for broken in ["vector(1) < 0", "vector(1)"] {
            let mut rules = rules.clone();
            rules.replace_range(expression.clone(), broken);
            std::fs::write(folder.path().join("alerts.yml"), rules).unwrap();
            let (passed, output) = promtool(&["test", "rules", "alerts_test.yml"], folder.path());
            assert!(!passed, "nothing noticed that {name} is {broken}");
            assert!(output.contains("FAILED") && !output.contains("parse"), "{output}");
        }
    }
}

/// Queries of the dashboard, with the title of their panel, as Grafana would send them.
fn queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&text(DASHBOARD)).unwrap();
    let mut found = Vec::new();
    let mut add = |title: &Value, query: &Value| {
        let query = query.as_str().unwrap();
        let query = query.replace("$__rate_interval", "1m").replace("$instance", ".+");
        assert!(!query.contains('$'), "{title}: an unknown variable in {query}");
        found.push((title.as_str().unwrap().to_owned(), query));
    };
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            add(&panel["title"], &target["expr"]);
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        add(&annotation["name"], &annotation["expr"]);
    }
    found
}

#[test]
fn prometheus_understands_every_query_of_the_dashboard() {
    let queries = queries();
    assert!(queries.len() > 30, "only {} queries were found", queries.len());
    let folder = tempfile::tempdir().unwrap();
    let check = |queries: &[(String, String)]| {
        let rule = |(i, (_, query)): (usize, &(String, String))| json!({ "record": format!("q:{i}"), "expr": query });
        let rules: Vec<Value> = queries.iter().enumerate().map(rule).collect();
        // JSON is YAML.
        let rules = json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
        std::fs::write(folder.path().join("rules.yml"), rules.to_string()).unwrap();
        promtool(&["check", "rules", "rules.yml"], folder.path())
    };
    let (passed, output) = check(&queries);
    assert!(passed, "{output}");
    let (passed, _) = check(&[("broken".to_owned(), "sum(rate(a[5m])".to_owned())]);
    assert!(!passed, "promtool does not look at queries");
}

#[test]
fn panels_have_their_own_place_and_number() {
    let dashboard: Value = serde_json::from_str(&text(DASHBOARD)).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let numbers: BTreeSet<u64> = panels.iter().map(|p| p["id"].as_u64().unwrap()).collect();
    assert_eq!(numbers.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{}", panel["title"]);
        for y in at("y")..at("y") + at("h") {
            for x in at("x")..at("x") + at("w") {
                assert!(taken.insert((x, y)), "{} lies on another panel", panel["title"]);
            }
        }
    }
    // Found by Grafana: the folder of the provisioning file is the one that the compose file mounts.
    let provider = &yaml("deploy/grafana/provisioning/dashboards/angler.yml")["providers"][0];
    let mounts = &yaml("deploy/compose.yaml")["services"]["grafana"]["volumes"];
    let wanted =
        format!("./grafana/dashboards:{}:ro", provider["options"]["path"].as_str().unwrap());
    assert!(mounts.as_array().unwrap().contains(&json!(wanted)), "{mounts} lacks {wanted}");
}

/// Words of a query that are names of metrics of a worker.
fn metrics(query: &str) -> impl Iterator<Item = &str> {
    query
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':')
        .filter(|word| word.starts_with("angler_") || word.starts_with("process_"))
}

/// The values that a query asks of a label: `outcome="a"`, `outcome=~"a|b"`.
fn asked<'a>(query: &'a str, label: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    for sign in ["=\"", "=~\""] {
        for rest in query.split(&format!("{label}{sign}")).skip(1) {
            found.extend(rest.split('"').next().unwrap().split('|'));
        }
    }
    found
}

#[test]
fn every_metric_that_is_asked_for_is_one_that_workers_have() {
    let page = text("docs/metrics.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let mut queries = queries();
    let rules = text(ALERTS);
    queries.extend(expressions(&rules).into_iter().map(|(name, at)| (name, rules[at].to_owned())));
    let mut names = BTreeSet::new();
    for (title, query) in &queries {
        for metric in metrics(query) {
            let of_histogram =
                ["_bucket", "_sum", "_count"].iter().find_map(|e| metric.strip_suffix(e));
            let row =
                |name: &str| rows.iter().find(|row| row.starts_with(&format!("| `{name}` |")));
            let row = row(metric)
                .or_else(|| row(of_histogram?).filter(|row| row.contains("| histogram |")));
            let row = row.unwrap_or_else(|| panic!("{title}: docs/metrics.md has no {metric}"));
            for label in ["outcome", "step", "reason", "code"] {
                for value in asked(query, label) {
                    assert!(
                        row.contains(&format!("`{value}`")),
                        "{title}: {metric} has no {label}={value}"
                    );
                }
            }
            names.insert(metric);
        }
    }
    assert!(names.len() > 20, "only {names:?} were found");
}
