//! The files of bulk runs: lists and results as Parquet, opened in pyarrow and pandas too, embeddings as
//! numpy reads them, and results that cannot be read.

use std::io::Write;
use std::ops::Range;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{World, lines, persistent};
use crate::support::{Bucket, tiny, var};

impl World {
    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Enqueues eight images, an image a job.
    fn eight(&self, run: &str) {
        let images = (0..8).map(|n| match n % 2 {
            0 => json!({"uri": format!("s3://photos/ä {n}.jpg"), "id": format!("sku\n{n}")}),
            _ => json!(format!("s3://photos/ä {n}.jpg")),
        });
        let lines: Vec<String> = images.map(|image| format!("{image}\n")).collect();
        std::fs::write(self.path("images.jsonl"), lines.concat()).unwrap();
        let (code, _, log) = self.enqueue(&self.text("images.jsonl"), run, &["--per-job", "1"]);
        assert_eq!(code, 0, "{log}");
    }

    /// Answers these jobs, which are the next in the queue.
    async fn answer_each(&self, jobs: Range<usize>, with: impl Fn(usize, &Value) -> Vec<u8>) {
        let consumer = self.broker.connect().await;
        let mut received = consumer.consume("angler.jobs").await;
        for number in jobs {
            let job = received.next().await.body;
            assert_eq!(job["run"]["index"], number);
            let properties = persistent().with_message_id(job["id"].as_str().unwrap().into());
            let queue = self.results(job["run"]["id"].as_str().unwrap());
            self.client.publish(&queue, &with(number, &job), properties).await;
        }
        consumer.close().await;
    }

