//! A result as it is read from a run.
//!
//! Less is demanded than a worker writes ([`angler_wire::job::JobResult`]): what is not needed is passed over,
//! and an error's code is any text, since a newer worker may know more of them. What cannot be read even
//! so is still the answer to its job, and becomes a row of its own.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use angler_wire::job::{Classified, Provenance, Run};

/// Error code of a result that cannot be read.
pub const UNREADABLE: &str = "unreadable_result";

/// Characters of a reason that are told.
const REASON: usize = 300;

/// The most jobs a result can make us count, so that one that claims more does not exhaust memory.
const MOST_JOBS: u64 = 1 << 32;

/// Identifies a run among all that ever had its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunKey {
    /// The run's id.
    pub id: String,
    /// Tells it from earlier runs with the same id.
    pub nonce: String,
}

impl RunKey {
    /// Returns the job of this run that a result answers. `None` if it is no result of this run.
    pub fn job_of(&self, body: &[u8]) -> Option<Run> {
        match self.belonging(body) {
            Belonging::To(run) => Some(run),
            Belonging::Elsewhere | Belonging::Unknown => None,
        }
    }

    /// A result of a job that no worker could read has no `run`, only the job's id. One without a nonce
    /// is of a worker older than nonces: it came through this run's own queue, so it is of this run.
    fn belonging(&self, body: &[u8]) -> Belonging {
        #[derive(Deserialize)]
        struct OnlyRun {
            run: Run,
        }
        #[derive(Deserialize)]
        struct OnlyId {
            id: String,
        }
        if let Ok(OnlyRun { run }) = serde_json::from_slice(body) {
            let is_ours =
                run.id == self.id && run.nonce.as_ref().is_none_or(|nonce| *nonce == self.nonce);
            return match is_ours && run.index < MOST_JOBS && run.jobs <= MOST_JOBS {
                true => Belonging::To(run),
                false => Belonging::Elsewhere,
            };
        }
        match serde_json::from_slice(body) {
            Ok(OnlyId { id }) => self.job(&id).map_or(Belonging::Unknown, Belonging::To),
            Err(_) => Belonging::Unknown,
        }
    }

    /// The job of this run that has the id `job`.
    fn job(&self, job: &str) -> Option<Run> {
        let index = job.strip_prefix(&*self.id)?.strip_prefix('/')?.parse().ok()?;
        let (id, nonce) = (self.id.clone(), Some(self.nonce.clone()));
        (index < MOST_JOBS).then_some(Run { id, jobs: 0, index, nonce })
    }
}

enum Belonging {
    To(Run),
    /// To another run.
    Elsewhere,
    /// The result does not say.
    Unknown,
}

/// The result of one job of a run.
#[derive(Debug, PartialEq, Deserialize)]
pub struct RunResult {
    /// The job's id.
    #[serde(rename = "id")]
    pub job: String,
    /// Which job of the run it is of, where it says so.
    #[serde(default)]
    pub run: Option<Run>,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a job.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    /// Each image has an entry.
    Done {
        /// What classified them.
        #[serde(flatten)]
        provenance: Provenance,
        /// One entry an image.
        images: Vec<Entry>,
    },
    /// Nothing could be classified.
    Failed {
        /// Why.
        error: RunError,
    },
    /// There is a result, and it cannot be read.
    #[serde(skip)]
    Unreadable {
        /// What is wrong with it.
        reason: String,
    },
}

/// An image's entry.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
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
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Verdict {
    /// This image could not be classified.
    Failed {
        /// Why.
        error: RunError,
    },
    /// This image was classified.
    Labelled(Classified),
}

/// Why an image or a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunError {
    /// One of the codes of the contract, or one that is newer than this program.
    pub code: String,
    /// For a person.
    pub message: String,
}

impl RunResult {
    /// Reads a result of `run` as its journal keeps it.
    pub fn read(body: &[u8], run: &RunKey) -> Self {
        #[derive(Deserialize)]
        struct SetApart {
            unreadable: String,
        }
        let reason = match serde_json::from_slice(body) {
            Ok(result) => return result,
            Err(error) => match serde_json::from_slice(body) {
                Ok(SetApart { unreadable }) => unreadable,
                Err(_) => error.to_string(),
            },
        };
        let of = run.job_of(body);
        let id = &run.id;
        let job = of.as_ref().map_or_else(|| id.clone(), |of| format!("{id}/{}", of.index));
        let reason = reason.chars().take(REASON).collect();
        Self { job, run: of, outcome: Outcome::Unreadable { reason } }
    }

