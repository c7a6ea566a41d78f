import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.layers import ConvNormActivation, InvertedResidual, ScaleShift
from tests.conftest import ONCE, marks, once
from tests.helpers import double_precision, note, randomise, relative_difference

SIZE = (32, 32, 3)
FEW = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)]


@pytest.fixture(autouse=True)
def _exact(request):
    """In float64, where only Keras's own float32 steps round: its epsilon, its batch norm in a head."""
    if "in_float32" in request.node.name:
        yield
    else:
        with double_precision():
            yield


def small(**arguments):
    common = {"input_shape": SIZE, "alpha": 0.35, "weights": None, "classes": 5, "inverted_residual_setting": FEW}
    return keras_mnv2.MobileNetV2(**{**common, **arguments})


def outputs(model, images):
    found = model.predict(images, verbose=0)
    return list(found.values()) if isinstance(found, dict) else [found]


def folded(model, rng, low=-1, high=1):
    """The folded model, checked: no batch norm, the same outputs, and the weights of `model` kept."""
    images = rng.uniform(low, high, (3, *(n or 40 for n in model.inputs[0].shape[1:])))
    randomise(model, rng, images)
    before = model.get_weights()
    result = keras_mnv2.fold_batch_norm(model)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))
    assert not [w.path for w in result.weights if "moving" in w.path or "gamma" in w.path]
    for a, b in zip(outputs(result, images), outputs(model, images), strict=True):
        assert relative_difference(a, b) <= 1e-5
    return result


def names_without_norms(model):
    return [layer.name for layer in model.layers if not isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize("block", [None, pytest.param(InvertedResidual, marks=ONCE)])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"classifier_activation": None}, marks=ONCE),
        {"include_top": False, "features": True, "input_shape": (None, None, 3)},
        pytest.param(
            {"include_top": False, "pooling": "max", "padding": "symmetric", "norm_epsilon": 1e-5}, marks=ONCE
        ),
        pytest.param({"stochastic_depth": 0.2, "norm_layer": "sync_batch_norm", "output_stride": 8}, marks=ONCE),
        pytest.param(
            {"norm_layer": keras.layers.BatchNormalization(scale=False, epsilon=0.01), "activation": "silu"},
            marks=marks("tensorflow"),
        ),
        pytest.param({"norm_layer": keras.layers.BatchNormalization(center=False)}, marks=ONCE),
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_a_folded_model_gives_the_same_outputs(arguments, block, rng):
    model = small(**arguments, block=block)
    result = folded(model, rng)
    assert [layer.name for layer in result.layers] == names_without_norms(model)
    assert result.name == model.name
    assert not result.non_trainable_weights


@once
def test_a_folded_model_gives_the_same_outputs_in_float32(rng):
    model = small(alpha=1.0, input_shape=(96, 96, 3), classes=1000, inverted_residual_setting=None)
    images = rng.uniform(-1, 1, (16, 96, 96, 3)).astype("float32")
    randomise(model, rng, images)
    found, expected = (m.predict(images, verbose=0) for m in (keras_mnv2.fold_batch_norm(model), model))
    difference = relative_difference(found, expected)
    note("folding in float32: largest relative difference", difference)
    assert difference <= 1e-5


def compact_channels_first():
    image = keras.Input((16, 9, 9))
    x = InvertedResidual(16, data_format="channels_first")(image)
    return keras.Model(image, ConvNormActivation(8, data_format="channels_first")(x))


def open_channels_first():
    return small(input_shape=(3, 32, 32), data_format="channels_first", include_top=False)


@once
@pytest.mark.parametrize("make", [open_channels_first, compact_channels_first])
def test_channels_first_is_folded_in_float32(make, rng):
    model = make()
    images = rng.normal(size=(2, *model.input_shape[1:])).astype("float32")
    if keras.backend.backend() == "tensorflow":
        # Keras's batch norm of channels-first images in training has no CPU kernel to calibrate with.
        for weight in model.weights:
            if "moving" in weight.path:
                weight.assign(rng.uniform(0.5, 2, weight.shape))
    else:
        randomise(model, rng, images)
    result = keras_mnv2.fold_batch_norm(model)
    assert not result.non_trainable_weights
    assert relative_difference(result.predict(images, verbose=0), model.predict(images, verbose=0)) <= 1e-5


