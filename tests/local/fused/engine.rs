//! Through the engine: which batches the back end scores, and that every image gets the labels of
//! its own version.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;

use angler_inference::embed::{Backend, EmbedError};
use angler_inference::engine::policy::BatchPolicy;
use angler_inference::engine::{Engine, Scored, SubmitError, Want};
use angler_vectors::score::Scorer;

use super::*;

/// A batch closes when it has this many images, and never by time.
const BATCH: usize = 4;

#[derive(Default)]
struct Calls {
    embed: AtomicUsize,
    classify: AtomicUsize,
    /// Whether scoring fails, as on a device without memory.
    fails: AtomicBool,
}

/// A session of the fused graph, its calls counted.
struct Counted {
    inner: Box<dyn Embedder>,
    calls: Arc<Calls>,
}

impl Embedder for Counted {
    fn backend(&self) -> Backend {
        self.inner.backend()
    }

    fn embed(&mut self, pixels: ArrayView4<'_, u8>) -> Result<Array2<f32>, EmbedError> {
        self.calls.embed.fetch_add(1, Ordering::SeqCst);
        self.inner.embed(pixels)
    }

    fn classify(
        &mut self,
        pixels: ArrayView4<'_, u8>,
        against: &Against<'_>,
    ) -> Option<Result<Scores, EmbedError>> {
        self.calls.classify.fetch_add(1, Ordering::SeqCst);
        if self.calls.fails.load(Ordering::SeqCst) {
            return Some(Err(EmbedError::Batch("no memory".into())));
        }
        self.inner.classify(pixels, against)
    }
}

struct Rig {
    engine: Engine,
    calls: Arc<Calls>,
}

impl Rig {
    fn new(graph_bytes: usize) -> Self {
        let model = load("tiny-mean");
        let calls = Arc::<Calls>::default();
        let inner = open(&model, Scoring::Graph, graph_bytes);
        let embedder = Counted { inner, calls: Arc::clone(&calls) };
        let policy = BatchPolicy { max_batch: BATCH, linger: Duration::from_secs(3600) };
        let engine =
            Engine::start(vec![Box::new(embedder)], policy, (8, 8), Scorer::default()).unwrap();
        Self { engine, calls }
    }

    /// One batch of these.
    async fn batch(&self, wants: Vec<(Colour, Want)>) -> Vec<Result<Scored, SubmitError>> {
        assert_eq!(wants.len(), BATCH);
        let submit = async |(colour, want): (Colour, Want)| {
            let mut frame = self.engine.frame().await?;
            frame.pixels_mut().copy_from_slice(&colour.repeat(64));
            self.engine.submit(frame, want).await
        };
        join_all(wants.into_iter().map(submit)).await
    }

    /// Calls of `embed`, but for the warm-up, and of `classify`; batches that were scored there.
    fn calls(&self) -> (usize, usize, u64) {
        let count = |calls: &AtomicUsize| calls.load(Ordering::SeqCst);
        let in_graph = self.engine.stats().scored_in_graph();
        (count(&self.calls.embed) - 1, count(&self.calls.classify), in_graph)
    }
}

type Colour = [u8; 3];
const RED: Colour = [200, 9, 20];
const GREEN: Colour = [9, 200, 30];
const BLUE: Colour = [9, 20, 200];
const BLACK: Colour = [0; 3];

/// A version of three colours, in this order; its labels name it.
fn version(name: &str, order: [&str; 3]) -> Arc<ClassVectors> {
    let vector = |colour: &str| match colour {
        "red" => [1.0, 0.0, 0.0],
        "green" => [0.0, 1.0, 0.0],
        _ => [0.0, 0.0, 1.0],
    };
    let labels = order.map(|colour| format!("{colour}-{name}")).to_vec();
    let contents = Contents::new(labels, ndarray::arr2(&order.map(vector)), "m@0");
    Arc::new(ClassVectors::new(("colours", name), contents).unwrap())
}

fn want(classes: &Arc<ClassVectors>, top_k: usize) -> Want {
    Want { classes: Some(Arc::clone(classes)), top_k, ..Want::default() }
}

/// The label of the best class.
fn label(classes: &ClassVectors, scored: &Result<Scored, SubmitError>) -> String {
    let top = &scored.as_ref().unwrap().top;
    classes.labels().get(top[0].class as usize).to_owned()
}

