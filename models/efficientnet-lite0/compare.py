"""Compares two ONNX files: 'identical', or the largest difference of their weights.

    python compare.py committed.onnx new.onnx

Exits with 0 when the bytes or all the weights are equal, with 1 otherwise.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def weights(path):
    """All the initializers as {name: fp64 array}."""
    graph = onnx.load(path).graph
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer}


def main():
    committed, new = (Path(argument) for argument in sys.argv[1:3])
    if committed.read_bytes() == new.read_bytes():
        print("identical")
        return 0
    old_weights, new_weights = weights(committed), weights(new)
    if old_weights.keys() != new_weights.keys():
        print("different: the two files do not hold the same tensors")
        return 1
    largest = 0.0
    for name, old in old_weights.items():
        if old.shape != new_weights[name].shape:
            print(f"different: the shape of {name}")
            return 1
        largest = max(largest, float(np.abs(old - new_weights[name]).max()))
    print(f"not the same bytes; largest difference of a weight: {largest:g}")
    return 0 if largest == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())
