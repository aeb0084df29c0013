"""Makes JPEGs of three sizes out of samples/photos, to measure decoding with.

    python jpegs.py FOLDER

Needs numpy and pillow. Decoding takes as long as a JPEG has pixels *and* bytes, so
each photo is scaled to its size and gets the noise of a sensor, as much as makes a
file of the wanted bytes at quality 87; one that is larger without any noise is
written at a lower quality. The same files every time.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PHOTOS = Path(__file__).resolve().parent.parent / "samples/photos"
# Folder: width, height, bytes.
SIZES = {
    "22kB": ((320, 240), 22_000),
    "150kB": ((1024, 768), 150_000),
    "2MB": ((4000, 3000), 2_000_000),
}
QUALITY = 87
WORST_QUALITY = 20
# Grey levels, standard deviation.
MOST_NOISE = 40.0
STEPS = 8


def jpeg(pixels, noise, deviation, quality):
    """A JPEG of f32 [height, width, RGB] under noise."""
    noisy = np.clip(pixels + noise * np.float32(deviation), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=quality)
    return file.getvalue()


def nearest(wanted, low, high, make):
    """What `make` gives in the place between `low` and `high` where its size is `wanted`."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = make(middle)
        low, high = (middle, high) if len(found) < wanted else (low, middle)
    return found


def of_size(photo, size, wanted):
    pixels = np.asarray(ImageOps.fit(photo, size, Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(1).standard_normal((*pixels.shape[:2], 1), np.float32)
    if len(jpeg(pixels, noise, 0, QUALITY)) > wanted:
        return nearest(
            wanted, WORST_QUALITY, QUALITY, lambda quality: jpeg(pixels, noise, 0, round(quality))
        )
    return nearest(
        wanted, 0, MOST_NOISE, lambda deviation: jpeg(pixels, noise, deviation, QUALITY)
    )


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.iterdir())]
    for name, (size, wanted) in SIZES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        files = [of_size(photo, size, wanted) for photo in photos]
        for number, file in enumerate(files):
            (folder / f"{number}.jpg").write_bytes(file)
        mean = sum(map(len, files)) / len(files)
        print(f"{folder}: {len(files)} of {size[0]} x {size[1]}, {mean / 1000:.0f} kB on average")


if __name__ == "__main__":
    main()
