//! Jobs and results as they are on the wire.

use serde_json::json;

use angler_wire::job::{
    Classified, ImageEntry, JobResult, LabelScore, Outcome, Provenance, Verdict,
};

/// The message body of a job.
pub fn job<'a>(id: &str, classes: &str, uris: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    let images: Vec<&str> = uris.into_iter().collect();
    json!({ "id": id, "images": images, "classes": classes }).to_string().into_bytes()
}

/// A result in which every image has one label: what a job without further wishes gets.
pub fn result<'a>(id: &str, classes: &str, uris: impl IntoIterator<Item = &'a str>) -> JobResult {
    let entry = |uri: &str| ImageEntry {
        uri: uri.to_owned(),
        id: None,
        verdict: Verdict::Labelled(Classified {
            label: Some("class-000007".to_owned()),
            score: 0.712_345_6,
            margin: Some(0.071_234_5),
            top: vec![LabelScore { label: "class-000007".to_owned(), score: 0.712_345_6 }],
            embedding: None,
        }),
    };
    JobResult {
        id: id.to_owned(),
        outcome: Outcome::Done {
            provenance: Provenance {
                classes: classes.to_owned(),
                model: "efficientnet-lite0@000000000000".to_owned(),
                backend: "onnxruntime-cuda".to_owned(),
            },
            images: uris.into_iter().map(entry).collect(),
        },
        run: None,
        attempt: 1,
        worker: "worker-7d9c5b6f4-x2x8k".to_owned(),
        finished_at: "2026-01-31T12:00:00.000Z".to_owned(),
    }
}
