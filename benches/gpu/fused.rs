//! Scoring in the graph against scoring on the host, by the size of the set: a batch's time from
//! pixels in memory to labels.

use anyhow::{Context, Result, anyhow};
use ndarray::s;

use angler_inference::embed::{Against, Scoring};

use crate::figures::{in_turns, number, rate};
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, Stage, TOP_K, units};

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    let model = &stage.default;
    let batch = stage.sized(BATCH, 8);
    let (pixels, _) = stage.pixels(model, batch)?;
    let pixels = pixels.slice(s![.., .., .., ..]);
    let mut host = stage.open(model, stage.wish(Scoring::Host))?;
    let mut graph = stage.open(model, stage.wish(Scoring::Graph))?;
    for rows in stage.sized(vec![1000, 10_000, 100_000], vec![1000, 10_000]) {
        let classes = stage.random_set(model, rows, 1)?;
        let against = Against { classes: &classes, top_k: TOP_K, embeddings: false };
        let name = format!("batch of {batch}, {} × {} classes", number(rows as f64), model.dim);
        let limit = format!("in the graph ≥ {} × on the host", wanted::NOT_SLOWER);
        // The first run makes the copy of the set.
        let Some(first) = graph.classify(pixels, &against) else {
            report.unknown(name, "this back end scores on the host", limit);
            continue;
        };
        first.context("scoring in the graph")?;
        let rates = in_turns(stage.rounds, 2, |way| {
            rate(stage.time, batch, || {
                if way == 0 {
                    let units = units(host.as_mut(), pixels)?;
                    classes.score_with(&stage.scorer, units.view(), TOP_K);
                } else {
                    let scored = graph.classify(pixels, &against);
                    scored.ok_or_else(|| anyhow!("it scores no more"))??;
                }
                Ok(())
            })
        })?;
        let [on_host, in_graph] = [0, 1].map(|way| 1e3 * batch as f64 / rates[way]);
        report.judge(
            name,
            format!(
                "{} ms on the host, {} in the graph: {:.2} ×",
                number(on_host),
                number(in_graph),
                on_host / in_graph
            ),
            limit,
            Holds::OnAGpu(on_host / in_graph >= wanted::NOT_SLOWER),
            &[("rows", rows as f64), ("host_ms", on_host), ("graph_ms", in_graph)],
        );
    }
    Ok(())
}