#[tokio::test]
async fn each_side_of_a_swap_gets_the_labels_of_its_version() {
    let rig = Rig::new(PLENTY);
    let mut served = version("0", ["red", "green", "blue"]);
    for (turn, order) in
        [["green", "blue", "red"], ["blue", "red", "green"]].repeat(3).iter().enumerate()
    {
        // A batch of the version that is served, one across the swap, one of the next.
        let next = version(&(turn + 1).to_string(), *order);
        for versions in [[&served; 4], [&served, &next, &served, &next], [&next; 4]] {
            let wants = versions.iter().zip([RED, GREEN, BLUE, RED]);
            let wants = wants.map(|(classes, colour)| (colour, want(classes, 2))).collect();
            let scored = rig.batch(wants).await;
            let labels: Vec<String> = versions
                .iter()
                .zip(&scored)
                .map(|(classes, scored)| label(classes, scored))
                .collect();
            let wanted: Vec<String> = versions
                .iter()
                .zip(["red", "green", "blue", "red"])
                .map(|(classes, colour)| format!("{colour}-{}", classes.version()))
                .collect();
            assert_eq!(labels, wanted);
        }
        // It goes with the last job that holds it.
        assert_eq!(Arc::strong_count(&served), 1);
        served = next;
    }
    // Of 18 batches 6 held two versions: embedded once each.
    assert_eq!(rig.calls(), (6, 12, 12));
    assert!(rig.engine.stats().describe().ends_with(", 12 scored in the graph"));
    rig.engine.close().await;
}

#[tokio::test]
async fn what_differs_within_a_version_is_answered_image_by_image() {
    let rig = Rig::new(PLENTY);
    let classes = version("1", ["red", "green", "blue"]);
    let mut with_embedding = want(&classes, 1);
    with_embedding.embedding = true;
    let scored = rig
        .batch(vec![
            (RED, want(&classes, 3)),
            (BLACK, want(&classes, 3)),
            (BLUE, with_embedding.clone()),
            (GREEN, want(&classes, 9)),
        ])
        .await;
    assert_eq!(rig.calls(), (0, 1, 1));
    let Err(SubmitError::Image(error)) = &scored[1] else { panic!("{scored:?}") };
    assert!(error.message.contains("zero or not finite"), "{error:?}");
    let [red, blue, green] = [0, 2, 3].map(|at| scored[at].as_ref().unwrap());
    assert_eq!([red.top.len(), blue.top.len(), green.top.len()], [3, 1, 3]);
    assert_eq!((red.embedding.as_ref(), green.embedding.as_ref()), (None, None));
    let embedding = blue.embedding.as_ref().unwrap();
    let length: f32 = embedding.iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-6 && embedding[2] > 0.9, "{embedding:?}");

    // The same image scored on the host: the same bytes come back.
    let mut shadowed = with_embedding;
    shadowed.shadow = Some(version("2", ["blue", "red", "green"]));
    let host = rig.batch(vec![(BLUE, shadowed.clone()); 4]).await;
    assert_eq!(rig.calls(), (1, 1, 1), "a shadow version is scored on the host");
    let host = host[0].as_ref().unwrap();
    assert_eq!(host.embedding.as_ref(), Some(embedding));
    assert_eq!((host.shadow.len(), host.shadow[0].class), (2, 0));
    assert!((host.top[0].score - blue.top[0].score).abs() < 1e-6);
    rig.engine.close().await;
}

#[tokio::test]
async fn what_the_back_end_cannot_score_the_host_scores() {
    // The second set does not fit.
    let rig = Rig::new(3 * 16);
    let (fits, not) =
        (version("1", ["red", "green", "blue"]), version("2", ["blue", "green", "red"]));
    for classes in [&fits, &not] {
        let scored = rig.batch(vec![(GREEN, want(classes, 2)); 4]).await;
        assert!(scored.iter().all(|s| label(classes, s).starts_with("green")));
    }
    assert_eq!(rig.calls(), (1, 2, 1));
    // Only embeddings are wanted: nothing to score.
    let bare = Want { embedding: true, ..Want::default() };
    let scored = rig.batch(vec![(GREEN, bare); 4]).await;
    assert!(scored.iter().all(|s| s.as_ref().unwrap().embedding.is_some()));
    assert_eq!(rig.calls(), (2, 2, 1));
    // Scoring fails: no image is blamed for it.
    rig.calls.fails.store(true, Ordering::SeqCst);
    let scored = rig.batch(vec![(RED, want(&fits, 2)); 4]).await;
    assert!(scored.iter().all(|s| label(&fits, s) == "red-1"));
    assert_eq!(rig.calls(), (3, 3, 1));
    rig.engine.close().await;
}

#[tokio::test]
async fn sessions_of_a_device_have_one_memory_to_upload_to() {
    let model = load("tiny-mean");
    let two = || {
        let options = options(BackendChoice::Onnxruntime, Scoring::Graph, PLENTY);
        let options = embed::Options { sessions: 2, ..options };
        embed::open(&model, &options).unwrap().embedders
    };
    // What is opened apart shares nothing.
    for (embedders, memories) in [(two(), 1), (two().into_iter().chain(two()).collect(), 2)] {
        let policy = BatchPolicy { max_batch: BATCH, linger: Duration::from_secs(3600) };
        let engine = Engine::start(embedders, policy, (8, 8), Scorer::default()).unwrap();
        assert_eq!(engine.sessions(), 2 * memories);
        assert_eq!(engine.class_memories().len(), memories);
        engine.close().await;
    }
}
