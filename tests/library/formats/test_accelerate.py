"""`accelerate`: predictions as the model's, by another runtime. Each runtime runs on one backend at least."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import once_on
from tests.exports import small

# Runtimes whose graph another backend writes are slower to make.
RUNTIME = {"tensorflow": "openvino", "jax": "litert", "torch": "onnxruntime"}[keras.backend.backend()]


@pytest.fixture(scope="module")
def fast():
    model = small(include_preprocessing=True)
    return model, keras_mnv2.accelerate(model, RUNTIME)


class Batches(keras.utils.PyDataset):
    def __init__(self, images, size):
        super().__init__()
        self.images, self.size = images, size

    def __len__(self):
        return -(-len(self.images) // self.size)

    def __getitem__(self, i):
        return self.images[i * self.size : (i + 1) * self.size], np.zeros(self.size)


@once_on("tensorflow")
def test_predictions_are_the_models(fast, rng, capsys):
    model, fast = fast
    images = rng.uniform(0, 255, (7, 32, 32, 3)).astype("float32")
    expected = model.predict(images, verbose=0)
    tensor = keras.ops.convert_to_tensor(images)
    given = [images, images.astype("float64"), [images], tensor, Batches(images, 3), iter([images[:4], images[4:]])]
    for x in given:
        sizes = {} if any(x is other for other in given[4:]) else {"batch_size": 3}
        found = fast.predict(x, verbose=0, **sizes)
        assert type(found) is np.ndarray
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(fast.predict_on_batch(images), expected, atol=1e-5)
    called = fast(tensor)
    assert keras.ops.is_tensor(called)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(called), expected, atol=1e-5)
    assert capsys.readouterr().out == ""
    fast.predict(images, batch_size=3)
    assert "3/3" in capsys.readouterr().out
    # Sizes 3 and 4 go together, and a last batch of 1 with those before it.
    assert fast.runtime == {4: RUNTIME, 8: RUNTIME}


def test_datasets_of_tensorflow(fast, rng):
    import tensorflow as tf

    model, fast = fast
    images = rng.uniform(0, 255, (5, 32, 32, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((images, np.zeros(5))).batch(2)
    np.testing.assert_allclose(fast.predict(data, verbose=0), model.predict(images, verbose=0), atol=1e-5)
    with pytest.raises(ValueError, match="x must be a dataset that ends, got one that repeats"):
        fast.predict(data.repeat(), verbose=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.predict(np.zeros((2, 16, 16, 3)), verbose=0), r"x must have the shape \(batch, \*\(32, 32, 3\)\)"),
        (lambda f: f.predict(np.zeros((0, 32, 32, 3)), verbose=0), r"x must have .*, got \(0, 32, 32, 3\)"),
        (lambda f: f.predict(np.full((1, 32, 32, 3), "a"), verbose=0), "x must be real numbers, got values of type"),
        (lambda f: f.predict(iter(()), verbose=0), "x must have at least one batch of images, got none"),
        (lambda f: f.predict(iter(()), batch_size=2), "batch_size must be left out where x gives batches, got 2"),
        (lambda f: f.predict(np.zeros((1, 32, 32, 3)), batch_size=0), "batch_size must be"),
        (lambda f: f.predict(5), "x must be images, or what gives batches of them, got 5"),
        (lambda f: f.predict(np.zeros((1, 32, 32, 3)), verbose=3), "verbose must be one of 'auto', 0, 1, 2, got 3"),
        (lambda f: f(np.zeros((1, 32, 32, 3)), training=True), "training must be None or False"),
        (lambda f: f(keras.Input((32, 32, 3))), "x must be images, which another runtime can read"),
    ],
)
def test_a_bad_argument_is_named_in_one_sentence(call, message, fast):
    with pytest.raises(ValueError, match=message) as caught:
        call(fast[1])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_several_outputs_keep_their_structure(rng):
    # Onto each backend's own graph, whichever runtime reads it.
    runtime = RUNTIME if RUNTIME != "litert" else "openvino"
    image = keras.Input((32, 32, 3))
    backbone = small(include_top=False, features=["stride_4", "block_1_expand"])
    features = backbone(image)
    model = keras.Model(image, features)
    fast = keras_mnv2.accelerate(model, runtime)
    images = rng.uniform(-1, 1, (2, 32, 32, 3)).astype("float32")
    expected, found = model.predict(images, verbose=0), fast.predict(images, verbose=0)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_the_fastest_is_measured_once_for_a_size(monkeypatch):
    calls = []

    def runtime(name, seconds):
        def run(images):
            calls.append((name, len(images)))
            clock[0] += seconds[len(images)]
            return {"output": np.zeros((len(images), 5), "float32")}

        return run

    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    runs = {"openvino": runtime("openvino", {1: 2, 8: 3}), "litert": runtime("litert", {1: 1, 8: 9})}
    fast = keras_mnv2.Accelerated(small(), runs)
    for count in (1, 8, 1, 8):
        assert fast.predict_on_batch(np.zeros((count, 32, 32, 3))).shape == (count, 5)
    assert fast.runtime == {1: "litert", 8: "openvino"}
    assert calls[-2:] == [("litert", 1), ("openvino", 8)]
    assert len(calls) == 2 * (2 * 4) + 4


def test_what_is_not_installed_is_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"runtime must be one of 'auto', 'openvino', .*, got 'tensorrt'"):
        keras_mnv2.accelerate(small(), "tensorrt")
    find = importlib.util.find_spec
    gone = ("openvino", "onnxruntime", "ai_edge_litert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    with pytest.raises(ImportError, match=r'got none of openvino, .*: pip install "keras_mnv2\[openvino\]"'):
        keras_mnv2.accelerate(small())
    with pytest.raises(ImportError, match=r'pip install "keras_mnv2\[litert\]"'):
        keras_mnv2.accelerate(small(), "litert")
