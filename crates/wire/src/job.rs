//! The wire format, version 1: what a job and a result look like as JSON.
//!
//! Unknown fields are ignored on read, so that old workers accept newer jobs. Everything else is
//! checked here, once; the rest of the code trusts a [`Job`].

mod embedding;
mod image;
mod object;

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Failure, FailureCode, ImageError};
pub use crate::job::embedding::{Embedding, decode_embedding};
use crate::job::object::Object;
use crate::text::cut;

/// AMQP property `type` of a job.
pub const JOB_TYPE: &str = "classify.v1";
/// AMQP property `type` of a result.
pub const RESULT_TYPE: &str = "classify.result.v1";

/// The most classes that a job may ask to be listed for an image.
pub const MAX_TOP_K: usize = 100;
/// The longest job id, in characters.
pub const MAX_ID_CHARS: usize = 200;

/// One job: one or more images to classify against one version of one class set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    /// 1 to 200 characters; echoed in the result.
    pub id: String,
    /// At least one.
    pub images: Vec<ImageRef>,
    /// `set` or `set@version`.
    pub classes: ClassSelector,
    /// How many of the best classes are listed for each image, 1 to 100.
    pub top_k: usize,
    /// Below it an image's label is null; none: the class set's own threshold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_score: Option<f32>,
    /// Whether each image's normalised embedding comes back.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub embeddings: bool,
    /// The bulk run that the job belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<Run>,
}

/// One image of a job: written as a bare URI, or as `{uri, id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageRef {
    /// Where the image lies, for example `s3://photos/a.jpg`.
    pub uri: String,
    /// The producer's own name for it; echoed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// The bulk run that a job belongs to; echoed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The run's name.
    pub id: String,
    /// How many jobs the run has.
    pub jobs: u64,
    /// Which of them this one is, from 0.
    pub index: u64,
    /// Tells this run from others that had the same id before. `None` if the producer does not
    /// distinguish them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
}

impl Run {
    /// Its name for log lines and spans: the wire gives it no bound but the message's.
    pub fn shown(&self) -> String {
        cut(&self.id, MAX_ID_CHARS)
    }
}

/// Limits that a message must keep.
#[derive(Debug, Clone, Copy)]
pub struct JobLimits {
    /// The most images in a job.
    pub images: usize,
    /// The largest message, in bytes.
    pub message_bytes: usize,
}

/// What a message says before it is checked. `serde` fills it; [`Job::parse`] judges it.
#[derive(Deserialize)]
struct Draft {
    id: Option<String>,
    images: Vec<ImageRef>,
    classes: String,
    #[serde(default = "one")]
    top_k: u64,
    min_score: Option<f32>,
    #[serde(default)]
    embeddings: bool,
    #[serde(default, deserialize_with = "run")]
    run: Option<Run>,
}

fn one() -> u64 {
    1
}

fn run<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Run>, D::Error> {
    let run = Option::<Object<Run>>::deserialize(deserializer)?;
    Ok(run.map(|Object(run)| run))
}

impl Job {
    /// Reads a job from a message body.
    ///
    /// `message_id` is the AMQP property that stands in for a missing `id`.
    ///
    /// # Errors
    /// `malformed_job` or `too_many_images`, with the place in the message where that is known.
    pub fn parse(
        body: &[u8],
        message_id: Option<&str>,
        limits: JobLimits,
    ) -> Result<Self, Failure> {
        if body.len() > limits.message_bytes {
            return Err(malformed(format!(
                "the message has {} bytes, the limit is {} (limits.message_bytes)",
                body.len(),
                limits.message_bytes
            )));
        }
        let Object(draft) = serde_json::from_slice::<Object<Draft>>(body)
            .map_err(|e| malformed(format!("the message is not a job: {e}")))?;
        let id = draft.id.or_else(|| message_id.map(str::to_owned)).ok_or_else(|| {
            malformed("the job has neither an `id` nor a message_id property".to_owned())
        })?;
        if id.is_empty() || id.chars().count() > MAX_ID_CHARS {
            return Err(malformed(format!("`id` must have 1 to {MAX_ID_CHARS} characters")));
        }
        if draft.images.is_empty() {
            return Err(malformed("`images` is empty".to_owned()));
        }
        if draft.images.len() > limits.images {
            return Err(Failure::new(
                FailureCode::TooManyImages,
                format!(
                    "the job has {} images, the limit is {} (limits.images_per_job): split it",
                    draft.images.len(),
                    limits.images
                ),
            ));
        }
        let classes = ClassSelector::parse(&draft.classes)
            .map_err(|e| malformed(format!("`classes`: {e}")))?;
        let top_k = usize::try_from(draft.top_k)
            .ok()
            .filter(|k| (1..=MAX_TOP_K).contains(k))
            .ok_or_else(|| malformed(format!("`top_k` must be 1 to {MAX_TOP_K}")))?;
        if draft.min_score.is_some_and(|s| !(-1.0..=1.0).contains(&s)) {
            return Err(malformed(
                "`min_score` is a cosine similarity: it must lie in [-1, 1]".to_owned(),
            ));
        }
        Ok(Self {
            id,
            images: draft.images,
            classes,
            top_k,
            min_score: draft.min_score,
            embeddings: draft.embeddings,
            run: draft.run,
        })
    }
}

