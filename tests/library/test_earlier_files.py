"""Files of version 0.1.0, where a block was one layer by default (tests/golden/write_files.py)."""

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.layers import InvertedResidual
from tests.golden.write_files import FOLDER, build, images
from tests.helpers import relative_difference


def check(name, found, limit=1e-5):
    found = found if isinstance(found, dict) else {"output": found}
    with np.load(FOLDER / "expected.npz") as expected:
        for output, value in found.items():
            assert relative_difference(value, expected[f"{name}/{output}"]) <= limit


@pytest.mark.parametrize("name", ["whole.keras", "folded.keras", "features.keras"])
def test_a_whole_model_loads(name):
    model = keras.models.load_model(FOLDER / name)
    check(name, model.predict(images(), verbose=0))


def test_a_quantised_model_loads():
    model = keras.models.load_model(FOLDER / "quantised.keras")
    # A last bit more or less rounds some numbers to another of 256 levels.
    check("quantised.keras", model.predict(images(), verbose=0), 0.05)


@pytest.mark.parametrize("block", [None, InvertedResidual])
def test_weights_load_into_both_forms(block):
    model = build(include_top=False, features=["block_0"], block=block)
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    keras_mnv2.load_weights(model, FOLDER / "features.weights.h5")
    check("features.weights.h5", model.predict(images(), verbose=0))


def test_weights_load_as_keras_does():
    model = build(include_top=False, features=["block_0"], block=InvertedResidual)
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    model.load_weights(FOLDER / "features.weights.h5")
    check("features.weights.h5", model.predict(images(), verbose=0))
