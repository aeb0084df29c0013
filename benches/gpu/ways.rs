//! Three ways from pixels in memory to labels, nothing at the same time: one image after the other;
//! in batches, with the cosine on the host; in batches, with the cosine in the model's graph.

use anyhow::{Context, Result, anyhow};
use ndarray::{ArrayView4, Axis};

use angler_inference::embed::{Against, Embedder, Scoring};
use angler_inference::model::Model;

use crate::figures::{in_turns, number, rate};
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, Stage, TOP_K, units};

const CLASSES: usize = 10_000;

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    of_model(stage, report, "EfficientNet-Lite0, 224", &stage.default, wanted::SPEEDUP)?;
    for side in [224, 299] {
        let model = stage.resnet(side, None)?;
        let name = format!("ResNet-50's size, {side}");
        of_model(stage, report, &name, &model, wanted::SPEEDUP_OF_LARGE)?;
    }
    Ok(())
}

/// * `least`: how many times as fast as one by one the graph is wanted to be.
fn of_model(
    stage: &Stage,
    report: &mut Report,
    name: &str,
    model: &Model,
    least: f64,
) -> Result<()> {
    let batch = stage.sized(BATCH, 4);
    let (pixels, _) = stage.pixels(model, batch)?;
    let classes = stage.random_set(model, CLASSES, 1)?;
    let against = Against { classes: &classes, top_k: TOP_K, embeddings: false };
    let mut host = stage.open(model, stage.wish(Scoring::Host))?;
    let mut graph = stage.open(model, stage.wish(Scoring::Graph))?;
    let fuses = match graph.classify(pixels.view(), &against) {
        None => false,
        Some(first) => first.map(|_| true).context("scoring in the graph")?,
    };
    let on_host = |host: &mut dyn Embedder, pixels: ArrayView4<'_, u8>| -> Result<()> {
        let units = units(host, pixels)?;
        classes.score_with(&stage.scorer, units.view(), TOP_K);
        Ok(())
    };
    let rates = in_turns(stage.rounds, if fuses { 3 } else { 2 }, |way| {
        rate(stage.time, batch, || match way {
            0 => pixels
                .axis_chunks_iter(Axis(0), 1)
                .try_for_each(|image| on_host(host.as_mut(), image)),
            1 => on_host(host.as_mut(), pixels.view()),
            _ => {
                let scored = graph.classify(pixels.view(), &against);
                scored.ok_or_else(|| anyhow!("it scores no more"))??;
                Ok(())
            }
        })
    })?;
    let seconds: Vec<f64> = rates.iter().map(|rate| 100.0 / rate).collect();
    let what = format!("{name}, {} classes, s per 100 images", number(CLASSES as f64));
    let limit = format!("in the graph ≥ {least} × one by one");
    let [alone, batched] = [seconds[0], seconds[1]];
    let measured =
        format!("one by one {}, in batches of {batch} {}", number(alone), number(batched));
    let Some(fused) = seconds.get(2) else {
        report.unknown(what, format!("{measured}; this back end scores on the host"), limit);
        return Ok(());
    };
    let speedup = alone / fused;
    report.judge(
        what,
        format!("{measured}, in the graph {}: {speedup:.2} ×", number(*fused)),
        limit,
        Holds::OnAGpu(speedup >= least),
        &[("one_by_one", alone), ("batched", batched), ("fused", *fused)],
    );
    Ok(())
}
