"""What several test modules need."""

import os
import subprocess
import sys

import keras
import numpy as np

from tests.conftest import measured


def note(name, value):
    """Adds a figure to the summary at the end of the run."""
    measured.append(f"measured on {keras.backend.backend()}: {name}: {value:.2g}")


def relative_difference(found, expected):
    """Largest absolute difference over the largest absolute value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def randomise(model, rng):
    """Gives batch norms random statistics, scales and shifts, so that none is the identity."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            channels = layer.gamma.shape[0]
            layer.set_weights(
                [
                    rng.uniform(0.8, 1.2, channels),
                    rng.normal(0, 0.1, channels),
                    rng.normal(0, 0.1, channels),
                    rng.uniform(0.8, 1.2, channels),
                ]
            )


def run_python(code, backend, *arguments):
    """Runs `code` in a process with that backend and gives its output."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
