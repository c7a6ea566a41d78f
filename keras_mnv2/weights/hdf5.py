"""Keras's HDF5 files as named arrays, and the checks that such a file keeps to itself."""

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from keras_mnv2.annotations import PathLike
from keras_mnv2.weights.bounds import Archive, check_claim

INNER = "model.weights.h5"
# HDF5's own filters, of which the first alone changes the size; any other may load a library.
_DEFLATE, _FILTERS = 1, (1, 2, 3)
# The order of variables in a layer of a .weights.h5 file: of a normalisation, whose first is a vector, and of others.
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_OTHER = ("kernel", "bias")
# No layer has so long a name; a file may say the same one a thousand times.
_LONGEST_NAME = 1000


def check_hdf5(path: PathLike) -> None:
    """Raises an error unless an HDF5 file, or a `.keras` file's, keeps all its arrays itself.

    HDF5 lets a file say that an array lies in another file of this machine, which whoever reads it would open. Nothing
    of an array is read, but compressed ones, which are unpacked as far as they should go.

    Args:
        path: of the `.h5`, `.weights.h5` or `.keras` file.

    Raises:
        ValueError: where it has an external or soft link, an array in another file, a virtual one, an unusual filter,
            two names for one group, or arrays that would take far more memory than the file; or where it is no such
            file, or truncated.

    Examples:
        >>> MobileNetV2((32, 32, 3), alpha=0.35, weights=None).save("model.keras")
        >>> check_hdf5("model.keras")
    """
    try:
        with open_hdf5(Path(path)):
            pass
    except Exception as error:
        raise ValueError(f"The file {os.fspath(path)!r} is not safe to open: {str(error).rstrip('.')}.") from error


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file, or the one inside a `.keras` file, once `check_hdf5`'s rules were found to hold."""
    if zipfile.is_zipfile(path):
        with Archive(path) as archive:
            data = bytes(archive.member(INNER))
    else:
        data = path.read_bytes()
    # From memory: HDF5 takes a path for a file that it could not close before, and shares what it believed of that.
    try:
        file = h5py.File(io.BytesIO(data), "r")
    except OSError as error:
        raise EOFError("its end is missing") if "truncated file" in str(error) else error from None
    with file:
        _check_all(file, os.path.getsize(path))
        yield file


def _check_all(file: h5py.File, size: int) -> None:
    claimed, seen, groups = 0, {file}, [file]
    while groups:
        group = groups.pop()
        for key in group:
            name = f"{group.name.rstrip('/')}/{key}"
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
                raise ValueError(f"{name} is {kind}, which may lead out of it")
            item = group[key]
            if isinstance(item, h5py.Group):
                if item in seen:
                    raise ValueError(f"{name} is one of two names for a group")
                seen.add(item)
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                claimed += _claim(name, item)
                check_claim(claimed, size)
                _check_chunks(name, item, size)


def _claim(name: str, dataset: h5py.Dataset) -> int:
    """The bytes that a dataset takes in memory once it is read."""
    plist = dataset.id.get_create_plist()
    if plist.get_external_count():
        raise ValueError(f"{name} keeps its numbers in another file")
    if plist.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"{name} is a virtual dataset, which is put together from other files")
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    if not set(filters) <= set(_FILTERS) or filters.count(_DEFLATE) > 1:
        raise ValueError(f"{name} is packed by another filter than gzip")
    shape = dataset.shape or ()
    return math.prod(max(sides) for sides in zip(shape, dataset.chunks or shape, strict=True)) * dataset.dtype.itemsize


def _check_chunks(name: str, dataset: h5py.Dataset, size: int) -> None:
    """HDF5 unpacks a chunk to the end, however far that is beyond what the chunk should have."""
    if dataset.compression is None:
        return
    expected = math.prod(dataset.chunks) * dataset.dtype.itemsize
    for number in range(dataset.id.get_num_chunks()):
        chunk = dataset.id.get_chunk_info(number)
        if chunk.size > size:
            raise ValueError(f"{name} has a chunk that is larger than the file")
        skipped, packed = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if not skipped and len(zlib.decompressobj().decompress(packed, expected + 1)) > expected:
            raise ValueError(f"{name} has a chunk that unpacks to more than its {expected} bytes")


def hdf5_arrays(file: h5py.File) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of Keras that `open_hdf5` gave, without those of an optimizer.

    Args:
        file: of Keras 2 (`.h5`) or Keras 3 (`.weights.h5`).

    Returns:
        The arrays by name, `layer/variable`; before them the names of the models that the layer is nested in.

    Raises:
        ValueError: where it is of another kind, or two arrays have one name.
    """
    if "layers" in file or "vars" in file:
        found = _keras3(file, "")
    else:
        group = file.get("model_weights", file)
        # Keras spreads a long list of layers over several attributes.
        if not {"layer_names", "layer_names0"} & set(group.attrs):
            raise ValueError("it is an HDF5 file without the layers of Keras")
        found = _keras2(group)
    arrays: dict[str, np.ndarray] = {}
    for name, dataset in found:
        if name in arrays:
            raise ValueError(f"it has two arrays of the name {name}")
        # Anything else is text, whose length no header says.
        if dataset.dtype.kind not in "biuf":
            raise ValueError(f"{name} holds values of type {dataset.dtype}")
        arrays[name] = np.asarray(dataset[()])
    return arrays


def _keras2(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """The groups say what the attributes beside them say again: `layer/layer/variable:0`."""
    for layer, inner in group.items():
        found: dict[tuple[str, str], h5py.Dataset] = {}
        for path, item in _datasets(inner, ""):
            base, _, variable = path.rpartition("/")
            found[base, variable.partition(":")[0].removeprefix("depthwise_")] = item
        plain = len({base for base, _ in found}) == 1
        for (base, variable), item in found.items():
            # A layer of layers tells them apart by their paths, which may start with its own name.
            below = "" if plain else f"/{base.removeprefix(layer).strip('/')}".rstrip("/")
            yield f"{layer}{below}/{variable}", item


def _datasets(item: h5py.Group | h5py.Dataset, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    if isinstance(item, h5py.Dataset):
        yield path, item
    else:
        for key, child in item.items():
            yield from _datasets(child, f"{path}/{key}".lstrip("/"))


def _keras3(group: h5py.Group, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """Keras 3 numbers variables and names layers by class; the layers' own names are attributes."""
    for key, child in group.items():
        if key == "vars":
            names = _NORM if "0" in child and child["0"].ndim == 1 else _OTHER
            for number, dataset in child.items():
                known = number.isdecimal() and int(number) < len(names)
                yield path + (names[int(number)] if known else number), dataset
        elif key == "layers":
            for name, layer in child.items():
                yield from _keras3(layer, f"{path}{_own_name(layer) or name}/")
        elif isinstance(child, h5py.Group) and (path or key != "optimizer"):
            yield from _keras3(child, f"{path}{key}/")


def _own_name(layer: h5py.Group) -> str | None:
    attributes = layer["vars"].attrs if "vars" in layer else None
    # A list of names could repeat one long one beyond all memory.
    if attributes is None or "name" not in attributes or attributes.get_id("name").shape != ():
        return None
    name = attributes["name"]
    name = name.decode() if isinstance(name, bytes) else name
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        raise ValueError(f"{layer.name} has a name that no layer has")
    return name
