//! Results, line by line: an image a line as `angler classify --out` writes them, or a whole result of a
//! job as a worker publishes it. `angler collect` writes the first, and a job that failed whole as a line
//! of its own.
//!
//! A line is taken whole or not at all. What is read is what is shown, and no more is demanded: unknown
//! fields are passed over, embeddings among them, and an error's code is any text, so that results of a
//! newer worker can be read as well.

use std::io::{self, BufRead, Read};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use angler_wire::job::LabelScore;

/// The longest line: a result of 1,000 images with embeddings of 4,096 values has 22 MB.
const LINE_BYTES: u64 = 64 << 20;

/// How far rounding may carry a cosine beyond 1.
const ROUNDING: f32 = 0.01;

/// What a line says.
#[derive(Debug, PartialEq)]
pub(super) struct Line {
    /// What classified its images, as far as it says so.
    pub(super) classes: Option<String>,
    pub(super) model: Option<String>,
    pub(super) backend: Option<String>,
    pub(super) content: Content,
}

#[derive(Debug, PartialEq)]
pub(super) enum Content {
    Images(Vec<Image>),
    /// A job that failed as a whole: it has no images.
    FailedJob {
        job: String,
        error: Error,
    },
}

#[derive(Debug, PartialEq)]
pub(super) struct Image {
    pub(super) uri: String,
    pub(super) id: Option<String>,
    pub(super) verdict: Verdict,
}

#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Failed(Error),
    Classified(Classified),
}

#[derive(Debug, PartialEq)]
pub(super) struct Classified {
    /// None: unknown.
    pub(super) label: Option<String>,
    pub(super) score: f32,
    /// As it stands there, or else from the two best classes.
    pub(super) margin: Option<f32>,
    /// The best class, also of an image that is unknown.
    pub(super) nearest: Option<String>,
    /// The second best, if the line lists it.
    pub(super) runner_up: Option<String>,
}

/// Why there is no label.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Error {
    pub(super) code: String,
    #[serde(default)]
    pub(super) message: String,
}

/// A line, or an image in it: whatever is there of a result.
#[derive(Deserialize)]
struct Draft {
    uri: Option<String>,
    id: Option<String>,
    label: Option<String>,
    score: Option<f32>,
    margin: Option<f32>,
    top: Option<Vec<LabelScore>>,
    error: Option<Error>,
    classes: Option<String>,
    model: Option<String>,
    backend: Option<String>,
    status: Option<String>,
    images: Option<Vec<Draft>>,
    /// In a row of a whole job, as `angler collect` writes it.
    job: Option<String>,
}

/// Hands each line that is not blank to `take`: its number, from 1, and what it says, or why it cannot be
/// read. Memory does not grow with the file: one line is held at a time, of at most 64 MiB.
///
/// # Errors
/// What the system said.
pub(super) fn lines(
    reader: &mut dyn BufRead,
    mut take: impl FnMut(u64, Result<Line>),
) -> io::Result<()> {
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        reader.take(LINE_BYTES).read_until(b'\n', &mut text)?;
        if text.is_empty() {
            break;
        }
        if text.len() as u64 == LINE_BYTES && !text.ends_with(b"\n") {
            reader.skip_until(b'\n')?;
            take(number, Err(anyhow!("it has more than {} MiB", LINE_BYTES >> 20)));
        } else if !text.trim_ascii().is_empty() {
            take(number, parse(&text));
        }
    }
    Ok(())
}

fn parse(text: &[u8]) -> Result<Line> {
    let mut draft: Draft = serde_json::from_slice(text).context("not a result as JSON")?;
    let (classes, model, backend) =
        (draft.classes.take(), draft.model.take(), draft.backend.take());
    let content = match (draft.images.take(), &draft.uri, draft.status.as_deref()) {
        (Some(images), _, _) => {
            Content::Images(images.into_iter().map(image).collect::<Result<_, _>>()?)
        }
        (None, Some(_), _) => Content::Images(vec![image(draft)?]),
        (None, None, Some("failed")) => Content::FailedJob {
            job: draft.id.unwrap_or_default(),
            error: draft.error.context("a failed job without `error`")?,
        },
        (None, None, _) => match (draft.job, draft.error) {
            (Some(job), Some(error)) => Content::FailedJob { job, error },
            _ => bail!("neither `uri` nor `images`: it is no result"),
        },
    };
    Ok(Line { classes, model, backend, content })
}

