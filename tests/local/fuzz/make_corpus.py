"""Makes the seeds of tests/local/fuzz/corpus: small files, one for each thing that a parser treats in its own way.

    pip install pillow numpy safetensors tifffile imagecodecs
    python3 tests/local/fuzz/make_corpus.py
"""

import json
import pathlib
import struct

import numpy as np
import tifffile
from PIL import Image, PngImagePlugin
from safetensors.numpy import save

CORPUS = pathlib.Path(__file__).parent / "corpus"


def job(name, value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    (CORPUS / "job" / f"{name}.json").write_bytes(text)


job("smallest", {"id": "a", "images": ["s3://b/k"], "classes": "s"})
job("everything", {
    "id": "nightly/000017", "images": ["s3://photos/ü.jpg", {"uri": "s3://photos/b.jpg", "id": "sku-1"}],
    "classes": "bottles@7", "top_k": 5, "min_score": 0.35, "embeddings": True,
    "run": {"id": "nightly", "jobs": 1563, "index": 17}, "from_the_future": [1, {"a": None}],
})
job("numbers", b'{"id":"n","images":["u"],"classes":"s","top_k":1e99,"min_score":-1e-400,"run":{"id":"r","jobs":-1,"index":18446744073709551616}}')
job("escapes", b'{"id":"\\ud83d\\ude00\\u0000","images":["\\ud800"],"classes":"..\\/..@.."}')
job("nested", b"[" * 200 + b"]" * 200)
job("twice", b'{"id":"a","id":"b","images":[],"images":["u"],"classes":"s@v"}')


def vectors(name, array, labels, **metadata):
    metadata = {"format": "angler.class-vectors/1", "labels": json.dumps(labels), "model": "m@000000000000"} | metadata
    (CORPUS / "class_vectors" / f"{name}.safetensors").write_bytes(save({"vectors": array}, metadata))


eye = np.eye(3, 4, dtype=np.float32)
vectors("f32", eye, ["a", "b", "c"], min_score="0.5", created_at="2026-01-31T12:00:00Z", source="seed")
vectors("f16", eye.astype(np.float16), ["a", "a", "b"], min_scores=json.dumps({"a": 0.25, "b": 1}))
vectors("nan", np.full((2, 4), np.nan, dtype=np.float32), ["a", "b"])
vectors("zero", np.zeros((2, 4), dtype=np.float32), ["a", "b"])
vectors("labels", eye, ["a"])
vectors("f64", eye.astype(np.float64), ["a", "b", "c"])
vectors("flat", eye.ravel(), ["a"])

# Found by fuzzing: a header of no bytes.
(CORPUS / "class_vectors" / "empty-header.safetensors").write_bytes(bytes(8) + b"more")

picture = Image.fromarray((np.indices((12, 17)).sum(axis=0)[..., None] * [9, 5, 3] % 256).astype(np.uint8))
alpha = picture.copy()
alpha.putalpha(Image.linear_gradient("L").resize(picture.size))


def image(name, of=picture, **options):
    of.save(CORPUS / "preprocess" / name, **options)


image("baseline.jpg", quality=80)
image("progressive.jpg", progressive=True, quality=60, subsampling=2)
image("grey.jpg", picture.convert("L"))
image("cmyk.jpg", picture.convert("CMYK"))
image("restart.jpg", restart_marker_blocks=1)
exif = Image.Exif()
exif[0x0112] = 6
image("turned.jpg", exif=exif)
image("rgb.png")
image("alpha.png", alpha)
image("palette.png", picture.convert("P"), transparency=3)
image("bits.png", picture.convert("1"))
image("sixteen.png", Image.fromarray(np.arange(204, dtype=np.uint16).reshape(12, 17) * 300))
text = PngImagePlugin.PngInfo()
text.add_text("Comment", "x" * 200, zip=True)
text.add_itxt("Title", "ü" * 40, "de", "Titel", zip=True)
image("text.png", pnginfo=text, exif=exif)
image("lossy.webp", quality=40)
image("lossless.webp", lossless=True)
image("alpha.webp", alpha)
image("moving.webp", save_all=True, append_images=[picture.rotate(90)], duration=50)
image("one.gif", picture.convert("P"))
image("moving.gif", picture.convert("P"), save_all=True, append_images=[picture.rotate(180).convert("P")], duration=5)
image("rgb.bmp")
image("palette.bmp", picture.convert("P"))
image("raw.tiff")
image("lzw.tiff", compression="tiff_lzw")
image("deflate.tiff", compression="tiff_adobe_deflate")
image("packbits.tiff", picture.convert("L"), compression="packbits")
image("bits.tiff", picture.convert("1"), compression="group4")
image("float.tiff", Image.fromarray(np.linspace(0, 1, 204, dtype=np.float32).reshape(12, 17)))
image("turned.tiff", tiffinfo={0x0112: 8})
image("palette.tiff", picture.convert("P"))
image("cmyk.tiff", picture.convert("CMYK"))
image("ycbcr.tiff", picture.convert("YCbCr"))
image("lab.tiff", Image.fromarray(np.asarray(picture), "LAB"))
image("jpeg.tiff", compression="jpeg", quality=50)
image("group3.tiff", picture.convert("1"), compression="group3")
image("group3-mixed.tiff", picture.convert("1"), compression="group3", tiffinfo={292: 1})
image("rows.tiff", picture.convert("1"), compression="tiff_ccitt")
image("lsb.tiff", picture.convert("1"), compression="group4", tiffinfo={266: 2})
pixels = np.asarray(picture)


def tiff(name, array, photometric="minisblack", **options):
    tifffile.imwrite(CORPUS / "preprocess" / name, array, photometric=photometric, metadata=None, **options)


tiff("big.tiff", pixels, "rgb", bigtiff=True, byteorder=">", tile=(16, 16), compression="zlib")
tiff("planes.tiff", pixels.transpose(2, 0, 1), "rgb", planarconfig="separate", tile=(16, 16))
tiff("zstd.tiff", pixels.astype("u2") * 200, "rgb", compression="zstd", predictor=True)
tiff("float-predictor.tiff", pixels[..., 0] / np.float32(255), compression="zlib", predictor=True)
tiff("signed.tiff", pixels[..., 0].astype("i4") - 100)

# JPEG: without its Huffman tables, without its end, with colours that contradict each other.
whole = (CORPUS / "preprocess" / "baseline.jpg").read_bytes()
tables = whole.index(b"\xff\xc4")
scan = whole.index(b"\xff\xda")
(CORPUS / "preprocess" / "no-tables.jpg").write_bytes(whole[:tables] + whole[scan:])
(CORPUS / "preprocess" / "no-end.jpg").write_bytes(whole[:-2] + bytes(40))
adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
(CORPUS / "preprocess" / "contradiction.jpg").write_bytes(whole[:tables] + adobe + whole[tables:])
# GIF: a screen of no pixels, an extension of no meaning.
whole = (CORPUS / "preprocess" / "one.gif").read_bytes()
table = 13 + 3 * (2 << (whole[10] & 7))
(CORPUS / "preprocess" / "unknown.gif").write_bytes(whole[:6] + bytes(4) + whole[10:table] + b"!\x42\x03abc\0" + whole[table:])


def frame(name, payload):
    (CORPUS / "sanitize" / f"{name}.bin").write_bytes(payload)


def short(value):
    return bytes([len(value)]) + value


def long(value):
    return struct.pack(">I", len(value)) + value


def header(name, flags, properties):
    frame(name, struct.pack(">HHQH", 60, 0, 100, flags) + properties)


values = b"t\1b\2B\3s\0\4u\0\5I\0\0\0\6i\0\0\0\7l" + bytes(8) + b"f" + bytes(4) + b"d" + bytes(8) + b"D\2" + bytes(4) + b"V"
death = short(b"reason") + b"S" + long(b"expired") + short(b"time") + b"T" + bytes(8)
table = short(b"angler-attempt") + b"i\0\0\0\2" + short(b"x-death") + b"A" + long(b"F" + long(death) + values) + short(b"bytes") + b"x" + long(b"\xff")
nested = b"V"
for _ in range(100):
    nested = b"A" + long(nested)
everything = [short(b"application/json"), short(b"gzip"), long(table), b"\2", b"\1", *[short(t) for t in (b"corr", b"reply", b"0", b"id")],
              bytes(8), *[short(t) for t in (b"classify.v1", b"guest", b"app", b"")]]
header("everything", 0xFFFC, b"".join(everything))
header("nothing", 0, b"")
header("latin1", 0x0480, short(b"m\xf6glich") + short(b"\xfc"))
header("keys", 0x2000, long(short(b"k\xff") + b"F" + long(short(b"\xfe") + b"V")))
header("deep", 0x2000, long(short(b"k") + nested))
frame("deliver", b"\0\x3c\0\x3c" + short(b"tag") + bytes(9) + short(b"topic") + short(b"jobs.\xff"))
frame("get-ok", b"\0\x3c\0\x47" + bytes(9) + short(b"topic") + short(b"jobs") + bytes(4))
