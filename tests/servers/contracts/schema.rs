//! Schemas, their validator, and documents of every kind to try on both.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::support::{repository, var};

/// A schema by the name of its file.
pub struct Schema {
    path: std::path::PathBuf,
    pub json: Value,
}

impl Schema {
    pub fn read(name: &str) -> Self {
        let path = repository("docs/schemas").join(name);
        let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        Self { path, json }
    }

    /// What the validator says of each text: none if it is valid.
    pub fn verdicts(&self, texts: &[String]) -> Vec<Option<String>> {
        let mut validator = Command::new(var("ANGLER_TEST_PYTHON"))
            .arg(repository("tests/servers/contracts/validate.py"))
            .arg(&self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It reads all of it before it writes.
        let texts = serde_json::to_vec(texts).unwrap();
        validator.stdin.take().unwrap().write_all(&texts).unwrap();
        let output = validator.wait_with_output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Fails unless all of them are valid.
    pub fn accepts(&self, values: &[Value]) {
        let texts: Vec<String> = values.iter().map(Value::to_string).collect();
        for (verdict, text) in self.verdicts(&texts).iter().zip(&texts) {
            assert_eq!(*verdict, None, "{text}");
        }
    }

    /// Fails if one of them is valid.
    pub fn refuses(&self, values: &[Value]) {
        let texts: Vec<String> = values.iter().map(Value::to_string).collect();
        for (verdict, text) in self.verdicts(&texts).iter().zip(&texts) {
            assert!(verdict.is_some(), "{text}");
        }
    }

    /// The fields that an object may have which stands at this place of the schema.
    pub fn fields(&self, pointer: &str) -> BTreeSet<String> {
        let properties = self.json.pointer(pointer).unwrap()["properties"].as_object().unwrap();
        properties
            .iter()
            .filter(|(_, schema)| **schema != false)
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// The texts that are allowed at this place.
    pub fn codes(&self, pointer: &str) -> BTreeSet<String> {
        let codes = self.json.pointer(pointer).unwrap()["enum"].as_array().unwrap();
        codes.iter().map(|code| code.as_str().unwrap().to_owned()).collect()
    }
}

/// An object's keys.
pub fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

/// The names that a type knows where `json` has one that no type knows. They are in serde's error, which is generated from
/// the type: so a variant that is added is here too.
pub fn names<T: DeserializeOwned>(json: Value) -> BTreeSet<String> {
    let error =
        serde_json::from_value::<T>(json).err().expect("nobody has such a name").to_string();
    let (_, names) = error.split_once("expected ").expect(&error);
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The document with each of its parts removed, replaced by values of every kind, and given a field of the future.
pub fn mutants(document: &Value) -> Vec<Value> {
    let mut places = Vec::new();
    collect(document, String::new(), &mut places);
    let mut all = Vec::new();
    for place in &places {
        for value in values() {
            let mut mutant = document.clone();
            *mutant.pointer_mut(place).unwrap() = value;
            all.push(mutant);
        }
        let mut more = document.clone();
        if let Some(object) = more.pointer_mut(place).and_then(Value::as_object_mut) {
            object.insert("from_the_future".to_owned(), json!({"a": [1, null]}));
            all.push(more);
        }
        let Some((parent, key)) = place.rsplit_once('/') else { continue };
        let mut less = document.clone();
        match less.pointer_mut(parent).unwrap() {
            Value::Object(object) => drop(object.remove(key)),
            Value::Array(array) => drop(array.remove(key.parse().unwrap())),
            _ => unreachable!("only these have parts"),
        }
        all.push(less);
    }
    all
}

fn collect(value: &Value, place: String, places: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (key, part) in object {
                collect(part, format!("{place}/{key}"), places);
            }
        }
        Value::Array(array) => {
            for (index, part) in array.iter().enumerate() {
                collect(part, format!("{place}/{index}"), places);
            }
        }
        _ => {}
    }
    places.push(place);
}

/// Values of every kind, at the limits and beyond. No whole number is written with a decimal point: there a schema and the
/// parser differ, and the schema's description says so.
fn values() -> Vec<Value> {
    let texts = [
        "",
        " ",
        "x",
        "s3://b/k",
        "bottles",
        "bottles@7",
        "A-Z_0.9@v.1",
        "a@",
        "@a",
        "a@b@c",
        ".",
        "..",
        "...",
        ".@a",
        "a@.",
        "a@..",
        "a@...",
        "..a",
        "a/b",
        "bottles\n",
        "bottles@7\n",
        "a\r",
        "ü",
        "done",
        "failed",
        "internal",
        "AACAPw==",
        "AAA=",
        "2026-01-31T12:00:00.000Z",
        "yesterday",
    ];
    let mut values: Vec<Value> = texts.into_iter().map(|text| json!(text)).collect();
    for (unit, count) in
        [("x", 64), ("x", 65), ("ü", 64), ("x", 200), ("x", 201), ("ü", 200), ("ü", 201)]
    {
        values.push(json!(unit.repeat(count)));
    }
    values.push(json!(format!("{0}@{0}", "x".repeat(64))));
    values.push(json!(format!("a@{}", "x".repeat(65))));
    values.extend([
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(-1),
        json!(2),
        json!(-2),
        json!(100),
        json!(101),
        json!(0.5),
        json!(-0.75),
        json!(1.5),
        json!(1e-30),
        json!(u64::from(u32::MAX)),
        json!(u64::MAX),
        json!(1e30),
        json!([]),
        json!({}),
        json!([[]]),
        json!([null]),
        json!([1]),
        json!(["s3://b/k"]),
        json!(["s3://b/k", 7]),
        json!([{"uri": "u"}, {"uri": "u", "id": null}, {"uri": "u", "id": "i"}]),
        json!([{"id": "i"}]),
        json!([{"uri": "u", "id": 7}]),
        json!({"uri": "u"}),
        json!({"uri": "u", "id": "i"}),
        json!({"id": "r", "jobs": 1, "index": 0}),
        json!({"id": "r", "jobs": 1}),
        json!(["r", 1, 0]),
        json!({"code": "internal", "message": "m"}),
        json!({"code": "malformed_job", "message": "m"}),
        json!(vec!["s3://b/k"; 1000]),
        json!(vec!["s3://b/k"; 1001]),
    ]);
    values
}
