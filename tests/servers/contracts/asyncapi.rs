//! `docs/asyncapi.yaml`, the code, and AsyncAPI's own parser.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use angler_amqp::topology::Topology;
use angler_wire::control::REQUEST_TYPE;
use angler_wire::job::{JOB_TYPE, RESULT_TYPE};

use crate::support::{repository, var};

/// The document, by a YAML reader that makes JSON of it.
fn document() -> Value {
    let read = "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1], encoding='utf-8')), sys.stdout)";
    let output = Command::new(var("ANGLER_TEST_PYTHON"))
        .args(["-c", read])
        .arg(repository("docs/asyncapi.yaml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The topology of the default settings.
fn topology() -> Topology {
    let defaults: toml::Table = toml::from_str(angler::config::DEFAULTS).unwrap();
    let name = |key: &str| defaults["amqp"][key].as_str().unwrap().to_owned();
    let delays = defaults["retry"]["delays_seconds"].as_array().unwrap();
    let seconds = |value: &toml::Value| {
        Duration::from_secs(u64::try_from(value.as_integer().unwrap()).unwrap())
    };
    Topology {
        jobs: name("jobs_queue"),
        results: name("results_queue"),
        dead: name("dead_queue"),
        control_exchange: name("control_exchange"),
        retry_delays: delays.iter().map(seconds).collect(),
    }
}

/// Calls `visit` with each value of the document.
fn walk<'a>(value: &'a Value, visit: &mut impl FnMut(&'a Value)) {
    visit(value);
    match value {
        Value::Object(object) => object.values().for_each(|part| walk(part, visit)),
        Value::Array(array) => array.iter().for_each(|part| walk(part, visit)),
        _ => {}
    }
}

#[test]
fn asyncapis_own_parser_finds_nothing_wrong() {
    let output = Command::new(repository("tests/asyncapi.sh")).output().unwrap();
    let (text, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{errors}");
    assert!(text.starts_with("AsyncAPI 3.0.0: 8 channels"), "{text}{errors}");
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let mut references = Vec::new();
    walk(&document, &mut |value| {
        if let Some(reference) = value.get("$ref") {
            references.push(reference.as_str().unwrap());
        }
    });
    assert!(references.len() > 40, "only {} references were found", references.len());
    let mut files = BTreeSet::new();
    for reference in references {
        let (file, pointer) = reference.split_once('#').unwrap_or((reference, ""));
        if file.is_empty() {
            assert!(document.pointer(pointer).is_some(), "{reference}");
            continue;
        }
        let text = std::fs::read(repository("docs").join(file)).expect(reference);
        let schema: Value = serde_json::from_slice(&text).expect(reference);
        assert!(schema.pointer(pointer).is_some(), "{reference}");
        files.insert(file.trim_start_matches("./schemas/").to_owned());
    }
    let folder = std::fs::read_dir(repository("docs/schemas")).unwrap();
    let schemas: BTreeSet<String> =
        folder.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(files, schemas, "each schema is used");
}

#[test]
fn queues_and_exchange_are_those_of_the_default_settings() {
    let (document, topology) = (document(), topology());
    let channels = document["channels"].as_object().unwrap();
    let mut addresses = BTreeSet::new();
    for (key, channel) in channels {
        let Some(address) = channel["address"].as_str() else {
            assert_eq!(key, "reply");
            continue;
        };
        match channel["parameters"]["delay"]["enum"].as_array() {
            Some(delays) => {
                addresses.extend(
                    delays.iter().map(|delay| address.replace("{delay}", delay.as_str().unwrap())),
                );
            }
            None => {
                addresses.insert(address.to_owned());
                let binding = &channel["bindings"]["amqp"];
                let of =
                    if binding["is"] == "queue" { &binding["queue"] } else { &binding["exchange"] };
                assert_eq!(of["name"], address);
                assert_eq!(of["durable"], true, "{key}");
            }
        }
    }
    let mut expected: BTreeSet<String> =
        topology.retry_delays.iter().map(|delay| topology.retry_queue(*delay)).collect();
    expected.extend([topology.suspects_queue(), topology.undeliverable_queue()]);
    let exchange = topology.control_exchange.clone();
    expected.extend([topology.jobs, topology.results, topology.dead, topology.control_exchange]);
    assert_eq!(addresses, expected);
    let control = &channels["control"]["bindings"]["amqp"]["exchange"];
    assert_eq!(
        (control["name"].as_str(), control["type"].as_str()),
        (Some(exchange.as_str()), Some("fanout"))
    );
    let url = "amqp://guest:guest@127.0.0.1:5672/%2f";
    assert!(angler::config::DEFAULTS.contains(url), "the server's address is the default");
    assert!(url.contains(document["servers"]["broker"]["host"].as_str().unwrap()));
}

#[test]
fn message_types_are_those_of_the_code() {
    let document = document();
    for (message, kind) in [
        ("job", JOB_TYPE),
        ("retriedJob", JOB_TYPE),
        ("suspectJob", JOB_TYPE),
        ("deadJob", JOB_TYPE),
        ("result", RESULT_TYPE),
        ("control", REQUEST_TYPE),
    ] {
        let message = &document["components"]["messages"][message];
        assert_eq!(message["name"], kind);
        assert_eq!(message["bindings"]["amqp"]["messageType"], kind);
        assert_eq!(message["contentType"], "application/json");
        let properties = &message["x-amqp-properties"];
        let properties = match properties["$ref"].as_str() {
            Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
            None => properties,
        };
        assert_eq!(properties["properties"]["type"]["const"], kind);
    }
    let messages = document["components"]["messages"].as_object().unwrap();
    assert_eq!(messages.len(), 6);
}

#[test]
fn headers_are_those_that_the_code_writes_and_no_others() {
    let document = document();
    let mut documented = BTreeSet::new();
    walk(&document, &mut |value| {
        let keys = value.as_object().into_iter().flat_map(|object| object.keys());
        documented.extend(keys.filter(|key| key.starts_with("angler-")).cloned());
    });
    // As string literals in the files that publish.
    let mut written = BTreeSet::new();
    for file in [
        "crates/amqp/src/lib.rs",
        "crates/amqp/src/publisher.rs",
        "crates/amqp/src/sanitize.rs",
        "crates/amqp/src/sink.rs",
        "crates/amqp/src/source/settle.rs",
    ] {
        let source = std::fs::read_to_string(repository(file)).unwrap();
        let literals =
            source.split("\"angler-").skip(1).map(|rest| rest.split('"').next().unwrap());
        written.extend(literals.map(|rest| format!("angler-{rest}")));
    }
    assert_eq!(documented, written);
}