    /// `true` if its job was done: then it replaces any result that is not.
    pub fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Done { .. })
    }

    /// The entries of its images.
    pub fn images(&self) -> &[Entry] {
        match &self.outcome {
            Outcome::Done { images, .. } => images,
            Outcome::Failed { .. } | Outcome::Unreadable { .. } => &[],
        }
    }
}

impl Entry {
    /// The image's normalised embedding, if it has one.
    pub fn embedding(&self) -> Option<&[f32]> {
        match &self.verdict {
            Verdict::Labelled(classified) => classified.embedding.as_ref().map(|e| e.0.as_slice()),
            Verdict::Failed { .. } => None,
        }
    }
}

/// Returns the job of `run` that a message from its queue answers, and the line of the journal that
/// keeps it. A body that was cut off says nothing itself: then the property `message_id` tells, and the
/// line holds the body as text. `None` if the message is no result of this run.
pub fn line_of<'a>(
    body: &'a [u8],
    message_id: Option<&str>,
    run: &RunKey,
) -> Option<(Run, Cow<'a, [u8]>)> {
    #[derive(Serialize)]
    struct SetApart<'a> {
        id: &'a str,
        run: &'a Run,
        unreadable: String,
        body: Cow<'a, str>,
    }
    match run.belonging(body) {
        Belonging::To(of) => {
            // A line each: JSON has line breaks only between its parts, where a space says the same.
            let line = match body.contains(&b'\n') {
                true => body.iter().map(|b| if *b == b'\n' { b' ' } else { *b }).collect(),
                false => Cow::Borrowed(body),
            };
            return Some((of, line));
        }
        Belonging::Elsewhere => return None,
        Belonging::Unknown => {}
    }
    let id = message_id?;
    let of = run.job(id)?;
    let unreadable = match serde_json::from_slice::<IgnoredAny>(body) {
        Err(error) => error.to_string(),
        Ok(_) => "it does not say which job it is of".to_owned(),
    };
    let line = SetApart { id, run: &of, unreadable, body: String::from_utf8_lossy(body) };
    // Strings and numbers: nothing that JSON cannot say.
    let line = serde_json::to_vec(&line).ok()?;
    Some((of, Cow::Owned(line)))
}

/// Which embeddings the results of a run hold.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Embeddings {
    /// Images that have one.
    pub rows: u64,
    /// Values of the first.
    pub dim: usize,
    /// Values of one that has another number of them: several models answered.
    pub other: Option<usize>,
}

