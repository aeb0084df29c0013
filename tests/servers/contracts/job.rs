//! `docs/schemas/job.v1.json` and `Job`.

use serde_json::{Value, json};

use angler_wire::error::FailureCode;
use angler_wire::job::{
    ClassSelector, ImageRef, JOB_TYPE, Job, JobLimits, MAX_ID_CHARS, MAX_TOP_K, Run,
};

use crate::contracts::schema::{Schema, keys, mutants};

/// The limits of the default settings.
fn limits() -> JobLimits {
    let defaults: toml::Table = toml::from_str(angler::config::DEFAULTS).unwrap();
    let limit = |key: &str| usize::try_from(defaults["limits"][key].as_integer().unwrap()).unwrap();
    JobLimits { images: limit("images_per_job"), message_bytes: limit("message_bytes") }
}

fn schema() -> Schema {
    Schema::read("job.v1.json")
}

fn full_job() -> Job {
    let image =
        |uri: &str, id: Option<&str>| ImageRef { uri: uri.into(), id: id.map(str::to_owned) };
    Job {
        id: "nightly/000017".into(),
        images: vec![image("s3://photos/a.jpg", None), image("s3://photos/b.jpg", Some("sku-1"))],
        classes: ClassSelector::parse("bottles@7").unwrap(),
        top_k: 5,
        min_score: Some(0.25),
        embeddings: true,
        run: Some(Run {
            id: "nightly".into(),
            jobs: 1563,
            index: 17,
            nonce: Some("4f1d09a3c2be".into()),
        }),
    }
}

#[test]
fn the_schema_accepts_the_messages_that_the_worker_accepts_and_no_others() {
    let schema = schema();
    let mut texts: Vec<String> =
        ["", "{", "nonsense", "NaN", "7", "null", "\"job\"", "[]"].map(str::to_owned).to_vec();
    // The fields in their order, which is no object.
    texts.push(r#"["j", ["s3://b/k"], "s", 1, null, false, null]"#.to_owned());
    let mut documents: Vec<Value> = schema.json["examples"].as_array().unwrap().clone();
    documents.push(json!({"images": ["s3://b/k"], "classes": "s"}));
    documents.push(json!({"id": null, "images": [{"uri": ""}], "classes": "s", "min_score": null, "run": null}));
    documents.push(serde_json::to_value(full_job()).unwrap());
    for document in &documents {
        texts.extend(mutants(document).iter().map(Value::to_string));
    }
    let good = texts.len();
    texts.extend(documents.iter().map(Value::to_string));
    let verdicts = schema.verdicts(&texts);
    let (mut accepted, mut refused) = (0, 0);
    for (number, (text, verdict)) in texts.iter().zip(verdicts).enumerate() {
        let shown: String = text.chars().take(500).collect();
        match (Job::parse(text.as_bytes(), Some("m-1"), limits()), verdict) {
            (Ok(_), None) => accepted += 1,
            (Err(_), Some(_)) if number < good => refused += 1,
            (Ok(_), Some(wrong)) => panic!("the schema alone refuses it: {wrong}\n{shown}"),
            (Err(wrong), None) => panic!("the worker alone refuses it: {wrong}\n{shown}"),
            (Err(wrong), Some(_)) => panic!("no job: {wrong}\n{shown}"),
        }
    }
    assert!(accepted > 200 && refused > 1000, "{accepted} accepted, {refused} refused");
}

#[test]
fn what_a_schema_cannot_say_is_in_its_description() {
    let schema = schema();
    let description = schema.json["description"].as_str().unwrap();
    let large = format!(
        r#"{{"id": "j", "images": ["s3://b/k"], "classes": "s", "x": "{}"}}"#,
        "x".repeat(4 << 20)
    );
    for (words, text) in [
        ("message_id", r#"{"images": ["s3://b/k"], "classes": "s"}"#),
        (
            "no key may stand twice",
            r#"{"id": "j", "id": "j", "images": ["s3://b/k"], "classes": "s"}"#,
        ),
        ("5, not 5.0", r#"{"id": "j", "images": ["s3://b/k"], "classes": "s", "top_k": 5.0}"#),
        ("4 MiB", &large),
    ] {
        assert!(description.contains(words), "{words}");
        assert_eq!(schema.verdicts(&[text.to_owned()]), [None], "{words}");
        let failure = Job::parse(text.as_bytes(), None, limits()).expect_err(words);
        assert_eq!(failure.code, FailureCode::MalformedJob);
    }
}

#[test]
fn every_field_of_a_job_is_in_the_schema_and_no_other() {
    let (schema, job) = (schema(), serde_json::to_value(full_job()).unwrap());
    assert_eq!(schema.fields(""), keys(&job));
    assert_eq!(schema.fields("/$defs/image"), keys(&job["images"][1]));
    assert_eq!(schema.fields("/$defs/run"), keys(&job["run"]));
}

#[test]
fn names_and_limits_are_those_of_the_code() {
    let Schema { json, .. } = schema();
    assert_eq!(json["$id"], format!("urn:angler:{JOB_TYPE}"));
    let fields = &json["properties"];
    assert_eq!(fields["id"]["maxLength"], MAX_ID_CHARS);
    assert_eq!(fields["top_k"]["maximum"], MAX_TOP_K);
    assert_eq!(fields["images"]["maxItems"], limits().images);
    // Defaults are those of a job that names none.
    let job = Job::parse(br#"{"images":["s3://b/k"],"classes":"s"}"#, Some("m"), limits()).unwrap();
    assert_eq!(fields["top_k"]["default"], job.top_k);
    assert_eq!(fields["embeddings"]["default"], job.embeddings);
}
