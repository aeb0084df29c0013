//! The fused graph against the host, over models and class sets.

use super::*;

/// NHWC and BGR, a fixed batch of one and of four, an old opset, a zero embedding for black.
const MODELS: [&str; 5] = ["tiny-nhwc", "tiny-fixed4", "tiny-fixed1", "tiny-mean", "tiny-512"];
const IMAGES: usize = 9;

#[test]
fn the_graph_finds_what_the_host_finds() {
    for name in MODELS {
        let model = load(name);
        let mut plain = open(&model, Scoring::Host, 0);
        let mut fused = open(&model, Scoring::Graph, PLENTY);
        let pixels = noise(&model, IMAGES, 1);
        let embeddings = plain.embed(pixels.view()).unwrap();
        let rows = near(&embeddings, 120, 2);
        for (kind, labels) in [
            ("a vector a class", labels(120, |row| row)),
            // Neither in order nor of equal counts: class 0 has every third row, others a few.
            ("several vectors a class", labels(120, |row| if row % 3 == 0 { 0 } else { row % 17 })),
            ("one class", labels(120, |_| 0)),
        ] {
            for precision in [Precision::F32, Precision::F16] {
                let classes = set(&labels, &rows, precision);
                for top_k in [1, 2, 5, 100] {
                    let what = format!("{name}, {kind}, {precision}, top {top_k}");
                    let (_, wanted) = on_the_host(plain.as_mut(), pixels.view(), &classes, top_k);
                    let found = classify(fused.as_mut(), pixels.view(), &classes, top_k);
                    assert_same(&what, &found.top, &wanted, 1e-5);
                    let listed = top_k.min(classes.labels().len());
                    assert!(found.top.iter().flatten().all(|top| top.len() == listed), "{what}");
                }
            }
        }
    }
}

#[test]
fn the_default_model_scores_in_the_graph_as_on_the_host() {
    let [exact, half] = ["efficientnet-lite0", "efficientnet-lite0-fp16"].map(|name| {
        let model = load(name);
        let mut plain = open(&model, Scoring::Host, 0);
        let mut fused = open(&model, Scoring::Graph, PLENTY);
        let pixels = noise(&model, 3, 3);
        let embeddings = plain.embed(pixels.view()).unwrap();
        let rows = near(&embeddings, 1000, 4);
        let classes = set(&labels(1000, |row| row / 2), &rows, Precision::F32);
        let (_, wanted) = on_the_host(plain.as_mut(), pixels.view(), &classes, 5);
        let found = classify(fused.as_mut(), pixels.view(), &classes, 5);
        // An f16 model's output is f32, and so is all that is put behind it.
        assert_same(name, &found.top, &wanted, 1e-5);
        (classes, wanted, fused, pixels)
    });
    // In f16, with the vectors that the f32 model was scored with.
    let (classes, wanted, ..) = exact;
    let (_, _, mut fused, pixels) = half;
    let found = classify(fused.as_mut(), pixels.view(), &classes, 5);
    assert_same("f16 beside f32", &found.top, &wanted, 2e-3);
}

#[test]
fn ties_go_to_the_class_that_comes_first_wherever_its_rows_lie() {
    let model = load("tiny-512");
    let mut plain = open(&model, Scoring::Host, 0);
    let mut fused = open(&model, Scoring::Graph, PLENTY);
    let pixels = noise(&model, IMAGES, 5);
    let embeddings = plain.embed(pixels.view()).unwrap();
    let mut rows = near(&embeddings, 90, 6);
    let best = embeddings.row(0).to_owned();
    // The first class's best row comes last of all, after those of classes that tie with it.
    for row in [7, 8, 50, 89] {
        rows.row_mut(row).assign(&best);
    }
    let labels = labels(90, |row| if row == 89 { 0 } else { row });
    let classes = set(&labels, &rows, Precision::F32);
    for top_k in 1..=5 {
        let (_, wanted) = on_the_host(plain.as_mut(), pixels.view(), &classes, top_k);
        let first: Vec<u32> =
            wanted[0].as_ref().unwrap().iter().take(4).map(|entry| entry.class).collect();
        assert_eq!(first, [0, 7, 8, 50][..top_k.min(4)]);
        let found = classify(fused.as_mut(), pixels.view(), &classes, top_k);
        assert_same(&format!("top {top_k}"), &found.top, &wanted, 1e-5);
    }
}

#[test]
fn embeddings_come_back_if_wanted_and_are_the_same_as_ever() {
    for name in MODELS {
        let model = load(name);
        let mut plain = open(&model, Scoring::Host, 0);
        let mut fused = open(&model, Scoring::Graph, PLENTY);
        let pixels = noise(&model, IMAGES, 7);
        let wanted = plain.embed(pixels.view()).unwrap();
        let classes = set(&labels(20, |row| row), &near(&wanted, 20, 8), Precision::F32);
        let against = Against { classes: &classes, top_k: 3, embeddings: true };
        let scores = fused.classify(pixels.view(), &against).unwrap().unwrap();
        let (_, top) = on_the_host(plain.as_mut(), pixels.view(), &classes, 3);
        assert_same(name, &scores.top, &top, 1e-5);
        // Bit for bit: a job has one result, however its images were scored.
        assert_eq!(scores.embeddings.unwrap(), wanted, "{name}");
        assert_eq!(fused.embed(pixels.view()).unwrap(), wanted, "{name}");
        assert_eq!(classify(fused.as_mut(), pixels.view(), &classes, 3).embeddings, None);
    }
}

#[test]
fn sets_of_any_size_take_turns_in_one_session() {
    let model = load("tiny-nhwc");
    let mut plain = open(&model, Scoring::Host, 0);
    let mut fused = open(&model, Scoring::Graph, PLENTY);
    let pixels = noise(&model, IMAGES, 9);
    let embeddings = plain.embed(pixels.view()).unwrap();
    let sets: Vec<Arc<ClassVectors>> = [1, 500, 3, 40]
        .into_iter()
        .map(|rows| set(&labels(rows, |row| row), &near(&embeddings, rows, 10), Precision::F32))
        .collect();
    for turn in 0..3 {
        for classes in &sets {
            for images in [1, 9, 4] {
                let some = pixels.slice(ndarray::s![..images, .., .., ..]);
                let (_, wanted) = on_the_host(plain.as_mut(), some, classes, 2);
                let found = classify(fused.as_mut(), some, classes, 2);
                assert_same(&format!("turn {turn}"), &found.top, &wanted, 1e-5);
            }
        }
    }
    // Its copies do not keep a version alive.
    assert!(sets.iter().all(|classes| Arc::strong_count(classes) == 1));
}
