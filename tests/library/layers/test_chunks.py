"""Inference for some images at a time gives what the whole batch gives."""

import sys

import keras
import pytest

import keras_mnv2
from keras_mnv2 import ops
from keras_mnv2.layers import InvertedResidual
from keras_mnv2.layers.fusing import Unit
from tests.helpers import randomise, relative_difference
from tests.library.ops.test_ops import gradients

FAST = sys.modules[f"keras_mnv2.ops.{keras.backend.backend()}"]
CHUNKED = keras.backend.backend() != "tensorflow"


ROWS = [(1, 16, 1, 1), (6, 24, 2, 2)]


@pytest.fixture
def chunks(monkeypatch):
    """Sets the size of a chunk, and gives the batches that convolutions have seen since."""
    seen = []

    def counting(compute, place):
        def counted(*arguments):
            seen.append(arguments[place].shape[0])
            return compute(*arguments)

        return counted

    def set_bytes(size):
        seen.clear()
        monkeypatch.setattr(FAST, "CHUNK_BYTES", size, raising=CHUNKED)
        return seen

    monkeypatch.setattr(Unit, "_convolve", counting(Unit._convolve, 1))
    # Where a block in training is one operation.
    monkeypatch.setattr(ops, "train_block", counting(ops.train_block, 1))
    return set_bytes


def network(block=None, **arguments):
    common = {"weights": None, "alpha": 0.35, "inverted_residual_setting": ROWS, "block": block}
    return keras_mnv2.MobileNetV2((32, 32, 3), **common, **arguments)


def around(model):
    """A plain model around the same layers, which has its blocks in chunks; the package's own has the network."""
    return keras.Model(model.input, model.outputs)


def nested(model):
    image = keras.Input((32, 32, 3))
    return keras.Model(image, model(image))


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        (None, {"classes": 3}),
        (None, {"include_top": False, "features": True}),
        (InvertedResidual, {"include_top": False, "features": True}),
    ],
)
@pytest.mark.parametrize("form", [lambda model: model, around, nested], ids=["itself", "around", "nested"])
def test_predictions_do_not_depend_on_the_chunks(block, arguments, form, chunks, rng):
    base = network(block, **arguments)
    randomise(base, rng)
    model = form(base)
    images = rng.uniform(-1, 1, (6, 32, 32, 3)).astype("float32")
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


FORMS = {
    "compact": lambda: InvertedResidual(16),
    "network": lambda: network(include_top=False),
    "around": lambda: around(network(include_top=False)),
}


def form_and_images(form, rng):
    model = FORMS[form]()
    x = rng.normal(size=(4, 8, 8, 16) if form == "compact" else (4, 32, 32, 3)).astype("float32")
    model(x)
    randomise(model, rng, x)
    return model, x


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_inference_do_not_depend_on_the_chunks(form, chunks, rng):
    model, x = form_and_images(form, rng)
    found = []
    for size in (1e12, 1):
        chunks(size)
        found.append(gradients(lambda x: model(x, training=False), [x]))
    for a, b in zip(*found, strict=True):
        assert relative_difference(a, b) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_training_sees_the_whole_batch(form, chunks, rng):
    model, x = form_and_images(form, rng)
    seen = chunks(1)
    model(keras.ops.convert_to_tensor(x), training=True)
    assert set(seen) == {4}
