//! `angler classes list`: which sets and versions there are.

use std::time::SystemTime;

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use angler_core::class_sets::publish::read_active;
use angler_core::store::{Listed, ObjectStore};
use angler_wire::job::check_name;

use crate::app::App;
use crate::commands::UsageError;
use crate::commands::tables::{show, table};

/// List class sets and their versions
#[derive(Args)]
pub struct ListCommand {
    /// One class set [default: all]
    set: Option<String>,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Set {
    set: String,
    active: Option<String>,
    previous: Option<String>,
    activated_at: Option<String>,
    activated_by: Option<String>,
    /// What is wrong with active.json.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    versions: Vec<Version>,
}

#[derive(Serialize)]
struct Version {
    version: String,
    active: bool,
    bytes: u64,
    modified: String,
}

impl ListCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        let root = app.class_root().await?;
        let names = match &self.set {
            Some(set) => {
                check_name(set).map_err(UsageError::of)?;
                vec![set.clone()]
            }
            None => {
                let listed = root.list("").await?.into_iter();
                let folder = |entry: Listed| match entry {
                    Listed::Folder { name } if check_name(&name).is_ok() => Some(name),
                    _ => None,
                };
                listed.filter_map(folder).collect()
            }
        };
        let mut sets = Vec::new();
        for name in names {
            let set = read(root.as_ref(), name).await?;
            if !set.versions.is_empty() || set.active.is_some() || set.problem.is_some() {
                sets.push(set);
            }
        }
        let place = root.place("");
        if let Some(set) = self.set.filter(|_| sets.is_empty()) {
            bail!("there is no class set {set} under {place}");
        }
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&sets)?))?;
        } else if sets.is_empty() {
            show(&format!("no class sets under {place}; make one: angler classes build\n"))?;
        } else {
            sets.iter().try_for_each(|set| show(&set.text()))?;
        }
        Ok(())
    }
}

async fn read(root: &dyn ObjectStore, name: String) -> Result<Set> {
    let (active, problem) = match read_active(root, &name).await? {
        Some((Ok(active), _)) => (Some(active), None),
        Some((Err(problem), _)) => (None, Some(format!("active.json is {problem}"))),
        None => (None, None),
    };
    let mut files = Vec::new();
    for entry in root.list(&name).await? {
        let Listed::Object { name, bytes, modified } = entry else { continue };
        let Some(version) = name.strip_suffix(".safetensors") else { continue };
        files.push((modified, version.to_owned(), bytes));
    }
    // The newest first: names need not sort as versions.
    files.sort_by(|a, b| b.cmp(a));
    let versions = files.into_iter().map(|(modified, version, bytes)| Version {
        active: active.as_ref().is_some_and(|active| active.version == version),
        version,
        bytes,
        modified: rfc3339(modified),
    });
    Ok(Set {
        versions: versions.collect(),
        set: name,
        problem,
        previous: active.as_ref().and_then(|active| active.previous.clone()),
        activated_at: active.as_ref().and_then(|active| active.activated_at.clone()),
        activated_by: active.as_ref().and_then(|active| active.activated_by.clone()),
        active: active.map(|active| active.version),
    })
}

impl Set {
    fn text(&self) -> String {
        let rows = self.versions.iter().map(|v| {
            let mark = if v.active {
                "active"
            } else if self.previous.as_ref() == Some(&v.version) {
                "previous"
            } else {
                ""
            };
            vec![v.version.clone(), mark.to_owned(), size(v.bytes), v.modified.clone()]
        });
        let state = match (&self.problem, &self.active) {
            (Some(problem), _) => problem.clone(),
            (None, None) => "no version is active".to_owned(),
            (None, Some(active)) => {
                let part = |word: &str, text: &Option<String>| {
                    text.as_ref().map(|text| format!(" {word} {text}")).unwrap_or_default()
                };
                let at = part("since", &self.activated_at);
                format!("{active} is active{at}{}", part("by", &self.activated_by))
            }
        };
        let headers = ["version", "", "size", "written"];
        let title = format!("{}: {state}\n", self.set);
        let total = self.versions.len() as u64;
        table(&title, &headers, 2, rows, total).trim_start().to_owned() + "\n"
    }
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
