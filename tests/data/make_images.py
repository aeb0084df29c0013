"""Makes tests/data/images: one small picture in every guise that the decoder must know.

    python tests/data/make_images.py

Needs numpy and pillow. images.json lists the good files, each with the RGB
pixels that are expected of it (uint8, rows of R, G, B); bad.json lists the
files that must be refused. The picture is a crop of samples/photos/chelsea.png
at 96 x 64, so files that hold it without loss share one set of pixels.
"""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent
IMAGES = DATA / "images"
EXPECTED = IMAGES / "expected"
BAD = IMAGES / "bad"

ORIENTATION = 0x0112
# How the upright picture is laid down in a file of each EXIF orientation.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# Mean absolute differences, in grey levels, that two correct decoders may show.
LOSSLESS = 0.0
ROUNDING = 1.0
LOSSY = 1.5
SUBSAMPLED = 2.5

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GREY, PNG_RGB, PNG_PALETTE = 0, 2, 3

index = []
bad_index = []


# -- Expected pixels ---------------------------------------------------------------------------


def pixels(image):
    """An RGB image as an array, upright."""
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def over_white(image):
    """Composes onto white: round(c * a / 255 + 255 * (1 - a / 255)), in integers."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.int32)
    colour, alpha = rgba[:, :, :3], rgba[:, :, 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def decoded(name):
    """What Pillow sees in the first frame of a file."""
    with Image.open(IMAGES / name) as image:
        image.load()
        return image.copy()


def expect(name, array, tolerance, note, expected=None):
    """Lists a good file; its pixels go to expected/<name>.rgb or to a name shared with others."""
    expected = f"expected/{expected or name}.rgb"
    raw = np.ascontiguousarray(array, np.uint8).tobytes()
    path = IMAGES / expected
    if path.exists():
        shared = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
        difference = np.abs(shared - np.frombuffer(raw, np.uint8)).mean()
        # Half of the tolerance is left to the other decoder.
        assert difference <= tolerance / 2, f"{name}: {difference} from {expected}"
    else:
        path.write_bytes(raw)
    height, width = array.shape[:2]
    index.append(
        {
            "file": name,
            "width": width,
            "height": height,
            "expected": expected,
            "tolerance": tolerance,
            "note": note,
        }
    )


# -- PNG by hand, for what Pillow does not write -----------------------------------------------


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height, depth, colour, interlaced=False):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def scanlines(array):
    """Rows of big-endian samples, each behind the filter type 'none'."""
    rows = array.astype(array.dtype.newbyteorder(">"))
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in rows)


def png(array, interlaced=False, extra=b""):
    """A grey (2 axes) or RGB (3 axes) PNG of 8 or 16 bits."""
    height, width = array.shape[:2]
    colour = PNG_RGB if array.ndim == 3 else PNG_GREY
    if interlaced:
        # Adam7: start and step of x, then of y, for each of the seven passes.
        passes = [
            (0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4),
            (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2),
        ]  # fmt: skip
        data = b"".join(scanlines(array[y::dy, x::dx]) for x, dx, y, dy in passes)
    else:
        data = scanlines(array)
    return (
        PNG_SIGNATURE
        + png_header(width, height, array.dtype.itemsize * 8, colour, interlaced)
        + extra
        + chunk(b"IDAT", zlib.compress(data, 9))
        + chunk(b"IEND", b"")
    )


def sixteen_bits(array, random):
    """Widens to 16 bits so that `>> 8` and rounding `/ 257` agree, yet the low byte is not the high one."""
    low = np.clip(array.astype(np.int32) + random.randint(-100, 101, array.shape), 0, 255)
    return (array.astype(np.uint16) << 8) | low.astype(np.uint16)


# -- The good ones -----------------------------------------------------------------------------


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def stored(base, orientation):
    transpose = STORED_AS[orientation]
    return base if transpose is None else base.transpose(transpose)


def to_cmyk(base):
    """Four inks with a real black: Pillow's own conversion leaves K empty."""
    rgb = np.asarray(base).astype(np.float64) / 255
    black = 1 - rgb.max(axis=2, keepdims=True)
    inks = np.where(black < 1, (1 - rgb - black) / np.maximum(1 - black, 1e-9), 0)
    return np.rint(np.concatenate([inks, black], axis=2) * 255).astype(np.uint8)


