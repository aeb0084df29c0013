//! Graphs that differ where the fused part meets them: opset, element type, shape, and embeddings
//! without a direction.

use prost::Message;
use tract_onnx::pb::{self, tensor_proto::DataType};

use super::*;

/// tiny-mean with its graph and its description changed.
fn changed(graph: impl FnOnce(&mut pb::ModelProto), toml: &[(&str, &str)]) -> Model {
    let folder = repository("tests/data/models/tiny-mean");
    let onnx = std::fs::read(folder.join("model.onnx")).unwrap();
    let mut description = std::fs::read_to_string(folder.join("model.toml")).unwrap();
    for (from, to) in toml {
        assert!(description.contains(from), "{from:?} is not in:\n{description}");
        description = description.replace(from, to);
    }
    let mut proto = pb::ModelProto::decode(onnx.as_slice()).unwrap();
    graph(&mut proto);
    Model::from_parts(&proto.encode_to_vec(), &description, "tiny-mean").unwrap()
}

fn tensor(value: &mut pb::ValueInfoProto) -> &mut pb::type_proto::Tensor {
    match value.r#type.as_mut().unwrap().value.as_mut().unwrap() {
        pb::type_proto::Value::TensorType(tensor) => tensor,
    }
}

/// Red, green and blue, and two between them.
fn colours() -> Arc<ClassVectors> {
    let rows = ndarray::array![
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
        [1.0, 1.0, 0.0],
        [0.0, 2.0, 1.0]
    ];
    set(&labels(5, |row| row), &rows, Precision::F32)
}

/// What a model gives in the graph is what `plain`, or else itself, gives on the host.
fn assert_scores_as(model: &Model, plain: &Model, bound: f32) {
    let (classes, pixels) = (colours(), noise(model, 7, 20));
    let mut plain = open(plain, Scoring::Host, 0);
    let mut fused = open(model, Scoring::Graph, PLENTY);
    let (_, wanted) = on_the_host(plain.as_mut(), pixels.view(), &classes, 3);
    let found = classify(fused.as_mut(), pixels.view(), &classes, 3);
    assert_same(&model.name, &found.top, &wanted, bound);
}

#[test]
fn operators_of_every_age_fit() {
    // From 13 on reductions change; 18 makes their axes an input.
    for opset in [11, 12, 13, 17, 18, 20, 21] {
        let model = changed(
            |proto| {
                proto.opset_import[0].version = opset;
                proto.ir_version = 8;
            },
            &[],
        );
        assert_scores_as(&model, &model, 1e-6);
    }
    let old = changed(|proto| proto.opset_import[0].version = 9, &[]);
    let opened = opened(&old, BackendChoice::Onnxruntime, Scoring::Graph, PLENTY);
    assert!(opened.reason.contains("scored on the host (tiny-mean: "), "{}", opened.reason);
    assert!(opened.reason.contains("opset 9"), "{}", opened.reason);
}

#[test]
fn a_pool_without_flatten_and_halves_are_embeddings_too() {
    let pool = changed(
        |proto| {
            let graph = proto.graph.as_mut().unwrap();
            let flatten = graph.node.pop().unwrap();
            assert_eq!(flatten.op_type, "Flatten");
            graph.output[0].name = flatten.input[0].clone();
            let shape = tensor(&mut graph.output[0]).shape.as_mut().unwrap();
            let one = pb::tensor_shape_proto::dimension::Value::DimValue(1);
            let one = pb::tensor_shape_proto::Dimension { value: Some(one), ..Default::default() };
            shape.dim.extend([one.clone(), one]);
        },
        &[],
    );
    assert_scores_as(&pool, &pool, 1e-6);

    let halves = changed(
        |proto| {
            let graph = proto.graph.as_mut().unwrap();
            let cast = pb::NodeProto {
                op_type: "Cast".to_owned(),
                input: vec![graph.output[0].name.clone()],
                output: vec!["half".to_owned()],
                attribute: vec![pb::AttributeProto {
                    name: "to".to_owned(),
                    r#type: pb::attribute_proto::AttributeType::Int as i32,
                    i: DataType::Float16 as i64,
                    ..Default::default()
                }],
                ..Default::default()
            };
            graph.node.push(cast);
            graph.output[0].name = "half".to_owned();
            tensor(&mut graph.output[0]).elem_type = DataType::Float16 as i32;
        },
        &[],
    );
    assert_scores_as(&halves, &load("tiny-mean"), 2e-3);
}

#[test]
fn an_embedding_without_a_direction_is_told_from_its_neighbours() {
    let model = load("tiny-mean");
    let mut pixels = noise(&model, 5, 21);
    for black in [0, 3] {
        pixels.slice_mut(ndarray::s![black, .., .., ..]).fill(0);
    }
    let classes = colours();
    let mut fused = open(&model, Scoring::Graph, PLENTY);
    let (_, wanted) =
        on_the_host(open(&model, Scoring::Host, 0).as_mut(), pixels.view(), &classes, 2);
    assert_eq!(
        wanted.iter().map(Option::is_some).collect::<Vec<_>>(),
        [false, true, true, false, true]
    );
    let found = classify(fused.as_mut(), pixels.view(), &classes, 2);
    assert_same("black", &found.top, &wanted, 1e-6);

    // Infinite: the mean of what is bright is beyond f32.
    let infinite =
        changed(|_| {}, &[("std = [255.0, 255.0, 255.0]", "std = [1e-36, 1e-36, 1e-36]")]);
    pixels.slice_mut(ndarray::s![1, .., .., ..]).fill(1);
    let mut fused = open(&infinite, Scoring::Graph, PLENTY);
    let found = classify(fused.as_mut(), pixels.view(), &classes, 2);
    assert_eq!(
        found.top.iter().map(Option::is_some).collect::<Vec<_>>(),
        [false, true, false, false, false]
    );
}

#[test]
fn huge_and_minute_embeddings_have_a_direction() {
    for std in ["1e-28", "1e30"] {
        let to = format!("std = [{std}, {std}, {std}]");
        let model = changed(|_| {}, &[("std = [255.0, 255.0, 255.0]", &to)]);
        assert_scores_as(&model, &model, 1e-5);
    }
}
