"""Makes the tiny networks in tests/data/models.

    python tests/data/make_models.py

Needs numpy and onnx. The weights are random but always the same. Each network
has a different way to describe its input, and each keeps the position of what
it sees, so that a wrong channel order, crop or scale shows in the embedding.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MODELS = Path(__file__).resolve().parent / "models"


class Graph:
    """Nodes and weights of one network, with a random stream of its own."""

    def __init__(self, seed):
        # RandomState's stream is frozen: no numpy release will change it.
        self.random = np.random.RandomState(seed)
        self.nodes = []
        self.initializers = []

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name, shape):
        """Uniform weights, scaled so that the signal neither dies nor grows."""
        fan_in = int(np.prod(shape[1:]))
        bound = np.sqrt(6.0 / fan_in)
        values = self.random.uniform(-bound, bound, shape)
        # Without a mean, a filter answers to structure more than to brightness.
        values -= values.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        self.initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def bias(self, name, length):
        values = self.random.uniform(-0.1, 0.1, length).astype(np.float32)
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def convolution(self, tip, name, channels_in, channels_out, stride):
        """3 x 3 convolution and Relu."""
        inputs = [
            tip,
            self.weight(f"{name}.weight", (channels_out, channels_in, 3, 3)),
            self.bias(f"{name}.bias", channels_out),
        ]
        out = self.node(
            "Conv", inputs, name, kernel_shape=[3, 3], strides=[stride, stride], pads=[1, 1, 1, 1]
        )
        return self.node("Relu", [out], f"{name}.relu")

    def linear(self, tip, name, length_in, length_out):
        inputs = [
            tip,
            self.weight(f"{name}.weight", (length_out, length_in)),
            self.bias(f"{name}.bias", length_out),
        ]
        return self.node("Gemm", inputs, name, transB=1)

    def grid(self, tip, size):
        """Average pool in squares of `size`, then one row a picture."""
        pooled = self.node("AveragePool", [tip], "pool", kernel_shape=[size] * 2, strides=[size] * 2)
        return self.node("Flatten", [pooled], "grid", axis=1)

    def save(self, folder, inputs, outputs, opset, ir_version, settings):
        """Writes model.onnx and model.toml."""
        graph = helper.make_graph(
            self.nodes,
            folder.replace("-", "_"),
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            producer_name="make_models.py",
            ir_version=ir_version,
        )
        onnx.checker.check_model(model, full_check=True)
        target = MODELS / folder
        target.mkdir(parents=True, exist_ok=True)
        (target / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        (target / "model.toml").write_text(settings, encoding="utf-8")


def tiny_nhwc():
    """NHWC, BGR, not square, free batch, and a second output of the same length.

    `aux` stands first: taking the first output instead of the named one is a mistake
    that only the values give away.
    """
    graph = Graph(seed=1)
    tip = graph.node("Transpose", ["image_bgr"], "nchw", perm=[0, 3, 1, 2])
    tip = graph.convolution(tip, "conv1", 3, 8, stride=2)
    tip = graph.convolution(tip, "conv2", 8, 16, stride=2)
    tip = graph.grid(tip, 2)
    graph.linear(tip, "aux", 16 * 3 * 5, 24)
    graph.linear(tip, "features", 16 * 3 * 5, 24)
    graph.save(
        "tiny-nhwc",
        {"image_bgr": ["batch", 24, 40, 3]},
        {"aux": ["batch", 24], "features": ["batch", 24]},
        opset=13,
        ir_version=8,
        settings="""\
name = "tiny-nhwc"

[input]
name = "image_bgr"
layout = "nhwc"
channels = "bgr"
width = 40
height = 24
resize = "exact"
filter = "bilinear"
mean = [103.5, 116.3, 123.7]   # blue, green, red
std = [57.4, 57.1, 58.4]

[output]
name = "features"              # the graph has another output, "aux"
dim = 24
""",
    )


def tiny_fixed4():
    """NCHW, RGB, 32 x 32, batches of exactly 4, names left to be found."""
    graph = Graph(seed=2)
    tip = graph.convolution("pixels", "conv1", 3, 8, stride=2)
    tip = graph.convolution(tip, "conv2", 8, 16, stride=2)
    tip = graph.grid(tip, 2)
    graph.linear(tip, "code", 16 * 4 * 4, 16)
    graph.save(
        "tiny-fixed4",
        {"pixels": [4, 3, 32, 32]},
        {"code": [4, 16]},
        opset=13,
        ir_version=8,
        settings="""\
name = "tiny-fixed4"

[input]
layout = "nchw"
channels = "rgb"
width = 32
height = 32
resize = "shorter-side"
resize_to = 36
filter = "bicubic"
mean = [125.0, 120.0, 110.0]
std = [60.0, 62.0, 64.0]

[output]
dim = 16
""",
    )


def tiny_fixed1():
    """NCHW, RGB, 112 x 112, one picture at a time and an old opset, as face networks come."""
    graph = Graph(seed=3)
    tip = graph.convolution("input.1", "conv1", 3, 8, stride=4)
    tip = graph.convolution(tip, "conv2", 8, 8, stride=2)
    tip = graph.grid(tip, 2)
    graph.linear(tip, "683", 8 * 7 * 7, 32)
    graph.save(
        "tiny-fixed1",
        {"input.1": [1, 3, 112, 112]},
        {"683": [1, 32]},
        opset=11,
        ir_version=6,
        settings="""\
name = "tiny-fixed1"

[input]
layout = "nchw"
channels = "rgb"
width = 112
height = 112
resize = "shorter-side"
resize_to = 128
filter = "lanczos3"
mean = [127.5, 127.5, 127.5]
std = [127.5, 127.5, 127.5]

[output]
dim = 32
""",
    )


def tiny_mean():
    """The mean of each channel, untouched: a black picture has the embedding zero, which has no direction."""
    graph = Graph(seed=4)
    pooled = graph.node("GlobalAveragePool", ["image"], "pool")
    graph.node("Flatten", [pooled], "mean", axis=1)
    graph.save(
        "tiny-mean",
        {"image": ["batch", 3, 8, 8]},
        {"mean": ["batch", 3]},
        opset=13,
        ir_version=8,
        settings="""\
name = "tiny-mean"

[input]
layout = "nchw"
channels = "rgb"
width = 8
height = 8
resize = "exact"
filter = "bilinear"
mean = [0.0, 0.0, 0.0]
std = [255.0, 255.0, 255.0]

[output]
dim = 3
""",
    )


def tiny_512():
    """512 values out of the mean of each channel: embeddings of a usual length from next to no work."""
    graph = Graph(seed=5)
    pooled = graph.node("GlobalAveragePool", ["image"], "pool")
    mean = graph.node("Flatten", [pooled], "mean", axis=1)
    graph.linear(mean, "embedding", 3, 512)
    graph.save(
        "tiny-512",
        {"image": ["batch", 3, 8, 8]},
        {"embedding": ["batch", 512]},
        opset=13,
        ir_version=8,
        settings="""\
name = "tiny-512"

[input]
layout = "nchw"
channels = "rgb"
width = 8
height = 8
resize = "exact"
filter = "bilinear"
mean = [127.5, 127.5, 127.5]
std = [127.5, 127.5, 127.5]

[output]
dim = 512
""",
    )


if __name__ == "__main__":
    tiny_nhwc()
    tiny_fixed4()
    tiny_fixed1()
    tiny_mean()
    tiny_512()
