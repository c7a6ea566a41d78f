"""Named arrays out of files of weights, whatever their format, without the library that wrote them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from keras_mnv2.annotations import PathLike
from keras_mnv2.weights.bounds import Archive
from keras_mnv2.weights.hdf5 import INNER, hdf5_arrays, open_hdf5
from keras_mnv2.weights.torch_file import read_torch_file
from keras_mnv2.weights.torch_pickle import widened

# Of safetensors; bfloat16 is read by its bits.
_DTYPES = {
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "BOOL": "bool"},
}
# Of what a file says of itself, no more than this goes into an error.
_LONGEST_REASON = 300


def read_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """Reads every array of a file of weights.

    The format is told by the file's first bytes: safetensors; HDF5 (Keras's `.h5` and `.weights.h5`);
    zip (`.keras`, and PyTorch's `.pth`, `.pt`, `.bin`); or PyTorch's older form. Nothing in a file is run, no other
    file is opened because a file says so, and what its headers claim is checked before memory is taken for it.

    Args:
        path: of the file.

    Returns:
        The arrays by name: as PyTorch names them, or `layer/variable` for Keras's files. What leads to a dictionary
        inside another, or to a model inside another, stands before the name with a `/`. Arrays may share their memory;
        bfloat16 comes as float32.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is truncated, corrupt, or holds anything but weights; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights at {str(path)!r}.")
    try:
        arrays = _read(path)
        for name, value in arrays.items():
            if not np.can_cast(value.dtype, "float32", "same_kind"):
                raise ValueError(f"{name} holds values of type {value.dtype}")
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON].rstrip(".: ") or type(error).__name__
        truncated = "it is truncated, " if isinstance(error, EOFError) else ""
        raise ValueError(f"The file {str(path)!r} cannot be read as weights: {truncated}{reason}.") from error
    return arrays


def _read(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        start = file.read(9)
    # First: the length of safetensors' header, before its "{", may look like the start of a pickle.
    if start[8:] == b"{":
        return _safetensors(path)
    if start[:8] == b"\x89HDF\r\n\x1a\n" or (start[:2] == b"PK" and _is_keras(path)):
        with open_hdf5(path) as file:
            return hdf5_arrays(file)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return read_torch_file(path)
    if not start:
        raise EOFError("it is empty")
    raise ValueError("it is neither safetensors, nor HDF5, nor a zip archive, nor a file of PyTorch")


def _is_keras(path: Path) -> bool:
    with Archive(path) as archive:
        return INNER in archive.namelist()


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    try:
        return {name: _array(name, **found) for name, found in deserialize(data)}
    except SafetensorError as error:
        length = int.from_bytes(data[:8], "little")
        if 8 + length > len(data):
            raise EOFError("it ends within its header") from error
        header = json.loads(data[8 : 8 + length])
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        raise EOFError("it ends within its numbers") if 8 + length + end > len(data) else error from None


def _array(name: str, shape: Sequence[int], dtype: str, data: bytes) -> np.ndarray:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} holds values of type {dtype}")
    values = np.frombuffer(data, _DTYPES[dtype])
    return (widened(values) if dtype == "BF16" else values).reshape(shape)
