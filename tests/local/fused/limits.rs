//! When the answer is that the host must score.

use super::*;

fn refuses(fused: &mut dyn Embedder, classes: &Arc<ClassVectors>, top_k: usize) -> bool {
    let model = load("tiny-mean");
    let against = Against { classes, top_k, embeddings: false };
    fused.classify(noise(&model, 2, 30).view(), &against).is_none()
}

fn of(rows: usize, class: impl Fn(usize) -> usize) -> Arc<ClassVectors> {
    let vectors = Array2::from_shape_fn((rows, 3), |(row, column)| (1 + row * (column + 1)) as f32);
    set(&labels(rows, class), &vectors, Precision::F32)
}

#[test]
fn a_set_that_does_not_fit_is_for_the_host_and_others_are_not() {
    let (small, large) = (of(10, |row| row), of(100, |row| row));
    let mut fused = open(&load("tiny-mean"), Scoring::Graph, 10 * 16);
    for _ in 0..2 {
        assert!(refuses(fused.as_mut(), &large, 1));
        assert!(!refuses(fused.as_mut(), &small, 1));
    }
    // Another one has no room while the first is served, and has it when that is gone.
    let next = of(9, |row| row);
    assert!(refuses(fused.as_mut(), &next, 1));
    drop(small);
    assert!(!refuses(fused.as_mut(), &next, 1));
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Each test is a process of its own, so this one's memory tells what its session holds.
#[test]
fn a_version_that_nobody_serves_leaves_the_memory_of_sessions_that_scored_against_it() {
    const ROWS: usize = 25_000;
    let model = load("efficientnet-lite0");
    let mut fused = open(&model, Scoring::Graph, PLENTY);
    let bytes = ROWS * model.dim * size_of::<f32>();
    let of = |rows: usize| {
        let value = |(row, column): (usize, usize)| ((row * 31 + column * 17) % 97) as f32 + 1.0;
        let vectors = Array2::from_shape_fn((rows, model.dim), value);
        set(&labels(rows, |row| row), &vectors, Precision::F32)
    };
    let (image, small) = (noise(&model, 1, 3), of(2));
    classify(fused.as_mut(), image.view(), &small, 1);
    let before = resident();
    let large = of(ROWS);
    classify(fused.as_mut(), image.view(), &large, 1);
    assert!(resident() > before + bytes, "it is there twice: for the host, and in the graph");
    drop(large);
    // A call of another kind: the first kind's last one must not keep what it was bound to.
    let against = Against { classes: &small, top_k: 1, embeddings: true };
    fused.classify(image.view(), &against).unwrap().unwrap();
    let left = resident().saturating_sub(before);
    assert!(left < bytes / 2, "{left} of {bytes} bytes are still there");
}

#[test]
fn classes_of_very_many_vectors_are_for_the_host() {
    let mut fused = open(&load("tiny-mean"), Scoring::Graph, PLENTY);
    assert!(refuses(fused.as_mut(), &of(5000, |row| row % 2 * (row % 7)), 5));
    assert!(refuses(fused.as_mut(), &of(9000, |row| row / 8999), 1));
    let crowded = of(5000, |row| row / 50);
    assert!(!refuses(fused.as_mut(), &crowded, 80));
    assert!(refuses(fused.as_mut(), &crowded, 90), "that would be 4451 rows an image");
}

#[test]
fn a_set_of_another_length_is_not_multiplied() {
    let mut fused = open(&load("tiny-mean"), Scoring::Graph, PLENTY);
    let other =
        set(&labels(2, |row| row), &ndarray::array![[1.0, 0.0], [0.0, 1.0]], Precision::F32);
    assert!(refuses(fused.as_mut(), &other, 1));
}

#[test]
fn where_scoring_is_done_is_said_and_follows_the_setting() {
    let (model, classes) = (load("tiny-mean"), of(4, |row| row));
    for (choice, scoring, words, in_graph) in [
        (BackendChoice::Onnxruntime, Scoring::Auto, "scored on the host, library", false),
        (BackendChoice::Onnxruntime, Scoring::Host, "scored on the host, library", false),
        (BackendChoice::Onnxruntime, Scoring::Graph, "scored in the graph, library", true),
        (BackendChoice::Tract, Scoring::Auto, "an image each, scored on the host", false),
        (BackendChoice::Tract, Scoring::Graph, "scored on the host (tract only embeds)", false),
    ] {
        let mut opened = opened(&model, choice, scoring, PLENTY);
        assert!(opened.reason.contains(words), "{}", opened.reason);
        let executed = opened.reason.contains(" nodes on CPUExecutionProvider, ");
        assert_eq!(executed, choice == BackendChoice::Onnxruntime, "{}", opened.reason);
        assert_eq!(!refuses(opened.embedders[0].as_mut(), &classes, 1), in_graph, "{words}");
    }
}
