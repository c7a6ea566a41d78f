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
# Fixtures of the whole session.
pytest_plugins = ["tests.exports"]

# What compiles for numbers that the compiler's optimisations could change, or for speed.
OPTIMISED = {
    "test_benchmark",
    "test_engines",
    "test_fitting",
    "test_later",
    "test_ops",
    "test_train",
}


def marks(backend="torch"):
    """The marks of a parameter that runs on this backend alone, elsewhere if slow."""
    return [pytest.mark.slow] if keras.backend.backend() != backend else []


ONCE = marks()


def once_on(backend):
    """Marks a test that takes long and says much the same on each backend: it runs on this one, elsewhere if slow.

    They are shared out so that the three processes end at about the same time.
    """
    return lambda test: pytest.mark.slow(test) if marks(backend) else test


once = once_on("torch")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _light_compilation(request):
    """XLA takes half the time to compile what runs once."""
    if keras.backend.backend() != "jax" or request.module.__name__.rpartition(".")[2] in OPTIMISED:
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
