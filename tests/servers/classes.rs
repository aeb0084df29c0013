//! `angler classes evaluate`, `compare` and `rescore` as a user runs them, with a tiny model. What
//! they say is counted again here from the rows of `angler classify`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::browser::look;
use crate::support::{Bucket, Setup, files};
use ndarray::Array2;
use ndarray_npy::WriteNpyExt;
use serde_json::{Value, json};

const QUERY: &str = "samples/fashion/query";
const REFERENCE: &str = "samples/fashion/reference";
const MODEL: &str = "tiny-nhwc@b9f0436ae619";
const DIM: usize = 24;

/// The tiny model on tract, a root of the test's own, and in it `fashion@1` of all classes and
/// `fashion@few` of six of them with half the images.
struct Rig {
    setup: Setup,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::on(Setup::default())
    }

    fn on(mut setup: Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        setup.set("model.path", "tests/data/models/tiny-nhwc");
        setup.set("embedder.backend", "tract");
        setup.set("log.level", "warn");
        setup.set("classes.root", folder.path().join("root").to_str().unwrap());
        let rig = Self { setup, folder };
        let few = rig.path("few");
        for class in ["bag", "coat", "dress", "sandal", "shirt", "trouser"] {
            copy(&format!("{REFERENCE}/{class}"), &few.join(class), 5);
        }
        for (source, version) in [(REFERENCE, "1"), (few.to_str().unwrap(), "few")] {
            rig.done(&["classes", "build", source, "--set", "fashion", "--version", version]);
        }
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Runs what must succeed: standard output.
    fn done(&self, arguments: &[&str]) -> String {
        let (code, out, log) = self.setup.run(arguments);
        assert_eq!(code, 0, "{arguments:?}:\n{log}");
        out
    }

    /// The one JSON object of a command that succeeds.
    fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        serde_json::from_str(&self.done(&arguments)).unwrap()
    }

    /// Runs what must fail before it prints anything: exit code and message.
    fn failed(&self, arguments: &[&str]) -> (i32, String) {
        let (code, out, message) = self.setup.run(arguments);
        assert_ne!(code, 0, "{arguments:?} was done:\n{out}\n{message}");
        assert_eq!(out, "", "{arguments:?}");
        assert!(message.contains("error: ") && !message.contains("panicked"), "{message}");
        (code, message)
    }

    /// The rows of `angler classify`.
    fn rows(&self, images: &str, classes: &str, more: &[&str]) -> Vec<Value> {
        let mut arguments = vec!["classify", images, "--classes", classes, "--top-k", "10"];
        arguments.extend(more);
        rows(&self.done(&arguments))
    }

    /// Rows with embeddings, in a file.
    fn kept(&self) -> String {
        let out = self.text("kept.jsonl");
        self.rows(QUERY, "fashion@1", &["--embeddings", "--out", &out]);
        out
    }
}

