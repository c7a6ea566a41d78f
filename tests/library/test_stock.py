"""Models of Keras's own classes: taken over from keras.applications, and written for those without this package."""

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.layers import InvertedResidual
from keras_mnv2.stock import to_stock
from tests import twins
from tests.conftest import ONCE, marks, once
from tests.helpers import randomise, relative_difference, run_python


def images(rng):
    return rng.uniform(-1, 1, (4, *twins.SIZE)).astype("float32")


def transfer(form):
    base = twins.theirs(include_top=False)
    twins.enliven(base)
    if form == "sequential":
        return keras.Sequential([base, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, "softmax")])
    x = keras.Input(twins.SIZE) if form == "nested" else base.input
    y = base(x) if form == "nested" else base.output
    return keras.Model(x, keras.layers.Dense(3, "softmax")(keras.layers.GlobalAveragePooling2D()(y)))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("nested", marks=marks("tensorflow")),
        *(pytest.param(form, marks=ONCE) for form in ("flattened", "sequential")),
    ],
)
def test_a_transfer_model_is_taken_over(form, rng):
    source = transfer(form)
    frozen = source.layers[1] if form == "nested" else source.layers[0] if form == "sequential" else None
    if frozen is not None:
        frozen.trainable = False
    source.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model = keras_mnv2.from_keras(source)
    x = images(rng)
    assert relative_difference(model.predict(x, verbose=0), source.predict(x, verbose=0)) <= 1e-5
    assert [layer.name for layer in twins.layers_of(model)] == [layer.name for layer in twins.layers_of(source)]
    assert len(model.trainable_weights) == len(source.trainable_weights) == (158 if frozen is None else 2)
    assert type(model.optimizer) is type(source.optimizer)
    losses = [float(one.train_on_batch(x, np.array([0, 1, 2, 0]))[0]) for one in (source, model)]
    assert abs(losses[0] - losses[1]) <= 1e-4


def test_only_a_mobilenet_is_taken_over():
    with pytest.raises(ValueError, match=r"model must have the layers of keras\.applications\.MobileNetV2"):
        keras_mnv2.from_keras(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"padding": "symmetric", "include_preprocessing": True}, marks=marks("tensorflow")),
        pytest.param({"norm_layer": "group_norm"}, marks=ONCE),
        pytest.param({"block": InvertedResidual, "stochastic_depth": 0.2}, marks=ONCE),
    ],
    ids="-".join,
)
def test_a_model_in_keras_own_classes_computes_the_same(arguments, rng):
    model = keras_mnv2.MobileNetV2(twins.SIZE, 0.35, weights=None, classes=3, **arguments)
    x = rng.uniform(0, 255, (4, *twins.SIZE)) if "include_preprocessing" in arguments else images(rng)
    randomise(model, rng, x)
    keras_mnv2.freeze(model, before="block_15", verbose=False)
    stock = to_stock(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in stock.layers)
    assert len(stock.trainable_weights) == len(model.trainable_weights)
    assert relative_difference(stock.predict(x, verbose=0), model.predict(x, verbose=0)) <= 2e-5


LOADS = """
import sys
sys.modules["keras_mnv2"] = None
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(x, verbose=0))
model.compile("sgd", "sparse_categorical_crossentropy")
assert np.isfinite(model.train_on_batch(x, np.zeros(len(x))))
"""


@once
def test_the_file_loads_without_this_package_on_another_backend(tmp_path, rng):
    rows = [(1, 16, 1, 1), (6, 24, 2, 2)]
    model = keras_mnv2.MobileNetV2(twins.SIZE, 0.35, weights=None, classes=3, inverted_residual_setting=rows)
    randomise(model, rng)
    report = keras_mnv2.export(model, tmp_path / "model.keras", format="keras", verbose=False)
    assert report.largest_difference <= 1e-5
    np.save(tmp_path / "x.npy", images(rng))
    run_python(LOADS, "tensorflow", tmp_path / "model.keras", tmp_path / "x.npy", tmp_path / "y.npy")
    found, expected = np.load(tmp_path / "y.npy"), model.predict(np.load(tmp_path / "x.npy"), verbose=0)
    assert relative_difference(found, expected) <= 1e-4


@once
def test_a_quantised_model_has_no_such_form(tmp_path):
    quantised = keras_mnv2.quantize_aware(twins.ours())
    with pytest.raises(ValueError, match="model must not be quantised for format='keras'"):
        keras_mnv2.export(quantised, tmp_path / "model.keras", format="keras")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [pytest.param(".h5", marks=ONCE), pytest.param(".keras", marks=pytest.mark.slow)])
def test_a_transfer_model_is_taken_over_from_a_file(suffix, rng, tmp_path):
    source = transfer("nested")
    source.layers[1].trainable = False
    source.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    source.save(tmp_path / f"theirs{suffix}")
    model = keras_mnv2.from_keras(keras.models.load_model(tmp_path / f"theirs{suffix}"))
    assert model.compiled
    assert len(model.trainable_weights) == 2
    x = images(rng)
    expected = source.predict(x, verbose=0)
    assert relative_difference(model.predict(x, verbose=0), expected) <= 1e-5
    # And written and read again, as a model of this package.
    model.save(tmp_path / f"ours{suffix}")
    again = keras.models.load_model(tmp_path / f"ours{suffix}")
    assert [type(layer) for layer in twins.layers_of(again)] == [type(layer) for layer in twins.layers_of(model)]
    assert len(again.trainable_weights) == 2
    assert relative_difference(again.predict(x, verbose=0), expected) <= 1e-5


def test_some_layers_that_do_not_train_stay_so_when_taken_over():
    source = transfer("flattened")
    keras_mnv2.freeze(source, before="block_12", verbose=False)
    source.get_layer("Conv_1").trainable = False
    model = keras_mnv2.from_keras(source)
    assert [layer.trainable for layer in model.layers[1:]] == [layer.trainable for layer in source.layers[1:]]
    assert [v.path for v in model.trainable_weights] == [v.path for v in source.trainable_weights]


FILES = {
    "compact": {"block": InvertedResidual, "stochastic_depth": 0.2, "include_preprocessing": True},
    "symmetric": {"padding": "symmetric", "norm_epsilon": 1e-5, "activation": "silu"},
    "grouped": {"norm_layer": "group_norm", "weights": None, "include_top": False, "pooling": "avg"},
}
LOAD_ALL = """
import sys
from pathlib import Path
sys.modules["keras_mnv2"] = None
import keras, numpy as np
for path in sorted(Path(sys.argv[1]).glob("*.keras")):
    model = keras.models.load_model(path)
    found = model.predict(np.load(path.with_suffix(".x.npy")), verbose=0)
    expected = np.load(path.with_suffix(".y.npy"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), path
"""


@pytest.mark.slow
def test_files_of_other_forms_load_without_this_package(tmp_path, rng):
    for name, arguments in FILES.items():
        model = keras_mnv2.MobileNetV2(twins.SIZE, 0.35, **{"weights": None, "classes": 3, **arguments})
        x = rng.uniform(0, 255, (2, *twins.SIZE)).astype("float32") if name == "compact" else images(rng)
        randomise(model, rng, x)
        keras_mnv2.export(model, tmp_path / f"{name}.keras", format="keras", verbose=False)
        np.save(tmp_path / f"{name}.x.npy", x)
        np.save(tmp_path / f"{name}.y.npy", model.predict(x, verbose=0))
    run_python(LOAD_ALL, "tensorflow", tmp_path)
