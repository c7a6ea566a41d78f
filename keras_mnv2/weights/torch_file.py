"""Tensors out of PyTorch's files, without PyTorch and without running anything that a file says."""

import collections
import functools
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_mnv2.weights.bounds import Archive
from keras_mnv2.weights.torch_pickle import Bounded, Machine, Storage, Tensor, Unknown, named_storage

# Signature of the files of `torch.save` before 1.6, and of those written without its zip format since.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LONGEST_NAME = 1000


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file of `torch.save`, zipped or of the older form.

    Whatever else a training script put beside them (arguments, scores, the state of an optimizer, objects of any
    class) is passed over: no class is imported, and nothing is called. The tensors of a module that was saved as a
    whole have the names of its state dictionary.

    Args:
        path: of the file.

    Returns:
        The tensors by the keys that lead to them, joined by `/`, as views of the storages that they share.
        bfloat16 comes as float32.

    Raises:
        EOFError: where the file ends early.
        ValueError: where it holds no tensors under names; the message says what it holds.
        Exception: of other kinds, where it is corrupt.
    """
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            with Archive(path) as archive:
                return _read_zip(archive)
        file.seek(0)
        return _read_legacy(file)


def _read_zip(archive: Archive) -> dict[str, np.ndarray]:
    names = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(names) != 1:
        raise ValueError("it is a zip file with neither PyTorch's data.pkl nor Keras's model.weights.h5")
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in archive.namelist() and archive.member(f"{prefix}byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    data = archive.member(names[0])
    storages: dict[str, Storage] = {}
    machine = Machine(lambda pid: named_storage(pid, storages, lambda key: archive.member(f"{prefix}data/{key}")))
    return _named(machine.run(Bounded(io.BytesIO(data), len(data))))


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    bounded = Bounded(file, os.fstat(file.fileno()).st_size)
    storages: dict[str, Storage] = {}

    def load() -> Any:
        return Machine(lambda pid: named_storage(pid, storages)).run(bounded)

    if load() != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but none that PyTorch wrote")
    load(), load()  # The version of the protocol, and the sizes of integers after it.
    saved = load()
    for key in load():
        if key not in storages:
            raise ValueError("it has numbers that belong to no tensor")
        storage, length = storages[key], int.from_bytes(bounded.numbers(8), "little")
        if length != storage.length:
            raise ValueError(f"a storage has {length} values instead of {storage.length}")
        storage.read = functools.partial(_given, bounded.numbers(length * storage.itemsize))
    return _named(saved)


def _given(data: bytearray) -> bytearray:
    return data


def _named(saved: Any) -> dict[str, np.ndarray]:
    """The tensors of a dictionary, and of those inside it, each of which is walked once."""
    found, seen, todo = {}, set(), collections.deque([("", saved, "/")])
    while todo:
        path, thing, joint = todo.popleft()
        made = isinstance(thing, Unknown) and isinstance(thing.state, dict)
        thing = thing.state if made else thing
        if not isinstance(thing, dict) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if made and "_modules" in thing:
            todo += [(path, thing.get(part), ".") for part in ("_parameters", "_buffers", "_modules")]
            continue
        for key, value in thing.items():
            # A dictionary inside the other a thousand times over, or a key of a million letters, names nothing.
            if len(path) + len(key) > _LONGEST_NAME:
                continue
            if isinstance(value, Tensor):
                found[path + key] = value.array()
            else:
                todo.append((path + key + joint, value, "/"))
    if not found:
        raise ValueError(f"it holds no dictionary of tensors but {_kind(saved)}")
    return found


def _kind(saved: Any) -> str:
    if isinstance(saved, Unknown):
        return f"a {saved.name}"
    if isinstance(saved, Tensor):
        return "one tensor without a name"
    if not isinstance(saved, dict):
        return f"a {type(saved).__name__}"
    return f"a dictionary with the keys {', '.join(map(repr, list(saved)[:5]))}" if saved else "one without names"
