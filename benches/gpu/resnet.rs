//! A network of ResNet-50's size and shape (He et al., CVPR 2016: 25 million weights, 4.1 billion
//! multiplications at 224 × 224), made on the spot, so that nothing of 100 MB has to travel. Its
//! weights are random, so what it says of an image means nothing; what it takes is what a trained one
//! takes. Batch normalisation is folded into the convolutions, as an export for inference does.

use std::path::Path;

use anyhow::{Context, Result};
use prost::Message;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};

use angler_inference::model::Model;

/// What the last pool yields.
const FEATURES: usize = 2048;

/// The network for images of `side` × `side`, as a model folder under `folder`, loaded. With `dim` a
/// last layer brings the embedding to that length, as in models for metric learning; else it has 2048
/// values.
pub fn model(folder: &Path, side: u32, dim: Option<usize>) -> Result<Model> {
    let name = match dim {
        Some(dim) => format!("resnet50-size-{side}-to-{dim}"),
        None => format!("resnet50-size-{side}"),
    };
    let place = folder.join(&name);
    if !place.exists() {
        std::fs::create_dir_all(&place)?;
        std::fs::write(place.join("model.onnx"), onnx(side, dim))?;
        std::fs::write(place.join("model.toml"), description(&name, side, dim))?;
    }
    Ok(Model::load(place.to_str().context("the temporary folder's path is not UTF-8")?)?)
}

fn description(name: &str, side: u32, dim: Option<usize>) -> String {
    format!(
        "name = {name:?}\n\n[input]\nlayout = \"nchw\"\nchannels = \"rgb\"\nwidth = {side}\n\
         height = {side}\nresize = \"exact\"\nfilter = \"bilinear\"\n\
         mean = [123.675, 116.28, 103.53]\nstd = [58.395, 57.12, 57.375]\n\n[output]\ndim = {}\n",
        dim.unwrap_or(FEATURES)
    )
}

/// The graph as it is built, node after node.
struct Builder {
    graph: GraphProto,
    random: fastrand::Rng,
}

/// A convolution's sizes.
struct Conv {
    from: usize,
    to: usize,
    kernel: usize,
    stride: usize,
    /// What the weights are multiplied with.
    scale: f32,
}

