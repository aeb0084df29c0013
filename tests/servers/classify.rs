//! `angler classify` and `angler classes` as a user runs them: the binary, its exit code, what it
//! prints and what it writes. Where labels do not matter, a tiny model keeps it fast.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::support::{Bucket, DEADLINE, Setup, files, repository, var};
use base64::Engine;
use serde_json::Value;

const QUERY: &str = "samples/fashion/query";
const REFERENCE: &str = "samples/fashion/reference";
const PHOTOS: &str = "samples/photos";
/// Fingerprint and length of the model in [`tiny`].
const TINY: (&str, usize) = ("tiny-nhwc@b9f0436ae619", 24);

/// The tiny model on tract, whatever the machine has; warnings only.
fn tiny() -> Setup {
    tiny_on(Setup::default())
}

/// The same with the test store's address and keys.
fn tiny_with_store() -> Setup {
    tiny_on(Setup::store())
}

fn tiny_on(mut setup: Setup) -> Setup {
    setup.set("model.path", "tests/data/models/tiny-nhwc");
    setup.set("embedder.backend", "tract");
    setup.set("log.level", "warn");
    setup
}

/// Runs what must succeed: standard output, standard error.
fn done(setup: &Setup, arguments: &[&str]) -> (String, String) {
    let (code, out, log) = setup.run(arguments);
    assert_eq!(code, 0, "{arguments:?}:\n{log}");
    (out, log)
}

/// Runs what must fail: exit code, the message. Nothing is on standard output.
fn failed(setup: &Setup, arguments: &[&str]) -> (i32, String) {
    let (code, out, message) = setup.run(arguments);
    assert_ne!(code, 0, "{arguments:?} was done:\n{out}\n{message}");
    assert_eq!(out, "", "{arguments:?}");
    assert!(message.contains("error: ") && !message.contains("panicked"), "{message}");
    (code, message)
}

#[track_caller]
fn assert_words(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

fn rows(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_else(|| panic!("no {key} in {row}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn keys(row: &Value) -> BTreeSet<&str> {
    row.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Files below a folder of the repository, as the rows name them.
fn names(folder: &str) -> Vec<String> {
    let name = |f: PathBuf| f.strip_prefix(repository("")).unwrap().to_str().unwrap().to_owned();
    files(folder).into_iter().map(name).collect()
}

/// A class vectors file, read without angler and without a library.
struct VectorsFile {
    metadata: BTreeMap<String, String>,
    labels: Vec<String>,
    rows: Vec<Vec<f32>>,
}

impl VectorsFile {
    fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read(path).unwrap())
    }

    fn parse(bytes: &[u8]) -> Self {
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&rest[..length]).unwrap();
        let metadata: BTreeMap<String, String> =
            serde_json::from_value(header["__metadata__"].clone()).unwrap();
        let tensor = &header["vectors"];
        assert_eq!(tensor["dtype"], "F32");
        let (from, to) = (number(&tensor["data_offsets"][0]), number(&tensor["data_offsets"][1]));
        let data = &rest[length..][from as usize..to as usize];
        let values: Vec<f32> =
            data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let dim = number(&tensor["shape"][1]) as usize;
        let rows: Vec<Vec<f32>> = values.chunks(dim).map(<[f32]>::to_vec).collect();
        assert_eq!(rows.len(), number(&tensor["shape"][0]) as usize);
        let labels: Vec<String> = serde_json::from_str(&metadata["labels"]).unwrap();
        assert_eq!(labels.len(), rows.len());
        Self { metadata, labels, rows }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let product =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let (ab, aa, bb): (f64, f64, f64) = (product(a, b), product(a, a), product(b, b));
    ab / (aa * bb).sqrt()
}

/// A folder of reference images: some of the samples' classes, `images` of each.
fn reference(folder: &Path, classes: &[&str], images: usize) {
    for class in classes {
        let to = folder.join(class);
        std::fs::create_dir_all(&to).unwrap();
        for file in files(&format!("{REFERENCE}/{class}")).into_iter().take(images) {
            std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
}

/// Builds `set@version` of the tiny model under `root`; yields the file.
fn built(setup: &Setup, source: &str, root: &Path, set: &str, version: &str) -> PathBuf {
    let mut setup = setup.clone();
    setup.set("classes.root", root.to_str().unwrap());
    done(&setup, &["classes", "build", source, "--set", set, "--version", version]);
    root.join(set).join(format!("{version}.safetensors"))
}

// Classify.

#[test]
fn the_fashion_samples_are_classified_by_either_back_end() {
    let expected = names(QUERY);
    assert_eq!(expected.len(), 100);
    let mut setup = Setup::default();
    setup.set("embedder.onnxruntime_library", &var("ANGLER_TEST_ONNXRUNTIME"));
    let all = [("tract", "tract-cpu"), ("onnxruntime", "onnxruntime-cpu")].map(|(name, backend)| {
        let arguments = ["classify", QUERY, "--classes", REFERENCE, "--backend", name];
        let (out, log) = done(&setup, &arguments);
        let rows = rows(&out);
        let uris: Vec<&str> = rows.iter().map(|row| text(row, "uri")).collect();
        assert_eq!(uris, expected);
        let mut right = 0;
        for row in &rows {
            let wanted = ["backend", "classes", "label", "margin", "model", "score", "top", "uri"];
            assert_eq!(keys(row), wanted.into());
            assert_eq!(text(row, "backend"), backend);
            assert!(text(row, "model").starts_with("efficientnet-lite0@"), "{row}");
            assert!(text(row, "classes").starts_with("reference@"), "{row}");
            let top = row["top"].as_array().unwrap();
            assert_eq!((top.len(), &top[0]["label"], &top[0]["score"]), (1, &row["label"], &row["score"]));
            assert!((0.0..=1.0).contains(&number(&row["score"])), "{row}");
            let folder = Path::new(text(row, "uri")).parent().unwrap().file_name().unwrap();
            right += usize::from(folder == text(row, "label"));
        }
        assert!(right >= 74, "{right} of 100 by {backend}");
        assert_words(
            &log,
            &[
                &format!("{right} of 100 images in folders named like a class have that class ({right}.0%)"),
                "100 images in ",
                ", 10 labels\n",
                &format!("back end {backend}\n"),
            ],
        );
        rows
    });
    for (a, b) in all[0].iter().zip(&all[1]) {
        assert_eq!(a["label"], b["label"], "{a}");
        assert!((number(&a["score"]) - number(&b["score"])).abs() < 1e-4, "{a}\n{b}");
    }
}

#[test]
fn onnx_runtime_leaves_nothing_in_the_users_folders() {
    let home = tempfile::tempdir().unwrap();
    let mut setup = tiny();
    setup.env.insert("HOME".into(), home.path().to_str().unwrap().into());
    setup.set("embedder.backend", "onnxruntime");
    setup.set("embedder.onnxruntime_library", &var("ANGLER_TEST_ONNXRUNTIME"));
    let (out, _) = done(&setup, &["classify", QUERY, "--classes", REFERENCE]);
    assert!(out.contains("onnxruntime-cpu"), "{out}");
    // Its telemetry keeps a database of events in `.cache`.
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_file_appears_when_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("results.jsonl");
    let path = out.to_str().unwrap();
    std::fs::write(&out, "of the last run").unwrap();
    let (piped, _) = done(&tiny(), &["classify", PHOTOS, "--classes", REFERENCE]);
    let (nothing, log) =
        done(&tiny(), &["classify", PHOTOS, "--classes", REFERENCE, "--out", path]);
    assert_eq!(nothing, "");
    assert_words(&log, &[&format!("results in {path}\n"), "8 images in "]);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), piped);
    assert_eq!(rows(&piped).len(), 8);
    let left: Vec<_> = folder.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["results.jsonl"]);
}

#[test]
fn an_interrupted_run_leaves_no_file_and_keeps_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = built(&tiny(), REFERENCE, folder.path(), "fashion", "1");
    // Some seconds of decoding.
    let photos = vec!["samples/photos/astronaut.png"; 1000];
    let mut setup = tiny();
    setup.set("limits.images_in_flight", "16");
    for (signal, old) in [("INT", None), ("TERM", Some("of the last run"))] {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("results.jsonl");
        if let Some(old) = old {
            std::fs::write(&out, old).unwrap();
        }
        let mut arguments = vec!["classify"];
        arguments.extend(&photos);
        arguments.extend(["--classes", vectors.to_str().unwrap()]);
        arguments.extend(["--out", out.to_str().unwrap()]);
        let child = setup.command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let part = place.path().join(".results.jsonl.part");
        let started = Instant::now();
        // Rows are on their way: signals are caught by now.
        while part.metadata().map_or(0, |m| m.len()) == 0 {
            assert!(started.elapsed() < DEADLINE, "no row was written");
            std::thread::yield_now();
        }
        let process = child.id().to_string();
        let kill = Command::new("kill").args([&format!("-{signal}"), &process]).status();
        assert!(kill.unwrap().success());
        let ended = child.wait_with_output().unwrap();
        let log = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "SIG{signal}: {log}");
        assert_words(&log, &["error: interrupted"]);
        assert_eq!(std::fs::read_to_string(&out).ok().as_deref(), old, "SIG{signal}");
        assert!(!part.exists(), "SIG{signal} leaves {}", part.display());
    }
}

