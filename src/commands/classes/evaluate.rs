//! `angler classes evaluate`: how well a version names images whose class is known.

mod page;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use angler_core::class_sets::build::Reference;
use angler_core::class_sets::catalog::version_key;
use angler_core::store::ObjectError;
use angler_inference::engine::Want;
use angler_vectors::ClassVectors;
use angler_vectors::calibrate::{Calibration, CalibrationError, searches_for_one};
use angler_vectors::evaluate::{ClassEvaluation, Evaluation, Evaluator, Labelled};
use angler_vectors::file;
use angler_vectors::statistics::Rate;
use angler_wire::job::{ClassSelector, MAX_TOP_K, check_name};

use crate::app::App;
use crate::commands::html;
use crate::commands::run_images::each_image;
use crate::commands::tables::{address, label, number, percent, rate, show, table};
use crate::commands::{UsageError, class_set, image_paths};

/// Measure a version with images whose class is known, and find its threshold
///
/// FOLDER has one sub-folder a class, named like the class. Sub-folders named otherwise hold
/// strangers: images that should be unknown. Use images that the version was not built from.
#[derive(Args)]
pub struct EvaluateCommand {
    /// SET[@VERSION] under classes.root, or a class vectors file
    #[arg(value_name = "SET[@VERSION]|FILE")]
    classes: String,
    /// A folder or s3://bucket/prefix with one sub-folder a class
    #[arg(value_name = "FOLDER")]
    images: String,
    /// Count a class among the K nearest, too, 1 to 100
    #[arg(long, default_value_t = 5, value_name = "K")]
    top_k: usize,
    /// Find the smallest threshold at which at most this share of wrong matches is accepted
    #[arg(long, value_name = "RATE")]
    calibrate: Option<f64>,
    /// Write the vectors with that threshold as a new version of the set
    #[arg(long, value_name = "VERSION", requires = "calibrate")]
    save_as: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write the result as an HTML page, with pictures of the mistakes
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report<'a> {
    classes: String,
    model: &'a str,
    backend: String,
    source: &'a str,
    min_score: Option<f32>,
    #[serde(flatten)]
    evaluation: &'a Evaluation,
    calibration: Option<Calibration>,
    saved: Option<Saved>,
}

/// The version that `--save-as` wrote.
#[derive(Serialize)]
struct Saved {
    classes: String,
    place: String,
}

impl EvaluateCommand {
    pub(super) async fn run(self, app: &App) -> Result<()> {
        self.check()?;
        self.is_new(app).await?;
        let references = image_paths::references(app, &self.images).await?;
        self.enough(references.len())?;
        let classes = class_set::open(app, &self.classes).await?;
        let model = app.model()?;
        class_set::check_model(&classes, &model.fingerprint, model.dim)?;
        let engine = app.engine(&model)?;
        let store = app.images_for(references.iter().map(|r| r.uri.as_str())).await?;
        let pipeline = app.pipeline(&model, engine.clone(), store);
        let want = Want {
            classes: Some(Arc::clone(&classes)),
            top_k: self.top_k.max(2),
            ..Want::default()
        };
        let (truths, uris): (Vec<String>, Vec<String>) =
            references.into_iter().map(|Reference { label, uri }| (label, uri)).unzip();
        let threshold = class_set::thresholds(&classes);
        let labels = class_set::labels(&classes);
        let mut evaluator = Evaluator::new(&labels, &threshold, self.top_k);
        let outcome = each_image(&pipeline, &uris, want, |index, scored| {
            let uri = &uris[index];
            match scored {
                Ok(scored) => evaluator.add(&Labelled {
                    uri: uri.clone(),
                    truth: truths[index].clone(),
                    top: class_set::named(&classes, &scored.top),
                }),
                Err(error) => evaluator.failed(uri, &error),
            }
            Ok(())
        })
        .await;
        let backend = engine.backend().to_string();
        engine.close().await;
        outcome?;
        let evaluation = evaluator.finish();

        let calibration = self.calibrate.map(|rate| evaluation.scores.calibrate(rate)).transpose();
        let (calibration, uncalibrated) =
            calibration.map_or_else(|e| (None, Some(e)), |c| (c, None));
        let saved = match (&self.save_as, &calibration) {
            (Some(version), Some(c)) => {
                save_with_threshold(app, &classes, version, c.threshold).await.map(Some)
            }
            _ => Ok(None),
        };
        // What was measured is shown even if it could not be saved.
        let (saved, unsaved) = saved.map_or_else(|e| (None, Some(e)), |saved| (saved, None));
        let report = Report {
            classes: classes.id(),
            model: classes.model(),
            backend,
            source: &self.images,
            min_score: classes.min_score(),
            evaluation: &evaluation,
            calibration,
            saved,
        };
        if self.json {
            show(&format!("{}\n", serde_json::to_string(&report)?))?;
        } else {
            show(&report.text())?;
        }
        if let Some(path) = &self.html {
            let why_not = uncalibrated.as_ref().map(ToString::to_string);
            let page = report.page(app, classes.min_scores().len(), why_not).await;
            html::write(path, &page)?;
        }
        uncalibrated.map_or(Ok(()), Err)?;
        unsaved.map_or(Ok(()), Err)
    }

    fn check(&self) -> Result<(), UsageError> {
        if !(1..=MAX_TOP_K).contains(&self.top_k) {
            return Err(UsageError(format!("--top-k must be 1 to {MAX_TOP_K}")));
        }
        if let Some(rate) = self.calibrate.filter(|rate| !(*rate > 0.0 && *rate < 1.0)) {
            let error = CalibrationError::NotARate(rate);
            return Err(UsageError(format!("--calibrate: {error}")));
        }
        if let Some(version) = &self.save_as {
            check_name(version).map_err(|e| UsageError(format!("--save-as: {e}")))?;
            if std::path::Path::new(&self.classes).is_file() {
                let message = "--save-as needs a set under classes.root, not a file";
                return Err(UsageError(message.to_owned()));
            }
            ClassSelector::parse(&self.classes).map_err(UsageError::of)?;
        }
        html::check(self.html.as_deref())
    }

