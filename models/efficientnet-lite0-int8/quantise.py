"""Turns the default model into its int8 variant.

    python quantise.py ../efficientnet-lite0/model.onnx model.onnx

Needs numpy, onnx, onnxruntime and pillow, and the samples of this repository: on
them the ranges of the network's inner values are measured. Weights become int8,
one scale for each filter; inner values uint8, one scale a tensor; the arithmetic is
written as QuantizeLinear and DequantizeLinear around the float operators (QDQ), which
back ends replace by integer kernels where they have them. The average pool at the
end stays in float, so the embedding is not rounded to 256 steps.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

import prepare
import samples

PRODUCER = "quantise.py"
SEED = 1
VIEWS_OF_A_PHOTO = 6
# Of each class of fashion/reference; never of fashion/query, which is for measuring.
FASHION_OF_A_CLASS = 4
# Statistics of all positions of an image need fewer images.
IMAGES_FOR_ROUNDING = 20


class Reader(CalibrationDataReader):
    """Hands the calibration images over one by one."""

    def __init__(self, tensor):
        self.images = iter(tensor)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"input": image[None]}


def calibration_images():
    """The photos, views of them, and some of the fashion references."""
    rng = np.random.default_rng(SEED)
    photos = [samples.opened(file) for file in samples.files("photos")]
    views = [view for photo in photos for view in samples.views(photo, VIEWS_OF_A_PHOTO, rng)]
    fashion = [
        samples.opened(file)
        for folder in sorted((samples.SAMPLES / "fashion/reference").iterdir())
        for file in samples.files(folder)[:FASHION_OF_A_CLASS]
    ]
    return photos + views + fashion


def main():
    parser = argparse.ArgumentParser(description="fp32 model.onnx -> int8 model.onnx")
    parser.add_argument("source", help="the default model's ONNX file")
    parser.add_argument("output", help="the ONNX file to write")
    arguments = parser.parse_args()
    # It recommends a shape inference first, which this graph does not need.
    logging.getLogger().setLevel(logging.ERROR)

    tensor = samples.tensor(calibration_images(), samples.settings(samples.FOLDER)["input"])
    network = prepare.Network(arguments.source)
    prepare.equalise(network, tensor)
    # Spread over all kinds of images.
    some = tensor[:: len(tensor) // IMAGES_FOR_ROUNDING]
    prepare.round_weights(network, some)

    with tempfile.TemporaryDirectory() as work:
        quantised = Path(work) / "model.onnx"
        quantize_static(
            network.model,
            quantised,
            Reader(tensor),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "Add"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        model = onnx.load(quantised)
    model.producer_name, model.producer_version = PRODUCER, ""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, arguments.output)


if __name__ == "__main__":
    main()
