"""Makes tests/data/reference: embeddings as Pillow and ONNX Runtime see the samples.

    python tests/data/make_reference.py

Needs numpy, pillow and onnxruntime. Run make_models.py first. The preprocessing
below is the definition that the daemon's own is measured against:

- EXIF orientation applied, converted to RGB.
- `shorter-side`: the shorter side becomes resize_to; the other one becomes
  side * resize_to / shorter, rounded to the nearest integer, halves upwards.
  Then the centre is cut out: left = (width - cut) // 2, top likewise, so that
  an odd pixel is lost on the right and at the bottom.
- `exact`: straight to width x height.
- Pillow's resize is antialiased and gives 8-bit values; only then comes
  (x - mean) / std, in the tensor's channel order.
"""

import json
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent
ROOT = DATA.parent.parent
REFERENCE = DATA / "reference"

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}

PHOTOS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("samples/photos/*.*"))
FASHION = sorted(
    p.relative_to(ROOT).as_posix() for p in ROOT.glob("samples/fashion/query/*/0000.png")
)
# The photos whose pixels are stored too; all of them lossless files.
WITH_PIXELS = [f"samples/photos/{name}.png" for name in ("astronaut", "chelsea", "coffee")]


def scaled(side, resize_to, shorter):
    """side * resize_to / shorter to the nearest integer, halves upwards, in integers."""
    return (2 * side * resize_to + shorter) // (2 * shorter)


def preprocess(file, settings):
    """The image's pixels at the size of the tensor: uint8, height x width x RGB."""
    image = ImageOps.exif_transpose(Image.open(ROOT / file))
    if "A" in image.mode:
        raise ValueError(f"{file}: the reference is defined for opaque images")
    image = image.convert("RGB")
    size = settings["width"], settings["height"]
    resample = FILTERS[settings["filter"]]
    if settings["resize"] == "exact":
        return np.asarray(image.resize(size, resample))
    shorter = min(image.size)
    image = image.resize(
        tuple(scaled(side, settings["resize_to"], shorter) for side in image.size), resample
    )
    left, top = ((have - want) // 2 for have, want in zip(image.size, size))
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def tensor(pixels, settings):
    """The network's input for one image, without the batch dimension."""
    values = pixels.astype(np.float32)
    if settings["channels"] == "bgr":
        values = values[:, :, ::-1]
    values = (values - np.float32(settings["mean"])) / np.float32(settings["std"])
    return values if settings["layout"] == "nhwc" else values.transpose(2, 0, 1)


class Model:
    """A model folder, run on the CPU."""

    def __init__(self, folder):
        self.settings = tomllib.loads((folder / "model.toml").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        graph_input = self.session.get_inputs()[0]
        self.input = self.settings["input"].get("name", graph_input.name)
        self.output = self.settings["output"].get("name", self.session.get_outputs()[0].name)
        batch = graph_input.shape[0]
        self.batch = batch if isinstance(batch, int) else 1

    def embed(self, pixels):
        """The embedding of one image; a fixed batch is filled with copies of it."""
        one = tensor(pixels, self.settings["input"])
        batch = np.ascontiguousarray(np.stack([one] * self.batch))
        return self.session.run([self.output], {self.input: batch})[0][0]


def write(folder, files, pixel_prefix):
    """Writes <model>.embeddings.f32, the index <model>.json and the raw pixels."""
    model = Model(folder)
    index = []
    rows = []
    for row, file in enumerate(files):
        pixels = preprocess(file, model.settings["input"])
        entry = {"file": file, "row": row}
        if file in WITH_PIXELS:
            entry["pixels"] = f"{pixel_prefix}{Path(file).stem}.rgb"
            (REFERENCE / entry["pixels"]).write_bytes(pixels.tobytes())
        index.append(entry)
        rows.append(model.embed(pixels))
    embeddings = np.stack(rows).astype("<f4")
    assert embeddings.shape[1] == model.settings["output"]["dim"]
    (REFERENCE / f"{folder.name}.embeddings.f32").write_bytes(embeddings.tobytes())
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in index)
    (REFERENCE / f"{folder.name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    REFERENCE.mkdir(exist_ok=True)
    write(ROOT / "models/efficientnet-lite0", PHOTOS + FASHION, pixel_prefix="")
    for name in ("tiny-nhwc", "tiny-fixed4", "tiny-fixed1"):
        write(DATA / "models" / name, WITH_PIXELS, pixel_prefix=f"{name}.")


if __name__ == "__main__":
    main()
