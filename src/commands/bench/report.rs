//! What was measured, as medians, with the ceilings and ratios computed from them: what `--json` prints,
//! and what the terminal and the page show.
//!
//! The keys are stable: keys are added, never renamed.

use serde::Serialize;

use angler_inference::embed::Backend;
use angler_vectors::rows::Precision;

use super::ceiling::{Ceiling, Step};
use super::figures::{Figure, Samples};
use super::photos::Photos;
use super::plan::{IMAGES_PER_JOB, Plan, Section};
use super::{decode, embed, fetch, publish, score};
use crate::commands::bench::baselines;
use crate::commands::bench::baselines::{PIXELS, Way};
use crate::commands::bench::fixture::Stage;

/// A speed-up below this is nothing: less than what rounds differ by.
const NOTHING: f64 = 1.05;

/// Which way images took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Path {
    /// Files in, JSON lines out.
    Folder,
    /// Jobs from RabbitMQ, images from S3, results to RabbitMQ.
    Broker,
}

/// All rounds' samples.
#[derive(Default)]
pub(super) struct Measured {
    pub fetch: Samples<fetch::Key>,
    pub decode: Samples<decode::Key>,
    pub embed: Samples<embed::Key>,
    pub embed_skipped: embed::Skipped,
    pub score: Samples<score::Key>,
    pub score_skipped: score::Skipped,
    pub publish: Samples<publish::Key>,
    pub whole: Samples<(Path, String)>,
    pub ways: Samples<baselines::Key>,
}

impl Measured {
    /// The back end of the pipeline: the first that was measured.
    fn backend(&self) -> Option<Backend> {
        self.embed.figures().next().map(|((backend, _), _)| *backend)
    }

    /// The parts of a way, as far as they were measured, in its order.
    pub(super) fn steps(
        &self,
        path: Path,
        kind: &str,
        (max_batch, classes): (usize, usize),
    ) -> Vec<Step> {
        let (from, to) = match path {
            Path::Folder => (fetch::Place::Folder, publish::Key::Lines),
            Path::Broker => (fetch::Place::S3, publish::Key::Broker),
        };
        let backend = self.backend();
        // The best batch that the engine may form.
        let embed = self
            .embed
            .figures()
            .filter(|((one, batch), _)| Some(*one) == backend && *batch <= max_batch)
            .map(|(_, figure)| figure)
            .max_by(|a, b| a.images_per_second.total_cmp(&b.images_per_second));
        [
            ("fetch", self.fetch.figure(|(place, of)| *place == from && of == kind)),
            ("decode", self.decode.figure(|of| of == kind)),
            ("embed", embed),
            ("score", self.score.figure(|(rows, _)| *rows == classes)),
            ("publish", self.publish.figure(|key| *key == to)),
        ]
        .into_iter()
        .filter_map(|(part, figure)| Some(Step { part, figure: figure? }))
        .collect()
    }
}