fn malformed(message: String) -> Failure {
    Failure::new(FailureCode::MalformedJob, message)
}

/// The id under which a message that is not a job gets its one result: the id that it carries if
/// any can be read, else one derived from its bytes, so that a second delivery of the same
/// message yields the same id.
pub fn id_of_malformed(body: &[u8], message_id: Option<&str>) -> String {
    #[derive(Deserialize)]
    struct OnlyId {
        id: String,
    }
    let fits = |id: &String| !id.is_empty() && id.chars().count() <= MAX_ID_CHARS;
    serde_json::from_slice::<OnlyId>(body)
        .ok()
        .map(|only| only.id)
        .or_else(|| message_id.map(str::to_owned))
        .filter(fits)
        .unwrap_or_else(|| {
            use sha2::{Digest, Sha256};
            format!("malformed-{}", &hex(&Sha256::digest(body))[..16])
        })
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A class set and, if pinned, one of its versions: `bottles` or `bottles@7`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClassSelector {
    /// The set's name.
    pub set: String,
    /// The pinned version; none: the version that is active when the job is admitted.
    pub version: Option<String>,
}

impl ClassSelector {
    /// Reads `set` or `set@version`.
    ///
    /// # Errors
    /// [`NameError`] if one of them is not a name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (set, version) = match text.split_once('@') {
            Some((set, version)) => (set, Some(version)),
            None => (text, None),
        };
        check_name(set)?;
        if let Some(version) = version {
            check_name(version)?;
        }
        Ok(Self { set: set.to_owned(), version: version.map(str::to_owned) })
    }
}

/// A name of a class set, or of a version, that cannot be one. Its text says what a name consists of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: 1 to 64 of letters, digits, '.', '_' and '-' (set or set@version)")]
pub struct NameError(String);

/// Checks a class set's name or a version's: `[A-Za-z0-9._-]{1,64}`, and not `.` or `..`, which
/// would be folders.
///
/// # Errors
/// [`NameError`] if it is not a name.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=64).contains(&name.len()) && name.chars().all(allowed) && name != "." && name != ".." {
        return Ok(());
    }
    Err(NameError(name.chars().take(80).collect()))
}

impl fmt::Display for ClassSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{}@{version}", self.set),
            None => f.write_str(&self.set),
        }
    }
}

impl Serialize for ClassSelector {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The one terminal result of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    /// The job's id.
    pub id: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The job's `run`, echoed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Run>,
    /// Which attempt produced this, from 1.
    pub attempt: u32,
    /// The worker's name.
    pub worker: String,
    /// RFC 3339, UTC, milliseconds.
    pub finished_at: String,
}

impl JobResult {
    /// The message's body.
    ///
    /// # Errors
    /// None that is known of: `serde_json` refuses nothing that a result holds.
    pub fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let mut body = Vec::with_capacity(self.likely_bytes());
        serde_json::to_writer(&mut body, self)?;
        Ok(body)
    }

    /// About as many bytes as its JSON has, rather too many: a buffer that grows is copied each
    /// time.
    fn likely_bytes(&self) -> usize {
        let images = match &self.outcome {
            Outcome::Done { images, .. } => images.as_slice(),
            Outcome::Failed { .. } => &[],
        };
        let of_entry = |entry: &ImageEntry| {
            let verdict = match &entry.verdict {
                Verdict::Failed { error } => error.message.len() + 64,
                Verdict::Labelled(classified) => {
                    let top = classified.top.iter().map(|best| best.label.len() + 36);
                    let embedding = classified.embedding.as_ref().map_or(0, |e| e.0.len() * 16 / 3);
                    classified.label.as_ref().map_or(4, String::len)
                        + top.sum::<usize>()
                        + embedding
                        + 96
                }
            };
            entry.uri.len() + entry.id.as_ref().map_or(0, String::len) + 24 + verdict
        };
        512 + self.id.len() + images.iter().map(of_entry).sum::<usize>()
    }
}

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    /// Every image has an entry, a label or an error, in the job's order.
    Done {
        /// What classified them.
        #[serde(flatten)]
        provenance: Provenance,
        /// One entry an image.
        images: Vec<ImageEntry>,
    },
    /// Nothing could be classified.
    Failed {
        /// Why.
        error: Failure,
    },
}

