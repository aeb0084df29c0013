//! `angler classes build`, `import` and `export` as a user runs them: what a version is made of,
//! and files of other tools on both sides, numpy's among them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Bucket, Setup, files, repository, var};
use half::f16;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const REFERENCE: &str = "samples/fashion/reference";
/// Fingerprint and length of the model that [`Bench`] runs.
const TINY: (&str, usize) = ("tiny-nhwc@b9f0436ae619", 24);

/// A folder of the test's own, and a setup whose class sets lie in it.
struct Bench {
    folder: tempfile::TempDir,
    setup: Setup,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        let mut setup = tiny(Setup::default());
        setup.set("classes.root", root.to_str().unwrap());
        Self { folder, setup }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, body: impl AsRef<[u8]>) -> String {
        std::fs::write(self.folder.path().join(name), body).unwrap();
        self.path(name)
    }

    /// The version `set@version`, read by the format's own library.
    fn version(&self, set: &str, version: &str) -> Version {
        Version::read(&self.folder.path().join(format!("root/{set}/{version}.safetensors")))
    }

    /// A folder of references: some of the samples' classes, `images` of each.
    fn reference(&self, classes: &[&str], images: usize) -> String {
        for class in classes {
            let to = self.folder.path().join("reference").join(class);
            std::fs::create_dir_all(&to).unwrap();
            for file in files(&format!("{REFERENCE}/{class}")).into_iter().take(images) {
                std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
            }
        }
        self.path("reference")
    }

    /// `classes build`; what `--json` says, and standard error.
    fn build(&self, source: &str, version: &str, more: &[&str]) -> (Value, String) {
        let arguments = ["classes", "build", source, "--set", "b", "--version", version, "--json"];
        let (out, log) = done(&self.setup, &[&arguments[..], more].concat());
        (serde_json::from_str(&out).unwrap(), log)
    }

    /// `classes import` that must succeed.
    fn import(&self, vectors: &str, version: &str, more: &[&str]) -> Version {
        let target = ["--set", "i", "--version", version];
        let arguments = [&["classes", "import", "--vectors", vectors], &target[..], more].concat();
        let (out, _) = done(&self.setup, &arguments);
        assert_words(&out, &[&format!("angler classes activate i@{version}`")]);
        self.version("i", version)
    }
}

/// The tiny model on tract, whatever the machine has; warnings only.
fn tiny(mut setup: Setup) -> Setup {
    setup.set("model.path", "tests/data/models/tiny-nhwc");
    setup.set("embedder.backend", "tract");
    setup.set("log.level", "warn");
    setup
}

/// Runs what must succeed: standard output, standard error.
#[track_caller]
fn done(setup: &Setup, arguments: &[&str]) -> (String, String) {
    let (code, out, log) = setup.run(arguments);
    assert_eq!(code, 0, "{arguments:?}:\n{log}");
    (out, log)
}

/// Runs what must fail with this exit code: the message. Nothing is on standard output.
#[track_caller]
fn failed(setup: &Setup, wanted: i32, arguments: &[&str]) -> String {
    let (code, out, message) = setup.run(arguments);
    assert_eq!((code, out.as_str()), (wanted, ""), "{arguments:?}:\n{message}");
    assert!(message.contains("error: ") && !message.contains("panicked"), "{message}");
    message
}