def alpha_ramp(width, height):
    """Every alpha from 0 at the left to 255 at the right."""
    return np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))


def make_jpegs(base):
    q95 = {"quality": 95, "subsampling": 0}
    base.save(IMAGES / "rgb.jpg", **q95)
    expect("rgb.jpg", pixels(decoded("rgb.jpg")), LOSSY, "quality 95, 4:4:4")

    base.save(IMAGES / "subsampled.jpg", quality=90, subsampling=2)
    note = "4:2:0; decoders interpolate colour differently"
    expect("subsampled.jpg", pixels(decoded("subsampled.jpg")), SUBSAMPLED, note)

    base.save(IMAGES / "progressive.jpg", progressive=True, **q95)
    expect("progressive.jpg", pixels(decoded("progressive.jpg")), LOSSY, "progressive, 4:4:4")

    base.convert("L").save(IMAGES / "grey.jpg", quality=95)
    expect("grey.jpg", pixels(decoded("grey.jpg")), LOSSY, "one component")

    inks = to_cmyk(base)
    Image.fromarray(inks, "CMYK").save(IMAGES / "cmyk.jpg", quality=95)
    note = "CMYK with an Adobe marker (transform 0), stored inverted: 255 is no ink"
    expect("cmyk.jpg", pixels(decoded("cmyk.jpg")), LOSSY, note)

    (IMAGES / "ycck.jpg").write_bytes(ycck_jpeg(inks))
    note = "YCCK with an Adobe marker (transform 2), as image editors write CMYK"
    expect("ycck.jpg", pixels(decoded("ycck.jpg")), LOSSY, note)

    # JPEG treats rows and columns unlike; at quality 100 that is hardly seen.
    q100 = {"quality": 100, "subsampling": 0}
    for orientation in STORED_AS:
        name = f"exif-{orientation}.jpg"
        stored(base, orientation).save(IMAGES / name, exif=exif(orientation), **q100)
        note = f"EXIF orientation {orientation}; upright it is the same picture as exif-1.jpg"
        expect(name, pixels(decoded(name)), LOSSY, note, "exif.jpg")
    base.save(IMAGES / "exif-9.jpg", exif=exif(9), **q100)
    note = "an orientation that does not exist: taken as upright"
    expect("exif-9.jpg", pixels(decoded("exif-9.jpg")), LOSSY, note, "exif.jpg")