/// All that is said.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    pub angler: &'static str,
    pub machine: Machine,
    pub model: Model,
    pub settings: Settings,
    pub images: Vec<Images>,
    pub fetch: Vec<FetchRow>,
    pub decode: Vec<DecodeRow>,
    pub embed: Vec<EmbedRow>,
    pub embed_skipped: Vec<Skipped>,
    pub score: Vec<ScoreRow>,
    pub score_skipped: Vec<SkippedClasses>,
    pub publish: Vec<PublishRow>,
    pub whole: Vec<WholeRow>,
    pub ways: Vec<WayRow>,
    /// Whether the cosine can be computed in the model's graph; null if it was not tried.
    pub fused: Option<bool>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    /// What the process may use.
    pub cores: usize,
    /// What the system counts.
    pub processors: Option<usize>,
    /// Cores' worth of other programs' work before the start.
    pub busy_cores_before: Option<f64>,
    /// Whether that was little enough to be left out of account.
    pub quiet: Option<bool>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Model {
    pub fingerprint: String,
    pub width: u32,
    pub height: u32,
    pub dim: usize,
    /// What the pipeline ran on; null if no back end was measured.
    pub backend: Option<Backend>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Settings {
    pub rounds: usize,
    /// Of one measurement of a part.
    pub seconds: f64,
    pub classes: usize,
    pub max_batch: usize,
    pub images_per_job: usize,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Images {
    pub kind: String,
    pub format: String,
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub mean_bytes: u64,
    /// Different ones; each has several names.
    pub count: usize,
}

impl Images {
    fn of(photos: &Photos) -> Self {
        Self {
            kind: photos.kind.clone(),
            format: photos.format.clone(),
            width: photos.size.map(|(width, _)| width),
            height: photos.size.map(|(_, height)| height),
            mean_bytes: photos.mean_bytes(),
            count: photos.files.len(),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct FetchRow {
    pub from: fetch::Place,
    pub kind: String,
    #[serde(flatten)]
    pub figure: Figure,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct DecodeRow {
    pub kind: String,
    pub format: String,
    #[serde(flatten)]
    pub figure: Figure,
    /// Of the time of a decoding thread: the share before the resize begins.
    pub decode_share: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct EmbedRow {
    pub backend: Backend,
    pub batch: usize,
    #[serde(flatten)]
    pub figure: Figure,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Skipped {
    pub backend: String,
    pub reason: String,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ScoreRow {
    pub classes: usize,
    pub precision: Precision,
    #[serde(flatten)]
    pub figure: Figure,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SkippedClasses {
    pub classes: usize,
    /// What they would take.
    pub bytes: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct PublishRow {
    pub to: publish::Key,
    pub results_per_second: f64,
    #[serde(flatten)]
    pub figure: Figure,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct WholeRow {
    pub path: Path,
    pub kind: String,
    #[serde(flatten)]
    pub figure: Figure,
    pub parts: Vec<Step>,
    pub ceiling: Option<Ceiling>,
    /// The measured rate divided by the ceiling.
    pub ratio: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct WayRow {
    pub way: Way,
    /// `pixels` in memory, or files of a kind.
    pub from: String,
    pub seconds_per_100_images: f64,
    /// How many times faster than one by one.
    pub speedup: f64,
}

impl Report {
    pub(super) fn new(stage: &Stage, machine: Machine, measured: &Measured) -> Self {
        let plan = &stage.plan;
        let running = (stage.app.settings.embedder.max_batch, stage.classes.labels().len());
        let (max_batch, classes) = running;
        let shown = |section| plan.shows(section);
        let photos = || {
            let piped = stage.sets.iter().map(|set| &set.photos);
            piped.chain(stage.only_decoded.iter().filter(|_| shown(Section::Decode)))
        };
        let whole = whole_rows(measured, stage.cores, running);
        Self {
            angler: env!("CARGO_PKG_VERSION"),
            machine,
            model: Model {
                fingerprint: stage.model.fingerprint.clone(),
                width: stage.model.pixels.width,
                height: stage.model.pixels.height,
                dim: stage.model.dim,
                backend: measured.backend(),
            },
            settings: settings(plan, classes, max_batch),
            images: photos().map(|photos| Images::of(photos)).collect(),
            fetch: measured
                .fetch
                .figures()
                .map(|((from, kind), figure)| FetchRow { from: *from, kind: kind.clone(), figure })
                .collect(),
            decode: photos()
                .filter_map(|photos| {
                    Some(DecodeRow {
                        kind: photos.kind.clone(),
                        format: photos.format.clone(),
                        figure: measured.decode.figure(|kind| *kind == photos.kind)?,
                        decode_share: measured.decode.decode_share(&photos.kind)?,
                    })
                })
                .collect(),
            embed: measured
                .embed
                .figures()
                .map(|((backend, batch), figure)| EmbedRow {
                    backend: *backend,
                    batch: *batch,
                    figure,
                })
                .collect(),
            embed_skipped: measured
                .embed_skipped
                .iter()
                .map(|(backend, reason)| Skipped {
                    backend: backend.clone(),
                    reason: reason.clone(),
                })
                .collect(),
            score: measured
                .score
                .figures()
                .map(|((classes, precision), figure)| ScoreRow {
                    classes: *classes,
                    precision: *precision,
                    figure,
                })
                .collect(),
            score_skipped: measured
                .score_skipped
                .iter()
                .map(|(classes, bytes)| SkippedClasses { classes: *classes, bytes: *bytes })
                .collect(),
            publish: measured
                .publish
                .figures()
                .map(|(to, figure)| PublishRow {
                    to: *to,
                    results_per_second: figure.images_per_second / IMAGES_PER_JOB as f64,
                    figure,
                })
                .collect(),
            whole,
            ways: way_rows(&measured.ways),
            fused: shown(Section::Ways)
                .then(|| measured.ways.figure(|(way, _)| *way == Way::Fused).is_some()),
        }
    }

    /// The same of all the sessions that the settings make, at once.
    pub(super) fn batching_in_sessions(&self) -> Option<String> {
        let mut rows = self.embed.iter().filter(|row| Some(row.backend) == self.model.backend);
        let (first, last) = (rows.next()?, rows.next_back()?);
        let gain = last.figure.images_per_second / first.figure.images_per_second;
        let worth = match gain {
            gain if gain >= NOTHING => format!("is {gain:.2} times as fast"),
            loss if loss <= 1.0 / NOTHING => format!("takes {:.2} times as long", 1.0 / loss),
            _ => "gains nothing".to_owned(),
        };
        Some(format!(
            "With the sessions of the settings, all at work, it {worth}: {:.0} images/s in batches of \
             {}, {:.0} in batches of {}.",
            last.figure.images_per_second, last.batch, first.figure.images_per_second, first.batch
        ))
    }

    /// What batching by itself is worth, in a sentence, if that was measured.
    pub(super) fn batching(&self) -> Option<String> {
        let row = |way| self.ways.iter().find(|row| row.way == way && row.from == PIXELS);
        let (single, batched) = (row(Way::OneByOne)?, row(Way::Batched)?);
        let figures = format!(
            "{:.3} s per 100 images in batches of {}, {:.3} s one by one, on pixels in memory",
            batched.seconds_per_100_images, self.settings.max_batch, single.seconds_per_100_images
        );
        Some(match batched.speedup {
            gain if gain >= NOTHING => {
                format!(
                    "Batching by itself, in one session with all cores, is {gain:.2} times as fast: \
                     {figures}."
                )
            }
            loss if loss <= 1.0 / NOTHING => {
                format!("Batching by itself takes {:.2} times as long: {figures}.", 1.0 / loss)
            }
            _ => format!(
                "Batching by itself gains nothing here: {figures}. What the pipeline gains comes from \
                 decoding and embedding at the same time, on all cores."
            ),
        })
    }
}

fn settings(plan: &Plan, classes: usize, max_batch: usize) -> Settings {
    Settings {
        rounds: plan.rounds,
        seconds: plan.time.as_secs_f64(),
        classes,
        max_batch,
        images_per_job: IMAGES_PER_JOB,
    }
}

fn whole_rows(measured: &Measured, cores: usize, running: (usize, usize)) -> Vec<WholeRow> {
    let row = |((path, kind), figure): (&(Path, String), Figure)| {
        let parts = measured.steps(*path, kind, running);
        let ceiling = Ceiling::of(cores, &parts);
        let ratio = ceiling.as_ref().map(|c| figure.images_per_second / c.images_per_second);
        WholeRow { path: *path, kind: kind.clone(), figure, parts, ceiling, ratio }
    };
    measured.whole.figures().map(row).collect()
}

fn way_rows(samples: &Samples<baselines::Key>) -> Vec<WayRow> {
    let row = |((way, from), figure): (&baselines::Key, Figure)| {
        let single = samples.figure(|(other, of)| *other == Way::OneByOne && of == from)?;
        Some(WayRow {
            way: *way,
            from: from.clone(),
            seconds_per_100_images: 100.0 / figure.images_per_second,
            speedup: figure.images_per_second / single.images_per_second,
        })
    };
    samples.figures().filter_map(row).collect()
}