    /// A version that exists is found out before images are embedded. One that is written in between
    /// is found when this one is.
    async fn is_new(&self, app: &App) -> Result<()> {
        let Some(version) = &self.save_as else { return Ok(()) };
        let set = ClassSelector::parse(&self.classes).map_err(UsageError::of)?.set;
        let root = app.class_root().await?;
        let key = version_key(&set, version);
        match root.open(&key).await.context("--save-as")? {
            Some(_) => Err(ObjectError::Exists(root.place(&key))).context("--save-as"),
            None => Ok(()),
        }
    }

    /// Too few images are found out before they are embedded.
    fn enough(&self, images: usize) -> Result<(), CalibrationError> {
        let Some(rate) = self.calibrate else { return Ok(()) };
        let (images, needed) = (images as u64, searches_for_one(rate));
        if images < needed {
            return Err(CalibrationError::TooFew { rate, images, needed });
        }
        Ok(())
    }
}

/// Writes the same vectors with a threshold as a new version of their set.
async fn save_with_threshold(
    app: &App,
    classes: &ClassVectors,
    version: &str,
    min_score: f32,
) -> Result<Saved> {
    let mut contents = classes.contents();
    contents.min_score = Some(min_score);
    contents.source = Some(format!("angler classes evaluate {} --calibrate", classes.id()));
    let bytes = file::write(&contents, (classes.set(), version))?;
    let root = app.class_root().await?;
    let key = version_key(classes.set(), version);
    root.create(&key, bytes.into()).await.context("the new version cannot be written")?;
    Ok(Saved { classes: format!("{}@{version}", classes.set()), place: root.place(&key) })
}

impl Report<'_> {
    fn text(&self) -> String {
        let e = self.evaluation;
        let threshold = self.min_score.map_or("none".to_owned(), |score| score.to_string());
        let mut text = format!(
            "{} on {}\n  model     {}\n  back end  {}\n  threshold {threshold}\n",
            self.classes, self.source, self.model, self.backend
        );
        let mut rows = vec![("nearest class is right", &e.top_1)];
        let among = format!("among the {} nearest", e.k);
        rows.push((&among, &e.top_k));
        rows.push(("right and accepted", &e.right));
        rows.push(("wrong and accepted", &e.wrong));
        rows.push(("unknown", &e.unknown));
        if e.strangers > 0 {
            rows.push(("strangers accepted", &e.strangers_accepted));
        }
        text += &rates(&format!("{} images, {} of them strangers", e.images, e.strangers), &rows);
        text += &classes(e);
        text += &table(
            "most confused",
            &["class", "gets the label", "images"],
            2,
            e.confused
                .first
                .iter()
                .map(|pair| vec![label(&pair.truth), label(&pair.label), pair.count.to_string()]),
            e.confused.total,
        );
        text += &table(
            "nearest class wrong",
            &["image", "nearest class", "given", "score", "margin"],
            3,
            e.mistakes.first.iter().map(|m| {
                let told = if m.accepted { "yes" } else { "no" };
                vec![
                    address(&m.uri),
                    label(&m.label),
                    told.to_owned(),
                    number(Some(m.score)),
                    number(m.margin),
                ]
            }),
            e.mistakes.total,
        );
        text += &crate::commands::tables::errors(&e.errors);
        if let Some(calibration) = &self.calibration {
            text += &calibrated(calibration);
        }
        if let Some(Saved { classes, place }) = &self.saved {
            text += &format!("written as {classes} to {place}\n");
        }
        text
    }
}

fn rates(title: &str, rows: &[(&str, &Rate)]) -> String {
    let cells = rows.iter().map(|(name, measured)| {
        let mut row = vec![(*name).to_owned()];
        row.extend(rate(measured));
        row
    });
    table(title, &["", "images", "share", "95% interval"], 1, cells, rows.len() as u64)
}

/// The classes that have images or whose label was given, the lowest recall first.
fn seen(e: &Evaluation) -> Vec<&ClassEvaluation> {
    let mut seen: Vec<_> =
        e.per_class.iter().filter(|c| c.images > 0 || c.precision.of > 0).collect();
    let order = |share: Option<f64>| share.unwrap_or(f64::INFINITY);
    seen.sort_by(|a, b| order(a.recall.share()).total_cmp(&order(b.recall.share())));
    seen
}

fn classes(e: &Evaluation) -> String {
    let seen = seen(e);
    let rows = seen.iter().map(|c| {
        vec![
            label(&c.label),
            c.images.to_string(),
            percent(c.recall.share()),
            percent(c.precision.share()),
            c.unknown.to_string(),
            number(c.mean_score),
            number(c.mean_margin),
        ]
    });
    let headers = ["class", "images", "recall", "precision", "unknown", "score", "margin"];
    table("classes, the lowest recall first", &headers, 1, rows, seen.len() as u64)
}

fn calibrated(c: &Calibration) -> String {
    let mut rows = vec![("wrong matches accepted", &c.false_positives)];
    if c.false_positives_strangers.of > 0 {
        rows.push(("strangers alone", &c.false_positives_strangers));
    }
    rows.push(("right and accepted", &c.right_and_accepted));
    rates(&format!("threshold for a rate of {}: {}", c.rate, c.threshold), &rows)
}
