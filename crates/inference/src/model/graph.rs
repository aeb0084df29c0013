//! The graph edit: u8 pixels in front of any model's graph.
//!
//! The pixels travel as u8 [N, H, W, 3] up to the graph, a quarter of the bytes of f32, and the
//! graph itself does the rest: Transpose (for NCHW), Gather (for BGR), Cast, Sub mean, Div std. The
//! edit works on the ONNX protobuf, so both back ends run the same bytes, and it checks what
//! `model.toml` says against what the graph declares. Operators: ONNX specification, opset 9 on.

use prost::Message;
use tract_onnx::pb::{
    self, AttributeProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto::AttributeType, tensor_proto::DataType,
    tensor_shape_proto::Dimension, tensor_shape_proto::dimension, type_proto,
};

use angler_wire::error::Reason;

use super::{Channels, InputTransform, Layout, ModelError, PIXELS_INPUT};

/// What the edit yields.
pub(super) struct Edited {
    pub bytes: Vec<u8>,
    pub output: String,
    /// The embedding's length as the graph declares it, if it does.
    pub dim: Option<usize>,
    pub fixed_batch: Option<usize>,
}

/// Puts a u8 RGB NHWC input in front of the graph and keeps the embedding as the only output.
pub(super) fn with_pixel_input(
    onnx: &[u8],
    transform: &InputTransform,
    output: Option<&str>,
    place: &str,
) -> Result<Edited, ModelError> {
    let unusable =
        |reason: Reason| ModelError::Graph { place: format!("{place}/model.onnx"), reason };
    let mut model =
        ModelProto::decode(onnx).map_err(|e| unusable(Reason::new("not an ONNX model", e)))?;
    let graph = model
        .graph
        .as_mut()
        .filter(|graph| !graph.node.is_empty())
        .ok_or_else(|| unusable("not an ONNX model: it holds no graph".into()))?;
    if graph.initializer.iter().any(|tensor| !tensor.external_data.is_empty()) {
        return Err(unusable(
            "its weights lie in external files; save it as one file (onnx.save without \
             save_as_external_data)"
                .into(),
        ));
    }

    // Before IR version 4 every initializer was listed among the inputs as well.
    let initializers: std::collections::HashSet<&str> =
        graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs: Vec<&ValueInfoProto> =
        graph.input.iter().filter(|i| !initializers.contains(i.name.as_str())).collect();
    let input = choose(&inputs, transform.name.as_deref(), "input", place)?.clone();
    if let Some(other) = inputs.iter().find(|i| i.name != input.name) {
        return Err(unusable(
            format!(
                "it needs a second input, {:?}: only models of one image input can be used",
                other.name
            )
            .into(),
        ));
    }
    let outputs: Vec<&ValueInfoProto> = graph.output.iter().collect();
    let embedding = choose(&outputs, output, "output", place)?.clone();
    let fixed_batch = check_input(&input, transform, place)?;
    let dim = embedding_length(&embedding, place)?;

    let mut front = Front::new(&input.name);
    if transform.layout == Layout::Nchw {
        front.node("Transpose", &[], Some(ints("perm", &[0, 3, 1, 2])));
    }
    if transform.channels == Channels::Bgr {
        let axis = if transform.layout == Layout::Nchw { 1 } else { 3 };
        front.constant("bgr", int64s(&[2, 1, 0]));
        front.node("Gather", &["bgr"], Some(int("axis", axis)));
    }
    front.node("Cast", &[], Some(int("to", DataType::Float as i64)));
    front.constant("mean", per_channel(transform.mean, transform.layout, transform.width));
    front.constant("std", per_channel(transform.std, transform.layout, transform.width));
    front.node("Sub", &["mean"], None);
    front.node("Div", &["std"], None);
    let (nodes, constants) = front.finish(&input.name);

    graph.node.splice(0..0, nodes);
    graph.initializer.extend(constants);
    graph.input.retain(|i| i.name != input.name);
    graph.input.insert(0, pixels_input(&input, transform));
    graph.output.retain(|o| o.name == embedding.name);
    Ok(Edited { bytes: model.encode_to_vec(), output: embedding.name, dim, fixed_batch })
}

