//! The fused graph: pixels and class vectors in, the best rows and their scores out.
//!
//! It is made from the edited graph of the model and is one session with it: behind the embedding
//! stand a cast to f32, the scaling to unit length, the product with the class vectors, and TopK.
//! The class vectors and the number of rows to list are inputs of a run, so another version of a
//! set, or another set, rebuilds nothing.
//!
//! What comes out are rows and not classes. A class with several vectors is settled by whoever asks
//! ([`angler_vectors::matrix`]): asked for enough rows, the list holds every class that is wanted,
//! so no index input, no padding and no second pass over the scores is needed in the graph.
//!
//! The length is taken in two steps, because squares overflow f32 long before values do: divided
//! by the sum of its magnitudes an embedding has values of at most 1. An embedding that is zero or
//! not finite has [`LENGTH`] NaN; its rows mean nothing. Only operators are used whose CUDA
//! kernels cover every opset from `OLDEST_OPSET` on (ReduceMax, for example, has a gap).

use prost::Message;
use tract_onnx::pb::{
    AttributeProto, ModelProto, NodeProto, TensorShapeProto, TypeProto, ValueInfoProto,
    tensor_proto::DataType, tensor_shape_proto::Dimension, tensor_shape_proto::dimension,
    type_proto,
};

use super::graph::{int, int64s, ints};
use angler_wire::error::Reason;

use super::{Model, ModelError};

/// Input: f32 [rows, dim], unit rows.
pub const CLASSES: &str = "angler_classes";
/// Input: i64 `[1]`, how many rows are listed, at most as many as there are.
pub const COUNT: &str = "angler_count";
/// Output: f32 [N, dim], not normalised.
pub const EMBEDDING: &str = "angler_embedding";
/// Output: f32 [N, 1], above 0 for an embedding with a direction, else NaN.
pub const LENGTH: &str = "angler_length";
/// Output: f32 [N, count], cosine similarities, best first.
pub const SCORES: &str = "angler_scores";
/// Output: i64 [N, count], the rows that they belong to.
pub const ROWS: &str = "angler_rows";

/// Before it TopK listed no largest values by contract, and Gemm wanted a bias.
const OLDEST_OPSET: i64 = 11;
/// From it on the axes of a reduction are an input.
const AXES_ARE_INPUT: i64 = 18;

impl Model {
    /// The ONNX graph from [`super::PIXELS_INPUT`], [`CLASSES`] and [`COUNT`] to [`EMBEDDING`],
    /// [`LENGTH`], [`SCORES`] and [`ROWS`].
    ///
    /// # Errors
    /// [`ModelError::Graph`] if the model's operators are too old for it.
    pub fn fused_graph(&self) -> Result<Vec<u8>, ModelError> {
        let unusable = |reason: Reason| ModelError::Graph { place: self.name.clone(), reason };
        let mut proto = ModelProto::decode(self.graph.as_slice())
            .map_err(|e| unusable(Reason::new("not an ONNX model", e)))?;
        let onnx = |domain: &str| domain.is_empty() || domain == "ai.onnx";
        let opset = proto.opset_import.iter().filter(|o| onnx(&o.domain)).map(|o| o.version).max();
        let opset = opset.unwrap_or(0);
        if opset < OLDEST_OPSET {
            let reason = format!(
                "its operators are of opset {opset}, and scoring in the graph takes \
                 {OLDEST_OPSET} or later (onnx.version_converter makes a newer one)"
            );
            return Err(unusable(reason.into()));
        }
        let graph = proto
            .graph
            .as_mut()
            .ok_or_else(|| unusable("not an ONNX model: it holds no graph".into()))?;

        graph.node.extend(tail(&self.output, opset));
        if opset >= AXES_ARE_INPUT {
            let mut axes = int64s(&[1]);
            axes.name = AXES.to_owned();
            graph.initializer.push(axes);
        }
        let dim = size(self.dim);
        graph.input.extend([
            value(CLASSES, DataType::Float, vec![Dimension::default(), dim.clone()]),
            value(COUNT, DataType::Int64, vec![size(1)]),
        ]);
        let each = Dimension::default;
        graph.output = vec![
            value(EMBEDDING, DataType::Float, vec![each(), dim]),
            value(LENGTH, DataType::Float, vec![each(), size(1)]),
            value(SCORES, DataType::Float, vec![each(), each()]),
            value(ROWS, DataType::Int64, vec![each(), each()]),
        ];
        Ok(proto.encode_to_vec())
    }
}

