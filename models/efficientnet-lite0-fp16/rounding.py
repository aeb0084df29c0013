"""Tells what f16 between the layers costs, without a GPU.

    python rounding.py

Needs numpy, onnx, onnxruntime and pillow. ONNX Runtime has no f16 convolution for an
x86 CPU: it computes in f32 and rounds nothing between the layers. Here the committed
network runs node by node: each node in f32, as the sums of a GPU are, and what it
gives is rounded to f16, as what a GPU stores is. Prints the cosine with the fp32
network and the largest value, which must stay below 65,504.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / "efficientnet-lite0-int8"))
import samples  # noqa: E402


class Rounded:
    """A network of f16, one session a node."""

    def __init__(self, path):
        graph = onnx.load(path).graph
        self.weights = {
            t.name: numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer
        }
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.nodes = [(node, self.session(node)) for node in graph.node]
        self.largest = 0.0

    @staticmethod
    def session(node):
        """The node alone, in f32; none for a Cast, which only rounds."""
        if node.op_type == "Cast":
            return None
        values = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name]
            for names in (node.input, node.output)
        ]
        model = helper.make_model(
            helper.make_graph([node], "node", *values),
            opset_imports=[helper.make_opsetid("", 13)],
            ir_version=8,
        )
        return onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def run(self, tensor):
        """f32 [N, dim] of f32 [N, 3, height, width]."""
        values = {**self.weights, self.input: tensor}
        for node, session in self.nodes:
            inputs = {name: values[name] for name in node.input if name}
            found = session.run(None, inputs)[0] if session else values[node.input[0]]
            self.largest = max(self.largest, float(np.abs(found).max()))
            values[node.output[0]] = found.astype(np.float16).astype(np.float32)
        return values[self.output]


def main():
    exact, rounded = samples.Model(samples.DEFAULT), Rounded(FOLDER / "model.onnx")
    for kind in ("photos", "fashion/query"):
        images = [samples.opened(file) for file in samples.files(kind)]
        wanted = exact.embed(images)
        found = np.concatenate([rounded.run(samples.tensor([i], exact.input)) for i in images])
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        cosines = (found.astype(np.float64) * wanted).sum(axis=1)
        print(f"{kind}: {len(images)} images, cosine {cosines.mean():.6f}, {cosines.min():.6f}")
    print(f"largest value between the layers: {rounded.largest:.1f}")


if __name__ == "__main__":
    main()
