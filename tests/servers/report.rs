//! `angler report`: what the results of a run come to, as a summary, as JSON and as a page in a browser.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::browser::{Seen, look};
use crate::support::{Bucket, Setup, fashion_classes, files, repository, unique};
use serde_json::{Value, json};

/// Wants to be markup, to run, to end an attribute, to turn what follows, and to move a terminal's cursor.
const HOSTILE: &str = "<img src=\"http://x.invalid/a.png\" onerror=\"document.title='owned'\">\
                       </script></style> &lt;b&gt; ' \u{202e}gpj\u{1b}[2J";

/// As a page shows it.
fn shown(text: &str) -> String {
    text.replace(['\u{202e}', '\u{1b}'], "\u{fffd}")
}

/// A file of these lines in a folder of its own.
struct Results {
    folder: tempfile::TempDir,
}

impl Results {
    fn of(lines: &[Value]) -> Self {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        Self::text(&text)
    }

    fn text(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("results.jsonl"), text).unwrap();
        Self { folder }
    }

    fn path(&self) -> String {
        self.at("results.jsonl")
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// The summary as JSON; what was said besides.
    fn json(&self, more: &[&str]) -> (Value, String) {
        let (code, out, log) =
            Setup::store().run(&[&["report", &self.path(), "--json"], more].concat());
        assert_eq!(code, 0, "{log}");
        (serde_json::from_str(&out).unwrap(), log)
    }

    /// The page; what was said.
    fn page(&self, more: &[&str]) -> (String, String) {
        let page = self.at("page.html");
        let path = self.path();
        let all = [&["report", &path, "--html", &page], more].concat();
        let (code, _, log) = Setup::store().run(&all);
        assert_eq!(code, 0, "{log}");
        (std::fs::read_to_string(page).unwrap(), log)
    }
}

/// A line as `angler classify` writes them.
fn line(uri: &str, label: Option<&str>, score: f64, margin: f64) -> Value {
    let best = label.unwrap_or("cola");
    json!({
        "uri": uri, "label": label, "score": score, "margin": margin,
        "top": [{"label": best, "score": score}, {"label": "second", "score": score - margin}],
        "classes": "bottles@7", "model": "m@1", "backend": "tract-cpu",
    })
}

fn failed(uri: &str, code: &str, message: &str) -> Value {
    json!({"uri": uri, "error": {"code": code, "message": message}})
}

/// A whole result as a worker publishes it.
fn job(id: &str, images: &[Value]) -> Value {
    json!({
        "id": id, "status": "done", "classes": "bottles@8", "model": "m@1",
        "backend": "onnxruntime-cuda", "images": images,
        "run": {"id": "nightly", "jobs": 2, "index": 0},
        "attempt": 1, "worker": "w", "finished_at": "2026-01-31T12:00:00.000Z",
    })
}

fn every_kind() -> Vec<Value> {
    vec![
        line("a/1.jpg", Some("cola"), 0.9, 0.3),
        line("a/2.jpg", Some("cola"), 0.8, 0.01),
        line("a/3.jpg", Some("lemonade"), 0.7, 0.2),
        line("a/4.jpg", None, 0.2, 0.1),
        failed("a/5.jpg", "not_found", "a/5.jpg: no such file"),
        job(
            "nightly/1",
            &[
                json!({"uri": "s3://b/6.jpg", "id": "sku-6", "label": "cola", "score": 0.6,
                       "top": [{"label": "cola", "score": 0.6}]}),
                failed("s3://b/7.jpg", "not_found", "no such key"),
                failed("s3://b/8.jpg", "corrupt_image", "it ends early"),
            ],
        ),
        json!({"id": "nightly/2", "status": "failed",
               "error": {"code": "unknown_version", "message": "bottles has no version 9"},
               "attempt": 1, "worker": "w", "finished_at": "2026-01-31T12:00:00.000Z"}),
    ]
}

