"""Shared helpers. The backend is the process's: `KERAS_BACKEND`; `python -m tests` runs one process each."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# First: loaded after TensorFlow, the Triton library that these bring crashes the process (torch 2.14, TensorFlow 2.21).
import timm  # noqa: F401  isort: skip

import keras
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

BACKENDS = ("tensorflow", "jax", "torch")

# Marks of a parameter, likewise.
ONCE = [pytest.mark.slow] if keras.backend.backend() != "torch" else []


def once(test):
    """Marks a test that takes long and says much the same on each backend: it runs on PyTorch, elsewhere if slow."""
    return pytest.mark.slow(test) if ONCE else test


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def light_compilation():
    """XLA takes half the time to compile what runs once."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small data set of arrays, as a file."""
    from tests import runs

    return runs.write_blocks(tmp_path_factory.mktemp("data") / "blocks.npz")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also runs what takes minutes, or needs a download")


def pytest_collection_modifyitems(config, items):
    """Leaves the slow tests out, as deselected, unless `--slow` asks for them."""
    slow = [] if config.getoption("--slow") else [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_terminal_summary(terminalreporter):
    """Prints what the tests measured, such as the largest differences."""
    for line in measured:
        terminalreporter.write_line(line)


measured: list[str] = []
