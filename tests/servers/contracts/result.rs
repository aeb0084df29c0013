//! `docs/schemas/result.v1.json` and `JobResult`.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use strum::VariantNames;

use angler_wire::error::{Failure, FailureCode, ImageError, ImageErrorCode};
use angler_wire::job::{
    Classified, Embedding, ImageEntry, JobResult, LabelScore, MAX_ID_CHARS, MAX_TOP_K, Outcome,
    Provenance, RESULT_TYPE, Run, Verdict,
};

use crate::contracts::schema::{Schema, keys, mutants, names};
use crate::support::{Broker, Bucket, Setup, repository, tiny};

fn schema() -> Schema {
    Schema::read("result.v1.json")
}

/// The codes of a type, as the type itself reads them.
fn codes<T: DeserializeOwned>() -> Vec<T> {
    names::<T>(json!("no_such_code"))
        .into_iter()
        .map(|code| serde_json::from_value(json!(code)).unwrap())
        .collect()
}

fn labelled(label: Option<&str>, margin: Option<f32>, embedding: Option<Vec<f32>>) -> Verdict {
    let best = |label: &str, score| LabelScore { label: label.into(), score };
    Verdict::Labelled(Classified {
        label: label.map(str::to_owned),
        score: 0.831_234_5,
        margin,
        top: vec![best("cola", 0.831_234_5), best("Limonade für alle", -1.0)],
        embedding: embedding.map(Embedding),
    })
}

fn result(outcome: Outcome) -> JobResult {
    JobResult {
        id: "nightly/000017".into(),
        outcome,
        run: Some(Run {
            id: "nightly".into(),
            jobs: u64::MAX,
            index: 17,
            nonce: Some("4f1d09a3c2be".into()),
        }),
        attempt: 1,
        worker: "host-1".into(),
        finished_at: humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string(),
    }
}

fn done(verdicts: Vec<Verdict>) -> JobResult {
    let entry = |(number, verdict)| ImageEntry {
        uri: format!("s3://photos/{number}.jpg"),
        id: (number % 2 == 0).then(|| format!("sku-{number}")),
        verdict,
    };
    result(Outcome::Done {
        provenance: Provenance {
            classes: "bottles@7".into(),
            model: "efficientnet-lite0@7d359614179e".into(),
            backend: "onnxruntime-cuda".into(),
        },
        images: verdicts.into_iter().enumerate().map(entry).collect(),
    })
}

/// Results of every shape.
fn results() -> Vec<JobResult> {
    let mut verdicts = vec![
        labelled(Some("cola"), Some(0.0), None),
        labelled(None, Some(1.831_234_5), None),
        labelled(Some(""), None, Some(vec![0.6, -0.8, 1e-30])),
    ];
    // A base64 text's end depends on the length.
    verdicts.extend((0..7).map(|dim| labelled(Some("cola"), None, Some(vec![-0.123; dim]))));
    let errors = codes::<ImageErrorCode>()
        .into_iter()
        .map(|code| Verdict::Failed { error: ImageError::new(code, "why") });
    verdicts.extend(errors);
    let failures = codes::<FailureCode>()
        .into_iter()
        .map(|code| result(Outcome::Failed { error: Failure::new(code, "why") }));
    let mut results: Vec<JobResult> = failures.collect();
    results.push(JobResult {
        run: None,
        attempt: u32::MAX,
        id: "ü".repeat(MAX_ID_CHARS),
        ..done(verdicts)
    });
    results.push(done(vec![labelled(Some("cola"), None, None)]));
    results
}

fn json_of(result: &JobResult) -> Value {
    serde_json::from_slice(&result.to_json().unwrap()).unwrap()
}

#[test]
fn every_result_that_angler_writes_is_valid() {
    let values: Vec<Value> = results().iter().map(json_of).collect();
    schema().accepts(&values);
}

