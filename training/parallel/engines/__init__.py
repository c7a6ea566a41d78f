"""What trains on several devices: an engine for each backend, chosen by what the launch has set in the environment.

Each backend's module has the `start` and `own_cpu` of this one, and `OneDevice`.
"""

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from ...process import PACKAGE

# Variables with which a launch says how many processes there are, and the backend that reads them.
LAUNCHES = {"WORLD_SIZE": "torch", "KERAS_DISTRIBUTION_NUM_PROCESSES": "jax", "TF_CONFIG": "tensorflow"}
# Of launchers that say so for no backend.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Engine:
    """One device in one process, which needs nothing. The engines of the backends put their own in its places.

    Attributes:
        number: of this process.
        processes: how many there are.
        host: of process 0.
        replicas: devices of all processes, each of which has a part of every batch.
        norm_layer: of a model whose batch norms shall see the whole batch.
        own_step: whether `install` brings a step that keeps the means itself.
    """

    number = 0
    processes = 1
    host = "127.0.0.1"
    replicas = 1
    norm_layer = "batch_norm"
    own_step = False

    def scope(self) -> AbstractContextManager:
        """Where the model that is trained is built and compiled."""
        return contextlib.nullcontext()

    def alone(self) -> AbstractContextManager:
        """Where this process builds, trains and runs a model of its own, on one device."""
        return contextlib.nullcontext()

    def exchange(self, numbers: np.ndarray) -> np.ndarray:
        """Process 0's array of int32, of a shape that all know."""
        return numbers

    def trained(self, model: keras.Model) -> keras.Model:
        """The model of which `fit` is called, with the variables of `model`, which was built in the scope."""
        return model

    def install(self, model: keras.Model, *means: keras.metrics.Metric) -> None:
        """Makes `fit` of a compiled model, with these means, train over all devices on each process's own rows."""

    def seed_step(self, position: tuple[int, ...]) -> None:
        """Makes what the step at this place draws depend on nothing else, as far as it comes from global generators."""

    def spread_seeds(self, seeds: list[keras.Variable], direction: int) -> None:
        """Moves this process's random generators apart from the others' (1), or back again (-1)."""

    def predictor(self, model: keras.Model) -> Callable[[np.ndarray], Any]:
        """A function from images to scores, on this process's devices, with the weights of now."""
        return lambda images: keras.tree.map_structure(np.asarray, model.predict_on_batch(images))

    def close(self) -> None:
        """Leaves the others."""


ONE_DEVICE = Engine()


def start(devices: int | None = None, deterministic: bool = False) -> Engine:
    """The engine that this launch asks for; nothing of the backend may have run before.

    Args:
        devices: of this process, at least 1; by default all GPUs or TPU cores, or one CPU.
        deterministic: whether a GPU computes in a fixed order.

    Raises:
        ValueError: on a launch of several processes that would train models which know nothing of each other, or on
            `devices` that cannot be had.
    """
    backend = keras.backend.backend()
    refuse_strangers(backend, os.environ)
    return _module().start(devices, deterministic)


def alone() -> Engine:
    """The engine of one device in one process."""
    return _module().OneDevice()


@contextlib.contextmanager
def own_cpu() -> Iterator[None]:
    """Inside, what is computed stays on this process's CPU."""
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        with _module().own_cpu():
            yield
    finally:
        keras.distribution.set_distribution(before)


def refuse_strangers(backend: str, environment: Any) -> None:
    """Raises a ValueError where a launch of several processes says nothing to this backend."""
    counts = {name: _count(name, environment.get(name)) for name in (*LAUNCHES, *TASKS)}
    if any(counts[name] > 1 for name, reader in LAUNCHES.items() if reader == backend):
        return
    for name, count in counts.items():
        if count > 1:
            reader = f", which KERAS_BACKEND={LAUNCHES[name]} reads" if name in LAUNCHES else ""
            raise ValueError(
                f"KERAS_BACKEND={backend} in a launch of {count} processes ({name}{reader}) would train {count} models "
                f"that know nothing of each other: start them with python -m {PACKAGE}.launch (docs/scaling.md)."
            )


def _module():
    return importlib.import_module(f"{__name__}.{keras.backend.backend()}")


def _count(name: str, value: str | None) -> int:
    if not value:
        return 1
    try:
        if name != "TF_CONFIG":
            return int(value)
        return sum(len(hosts) for role, hosts in json.loads(value)["cluster"].items() if role in ("worker", "chief"))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{name} must say how many processes there are, got {value!r}.") from None
