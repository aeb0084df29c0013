#!/usr/bin/env python3
"""Keeps a CUDA library's kernels for one GPU architecture and overwrites the others with zeros, in place.

    one_architecture.py libonnxruntime_providers_cuda.so 90

The library keeps its size, and runs on that architecture only; it compresses to a fifth. For carrying a library to
one known machine, never for shipping.

A fat binary is a header (magic, version, header size, size of what follows) with entries behind it; each entry is a
header of its own, which names the architecture, and a payload. `readelf -S` shows where they are: section .nv_fatbin.
"""

import mmap
import struct
import sys

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
SIZE = struct.Struct("<Q")  # behind the magic: bytes of all entries
ENTRY = struct.Struct("<HHIQ")  # kind, version, size of the header, size of the payload
ARCHITECTURE = struct.Struct("<I")  # at byte 28 of the entry's header: 90 for sm_90


def entries(library):
    """Yields the architecture, start and end of every kernel image."""
    at = library.find(MAGIC)
    while at >= 0:
        entry = at + len(MAGIC) + SIZE.size
        end = entry + SIZE.unpack_from(library, at + len(MAGIC))[0]
        if end > len(library):
            raise SystemExit(f"the fat binary at byte {at} is longer than the file: not the layout that is known here")
        while entry < end:
            _, _, header, payload = ENTRY.unpack_from(library, entry)
            start = entry + header
            yield ARCHITECTURE.unpack_from(library, entry + 28)[0], start, start + payload
            if header == 0 or start + payload > end:
                raise SystemExit(f"the kernel image at byte {entry} does not end within its fat binary")
            entry = start + payload
        at = library.find(MAGIC, end)


def main(path, architecture):
    kept, blanked = 0, {}
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        for found, start, end in entries(library):
            if found == architecture:
                kept += end - start
            else:
                library[start:end] = bytes(end - start)
                blanked[found] = blanked.get(found, 0) + end - start
    others = ", ".join(f"sm_{sm}" for sm in sorted(blanked))
    if not kept:
        raise SystemExit(f"{path} has no kernels for sm_{architecture}, only for {others or 'no GPU'}")
    print(f"kept {kept / 1e6:.0f} MB of kernels for sm_{architecture}, blanked {sum(blanked.values()) / 1e6:.0f} MB ({others})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
