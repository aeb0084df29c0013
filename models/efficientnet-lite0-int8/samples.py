"""The sample images as the network sees them, for quantise.py and compare.py.

`Model` runs a model folder with ONNX Runtime; `pixels` is the preprocessing that
model.toml describes, done by Pillow; `views` makes more pictures out of a photo.
"""

import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent
DEFAULT = FOLDER.parent / "efficientnet-lite0"
SAMPLES = FOLDER.parent.parent / "samples"

# The smallest part of a photo's sides that a view shows. Much less shows no object any more.
SMALLEST_CROP = 0.5
LARGEST_TURN_DEGREES = 20.0


def files(folder):
    """The images in or under a folder of the samples, sorted."""
    return sorted(p for p in (SAMPLES / folder).rglob("*.*") if p.suffix in (".png", ".jpg"))


def opened(file):
    """An upright RGB picture."""
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def views(image, count, rng):
    """`count` random pictures out of one: a part of it, some turned, mirrored, lighter or darker."""
    width, height = image.size
    for _ in range(count):
        share = rng.uniform(SMALLEST_CROP, 1.0)
        size = int(width * share), int(height * share)
        left = int(rng.integers(0, width - size[0] + 1))
        top = int(rng.integers(0, height - size[1] + 1))
        angle = rng.uniform(-LARGEST_TURN_DEGREES, LARGEST_TURN_DEGREES)
        mirrored, light = rng.random() < 0.5, rng.uniform(0.6, 1.4)
        view = image.rotate(angle, Image.Resampling.BICUBIC).crop(
            (left, top, left + size[0], top + size[1])
        )
        view = ImageOps.mirror(view) if mirrored else view
        yield view.point(lambda value, light=light: min(255, round(value * light)))


def pixels(image, wanted):
    """uint8 [height, width, RGB]: the shorter side to resize_to, then the centre cut out."""
    shorter = min(image.size)
    # To the nearest integer, halves upwards.
    scaled = tuple((2 * s * wanted["resize_to"] + shorter) // (2 * shorter) for s in image.size)
    size = wanted["width"], wanted["height"]
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((have - want) // 2 for have, want in zip(image.size, size))
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def settings(folder):
    """What model.toml of a model folder says."""
    return tomllib.loads((folder / "model.toml").read_text(encoding="utf-8"))


def tensor(images, wanted):
    """f32 [N, 3, height, width] of N pictures; `wanted` is model.toml's table `input`."""
    batch = np.stack([pixels(image, wanted) for image in images]).astype(np.float32)
    batch = (batch - np.float32(wanted["mean"])) / np.float32(wanted["std"])
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


class Model:
    """A model folder on ONNX Runtime's CPU provider, one thread."""

    def __init__(self, folder):
        self.input = settings(folder)["input"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def run(self, batch):
        """f32 [N, dim], not normalised."""
        return self.session.run(None, {self.input["name"]: batch})[0]

    def embed(self, images):
        """f32 [N, dim] of unit length, one image a call."""
        found = np.concatenate([self.run(tensor([image], self.input)) for image in images])
        return found / np.linalg.norm(found, axis=1, keepdims=True)
