"""Reads a PyTorch state dictionary (.pth) with nothing but numpy.

A .pth file is a pickle whose tensors are references into storages. Two
containers exist: the zip archive that PyTorch writes since 1.6, and the older
stream of pickles with the storages behind it. Both are read here.

Unpickling can run any code, so only the handful of names that a state
dictionary needs is let through; anything else is refused.
"""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class Storage:
    """A flat run of values; its data is filled in after unpickling."""

    def __init__(self, key, dtype):
        self.key = key
        self.dtype = dtype
        self.data = None


class Tensor:
    """A strided view of a storage, as the pickle describes it."""

    def __init__(self, storage, offset, size, stride, *_autograd):
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride

    def to_numpy(self):
        data = self.storage.data
        strides = [step * data.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.size, strides)
        return view.copy()


class StateDictUnpickler(pickle.Unpickler):
    """Unpickles a state dictionary, collecting the storages it refers to."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return Tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"a state dictionary has no use for {module}.{name}")

    def persistent_load(self, reference):
        kind, dtype, key = reference[:3]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent reference {kind!r}")
        return self.storages.setdefault(key, Storage(key, dtype))


def read_zip(path):
    """Reads the container of PyTorch 1.6 and later."""
    with zipfile.ZipFile(path) as archive:
        pickle_name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = pickle_name.removesuffix("data.pkl")
        unpickler = StateDictUnpickler(io.BytesIO(archive.read(pickle_name)))
        state = unpickler.load()
        for storage in unpickler.storages.values():
            raw = archive.read(f"{folder}data/{storage.key}")
            storage.data = np.frombuffer(raw, storage.dtype)
    return state


def read_legacy(path):
    """Reads the older container: magic, version, system info, state, storages."""
    with open(path, "rb") as file:
        # These first pickles hold plain numbers and dictionaries: no class is let through.
        if StateDictUnpickler(file).load() != LEGACY_MAGIC:
            raise ValueError(f"{path} is not a PyTorch file")
        StateDictUnpickler(file).load()
        StateDictUnpickler(file).load()
        unpickler = StateDictUnpickler(file)
        state = unpickler.load()
        for key in StateDictUnpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            storage.data = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
        if file.read(1):
            raise ValueError(f"{path} has bytes after its last storage")
    return state


def load(path):
    """Returns the state dictionary as {name: numpy array}."""
    path = Path(path)
    state = read_zip(path) if zipfile.is_zipfile(path) else read_legacy(path)
    return {name: tensor.to_numpy() for name, tensor in state.items()}
