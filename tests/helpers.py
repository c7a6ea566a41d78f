"""What several test modules need."""

import contextlib
import os
import subprocess
import sys

import keras
import numpy as np

from tests.conftest import measured


def note(name, value):
    """Adds a figure to the summary at the end of the run."""
    measured.append(f"measured on {keras.backend.backend()}: {name}: {value:.2g}")


@contextlib.contextmanager
def double_precision():
    """Keras computes in float64 inside, so that rounding does not hide or make a difference."""
    policy = keras.config.dtype_policy()
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        keras.config.set_dtype_policy("float64")
        stack.callback(keras.config.set_dtype_policy, policy)
        yield


def relative_difference(found, expected):
    """Largest absolute difference over the largest absolute value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def relative_norm(found, expected):
    """Norm of the difference over the norm of the expected array."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def randomise(model, rng, x=None):
    """Random scales and shifts for the batch norms, and statistics near those of a batch.

    Untrained statistics would let the signal die out on its way, and every model look alike.

    Args:
        model: a model or layer.
        rng: a NumPy generator.
        x: the batch; by default random images of the model's input shape.
    """
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if x is None:
        x = rng.uniform(-1, 1, (4, *(n or 64 for n in model.inputs[0].shape[1:]))).astype("float32")
    for norm in norms:
        channels = norm.moving_mean.shape[0]
        if norm.scale:
            norm.gamma.assign(rng.uniform(0.8, 1.2, channels))
        if norm.center:
            norm.beta.assign(rng.normal(0, 0.3, channels))
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(x, training=True)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
        mean, variance = map(keras.ops.convert_to_numpy, (norm.moving_mean, norm.moving_variance))
        norm.moving_mean.assign(mean + np.sqrt(variance) * rng.normal(0, 0.1, mean.shape))
        norm.moving_variance.assign(variance * rng.uniform(0.8, 1.2, mean.shape))


def run_python(code, backend, *arguments):
    """Runs `code` in a process with that backend and gives its output."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hiding(*packages):
    """Code that hides these packages from the process that runs it, as where they are not installed."""
    return f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] in {packages!r} else super().find_spec(name, *args, **kwargs)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""