#[test]
fn scores_are_the_cosines_with_the_vectors_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = built(&tiny(), REFERENCE, folder.path(), "fashion", "1");
    let (vectors, path) = (VectorsFile::read(&path), path.to_str().unwrap());
    assert_eq!(vectors.metadata["format"], "angler.class-vectors/1");
    assert_eq!(vectors.metadata["model"], TINY.0);
    assert_words(&vectors.metadata["source"], &[REFERENCE]);
    humantime::parse_rfc3339(&vectors.metadata["created_at"]).unwrap();

    let embeddings = |folder: &str| {
        let arguments = ["classify", folder, "--classes", path, "--top-k", "3", "--embeddings"];
        let (out, _) = done(&tiny(), &arguments);
        rows(&out)
            .into_iter()
            .map(|row| {
                let base64 = base64::engine::general_purpose::STANDARD;
                let bytes = base64.decode(text(&row, "embedding")).unwrap();
                let (values, rest) = bytes.as_chunks::<4>();
                assert_eq!((values.len(), rest.len()), (TINY.1, 0));
                let embedding: Vec<f32> = values.iter().map(|v| f32::from_le_bytes(*v)).collect();
                let norm: f64 = embedding.iter().map(|x| f64::from(*x).powi(2)).sum();
                assert!((norm.sqrt() - 1.0).abs() < 1e-5, "{norm}");
                (row, embedding)
            })
            .collect::<Vec<_>>()
    };
    let mut labels = BTreeSet::new();
    for (row, embedding) in embeddings(QUERY) {
        let mut wanted: Vec<(f64, &str)> = vectors
            .rows
            .iter()
            .zip(&vectors.labels)
            .map(|(vector, label)| (cosine(&embedding, vector), label.as_str()))
            .collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0));
        let top = row["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        for (found, (score, _)) in top.iter().zip(&wanted) {
            assert!((number(&found["score"]) - score).abs() < 1e-4, "{wanted:?}\n{row}");
        }
        // The order is plain wherever it does not hang on rounding.
        if wanted[..4].windows(2).all(|pair| pair[0].0 - pair[1].0 > 1e-4) {
            let found: Vec<&str> = top.iter().map(|t| text(t, "label")).collect();
            assert_eq!(found, [wanted[0].1, wanted[1].1, wanted[2].1]);
        }
        assert_eq!((&row["label"], &row["score"]), (&top[0]["label"], &top[0]["score"]));
        labels.insert(text(&row, "label").to_owned());
    }
    assert!(labels.len() > 3, "{labels:?}");

    // A class is the mean of its images' unit embeddings.
    let mut means: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (row, embedding) in embeddings(REFERENCE) {
        let class = Path::new(text(&row, "uri")).parent().unwrap().file_name().unwrap();
        let mean = means.entry(class.to_str().unwrap().to_owned()).or_insert(vec![0.0; TINY.1]);
        mean.iter_mut().zip(embedding).for_each(|(mean, x)| *mean += x);
    }
    assert_eq!(means.keys().collect::<Vec<_>>(), vectors.labels.iter().collect::<Vec<_>>());
    for (mean, row) in means.values().zip(&vectors.rows) {
        assert!(cosine(mean, row) > 0.999_999, "{}", cosine(mean, row));
    }
}