#[test]
fn every_kind_of_line_is_counted_once_in_either_form() {
    let lines: Vec<String> = every_kind().iter().map(Value::to_string).collect();
    let text = format!("{}\n\nnonsense\n{{\"a\":1}}\n", lines.join("\n"));
    let results = Results::text(&text);
    let (summary, log) = results.json(&[]);
    let counts = ["lines", "images", "classified", "unknown", "failed", "failed_jobs"]
        .map(|key| summary[key].as_u64().unwrap());
    assert_eq!(counts, [9, 8, 4, 1, 3, 1]);
    let classes: Vec<(&str, u64)> = summary["classes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["label"].as_str().unwrap(), c["images"].as_u64().unwrap()))
        .collect();
    assert_eq!(classes, [("cola", 3), ("lemonade", 1)]);
    let answered = &summary["answered"];
    assert_eq!(answered[0]["classes"], "bottles@7");
    assert_eq!(
        (&answered[1]["backend"], &answered[1]["images"]),
        (&json!("onnxruntime-cuda"), &json!(3))
    );
    let codes: Vec<(&Value, &Value)> =
        summary["errors"].as_array().unwrap().iter().map(|e| (&e["code"], &e["count"])).collect();
    assert_eq!(codes, [(&json!("not_found"), &json!(2)), (&json!("corrupt_image"), &json!(1))]);
    assert_eq!(summary["job_errors"][0]["examples"][0]["name"], "nightly/2");
    // The smallest margin first, and at the end those that have none.
    let least: Vec<&str> = summary["least_certain"]["first"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["uri"].as_str().unwrap())
        .collect();
    assert_eq!(least, ["a/2.jpg", "a/3.jpg", "a/1.jpg", "s3://b/6.jpg"]);
    assert_eq!(summary["least_certain"]["first"][0]["runner_up"], "second");
    assert_eq!(summary["least_certain"]["first"][3]["id"], "sku-6");
    assert_eq!(summary["unknown_images"]["first"][0]["nearest"], "cola");
    assert_eq!(summary["unreadable"]["lines"], 2);
    assert_eq!(summary["unreadable"]["first"]["line"], 9); // a blank line is a line of the file
    assert!(
        log.contains("2 of 9 lines could not be read; the first is line 9: not a result"),
        "{log}"
    );
}

#[test]
fn a_summary_fits_a_terminal_of_80_columns() {
    let mut lines = every_kind();
    let long = "a-very-long-name/".repeat(20);
    lines.push(line(&format!("s3://bucket/{long}x.jpg"), Some(&long), 0.5, 0.02));
    lines.push(line(HOSTILE, Some(HOSTILE), 0.5, 0.03));
    lines.push(failed(&long, "timeout", HOSTILE));
    let results = Results::of(&lines);
    let (code, out, log) = Setup::store().run(&["report", &results.path()]);
    assert_eq!((code, log.as_str()), (0, ""));
    for row in out.lines().skip(1) {
        assert!(row.chars().count() <= 80, "{row}");
    }
    assert!(!out.contains('\u{1b}'), "{out:?}");
    for words in
        ["classified", "least certain", "not_found", "jobs that failed", "bottles@8", "lemonade"]
    {
        assert!(out.contains(words), "{words}\n{out}");
    }
}

#[test]
fn standard_input_is_read_like_a_file() {
    let results = Results::of(&every_kind());
    let output = Setup::store()
        .command(&["report", "-", "--json"])
        .stdin(std::fs::File::open(results.path()).unwrap())
        .output()
        .unwrap();
    let mut piped: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(piped["source"], "standard input");
    piped["source"] = json!(results.path());
    assert_eq!(piped, results.json(&[]).0);
}

#[test]
fn the_exit_code_is_1_only_if_nothing_could_be_read() {
    for (text, words) in [
        ("", "holds no results: it is empty"),
        ("\n\n", "holds no results: it is empty"),
        ("nonsense\n[]\n", "2 lines cannot be read; the first is line 1: not a result"),
    ] {
        let results = Results::text(text);
        let page = results.at("page.html");
        let (code, out, log) = Setup::store().run(&["report", &results.path(), "--html", &page]);
        assert!(code == 1 && out.is_empty() && log.contains(words), "{code}\n{log}");
        assert!(!Path::new(&page).exists());
    }
    let failed_job = every_kind().pop().unwrap();
    let (summary, _) = Results::of(&[failed_job]).json(&[]);
    assert_eq!((&summary["images"], &summary["failed_jobs"]), (&json!(0), &json!(1)));
    let (code, _, log) = Setup::store().run(&["report", "no/such/file.jsonl"]);
    assert!(code == 1 && log.contains("no/such/file.jsonl cannot be read"), "{log}");
    let results = Results::of(&every_kind());
    for wrong in [["--html", "-"], ["--html", "no/such/folder/page.html"], ["--per-class", "0"]] {
        let (code, _, log) = Setup::store().run(&["report", &results.path(), wrong[0], wrong[1]]);
        assert_eq!(code, 2, "{wrong:?}: {log}");
    }
}

/// What every page must be, as a reader on a laptop and on a phone gets it.
async fn looked_at(html: &str) -> Seen {
    let mut last = None;
    for (width, dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
        let seen = look(html, width, dark).await;
        assert_eq!((seen.width, seen.dark), (width, dark));
        assert_eq!(seen.faults(), [""; 0]);
        last = Some(seen);
    }
    last.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_come_from_files_and_from_s3_and_what_is_missing_is_said_once() {
    let photos = files("samples/photos");
    let bucket = Bucket::new().await;
    let stored = bucket.upload("p", &photos[..2]).await;
    let local: Vec<&str> = photos[2..5].iter().map(|path| path.to_str().unwrap()).collect();
    let gone = format!("s3://{}/gone.jpg", bucket.name);
    let no_bucket = format!("s3://{}/a.jpg", unique("none"));
    let uris: Vec<&str> = local
        .iter()
        .copied()
        .chain(stored.iter().map(String::as_str))
        .chain(["gone/from/here.jpg", &gone, &no_bucket])
        .collect();
    // No margins: the least certain have the lowest scores. The last is unknown.
    let lines: Vec<Value> = uris
        .iter()
        .enumerate()
        .map(|(n, uri)| line(uri, (n < 7).then_some("thing"), 0.9 - 0.05 * n as f64, 0.1))
        .collect();
    let results = Results::of(&lines);
    let (html, log) = results.page(&[]);
    assert!(log.contains("3 of 8 pictures are not there (not_found 3); for example "), "{log}");
    assert_eq!(log.lines().count(), 2, "{log}"); // and where the page is
    let seen = looked_at(&html).await;
    // Each label's image is among the least certain, and among those of its class.
    assert_eq!(seen.images, [160; 10], "{:?}", seen.text);
    assert_eq!(seen.text.matches("no picture").count(), 5);
    assert_eq!(seen.text.matches("3 of 8 pictures are not there").count(), 1);

    let (html, log) = results.page(&["--no-thumbnails"]);
    assert!(log.starts_with("page in ") && !html.contains("<img"), "{log}");
    let seen = looked_at(&html).await;
    assert!(seen.tables.iter().flatten().flatten().any(|cell| cell == &gone));
    assert!(!seen.text.contains("no picture"), "{}", seen.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_names_are_only_names() {
    let mut lines = every_kind();
    let long = "unbroken".repeat(40);
    for (n, label) in [HOSTILE, &long].into_iter().enumerate() {
        lines.push(line(&format!("{label}/{HOSTILE}"), Some(label), 0.5, 0.02 + n as f64));
        lines.push(line(&format!("{label}/unknown{HOSTILE}"), None, 0.1, 0.02));
        lines.push(failed(&format!("{label}/{HOSTILE}"), label, HOSTILE));
        let mut result = job(label, &[line(label, Some(label), 0.4, 0.001)]);
        (result["classes"], result["model"]) = (json!(label), json!(HOSTILE));
        lines.push(result);
        lines.push(json!({"id": label, "status": "failed",
                          "error": {"code": label, "message": HOSTILE}}));
    }
    lines.push(json!({"uri": HOSTILE}));
    let results = Results::of(&lines);
    for more in [&[][..], &["--no-thumbnails"]] {
        let (html, log) = results.page(more);
        assert!(!log.contains('\u{1b}'), "{log:?}");
        let seen = looked_at(&html).await;
        assert!(seen.text.contains(&shown(HOSTILE)), "{}", seen.text);
        assert!(seen.text.contains("Jobs that failed") && seen.images.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_classes_have_fewer_pictures_each_and_the_page_stays_small() {
    let photo = repository("samples/photos/coffee.png");
    let photo = photo.to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    for n in 0..1_500 {
        // Links: as many names as there are pictures to fetch, of one file.
        let name = folder.path().join(format!("{n}.png"));
        std::os::unix::fs::symlink(photo, &name).unwrap();
        let label = format!("class-{:02}", n % 30 * n / 1_500);
        lines.push(line(name.to_str().unwrap(), Some(&label), 0.9, f64::from(n) / 2_000.0));
    }
    let results = Results::of(&lines);
    let (html, _) = results.page(&["--per-class", "20"]);
    let seen = looked_at(&html).await;
    let classes = results.json(&[]).0["classes"].as_array().unwrap().len();
    assert!(classes > 20, "{classes}");
    assert!((200..=240 + 36).contains(&seen.images.len()), "{}", seen.images.len());
    assert!(html.len() < 4_000_000, "{} bytes", html.len());
    let (html, _) = results.page(&["--per-class", "1"]);
    let images = look(&html, 390, false).await.images.len();
    assert_eq!(images, classes + 36);
}

#[test]
fn memory_does_not_grow_with_the_lines() {
    let peak = |pid: u32| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    };
    let mut child = Setup::store()
        .command(&["report", "-", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (pid, mut input) = (child.id(), child.stdin.take().unwrap());
    let (lines, mut bytes, mut early) = (200_000, 0, 0);
    for n in 0..lines {
        let uri = format!("s3://bucket/a/folder/of/pictures/{n:08}.jpg");
        let label = format!("class-{}", n * 7 % 100);
        let text = match n % 10 {
            0 => failed(&uri, "not_found", "no such key"),
            1 => line(&uri, None, 0.2, 0.1),
            // The list of the least certain changes to the end.
            _ => line(&uri, Some(&label), 0.8, 0.9 - f64::from(n) / 250_000.0),
        };
        let text = format!("{text}\n");
        bytes += text.len() as u64;
        input.write_all(text.as_bytes()).unwrap();
        if n == lines / 10 {
            early = peak(pid);
        }
    }
    // All but what is in the pipe has been read.
    let grown = peak(pid) - early;
    drop(input);
    let output = child.wait_with_output().unwrap();
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["images"], lines);
    assert_eq!(summary["least_certain"]["total"], lines / 10 * 8);
    println!("{} kB more for {} kB of lines", grown / 1024, bytes / 1024);
    assert!(grown < bytes / 8, "{grown} bytes more for {bytes} bytes of lines");
}

/// The way that a person goes: classify, then look.
#[tokio::test(flavor = "multi_thread")]
async fn what_classify_wrote_can_be_looked_at() {
    let (root, classes) = fashion_classes();
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("results.jsonl");
    let broken = folder.path().join("broken.jpg");
    std::fs::write(&broken, "no image").unwrap();
    let mut setup = Setup::store();
    setup.set("classes.root", root.path().to_str().unwrap());
    let (results, broken) = (results.to_str().unwrap(), broken.to_str().unwrap());
    let classify = [
        "classify",
        "samples/fashion/query",
        "samples/photos",
        broken,
        "--classes",
        classes,
        "--top-k",
        "2",
        "--min-score",
        "0.55",
        "--out",
        results,
    ];
    let (code, _, log) = setup.run(&classify);
    assert_eq!(code, 0, "{log}");
    // Kept, to be looked at by who changes the page.
    let page = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("report.html");
    let (code, out, log) = setup.run(&["report", results, "--html", page.to_str().unwrap()]);
    assert_eq!(code, 0, "{log}");
    println!("{out}");
    let seen = looked_at(&std::fs::read_to_string(page).unwrap()).await;
    assert!(seen.text.contains("unsupported_format"), "{}", seen.text);
    assert!(seen.images.len() > 100 && !seen.text.contains("no picture"));
    for section in ["Classes", "Scores", "Least certain", "Unknown", "Errors", "Images by class"] {
        assert!(seen.text.contains(section), "{section}: {}", seen.text);
    }
}
