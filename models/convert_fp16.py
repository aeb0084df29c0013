"""Turns a model folder into one that computes in f16, for GPUs.

    python convert_fp16.py efficientnet-lite0 efficientnet-lite0-fp16

Needs numpy, onnx and onnxruntime, whose converter it is
(onnxruntime.transformers.float16). Input and output stay f32, so model.toml stays
what it was but for the name, which gets `-fp16`. The written network is then run
once on the CPU beside the old one. What f16 cannot hold is refused or said:

- weights beyond 65,504 end the conversion, unless they are bounds (of a Clip, say),
  which become 65,504;
- weights below 6e-8 become 6e-8 and are counted.

Whether the values between the layers fit is only known from images: see
`efficientnet-lite0-int8/measure.py --model FOLDER`.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

PRODUCER = "convert_fp16.py"
LARGEST = float(np.finfo(np.float16).max)
# The smallest value that the converter keeps apart from 0.
SMALLEST = 5.96e-08
# Of whose inputs only the first is a value; the others are bounds, which may be "no bound".
BOUNDED = ("Clip",)
# Below it something is wrong, not just rounded.
LEAST_COSINE = 0.99


def fold_casts(graph):
    """Weights stored as fp16 behind a Cast become fp32, or the Casts would stay, from f16 to f16."""
    halves = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    nodes, folded = [], set()
    for node in graph.node:
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if node.op_type == "Cast" and node.input[0] in halves and to == TensorProto.FLOAT:
            values = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            folded.add(node.input[0])
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name not in folded or t.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def check_weights(graph):
    """Refuses weights that f16 cannot hold; yields how many it rounds up from nearly nothing."""
    bounds = {n for node in graph.node if node.op_type in BOUNDED for n in node.input[1:]}
    constants = [node for node in graph.node if node.op_type == "Constant"]
    named = [(tensor.name, tensor) for tensor in graph.initializer]
    named += [(n.output[0], a.t) for n in constants for a in n.attribute if a.name == "value"]
    minute = 0
    for name, tensor in named:
        if tensor.data_type != TensorProto.FLOAT or name in bounds:
            continue
        size = np.abs(numpy_helper.to_array(tensor))
        if not np.all(size <= LARGEST):
            sys.exit(f"{name} holds {size.max():g}; f16 ends at {LARGEST:g}")
        minute += int(((size > 0) & (size < SMALLEST)).sum())
    return minute


def converted(model):
    """The model in f16 between an input and an output in f32."""
    fold_casts(model.graph)
    minute = check_weights(model.graph)
    if minute:
        print(f"{minute} weights below {SMALLEST:g} became {SMALLEST:g}")
    half = float16.convert_float_to_float16(
        model, min_positive_val=SMALLEST, max_finite_val=LARGEST, keep_io_types=True
    )
    # The converter appends its Casts; not all that reads a model sorts its nodes itself.
    OnnxModel(half).topological_sort(is_deterministic=True)
    half.producer_name, half.producer_version = PRODUCER, ""
    onnx.checker.check_model(half, full_check=True)
    return half


def renamed(toml):
    """model.toml under another name, else as it was."""
    name = tomllib.loads(toml)["name"]
    line = re.compile(r"^(\s*name\s*=\s*)([\"'])" + re.escape(name) + r"\2", re.MULTILINE)
    # The first one: `name` stands in front of all tables.
    new, count = line.subn(rf"\g<1>\g<2>{name}-fp16\g<2>", toml, count=1)
    if count != 1 or tomllib.loads(new)["name"] != f"{name}-fp16":
        sys.exit(f"model.toml: the line with the name {name!r} was not understood")
    return new


def outputs(path, settings, images):
    """f32 [N, dim] on the CPU, of unit length."""
    wanted = settings.get("output", {}).get("name")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    declared = session.get_inputs()[0]
    batch = declared.shape[0]
    # A fixed batch: as many images as it wants, the same ones for both models.
    images = np.resize(images, (batch, *images.shape[1:])) if isinstance(batch, int) else images
    found = session.run([wanted] if wanted else None, {declared.name: images})[0]
    found = found.reshape(len(found), -1).astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def noise(settings):
    """f32 images as the network would get them, of coarse noise."""
    wanted = settings["input"]
    rng = np.random.default_rng(0)
    height, width = wanted["height"], wanted["width"]
    coarse = rng.integers(0, 256, (4, 8, 8, 3))
    rows, columns = (np.arange(size) * 8 // size for size in (height, width))
    pixels = coarse[:, rows][:, :, columns].astype(np.float32)
    pixels = (pixels - np.float32(wanted["mean"])) / np.float32(wanted["std"])
    nhwc = wanted["layout"] == "nhwc"
    return np.ascontiguousarray(pixels if nhwc else pixels.transpose(0, 3, 1, 2))


def main():
    parser = argparse.ArgumentParser(description="a model folder -> the same in f16")
    parser.add_argument("source", type=Path, help="a model folder")
    parser.add_argument("target", type=Path, help="the folder to write model.onnx and model.toml to")
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.target
    if target.resolve() == source.resolve():
        sys.exit("source and target are the same folder")

    toml = (source / "model.toml").read_text(encoding="utf-8")
    model = converted(onnx.load(source / "model.onnx"))
    target.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target / "model.onnx")
    (target / "model.toml").write_text(renamed(toml), encoding="utf-8")

    settings = tomllib.loads(toml)
    images = noise(settings)
    old, new = (outputs(folder / "model.onnx", settings, images) for folder in (source, target))
    least = (old * new).sum(axis=1).min()
    kinds = [helper.tensor_dtype_to_np_dtype(t.data_type).name for t in model.graph.initializer]
    tensors = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    bytes_of = (target / "model.onnx").stat().st_size
    print(f"{target}: {bytes_of / 1e6:.1f} MB, tensors: {tensors}; noise: cosine {least:.6f}")
    if not least >= LEAST_COSINE:
        sys.exit(f"the cosine with the old network is below {LEAST_COSINE}: do not use it")


if __name__ == "__main__":
    main()