fn onnx(side: u32, dim: Option<usize>) -> Vec<u8> {
    let mut b = Builder {
        graph: GraphProto { name: "resnet50".to_owned(), ..GraphProto::default() },
        random: fastrand::Rng::with_seed(50),
    };
    let stem = Conv { from: 3, to: 64, kernel: 7, stride: 2, scale: 1.0 };
    let mut last = b.conv("stem", "image", &stem);
    last = b.node("Relu", &[&last], Vec::new());
    let pool =
        vec![ints("kernel_shape", &[3, 3]), ints("strides", &[2, 2]), ints("pads", &[1, 1, 1, 1])];
    last = b.node("MaxPool", &[&last], pool);
    let mut from = 64;
    for (stage, (width, blocks)) in [(64, 3), (128, 4), (256, 6), (512, 3)].into_iter().enumerate()
    {
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            last = b.bottleneck(&format!("{stage}.{block}"), &last, from, width, stride);
            from = 4 * width;
        }
    }
    last = b.node("GlobalAveragePool", &[&last], Vec::new());
    last = b.node("Flatten", &[&last], vec![int("axis", 1)]);
    if let Some(dim) = dim {
        let weights = b.weights("head.weight", &[dim, FEATURES], FEATURES, 1.0);
        last = b.node("Gemm", &[&last, &weights], vec![int("transB", 1)]);
    }
    let output = "embedding".to_owned();
    if let Some(node) = b.graph.node.iter_mut().find(|node| node.output[0] == last) {
        node.output[0].clone_from(&output);
    }
    let batch = || Dimension {
        value: Some(dimension::Value::DimParam("batch".to_owned())),
        ..Dimension::default()
    };
    let side = i64::from(side);
    b.graph.input = vec![value("image", vec![batch(), size(3), size(side), size(side)])];
    b.graph.output = vec![value(&output, vec![batch(), size(dim.unwrap_or(FEATURES) as i64)])];
    let model = ModelProto {
        ir_version: 8,
        producer_name: "angler".to_owned(),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        graph: Some(b.graph),
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

impl Builder {
    /// 1 × 1 to `width`, 3 × 3, 1 × 1 to four times that, and what came in beside it.
    fn bottleneck(
        &mut self,
        name: &str,
        input: &str,
        from: usize,
        width: usize,
        stride: usize,
    ) -> String {
        let conv = |from, to, kernel, stride, scale| Conv { from, to, kernel, stride, scale };
        let mut last = self.conv(&format!("{name}.a"), input, &conv(from, width, 1, 1, 1.0));
        last = self.node("Relu", &[&last], Vec::new());
        last = self.conv(&format!("{name}.b"), &last, &conv(width, width, 3, stride, 1.0));
        last = self.node("Relu", &[&last], Vec::new());
        // A small step beside what came in, or values would grow from block to block.
        last = self.conv(&format!("{name}.c"), &last, &conv(width, 4 * width, 1, 1, 0.25));
        let beside = match (from == 4 * width, stride) {
            (true, 1) => input.to_owned(),
            _ => self.conv(&format!("{name}.d"), input, &conv(from, 4 * width, 1, stride, 1.0)),
        };
        last = self.node("Add", &[&last, &beside], Vec::new());
        self.node("Relu", &[&last], Vec::new())
    }

    fn conv(&mut self, name: &str, input: &str, conv: &Conv) -> String {
        let Conv { from, to, kernel, stride, scale } = *conv;
        let weights = self.weights(
            &format!("{name}.weight"),
            &[to, from, kernel, kernel],
            from * kernel * kernel,
            scale,
        );
        let bias = self.weights(&format!("{name}.bias"), &[to], 6, 0.01);
        let (kernel, stride) = (kernel as i64, stride as i64);
        let attributes = vec![
            ints("kernel_shape", &[kernel, kernel]),
            ints("strides", &[stride, stride]),
            ints("pads", &[kernel / 2; 4]),
        ];
        self.node("Conv", &[input, &weights, &bias], attributes)
    }

    /// Uniform, with the variance that keeps that of the values behind a ReLU (He et al., ICCV 2015).
    fn weights(&mut self, name: &str, shape: &[usize], inputs: usize, scale: f32) -> String {
        let bound = scale * (6.0 / inputs as f32).sqrt();
        let count: usize = shape.iter().product();
        let values = (0..count).flat_map(|_| {
            let value = bound * (2.0 * self.random.f32() - 1.0);
            value.to_le_bytes()
        });
        self.graph.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: shape.iter().map(|side| *side as i64).collect(),
            data_type: DataType::Float as i32,
            raw_data: values.collect(),
            ..TensorProto::default()
        });
        name.to_owned()
    }

    /// Appends a node; yields what it writes.
    fn node(&mut self, op: &str, input: &[&str], attribute: Vec<AttributeProto>) -> String {
        let output = format!("{}.{}", self.graph.node.len(), op.to_lowercase());
        self.graph.node.push(NodeProto {
            input: input.iter().map(|name| (*name).to_owned()).collect(),
            output: vec![output.clone()],
            name: output.clone(),
            op_type: op.to_owned(),
            attribute,
            ..NodeProto::default()
        });
        output
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    let r#type = AttributeType::Int as i32;
    AttributeProto { name: name.to_owned(), r#type, i: value, ..AttributeProto::default() }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    let (r#type, ints) = (AttributeType::Ints as i32, values.to_vec());
    AttributeProto { name: name.to_owned(), r#type, ints, ..AttributeProto::default() }
}

fn size(value: i64) -> Dimension {
    Dimension { value: Some(dimension::Value::DimValue(value)), ..Dimension::default() }
}

fn value(name: &str, dim: Vec<Dimension>) -> ValueInfoProto {
    let shape = Some(TensorShapeProto { dim });
    let tensor = type_proto::Tensor { elem_type: DataType::Float as i32, shape };
    let value = Some(type_proto::Value::TensorType(tensor));
    let r#type = Some(TypeProto { value, ..TypeProto::default() });
    ValueInfoProto { name: name.to_owned(), r#type, ..ValueInfoProto::default() }
}
