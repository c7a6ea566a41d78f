"""Checkpoints of a run: everything that the next step depends on, in one file that any backend reads."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from .. import files

FORMAT = 2
# Of the name of a file of this format. A name that has another format's belongs to another version of this package.
SUFFIX = f".v{FORMAT}.safetensors"
DAMAGED = ".damaged"
FORMAT_1 = ".checkpoint"
NUMBERED = re.compile(r"(\d{8})(\.v\d+\.safetensors|\.damaged|\.checkpoint)")
# In the file's header, where no text can hold it: JSON puts a backslash before each quote of a text.
HASH_MARK = b'"blake2b":"'
HASH_BYTES = 16
HASH_LENGTH = 2 * HASH_BYTES


@dataclass
class State:
    """Arrays and where they belong.

    `arrays` has the variables of a model and its training in four groups, `weights/0000`, `seeds/...`, `optimizer/...`
    and `metrics/...`, and what callbacks keep. `position` is what JSON holds: `phase`, `epoch` and `step` (both done),
    `history`, and so on.
    """

    arrays: dict[str, np.ndarray]
    position: dict[str, Any]

    def group(self, name: str) -> list[np.ndarray]:
        """The arrays of a group, in order."""
        return [array for key, array in sorted(self.arrays.items()) if key.startswith(f"{name}/")]

    def encode(self) -> bytes:
        """As the bytes of a safetensors file, whose metadata hold the position, the format, and a hash of the rest."""
        metadata = {"format": str(FORMAT), "place": json.dumps(self.position), "blake2b": "0" * HASH_LENGTH}
        # Dense: safetensors writes what lies in memory from the first number on.
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        content = safetensors.numpy.save(arrays, metadata)
        before, after = _around_hash(content)
        return b"".join([before, _hash(before, after), after])

    @classmethod
    def decode(cls, content: bytes) -> "State":
        """Reads what `encode` gave.

        Raises:
            ValueError: on anything else, cut off or changed.
        """
        before, after = _around_hash(content)
        if content[len(before) : len(before) + HASH_LENGTH] != _hash(before, after):
            raise ValueError("no whole checkpoint")
        try:
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            written, position = metadata["format"], json.loads(metadata["place"])
            arrays = safetensors.numpy.load(content)
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError("no whole checkpoint") from error
        if written != str(FORMAT) or not isinstance(position, dict):
            raise ValueError("no checkpoint of this version")
        return cls(arrays, position)


def _around_hash(content):
    """What lies before the hash and after it."""
    start = content.find(HASH_MARK) + len(HASH_MARK)
    view = memoryview(content)
    return view[:start], view[start + HASH_LENGTH :]


def _hash(before, after):
    digest = hashlib.blake2b(before, digest_size=HASH_BYTES)
    digest.update(after)
    return digest.hexdigest().encode()


def take(model: keras.Model, metrics: Sequence[keras.Variable], position: dict[str, Any]) -> State:
    """A copy of the state of a compiled model: weights, random seeds, optimiser and running means.

    Args:
        model: built and compiled.
        metrics: the variables of its metrics.
        position: of the checkpoint.
    """
    groups = {**_variables(model), "metrics": metrics}
    # Copies: on a CPU an array may be a view of what the next step overwrites.
    arrays = {
        f"{name}/{i:04d}": np.array(keras.ops.convert_to_numpy(variable))
        for name, variables in groups.items()
        for i, variable in enumerate(variables)
    }
    return State(arrays, position)


def put(model: keras.Model, checkpoint: State) -> None:
    """Gives a compiled model what `take` took, on this or another backend, but for the running means.

    Raises:
        ValueError: before anything is changed, where the model has other variables.
    """
    groups = _variables(model)
    for name, variables in groups.items():
        found, wanted = [a.shape for a in checkpoint.group(name)], [tuple(v.shape) for v in variables]
        if found != wanted:
            raise ValueError(
                f"The checkpoint must have the {len(wanted)} {name} of this model in their shapes, got {len(found)}"
                f"{' of other shapes' if len(found) == len(wanted) else ''}."
            )
    for name, variables in groups.items():
        assign(variables, checkpoint.group(name))


def assign(variables: Sequence[keras.Variable], arrays: Sequence[np.ndarray]) -> None:
    """Gives each variable its array."""
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array.astype(variable.dtype))


def seeds(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's random generators, which no file of weights holds."""
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _variables(model):
    return {"weights": model.weights, "seeds": seeds(model), "optimizer": model.optimizer.variables}


class Checkpoints:
    """The checkpoints of a run, `00000001.v2.safetensors` and so on; the last few are kept.

    What is damaged gets a name that says so. That, and the checkpoints of other versions of this package, are neither
    read nor removed, and no checkpoint gets a number of theirs.

    Args:
        path: of the folder, which is made with the first checkpoint.
        keep: how many, at least 1.
    """

    def __init__(self, path: Path, keep: int = 3):
        self.path = path
        self.keep = keep

    def numbers(self) -> list[int]:
        """Of the checkpoints that are there, the oldest first."""
        return [number for number, suffix in self._numbered() if suffix == SUFFIX]

    def file(self, number: int) -> Path:
        """Where a checkpoint lies."""
        return self.path / f"{number:08d}{SUFFIX}"

    def passed_over(self) -> dict[Path, str]:
        """The files that `newest` does not take, the oldest first, and what each is."""
        return {
            self.path / f"{number:08d}{suffix}": _foreign(suffix)
            for number, suffix in self._numbered()
            if suffix != SUFFIX
        }

    def write(self, checkpoint: State) -> Path:
        """Writes a checkpoint, and removes the oldest.

        Raises:
            OSError: where that fails; the checkpoints are as before.
        """
        path = self.file(max((number for number, _ in self._numbered()), default=0) + 1)
        numbers = self.numbers()
        self.write_beside(path, checkpoint)
        for number in numbers[: max(0, len(numbers) + 1 - self.keep)]:
            self.file(number).unlink(missing_ok=True)
        return path

    def write_beside(self, path: Path, checkpoint: State) -> None:
        """Writes something else that a run goes on from, under a name of its own in the folder."""
        with files.told(path):
            # Not with its parents: a run folder that has vanished is not made again.
            self.path.mkdir(exist_ok=True)
        files.write(path, checkpoint.encode())

    def remove(self) -> None:
        """Removes all checkpoints and what lies beside them, but for what `newest` passes over: the run is complete."""
        kept = self.passed_over()
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path not in kept:
                    path.unlink()
            self.path.rmdir()

    def newest(self) -> State | None:
        """The newest checkpoint that is whole; None where there is none. What is passed over is named."""
        for path, what in self.passed_over().items():
            print(f"{path} is {what}: it is passed over, and kept", flush=True)
        for number in reversed(self.numbers()):
            path = self.file(number)
            try:
                return State.decode(path.read_bytes())
            except ValueError as error:
                kept = path.with_name(f"{number:08d}{DAMAGED}")
                print(f"{path} is {error}: the one before is taken, and this one kept as {kept.name}", flush=True)
                with files.told(kept):
                    path.rename(kept)
        return None

    def _numbered(self):
        """Numbers and suffixes of everything that is or was a checkpoint, sorted."""
        names = os.listdir(self.path) if self.path.is_dir() else ()
        return sorted((int(match[1]), match[2]) for name in names if (match := NUMBERED.fullmatch(name)))


def _foreign(suffix):
    if suffix == DAMAGED:
        return "damaged"
    written = "1" if suffix == FORMAT_1 else suffix.removeprefix(".v").removesuffix(".safetensors")
    return f"written by another version of keras_mnv2 (format {written}, this one reads {FORMAT})"
