"""Tensors out of PyTorch's files, without PyTorch and without running anything that a file says."""

import collections
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Signature of the files of `torch.save` before 1.6, and of those written without its zip format since.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


def read_torch_file(path: Path) -> Any:
    """Reads a file of `torch.save`, zipped or of the older form, with its tensors as NumPy arrays.

    The pickle inside may name dictionaries and tensors and nothing else: anything more is an error before
    it could be called.

    Args:
        path: of the file.

    Returns:
        What was saved, usually a dictionary of arrays.

    Raises:
        pickle.UnpicklingError: where the file asks for anything but tensors.
        Exception: of the zip or pickle module, where the file is truncated or corrupt.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive)
    with open(path, "rb") as file:
        return _read_legacy(file)


class _Fixed:
    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a tensor after it was made")


class _Storage(_Fixed):
    """The numbers that tensors are views of; `values` may be filled in after the tensors were made."""

    def __init__(self, dtype, length):
        self.dtype, self.length, self.values = np.dtype(dtype), length, None


class _Tensor(_Fixed):
    """A view of a storage, by shape and strides in elements."""

    def __init__(self, storage, offset, shape, strides):
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def array(self):
        values = self.storage.values
        numbers = [self.offset, *self.shape, *self.strides]
        if any(type(n) is not int or n < 0 for n in numbers) or len(self.shape) != len(self.strides):
            raise pickle.UnpicklingError(f"a tensor has the shape {self.shape} and strides {self.strides}")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        # A view beyond its storage, or one that repeats it, is no tensor of a checkpoint.
        if count and (last >= len(values) or count > len(values)):
            raise pickle.UnpicklingError(f"a tensor of shape {self.shape} reaches beyond its {len(values)} values")
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, [step * values.itemsize for step in self.strides]
        )
        return np.array(view, order="C")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storages, read=None):
        super().__init__(file, encoding="utf-8")
        self.storages, self.read = storages, read

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a dictionary")

    def persistent_load(self, pid):
        kind, dtype, key, _, length = pid[:5]
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to an object of kind {kind!r}")
        if dtype not in _DTYPES.values():
            raise pickle.UnpicklingError(f"it has a storage of {dtype!r}")
        if key not in self.storages:
            self.storages[key] = _Storage(dtype, length)
            if self.read is not None:
                self.storages[key].values = np.frombuffer(self.read(key), self.storages[key].dtype)
        return self.storages[key]


def _load(file, storages, read=None):
    """Reads the next pickle of a file."""
    start = file.tell()
    # A short file may name a place in the unpickler's memory that is gigabytes away, and that it would fill up to.
    for code, value, position in pickletools.genops(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and value > (position or 0):  # type: ignore[operator]
            raise pickle.UnpicklingError(f"it counts {value} objects in {position} bytes")
    file.seek(start)
    return _Unpickler(file, storages, read).load()


def _read_zip(archive):
    names = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(names) != 1:
        raise pickle.UnpicklingError("it is a zip file without the data.pkl of PyTorch")
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
        raise pickle.UnpicklingError("its numbers are not little-endian")
    with archive.open(names[0]) as file:
        return _arrays(_load(file, {}, lambda key: archive.read(f"{prefix}data/{key}")))


def _read_legacy(file: BinaryIO):
    if _load(file, {}) != LEGACY_MAGIC:
        raise pickle.UnpicklingError("it does not start as a file of PyTorch")
    _load(file, {})  # The version of the protocol, and the sizes of integers after it.
    _load(file, {})
    storages: dict[str, _Storage] = {}
    saved = _load(file, storages)
    for key in _load(file, {}):
        length = int.from_bytes(_exactly(file, 8), "little")
        storage = storages[key]
        if length != storage.length:
            raise pickle.UnpicklingError(f"a storage has {length} values instead of {storage.length}")
        storage.values = np.frombuffer(_exactly(file, length * storage.dtype.itemsize), storage.dtype)
    return _arrays(saved)


def _exactly(file, count):
    data = file.read(count)
    if len(data) != count:
        raise EOFError("it ends early")
    return data


def _arrays(saved):
    if isinstance(saved, _Tensor):
        return saved.array()
    if isinstance(saved, dict):
        return {key: _arrays(value) for key, value in saved.items()}
    return [_arrays(value) for value in saved] if isinstance(saved, list | tuple) else saved