#[track_caller]
fn assert_words(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

/// A class vectors file.
#[derive(Debug, PartialEq)]
struct Version {
    dtype: Dtype,
    rows: Vec<Vec<f32>>,
    labels: Vec<String>,
    metadata: BTreeMap<String, String>,
}

impl Version {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata: BTreeMap<String, String> =
            header.metadata().clone().unwrap().into_iter().collect();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor("vectors").unwrap();
        let (dtype, data) = (tensor.dtype(), tensor.data());
        let values: Vec<f32> = match dtype {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => {
                data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            other => panic!("{other:?}"),
        };
        let rows: Vec<Vec<f32>> = values.chunks(tensor.shape()[1]).map(<[f32]>::to_vec).collect();
        let labels: Vec<String> = serde_json::from_str(&metadata["labels"]).unwrap();
        assert_eq!((labels.len(), rows.len()), (rows.len(), tensor.shape()[0]));
        Self { dtype, rows, labels, metadata }
    }

    /// Each label with its rows.
    fn by_label(&self) -> BTreeMap<&str, Vec<&[f32]>> {
        let mut all: BTreeMap<&str, Vec<&[f32]>> = BTreeMap::new();
        for (label, row) in self.labels.iter().zip(&self.rows) {
            all.entry(label).or_default().push(row);
        }
        all
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let product =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let (ab, aa, bb): (f64, f64, f64) = (product(a, b), product(a, a), product(b, b));
    ab / (aa * bb).sqrt()
}

// Build.

#[test]
fn a_class_is_its_mean_all_its_images_or_its_medoids() {
    let bench = Bench::new();
    let source = bench.reference(&["bag", "sandal", "trouser"], 5);
    let of = |version: &str, per_class: &str, more: &[&str]| {
        let (report, _) =
            bench.build(&source, version, &[&["--per-class", per_class], more].concat());
        assert_eq!((&report["labels"], &report["images"]), (&3.into(), &15.into()), "{report}");
        let built = bench.version("b", version);
        assert_eq!(report["rows"], built.rows.len());
        built
    };
    let (_, _) = bench.build(&source, "default", &[]);
    let mean = of("mean", "mean", &[]);
    assert_eq!(mean.rows, bench.version("b", "default").rows);
    let all = of("all", "all", &[]);
    assert_eq!((mean.rows.len(), all.rows.len(), all.dtype), (3, 15, Dtype::F32));
    for (label, images) in all.by_label() {
        assert_eq!(images.len(), 5);
        let sum: Vec<f32> = (0..TINY.1).map(|at| images.iter().map(|row| row[at]).sum()).collect();
        let mean = &mean.by_label()[label];
        assert_eq!(mean.len(), 1);
        assert!(cosine(mean[0], &sum) > 0.999_99, "{label}");
    }
    let two = of("two", "medoids:2", &[]);
    let again = of("again", "medoids:2", &[]);
    assert_eq!((&two.rows, &two.labels), (&again.rows, &again.labels));
    for (label, medoids) in two.by_label() {
        let images = &all.by_label()[label];
        assert!((1..=2).contains(&medoids.len()), "{label}");
        assert!(medoids.iter().all(|medoid| images.contains(medoid)), "{label}");
    }
    // One medoid is the image with the largest mean cosine to the others.
    for (label, medoid) in of("one", "medoids:1", &[]).by_label() {
        let images = &all.by_label()[label];
        let near = |image: &[f32]| images.iter().map(|other| cosine(image, other)).sum::<f64>();
        let best = images.iter().map(|image| near(image)).fold(f64::MIN, f64::max);
        assert!(near(medoid[0]) > best - 1e-5, "{label}");
    }
    // A class with fewer images than representatives keeps all of them.
    let many = of("many", "medoids:5", &[]);
    assert_eq!((&many.rows, &many.labels), (&all.rows, &all.labels));
    let half = of("half", "all", &["--f16"]);
    assert_eq!((half.dtype, half.rows), (Dtype::F16, all.rows));
    let half = of("half-mean", "mean", &["--f16"]);
    assert_eq!(half.dtype, Dtype::F16);
    assert!(half.rows.iter().zip(&mean.rows).all(|(a, b)| cosine(a, b) > 0.9999));

    let wrong = |per_class| {
        let target = ["--set", "b", "--version", "x", "--per-class", per_class];
        failed(&bench.setup, 2, &[&["classes", "build", &source], &target[..]].concat())
    };
    assert_words(&wrong("medoids:0"), &["--per-class", "medoids:N with N at least 1"]);
    assert_words(&wrong("median"), &["--per-class", "mean, all, or medoids:N"]);
}

#[test]
fn images_in_the_wrong_folder_are_listed() {
    let bench = Bench::new();
    let source = bench.reference(&["ankle-boot", "trouser"], 8);
    let boot = files(&format!("{REFERENCE}/ankle-boot")).remove(0);
    let misplaced = format!("{source}/trouser/misplaced.png");
    std::fs::copy(boot, &misplaced).unwrap();
    std::fs::write(format!("{source}/trouser/broken.png"), "no image").unwrap();
    let (report, log) = bench.build(&source, "1", &[]);
    assert_words(&log, &["not used: ", "trouser/broken.png", "(unsupported_format)"]);
    let broken = &report["failed"]["images"][0];
    assert_eq!((&report["failed"]["count"], &broken["label"]), (&1.into(), &"trouser".into()));
    assert_eq!(broken["error"]["code"], "unsupported_format");
    assert_words(broken["uri"].as_str().unwrap(), &["trouser/broken.png"]);

    let outliers = report["outliers"]["images"].as_array().unwrap();
    assert_eq!(report["outliers"]["count"], outliers.len());
    let worst = &outliers[0];
    assert_eq!(worst["uri"], misplaced, "{report}");
    assert_eq!((&worst["label"], &worst["nearest"]), (&"trouser".into(), &"ankle-boot".into()));
    assert_eq!(worst["why"], "nearer-to-another");
    assert!(worst["nearest_score"].as_f64() > worst["own"].as_f64(), "{worst}");

    let arguments = ["classes", "build", &source, "--set", "b", "--version", "2"];
    let (out, _) = done(&bench.setup, &arguments);
    let line = format!("b@2: 2 classes, 2 vectors of 17 images, model {}\n", TINY.0);
    let next = "`angler classes activate b@2`";
    assert_words(
        &out,
        &["may be in the wrong folder", "misplaced.png", "nearest other", &line, next],
    );
}

#[test]
fn a_single_class_and_a_single_image_are_enough() {
    let bench = Bench::new();
    let source = bench.reference(&["bag"], 1);
    for (version, per_class) in [("1", "mean"), ("2", "all"), ("3", "medoids:3")] {
        let (report, _) = bench.build(&source, version, &["--per-class", per_class]);
        assert_eq!((&report["rows"], &report["outliers"]["count"]), (&1.into(), &0.into()));
        assert_eq!(report["outliers"]["alone"], 1);
        assert_eq!(bench.version("b", version).labels, ["bag"]);
    }
}

#[test]
fn thresholds_come_along_and_are_checked_before_the_work() {
    let bench = Bench::new();
    let source = bench.reference(&["bag", "sandal"], 2);
    let scores = bench.write("scores.json", r#"{"bag": 0.5, "sandal": -0.25}"#);
    bench.build(&source, "1", &["--min-score", "-0.1", "--min-scores", &scores]);
    let metadata = bench.version("b", "1").metadata;
    assert_eq!(metadata["min_score"], "-0.1");
    let found: Value = serde_json::from_str(&metadata["min_scores"]).unwrap();
    assert_eq!(found, json!({"bag": 0.5, "sandal": -0.25}));

    let slip = bench.write("slip.json", r#"{"bog": 0.5}"#);
    let high = bench.write("high.json", r#"{"bag": 1.5}"#);
    let list = bench.write("list.json", "[0.5]");
    let gone = bench.path("gone.json");
    let npy = bench.write("v.npy", "never read");
    for (more, code, words) in [
        (["--min-score", "1.5"], 2, &["--min-score must lie in [-1, 1]"][..]),
        (["--min-score", "NaN"], 2, &["--min-score must lie in [-1, 1]"]),
        (["--min-scores", &high], 2, &["high.json", "\"bag\" has 1.5", "[-1, 1]"]),
        (["--min-scores", &list], 1, &["list.json", "JSON object"]),
        (["--min-scores", &gone], 1, &["gone.json", "No such file"]),
    ] {
        for start in [["build", &source].as_slice(), &["import", "--vectors", &npy]] {
            let target = ["--set", "b", "--version", "2"];
            let arguments = [&["classes"], start, &target, &more].concat();
            assert_words(&failed(&bench.setup, code, &arguments), words);
        }
    }
    let target = ["--set", "b", "--version", "2", "--min-scores", &slip];
    let message = failed(&bench.setup, 2, &[&["classes", "build", &source], &target[..]].concat());
    assert_words(&message, &["slip.json", "there is no class \"bog\""]);
    assert!(!Path::new(&bench.path("root/b/2.safetensors")).exists());
}

#[tokio::test]
async fn a_version_is_built_from_s3_into_s3_and_exported() {
    let bucket = Bucket::new().await;
    for class in ["bag", "sandal"] {
        for file in files(&format!("{REFERENCE}/{class}")).into_iter().take(3) {
            let name = file.file_name().unwrap().to_str().unwrap();
            bucket.put(&format!("ref/{class}/{name}"), std::fs::read(&file).unwrap()).await;
        }
    }
    let mut setup = tiny(Setup::store());
    setup.set("classes.root", &format!("s3://{}/sets", bucket.name));
    let source = format!("s3://{}/ref", bucket.name);
    let target = ["--set", "b", "--version", "1", "--per-class", "medoids:2", "--f16", "--json"];
    let (out, _) = done(&setup, &[&["classes", "build", &source], &target[..]].concat());
    let report: Value = serde_json::from_str(&out).unwrap();
    let place = format!("s3://{}/sets/b/1.safetensors", bucket.name);
    assert_eq!((&report["place"], &report["precision"]), (&place.into(), &"f16".into()));

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("b.safetensors");
    done(&setup, &["classes", "export", "b@1", "--out", out.to_str().unwrap()]);
    let object = bucket.client.get_object().bucket(&bucket.name).key("sets/b/1.safetensors");
    let object = object.send().await.unwrap().body.collect().await.unwrap().into_bytes();
    assert_eq!(std::fs::read(&out).unwrap(), object);
    let exported = Version::read(&out);
    assert_eq!(exported.labels.iter().collect::<BTreeSet<_>>().len(), 2);
    // An existing version is refused before any image is read.
    let bad = format!("s3://{}/nothing", bucket.name);
    let message = failed(&setup, 1, &[&["classes", "build", &bad], &target[..]].concat());
    assert_words(&message, &["exists already", "another version"]);
}

// Import and export.

/// Three vectors of different lengths, and their labels, one of them twice.
fn vectors() -> (Vec<Vec<f32>>, Vec<&'static str>) {
    let value = |i: usize| ((i * 37 % 23) as f32 - 11.0) * (1 + i / TINY.1) as f32;
    let rows = (0..3).map(|row| (0..TINY.1).map(|at| value(row * TINY.1 + at)).collect());
    (rows.collect(), vec!["cola, \"zero\"", "fritz ü", "cola, \"zero\""])
}

fn bytes(rows: &[Vec<f32>]) -> Vec<u8> {
    rows.iter().flatten().flat_map(|x| x.to_le_bytes()).collect()
}

fn safetensors_file(
    tensors: &[(&str, Dtype, &[usize], &[u8])],
    metadata: &[(&str, &str)],
) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
    });
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

/// Runs a Python program in the bench's folder; it must succeed.
fn python(bench: &Bench, program: &str) -> String {
    let output = Command::new(var("ANGLER_TEST_PYTHON"))
        .args(["-c", program])
        .current_dir(bench.folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_numpy_writes_is_imported() {
    let bench = Bench::new();
    let (rows, labels) = vectors();
    bench.write("rows.json", serde_json::to_string(&rows).unwrap());
    let json = bench.write("labels.json", serde_json::to_string(&labels).unwrap());
    let program = "
import json
import numpy as np

rows = np.array(json.load(open('rows.json')))
for kind in ['<f2', '>f2', '<f4', '>f4', '<f8', '>f8']:
    name = kind.replace('<', 'little-').replace('>', 'big-')
    np.save(name, rows.astype(kind))
    np.save(name + '-columns', np.asfortranarray(rows.astype(kind)))
np.savez('one', ids=np.arange(3), names=np.array(['a', 'b', 'c']), embeddings=rows)
np.savez('named', other=rows[:, ::-1], vectors=rows.astype('f4'))
np.savez_compressed('small', vectors=rows.astype('f2'))
np.savetxt('table.csv', rows, delimiter=',', fmt='%.9g')
";
    python(&bench, program);
    let mut names: Vec<String> =
        ["one.npz", "named.npz", "small.npz", "table.csv"].map(str::to_owned).to_vec();
    for kind in ["f2", "f4", "f8"] {
        for order in ["little", "big"] {
            names.extend(["", "-columns"].map(|columns| format!("{order}-{kind}{columns}.npy")));
        }
    }
    for (number, name) in names.iter().enumerate() {
        let number = number.to_string();
        let version = bench.import(&bench.path(name), &number, &["--labels", &json]);
        assert_eq!((&version.rows, version.dtype), (&rows, Dtype::F32), "{name}");
        assert_eq!(version.labels, labels);
        assert_eq!(version.metadata["model"], TINY.0);
        assert_words(&version.metadata["source"], &["import", name]);
    }
    let half = bench.import(&bench.path("one.npz"), "half", &["--labels", &json, "--f16"]);
    assert_eq!(half.dtype, Dtype::F16);
    assert!(half.rows.iter().zip(&rows).all(|(a, b)| cosine(a, b) > 0.9999));
}

#[test]
fn labels_and_thresholds_may_lie_in_the_file() {
    let bench = Bench::new();
    let (rows, labels) = vectors();
    let line = |(row, label): (&Vec<f32>, &&str)| {
        let values: Vec<String> = row.iter().map(f32::to_string).collect();
        format!("\"{}\",{}\n", label.replace('"', "\"\""), values.join(","))
    };
    let lines: String = rows.iter().zip(&labels).map(line).collect();
    let header: Vec<String> = (0..TINY.1).map(|at| format!("v{at}")).collect();
    let with_header = format!("name,{}\n{lines}", header.join(","));
    let json = serde_json::to_string(&labels).unwrap();
    let data = bytes(&rows);
    let shape = [3, TINY.1];
    let tensor = ("vectors", Dtype::F32, &shape[..], &data[..]);
    let ids = ("ids", Dtype::I64, &[3][..], &[0; 24][..]);
    let own = [
        ("labels", json.as_str()),
        ("model", TINY.0),
        ("min_score", "0.25"),
        ("min_scores", "{\"fritz ü\": 0.5}"),
    ];
    for (version, name, body) in [
        ("1", "plain.csv", lines.into_bytes()),
        ("2", "header.csv", with_header.into_bytes()),
        ("3", "bare.safetensors", safetensors_file(&[tensor, ids], &own[..1])),
        ("4", "whole.safetensors", safetensors_file(&[tensor], &own)),
    ] {
        let file = bench.write(name, body);
        let imported = bench.import(&file, version, &[]);
        assert_eq!(
            (&imported.rows, imported.labels),
            (&rows, labels.iter().map(|l| (*l).to_owned()).collect())
        );
        let whole = name == "whole.safetensors";
        assert_eq!(imported.metadata.get("min_score").map(String::as_str), whole.then_some("0.25"));
        assert_eq!(imported.metadata.contains_key("min_scores"), whole);
    }
    // Flags win over the file.
    let (scores, other) =
        (bench.write("s.json", "{\"b\": 0.75}"), bench.write("l.txt", "a\r\nb\r\nc\r\n"));
    let file = bench.path("whole.safetensors");
    let more = ["--labels", &other, "--min-score", "0.5", "--min-scores", &scores];
    let imported = bench.import(&file, "5", &more);
    assert_eq!(imported.labels, ["a", "b", "c"]);
    assert_eq!(imported.metadata["min_score"], "0.5");
    assert_eq!(imported.metadata["min_scores"], "{\"b\":0.75}");
}

#[test]
fn what_cannot_be_imported_is_refused_with_file_and_remedy() {
    let bench = Bench::new();
    let (rows, _) = vectors();
    let mut broken = rows.clone();
    broken[1][3] = f32::NAN;
    let shape = [3, TINY.1];
    let of = |rows: &[Vec<f32>], shape: &[usize], metadata: &[(&str, &str)]| {
        safetensors_file(&[("x", Dtype::F32, shape, &bytes(rows))], metadata)
    };
    let labels = ("labels", "[\"a\", \"b\", \"c\"]");
    let good = of(&rows, &shape, &[labels]);
    let bare = of(&rows, &shape, &[]);
    let two = bench.write("two.json", "[\"a\", \"b\"]");
    for (name, body, more, code, words) in [
        ("a.safetensors", bare, &[][..], 1, &["a.safetensors", "no labels", "--labels"][..]),
        (
            "b.safetensors",
            good.clone(),
            &["--labels", &two],
            1,
            &["two.json: 2 labels for 3 rows", "b.safetensors"],
        ),
        (
            "c.safetensors",
            of(&rows, &shape, &[labels, ("model", "other@1")]),
            &[],
            1,
            &["c.safetensors", "made with model other@1", TINY.0, "--model"],
        ),
        (
            "d.safetensors",
            of(&rows, &[TINY.1, 3], &[labels]),
            &[],
            1,
            &["d.safetensors", "have 3 values", "have 24", "--model"],
        ),
        (
            "e.safetensors",
            of(&broken, &shape, &[labels]),
            &[],
            1,
            &["e.safetensors: row 1 (\"b\") holds NaN in column 3", "repair"],
        ),
        (
            "f.safetensors",
            good[..good.len() - 4].to_vec(),
            &[],
            1,
            &["f.safetensors", "not a whole"],
        ),
        ("g.csv", b"a,1,2\n".to_vec(), &[], 1, &["g.csv", "have 2 values, those of model"]),
        ("h.csv", b"a,1,2\nb,1\n".to_vec(), &[], 1, &["h.csv", "one length"]),
        ("i.npz", b"no zip".to_vec(), &["--labels", &two], 1, &["i.npz", "must be a .npz file"]),
        ("j.parquet", good.clone(), &[], 2, &["--vectors", "j.parquet", ".npy, .npz, .csv"]),
    ] {
        let file = bench.write(name, body);
        let start = ["classes", "import", "--vectors", &file, "--set", "i", "--version", "1"];
        assert_words(&failed(&bench.setup, code, &[&start, more].concat()), words);
    }
    assert!(!Path::new(&bench.path("root/i")).exists());
}

#[test]
fn a_version_survives_every_format() {
    let bench = Bench::new();
    let (rows, labels) = vectors();
    let json = serde_json::to_string(&labels).unwrap();
    let data = bytes(&rows);
    let metadata = [("labels", json.as_str()), ("min_score", "0.25")];
    let shape = [3, TINY.1];
    let file = safetensors_file(&[("vectors", Dtype::F32, &shape, &data)], &metadata);
    let source = bench.write("v.safetensors", file);
    bench.import(&source, "full", &[]);
    bench.import(&source, "half", &["--f16"]);
    let own = |version: &str| bench.path(&format!("root/i/{version}.safetensors"));

    for version in ["full", "half"] {
        let before = bench.version("i", version);
        let unit: Vec<Vec<f32>> = before
            .rows
            .iter()
            .map(|row| {
                let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                row.iter().map(|x| (f64::from(*x) / length) as f32).collect()
            })
            .collect();
        for ending in ["npy", "npz", "csv", "safetensors"] {
            let out = bench.path(&format!("{version}.{ending}"));
            let selector = format!("i@{version}");
            let export = ["classes", "export", &selector, "--out", &out];
            let (text, _) = done(&bench.setup, &export);
            assert_words(&text, &[&format!("{selector}: 2 classes, 3 vectors of 24 values"), &out]);
            let beside = bench.path(&format!("{version}.labels.json"));
            let more: &[&str] = match ending {
                "npy" | "npz" => {
                    let found: Vec<String> =
                        serde_json::from_slice(&std::fs::read(&beside).unwrap()).unwrap();
                    assert_eq!(found, labels);
                    &["--labels", &beside]
                }
                _ => &[],
            };
            let name = format!("{version}-{ending}");
            let after = bench.import(&out, &name, more);
            assert_eq!(after.labels, before.labels);
            if ending == "safetensors" {
                assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(own(version)).unwrap());
                assert_eq!(after.metadata["min_score"], "0.25");
                let again = bench.import(&out, &format!("{name}-half"), &["--f16"]);
                let same = version == "half";
                assert_eq!(again.rows == before.rows, same, "a second f16 is the first");
            } else {
                // f16 rows may differ from these in the last place of an f32.
                let near = |a: &f32, b: &f32| (a - b).abs() < 1e-6;
                let pairs = after.rows.iter().flatten().zip(unit.iter().flatten());
                assert!(pairs.clone().all(|(a, b)| near(a, b)), "{name}");
            }
            // Labels beside of one format must not stop the next one here.
            let _ = std::fs::remove_file(&beside);
        }
    }

    // numpy reads them as they are meant.
    let beside = bench.path("np.labels.json");
    for out in ["np.npy", "np.npz"] {
        let out = bench.path(out);
        done(&bench.setup, &["classes", "export", &own("full"), "--out", &out]);
        std::fs::rename(&beside, bench.path("kept.json")).unwrap();
    }
    let program = "
import json
import numpy as np

rows = np.load('np.npy')
assert rows.dtype == np.float32 and rows.shape == (3, 24), rows
assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
assert np.array_equal(np.load('np.npz')['vectors'], rows)
print(json.dumps(json.load(open('kept.json'))))
";
    assert_eq!(serde_json::from_str::<Vec<String>>(&python(&bench, program)).unwrap(), labels);
}

#[test]
fn an_export_overwrites_only_by_force() {
    let bench = Bench::new();
    let (rows, _) = vectors();
    let data = bytes(&rows);
    let labels = [("labels", "[\"a\", \"b\", \"c\"]")];
    let file = safetensors_file(&[("x", Dtype::F32, &[3, TINY.1], &data)], &labels);
    bench.import(&bench.write("v.safetensors", file), "1", &[]);
    let out = bench.write("out.npy", "of another run");
    let export = ["classes", "export", "i@1", "--out", &out];
    assert_words(&failed(&bench.setup, 1, &export), &["out.npy exists already", "--force"]);
    std::fs::remove_file(&out).unwrap();
    let beside = bench.write("out.labels.json", "of another run");
    assert_words(&failed(&bench.setup, 1, &export), &["out.labels.json exists already"]);
    assert!(!Path::new(&out).exists());
    let (text, _) = done(&bench.setup, &[&export[..], &["--force", "--json"]].concat());
    let report: Value = serde_json::from_str(&text).unwrap();
    let wanted = json!({
        "classes": "i@1", "model": TINY.0, "labels": 3, "rows": 3, "dim": 24,
        "files": [out, beside],
    });
    assert_eq!(report, wanted);
    assert_eq!(std::fs::read_to_string(&beside).unwrap(), "[\"a\",\"b\",\"c\"]");

    let folder = bench.path("");
    let beyond = bench.path("gone/v.npy");
    let csv = bench.path("new.csv");
    let readme = repository("README.md");
    for (classes, out, code, words) in [
        ("i@1", "v.txt", 2, &["--out v.txt", ".npy, .npz"][..]),
        ("i@1", &beyond, 2, &["there is no folder", "gone"]),
        ("i@2", &csv, 1, &["\"i\" has no version \"2\""]),
        ("i", &csv, 1, &["\"i\" is unknown", "active.json"]),
        ("i@", &csv, 2, &["i@: no class vectors file", "not a name"]),
        (readme.to_str().unwrap(), &csv, 1, &["README.md", "safetensors"]),
    ] {
        let message = failed(&bench.setup, code, &["classes", "export", classes, "--out", out]);
        assert_words(&message, words);
    }
    let left: BTreeSet<PathBuf> =
        Path::new(&folder).read_dir().unwrap().map(|e| e.unwrap().file_name().into()).collect();
    let wanted = ["out.labels.json", "out.npy", "root", "v.safetensors"].map(PathBuf::from);
    assert_eq!(left, wanted.into());
}
