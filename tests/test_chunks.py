"""Inference for some images at a time gives what the whole batch gives."""

import sys

import keras
import pytest

import keras_mnv2
from keras_mnv2.layers import InvertedResidual
from tests.helpers import randomise, relative_difference
from tests.test_ops import gradients

FAST = sys.modules[f"keras_mnv2.ops.{keras.backend.backend()}"]
CHUNKED = keras.backend.backend() != "tensorflow"


@pytest.fixture
def chunks(monkeypatch):
    """Sets the size of a chunk, and gives the batches that blocks have seen since."""
    seen = []
    transform = InvertedResidual._transform

    def counted(self, inputs, training):
        seen.append(inputs.shape[0])
        return transform(self, inputs, training)

    def set_bytes(size):
        seen.clear()
        monkeypatch.setattr(FAST, "CHUNK_BYTES", size, raising=CHUNKED)
        return seen

    monkeypatch.setattr(InvertedResidual, "_transform", counted)
    return set_bytes


@pytest.mark.parametrize("arguments", [{"classes": 3}, {"include_top": False, "features": True}])
@pytest.mark.parametrize("nested", [True, False])
def test_predictions_do_not_depend_on_the_chunks(arguments, nested, chunks, rng):
    common = {"weights": None, "alpha": 0.35, "inverted_residual_setting": [(1, 16, 1, 1), (6, 24, 2, 2)]}
    base = keras_mnv2.MobileNetV2((32, 32, 3), **common, **arguments)
    randomise(base, rng)
    # A plain model around the same layers has its blocks in chunks; the package's own, the network.
    models = [base, keras.Model(base.inputs, base.outputs)] if not nested else [base]
    if nested:
        image = keras.Input((32, 32, 3))
        models = [keras.Model(image, base(image))]
    images = rng.uniform(-1, 1, (6, 32, 32, 3)).astype("float32")
    for model in models:
        outputs = []
        for size in (1e12, 2.5e5, 1):
            seen = chunks(size)
            model.make_predict_function(force=True)
            found = model.predict(images, batch_size=6, verbose=0)
            outputs.append(
                found if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else [found]
            )
            assert 6 in seen or (CHUNKED and size < 1e12)
            assert not (CHUNKED and size == 1) or 1 in seen
        for other in outputs[1:]:
            for a, b in zip(other, outputs[0], strict=True):
                assert relative_difference(a, b) <= 1e-5


def test_gradients_of_inference_do_not_depend_on_the_chunks(chunks, rng):
    layer = InvertedResidual(16)
    x = rng.normal(size=(4, 8, 8, 16)).astype("float32")
    layer(x)
    found = []
    for size in (1e12, 1):
        chunks(size)
        found.append(gradients(lambda x: layer(x, training=False), [x]))
    for a, b in zip(*found, strict=True):
        assert relative_difference(a, b) <= 1e-5


def test_training_sees_the_whole_batch(chunks, rng):
    seen = chunks(1)
    layer = InvertedResidual(16)
    layer(keras.ops.convert_to_tensor(rng.normal(size=(4, 8, 8, 16)).astype("float32")), training=True)
    assert set(seen) == {4}
