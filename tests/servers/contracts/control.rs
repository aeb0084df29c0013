//! `docs/schemas/control.v1.json` and what workers hear.

use serde_json::{Value, json};

use angler_wire::control::{REQUEST_TYPE, Request};

use crate::contracts::schema::{Schema, keys, mutants, names};

#[test]
fn the_schema_of_requests_accepts_what_workers_understand_and_no_others() {
    let schema = Schema::read("control.v1.json");
    assert_eq!(schema.json["$id"], format!("urn:angler:{REQUEST_TYPE}"));
    assert_eq!(schema.codes("/properties/kind"), names::<Request>(json!({"kind": "no_such_kind"})));
    let activated = Request::Activated { set: "bottles".into(), version: "8".into() };
    let losses = Request::Losses { job: "nightly/000017".into(), stamp: String::new() };
    let requests = [activated, losses, Request::Status, Request::Shadow]
        .map(|request| serde_json::to_value(request).unwrap());
    for (place, request) in requests[..2].iter().enumerate() {
        let own = schema.fields(&format!("/allOf/{place}/then"));
        assert_eq!(&schema.fields("") | &own, keys(request));
    }
    let mut all = schema.json["examples"].as_array().unwrap().clone();
    all.extend(requests);
    schema.accepts(&all);
    let texts: Vec<String> =
        all.iter().flat_map(mutants).map(|value: Value| value.to_string()).collect();
    for (text, verdict) in texts.iter().zip(schema.verdicts(&texts)) {
        assert_eq!(
            serde_json::from_str::<Request>(text).is_ok(),
            verdict.is_none(),
            "{verdict:?}: {text}"
        );
    }
}