    /// Runs a Python program in the test's folder; it must succeed.
    fn python(&self, program: &str) -> String {
        let output = Command::new(var("ANGLER_TEST_PYTHON"))
            .args(["-c", program])
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// What a worker says of job `number`, or one that is newer, or one that broke down.
fn answer(number: usize, job: &Value) -> Vec<u8> {
    let mut image = match &job["images"][0] {
        Value::String(uri) => json!({"uri": uri}),
        whole => whole.clone(),
    };
    let mut result = json!({
        "id": job["id"], "status": "done", "classes": "colours@1", "model": "tiny@1",
        "backend": "fake", "run": job["run"], "attempt": 1, "worker": "test",
        "finished_at": "2026-01-31T12:00:00.000Z",
    });
    let verdict = match number {
        // A label, its runner-up, and an embedding: [1, 0, -0.5, 2].
        0 | 1 => json!({
            "label": "red", "score": 0.9, "margin": 0.2, "embedding": "AACAPwAAAAAAAAC/AAAAQA==",
            "top": [{"label": "red", "score": 0.9}, {"label": "green", "score": 0.7}],
        }),
        // Unknown, in a set of one class.
        2 => json!({"label": null, "score": 0.1, "top": [{"label": "red", "score": 0.1}],
                    "embedding": "AACAPwAAAAAAAAC/AAAAQA=="}),
        3 => json!({"error": {"code": "not_found", "message": "no such key, \"ä\""}}),
        4 => json!({"error": {"code": "from_the_future", "message": "a code of a newer worker"}}),
        5 => {
            result["status"] = json!("failed");
            result["error"] = json!({"code": "unknown_version", "message": "gone"});
            return result.to_string().into_bytes();
        }
        6 => {
            result["status"] = json!("postponed");
            return result.to_string().into_bytes();
        }
        _ => {
            let whole = result.to_string();
            return whole.as_bytes()[..whole.len() / 2].to_vec();
        }
    };
    image.as_object_mut().unwrap().extend(verdict.as_object().unwrap().clone());
    result["images"] = json!([image]);
    result.to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn parquet_has_proper_types_and_what_the_json_lines_say() {
    let world = World::new().await;
    for (run, out) in [("a", "a.jsonl"), ("b", "b.parquet"), ("c", "c.csv")] {
        world.eight(run);
        world.answer_each(0..8, answer).await;
        let (code, _, log) = world.collect(run, out, &[]);
        assert_eq!(code, 0, "{log}");
        assert!(log.contains("failed jobs   unreadable_result 2, unknown_version 1"), "{log}");
        assert!(log.contains("errors        from_the_future 1, not_found 1"), "{log}");
    }
    let program = r#"
import base64, csv, json
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

table = pq.read_table("b.parquet")
word = pa.dictionary(pa.int32(), pa.string())
best = pa.struct([pa.field("label", pa.string(), False), pa.field("score", pa.float32(), False)])
want = pa.schema([
    ("uri", pa.string()), ("id", pa.string()), ("label", word), ("score", pa.float32()),
    ("margin", pa.float32()), ("error", word), ("message", pa.string()),
    ("top", pa.list_(pa.field("element", best, False))), pa.field("job", pa.string(), False),
    ("classes", word), ("model", word), ("backend", word),
    ("embedding", pa.list_(pa.field("element", pa.float32(), False), 4)),
])
assert table.schema.remove_metadata().equals(want), table.schema
kinds = {c.compression for c in (pq.ParquetFile("b.parquet").metadata.row_group(0).column(i) for i in range(14))}
assert kinds == {"SNAPPY", "UNCOMPRESSED"}, kinds

rows = table.to_pylist()
lines = [json.loads(line) for line in open("a.jsonl", encoding="utf-8")]
assert len(rows) == len(lines) == 8
with open("c.csv", newline="", encoding="utf-8") as file:
    texts = list(csv.DictReader(file))
assert list(texts[0]) == table.column_names[:-1], texts[0]
f32 = lambda x: None if x is None else float(np.float32(x))
for row, line, text in zip(rows, lines, texts):
    error = line.get("error") or {}
    said = {
        "uri": line.get("uri"), "id": line.get("id"), "label": line.get("label"),
        "score": f32(line.get("score")), "margin": f32(line.get("margin")),
        "error": error.get("code"), "message": error.get("message"),
        "top": [dict(t, score=f32(t["score"])) for t in line["top"]] if "top" in line else None,
        "classes": line.get("classes"), "model": line.get("model"), "backend": line.get("backend"),
        "embedding": np.frombuffer(base64.b64decode(line["embedding"]), "<f4").tolist() if "embedding" in line else None,
    }
    job = row.pop("job")
    assert job.startswith("b/") and line.get("job", "a/" + job[2:]) == "a/" + job[2:]
    # The reasons of a serialiser name a place, which the run's name does not move.
    assert row == said, (row, said)
    assert text.pop("job") == "c/" + job[2:]
    for name, value in text.items():
        if name == "top":
            value = [dict(t, score=f32(t["score"])) for t in json.loads(value)] if value else None
        elif name in ("score", "margin"):
            value = f32(value) if value else None
        assert (value or None) == said[name], (name, value, said)

frame = pd.read_parquet("b.parquet")
assert frame["score"].dtype == np.float32 and frame["label"].dtype == "category", frame.dtypes
assert frame["label"].tolist()[:2] == ["red", "red"] and frame["label"].isna().sum() == 6
assert frame["embedding"][0].tolist() == [1, 0, -0.5, 2] and frame["embedding"][3] is None
assert frame["top"][0][1]["label"] == "green"
assert frame.loc[frame["label"].isna() & frame["error"].isna(), "id"].tolist() == ["sku\n2"]
print("fine")
"#;
    assert_eq!(world.python(program), "fine\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_cannot_be_read_is_a_row_of_its_own_and_kept() {
    let world = World::new().await;
    world.eight("r");
    world.answer_each(0..7, answer).await;
    // Not complete at first, so that it is read from the journal, too.
    let (code, _, log) = world.collect("r", "r.jsonl", &["--silence", "1"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("1 of 8 jobs have no result, numbers 7"), "{log}");
    assert!(log.contains("unreadable_result 1"), "{log}");
    world.answer_each(7..8, answer).await;
    let (code, _, log) = world.collect("r", "r.jsonl", &[]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(log.matches("could not be read").count(), 1, "{log}");
    assert!(log.contains("count=2") && log.contains("r.unreadable.jsonl"), "{log}");
    let rows = lines(&world.path("r.jsonl"));
    assert_eq!(rows.len(), 8);
    let unread: Vec<&Value> =
        rows.iter().filter(|row| row["error"]["code"] == "unreadable_result").collect();
    let jobs: Vec<&Value> = unread.iter().map(|row| &row["job"]).collect();
    assert_eq!(jobs, [&json!("r/6"), &json!("r/7")]);
    let reason = |at: usize| unread[at]["error"]["message"].as_str().unwrap();
    assert!(reason(0).contains("unknown variant `postponed`"), "{}", reason(0));
    assert!(reason(1).contains("EOF while parsing"), "{}", reason(1));
    // As they came.
    let kept = lines(&world.path("r.unreadable.jsonl"));
    assert_eq!((kept.len(), &kept[0]["status"]), (2, &json!("postponed")));
    let cut = kept[1]["body"].as_str().unwrap();
    assert!(cut.starts_with('{') && serde_json::from_str::<Value>(cut).is_err(), "{cut}");
    let files: Vec<String> = std::fs::read_dir(world.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.') || name.starts_with("r."))
        .collect();
    assert_eq!(files.len(), 2, "{files:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_become_a_matrix_with_ids_or_nothing_is_lost() {
    let world = World::new().await;
    world.eight("e");
    world.answer_each(0..8, answer).await;
    let matrix = world.text("e.npy");
    std::fs::write(&matrix, "an older one").unwrap();
    let (code, _, log) = world.collect("e", "e.csv", &["--embeddings-out", &matrix]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("e.npy, [3, 4], their ids in") && log.contains("e.ids.txt"), "{log}");
    let program = r#"
import json, numpy as np
matrix = np.load("e.npy")
assert matrix.dtype == np.float32 and matrix.shape == (3, 4)
assert (matrix == [1, 0, -0.5, 2]).all()
ids = open("e.ids.txt", encoding="utf-8").read().splitlines()
print([json.loads(line) if line.startswith('"') else line for line in ids])
"#;
    assert_eq!(world.python(program), "['sku\\n0', 's3://photos/ä 1.jpg', 'sku\\n2']\n");

    // A run that was enqueued without.
    world.eight("none");
    let without = |_, job: &Value| {
        let mut result: Value = serde_json::from_slice(&answer(2, job)).unwrap();
        result["images"][0].as_object_mut().unwrap().remove("embedding").unwrap();
        result.to_string().into_bytes()
    };
    world.answer_each(0..8, without).await;
    for _ in 0..2 {
        let (code, _, log) = world.collect("none", "none.csv", &["--embeddings-out", &matrix]);
        assert_eq!(code, 1, "{log}");
        assert!(log.contains("the run was enqueued without --embeddings"), "{log}");
        assert!(!world.path("none.csv").exists());
    }
    let (code, _, log) = world.collect("none", "none.csv", &[]);
    assert_eq!(code, 0, "{log}");
    let rows = std::fs::read_to_string(world.path("none.csv")).unwrap();
    assert_eq!(rows.matches(",none/").count(), 8, "{rows}");
    assert_eq!(std::fs::metadata(&matrix).unwrap().len(), 128 + 48, "the other run's");
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_a_list_again_and_their_embeddings_are_rescored() {
    let world = World::new().await;
    let bucket = Bucket::new().await;
    let images = tiny::images(&bucket).await;
    let broken = bucket.put("broken.jpg", b"no image".to_vec()).await;
    let prefix = images[0].trim_end_matches("red.png").to_owned();
    let _worker = world.setup.start().await;
    let (out, matrix) = (world.text("out.parquet"), world.text("out.npy"));
    let wait = ["--wait", "--out", &out, "--embeddings-out", &matrix, "--top-k", "2"];
    let (code, _, log) = world.enqueue(&prefix, "first", &wait);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("[3, 3], their ids in"), "{log}");

    // The same labels and scores, from the matrix and its ids.
    let (ids, rescored) = (world.text("out.ids.txt"), world.text("rescored.jsonl"));
    let (code, _, log) = world.setup.run(&[
        "classes",
        "rescore",
        "--embeddings",
        &matrix,
        "--ids",
        &ids,
        "--classes",
        "colours@1",
        "--out",
        &rescored,
        "--top-k",
        "2",
    ]);
    assert_eq!(code, 0, "{log}");
    let program = r#"
import json, pandas as pd
frame = pd.read_parquet("out.parquet").set_index("uri")
lines = [json.loads(line) for line in open("rescored.jsonl")]
assert len(frame) == 4 and len(lines) == 3
for line in lines:
    row = frame.loc[line["uri"]]
    assert row["label"] == line["label"] and abs(row["score"] - line["score"]) < 1e-6, (row, line)
    assert [t["label"] for t in row["top"]] == [t["label"] for t in line["top"]]
print(sorted(frame.index[frame["error"].notna()]))

# Lists as others write them.
uris = list(frame.index)
pd.DataFrame({"n": range(4), "uri": pd.Categorical(uris), "id": range(7, 11)}).to_parquet("dictionary.parquet")
import pyarrow as pa, pyarrow.parquet as pq
large = pa.table({"uri": pa.array(uris, pa.large_string())})
pq.write_table(large, "large.parquet", compression="gzip")
pq.write_table(large, "small.parquet", version="1.0", compression="none", row_group_size=1)
pq.write_table(large, "zstd.parquet", compression="zstd")
pq.write_table(pa.table({"uri": uris[:2] + [None]}), "null.parquet")
pq.write_table(pa.table({"url": uris}), "url.parquet")
pq.write_table(pa.table({"uri": [1, 2]}), "number.parquet")
"#;
    assert_eq!(world.python(program), format!("['{broken}']\n"));
    for list in ["out.parquet", "dictionary.parquet", "large.parquet", "small.parquet"] {
        let (code, told, log) = world.enqueue(&world.text(list), "again", &["--dry-run", "--json"]);
        assert_eq!(code, 0, "{list}: {log}");
        let plan: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(plan["images"], 4, "{list}");
        let first = plan["first"].as_array().unwrap();
        assert!(images.iter().chain([&broken]).all(|uri| first.contains(&json!(uri))), "{plan}");
    }
    for (list, words) in [
        ("zstd.parquet", "column `uri` is compressed with ZSTD"),
        ("null.parquet", "null.parquet, row 3: `uri` is null"),
        ("url.parquet", "url.parquet has no column `uri`, but url"),
        ("number.parquet", "column `uri` is of Int64, not of strings"),
    ] {
        let (code, _, log) = world.enqueue(&world.text(list), "again", &["--dry-run"]);
        assert_eq!(code, 1, "{list}: {log}");
        assert!(log.contains(words), "{list}: {log}");
    }
    // From S3, and through a pipe; sent and classified anew, with the ids of the list.
    let bytes = std::fs::read(world.path("dictionary.parquet")).unwrap();
    let listed = bucket.put("lists/dictionary.parquet", bytes.clone()).await;
    let (code, _, log) =
        world.enqueue(&listed, "second", &["--wait", "--out", &world.text("second.parquet")]);
    assert_eq!(code, 0, "{log}");
    let dry = ["--format", "parquet", "--dry-run", "--json"];
    let arguments = ["enqueue", "-", "--classes", "colours@1", "--run", "piped"];
    let mut command = world.setup.command(&[&arguments[..], &dry].concat());
    let mut piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    piped.stdin.take().unwrap().write_all(&bytes).unwrap();
    let told = piped.wait_with_output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&told.stdout).unwrap()["images"], 4);
    let program = r#"
import pandas as pd
one, two = (pd.read_parquet(f"{name}.parquet").set_index("uri").sort_index() for name in ("out", "second"))
assert (one["label"].astype(object).fillna("") == two["label"].astype(object).fillna("")).all()
assert "embedding" in one and "embedding" not in two
print(sorted(two["id"]))
"#;
    assert_eq!(world.python(program), "['10', '7', '8', '9']\n");
}