#[test]
fn below_the_threshold_an_image_is_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let path = built(&tiny(), REFERENCE, folder.path(), "fashion", "1");
    let (plain, _) = done(&tiny(), &["classify", PHOTOS, "--classes", path.to_str().unwrap()]);
    let strict = |classes: &str, more: &[&str]| {
        let mut setup = tiny();
        setup.set("classes.root", folder.path().to_str().unwrap());
        let mut arguments = vec!["classify", PHOTOS, "--classes", classes, "--top-k", "2"];
        arguments.extend(more);
        let (out, log) = done(&setup, &arguments);
        (rows(&out), log)
    };
    let assert_unknown = |(rows, log): (Vec<Value>, String)| {
        assert_eq!(rows.len(), 8);
        for (row, plain) in rows.iter().zip(self::rows(&plain)) {
            assert_eq!(row["label"], Value::Null);
            assert!(row.as_object().unwrap().contains_key("label"));
            assert_eq!(row["top"].as_array().unwrap().len(), 2);
            // What it would have been stays visible.
            assert_eq!((&row["score"], &row["top"][0]), (&plain["score"], &plain["top"][0]));
        }
        assert_words(&log, &["  unknown  8\n"]);
        assert!(!log.contains("labels  "), "{log}");
    };
    let known = |(rows, log): (Vec<Value>, String)| {
        assert!(rows.iter().all(|row| row["label"].is_string()), "{rows:?}");
        assert!(!log.contains("unknown"), "{log}");
    };
    let file = path.to_str().unwrap();
    assert_unknown(strict(file, &["--min-score", "0.99"]));
    known(strict(file, &["--min-score", "-1"]));

    // A set's own threshold holds unless the flag says otherwise.
    let vectors = VectorsFile::read(&path);
    let (npy, labels) = (folder.path().join("v.npy"), folder.path().join("l.json"));
    let values: Vec<u8> = vectors.rows.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(&npy, self::npy("<f4", &[10, TINY.1], false, &values)).unwrap();
    std::fs::write(&labels, serde_json::to_string(&vectors.labels).unwrap()).unwrap();
    let mut setup = tiny();
    setup.set("classes.root", folder.path().to_str().unwrap());
    let (npy, labels) = (npy.to_str().unwrap(), labels.to_str().unwrap());
    let import = ["classes", "import", "--vectors", npy, "--labels", labels, "--set", "strict"];
    done(&setup, &[&import[..], &["--version", "1", "--min-score", "0.99"]].concat());
    assert_unknown(strict("strict@1", &[]));
    known(strict("strict@1", &["--min-score", "-1"]));
}

/// Rows of [`PHOTOS`] for classes, which must come from the version that is named.
fn photos_by(setup: &Setup, classes: &str, version: &str) -> Vec<(Value, Value)> {
    let (out, log) = done(setup, &["classify", PHOTOS, "--classes", classes]);
    assert_words(&log, &[&format!("classes  {version}, ")]);
    let rows = rows(&out);
    assert_eq!(rows.len(), 8);
    assert!(rows.iter().all(|row| row["classes"] == version), "{rows:?}");
    rows.into_iter().map(|row| (row["label"].clone(), row["score"].clone())).collect()
}

