//! `angler bench` as a user runs it, with a model that costs next to nothing: every section has figures,
//! and what is computed follows from what is printed. No figure is held against a clock.

use std::process::{Command, Stdio};

use crate::support::browser::look;
use crate::support::{Broker, Bucket, Setup, eventually, tiny};
use serde_json::Value;

/// The shortest run that measures everything.
const SHORT: [&str; 4] = ["bench", "--quick", "--seconds", "0.05"];

fn on_tract(mut setup: Setup) -> Setup {
    setup.set("model.path", tiny::MODEL);
    setup.set("embedder.backend", "tract");
    setup
}

fn done(setup: &Setup, more: &[&str]) -> (String, String) {
    let arguments = [&SHORT, more].concat();
    let (code, out, log) = setup.run(&arguments);
    assert_eq!(code, 0, "{arguments:?}:\n{log}");
    (out, log)
}

fn json(setup: &Setup, more: &[&str]) -> Value {
    let (out, _) = done(setup, &[more, &["--json"]].concat());
    serde_json::from_str(&out).expect(&out)
}

fn rows<'a>(report: &'a Value, section: &str) -> &'a [Value] {
    report[section].as_array().unwrap_or_else(|| panic!("{section}: {report:#}"))
}

/// The values of a key, row after row.
fn column(report: &Value, section: &str, key: &str) -> Vec<Value> {
    rows(report, section).iter().map(|row| row[key].clone()).collect()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row:#}"))
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * a.abs().max(b.abs())
}

/// A figure's four numbers.
fn check_figure(row: &Value) {
    let rate = number(row, "images_per_second");
    assert!(rate > 0.0 && near(number(row, "ms_per_image"), 1000.0 / rate), "{row:#}");
    for key in ["core_ms_per_image", "own_core_ms_per_image"] {
        // Of what is over within a tick no core time is seen.
        assert!(number(row, key) >= 0.0, "{row:#}");
    }
}