def ycck_jpeg(inks):
    """Encodes YCC + K as if it were CMYK, then says in the Adobe marker what it is."""
    # In this encoding the inks C, M, Y take the places of R, G, B; K is stored inverted.
    ycc = np.asarray(Image.fromarray(inks[:, :, :3], "RGB").convert("YCbCr"))
    # Pillow inverts what it writes as CMYK, hence the second 255 minus.
    planes = np.concatenate([255 - ycc, inks[:, :, 3:]], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(planes, "CMYK").save(buffer, "JPEG", quality=95)
    data = bytearray(buffer.getvalue())
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


def make_pngs(base, random):
    rgb = np.asarray(base)
    grey = base.convert("L")
    width, height = base.size

    base.save(IMAGES / "rgb.png", optimize=True)
    expect("rgb.png", pixels(decoded("rgb.png")), LOSSLESS, "8 bits, RGB", "base")

    (IMAGES / "png-named.jpg").write_bytes((IMAGES / "rgb.png").read_bytes())
    note = "a PNG under a wrong name: the content decides"
    expect("png-named.jpg", rgb, LOSSLESS, note, "base")

    (IMAGES / "interlaced.png").write_bytes(png(rgb, interlaced=True))
    expect("interlaced.png", pixels(decoded("interlaced.png")), LOSSLESS, "Adam7", "base")

    (IMAGES / "rgb16.png").write_bytes(png(sixteen_bits(rgb, random)))
    note = "16 bits a channel: value >> 8 (rounding value / 257 gives the same here)"
    expect("rgb16.png", rgb, LOSSLESS, note, "base")

    stored(base, 6).save(IMAGES / "exif-6.png", exif=exif(6), optimize=True)
    note = "orientation 6 in an eXIf chunk"
    expect("exif-6.png", pixels(decoded("exif-6.png")), LOSSLESS, note, "base")

    grey.save(IMAGES / "grey.png", optimize=True)
    expect("grey.png", pixels(decoded("grey.png")), LOSSLESS, "8 bits, grey", "grey")

    (IMAGES / "grey16.png").write_bytes(png(sixteen_bits(np.asarray(grey), random)))
    note = "16 bits, grey: value >> 8 (rounding value / 257 gives the same here)"
    expect("grey16.png", pixels(grey), LOSSLESS, note, "grey")

    base.convert("1").save(IMAGES / "bilevel.png")
    expect("bilevel.png", pixels(decoded("bilevel.png")), LOSSLESS, "1 bit, black and white")

    palette = base.quantize(64, dither=Image.Dither.NONE)
    palette.save(IMAGES / "palette.png")
    expect("palette.png", pixels(decoded("palette.png")), LOSSLESS, "64 colours", "palette")

    # Entry 0 is gone, the last is whole, and there is something of everything between.
    alphas = bytes(round(entry * 255 / 63) for entry in range(64))
    palette.save(IMAGES / "palette-trns.png", transparency=alphas)
    note = "64 colours, an alpha for each (tRNS); over white"
    expect("palette-trns.png", over_white(decoded("palette-trns.png")), LOSSLESS, note)

    key = rgb[0, 0]
    body = struct.pack(">3H", *(int(value) for value in key))
    (IMAGES / "rgb-trns.png").write_bytes(png(rgb, extra=chunk(b"tRNS", body)))
    keyed = np.where((rgb == key).all(axis=2, keepdims=True), 255, rgb)
    assert (keyed == over_white(decoded("rgb-trns.png"))).all()
    note = "RGB with one transparent colour (tRNS); over white"
    expect("rgb-trns.png", keyed, LOSSLESS, note)

    ramp = Image.fromarray(alpha_ramp(width, height))
    rgba = base.copy()
    rgba.putalpha(ramp)
    rgba.save(IMAGES / "rgba.png", optimize=True)
    note = "every alpha from 0 to 255; over white"
    expect("rgba.png", over_white(decoded("rgba.png")), LOSSLESS, note, "rgba")

    grey_alpha = Image.merge("LA", (grey, ramp))
    grey_alpha.save(IMAGES / "grey-alpha.png", optimize=True)
    expect("grey-alpha.png", over_white(decoded("grey-alpha.png")), LOSSLESS, note)
    return rgba


def make_webps(base, rgba):
    lossless = {"lossless": True, "exact": True}
    base.save(IMAGES / "lossless.webp", **lossless)
    expect("lossless.webp", pixels(decoded("lossless.webp")), LOSSLESS, "VP8L", "base")

    base.save(IMAGES / "lossy.webp", quality=90)
    note = "VP8; decoders interpolate colour differently"
    expect("lossy.webp", pixels(decoded("lossy.webp")), SUBSAMPLED, note)

    rgba.save(IMAGES / "alpha.webp", **lossless)
    note = "VP8L, every alpha from 0 to 255; over white"
    expect("alpha.webp", over_white(decoded("alpha.webp")), LOSSLESS, note, "rgba")

    rgba.save(IMAGES / "lossy-alpha.webp", quality=90)
    note = "VP8 with an ALPH chunk; over white"
    expect("lossy-alpha.webp", over_white(decoded("lossy-alpha.webp")), SUBSAMPLED, note)

    stored(base, 6).save(IMAGES / "exif-6.webp", exif=exif(6), **lossless)
    note = "orientation 6 in an EXIF chunk"
    expect("exif-6.webp", pixels(decoded("exif-6.webp")), LOSSLESS, note, "base")

    others = [ImageOps.mirror(base), ImageOps.flip(base)]
    base.save(
        IMAGES / "animated.webp", save_all=True, append_images=others, duration=100, **lossless
    )
    note = "three frames: the first one counts"
    expect("animated.webp", pixels(decoded("animated.webp")), LOSSLESS, note, "base")


def make_gifs(base):
    palette = base.quantize(64, dither=Image.Dither.NONE)
    others = [ImageOps.mirror(palette), ImageOps.flip(palette)]
    palette.save(IMAGES / "animated.gif", save_all=True, append_images=others, duration=100)
    note = "three frames: the first one counts"
    expect("animated.gif", pixels(decoded("animated.gif")), LOSSLESS, note, "palette")

    # The four most common colours become one transparent one.
    entries = np.asarray(palette)
    holes = np.isin(entries, np.argsort(np.bincount(entries.ravel()))[-4:])
    punched = palette.copy()
    punched.putdata(np.where(holes, 64, entries).ravel().tolist())
    punched.putpalette(palette.getpalette()[: 64 * 3] + [255, 0, 255])
    punched.save(
        IMAGES / "transparent.gif",
        save_all=True,
        append_images=[ImageOps.mirror(palette)],
        transparency=64,
        duration=100,
    )
    first = over_white(decoded("transparent.gif"))
    assert (first == np.where(holes[:, :, None], 255, np.asarray(palette.convert("RGB")))).all()
    note = "two frames, the first one with a transparent colour; over white"
    expect("transparent.gif", first, LOSSLESS, note)


def make_bmps_and_tiffs(base):
    base.save(IMAGES / "rgb.bmp")
    expect("rgb.bmp", pixels(decoded("rgb.bmp")), LOSSLESS, "24 bits", "base")

    base.quantize(64, dither=Image.Dither.NONE).save(IMAGES / "palette.bmp")
    expect("palette.bmp", pixels(decoded("palette.bmp")), LOSSLESS, "64 colours", "palette")

    base.save(IMAGES / "rgb.tiff", compression="tiff_lzw")
    expect("rgb.tiff", pixels(decoded("rgb.tiff")), LOSSLESS, "LZW", "base")

    base.convert("L").save(IMAGES / "grey.tiff", compression="tiff_adobe_deflate")
    expect("grey.tiff", pixels(decoded("grey.tiff")), LOSSLESS, "Deflate, grey", "grey")

    Image.fromarray(to_cmyk(base), "CMYK").save(IMAGES / "cmyk.tiff", compression="tiff_lzw")
    note = "CMYK, not inverted: 0 is no ink; the rounding to RGB is the decoder's own"
    expect("cmyk.tiff", pixels(decoded("cmyk.tiff")), ROUNDING, note)

    stored(base, 6).save(
        IMAGES / "orientation-6.tiff", compression="tiff_lzw", tiffinfo={ORIENTATION: 6}
    )
    note = "TIFF's own Orientation tag"
    # Pillow has already turned a TIFF when its pixels are loaded.
    upright = np.asarray(decoded("orientation-6.tiff").convert("RGB"))
    expect("orientation-6.tiff", upright, LOSSLESS, note, "base")


# -- The bad ones ------------------------------------------------------------------------------


def refuse(name, data, codes, note):
    """Lists a bad file and the error codes that are right for it."""
    (BAD / name).write_bytes(data)
    bad_index.append({"file": f"bad/{name}", "codes": codes, "note": note})


def bilevel_bomb(side):
    """A whole and valid PNG of one blue plane: 1 bit a pixel in the file, 24 in memory."""
    row = b"\0" + bytes((side + 7) // 8)
    deflate = zlib.compressobj(9)
    rows = 1000
    body = b"".join(deflate.compress(row * rows) for _ in range(side // rows)) + deflate.flush()
    return (
        PNG_SIGNATURE
        + png_header(side, side, 1, PNG_PALETTE)
        + chunk(b"PLTE", bytes([0, 0, 200, 255, 255, 255]))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def short_png(width, height):
    """A PNG that claims a size and brings a few bytes."""
    return (
        PNG_SIGNATURE
        + png_header(width, height, 8, PNG_RGB)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


def with_jpeg_size(data, width, height):
    """Changes the size in a baseline JPEG's frame header."""
    data = bytearray(data)
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


def make_bad():
    jpeg = (IMAGES / "rgb.jpg").read_bytes()
    whole = (IMAGES / "rgb.png").read_bytes()
    corrupt, unsupported, too_large = ["corrupt_image"], ["unsupported_format"], ["too_large"]

    refuse("truncated.jpg", jpeg[: len(jpeg) * 6 // 10], corrupt, "the first 60%")
    refuse("truncated.png", whole[: len(whole) * 6 // 10], corrupt, "the first 60%")
    broken = bytearray(whole)
    broken[whole.index(b"IEND") - 5] ^= 0xFF
    refuse("bad-crc.png", bytes(broken), corrupt, "IDAT's checksum is wrong, its data whole")
    refuse("zero-size.png", short_png(0, 0), corrupt, "0 x 0 pixels")
    refuse("empty.jpg", b"", unsupported + corrupt, "no bytes at all")
    refuse("text.jpg", b"not an image\n", unsupported, "text under a picture's name")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"><rect width="9" height="9"/></svg>\n'
    refuse("drawing.svg", svg, unsupported, "SVG is text, and not decoded")
    avif = struct.pack(">I", 28) + b"ftypavif" + bytes(4) + b"avifmif1miaf" + bytes(64)
    refuse("header.avif", avif, unsupported, "AVIF's first bytes")

    refuse("bomb.png", bilevel_bomb(30_000), too_large, "valid; 2.7 GB as RGB")
    refuse("bomb-1px.png", short_png(1, 200_000_000), too_large, "1 pixel wide, 200 million high")
    refuse("bomb.jpg", with_jpeg_size(jpeg, 65_500, 65_500), too_large, "65500 x 65500 claimed")
    side = struct.pack("<HH", 65_535, 65_535)
    gif = b"GIF89a" + side + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + side + b"\0\x02\x02\x44\x01\0;"
    refuse("bomb.gif", gif, too_large, "65535 x 65535 claimed")
    # VP8L: signature, then width - 1 and height - 1 in 14 bits each.
    vp8l = b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + bytes(11)
    webp = b"WEBPVP8L" + struct.pack("<I", len(vp8l)) + vp8l
    webp = b"RIFF" + struct.pack("<I", len(webp)) + webp
    refuse("bomb.webp", webp, too_large, "16384 x 16384 claimed, the largest WebP")


def write_index(name, entries):
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    (IMAGES / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    for folder in (IMAGES, EXPECTED, BAD):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.is_file():
                old.unlink()

    photo = Image.open(DATA.parent.parent / "samples/photos/chelsea.png").convert("RGB")
    base = photo.resize((96, 64), Image.Resampling.LANCZOS, box=(0, 0, 450, 300))
    make_jpegs(base)
    rgba = make_pngs(base, np.random.RandomState(20))
    make_webps(base, rgba)
    make_gifs(base)
    make_bmps_and_tiffs(base)
    make_bad()
    write_index("images.json", index)
    write_index("bad.json", bad_index)


if __name__ == "__main__":
    main()
