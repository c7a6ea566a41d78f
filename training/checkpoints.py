"""Checkpoints of a run: everything that the next step depends on, in one file that any backend reads."""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training import files

FORMAT = 1
HASH_BYTES = 16
NAME = re.compile(r"(\d{8})\.checkpoint")


@dataclass
class Checkpoint:
    """Arrays and where they belong.

    `arrays` has the variables of a model and its training in four groups, `weights/0000`, `seeds/...`, `optimizer/...`
    and `metrics/...`, and what callbacks keep. `place` is what JSON holds: `phase`, `epoch` and `step` (both done),
    `history`, and so on.
    """

    arrays: dict[str, np.ndarray]
    place: dict[str, Any]

    def group(self, name: str) -> list[np.ndarray]:
        """The arrays of a group, in order."""
        return [array for key, array in sorted(self.arrays.items()) if key.startswith(f"{name}/")]

    def encode(self) -> bytes:
        """As bytes: a BLAKE2b hash of 16 bytes, and the `.npz` file of which it is."""
        buffer = io.BytesIO(bytes(HASH_BYTES))
        buffer.seek(HASH_BYTES)
        place = np.frombuffer(json.dumps(self.place | {"format": FORMAT}).encode(), "uint8")
        np.savez(buffer, place=place, **self.arrays)
        with buffer.getbuffer() as content:
            content[:HASH_BYTES] = _hash(content[HASH_BYTES:])
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes) -> "Checkpoint":
        """Reads what `encode` gave.

        Raises:
            ValueError: on anything else, cut off or changed.
        """
        if _hash(content[HASH_BYTES:]) != content[:HASH_BYTES]:
            raise ValueError("no whole checkpoint")
        with np.load(io.BytesIO(content[HASH_BYTES:]), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        place = json.loads(arrays.pop("place").tobytes())
        if place.pop("format") != FORMAT:
            raise ValueError("no checkpoint of this version")
        return cls(arrays, place)


def _hash(content):
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def take(model: keras.Model, metrics: Sequence[keras.Variable], place: dict[str, Any]) -> Checkpoint:
    """A copy of the state of a compiled model: weights, random seeds, optimiser and running means.

    Args:
        model: built and compiled.
        metrics: the variables of its metrics.
        place: of the checkpoint.
    """
    groups = {**_variables(model), "metrics": metrics}
    # Copies: on a CPU an array may be a view of what the next step overwrites.
    arrays = {
        f"{name}/{i:04d}": np.array(keras.ops.convert_to_numpy(variable))
        for name, variables in groups.items()
        for i, variable in enumerate(variables)
    }
    return Checkpoint(arrays, place)


def put(model: keras.Model, checkpoint: Checkpoint) -> None:
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


class Folder:
    """The checkpoints of a run, `00000001.checkpoint` and so on; the last few are kept.

    Args:
        path: of the folder, which is made with the first checkpoint.
        keep: how many, at least 1.
    """

    def __init__(self, path: Path, keep: int = 3):
        self.path = path
        self.keep = keep

    def numbers(self) -> list[int]:
        """Of the checkpoints that are there, the oldest first."""
        names = os.listdir(self.path) if self.path.is_dir() else ()
        return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))

    def file(self, number: int) -> Path:
        """Where a checkpoint lies."""
        return self.path / f"{number:08d}.checkpoint"

    def write(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, and removes the oldest.

        Raises:
            OSError: where that fails; the checkpoints are as before.
        """
        numbers = self.numbers()
        path = self.file((numbers[-1] if numbers else 0) + 1)
        self.write_beside(path, checkpoint)
        for number in numbers[: max(0, len(numbers) + 1 - self.keep)]:
            self.file(number).unlink(missing_ok=True)
        return path

    def write_beside(self, path: Path, checkpoint: Checkpoint) -> None:
        """Writes something else that a run goes on from, under a name of its own in the folder."""
        with files.told(path):
            # Not with its parents: a run folder that has vanished is not made again.
            self.path.mkdir(exist_ok=True)
        files.write(path, checkpoint.encode())

    def remove(self) -> None:
        """Removes all checkpoints: the run is complete."""
        shutil.rmtree(self.path, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none. One that is damaged is named and removed."""
        for number in reversed(self.numbers()):
            path = self.file(number)
            try:
                return Checkpoint.decode(path.read_bytes())
            except ValueError as error:
                print(f"{path} is {error}: the one before is taken", flush=True)
                path.unlink()
        return None