// Names of our own inside the graph, so that no name of the model's is met.
const AXES: &str = "angler/fused/axes";
const FLAT: &str = "angler/fused/flat";
const MAGNITUDE: &str = "angler/fused/magnitude";
const SCALED: &str = "angler/fused/scaled";
const UNIT: &str = "angler/fused/unit";
const PRODUCT: &str = "angler/fused/product";

fn tail(output: &str, opset: i64) -> Vec<NodeProto> {
    let reduce = |op: &str, input: &str, output: &str| {
        if opset >= AXES_ARE_INPUT {
            node(op, &[input, AXES], &[output], vec![int("keepdims", 1)])
        } else {
            node(op, &[input], &[output], vec![int("keepdims", 1), ints("axes", &[1])])
        }
    };
    let to_f32 = int("to", DataType::Float as i64);
    vec![
        // [N, D, 1, 1] is what a global pool without Flatten gives.
        node("Flatten", &[output], &[FLAT], vec![int("axis", 1)]),
        node("Cast", &[FLAT], &[EMBEDDING], vec![to_f32]),
        reduce("ReduceL1", EMBEDDING, MAGNITUDE),
        node("Div", &[EMBEDDING, MAGNITUDE], &[SCALED], Vec::new()),
        reduce("ReduceL2", SCALED, LENGTH),
        node("Div", &[SCALED, LENGTH], &[UNIT], Vec::new()),
        node("Gemm", &[UNIT, CLASSES], &[PRODUCT], vec![int("transB", 1)]),
        // On a tie the row that comes first is listed first.
        node("TopK", &[PRODUCT, COUNT], &[SCORES, ROWS], vec![int("axis", 1)]),
    ]
}

fn node(op: &str, input: &[&str], output: &[&str], attribute: Vec<AttributeProto>) -> NodeProto {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    NodeProto {
        input: names(input),
        output: names(output),
        name: format!("{}/{op}", output.first().unwrap_or(&"angler")),
        op_type: op.to_owned(),
        attribute,
        ..NodeProto::default()
    }
}

fn size(value: usize) -> Dimension {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    Dimension { value: Some(dimension::Value::DimValue(value)), ..Dimension::default() }
}

fn value(name: &str, element: DataType, dim: Vec<Dimension>) -> ValueInfoProto {
    let tensor =
        type_proto::Tensor { elem_type: element as i32, shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_own_graph_is_not_touched() {
        let model = Model::load(super::super::tests::FOLDER).unwrap();
        let fused = ModelProto::decode(model.fused_graph().unwrap().as_slice()).unwrap();
        let plain = ModelProto::decode(model.graph.as_slice()).unwrap();
        let (fused, plain) = (fused.graph.unwrap(), plain.graph.unwrap());
        assert_eq!(fused.node[..plain.node.len()], plain.node);
        let names = |values: &[ValueInfoProto]| -> Vec<String> {
            values.iter().map(|value| value.name.clone()).collect()
        };
        assert_eq!(names(&plain.output), ["embedding"]);
        assert_eq!(names(&fused.output), [EMBEDDING, LENGTH, SCORES, ROWS]);
        assert_eq!(names(&fused.input), [super::super::PIXELS_INPUT, CLASSES, COUNT]);
    }

    #[test]
    fn operators_that_are_too_old_are_refused_with_the_reason() {
        let mut model = Model::load(super::super::tests::FOLDER).unwrap();
        let mut proto = ModelProto::decode(model.graph.as_slice()).unwrap();
        proto.opset_import[0].version = 10;
        model.graph = proto.encode_to_vec();
        let message = model.fused_graph().unwrap_err().to_string();
        assert!(message.contains("opset 10") && message.contains("11"), "{message}");
    }
}
