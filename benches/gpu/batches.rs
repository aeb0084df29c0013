//! Images a second by the size of a batch, beside the bare session ([`crate::child`]): pixels that lie
//! in the host's memory become embeddings there, or labels.

use anyhow::{Context, Result};
use ndarray::s;

use angler_inference::embed::{Against, Scoring};
use angler_inference::model::Model;

use crate::child::Bare;
use crate::figures::{in_turns, number, rate};
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, Stage, TOP_K, Wish};

const CLASSES: usize = 10_000;

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    of_model(stage, report, "EfficientNet-Lite0, 224", &stage.default)?;
    let resnet = stage.resnet(224, None)?;
    of_model(stage, report, "ResNet-50's size, 224", &resnet)
}

fn of_model(stage: &Stage, report: &mut Report, name: &str, model: &Model) -> Result<()> {
    let sizes = stage.sized(vec![1, 2, 4, 8, 16, 32, 64, 128, 256], vec![1, 4]);
    let most = sizes.last().copied().unwrap_or(1);
    let judged = BATCH.min(most);
    let (pixels, _) = stage.pixels(model, most)?;
    let classes = stage.random_set(model, CLASSES, 1)?;
    let against = Against { classes: &classes, top_k: TOP_K, embeddings: false };
    let mut embedding = stage.open(model, Wish { max_batch: most, ..stage.wish(Scoring::Host) })?;
    let mut scoring = stage.open(model, Wish { max_batch: most, ..stage.wish(Scoring::Graph) })?;
    let mut bare = Bare::start(stage, model)?;
    for images in sizes {
        let pixels = pixels.slice(s![..images, .., .., ..]);
        let fuses = match scoring.classify(pixels, &against) {
            None => false,
            Some(first) => first.map(|_| true).context("scoring in the graph")?,
        };
        let rates = in_turns(stage.rounds, 3, |way| match (way, &mut bare) {
            (0, Some(bare)) => bare.rate(images, stage.time),
            (1, _) => rate(stage.time, images, || {
                embedding.embed(pixels)?;
                Ok(())
            }),
            (2, _) if fuses => rate(stage.time, images, || {
                scoring.classify(pixels, &against).context("it scores no more")??;
                Ok(())
            }),
            // There is no such way here.
            _ => Ok(f64::NAN),
        })?;
        let [alone, embedded, scored] = [rates[0], rates[1], rates[2]];
        let what = format!("{name}, batch {images}, images/s");
        let show = |rate: f64| if rate.is_nan() { "–".to_owned() } else { number(rate) };
        let measured = format!(
            "bare session {}, embedded {}, labels from the graph {}",
            show(alone),
            show(embedded),
            show(scored)
        );
        let figures =
            [("batch", images as f64), ("bare", alone), ("embedded", embedded), ("graph", scored)];
        let figures: Vec<_> = figures.into_iter().filter(|(_, rate)| !rate.is_nan()).collect();
        let limit = format!("labels ≥ {} × bare", wanted::OF_BARE);
        if images != judged {
            report.note(what, measured, &figures);
        } else if (alone * scored).is_nan() {
            report.unknown(what, measured, limit);
        } else {
            let met = scored >= wanted::OF_BARE * alone;
            report.judge(what, measured, limit, Holds::OnAGpu(met), &figures);
        }
    }
    Ok(())
}