#[tokio::test]
async fn classes_come_from_a_file_a_pinned_version_or_the_active_one() {
    let (folder, bucket) = (tempfile::tempdir().unwrap(), Bucket::new().await);
    let root = folder.path().join("root");
    let two = folder.path().join("two");
    reference(&two, &["bag", "sandal"], 3);
    let files = [
        built(&tiny(), REFERENCE, &root, "fashion", "1"),
        built(&tiny(), two.to_str().unwrap(), &root, "fashion", "2026-11.b_2"),
    ];
    for (file, version) in files.iter().zip(["1", "2026-11.b_2"]) {
        let key = format!("class sets/fashion/{version}.safetensors");
        bucket.put(&key, std::fs::read(file).unwrap()).await;
    }
    let mut local = tiny();
    local.set("classes.root", root.to_str().unwrap());
    let mut s3 = tiny_with_store();
    s3.set("classes.root", &format!("s3://{}/class sets", bucket.name));
    let activate = async |text: &str| {
        std::fs::write(root.join("fashion/active.json"), text).unwrap();
        bucket.put("class sets/fashion/active.json", text).await;
    };

    let first = photos_by(&tiny(), files[0].to_str().unwrap(), "fashion@1");
    let second = photos_by(&tiny(), files[1].to_str().unwrap(), "fashion@2026-11.b_2");
    assert_ne!(first, second);
    let of_two = |(label, _): &(Value, Value)| label == "bag" || label == "sandal";
    assert!(second.iter().all(of_two), "{second:?}");
    for setup in [&local, &s3] {
        assert_eq!(photos_by(setup, "fashion@1", "fashion@1"), first);
        assert_eq!(photos_by(setup, "fashion@2026-11.b_2", "fashion@2026-11.b_2"), second);
        let (code, message) = failed(setup, &["classify", PHOTOS, "--classes", "fashion"]);
        assert_eq!(code, 1);
        assert_words(&message, &["\"fashion\" is unknown", "fashion/active.json does not exist"]);
    }

    activate(r#"{"version": "2026-11.b_2", "previous": "1", "activated_at": "x", "new": [1]}"#)
        .await;
    for setup in [&local, &s3] {
        assert_eq!(photos_by(setup, "fashion", "fashion@2026-11.b_2"), second);
    }
    let sha256 = {
        use sha2::Digest;
        let digest = sha2::Sha256::digest(std::fs::read(&files[0]).unwrap());
        digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    activate(&format!(r#"{{"version": "1", "sha256": "{sha256}"}}"#)).await;
    for setup in [&local, &s3] {
        assert_eq!(photos_by(setup, "fashion", "fashion@1"), first);
    }
    // What is not what was activated is not used.
    activate(&format!(r#"{{"version": "2026-11.b_2", "sha256": "{sha256}"}}"#)).await;
    for setup in [&local, &s3] {
        let (code, message) = failed(setup, &["classify", PHOTOS, "--classes", "fashion"]);
        assert_eq!(code, 1);
        assert_words(&message, &["2026-11.b_2.safetensors", "sha256", &sha256]);
    }
    for (active, words) in [
        (r#"{"version": "3"}"#, ["no version \"3\"", "3.safetensors does not exist"]),
        (r#"{"version": "../1"}"#, ["active.json", "not a name"]),
        ("{}", ["active.json", "version"]),
    ] {
        activate(active).await;
        for setup in [&local, &s3] {
            let (code, message) = failed(setup, &["classify", PHOTOS, "--classes", "fashion"]);
            assert_eq!(code, 1, "{active}");
            assert_words(&message, &words);
        }
    }
}

#[tokio::test]
async fn images_in_s3_and_in_folders_give_the_same() {
    let (folder, bucket) = (tempfile::tempdir().unwrap(), Bucket::new().await);
    let local = folder.path().join("reference");
    reference(&local, &["bag", "sandal", "trouser"], 3);
    for file in walkdir::WalkDir::new(&local).into_iter().map(Result::unwrap) {
        if file.file_type().is_file() {
            let key = file.path().strip_prefix(folder.path()).unwrap().to_str().unwrap();
            bucket.put(key, std::fs::read(file.path()).unwrap()).await;
        }
    }
    for (name, file) in names(PHOTOS).iter().zip(files(PHOTOS)) {
        bucket.put(name, std::fs::read(file).unwrap()).await;
    }
    bucket.put("samples/photos/README.md", "not an image").await;
    bucket
        .put(
            "a key with ümlaut & spaces+100%.png",
            std::fs::read(files(PHOTOS)[0].clone()).unwrap(),
        )
        .await;
    let (setup, base) = (tiny_with_store(), format!("s3://{}", bucket.name));
    let run = |paths: &[&str], classes: &str| {
        let (out, _) = done(&setup, &[&["classify"], paths, &["--classes", classes]].concat());
        rows(&out)
    };
    let verdicts = |rows: &[Value]| -> Vec<(Value, Value, Value)> {
        let row = |r: &Value| (r["label"].clone(), r["score"].clone(), r["classes"].clone());
        rows.iter().map(row).collect()
    };
    let local = local.to_str().unwrap();
    let plain = run(&[PHOTOS], local);
    assert_eq!(plain.len(), 8);
    let remote = run(&[&format!("{base}/samples/photos/")], &format!("{base}/reference"));
    assert_eq!(verdicts(&remote), verdicts(&plain));
    let uris: Vec<&str> = remote.iter().map(|row| text(row, "uri")).collect();
    let wanted: Vec<String> = names(PHOTOS).iter().map(|n| format!("{base}/{n}")).collect();
    assert_eq!(uris, wanted);
    // Named one by one, beside files, in the order of the command line, ending or no ending.
    let odd = format!("{base}/a key with ümlaut & spaces+100%.png");
    let exact = format!("{base}/samples/photos/brick.png");
    let text_file = format!("{base}/samples/photos/README.md");
    let mixed = run(&[&exact, "samples/photos/rocket.jpg", &odd, &text_file], local);
    assert_eq!(verdicts(&mixed)[..3], [1, 7, 0].map(|at| verdicts(&plain)[at].clone()));
    assert_eq!(mixed[3]["error"]["code"], "unsupported_format");

    let (code, message) =
        failed(&setup, &["classify", &format!("{base}/nothing/"), "--classes", local]);
    assert_eq!(code, 1);
    assert_words(&message, &["/nothing/ holds no image"]);
    let (code, message) =
        failed(&setup, &["classify", "s3://no-such-bucket-x/a", "--classes", local]);
    assert_eq!(code, 1);
    assert_words(&message, &["no-such-bucket-x"]);
    let (code, message) =
        failed(&setup, &["classify", PHOTOS, "--classes", &format!("{base}/nothing")]);
    assert_eq!(code, 1);
    assert_words(&message, &["/nothing holds no classes"]);
    // A bucket that is not allowed is an error of each image, as it is in a job.
    let mut setup = tiny_with_store();
    setup.set("s3.allowed_buckets", "other");
    let (out, log) = done(&setup, &["classify", &exact, "--classes", local]);
    assert_eq!(rows(&out)[0]["error"]["code"], "bucket_not_allowed");
    assert_words(&log, &["errors   1 (bucket_not_allowed 1)"]);
}

#[test]
fn an_image_that_cannot_be_read_is_a_row_and_hurts_no_other() {
    #[derive(serde::Deserialize)]
    struct Bad {
        file: String,
        codes: Vec<String>,
    }
    let bad = std::fs::read(repository("tests/data/images/bad.json")).unwrap();
    let bad: Vec<Bad> = serde_json::from_slice(&bad).unwrap();
    let bad: BTreeMap<String, Vec<String>> =
        bad.into_iter().map(|b| (format!("tests/data/images/{}", b.file), b.codes)).collect();
    let good = names(PHOTOS);
    // Good and bad ones in turn, each file named: in a folder an SVG would be passed over.
    let mut paths: Vec<&str> = Vec::new();
    let (mut goods, mut bads) = (good.iter(), bad.keys());
    loop {
        let (one, other) = (goods.next(), bads.next());
        paths.extend(one.iter().chain(&other).map(|path| path.as_str()));
        if one.is_none() && other.is_none() {
            break;
        }
    }
    let (out, log) =
        done(&tiny(), &[&["classify"], &paths[..], &["--classes", REFERENCE]].concat());
    let (alone, _) = done(&tiny(), &["classify", PHOTOS, "--classes", REFERENCE]);
    let rows = rows(&out);
    assert_eq!(rows.iter().map(|row| text(row, "uri")).collect::<Vec<_>>(), paths);
    let (failed, labelled): (Vec<&Value>, Vec<&Value>) =
        rows.iter().partition(|row| row.get("error").is_some());
    assert_eq!(labelled, self::rows(&alone).iter().collect::<Vec<_>>());
    assert_eq!(failed.len(), bad.len());
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for row in failed {
        assert_eq!(keys(row), ["backend", "classes", "error", "model", "uri"].into());
        let code = text(&row["error"], "code");
        assert!(bad[text(row, "uri")].iter().any(|c| c == code), "{row}");
        assert!(text(&row["error"], "message").len() > 10, "{row}");
        *counts.entry(code).or_default() += 1;
    }
    assert_words(&log, &[&format!("  errors   {} (", bad.len()), "21 images in "]);
    for (code, count) in counts {
        assert_words(&log, &[&format!("{code} {count}")]);
    }
}

#[test]
fn images_that_cannot_be_read_now_cost_no_row_behind_them() {
    let folder = tempfile::tempdir().unwrap();
    let photo = files(PHOTOS)[0].clone();
    // One alone, and a whole job of them between two others.
    let unavailable = |number: usize| number == 3 || (32..64).contains(&number);
    for number in 0..70 {
        let path = folder.path().join(format!("{number:02}.png"));
        match unavailable(number) {
            // A file whose reading fails with an I/O error.
            true => std::os::unix::fs::symlink("/proc/self/mem", path).unwrap(),
            false => drop(std::fs::copy(&photo, path).unwrap()),
        }
    }
    let path = folder.path().to_str().unwrap();
    let (out, log) = done(&tiny(), &["classify", path, "--classes", REFERENCE]);
    let rows = rows(&out);
    assert_eq!(rows.len(), 70, "{log}");
    for (number, row) in rows.iter().enumerate() {
        assert!(text(row, "uri").ends_with(&format!("/{number:02}.png")), "{row}");
        match unavailable(number) {
            true => assert_eq!(text(&row["error"], "code"), "storage_unavailable"),
            false => assert!(row["label"].is_string(), "{row}"),
        }
    }
    assert_words(&log, &["errors   33 (storage_unavailable 33)"]);
}

#[test]
fn failures_and_wrong_usage_have_their_own_exit_codes_and_a_clear_message() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for sub in ["empty", "text", "flat", "broken/good", "broken/bad"] {
        std::fs::create_dir_all(folder.path().join(sub)).unwrap();
    }
    let photo = repository("samples/photos/coffee.png");
    std::fs::write(place("text/README.md"), "no image").unwrap();
    std::fs::copy(&photo, place("flat/coffee.png")).unwrap();
    std::fs::copy(&photo, place("broken/good/coffee.png")).unwrap();
    for name in ["a.jpg", "b.png"] {
        std::fs::write(folder.path().join("broken/bad").join(name), "no image either").unwrap();
    }
    let mut other = tiny();
    other.set("model.path", "tests/data/models/tiny-fixed4");
    let other = built(&other, REFERENCE, folder.path(), "other", "1");
    let other = other.to_str().unwrap();
    std::fs::write(place("cut.safetensors"), &std::fs::read(other).unwrap()[..900]).unwrap();
    std::fs::write(place("bad.toml"), "[amqp]\nprefecth = 1\n").unwrap();
    let mut setup = tiny();
    setup.set("classes.root", folder.path().to_str().unwrap());

    let (empty, text, flat, broken) =
        (place("empty"), place("text"), place("flat"), place("broken"));
    let (gone, cut, bad_toml) = (place("gone"), place("cut.safetensors"), place("bad.toml"));
    let beyond = place("gone/out.jsonl");
    let classify = |paths: &[&'static str]| [&["classify"], paths].concat();
    let photos = classify(&[PHOTOS, "--classes", REFERENCE]);
    // Exit code 1: it was asked for rightly, and cannot be done.
    for (arguments, words) in [
        (&["classify", &empty, "--classes", REFERENCE][..], &[&*empty, "holds no image"][..]),
        (&["classify", &text, "--classes", REFERENCE], &[&text, "holds no image"]),
        (&["classify", PHOTOS, &empty, "--classes", REFERENCE], &[&empty, "holds no image"]),
        (&["classify", &gone, "--classes", REFERENCE], &[&gone, "No such file"]),
        (&["classify", PHOTOS, "--classes", &flat], &[&flat, "one sub-folder of images a class"]),
        (&["classify", PHOTOS, "--classes", &empty], &[&empty, "one sub-folder of images a class"]),
        (&["classify", PHOTOS, "--classes", &broken], &["\"bad\" has no usable image", "a.jpg"]),
        (&["classify", PHOTOS, "--classes", "nothing"], &["\"nothing\" is unknown", "active.json"]),
        (
            &["classify", PHOTOS, "--classes", "other@2"],
            &["\"other\" has no version \"2\"", "other/2.safetensors does not exist"],
        ),
        (
            &["classify", PHOTOS, "--classes", "other@1"],
            &["made with model tiny-fixed4@", "but model tiny-nhwc@", "other/1.safetensors"],
        ),
        (
            &["classify", PHOTOS, "--classes", other],
            &["made with model tiny-fixed4@", "but model tiny-nhwc@"],
        ),
        (&["classify", PHOTOS, "--classes", &cut], &[&cut, "not a whole safetensors file"]),
        (&["classify", PHOTOS, "--classes", "README.md"], &["README.md", "safetensors"]),
        (&["classes", "build", &gone, "--set", "s", "--version", "1"], &[&gone, "No such file"]),
        (&["classes", "build", &flat, "--set", "s", "--version", "1"], &["one sub-folder"]),
        (
            &["classes", "build", &broken, "--set", "s", "--version", "1"],
            &["\"bad\" has no usable image", "a.jpg"],
        ),
    ] {
        let (code, message) = failed(&setup, arguments);
        assert_eq!(code, 1, "{arguments:?}: {message}");
        assert_words(&message, words);
    }
    assert!(!folder.path().join("s").exists(), "a failed build leaves nothing");
    // Exit code 2: it was asked for wrongly.
    for (more, words) in [
        (&["--top-k", "0"][..], &["--top-k must be 1 to 100"][..]),
        (&["--top-k", "101"], &["--top-k must be 1 to 100"]),
        (&["--top-k", "many"], &["--top-k", "many"]),
        (&["--top-k", "-1"], &["-1"]),
        (&["--min-score", "1.01"], &["--min-score must lie in [-1, 1]"]),
        (&["--min-score", "-1.01"], &["--min-score must lie in [-1, 1]"]),
        (&["--min-score", "NaN"], &["--min-score must lie in [-1, 1]"]),
        (&["--out", &empty], &["--out", &empty, "it is a folder"]),
        (&["--out", &beyond], &["--out", "there is no folder", &gone]),
        (&["--setting", "amqp.prefecth=1"], &["settings: ", "prefecth", "prefetch"]),
        (&["--setting", "nonsense.key=1"], &["settings: ", "nonsense"]),
        (&["--setting", "amqp.prefetch"], &["--setting", "expects KEY=VALUE"]),
        (&["--setting", "=1"], &["settings: "]),
        (&["--setting", "amqp.prefetch=many"], &["settings: ", "amqp.prefetch"]),
        (&["--setting", "embedder.max_batch=0"], &["embedder.max_batch must be at least 1"]),
        (&["--config", &gone], &["settings: ", &gone]),
        (&["--config", &bad_toml], &["settings: ", "prefecth"]),
        (&["--backend", "gpu"], &["--backend", "gpu", "onnxruntime"]),
        (&["--nonsense"], &["--nonsense"]),
    ] {
        let arguments = [&photos[..], more].concat();
        let (code, message) = failed(&setup, &arguments);
        assert_eq!(code, 2, "{more:?}: {message}");
        assert_words(&message, words);
    }
    for (arguments, words) in [
        (&["classify"][..], &["--classes", "PATH"][..]),
        (&["classify", PHOTOS], &["--classes"]),
        (&["classify", PHOTOS, "--classes", &gone], &["no such folder or file", &gone]),
        (&["classify", PHOTOS, "--classes", "other@"], &["no such folder or file", "not a name"]),
        (&["classes", "build", REFERENCE, "--set", "a/b", "--version", "1"], &["--set: \"a/b\""]),
        (&["classes", "build", REFERENCE, "--set", "..", "--version", "1"], &["--set: \"..\""]),
        (&["classes", "build", REFERENCE, "--set", "a", "--version", ""], &["--version: \"\""]),
        (&["classes", "build", REFERENCE, "--set", "a"], &["--version"]),
        (&["classes", "import", "--set", "a", "--version", "1"], &["--vectors"]),
        (&["nonsense"], &["nonsense"]),
        (&[], &["Usage"]),
    ] {
        let (code, message) = failed(&setup, arguments);
        assert_eq!(code, 2, "{arguments:?}: {message}");
        assert_words(&message, words);
    }
    let mut setup = setup.clone();
    setup.env.insert("ANGLER__EMBEDDER__BACKEND_".into(), "tract".into());
    let (code, message) = failed(&setup, &photos);
    assert_eq!(code, 2, "{message}");
    assert_words(&message, &["settings: ", "backend_"]);
}

// Classes.

#[tokio::test]
async fn a_version_is_built_once_from_a_folder_or_from_s3() {
    let (folder, bucket) = (tempfile::tempdir().unwrap(), Bucket::new().await);
    let source = folder.path().join("bottles");
    reference(&source, &["trouser", "bag"], 3);
    for file in walkdir::WalkDir::new(&source).into_iter().map(Result::unwrap) {
        if file.file_type().is_file() {
            let key = file.path().strip_prefix(folder.path()).unwrap().to_str().unwrap();
            bucket.put(key, std::fs::read(file.path()).unwrap()).await;
        }
    }
    // One image that cannot be used is said and left out; what is hidden or no image is neither.
    std::fs::write(source.join("bag/broken.jpg"), "no image").unwrap();
    std::fs::write(source.join("bag/.DS_Store"), "hidden").unwrap();
    std::fs::write(source.join("notes.txt"), "no image and no class").unwrap();
    let root = folder.path().join("root");
    let mut setup = tiny();
    setup.set("classes.root", root.to_str().unwrap());
    let source = source.to_str().unwrap();
    let build = |source, version| ["classes", "build", source, "--set", "b", "--version", version];
    let (out, log) = done(&setup, &build(source, "1"));
    let place = root.join("b/1.safetensors");
    let line = format!("b@1: 2 classes, 2 vectors of 6 images, model {}\n", TINY.0);
    assert_words(&out, &[&line, place.to_str().unwrap()]);
    assert_words(&log, &["not used: ", "bag/broken.jpg", "unsupported_format"]);
    assert_eq!(log.lines().count(), 1, "{log}");
    let bytes = std::fs::read(&place).unwrap();
    let first = VectorsFile::parse(&bytes);
    assert_eq!(first.labels, ["bag", "trouser"]);
    assert!(first.rows.iter().all(|row| (cosine(row, row) - 1.0).abs() < 1e-6));

    // A version is immutable.
    let (code, message) = failed(&setup, &build(source, "1"));
    assert_eq!(code, 1);
    assert_words(&message, &[place.to_str().unwrap(), "exists already", "another version"]);
    assert_eq!(std::fs::read(&place).unwrap(), bytes);

    // A slash or two at the end change nothing. `--json` is one object.
    let slashes = format!("{source}//");
    let (out, _) = done(&setup, &[&build(&slashes, "2")[..], &["--json"]].concat());
    let second = VectorsFile::read(&root.join("b/2.safetensors"));
    assert_eq!((&second.labels, &second.rows), (&first.labels, &first.rows));
    let report = &rows(&out)[0];
    for (key, wanted) in [
        ("classes", Value::from("b@2")),
        ("place", root.join("b/2.safetensors").to_str().into()),
        ("labels", 2.into()),
        ("rows", 2.into()),
        ("images", 6.into()),
        ("model", TINY.0.into()),
    ] {
        assert_eq!(report[key], wanted, "{report}");
    }
    let left: BTreeSet<_> =
        root.join("b").read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["1.safetensors".into(), "2.safetensors".into()].into());

    // From S3 into S3.
    let mut setup = tiny_with_store();
    setup.set("classes.root", &format!("s3://{}/sets/", bucket.name));
    let remote = format!("s3://{}/bottles", bucket.name);
    let (out, _) = done(&setup, &build(&remote, "1"));
    let place = format!("s3://{}/sets/b/1.safetensors", bucket.name);
    assert_words(&out, &[&line, &place]);
    let object = bucket.client.get_object().bucket(&bucket.name).key("sets/b/1.safetensors");
    let object = object.send().await.unwrap().body.collect().await.unwrap().into_bytes();
    let third = VectorsFile::parse(&object);
    assert_eq!((&third.labels, &third.rows), (&first.labels, &first.rows));
    let (code, message) = failed(&setup, &build(&remote, "1"));
    assert_eq!(code, 1);
    assert_words(&message, &[&place, "exists already"]);
}

/// A .npy file, format version 1.0 (numpy.lib.format), written by hand.
fn npy(descr: &str, shape: &[usize], fortran: bool, data: &[u8]) -> Vec<u8> {
    let shape: String = shape.iter().map(|n| format!("{n},")).collect();
    let fortran = if fortran { "True" } else { "False" };
    let header =
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({shape}), }}");
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    let header = format!("{header:<width$}\n", width = padded - 1);
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn vectors_of_another_tool_are_imported_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let dim = TINY.1;
    // Three vectors of different lengths: directions count.
    let values: Vec<f32> =
        (0..3 * dim).map(|i| ((i * 37 % 23) as f32 - 11.0) * (1 + i / dim) as f32).collect();
    let wanted: Vec<Vec<f32>> = values.chunks(dim).map(<[f32]>::to_vec).collect();
    let f32s = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let f64s = |values: &[f32]| {
        values.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect::<Vec<u8>>()
    };
    let columns: Vec<f32> = (0..dim).flat_map(|c| wanted.iter().map(move |row| row[c])).collect();
    let mut setup = tiny();
    setup.set("classes.root", folder.path().to_str().unwrap());
    let mut number = 0;
    let mut import = |vectors: &[u8], labels: (&str, &str), more: &[&str]| {
        number += 1;
        let version = number.to_string();
        let (npy, file) = (folder.path().join("v.npy"), folder.path().join(labels.0));
        std::fs::write(&npy, vectors).unwrap();
        std::fs::write(&file, labels.1).unwrap();
        let (npy, file) = (npy.to_str().unwrap(), file.to_str().unwrap());
        let arguments = ["classes", "import", "--vectors", npy, "--labels", file];
        let target = ["--set", "i", "--version", &version];
        let outcome = setup.run(&[&arguments[..], &target, more].concat());
        (outcome, folder.path().join(format!("i/{version}.safetensors")))
    };
    let shape = [3, dim];
    let good = npy("<f4", &shape, false, &f32s(&values));
    let json = ("labels.json", r#"["cola", "fritz \"kola\"", "cola"]"#);
    let text = ("labels.txt", "cola\r\nfritz \"kola\"\r\ncola\r\n");
    for (vectors, labels) in [
        (good.clone(), json),
        (npy("<f8", &shape, false, &f64s(&values)), text),
        (npy("<f4", &shape, true, &f32s(&columns)), json),
        (npy("<f8", &shape, true, &f64s(&columns)), text),
    ] {
        let ((code, out, log), file) = import(&vectors, labels, &[]);
        assert_eq!(code, 0, "{log}");
        assert_words(&out, &["2 classes, 3 vectors, model tiny-nhwc@", file.to_str().unwrap()]);
        let found = VectorsFile::read(&file);
        assert_eq!(found.labels, ["cola", "fritz \"kola\"", "cola"]);
        assert_eq!(found.metadata["model"], TINY.0);
        assert!(!found.metadata.contains_key("min_score"));
        for (found, wanted) in found.rows.iter().zip(&wanted) {
            assert!(cosine(found, wanted) > 0.999_999_9);
        }
    }
    let ((code, out, log), file) = import(&good, json, &["--min-score", "0.35", "--json"]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(VectorsFile::read(&file).metadata["min_score"], "0.35");
    let report = &rows(&out)[0];
    assert_eq!((&report["labels"], &report["rows"]), (&2.into(), &3.into()), "{report}");

    let changed = |at: usize, value: f32| {
        let mut values = values.clone();
        values[at] = value;
        npy("<f4", &shape, false, &f32s(&values))
    };
    let mut zero = values.clone();
    zero[dim..2 * dim].fill(0.0);
    let ints: Vec<u8> = values.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect();
    for (vectors, labels, more, words) in [
        (
            npy("<f4", &[dim, 3], false, &f32s(&values)),
            json,
            &[][..],
            &["have 3 values", "have 24", "v.npy"][..],
        ),
        (good.clone(), ("labels.json", "[\"a\"]"), &[], &["1 labels for 3 rows"]),
        (good.clone(), ("labels.txt", "a\nb\nc\nd\n"), &[], &["4 labels for 3 rows"]),
        (good.clone(), ("labels.json", "{\"a\": 1}"), &[], &["labels.json", "array of strings"]),
        (good.clone(), ("labels.json", "[1, 2, 3]"), &[], &["labels.json", "array of strings"]),
        (changed(dim + 2, f32::NAN), json, &[], &["row 1", "kola", "NaN", "column 2"]),
        (changed(0, f32::INFINITY), json, &[], &["row 0", "inf"]),
        (npy("<f4", &shape, false, &f32s(&zero)), json, &[], &["row 1", "kola", "is zero"]),
        (npy("<f4", &[0, dim], false, &[]), ("labels.json", "[]"), &[], &["no vectors"]),
        (npy("<i4", &shape, false, &ints), json, &[], &["v.npy", "f16, f32 or f64, [rows, dim]"]),
        (npy("<f4", &[3 * dim], false, &f32s(&values)), json, &[], &["v.npy", "[rows, dim]"]),
        (good[..good.len() - 5].to_vec(), json, &[], &["v.npy"]),
        (b"no numpy".to_vec(), json, &[], &["v.npy", ".npy file"]),
    ] {
        let ((code, out, log), file) = import(&vectors, labels, more);
        assert_eq!((code, out.as_str()), (1, ""), "{words:?}: {log}");
        assert!(log.starts_with("error: ") && !log.contains("panicked"), "{log}");
        assert_words(&log, words);
        assert!(!file.exists(), "{}", file.display());
    }
}

// Settings and help.

#[test]
fn the_default_settings_are_a_settings_file() {
    let setup = Setup::default();
    let (defaults, _) = done(&setup, &["default-settings"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("angler.toml");
    std::fs::write(&file, &defaults).unwrap();
    let file = file.to_str().unwrap();
    let arguments = ["classify", PHOTOS, "--classes", REFERENCE];
    let (out, _) = done(&tiny(), &[&arguments[..], &["--config", file]].concat());
    assert_eq!(rows(&out).len(), 8);
    // It is really read.
    let changed = defaults.replace("backend = \"auto\"", "backend = \"gpu\"");
    std::fs::write(file, changed).unwrap();
    let (code, message) = failed(&setup, &[&arguments[..], &["--config", file]].concat());
    assert_eq!(code, 2);
    assert_words(&message, &["gpu"]);
}

#[test]
fn help_names_every_flag() {
    let general = ["--config", "--setting", "--model", "--backend", "--help"];
    let target = ["--set <", "--version <", "--json"];
    let classify = ["--classes", "--out", "--top-k", "--min-score", "--embeddings", "<PATH>"];
    let new = ["--f16", "--min-score <", "--min-scores"];
    let import = [&["--vectors", "--labels"], &new[..], &target].concat();
    let build = [&["<SOURCE>", "--per-class"], &new[..], &target].concat();
    for (command, flags) in [
        (&[][..], vec!["classify", "worker", "classes", "default-settings", "--version"]),
        (&["classify"], classify.to_vec()),
        (&["worker"], vec![]),
        (&["classes"], vec!["build", "import", "export"]),
        (&["classes", "build"], build),
        (&["classes", "import"], import),
        (&["classes", "export"], vec!["<SET[@VERSION]|FILE>", "--out", "--force", "--json"]),
        (&["default-settings"], vec![]),
    ] {
        for flag in ["--help", "-h"] {
            let (help, log) = done(&Setup::default(), &[command, &[flag]].concat());
            assert_eq!(log, "");
            assert_words(&help, &general);
            assert_words(&help, &flags);
            // clap does not wrap the usage line.
            let mut lines = help.lines().filter(|line| !line.starts_with("Usage:"));
            assert!(lines.all(|line| line.chars().count() <= 100), "{help}");
        }
    }
    let (version, _) = done(&Setup::default(), &["--version"]);
    assert_eq!(version, format!("angler {}\n", env!("CARGO_PKG_VERSION")));
}