fn copy(from: &str, to: &Path, images: usize) {
    std::fs::create_dir_all(to).unwrap();
    for file in files(from).into_iter().take(images) {
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

fn rows(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn score(value: &Value) -> f32 {
    value["score"].as_f64().unwrap_or_else(|| panic!("no score in {value}")) as f32
}

/// The folder that an image lies in.
fn folder(row: &Value) -> &str {
    text(row, "uri").rsplit('/').nth(1).unwrap()
}

#[track_caller]
fn assert_words(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

// Evaluate.

#[test]
fn an_evaluation_counts_what_classify_says() {
    let rig = Rig::new();
    // Six classes of ten are known; a file that is no image is an error.
    let images = rig.path("images");
    for class in ["bag", "coat", "dress", "trouser", "sneaker", "t-shirt"] {
        copy(&format!("{QUERY}/{class}"), &images.join(class), 10);
    }
    std::fs::write(images.join("bag/broken.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    let images = images.to_str().unwrap();
    let e = rig.json(&["classes", "evaluate", "fashion@few", images, "--top-k", "3"]);
    let rows = rig.rows(images, "fashion@few", &[]);
    let (good, bad): (Vec<&Value>, Vec<&Value>) =
        rows.iter().partition(|r| r.get("error").is_none());
    let labels = ["bag", "coat", "dress", "sandal", "shirt", "trouser"];
    let known: Vec<&&Value> = good.iter().filter(|r| labels.contains(&folder(r))).collect();
    let within = |k: usize| {
        let hit = |r: &&&&Value| {
            r["top"].as_array().unwrap().iter().take(k).any(|t| text(t, "label") == folder(r))
        };
        known.iter().filter(hit).count()
    };
    assert_eq!((bad.len(), known.len()), (1, 40));
    assert_eq!((&e["images"], &e["known"], &e["strangers"]), (&json!(60), &json!(40), &json!(20)));
    assert_eq!(e["errors"]["first"][0]["error"]["code"], "corrupt_image");
    assert_eq!((&e["top_1"]["count"], &e["top_1"]["of"]), (&json!(within(1)), &json!(40)));
    assert_eq!((&e["top_k"]["count"], &e["k"]), (&json!(within(3)), &json!(3)));
    assert!(within(1) < within(3) && within(1) > 10, "the test counts on it");
    assert_eq!(e["right"], e["top_1"]); // no threshold
    assert_eq!(e["strangers_accepted"]["count"], 20);
    assert_eq!((text(&e, "classes"), text(&e, "model")), ("fashion@few", MODEL));
    assert_eq!((text(&e, "backend"), &e["min_score"]), ("tract-cpu", &Value::Null));

    let mut cells: BTreeMap<(String, String), u64> = BTreeMap::new();
    for row in &good {
        *cells.entry((folder(row).into(), text(row, "label").into())).or_default() += 1;
    }
    let confusion = &e["confusion"];
    let found: BTreeMap<(String, String), u64> = confusion["cells"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cell| {
            let at = |key: &str| cell[key].as_u64().unwrap() as usize;
            let name =
                |list: &str, index: usize| confusion[list][index].as_str().unwrap().to_owned();
            let key = (name("rows", at("row")), name("columns", at("column")));
            (key, cell["count"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(found, cells);
    for class in e["per_class"].as_array().unwrap() {
        let label = text(class, "label");
        let given = good.iter().filter(|r| text(r, "label") == label);
        let right = given.clone().filter(|r| folder(r) == label).count();
        assert_eq!(class["precision"]["of"], given.count(), "{class}");
        assert_eq!(class["recall"]["count"], right, "{class}");
    }
    let wrong = known.len() - within(1) + 20;
    assert_eq!(e["mistakes"]["total"], wrong);

    let table = rig.done(&["classes", "evaluate", "fashion@few", images]);
    assert_words(
        &table,
        &[
            "60 images, 20 of them strangers",
            "nearest class is right",
            "strangers accepted",
            "lowest recall first",
            "most confused",
            "corrupt_image",
            &format!("… and {} more", wrong - 20),
        ],
    );
    let widest = table.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "{widest:?}:\n{table}");
}

#[test]
fn a_calibrated_version_keeps_its_rate_when_it_classifies() {
    let rig = Rig::new();
    let arguments = ["classes", "evaluate", "fashion@1", QUERY, "--calibrate", "0.1", "--save-as"];
    let e = rig.json(&[&arguments[..], &["2"]].concat());
    let calibration = &e["calibration"];
    let threshold = calibration["threshold"].as_f64().unwrap() as f32;
    assert_eq!(
        (&calibration["false_positives"]["of"], &calibration["rate"]),
        (&json!(100), &json!(0.1))
    );
    assert_eq!(e["saved"]["classes"], "fashion@2");

    // Counted again: each image's best score among the classes that are not its own.
    let plain = rig.rows(QUERY, "fashion@1", &[]);
    let impostor = |row: &Value| {
        let top = row["top"].as_array().unwrap();
        score(top.iter().find(|t| text(t, "label") != folder(row)).unwrap())
    };
    let accepted = |limit: f32| plain.iter().filter(|row| impostor(row) >= limit).count();
    assert_eq!(calibration["false_positives"]["count"], accepted(threshold));
    assert_eq!(accepted(threshold), 10);
    assert_eq!(accepted(threshold.next_down()), 11);

    // The same vectors; what classify says with them is what was promised.
    let strict = rig.rows(QUERY, "fashion@2", &[]);
    let mut right = 0;
    for (row, plain) in strict.iter().zip(&plain) {
        assert_eq!((&row["score"], &row["top"]), (&plain["score"], &plain["top"]));
        assert_eq!(row["label"].is_string(), score(row) >= threshold, "{row}");
        right += usize::from(row["label"] == folder(row));
    }
    assert_eq!(calibration["right_and_accepted"]["count"], right);
    let again = rig.json(&["classes", "evaluate", "fashion@2", QUERY]);
    assert_eq!(again["min_score"].as_f64().unwrap() as f32, threshold);
    assert_eq!(again["right"]["count"], right);

    // A version is never overwritten; that is said before anything is embedded. A place that is taken
    // otherwise is found at the end, and what was measured is shown all the same.
    let (code, message) = rig.failed(&[&arguments[..], &["2"]].concat());
    assert_eq!(code, 1);
    assert_words(&message, &["--save-as", "2.safetensors exists already"]);
    std::fs::create_dir(rig.path("root/fashion/3.safetensors")).unwrap();
    let (code, out, message) = rig.setup.run(&[&arguments[..], &["3"]].concat());
    assert_eq!(code, 1, "{message}");
    assert_words(&out, &["threshold for a rate of 0.1"]);
    assert_words(&message, &["the new version cannot be written", "3.safetensors"]);
}

#[test]
fn what_cannot_be_evaluated_says_why() {
    let rig = Rig::new();
    let file = rig.text("root/fashion/1.safetensors");
    for (arguments, code, words) in [
        (
            &["fashion@1", QUERY, "--calibrate", "0.001"][..],
            1,
            &["100 images", "at least 1000"][..],
        ),
        (&["fashion@1", QUERY, "--calibrate", "1"], 2, &["between 0 and 1"]),
        (&["fashion@1", QUERY, "--top-k", "0"], 2, &["--top-k"]),
        (&["fashion@1", QUERY, "--save-as", "2"], 2, &["--calibrate"]),
        (&[&file, QUERY, "--calibrate", "0.1", "--save-as", "2"], 2, &["not a file"]),
        (&["fashion@1", QUERY, "--calibrate", "0.1", "--save-as", "a/b"], 2, &["--save-as"]),
        (&["fashion@9", QUERY], 1, &["no version \"9\""]),
        (&["fashion", QUERY], 1, &["active.json", "fashion@VERSION"]),
        (&["no/such/file", QUERY], 2, &["no class vectors file"]),
        (&["fashion@1", QUERY, "--html", "samples"], 2, &["--html samples", "a folder"]),
        (&["fashion@1", QUERY, "--html", "no/p.html"], 2, &["no/p.html", "no folder no"]),
        (&["fashion@1", QUERY, "--html", "-"], 2, &["--html -"]),
        (&["fashion@1", "samples/photos"], 1, &["one sub-folder of images a class"]),
    ] {
        let (found, message) = rig.failed(&[&["classes", "evaluate"], arguments].concat());
        assert_eq!(found, code, "{message}");
        assert_words(&message, words);
    }
    let mut other = rig.setup.clone();
    other.set("model.path", "builtin");
    let (code, _, message) = other.run(&["classes", "evaluate", "fashion@1", QUERY]);
    assert_eq!(code, 1);
    assert_words(&message, &["was made with model tiny-nhwc@", "efficientnet-lite0@"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_class_sets_may_lie_in_s3() {
    let mut rig = Rig::on(Setup::store());
    let bucket = Bucket::new().await;
    bucket.upload("query", &files(QUERY)).await;
    let vectors = std::fs::read(rig.path("root/fashion/1.safetensors")).unwrap();
    bucket.put("sets/fashion/1.safetensors", vectors).await;
    bucket.put("sets/fashion/active.json", br#"{"version":"1"}"#.to_vec()).await;
    let local = rig.json(&["classes", "evaluate", "fashion@1", QUERY]);
    rig.setup.set("classes.root", &format!("s3://{}/sets", bucket.name));
    let prefix = format!("s3://{}/query", bucket.name);
    let e = rig.json(&[
        "classes",
        "evaluate",
        "fashion",
        &prefix,
        "--calibrate",
        "0.1",
        "--save-as",
        "2",
    ]);
    assert_eq!(e["confusion"], local["confusion"]);
    assert_eq!(
        text(&e["saved"], "place"),
        format!("s3://{}/sets/fashion/2.safetensors", bucket.name)
    );
    let c = rig.json(&["classes", "compare", "fashion@1", "fashion@2", "--images", &prefix]);
    assert_eq!(c["truth"]["right_b"], e["calibration"]["right_and_accepted"]);
    let again = ["classes", "evaluate", "fashion", &prefix, "--calibrate", "0.1", "--save-as", "2"];
    assert_words(&rig.failed(&again).1, &["s3://", "2.safetensors exists already"]);

    // Kept results know no model; their images are fetched from where they lie, if they still do.
    let file = rig.text("kept.jsonl");
    rig.rows(&prefix, "fashion@1", &["--embeddings", "--out", &file]);
    let kept = std::fs::read_to_string(&file).unwrap();
    let flips = rig.json(&["classes", "compare", "fashion@1", "fashion@2", "--results", &file]);
    let flips = flips["flips"]["first"].as_array().unwrap().clone();
    let gone = text(&flips[0], "uri").to_owned();
    std::fs::write(&file, kept.replace(&gone, &format!("{gone}.gone"))).unwrap();
    rig.setup.set("model.path", "no/such/model");
    let page = rig.text("page.html");
    let arguments = ["classes", "compare", "fashion@1", "fashion@2", "--results", &file];
    rig.done(&[&arguments[..], &["--html", &page]].concat());
    let seen = look(&std::fs::read_to_string(&page).unwrap(), 1280, false).await;
    assert_eq!(seen.faults(), [""; 0]);
    assert!(flips.len() > 1, "the test counts on it");
    assert_eq!(seen.images.len(), flips.len().min(60) - 1);
    assert_words(&seen.text, &["not_found: ", ".gone"]);
}

/// A cell of a page's table: the row whose first cell says this, and the column of this head.
#[track_caller]
fn cell<'a>(table: &'a [Vec<String>], row: &str, column: &str) -> &'a str {
    let place = table[0].iter().position(|head| head == column);
    let row = table.iter().find(|cells| cells[0] == row);
    let (Some(place), Some(row)) = (place, row) else { panic!("{row:?} {column}: {table:?}") };
    row[place].as_str()
}

/// Runs a command with `--html` and `--json`: what it printed, and its page, kept to be looked at by
/// who changes it.
fn with_page(rig: &Rig, arguments: &[&str], name: &str) -> (Value, String) {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_file(&path); // of the run before
    let more = ["--json", "--html", path.to_str().unwrap()];
    let (code, out, log) = rig.setup.run(&[arguments, &more].concat());
    assert_eq!(code, 0, "{log}");
    assert_words(&log, &[&format!("page in {}", path.display())]);
    // Pure JSON, whatever else is made.
    (serde_json::from_str(&out).unwrap(), std::fs::read_to_string(&path).unwrap())
}

/// The page in a browser, at the width of a laptop and of a phone.
async fn seen(page: &str) -> crate::support::browser::Seen {
    let (wide, narrow) = (look(page, 1280, false).await, look(page, 360, true).await);
    assert_eq!(wide.faults(), [""; 0]);
    assert_eq!(narrow.faults(), [""; 0]);
    wide
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_an_evaluation_shows_its_counts_and_the_mistakes() {
    let rig = Rig::new();
    let images = rig.path("images");
    for class in ["bag", "coat", "dress", "trouser", "sneaker", "t-shirt"] {
        copy(&format!("{QUERY}/{class}"), &images.join(class), 10);
    }
    std::fs::write(images.join("bag/broken.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    let arguments = ["classes", "evaluate", "fashion@few", images.to_str().unwrap()];
    let arguments = [&arguments[..], &["--calibrate", "0.1"]].concat();
    let (e, page) = with_page(&rig, &arguments, "evaluate.html");
    let seen = seen(&page).await;

    let mistakes = e["mistakes"]["first"].as_array().unwrap();
    assert!(mistakes.len() > 20 && mistakes.len() < 60, "the test counts on it");
    assert_eq!(seen.images, vec![28; mistakes.len()]);
    let rate = |rate: &Value| format!("{} of {}", rate["count"], rate["of"]);
    let threshold = e["calibration"]["threshold"].as_f64().unwrap();
    assert_words(
        &seen.text,
        &[
            "Evaluation",
            &format!("fashion@few on {}", images.display()),
            MODEL,
            "40 known, 20 strangers; 1 could not be read",
            &rate(&e["top_1"]),
            &rate(&e["top_k"]),
            &rate(&e["calibration"]["false_positives"]),
            &rate(&e["calibration"]["right_and_accepted"]),
            &format!("{threshold:.3}"),
            "corrupt_image",
        ],
    );
    // The matrix, cell by cell.
    let confusion = &e["confusion"];
    let matrix = &seen.tables[1];
    for c in confusion["cells"].as_array().unwrap() {
        let (row, column) = (c["row"].as_u64().unwrap(), c["column"].as_u64().unwrap());
        if row < confusion["known_rows"].as_u64().unwrap() {
            let name = confusion["rows"][row as usize].as_str().unwrap();
            let head = confusion["columns"][column as usize].as_str().unwrap_or("(unknown)");
            assert_eq!(cell(matrix, name, head), c["count"].to_string());
        }
    }
    let strangers = &seen.tables[2];
    assert_eq!((cell(strangers, "sneaker", "images"), strangers.len()), ("10", 3));
    assert_eq!(cell(strangers, "sneaker", "accepted"), "10"); // no threshold
    let of_class = |class: &str| {
        let all = e["per_class"].as_array().unwrap();
        let recall = &all.iter().find(|c| c["label"] == class).unwrap()["recall"];
        recall["share"].as_f64().unwrap()
    };
    let classes = seen.tables.iter().find(|t| t[0].contains(&"recall".to_owned())).unwrap();
    for class in ["bag", "coat", "dress", "trouser"] {
        let shown = cell(classes, class, "recall").trim_end_matches('%').parse::<f64>().unwrap();
        assert!((shown - 100.0 * of_class(class)).abs() < 0.06, "{class}: {shown}");
    }
    let picture = &seen.pictures[0];
    assert_words(picture, &["Histogram of cosine", &format!("calibrated {threshold:.3}")]);
    for mistake in mistakes {
        let name = text(mistake, "uri").rsplit('/').next().unwrap();
        assert_words(&seen.text, &[name, &format!("{:.3}", score(mistake))]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_a_comparison_shows_what_changes() {
    let rig = Rig::new();
    let arguments = ["classes", "compare", "fashion@1", "fashion@few", "--images", QUERY];
    let (c, page) = with_page(&rig, &arguments, "compare.html");
    let seen = seen(&page).await;
    let flips = c["flips"]["first"].as_array().unwrap();
    assert!(flips.len() > 20, "the test counts on it");
    assert_eq!(seen.images, vec![28; flips.len().min(60)]);
    let rate = |rate: &Value| format!("{} of {}", rate["count"], rate["of"]);
    let shift = c["margin_shift"]["mean"].as_f64().unwrap();
    assert_words(
        &seen.text,
        &[
            "A fashion@1 → B fashion@few",
            &rate(&c["agreement"]),
            &rate(&c["truth"]["right_a"]),
            &rate(&c["truth"]["right_b"]),
            &format!("fixed by B\n{}\n", c["truth"]["fixed"]),
            &format!("broken by B\n{}\n", c["truth"]["broken"]),
            &format!("{shift:+.3}"),
            "Labels only in A",
            "ankle-boot, pullover, sneaker, t-shirt",
        ],
    );
    assert!(!seen.text.contains("Labels only in B"), "{}", seen.text);
    let transitions = &seen.tables[0];
    let expected = c["transitions"]["first"].as_array().unwrap();
    assert_eq!(transitions.len() - 1, expected.len().min(30));
    for (row, t) in transitions[1..].iter().zip(expected) {
        assert_eq!((row[0].as_str(), row[1].as_str()), (text(t, "from"), text(t, "to")));
        assert_eq!(row[2], t["count"].to_string());
    }
    assert_words(&seen.pictures[0], &["Histogram of margin"]);
    for flip in flips.iter().take(60) {
        let name = text(flip, "uri").rsplit('/').next().unwrap();
        let scores = format!("{:.3} → {:.3}", score(&flip["a"]), score(&flip["b"]));
        assert_words(&seen.text, &[name, &scores]);
    }

    // The same version: nothing to show but the margins.
    let arguments = ["classes", "compare", "fashion@1", "fashion@1", "--images", QUERY];
    let (_, page) = with_page(&rig, &arguments, "compare-same.html");
    let seen = look(&page, 1280, false).await;
    assert_eq!((seen.faults(), seen.images.len()), (Vec::<String>::new(), 0));
    assert_words(&seen.text, &["There are none.", "+0.000"]);

    let bad = [&arguments[..], &["--html", "samples"]].concat();
    assert_words(&rig.failed(&bad).1, &["--html samples: it is a folder"]);
}

// Compare.

#[test]
fn a_comparison_lists_what_changes_and_is_the_same_from_images_and_from_results() {
    let rig = Rig::new();
    let kept = rig.kept();
    let c = rig.json(&["classes", "compare", "fashion@1", "fashion@few", "--images", QUERY]);
    let mut from_results =
        rig.json(&["classes", "compare", "fashion@1", "fashion@few", "--results", &kept]);
    assert_eq!(text(&from_results, "source"), kept);
    from_results["source"] = json!(QUERY);
    assert_eq!(c, from_results);

    let (a, b) = (rig.rows(QUERY, "fashion@1", &[]), rig.rows(QUERY, "fashion@few", &[]));
    let mut flips: BTreeMap<&str, &str> = BTreeMap::new();
    for (a, b) in a.iter().zip(&b).filter(|(a, b)| a["label"] != b["label"]) {
        let effect = match (text(a, "label") == folder(a), text(b, "label") == folder(b)) {
            (false, true) => "fixed",
            (true, false) => "broken",
            _ => "neutral",
        };
        flips.insert(text(a, "uri"), effect);
    }
    let listed = c["flips"]["first"].as_array().unwrap();
    let found: BTreeMap<&str, &str> =
        listed.iter().map(|flip| (text(flip, "uri"), text(flip, "effect"))).collect();
    assert_eq!(found, flips);
    assert_eq!(c["flips"]["total"], flips.len());
    let count = |effect: &str| flips.values().filter(|e| **e == effect).count();
    assert!(count("fixed") > 0 && count("broken") > 0, "the test counts on it: {flips:?}");
    assert_eq!(c["truth"]["fixed"], count("fixed"));
    assert_eq!(c["truth"]["broken"], count("broken"));
    assert_eq!((&c["agreement"]["count"], &c["images"]), (&json!(100 - flips.len()), &json!(100)));
    assert_eq!(c["only_in_a"], json!(["ankle-boot", "pullover", "sneaker", "t-shirt"]));
    assert_eq!(c["only_in_b"], json!([]));
    let moved: u64 = c["transitions"]["first"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["count"].as_u64().unwrap())
        .sum();
    assert_eq!(moved as usize, flips.len());
    let mean = a.iter().zip(&b).map(|(a, b)| f64::from(score(b) - score(a))).sum::<f64>() / 100.0;
    assert!((c["score_shift"]["mean"].as_f64().unwrap() - mean).abs() < 1e-5, "{mean}");

    let table = rig.done(&["classes", "compare", "fashion@1", "fashion@few", "--results", &kept]);
    assert_words(&table, &["labels only in A: ankle-boot", "same label", "B fixes ", "broken"]);
    let widest = table.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "{widest:?}:\n{table}");

    let same = rig.json(&["classes", "compare", "fashion@1", "fashion@1", "--results", &kept]);
    assert_eq!((&same["agreement"]["count"], &same["flips"]["total"]), (&json!(100), &json!(0)));
    assert_eq!(same["margin_shift"]["p95"], 0.0);
}

#[test]
fn results_that_cannot_be_compared_are_refused() {
    let rig = Rig::new();
    let file = rig.text("results.jsonl");
    let compare = ["classes", "compare", "fashion@1", "fashion@few"];
    let with = |lines: &str| {
        std::fs::write(&file, lines).unwrap();
        rig.failed(&[&compare[..], &["--results", &file]].concat()).1
    };
    let kept = std::fs::read_to_string(rig.kept()).unwrap();
    let bare = rig.done(&["classify", QUERY, "--classes", "fashion@1"]);
    assert_words(
        &with(&bare),
        &["results.jsonl line 1", "no embedding", "--embeddings --out FILE"],
    );
    assert_words(&with(&kept.replace(MODEL, "other@1")), &["line 1", "model other@1", MODEL]);
    assert_words(&with(""), &["holds no image"]);
    let (code, message) = rig.failed(&compare);
    assert_eq!(code, 2);
    assert_words(&message, &["--images", "--results"]);
    let both = [&compare[..], &["--results", &file, "--images", QUERY]].concat();
    assert_eq!(rig.failed(&both).0, 2);
}

// Rescore.

#[test]
fn rescored_rows_are_those_that_classify_would_write() {
    let mut rig = Rig::new();
    let kept = rig.kept();
    let classified = rig.rows(QUERY, "fashion@few", &["--min-score", "0.7"]);
    // Neither a model nor a back end is looked at.
    rig.setup.set("model.path", "no/such/model");
    let out = rig.text("again.jsonl");
    let arguments = ["classes", "rescore", "--embeddings", &kept, "--classes", "fashion@few"];
    let more = ["--top-k", "10", "--min-score", "0.7", "--out", &out];
    let (code, nothing, log) = rig.setup.run(&[&arguments[..], &more].concat());
    assert_eq!((code, nothing.as_str()), (0, ""), "{log}");
    assert_words(&log, &["100 images in ", "fashion@few, 6 labels", "unknown", "results in "]);
    let rescored = rows(&std::fs::read_to_string(&out).unwrap());
    assert_eq!(rescored.len(), 100);
    for (found, wanted) in rescored.iter().zip(&classified) {
        for key in ["uri", "label", "classes", "model", "backend"] {
            assert_eq!(found[key], wanted[key], "{found}\n{wanted}");
        }
        assert_eq!(found["top"].as_array().unwrap().len(), 6);
        for (f, w) in found["top"].as_array().unwrap().iter().zip(wanted["top"].as_array().unwrap())
        {
            assert!((score(f) - score(w)).abs() < 1e-6, "{found}\n{wanted}");
        }
    }
    let piped = rig.done(&[&arguments[..], &more[..4]].concat());
    assert_eq!(rows(&piped), rescored);
}

#[test]
fn errors_and_whole_results_of_jobs_are_carried_over() {
    let rig = Rig::new();
    let kept = rows(&std::fs::read_to_string(rig.kept()).unwrap());
    let error =
        json!({"uri": "s3://b/gone", "error": {"code": "not_found", "message": "no such key"}});
    let mut image = kept[7].clone();
    image["id"] = json!("sku-7");
    let job = json!({"id": "j", "status": "done", "classes": "x@1", "model": MODEL,
        "backend": "onnxruntime-cuda", "images": [image, error]});
    let failed = json!({"id": "k", "status": "failed",
        "error": {"code": "malformed_job", "message": "x"}});
    let file = rig.text("run.jsonl");
    std::fs::write(&file, format!("{job}\n{failed}\n{}\n", kept[0])).unwrap();
    let arguments = ["classes", "rescore", "--embeddings", &file, "--classes", "fashion@1"];
    let (code, out, log) = rig.setup.run(&arguments);
    assert_eq!(code, 0, "{log}");
    assert_words(&log, &["errors   1 (not_found 1)", "1 failed jobs"]);
    let found = rows(&out);
    assert_eq!(found.len(), 3);
    assert_eq!(
        (&found[0]["id"], &found[0]["backend"]),
        (&json!("sku-7"), &json!("onnxruntime-cuda"))
    );
    assert_eq!((&found[0]["label"], &found[2]["label"]), (&kept[7]["label"], &kept[0]["label"]));
    assert_eq!(found[1]["error"], error["error"]);
    assert_eq!((text(&found[1], "uri"), found[1].get("label")), ("s3://b/gone", None));
}

#[test]
fn a_matrix_is_rescored_row_by_row_under_its_ids() {
    let rig = Rig::new();
    let kept = rows(&std::fs::read_to_string(rig.kept()).unwrap());
    // Longer than one batch, and not of unit length.
    let repeated: Vec<&Value> = kept.iter().cycle().take(700).collect();
    let values: Vec<f64> = repeated
        .iter()
        .flat_map(|row| angler_wire::job::decode_embedding(text(row, "embedding")).unwrap())
        .map(|x| f64::from(x) * 3.0)
        .collect();
    let matrix = Array2::from_shape_vec((700, DIM), values).unwrap();
    let (npy, ids) = (rig.text("e.npy"), rig.text("ids.txt"));
    matrix.write_npy(std::fs::File::create(&npy).unwrap()).unwrap();
    let names: String = repeated.iter().enumerate().map(|(i, _)| format!("img-{i}\n")).collect();
    std::fs::write(&ids, &names).unwrap();
    let arguments = ["classes", "rescore", "--embeddings", &npy, "--classes", "fashion@1"];
    let with_ids = [&arguments[..], &["--ids", &ids]].concat();
    let (code, out, log) = rig.setup.run(&with_ids);
    assert_eq!(code, 0, "{log}");
    assert_words(&log, &["700 embeddings do not say which model made them", MODEL]);
    let found = rows(&out);
    assert_eq!(found.len(), 700);
    for (index, (row, wanted)) in found.iter().zip(&repeated).enumerate() {
        assert_eq!(
            (text(row, "uri"), &row["label"]),
            (format!("img-{index}").as_str(), &wanted["label"])
        );
        assert!((score(row) - score(wanted)).abs() < 1e-5, "{row}\n{wanted}");
        assert_eq!((text(row, "model"), text(row, "backend")), (MODEL, "unknown"));
    }
    assert_eq!(text(&rows(&rig.done(&arguments))[699], "uri"), "699");

    // Ids that do not fit leave no file.
    let result = rig.text("out.jsonl");
    for (names, words) in [
        (names.lines().take(699).collect::<Vec<_>>().join("\n"), "row 699 has no id"),
        (format!("{names}one more\n"), "more than the 700 rows"),
    ] {
        std::fs::write(&ids, names).unwrap();
        let (_, message) = rig.failed(&[&with_ids[..], &["--out", &result]].concat());
        assert_words(&message, &[words]);
        assert!(!Path::new(&result).exists());
    }
    let narrow = matrix.slice(ndarray::s![.., ..7]).to_owned();
    narrow.write_npy(std::fs::File::create(&npy).unwrap()).unwrap();
    assert_words(&rig.failed(&arguments).1, &["have 7 values", "have 24"]);
    let (code, message) = rig.failed(&[
        "classes",
        "rescore",
        "--embeddings",
        "x.jsonl",
        "--ids",
        "y",
        "--classes",
        "fashion@1",
    ]);
    assert_eq!(code, 2);
    assert_words(&message, &["--ids goes with a .npy file"]);
}