/// The named value, or the only one.
fn choose<'a>(
    values: &[&'a ValueInfoProto],
    name: Option<&str>,
    what: &str,
    place: &str,
) -> Result<&'a ValueInfoProto, ModelError> {
    let names = || values.iter().map(|v| format!("{:?}", v.name)).collect::<Vec<_>>().join(", ");
    match (name, values) {
        (None, [only]) => Ok(*only),
        (None, _) => Err(ModelError::Contradiction {
            place: place.to_owned(),
            said: format!("no {what}.name"),
            has: format!("has {} {what}s: {}", values.len(), names()),
        }),
        (Some(name), _) => values.iter().find(|v| v.name == name).copied().ok_or_else(|| {
            ModelError::Contradiction {
                place: place.to_owned(),
                said: format!("{what}.name = {name:?}"),
                has: format!("has {}", names()),
            }
        }),
    }
}

/// Compares the declared shape with `model.toml`; yields the batch size if it is fixed.
fn check_input(
    input: &ValueInfoProto,
    transform: &InputTransform,
    place: &str,
) -> Result<Option<usize>, ModelError> {
    let contradiction = |said: String, has: String| ModelError::Contradiction {
        place: place.to_owned(),
        said,
        has,
    };
    let (element, shape) = tensor_type(input);
    if element.is_some_and(|e| e != DataType::Float as i32) {
        return Err(contradiction(
            "nothing of the input's element type, which must be f32".to_owned(),
            format!("wants another one for {:?} (ONNX type {})", input.name, element.unwrap_or(0)),
        ));
    }
    let Some(shape) = shape else { return Ok(None) };
    let (h, w) = (i64::from(transform.height), i64::from(transform.width));
    let (wanted, letters) = match transform.layout {
        Layout::Nchw => ([3, h, w], "nchw"),
        Layout::Nhwc => ([h, w, 3], "nhwc"),
    };
    let agrees = shape.len() == 4
        && shape[1..].iter().zip(wanted).all(|(has, want)| fixed(has).is_none_or(|v| v == want));
    if !agrees {
        let [a, b, c] = wanted;
        return Err(contradiction(
            format!("layout = {letters:?}, so [N, {a}, {b}, {c}]"),
            format!("wants {} for {:?}", show(&shape), input.name),
        ));
    }
    Ok(fixed(&shape[0]).and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0))
}

/// The last dimension of the output, if it is declared; an embedding has two (or trailing ones).
fn embedding_length(output: &ValueInfoProto, place: &str) -> Result<Option<usize>, ModelError> {
    let (_, shape) = tensor_type(output);
    let Some(shape) = shape else { return Ok(None) };
    // [N, D, 1, 1] is what a global pool without Flatten gives.
    let trailing_ones = shape.iter().skip(2).all(|d| fixed(d).is_none_or(|v| v == 1));
    if shape.len() < 2 || !trailing_ones {
        return Err(ModelError::Contradiction {
            place: place.to_owned(),
            said: "that the output is one embedding an image, [N, dim]".to_owned(),
            has: format!("gives {} for {:?}", show(&shape), output.name),
        });
    }
    Ok(fixed(&shape[1]).and_then(|d| usize::try_from(d).ok()))
}

fn tensor_type(value: &ValueInfoProto) -> (Option<i32>, Option<Vec<Dimension>>) {
    match value.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(t)) => {
            (Some(t.elem_type), t.shape.as_ref().map(|s| s.dim.clone()))
        }
        None => (None, None),
    }
}

fn fixed(dimension: &Dimension) -> Option<i64> {
    match dimension.value {
        Some(dimension::Value::DimValue(value)) => Some(value),
        _ => None,
    }
}

