//! Bulk runs by the real commands: a million keys listed and enqueued, and a run of 100,000 images
//! whose commands are killed on their way.
//!
//! The keys are those of a stand-in for a store that only lists, in pages of 1,000, as S3 does: no
//! store is filled with a million objects for this. The images of the other run are fetched, decoded,
//! put into batches and waited for by real workers, whose embedders only sleep.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::http::Uri;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::Options;
use crate::support::{Setup, eventually};
use crate::worker::Workers;
use crate::world::{CLASSES, World};

const KEYS: usize = 1_000_000;
const PAGE: usize = 1000;
const IMAGES: usize = 100_000;
/// Jobs of 64, which is the default.
const PER_JOB: usize = 64;
/// What a batch of the embedders takes.
const BATCH_MS: u64 = 20;

pub async fn measure(world: &World, options: &Options) -> Result<Value> {
    let million = million(world, options.rounds).await?;
    let killed = killed(world).await?;
    Ok(json!({ "million": million, "killed": killed }))
}

/// A command that runs, and how much memory it had so far.
struct Running {
    child: Child,
    began: Instant,
    /// Resident MB, four times a second.
    resident: Vec<f64>,
}

impl Running {
    fn start(setup: &Setup, arguments: &[&str]) -> Result<Self> {
        let mut command = setup.command(arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Self { child, began: Instant::now(), resident: Vec::new() })
    }

    /// Samples until it ends, or for so long.
    async fn watch(&mut self, most: Duration) -> Result<bool> {
        let end = Instant::now() + most;
        while Instant::now() < end {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            self.resident.extend(memory(self.child.id(), "VmRSS:"));
            sleep(Duration::from_millis(250)).await;
        }
        Ok(false)
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The most of the samples.
    fn peak(&self) -> f64 {
        self.resident.iter().copied().fold(0.0, f64::max)
    }

    /// Its exit code and what it printed.
    async fn end(mut self) -> Result<(i32, String, f64, Vec<f64>)> {
        ensure!(self.watch(Duration::from_secs(600)).await?, "a command does not end");
        let seconds = self.began.elapsed().as_secs_f64();
        let resident = std::mem::take(&mut self.resident);
        let output = self.child.wait_with_output()?;
        let code = output.status.code().unwrap_or(-1);
        ensure!(code == 0, "{code}: {}", String::from_utf8_lossy(&output.stderr));
        Ok((code, String::from_utf8(output.stdout)?, seconds, resident))
    }
}

fn memory(pid: u32, what: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(what))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1e3)
}

async fn million(world: &World, rounds: usize) -> Result<Value> {
    let (endpoint, _listing) = listing().await?;
    let mut setup = world.setup.clone();
    setup.set("s3.endpoint", &endpoint);
    println!("## A million keys, listed and enqueued in jobs of {PER_JOB}\n");
    println!(
        "| seconds | images/s | of it sending | MB at a tenth | at half | at the end | most |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for round in 0..rounds {
        let run = format!("million-{round}");
        let source = ["enqueue", "s3://millions/photos/", "--classes", CLASSES, "--json"];
        let running = Running::start(&setup, &[&source[..], &["--run", &run]].concat())?;
        let (_, told, seconds, resident) = running.end().await?;
        let told: Value = serde_json::from_str(&told)?;
        ensure!(told["images"] == KEYS, "{told}");
        let sending = told["images_per_second"].as_f64().context("no rate")?;
        let at = |share: f64| {
            let last = resident.len().saturating_sub(1);
            resident.get((share * last as f64) as usize).copied().unwrap_or_default()
        };
        let most = resident.iter().copied().fold(0.0, f64::max);
        let rate = KEYS as f64 / seconds;
        println!(
            "| {seconds:.1} | {rate:.0} | {sending:.0} | {:.0} | {:.0} | {:.0} | {most:.0} |",
            at(0.1),
            at(0.5),
            at(1.0)
        );
        lines.push(json!({
            "seconds": seconds, "images_per_second": rate, "sending_images_per_second": sending,
            "mb": {"tenth": at(0.1), "half": at(0.5), "end": at(1.0), "most": most},
        }));
        // Nobody is to work on them.
        world.broker.manage(
            "DELETE",
            &format!("queues/{}/angler.jobs/contents", vhost(world)),
            None,
        );
    }
    println!();
    Ok(json!(lines))
}

fn vhost(world: &World) -> String {
    world.broker.url.rsplit('/').next().unwrap_or_default().to_owned()
}