fn image(draft: Draft) -> Result<Image> {
    let uri = draft.uri.context("an image has no `uri`")?;
    let verdict = match (draft.error, draft.score) {
        (Some(error), _) => Verdict::Failed(error),
        (None, None) => bail!("an image has neither `score` nor `error`"),
        (None, Some(score)) if !(-1.0 - ROUNDING..=1.0 + ROUNDING).contains(&score) => {
            bail!("a score of {score} is no cosine similarity");
        }
        (None, Some(score)) => {
            let mut top = draft.top.unwrap_or_default().into_iter();
            let (first, second) = (top.next(), top.next());
            let listed = first.as_ref().zip(second.as_ref()).map(|(a, b)| a.score - b.score);
            Verdict::Classified(Classified {
                label: draft.label,
                score,
                margin: draft.margin.or(listed).filter(|margin| margin.is_finite()),
                nearest: first.map(|best| best.label),
                runner_up: second.map(|second| second.label),
            })
        }
    };
    Ok(Image { uri, id: draft.id, verdict })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(u64, Result<Line>)> {
        let mut all = Vec::new();
        lines(&mut text.as_bytes(), |number, line| all.push((number, line))).unwrap();
        all
    }

    fn classified(line: &Line) -> &Classified {
        match &line.content {
            Content::Images(images) => match &images[0].verdict {
                Verdict::Classified(classified) => classified,
                Verdict::Failed(error) => panic!("{error:?}"),
            },
            Content::FailedJob { .. } => panic!("{line:?}"),
        }
    }

    #[test]
    fn a_line_an_image_and_whole_results_are_read_alike() {
        let all = read(
            "{\"uri\":\"1\",\"label\":\"a\",\"score\":0.9,\"margin\":0.25,\"top\":[{\"label\":\"a\",\"score\":0.9}],\
             \"classes\":\"s@1\",\"model\":\"m\",\"backend\":\"x\",\"embedding\":\"AAAA\",\"new\":{\"a\":[1]}}\n\
             \n\
             {\"id\":\"j\",\"status\":\"done\",\"classes\":\"s@1\",\"model\":\"m\",\"backend\":\"x\",\"images\":[\
             {\"uri\":\"2\",\"id\":\"sku\",\"label\":null,\"score\":0.5,\
             \"top\":[{\"label\":\"a\",\"score\":0.5},{\"label\":\"b\",\"score\":0.25}]},\
             {\"uri\":\"3\",\"error\":{\"code\":\"from_the_future\",\"message\":\"x\"}}],\
             \"attempt\":1,\"worker\":\"w\",\"finished_at\":\"t\"}\r\n\
             {\"id\":\"k\",\"status\":\"failed\",\"error\":{\"code\":\"malformed_job\",\"message\":\"x\"}}\n\
             {\"job\":\"r/7\",\"error\":{\"code\":\"cancelled\",\"message\":\"x\"}}",
        );
        assert_eq!(all.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 3, 4, 5]);
        let lines: Vec<&Line> = all.iter().map(|(_, line)| line.as_ref().unwrap()).collect();
        assert_eq!(lines[0].classes.as_deref(), Some("s@1"));
        assert_eq!((classified(lines[0]).margin, classified(lines[0]).score), (Some(0.25), 0.9));
        let unknown = classified(lines[1]);
        assert_eq!((unknown.label.as_deref(), unknown.nearest.as_deref()), (None, Some("a")));
        assert_eq!((unknown.runner_up.as_deref(), unknown.margin), (Some("b"), Some(0.25)));
        let Content::Images(images) = &lines[1].content else { panic!() };
        assert_eq!(images[0].id.as_deref(), Some("sku"));
        assert!(matches!(&images[1].verdict, Verdict::Failed(e) if e.code == "from_the_future"));
        assert!(matches!(&lines[2].content, Content::FailedJob { job, .. } if job == "k"));
        let whole = &lines[3].content;
        assert!(matches!(whole, Content::FailedJob { job, .. } if job == "r/7"));
    }

    #[test]
    fn what_is_no_result_is_named_and_the_next_line_is_read() {
        for (line, words) in [
            ("{\"uri\":", "not a result as JSON"),
            ("nonsense", "not a result as JSON"),
            ("[]", "not a result as JSON"),
            ("{\"a\":1}", "neither `uri` nor `images`"),
            ("{\"uri\":\"u\"}", "neither `score` nor `error`"),
            ("{\"uri\":\"u\",\"score\":7}", "no cosine"),
            ("{\"uri\":\"u\",\"score\":1e39}", "no cosine"),
            ("{\"uri\":\"u\",\"label\":7,\"score\":0.5}", "not a result as JSON"),
            ("{\"images\":[{\"score\":0.5}]}", "no `uri`"),
            ("{\"status\":\"failed\"}", "without `error`"),
        ] {
            let all = read(&format!("{line}\n{{\"uri\":\"u\",\"score\":0.5}}\n"));
            let error = all[0].1.as_ref().expect_err(line);
            assert!(error.to_string().contains(words), "{error:?}");
            assert!(all[1].1.is_ok() && all[1].0 == 2);
        }
    }

    #[test]
    fn a_line_without_end_is_passed_over() {
        let tail = "\n{\"uri\":\"u\",\"score\":0.5}";
        let mut reader = io::BufReader::new(
            io::repeat(b'x').take(LINE_BYTES + 100).chain(io::Cursor::new(tail.as_bytes())),
        );
        let mut all = Vec::new();
        lines(&mut reader, |number, line| all.push((number, line.is_ok()))).unwrap();
        assert_eq!(all, [(1, false), (2, true)]);
    }
}
