"""Makes the fp32 network fit for 8 bits, before it is quantised; needs no training.

Two things cost a plain conversion most of its accuracy, and both can be had back:

- `equalise`: the channels that flow from block to block differ in range by up to
  two orders of magnitude, but share one scale. Nothing between the convolution
  that writes such a channel and those that read it is non-linear, so a factor is
  moved from one to the other. The network computes the same.
- `round_weights`: a filter of the first layers sums pixels that are almost alike,
  so rounding errors of its weights add up. They are rounded together, so that the
  error of their sum is smallest over the calibration images, and what is left on
  average goes into the bias.
"""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

# No channel is enlarged more than this.
LARGEST_FACTOR = 64.0
LARGEST_INT8 = 127
# More layers gain nothing: alone, their rounding costs a cosine of less than .001.
ROUNDED = ("_conv_stem", "_blocks.0._depthwise_conv", "_blocks.1._depthwise_conv")


class Network:
    """A model whose weights can be looked up and replaced by name."""

    def __init__(self, path):
        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.fold_casts()

    def fold_casts(self):
        """Weights that are stored as fp16 behind a Cast become fp32."""
        nodes = []
        for node in self.graph.node:
            if node.op_type == "Cast" and node.input[0] in self.tensors:
                half = self.tensors.pop(node.input[0])
                half.CopyFrom(
                    numpy_helper.from_array(
                        numpy_helper.to_array(half).astype(np.float32), node.output[0]
                    )
                )
                self.tensors[half.name] = half
            else:
                nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def get(self, name):
        return numpy_helper.to_array(self.tensors[name]).astype(np.float64)

    def put(self, name, values):
        self.tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    def convolutions(self):
        return [node for node in self.graph.node if node.op_type == "Conv"]

    def readers(self, value):
        return [node for node in self.graph.node if value in node.input]

    def values(self, names, tensor):
        """Yields {name: [C, H, W]} of inner values, an image of [N, 3, H, W] at a time."""
        shown = onnx.ModelProto()
        shown.CopyFrom(self.model)
        inner = [name for name in names if name != "input"]
        for name in inner:
            value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            shown.graph.output.append(value)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for image in tensor:
            found = session.run(inner or None, {"input": image[None]})
            yield {"input": image} | {name: value[0] for name, value in zip(inner, found)}


def streams(network):
    """Groups of values that must share their factors, as what an Add joins must."""
    linear = [
        node.output[0]
        for node in network.convolutions()
        if not any(reader.op_type == "Clip" for reader in network.readers(node.output[0]))
    ]
    group_of = {name: {name} for name in linear}
    for node in network.graph.node:
        if node.op_type == "Add":
            group = {node.output[0]}.union(*(group_of[name] for name in node.input))
            group_of.update({name: group for name in group})
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def equalise(network, tensor):
    """Gives all channels between blocks the range of their stream's widest; changes no result."""
    groups = streams(network)
    names = [name for group in groups for name in group]
    largest = {name: 0.0 for name in names}
    for values in network.values(names, tensor):
        for name in names:
            largest[name] = np.maximum(largest[name], np.abs(values[name]).max((1, 2)))
    for group in groups:
        reach = np.max([largest[name] for name in group], axis=0)
        factor = np.clip(reach.max() / np.maximum(reach, 1e-6), 1.0, LARGEST_FACTOR)
        for node in network.convolutions():
            weight, bias = node.input[1:]
            if node.output[0] in group:
                network.put(weight, network.get(weight) * factor[:, None, None, None])
                network.put(bias, network.get(bias) * factor)
            if node.input[0] in group:
                network.put(weight, network.get(weight) / factor[None, :, None, None])


def patches(values, node):
    """What a convolution's filters see: [filters or 1, positions, weights of a filter]."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    top, left, bottom, right = attributes["pads"]
    kernel, stride = attributes["kernel_shape"], attributes["strides"][0]
    padded = np.pad(values, ((0, 0), (top, bottom), (left, right)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, kernel, (1, 2))
    seen = seen[:, ::stride, ::stride].reshape(len(values), -1, kernel[0] * kernel[1])
    if attributes["group"] == 1:
        seen = seen.transpose(1, 0, 2).reshape(1, seen.shape[1], -1)
    return seen


def moments(network, node, tensor):
    """Mean [F, K] and covariance [F, K, K] of what the filters see."""
    count, total, squares = 0, 0.0, 0.0
    for values in network.values([node.input[0]], tensor):
        seen = patches(values[node.input[0]], node).astype(np.float64)
        count += seen.shape[1]
        total += seen.sum(1)
        squares += np.matmul(seen.transpose(0, 2, 1), seen)
    mean = total / count
    return mean, squares / count - mean[:, :, None] * mean[:, None, :]


def rounded(weights, covariance):
    """`weights` [K] on the grid that the quantiser will use, so that the variance of the error of
    their sum is small: one step of one weight at a time, while that helps."""
    scale = np.abs(weights).max() / LARGEST_INT8
    if scale == 0:
        return weights
    exact = weights / scale
    grid = np.round(exact)
    # The largest one makes the scale and stays.
    free = np.abs(exact) < LARGEST_INT8 - 1e-6
    while True:
        error = grid - exact
        gains = []
        for step in (-1, 1):
            change = 2 * step * (covariance @ error) + np.diag(covariance)
            allowed = free & (np.abs(grid + step) <= LARGEST_INT8) & (np.abs(error + step) < 1.5)
            gains.append(np.where(allowed, change, np.inf))
        step, at = np.unravel_index(np.argmin(gains), (2, len(weights)))
        # The margin ends it: rounding errors of this sum must not go back and forth.
        if gains[step][at] > -1e-9:
            return grid * scale
        grid[at] += (-1, 1)[step]


def round_weights(network, tensor):
    """Puts the weights of the layers in ROUNDED on the 8-bit grid and corrects their biases."""
    for node in network.convolutions():
        if node.name not in ROUNDED:
            continue
        mean, covariance = moments(network, node, tensor)
        weight, bias = network.get(node.input[1]), network.get(node.input[2])
        flat = weight.reshape(len(weight), -1)
        for at, filter_weights in enumerate(flat.copy()):
            seen = at if len(mean) > 1 else 0
            flat[at] = rounded(filter_weights, covariance[seen])
            bias[at] -= (flat[at] - filter_weights) @ mean[seen]
        network.put(node.input[1], flat.reshape(weight.shape))
        network.put(node.input[2], bias)
