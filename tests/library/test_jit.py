"""`compile(..., jit_compile=True)` on PyTorch: the same numbers, and what is random stays so."""

import contextlib

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.helpers import relative_difference

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends compile in each test")

ROWS = [[1, 8, 1, 1], [6, 12, 2, 2]]


def network(**arguments):
    keras.utils.set_random_seed(0)
    return keras_mnv2.MobileNetV2((32, 32, 3), weights=None, **{"inverted_residual_setting": ROWS, **arguments})


def whole():
    return network(classes=4, dropout=0.0)


def around():
    base = network(include_top=False, pooling="avg")
    return keras.Model(base.input, keras.layers.Dense(4, activation="softmax")(base.output))


def nested():
    base = network(include_top=False, pooling="avg")
    return keras.Sequential([base, keras.layers.Dense(4, activation="softmax")])


def images(n):
    return np.random.default_rng(0).normal(size=(n, 32, 32, 3)).astype("float32"), np.arange(n) % 4


# PyTorch's compiler takes four minutes for the whole one.
@pytest.mark.slow
@pytest.mark.parametrize("build", [whole, around, nested])
def test_training_and_inference_give_what_they_give_without(build):
    # A last batch that is shorter is another compilation of each graph.
    x, y = images(8 if build is whole else 10)
    results = []
    for jit in (False, True):
        model = build()
        sgd = keras.optimizers.SGD(0.01, momentum=0.9)
        model.compile(sgd, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=jit)
        left_out = jit and build is around
        with pytest.warns(UserWarning, match="run uncompiled") if left_out else contextlib.nullcontext():
            losses = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        scores = model.evaluate(x, y, batch_size=4, verbose=0)
        found = [np.array(losses), np.array(scores), model.predict(x, batch_size=4, verbose=0)]
        results.append((found, [v.numpy() for v in model.weights]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert relative_difference(a, b) <= 1e-3
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert np.abs(a - b).max() <= 1e-3


@pytest.mark.slow
def test_dropout_differs_from_step_to_step():
    # One block: the compiler takes a minute for two.
    model = network(classes=4, dropout=0.5, inverted_residual_setting=ROWS[:1])
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", jit_compile=True)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 1.0
    x, y = images(4)
    losses = [float(model.train_on_batch(x, y)) for _ in range(3)]
    assert len(set(losses)) == 3


# Keras's, as in pyproject.toml: `pytest.warns` gives it on without the module that it came from.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_layers_that_somebody_watches_are_called():
    model, seen = whole(), []
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy", jit_compile=True)
    told = pytest.warns(UserWarning, match="jit_compile=True has no effect")
    with model.get_layer("block_1_expand").register_forward_hook(lambda *arguments: seen.append(1)), told:
        model.train_on_batch(*images(4))
    assert seen