def extended(rng):
    backbone = small(include_top=False, pooling="avg", include_preprocessing=True)
    image = keras.Input(SIZE, name="photo")
    x = keras.layers.RandomFlip()(image)
    x = backbone(x)
    x = keras.layers.BatchNormalization(name="head_norm")(x)
    x = keras.layers.Dense(16, "gelu")(x * 2.0)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(image, {"label": keras.layers.Dense(3, "softmax", name="label")(x), "vector": x})


@once
def test_a_users_head_and_a_nested_backbone_are_folded(rng):
    model = extended(rng)
    result = folded(model, rng, 0, 255)
    assert type(result.get_layer("head_norm")) is ScaleShift
    assert [t.shape for t in result.outputs] == [t.shape for t in model.outputs]


def test_a_sequential_model_is_folded(rng):
    scaling = keras.layers.Normalization()
    scaling.adapt(rng.normal(3, 2, (8, *SIZE)))
    head = [keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input(SIZE), scaling, small(include_top=False, pooling="avg"), *head])
    assert [layer.name for layer in folded(model, rng).layers] == [layer.name for layer in model.layers]


@once
def test_a_folded_model_is_saved_and_trained_like_any_other(rng, tmp_path):
    result = folded(extended(rng), rng, 0, 255)
    images = rng.uniform(0, 255, (4, *SIZE))
    result.save(tmp_path / "folded.keras")
    again = keras.models.load_model(tmp_path / "folded.keras")
    for a, b in zip(outputs(again, images), outputs(result, images), strict=True):
        assert np.array_equal(a, b)
    again.compile("sgd", {"label": "sparse_categorical_crossentropy"})
    before = again.get_weights()
    again.fit(images, {"label": np.array([0, 1, 2, 0])}, verbose=0)
    changed = [not np.array_equal(a, b) for a, b in zip(before, again.get_weights(), strict=True)]
    assert sum(changed) > len(changed) / 2


@once
@pytest.mark.parametrize("block", [None, InvertedResidual])
def test_a_fine_tuned_model_with_frozen_blocks_stays_so(block, rng):
    model = small(dropout=0, block=block)
    last = "block_1_project" if block is None else "block_1"
    for layer in model.layers[1 : 1 + [layer.name for layer in model.layers].index(last)]:
        layer.trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(rng.normal(size=(8, *SIZE)), np.arange(8) % 5, batch_size=4, verbose=0)
    result = folded(model, rng)
    assert result.compiled
    assert [layer.name for layer in result.layers] == names_without_norms(model)
    for layer in result.layers[1:]:
        assert layer.trainable == model.get_layer(layer.name).trainable
    assert not result.get_layer(last).trainable
    frozen = result.get_layer(last).get_weights()
    result.fit(rng.normal(size=(8, *SIZE)), np.arange(8) % 5, batch_size=4, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(result.get_layer(last).get_weights(), frozen, strict=True))


@once
def test_a_folded_model_folds_to_itself_and_other_norms_stay(rng):
    for model in (keras_mnv2.fold_batch_norm(small()), small(norm_layer="group_norm")):
        images = rng.normal(size=(2, *SIZE))
        again = keras_mnv2.fold_batch_norm(model)
        assert np.array_equal(outputs(again, images)[0], outputs(model, images)[0])
        assert [w.shape for w in again.weights] == [w.shape for w in model.weights]


class Wrapper(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization()

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x)


def test_what_cannot_be_folded_is_named(rng):
    model = keras.Sequential([keras.Input(SIZE), Wrapper(name="mine")])
    with pytest.raises(ValueError, match="'mine' of type Wrapper"):
        keras_mnv2.fold_batch_norm(model)
    for wrong in (None, "model.keras", keras.Sequential([keras.layers.Dense(2)]), keras.layers.Dense(2)):
        with pytest.raises(ValueError, match="model must be a built functional or sequential"):
            keras_mnv2.fold_batch_norm(wrong)