/// What a result needs to be reproduced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// `set@version`.
    pub classes: String,
    /// The model's fingerprint.
    pub model: String,
    /// The back end that executed, for example `onnxruntime-cuda`.
    pub backend: String,
}

/// One image's entry in a result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// As the job gave it.
    pub uri: String,
    /// As the job gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The label, or why there is none.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// A label with its score, or an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Verdict {
    /// This image could not be classified.
    Failed {
        /// Why.
        error: ImageError,
    },
    /// This image was classified.
    Labelled(Classified),
}

/// A classified image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Classified {
    /// The best class; null when its score is under the threshold.
    pub label: Option<String>,
    /// Cosine similarity of the best class, in [-1, 1].
    pub score: f32,
    /// By how much the best class beats the runner-up; absent in a set of one class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f32>,
    /// The best classes, best first, each once.
    pub top: Vec<LabelScore>,
    /// The normalised embedding, when the job asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Embedding>,
}

/// One label and its score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelScore {
    /// The class's label.
    pub label: String,
    /// Cosine similarity, in [-1, 1].
    pub score: f32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIMITS: JobLimits = JobLimits { images: 3, message_bytes: 10_000 };

    fn parse(value: serde_json::Value) -> Result<Job, Failure> {
        Job::parse(value.to_string().as_bytes(), None, LIMITS)
    }

    #[test]
    fn every_field_is_read_and_unknown_ones_are_ignored() {
        let job = parse(json!({
            "id": "nightly/000017",
            "images": ["s3://photos/a.jpg", {"uri": "s3://photos/b.jpg", "id": "sku-1", "x": 1}],
            "classes": "bottles@7", "top_k": 5, "min_score": 0.35, "embeddings": true,
            "run": {"id": "nightly", "jobs": 1563, "index": 17}, "from_the_future": {"a": [1]}
        }))
        .unwrap();
        assert_eq!(job.images[1].id.as_deref(), Some("sku-1"));
        assert_eq!(job.classes.to_string(), "bottles@7");
        assert_eq!((job.top_k, job.min_score, job.embeddings), (5, Some(0.35), true));
        assert_eq!(job.run.as_ref().map(|r| r.index), Some(17));
        // What the producer side writes is what the consumer side reads.
        let again = Job::parse(&serde_json::to_vec(&job).unwrap(), None, LIMITS).unwrap();
        assert_eq!(again, job);
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let job = Job::parse(br#"{"images":["s3://b/k"],"classes":"s"}"#, Some("m-1"), LIMITS);
        let job = job.unwrap();
        assert_eq!((job.id.as_str(), job.top_k, job.min_score), ("m-1", 1, None));
        assert!(!job.embeddings && job.run.is_none() && job.classes.version.is_none());
    }

    #[test]
    fn what_is_not_a_job_is_refused_with_the_reason() {
        let good = json!({"id": "j", "images": ["s3://b/k"], "classes": "s"});
        let with = |key: &str, value: serde_json::Value| {
            let mut job = good.clone();
            job[key] = value;
            job
        };
        for (job, word) in [
            (with("id", json!("")), "`id`"),
            (with("id", json!("x".repeat(201))), "`id`"),
            (with("images", json!([])), "`images`"),
            (with("images", json!([7])), "an image is a URI"),
            (with("classes", json!("../etc")), "not a name"),
            (with("classes", json!("s@..")), "not a name"),
            (with("classes", json!("s@1@2")), "not a name"),
            (with("top_k", json!(0)), "`top_k`"),
            (with("top_k", json!(101)), "`top_k`"),
            (with("top_k", json!(-1)), "not a job"),
            (with("min_score", json!(1.5)), "`min_score`"),
            (json!({"id": "j", "classes": "s"}), "images"),
            (json!({"images": ["s3://b/k"], "classes": "s"}), "neither"),
            (json!([1, 2]), "not a job"),
        ] {
            let failure = parse(job.clone()).expect_err(&job.to_string());
            assert_eq!(failure.code, FailureCode::MalformedJob, "{job}");
            assert!(failure.message.contains(word), "{job}: {failure}");
        }
        let many = parse(with("images", json!(vec!["s3://b/k"; 4]))).unwrap_err();
        assert_eq!(many.code, FailureCode::TooManyImages);
        let long = Job::parse(&[b' '; 10_001], None, LIMITS).unwrap_err();
        assert!(long.message.contains("message_bytes"), "{long}");
    }

    #[test]
    fn fields_in_their_order_are_no_object() {
        for body in [
            r#"["j", ["s3://b/k"], "s", 1, null, false, null]"#,
            r#"{"id": "j", "images": ["s3://b/k"], "classes": "s", "run": ["nightly", 1, 0]}"#,
        ] {
            let failure = Job::parse(body.as_bytes(), None, LIMITS).expect_err(body);
            assert!(failure.message.contains("expected an object"), "{failure}");
        }
    }

    #[test]
    fn bytes_that_are_not_json_never_panic() {
        for body in [&b"\xff\xfe"[..], b"", b"{", "[".repeat(5_000).as_bytes()] {
            let failure = Job::parse(body, Some("m"), LIMITS).unwrap_err();
            assert_eq!(failure.code, FailureCode::MalformedJob);
        }
    }

    #[test]
    fn a_message_that_is_no_job_still_has_one_id() {
        assert_eq!(id_of_malformed(br#"{"id":"j","images":7}"#, Some("m")), "j");
        assert_eq!(id_of_malformed(b"garbage", Some("m")), "m");
        let id = id_of_malformed(b"garbage", None);
        assert!(id.starts_with("malformed-") && id == id_of_malformed(b"garbage", None));
        assert_ne!(id, id_of_malformed(b"garbage!", None));
    }

    #[test]
    fn a_result_has_the_shape_of_the_contract() {
        let entry = |uri: &str, verdict| ImageEntry { uri: uri.into(), id: None, verdict };
        let result = JobResult {
            id: "j".into(),
            outcome: Outcome::Done {
                provenance: Provenance {
                    classes: "s@7".into(),
                    model: "m@0".into(),
                    backend: "tract-cpu".into(),
                },
                images: vec![
                    entry(
                        "a",
                        Verdict::Labelled(Classified {
                            label: None,
                            score: 0.25,
                            margin: Some(0.125),
                            top: vec![LabelScore { label: "cola".into(), score: 0.25 }],
                            embedding: None,
                        }),
                    ),
                    entry(
                        "b",
                        Verdict::Failed {
                            error: ImageError::new(crate::error::ImageErrorCode::NotFound, "gone"),
                        },
                    ),
                ],
            },
            run: None,
            attempt: 1,
            worker: "w".into(),
            finished_at: "2026-01-31T12:00:00.000Z".into(),
        };
        let value = serde_json::to_value(&result).unwrap();
        assert_eq!(
            value,
            json!({
                "id": "j", "status": "done", "classes": "s@7", "model": "m@0",
                "backend": "tract-cpu",
                "images": [
                    {"uri": "a", "label": null, "score": 0.25, "margin": 0.125,
                     "top": [{"label": "cola", "score": 0.25}]},
                    {"uri": "b", "error": {"code": "not_found", "message": "gone"}},
                ],
                "attempt": 1, "worker": "w", "finished_at": "2026-01-31T12:00:00.000Z",
            })
        );
        assert_eq!(serde_json::from_value::<JobResult>(value).unwrap(), result);
    }

    #[test]
    fn a_results_body_is_written_into_a_buffer_that_need_not_grow() {
        let labelled = Classified {
            label: Some("cola".into()),
            score: -0.831_234_5,
            margin: Some(0.000_123_456_7),
            top: vec![LabelScore { label: "cola".into(), score: -0.831_234_5 }; 100],
            embedding: Some(Embedding(vec![-0.123; 1280])),
        };
        let error = ImageError::new(crate::error::ImageErrorCode::StorageUnavailable, "gone");
        for (verdict, count) in [
            (Verdict::Labelled(labelled.clone()), 30),
            (Verdict::Labelled(Classified { top: vec![], embedding: None, ..labelled }), 1000),
            (Verdict::Failed { error }, 1000),
        ] {
            let entry =
                ImageEntry { uri: "s3://photos/a.jpg".into(), id: Some("sku-1".into()), verdict };
            let provenance = Provenance {
                classes: "bottles@7".into(),
                model: "efficientnet-lite0@3f2a9c1b04de".into(),
                backend: "onnxruntime-tensorrt".into(),
            };
            let result = JobResult {
                id: "nightly/000017".into(),
                outcome: Outcome::Done { provenance, images: vec![entry; count] },
                run: Some(Run {
                    id: "nightly".into(),
                    jobs: u64::MAX,
                    index: u64::MAX,
                    nonce: None,
                }),
                attempt: u32::MAX,
                worker: "host-1".into(),
                finished_at: "2026-01-31T12:00:00.000Z".into(),
            };
            let body = result.to_json().unwrap();
            assert_eq!(body, serde_json::to_vec(&result).unwrap());
            let likely = result.likely_bytes();
            assert!((body.len()..2 * body.len()).contains(&likely), "{likely}, {}", body.len());
        }
    }
}