/// A store that has a million keys and answers nothing but the listing of them.
async fn listing() -> Result<(String, AbortOnDropHandle<()>)> {
    let page = async |uri: Uri| {
        let mut parts = uri.query().unwrap_or_default().split('&');
        let token = parts.find_map(|part| part.strip_prefix("continuation-token="));
        let first: usize = token.and_then(|token| token.parse().ok()).unwrap_or(0);
        let last = (first + PAGE).min(KEYS);
        let mut xml = String::from(
            r#"<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>millions</Name>"#,
        );
        let more = last < KEYS;
        let _ =
            write!(xml, "<KeyCount>{}</KeyCount><IsTruncated>{more}</IsTruncated>", last - first);
        if more {
            let _ = write!(xml, "<NextContinuationToken>{last}</NextContinuationToken>");
        }
        for key in first..last {
            let _ = write!(
                xml,
                "<Contents><Key>photos/2026/{:03}/{key:08}.jpg</Key><Size>10000</Size>\
                 <LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>&quot;0123456789abcdef0123456789abcdef&quot;</ETag>\
                 <StorageClass>STANDARD</StorageClass></Contents>",
                key / 1000
            );
        }
        xml += "</ListBucketResult>";
        ([("content-type", "application/xml")], xml)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let routes = Router::new().fallback(page);
    let server = tokio::spawn(async move {
        let _ = axum::serve(listener, routes).await; // Ends with this program.
    });
    Ok((endpoint, AbortOnDropHandle::new(server)))
}

async fn killed(world: &World) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let list = folder.path().join("images.jsonl");
    let mut text = String::new();
    for (n, uri) in world.uris.iter().cycle().take(IMAGES).enumerate() {
        let _ = writeln!(text, r#"{{"uri": "{uri}", "id": "{n}"}}"#);
    }
    std::fs::write(&list, text)?;
    let (list, out) = (display(&list)?, folder.path().join("out.jsonl"));
    let mut workers = Workers::new(world, 8, BATCH_MS);
    workers.grow(2).await?;
    let began = Instant::now();
    let enqueue = ["enqueue", &list, "--classes", CLASSES, "--run", "killed", "--json"];
    let mut peaks = [0.0_f64; 2];
    for most in ["50", "100"] {
        let held = [&enqueue[..], &["--max-queued", most]].concat();
        let mut running = Running::start(&world.setup, &held)?;
        ensure!(!running.watch(Duration::from_secs(4)).await?, "it was done before it was killed");
        running.kill()?;
        peaks[0] = peaks[0].max(running.peak());
    }
    let sending = Running::start(&world.setup, &enqueue)?;
    let (_, told, _, resident) = sending.end().await?;
    let sent: Value = serde_json::from_str(&told)?;
    peaks[0] = resident.into_iter().fold(peaks[0], f64::max);
    let path = display(&out)?;
    let collect = ["collect", "--run", "killed", "--out", &path, "--json"];
    let mut running = Running::start(&world.setup, &collect)?;
    let journal = folder.path().join(".out.jsonl.killed.results");
    eventually("a part is collected", async || {
        (std::fs::metadata(&journal).ok()?.len() > 4_000_000).then_some(())
    })
    .await;
    running.watch(Duration::from_millis(500)).await?;
    running.kill()?;
    peaks[1] = running.peak();
    let (_, told, _, resident) = Running::start(&world.setup, &collect)?.end().await?;
    peaks[1] = resident.into_iter().fold(peaks[1], f64::max);
    let seconds = began.elapsed().as_secs_f64();
    let summary: Value = serde_json::from_str(&told)?;
    workers.stop().await?;
    let (mut rows, mut ids) = (0, BTreeSet::new());
    for line in std::fs::read_to_string(&out)?.lines() {
        let row: Value = serde_json::from_str(line)?;
        ensure!(row["label"].is_string(), "not classified: {line}");
        ids.insert(row["id"].as_str().context("a row without an id")?.to_owned());
        rows += 1;
    }
    ensure!(rows == IMAGES && ids.len() == IMAGES, "{rows} rows, {} images", ids.len());
    println!("## {IMAGES} images, both commands killed on their way\n");
    println!(
        "{rows} rows, {} images, in {seconds:.0} s with two workers (batches in {BATCH_MS} ms); the \
         last of three enqueue commands sent {} jobs; at most {:.0} MB (enqueue) and {:.0} MB \
         (collect)\n",
        ids.len(),
        sent["sent"],
        peaks[0],
        peaks[1]
    );
    Ok(json!({
        "rows": rows, "images": ids.len(), "seconds": seconds, "sent_last": sent["sent"],
        "enqueue_mb": peaks[0], "collect_mb": peaks[1], "summary": summary,
    }))
}

fn display(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path in UTF-8")?.to_owned())
}
