//! Results as JSON lines, one an image, in the order of the jobs.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use serde::Serialize;

use angler_wire::error::{FatalError, Reason};
use angler_wire::job::{ImageEntry, JobResult, Outcome, Provenance};

use super::{ResultSink, SinkError};
use crate::source::Reply;

/// One line: an image's entry of its job's result, with what classified it beside.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// The image.
    #[serde(flatten)]
    pub entry: &'a ImageEntry,
    /// What classified it.
    #[serde(flatten)]
    pub provenance: &'a Provenance,
}

impl Line<'_> {
    /// Writes the line with its end.
    ///
    /// # Errors
    /// What the system said.
    pub fn write(&self, writer: &mut dyn Write) -> std::io::Result<()> {
        serde_json::to_writer(&mut *writer, self)?;
        writer.write_all(b"\n")
    }
}

/// What looks on while results are written; called in order, once an image.
pub type Observer = Box<dyn FnMut(&ImageEntry) + Send>;

/// Writes lines to any writer.
///
/// Jobs finish in any order; a result waits here until those before it are written. The worker
/// bounds how many jobs can be in flight, and so how many can wait.
pub struct JsonLinesSink {
    state: Mutex<State>,
}

struct State {
    writer: Option<Box<dyn Write + Send>>,
    observer: Observer,
    waiting: BTreeMap<u64, JobResult>,
    next: u64,
}

impl JsonLinesSink {
    /// Lines go to `writer`, if there is one; `observer` sees every entry.
    pub fn new(writer: Option<Box<dyn Write + Send>>, observer: Observer) -> Self {
        let state = State { writer, observer, waiting: BTreeMap::new(), next: 0 };
        Self { state: Mutex::new(state) }
    }

    /// Flushes what was written.
    ///
    /// # Errors
    /// What the system said.
    pub fn flush(&self) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.writer.as_mut().map_or(Ok(()), |writer| writer.flush())
    }
}

#[async_trait]
impl ResultSink for JsonLinesSink {
    async fn publish(&self, result: &JobResult, _: &Reply) -> Result<(), SinkError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let index = result.run.as_ref().map_or(state.next, |run| run.index);
        if index == state.next {
            state.next += 1;
            state.write(result)?;
        } else {
            state.waiting.insert(index, result.clone());
        }
        loop {
            let next = state.next;
            let Some(result) = state.waiting.remove(&next) else { return Ok(()) };
            state.next += 1;
            state.write(&result)?;
        }
    }
}

impl State {
    fn write(&mut self, result: &JobResult) -> Result<(), FatalError> {
        let (provenance, images) = match &result.outcome {
            Outcome::Done { provenance, images } => (provenance, images),
            Outcome::Failed { error } => {
                return Err(FatalError::Sink(format!("{}: {error}", error.code).into()));
            }
        };
        for entry in images {
            if let Some(writer) = &mut self.writer {
                Line { entry, provenance }
                    .write(writer)
                    .map_err(|e| FatalError::Sink(Reason::of(e)))?;
            }
            (self.observer)(entry);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use angler_wire::error::{ImageError, ImageErrorCode};
    use angler_wire::job::{Run, Verdict};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn result(index: u64) -> JobResult {
        let error = ImageError::new(ImageErrorCode::NotFound, "gone");
        let verdict = Verdict::Failed { error };
        JobResult {
            id: format!("r/{index}"),
            outcome: Outcome::Done {
                provenance: Provenance {
                    classes: "s@1".into(),
                    model: "m".into(),
                    backend: "fake".into(),
                },
                images: vec![ImageEntry { uri: index.to_string(), id: None, verdict }],
            },
            run: Some(Run { id: "r".into(), jobs: 3, index, nonce: None }),
            attempt: 1,
            worker: "w".into(),
            finished_at: String::new(),
        }
    }

    #[tokio::test]
    async fn lines_come_in_the_order_of_the_jobs_whatever_ends_first() {
        let written = Shared::default();
        let sink = JsonLinesSink::new(Some(Box::new(written.clone())), Box::new(|_| ()));
        for index in [2, 0, 1] {
            sink.publish(&result(index), &Reply::default()).await.unwrap();
        }
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let uris: Vec<String> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["uri"].to_string())
            .collect();
        assert_eq!(uris, ["\"0\"", "\"1\"", "\"2\""]);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["classes"], "s@1");
        assert_eq!(first["error"]["code"], "not_found");
    }
}