#[test]
fn the_examples_of_the_schema_and_of_the_readme_are_results_and_valid() {
    let schema = schema();
    let mut examples = schema.json["examples"].as_array().unwrap().clone();
    let readme = std::fs::read_to_string(repository("README.md")).unwrap();
    let blocks = readme.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    examples.extend(
        blocks
            .map(|block| serde_json::from_str(block).unwrap())
            .filter(|block: &Value| block["status"] == "done"),
    );
    assert!(examples.len() >= 3, "the README shows a result");
    schema.accepts(&examples);
    for example in examples {
        let result: JobResult = serde_json::from_value(example.clone()).unwrap();
        let again = json_of(&result);
        assert_eq!(keys(&again), keys(&example));
    }
}

#[test]
fn what_the_schema_accepts_can_be_read_and_nonsense_is_not_accepted() {
    let schema = schema();
    let mut texts = Vec::new();
    let verdicts = vec![
        labelled(Some("cola"), Some(0.125), Some(vec![1.0])),
        Verdict::Failed { error: ImageError::new(ImageErrorCode::NotFound, "gone") },
    ];
    let failed = result(Outcome::Failed { error: Failure::new(FailureCode::ModelMismatch, "why") });
    for result in [done(verdicts), failed] {
        texts.extend(mutants(&json_of(&result)).iter().map(Value::to_string));
    }
    let verdicts = schema.verdicts(&texts);
    let mut accepted = 0;
    for (text, _) in texts.iter().zip(&verdicts).filter(|(_, verdict)| verdict.is_none()) {
        let read = serde_json::from_str::<JobResult>(text);
        assert!(read.is_ok(), "{read:?}: {text}");
        accepted += 1;
    }
    assert!(accepted > 100 && accepted < texts.len() / 2, "{accepted} of {}", texts.len());

    let with = |pointer: &str, key: &str, value: Value| {
        let mut result = json_of(&results().pop().unwrap());
        result.pointer_mut(pointer).unwrap()[key] = value;
        result
    };
    schema.refuses(&[
        with("", "status", json!("failed")),
        with("", "status", json!("half-done")),
        with("", "error", json!({"code": "internal", "message": "both"})),
        with("", "images", json!([])),
        with("", "classes", json!("bottles")),
        with("", "attempt", json!(0)),
        with("", "finished_at", json!("2026-01-31 12:00")),
        with("/images/0", "error", json!({"code": "internal", "message": "both"})),
        with("/images/0", "score", json!(1.5)),
        with("/images/0", "margin", json!(-0.5)),
        with("/images/0", "top", json!([])),
        with("/images/0", "embedding", json!("AAA=")),
        with("/images/0", "embedding", json!("not base64")),
    ]);
}

#[test]
fn codes_and_statuses_are_those_of_the_code_and_no_others() {
    let schema = schema();
    let code = "/properties/code";
    let image_errors = names::<ImageErrorCode>(json!("no_such_code"));
    assert_eq!(schema.codes(&format!("/$defs/image_error{code}")), image_errors);
    let failures = names::<FailureCode>(json!("no_such_code"));
    assert_eq!(schema.codes(&format!("/$defs/failure{code}")), failures);
    assert_eq!(
        schema.codes("/properties/status"),
        names::<Outcome>(json!({"status": "no_such_status"}))
    );
    // Each is explained.
    for (definition, codes) in [("image_error", image_errors), ("failure", failures)] {
        let place = format!("/$defs/{definition}{code}/description");
        let description = schema.json.pointer(&place).unwrap().as_str().unwrap();
        for code in codes {
            assert!(description.contains(&format!("{code}: ")), "{code}");
        }
    }
}

