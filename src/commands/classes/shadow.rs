//! `angler classes shadow`: what the version that is tried beside the one served would change.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use angler_wire::control::shadow::ShadowReport;
use angler_wire::control::{Answer, Request};
use angler_wire::text::plural;

use crate::app::App;
use crate::commands::UsageError;
use crate::commands::tables::{address, given, number, percent, show, table};

/// Show what classes.shadow would change, as the workers have counted
///
/// Workers with classes.shadow = "SET@VERSION" score every image of that set against that version
/// too, and count what would get another label; nothing of it is in the results.
#[derive(Args)]
pub struct ShadowCommand {
    /// How long to wait for the workers' answers
    #[arg(long, default_value_t = 3.0, value_name = "SECONDS")]
    wait: f64,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Counted {
    /// Workers that answered.
    workers: usize,
    /// Workers that consume jobs and did not.
    silent: usize,
    /// One for each pair of versions, all workers together.
    reports: Vec<ShadowReport>,
}

impl ShadowCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        if !(0.0..=3600.0).contains(&self.wait) {
            return Err(UsageError("--wait must be 0 to 3600 seconds".to_owned()).into());
        }
        let mut client = app
            .control_client("classes shadow")
            .await
            .context("the workers cannot be asked: the broker cannot be reached")?;
        client.ask(&Request::Shadow).await.context("the workers cannot be asked")?;
        let deadline = Instant::now() + Duration::from_secs_f64(self.wait);
        let mut answers = BTreeMap::new();
        while answers.len() < client.workers() {
            let Some(reply) = client.reply(deadline).await else { break };
            if let Answer::Shadow { report } = reply.answer {
                answers.insert(reply.instance, report);
            }
        }
        let silent = client.workers().saturating_sub(answers.len());
        client.close().await;
        let workers = answers.len();
        let mut reports: BTreeMap<(String, String), ShadowReport> = BTreeMap::new();
        for report in answers.into_values().flatten() {
            let key = (report.candidate.clone(), report.served.clone());
            match reports.get_mut(&key) {
                Some(sum) => sum.add(&report),
                None => {
                    reports.insert(key, *report);
                }
            }
        }
        let counted = Counted { workers, silent, reports: reports.into_values().collect() };
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&counted)?))?;
        } else {
            show(&counted.text())?;
        }
        Ok(())
    }
}

impl Counted {
    fn text(&self) -> String {
        let mut text = format!("{} answered", plural(self.workers, "worker"));
        if self.silent > 0 {
            text += &format!(", {} did not", self.silent);
        }
        text.push('\n');
        if self.reports.is_empty() {
            return text + "none tries a version: set classes.shadow = \"SET@VERSION\"\n";
        }
        for report in &self.reports {
            text += &one(report);
        }
        text
    }
}

fn one(report: &ShadowReport) -> String {
    let ShadowReport { candidate, served, images, flips, .. } = report;
    if *images == 0 {
        let state = if report.loaded { "loaded" } else { "not loaded yet" };
        return format!("\n{candidate}: {state}, and no image of its set has come yet\n");
    }
    let share = percent(Some(*flips as f64 / *images as f64));
    let mut text = format!(
        "\n{candidate} beside {served}\n  images          {images}\n  other label     {flips} \
         ({share})\n  would be known  {}\n  unknown then    {}\n  margin          {:+.4} on average\n",
        report.became_known, report.became_unknown, report.mean_margin_shift
    );
    let rows = report
        .transitions
        .iter()
        .map(|t| vec![given(t.from.as_deref()), given(t.to.as_deref()), t.count.to_string()]);
    let total = report.transitions.len() as u64;
    text += &table("what flips into what\n", &["now", "then", "images"], 2, rows, total);
    let rows = report.examples.iter().map(|e| {
        vec![
            address(&e.uri),
            given(e.from.as_deref()),
            given(e.to.as_deref()),
            number(Some(e.scores.0)),
            number(Some(e.scores.1)),
        ]
    });
    let headers = ["image", "now", "then", "score now", "then"];
    text += &table("the latest\n", &headers, 3, rows, report.examples.len() as u64);
    text
}
