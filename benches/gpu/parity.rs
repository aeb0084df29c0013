//! The same labels as on a CPU, and the same scores in the graph as on the host.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use ndarray::{Array1, Array2, Array4, ArrayView1, Axis};

use angler_inference::embed::{Against, Embedder, Scores, Scoring};
use angler_inference::model::Model;
use angler_vectors::ClassVectors;
use angler_vectors::score::ClassScore;

use crate::figures::percent;
use crate::report::{Holds, Report, wanted};
use crate::stage::{BATCH, Stage, TOP_K, Wish, set, units};

/// Classes of the set that is harder than the folders: near the images, and near each other.
const NEAR: usize = 1000;

pub fn measure(stage: &Stage, report: &mut Report) -> Result<()> {
    of_model(stage, report, "EfficientNet-Lite0", &stage.default, stage.sized(2048, 128))?;
    let resnet = stage.resnet(224, None)?;
    of_model(stage, report, "ResNet-50's size", &resnet, stage.sized(128, 8))
}

fn of_model(
    stage: &Stage,
    report: &mut Report,
    name: &str,
    model: &Model,
    count: usize,
) -> Result<()> {
    let (pixels, files) = stage.pixels(model, count)?;
    let wish = stage.wish(Scoring::Host);
    let reference = Wish { choice: stage.reference(), ..wish };
    let mut on_cpu = stage.open(model, reference)?;
    let beside = on_cpu.backend();
    let by_cpu = units(on_cpu.as_mut(), pixels.view())?;
    drop(on_cpu);
    let mut unfused = stage.open(model, wish)?;
    let by_host = units(unfused.as_mut(), pixels.view())?;
    drop(unfused);
    let mut fused = stage.open(model, stage.wish(Scoring::Graph))?;
    let sets = [
        ("folders", folders(stage, model, &by_cpu, &files)?),
        ("near classes", near(model, &by_cpu)?),
    ];

    let least = least_cosine(&by_cpu, &by_host);
    // What all images have in common taken off: of weights that mean nothing that is nearly all.
    let common = by_cpu.mean_axis(Axis(0)).context("no images")?;
    let apart = least_cosine(&(&by_cpu - &common), &(&by_host - &common));
    report.judge(
        format!("{name}: least cosine to {beside}, {count} images"),
        format!("{least:.6}; {apart:.6} without their mean"),
        format!("≥ {}", wanted::COSINE),
        Holds::Anywhere(least >= wanted::COSINE),
        &[("images", count as f64), ("least_cosine", least), ("without_mean", apart)],
    );
    for (set, classes) in sets {
        let on_cpu = classes.score_with(&stage.scorer, by_cpu.view(), TOP_K);
        let on_host = classes.score_with(&stage.scorer, by_host.view(), TOP_K);
        let best = |top: &Vec<ClassScore>| top.first().map(|best| best.class);
        let same = on_cpu.iter().zip(&on_host).filter(|(a, b)| best(a) == best(b)).count();
        let share = same as f64 / count as f64;
        report.judge(
            format!("{name}: labels as {beside} has them, {} {set}", classes.labels().len()),
            format!("{} ({same} of {count})", percent(share)),
            format!("≥ {}", percent(wanted::SAME_LABELS)),
            Holds::Anywhere(share >= wanted::SAME_LABELS),
            &[("images", count as f64), ("same", same as f64)],
        );
        let what =
            format!("{name}: in the graph beside the host, {} {set}", classes.labels().len());
        let limit = format!("scores within {:e}, same labels", wanted::SCORE);
        match in_graph(fused.as_mut(), &pixels, &classes)? {
            None => report.unknown(what, "this back end scores on the host", limit),
            Some(in_graph) => {
                let Compared { off, others } = compare(&in_graph, &on_host);
                report.judge(
                    what,
                    format!("off by {off:.1e} at most, {others} other labels"),
                    limit,
                    Holds::Anywhere(off <= wanted::SCORE && others == 0),
                    &[("score_off", f64::from(off)), ("other_labels", others as f64)],
                );
            }
        }
    }
    Ok(())
}

/// Of each image's row in both.
fn least_cosine(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    let dot = |a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let cosine = |(a, b): (ArrayView1<'_, f32>, ArrayView1<'_, f32>)| {
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let cosines = a.rows().into_iter().zip(b.rows()).map(cosine);
    // NaN is the least of all.
    cosines.fold(1.0, |least, cosine| if cosine >= least { least } else { cosine })
}

/// A class for each folder that images lie in, with their mean.
fn folders(
    stage: &Stage,
    model: &Model,
    units: &Array2<f32>,
    files: &[usize],
) -> Result<Arc<ClassVectors>> {
    let mut classes: BTreeMap<String, Array1<f32>> = BTreeMap::new();
    for (row, file) in units.rows().into_iter().zip(files) {
        let folder = stage.files[*file].parent().and_then(|f| f.file_name());
        let label = folder.map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        let sum = classes.entry(label).or_insert_with(|| Array1::zeros(units.ncols()));
        *sum += &row;
    }
    let rows: Vec<_> = classes.values().map(|sum| sum.view()).collect();
    let vectors = ndarray::stack(Axis(0), &rows)?;
    set(model, "folders", classes.into_keys().collect(), vectors)
}

/// Classes around the images, several of them around each.
fn near(model: &Model, units: &Array2<f32>) -> Result<Arc<ClassVectors>> {
    let mut random = fastrand::Rng::with_seed(3);
    let most = units.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let vectors = Array2::from_shape_fn((NEAR, units.ncols()), |(row, column)| {
        units[[row % units.nrows(), column]] + 0.5 * most * (random.f32() - 0.5)
    });
    set(model, "near", (0..NEAR).map(|row| format!("class-{row}")).collect(), vectors)
}

type Top = Vec<Option<Vec<ClassScore>>>;

/// The best classes as the graph has them; none if it has no such thing.
fn in_graph(
    fused: &mut dyn Embedder,
    pixels: &Array4<u8>,
    classes: &Arc<ClassVectors>,
) -> Result<Option<Top>> {
    let against = Against { classes, top_k: TOP_K, embeddings: false };
    let mut all = Vec::new();
    for batch in pixels.axis_chunks_iter(Axis(0), BATCH) {
        match fused.classify(batch, &against) {
            None => return Ok(None),
            Some(scores) => {
                let Scores { top, .. } = scores.context("scoring in the graph")?;
                all.extend(top);
            }
        }
    }
    Ok(Some(all))
}

struct Compared {
    /// The largest difference of two scores at the same place of a list.
    off: f32,
    /// Images with another best class, though the host's own scores of the two are apart.
    others: usize,
}

fn compare(in_graph: &Top, on_host: &[Vec<ClassScore>]) -> Compared {
    let mut compared = Compared { off: 0.0, others: 0 };
    for (found, host) in in_graph.iter().zip(on_host) {
        let found = found.as_deref().unwrap_or_default();
        if found.len() != host.len() {
            compared.off = f32::INFINITY;
        }
        for (a, b) in found.iter().zip(host) {
            // NaN is not within anything.
            let off = (a.score - b.score).abs();
            compared.off = if off <= compared.off { compared.off } else { off };
        }
        let [a, b] = [found, host].map(|top| top.first().map(|best| best.class));
        // Scores that are equal but for rounding may change places.
        let by_host = host.iter().find(|entry| Some(entry.class) == a);
        let tied = by_host.is_some_and(|entry| (entry.score - host[0].score).abs() < 1e-5);
        compared.others += usize::from(a != b && !tied);
    }
    compared
}