#[test]
fn every_field_of_a_result_is_in_the_schema_and_no_other() {
    let schema = schema();
    let verdicts = vec![
        labelled(Some("cola"), Some(0.125), Some(vec![1.0])),
        Verdict::Failed { error: ImageError::new(ImageErrorCode::NotFound, "gone") },
    ];
    let done = json_of(&done(verdicts));
    let failed = json_of(&results()[0]);
    let common = schema.fields("");
    for (result, own) in [(&done, "/$defs/done"), (&failed, "/$defs/failed")] {
        assert_eq!(&common | &schema.fields(own), keys(result), "{own}");
    }
    let entry = schema.fields("/$defs/entry");
    assert_eq!(&entry | &schema.fields("/$defs/labelled"), keys(&done["images"][0]));
    let mut unlabelled = keys(&done["images"][1]);
    unlabelled.insert("id".to_owned()); // The first one has it.
    assert_eq!(&entry | &schema.fields("/$defs/unlabelled"), unlabelled);
    let of_top = schema.fields("/$defs/labelled/properties/top/items");
    assert_eq!(of_top, keys(&done["images"][0]["top"][0]));
    assert_eq!(schema.fields("/$defs/image_error"), keys(&done["images"][1]["error"]));
    assert_eq!(schema.fields("/$defs/failure"), keys(&failed["error"]));
    assert_eq!(schema.fields("/$defs/run"), keys(&done["run"]));
}

#[test]
fn names_and_limits_are_those_of_the_code() {
    let Schema { json, .. } = schema();
    assert_eq!(json["$id"], format!("urn:angler:{RESULT_TYPE}"));
    assert_eq!(json["properties"]["id"]["maxLength"], MAX_ID_CHARS);
    assert_eq!(json["properties"]["attempt"]["maximum"], u32::MAX);
    assert_eq!(json["$defs"]["labelled"]["properties"]["top"]["maxItems"], MAX_TOP_K);
    // Jobs and results have one notion of a run.
    assert_eq!(json["$defs"]["run"], Schema::read("job.v1.json").json["$defs"]["run"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_a_real_worker_are_valid() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("colours")).unwrap();
    let version = root.path().join("colours/1.safetensors");
    std::fs::write(version, tiny::version("colours", "1")).unwrap();
    let broker = Broker::new().await;
    let images = tiny::images(&Bucket::new().await).await;
    let mut setup = Setup::worker(&broker, root.path().to_str().unwrap());
    setup.set("model.path", tiny::MODEL);
    let _worker = setup.start().await;
    let client = broker.connect().await;
    let mut results = client.consume("angler.results").await;
    let missing = format!("{}-missing", images[0]);
    let run = json!({"id": "nightly", "jobs": 4, "index": 0, "nonce": "4f1d09a3c2be"});
    let jobs = [
        json!({"id": "all", "classes": "colours@1", "images": images, "top_k": 3, "embeddings": true, "run": run}),
        json!({"id": "unknown", "classes": "colours@1", "images": [images[0]], "min_score": 1}),
        json!({"id": "errors", "classes": "colours@1", "images": [{"uri": missing, "id": "i"}, "file:///etc/passwd"]}),
        json!({"id": "no-set", "classes": "colors", "images": images}),
        json!({"id": "no-job", "classes": "colours@1"}),
    ];
    for job in &jobs {
        client.job(job).await;
    }
    let results = results.collect(jobs.len()).await;
    let bodies: Vec<Value> = results.into_values().map(|result| result.body).collect();
    schema().accepts(&bodies);
    let of = |id: &str| bodies.iter().find(|body| body["id"] == id).unwrap();
    assert!(of("all")["images"][2]["embedding"].is_string());
    assert_eq!(of("all")["run"], run, "echoed");
    assert!(of("unknown")["images"][0]["label"].is_null());
    assert_eq!(of("errors")["images"][1]["error"]["code"], "bad_uri");
    assert_eq!(of("no-set")["error"]["code"], "unknown_class_set");
    assert_eq!(of("no-job")["error"]["code"], "malformed_job");
}

#[test]
fn every_code_has_its_place_among_those_that_metrics_count() {
    let sorted = |names: &[&'static str]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        names
    };
    let read: Vec<_> = codes::<FailureCode>().into_iter().map(FailureCode::as_str).collect();
    assert_eq!(read, sorted(FailureCode::VARIANTS));
    let read: Vec<_> = codes::<ImageErrorCode>().into_iter().map(ImageErrorCode::as_str).collect();
    assert_eq!(read, sorted(ImageErrorCode::VARIANTS));
}