/// The ceiling out of the parts, and the ratio.
fn check_whole(row: &Value, cores: f64) {
    check_figure(row);
    let parts = row["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(names, ["fetch", "decode", "embed", "score", "publish"], "{row:#}");
    parts.iter().for_each(check_figure);
    let sum: f64 = parts.iter().map(|part| number(part, "core_ms_per_image")).sum();
    let slowest =
        parts.iter().map(|part| number(part, "images_per_second")).fold(f64::INFINITY, f64::min);
    let by_cores = cores * 1000.0 / sum;
    let ceiling = &row["ceiling"];
    assert!(near(number(ceiling, "by_cores"), by_cores), "{row:#}");
    assert!(near(number(ceiling, "by_slowest_part"), slowest), "{row:#}");
    assert!(near(number(ceiling, "images_per_second"), by_cores.min(slowest)), "{row:#}");
    let limited_by = ceiling["limited_by"].as_str().unwrap();
    assert_eq!(limited_by == "cores", by_cores <= slowest, "{row:#}");
    if limited_by != "cores" {
        let part = parts.iter().find(|part| part["part"] == limited_by).unwrap();
        assert!(near(number(part, "images_per_second"), slowest), "{row:#}");
    }
    let ratio = number(row, "images_per_second") / number(ceiling, "images_per_second");
    assert!(near(number(row, "ratio"), ratio), "{row:#}");
}

#[tokio::test]
async fn every_section_has_figures_and_they_agree() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("bench.html");
    let html = page.to_str().unwrap();
    let report = json(&on_tract(Setup::default()), &["--html", html]);
    let cores = number(&report["machine"], "cores");
    assert!(number(&report["machine"], "busy_cores_before") >= 0.0);
    assert_eq!(report["model"]["backend"], "tract-cpu");

    for section in ["fetch", "decode", "embed", "score", "publish"] {
        rows(&report, section).iter().for_each(check_figure);
    }
    assert_eq!(column(&report, "fetch", "kind"), ["small", "camera"]);
    assert_eq!(
        column(&report, "decode", "kind"),
        ["small", "camera", "camera PNG", "camera WebP", "12 MP"]
    );
    for share in column(&report, "decode", "decode_share") {
        assert!((0.0..=1.0).contains(&share.as_f64().unwrap()), "{share}");
    }
    assert_eq!(column(&report, "embed", "batch"), [1, 8, 32]);
    assert_eq!(rows(&report, "embed_skipped"), [Value::Null; 0], "one was named");
    assert_eq!(column(&report, "score", "classes"), [10, 1_000, 100_000]);
    assert_eq!(column(&report, "publish", "to"), ["lines"]);
    let publish = &rows(&report, "publish")[0];
    let per_job = number(&report["settings"], "images_per_job");
    let results = number(publish, "images_per_second") / per_job;
    assert!(near(number(publish, "results_per_second"), results));

    assert_eq!(column(&report, "whole", "kind"), ["small", "camera"]);
    rows(&report, "whole").iter().for_each(|row| check_whole(row, cores));
    let ways = rows(&report, "ways");
    assert_eq!(ways.len(), 6, "two ways, from pixels and two kinds of files");
    assert_eq!(report["fused"], false);
    for pair in ways.chunks(2) {
        let seconds = |way: &Value| number(way, "seconds_per_100_images");
        assert_eq!(pair.iter().map(|w| &w["way"]).collect::<Vec<_>>(), ["one_by_one", "batched"]);
        assert!(near(number(&pair[0], "speedup"), 1.0));
        assert!(near(number(&pair[1], "speedup"), seconds(&pair[0]) / seconds(&pair[1])));
    }

    let html = std::fs::read_to_string(page).unwrap();
    for width in [1280, 360] {
        let seen = look(&html, width, width == 360).await;
        assert_eq!(seen.faults(), [""; 0]);
        for chart in ["Measured rate and ceiling", "Core time of an image", "Rate by the size"] {
            assert!(seen.pictures.iter().any(|p| p.starts_with(chart)), "{:?}", seen.pictures);
        }
        assert!(seen.text.contains("not available with this back end"), "{}", seen.text);
    }
}

#[test]
fn the_report_fits_a_terminal() {
    let (text, _) = done(&on_tract(Setup::default()), &["--only", "decode,score,ways"]);
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    for words in ["Decode\n", "Score\n", "Three ways\n", "Batching by itself", "A short run"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains("Embed\n") && !text.contains("The whole\n"), "{text}");
}

#[test]
fn a_back_end_that_scores_in_its_graph_has_a_third_way() {
    let mut setup = Setup::store();
    setup.set("model.path", tiny::MODEL).set("embedder.backend", "onnxruntime");
    let report = json(&setup, &["--only", "ways"]);
    assert_eq!(report["fused"], true);
    let ways = column(&report, "ways", "way");
    assert_eq!(ways, ["one_by_one", "batched", "fused"].repeat(3));
}

#[test]
fn what_is_named_alone_is_measured_alone() {
    let setup = on_tract(Setup::default());
    let report = json(&setup, &["--only", "score", "--memory", "0.0001", "--class-count", "20"]);
    for section in ["fetch", "decode", "embed", "publish", "whole", "ways"] {
        assert_eq!(rows(&report, section), [Value::Null; 0], "{section}");
    }
    // Three values of four bytes a class: 100,000 take 1.2 MB.
    assert_eq!(column(&report, "score", "classes"), [10, 20, 1_000]);
    assert_eq!(column(&report, "score_skipped", "classes"), [100_000]);
    assert_eq!(column(&report, "score_skipped", "bytes"), [1_200_000]);
    assert_eq!(report["model"]["backend"], Value::Null);
}

#[test]
fn own_images_are_measured_instead() {
    let setup = on_tract(Setup::default());
    let report = json(&setup, &["--images", "samples/fashion/query/bag", "--only", "decode,whole"]);
    assert_eq!(column(&report, "decode", "kind"), ["given"]);
    assert_eq!(column(&report, "whole", "kind"), ["given"]);
    assert_eq!(column(&report, "images", "width"), [Value::Null]);
    check_whole(&rows(&report, "whole")[0], number(&report["machine"], "cores"));

    let arguments = [&SHORT[..], &["--images", "tests/data/images/bad/truncated.jpg"]].concat();
    let (code, out, message) = setup.run(&arguments);
    assert_eq!((code, out.as_str()), (1, ""), "{message}");
    assert!(message.contains("leave it out"), "{message}");
}

#[test]
fn wrong_usage_is_told_before_anything_is_measured() {
    let setup = on_tract(Setup::default());
    for (arguments, words) in [
        (&["--amqp"][..], "--bucket"),
        (&["--bucket", "photos"], "is not an s3:// URI"),
        (&["--images", "s3://a/b"], "name local files"),
        (&["--html", "-"], "a page goes to a file"),
        (&["--seconds", "0"], "0.01 to 600"),
        (&["--rounds", "0"], "0 is not in"),
        (&["--memory", "0"], "--memory"),
        (&["--class-count", "1000000", "--memory", "0.001"], "12 MB"),
    ] {
        let arguments = [&["bench", "--quick"], arguments].concat();
        let (code, out, message) = setup.run(&arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
}

/// The names of queues and exchanges that are the benchmark's.
fn left(broker: &Broker) -> Vec<String> {
    let named = |kind: &str| broker.manage("GET", &format!("{kind}/{}", broker.vhost), None);
    let all = [named("queues"), named("exchanges")];
    let names = all.iter().flat_map(|list| list.as_array().unwrap()).map(|one| &one["name"]);
    names
        .filter_map(|name| Some(name.as_str()?.to_owned()))
        .filter(|n| n.contains("bench"))
        .collect()
}

async fn objects(bucket: &Bucket) -> Vec<String> {
    let listed = bucket.client.list_objects_v2().bucket(&bucket.name).send().await.unwrap();
    listed.contents().iter().filter_map(|object| object.key()).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn through_broker_and_store_and_nothing_is_left_there() {
    let (broker, bucket) = (Broker::new().await, Bucket::new().await);
    bucket.put("for/bench/somebody-elses", b"not the benchmark's".to_vec()).await;
    let setup = on_tract(Setup::worker(&broker, "classes"));
    let target = format!("s3://{}/for/bench", bucket.name);
    let report =
        json(&setup, &["--only", "fetch,publish,whole", "--amqp", "--bucket", target.as_str()]);

    assert_eq!(column(&report, "fetch", "from"), ["folder", "s3", "folder", "s3"]);
    assert_eq!(column(&report, "publish", "to"), ["lines", "broker"]);
    let ways: Vec<String> = rows(&report, "whole")
        .iter()
        .map(|row| format!("{} {}", row["path"], row["kind"]))
        .collect();
    assert_eq!(
        ways.join(", ").replace('"', ""),
        "folder small, broker small, folder camera, broker camera"
    );
    let cores = number(&report["machine"], "cores");
    rows(&report, "whole").iter().for_each(|row| check_whole(row, cores));

    assert_eq!(left(&broker), [""; 0]);
    assert_eq!(objects(&bucket).await, ["for/bench/somebody-elses"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_leaves_nothing_either() {
    let (broker, bucket) = (Broker::new().await, Bucket::new().await);
    let setup = on_tract(Setup::worker(&broker, "classes"));
    let target = format!("s3://{}/interrupted", bucket.name);
    // Long enough to be in the middle of the whole when the signal comes.
    let long = ["bench", "--quick", "--seconds", "0.05", "--rounds", "100", "--only", "whole"];
    let mut child = setup
        .command(&[&long[..], &["--amqp", "--bucket", &target]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("jobs are consumed", async || {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("it ended with {status}");
        }
        let queues = broker.manage("GET", &format!("queues/{}", broker.vhost), None);
        let consumed = |queue: &Value| {
            let jobs = queue["name"].as_str().is_some_and(|name| name.ends_with(".jobs"));
            jobs && queue["consumers"].as_u64().is_some_and(|count| count > 0)
        };
        queues.as_array()?.iter().any(consumed).then_some(())
    })
    .await;
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("interrupted"), "{message}");
    assert_eq!(left(&broker), [""; 0]);
    assert_eq!(objects(&bucket).await, [""; 0]);
}