impl Embeddings {
    /// Counts those of a result.
    pub fn add(&mut self, result: &RunResult) {
        for embedding in result.images().iter().filter_map(Entry::embedding) {
            match self.rows {
                0 => self.dim = embedding.len(),
                _ if embedding.len() != self.dim => self.other = Some(embedding.len()),
                _ => {}
            }
            self.rows += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str, nonce: &str) -> RunKey {
        RunKey { id: id.to_owned(), nonce: nonce.to_owned() }
    }

    fn n() -> RunKey {
        key("n", "b")
    }

    #[test]
    fn a_result_is_of_a_run_by_its_run_or_else_by_its_id() {
        let two = br#"{"id":"n/2","run":{"id":"n","jobs":5,"index":2}}"#;
        assert_eq!(n().job_of(two).unwrap().index, 2);
        assert_eq!(key("m", "b").job_of(two), None);
        let unread = br#"{"id":"a/b/17","status":"failed"}"#;
        assert_eq!(key("a/b", "b").job_of(unread).unwrap().index, 17);
        for other in [&br#"{"id":"a/x"}"#[..], br#"{"id":"17"}"#, b"{", b""] {
            assert_eq!(key("a", "b").job_of(other), None);
        }
        let huge = br#"{"id":"n/1","run":{"id":"n","jobs":9,"index":99999999999999}}"#;
        assert_eq!(n().job_of(huge), None);
    }

    #[test]
    fn a_result_of_an_older_run_of_the_same_id_never_counts() {
        let of = |nonce: &str| {
            format!(r#"{{"id":"n/2","run":{{"id":"n","jobs":5,"index":2,"nonce":"{nonce}"}}}}"#)
        };
        // A worker older than nonces echoes none, and the queue is the run's own.
        let without = of("b").replace(r#","nonce":"b""#, "");
        for (body, counts) in [(of("b"), true), (of("a"), false), (of(""), false), (without, true)]
        {
            // The property does not make it count either.
            let line = line_of(body.as_bytes(), Some("n/2"), &n());
            assert_eq!(line.is_some(), counts, "{body}");
        }
    }

    fn body(images: &str) -> String {
        format!(
            r#"{{"id":"n/3","status":"done","classes":"s@1","model":"m","backend":"b","images":[{images}],"run":{{"id":"n","jobs":5,"index":3}},"attempt":1}}"#
        )
    }

    #[test]
    fn a_code_that_is_newer_than_this_program_costs_no_image() {
        let text = body(
            r#"{"uri":"1","error":{"code":"from_the_future","message":"x"}},
               {"uri":"2","id":"sku","label":null,"score":0.5,"top":[],"embedding":"AACAPwAAAAA="}"#,
        );
        let result = RunResult::read(text.as_bytes(), &n());
        let [failed, labelled] = result.images() else { panic!("{result:?}") };
        assert!(
            matches!(&failed.verdict, Verdict::Failed { error } if error.code == "from_the_future")
        );
        assert_eq!(
            (labelled.id.as_deref(), labelled.embedding()),
            (Some("sku"), Some(&[1.0, 0.0][..]))
        );
        assert_eq!(result.run.as_ref().map(|run| run.jobs), Some(5));
        let mut embeddings = Embeddings::default();
        embeddings.add(&result);
        assert_eq!(embeddings, Embeddings { rows: 1, dim: 2, other: None });
        embeddings.dim = 3;
        embeddings.add(&result);
        assert_eq!(embeddings, Embeddings { rows: 2, dim: 3, other: Some(2) });
    }

    #[test]
    fn what_cannot_be_read_is_still_the_answer_to_its_job() {
        for text in [
            body(r#"{"uri":"1","label":"a","score":"high","top":[]}"#),
            body("7"),
            r#"{"id":"n/3","status":"postponed"}"#.to_owned(),
            r#"{"id":"n/3","run":{"id":"n","of":[1,2]}}"#.to_owned(),
        ] {
            let (run, line) = line_of(text.as_bytes(), None, &n()).unwrap();
            assert_eq!((run.index, &*line), (3, text.as_bytes()));
            let result = RunResult::read(&line, &n());
            assert_eq!(result.job, "n/3");
            assert!(
                matches!(&result.outcome, Outcome::Unreadable { reason } if !reason.is_empty())
            );
        }
    }

    #[test]
    fn a_body_that_was_cut_is_kept_under_the_messages_id() {
        let whole = body(r#"{"uri":"ä","label":"a","score":0.5,"top":[]}"#);
        let cut = &whole.as_bytes()[..whole.len() / 2];
        assert_eq!(line_of(cut, None, &n()), None);
        assert_eq!(line_of(cut, Some("m/3"), &n()), None);
        assert_eq!(line_of(cut, Some("n/x"), &n()), None);
        let (run, line) = line_of(cut, Some("n/3"), &n()).unwrap();
        assert_eq!((run.index, n().job_of(&line).unwrap().index), (3, 3));
        let kept: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(kept["body"].as_str().unwrap().as_bytes(), cut);
        let result = RunResult::read(&line, &n());
        let Outcome::Unreadable { reason } = &result.outcome else { panic!("{result:?}") };
        assert!(result.job == "n/3" && reason.contains("EOF"), "{reason}");
    }

    #[test]
    fn a_result_of_several_lines_becomes_one() {
        let text =
            body(r#"{"uri":"1\n","label":"a","score":0.5,"top":[]}"#).replace(",\"", ",\n\"");
        let (_, line) = line_of(text.as_bytes(), None, &n()).unwrap();
        assert!(text.contains('\n') && !line.contains(&b'\n'));
        assert_eq!(RunResult::read(&line, &n()), RunResult::read(text.as_bytes(), &n()));
        assert_eq!(RunResult::read(&line, &n()).images()[0].uri, "1\n");
    }
}