fn show(shape: &[Dimension]) -> String {
    let show = |d: &Dimension| match &d.value {
        Some(dimension::Value::DimValue(value)) => value.to_string(),
        Some(dimension::Value::DimParam(name)) => name.clone(),
        None => "?".to_owned(),
    };
    format!("[{}]", shape.iter().map(show).collect::<Vec<_>>().join(", "))
}

/// The nodes that are put in front, each reading what the one before it wrote.
struct Front {
    prefix: String,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    last: String,
}

impl Front {
    fn new(input: &str) -> Self {
        Self {
            // A prefix of our own, so that no name of the model's is met.
            prefix: format!("angler/{input}"),
            nodes: Vec::new(),
            constants: Vec::new(),
            last: PIXELS_INPUT.to_owned(),
        }
    }

    fn constant(&mut self, name: &str, mut tensor: TensorProto) {
        tensor.name = format!("{}/{name}", self.prefix);
        self.constants.push(tensor);
    }

    fn node(&mut self, op: &str, constants: &[&str], attribute: Option<AttributeProto>) {
        let output = format!("{}/{}", self.prefix, op.to_lowercase());
        let second = constants.iter().map(|name| format!("{}/{name}", self.prefix));
        self.nodes.push(NodeProto {
            input: std::iter::once(std::mem::replace(&mut self.last, output.clone()))
                .chain(second)
                .collect(),
            name: output.clone(),
            output: vec![output],
            op_type: op.to_owned(),
            attribute: attribute.into_iter().collect(),
            ..NodeProto::default()
        });
    }

    /// The last node writes what the model used to read as its input.
    fn finish(mut self, input: &str) -> (Vec<NodeProto>, Vec<TensorProto>) {
        if let Some(last) = self.nodes.last_mut() {
            last.output = vec![input.to_owned()];
        }
        (self.nodes, self.constants)
    }
}

pub(super) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Int as i32,
        i: value,
        ..AttributeProto::default()
    }
}

pub(super) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Ints as i32,
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}

pub(super) fn int64s(values: &[i64]) -> TensorProto {
    TensorProto {
        dims: vec![values.len() as i64],
        data_type: DataType::Int64 as i32,
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..TensorProto::default()
    }
}

/// Three values shaped so that they broadcast along the channels of [N, C, H, W] or [N, H, W, C].
///
/// Equal ones are one value, and others are repeated along a row: ONNX Runtime moves the transpose
/// behind them where the model's first layer wants the channels last, and broadcasting three values
/// along the innermost axis then took as long as a fifth of an 8-bit model.
fn per_channel(values: [f32; 3], layout: Layout, width: u32) -> TensorProto {
    let (dims, values): (Vec<i64>, Vec<f32>) = match layout {
        _ if values.iter().all(|value| *value == values[0]) => (vec![1; 4], vec![values[0]]),
        Layout::Nchw => {
            let rows = values.iter().flat_map(|value| (0..width).map(|_| *value));
            (vec![1, 3, 1, width.into()], rows.collect())
        }
        Layout::Nhwc => (vec![1, 1, width.into(), 3], (0..width).flat_map(|_| values).collect()),
    };
    TensorProto {
        dims,
        data_type: DataType::Float as i32,
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..TensorProto::default()
    }
}

/// u8 [N, H, W, 3], with the model's own batch dimension: fixed, or under its own name.
fn pixels_input(input: &ValueInfoProto, transform: &InputTransform) -> ValueInfoProto {
    let value =
        |v: i64| Dimension { value: Some(dimension::Value::DimValue(v)), ..Dimension::default() };
    let batch = tensor_type(input).1.and_then(|shape| shape.into_iter().next()).unwrap_or_default();
    let dim = vec![batch, value(transform.height.into()), value(transform.width.into()), value(3)];
    ValueInfoProto {
        name: PIXELS_INPUT.to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(pb::type_proto::Tensor {
                elem_type: DataType::Uint8 as i32,
                shape: Some(TensorShapeProto { dim }),
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}
