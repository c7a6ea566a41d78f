"""Named arrays out of files of weights, whatever their format, without the library that wrote them."""

import io
import zipfile
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file

from keras_mnv2.weights.torch_file import read_torch_file

# What training scripts of PyTorch wrap a state dictionary in.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# The order of variables in a layer of a .weights.h5 file, by the name of the layer's class.
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every array of a file of weights.

    The format is told by the file's first bytes: safetensors; HDF5 (Keras's `.h5` and `.weights.h5`);
    zip (`.keras`, and PyTorch's `.pth`, `.pt`, `.bin`); or PyTorch's older form.

    Args:
        path: of the file.

    Returns:
        The arrays by name: as PyTorch names them, or `layer/variable` for Keras's files.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is truncated, corrupt, or holds anything but weights.
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
        raise ValueError(
            f"The file {str(path)!r} cannot be read as weights, it may be truncated or of another kind: "
            f"{str(error).rstrip('.') or type(error).__name__}."
        ) from error
    return arrays


def _read(path):
    with open(path, "rb") as file:
        start = file.read(9)
    # First: the length of safetensors' header, before its "{", may look like the start of a pickle.
    if start[8:] == b"{":
        return load_file(path)
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        with h5py.File(path, "r") as file:
            return _hdf5(file)
    if start[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(path) as archive:
            if "model.weights.h5" in archive.namelist():
                with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                    return _hdf5(file)
        return _state_dict(read_torch_file(path))
    if start[:1] == b"\x80":
        return _state_dict(read_torch_file(path))
    return load_file(path)


def _state_dict(saved):
    for key in _WRAPPERS:
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(value, np.ndarray) for value in saved.values()):
        raise ValueError("it holds no dictionary of tensors")
    # Models inside torch.nn.DataParallel have this before each name.
    return {name.removeprefix("module."): value for name, value in saved.items()}


def _hdf5(file):
    if "layers" in file:
        return _keras3(file["layers"])
    group = file.get("model_weights", file)
    if "layer_names" not in group.attrs:
        raise ValueError("it is an HDF5 file without the layers of Keras")
    arrays = {}
    for layer in group.attrs["layer_names"]:
        layer = _text(layer)
        for name in map(_text, group[layer].attrs["weight_names"]):
            base, _, variable = name.partition(":")[0].rpartition("/")
            # A layer of layers tells its variables apart by their paths, which start with its own name.
            inner = base.removeprefix(layer) if base.startswith(f"{layer}/") else ""
            arrays[f"{layer}{inner}/{variable.removeprefix('depthwise_')}"] = np.asarray(group[layer][name])
    return arrays


def _keras3(layers):
    """Keras 3 numbers variables and names layers by class; the layers' own names are attributes."""
    arrays = {}
    for group in layers.values():
        name = _text(group["vars"].attrs["name"])
        found: dict[str, np.ndarray] = {}
        group.visititems(lambda path, item, found=found: found.update({path: item}) if _is_array(item) else None)
        for path, item in found.items():
            parts = path.split("/")
            inner, number = [part for part in parts[:-1] if part != "vars"], int(parts[-1])
            siblings = sum(other.rpartition("/")[0] == path.rpartition("/")[0] for other in found)
            variable = _NORM[number] if siblings == 4 else ("kernel", "bias")[number]
            arrays["/".join([name, *inner, variable])] = np.asarray(item)
    return arrays


def _is_array(item):
    return isinstance(item, h5py.Dataset)


def _text(name):
    return name.decode() if isinstance(name, bytes) else name
