"""What scripts for `keras.applications.MobileNetV2` do to its layers, done to both models."""

import inspect
import re

import keras
import numpy as np
import pytest

import keras_mnv2
from tests import twins
from tests.conftest import ONCE, once
from tests.helpers import note, relative_difference

# XLA compiles the training steps of both models for half a minute.
slow_on_jax = pytest.mark.slow if keras.backend.backend() == "jax" else lambda test: test
WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)
NORM = keras.layers.BatchNormalization
NAMED = ("Conv1", "block_2_add", "block_13_expand_relu", "block_16_project", "Conv_1", "out_relu")


def both_without_weights(**arguments):
    """Both models with variables that are not initialised, which takes a tenth of the time."""
    with keras.StatelessScope(initialize_variables=False):
        return twins.theirs(**arguments), twins.ours(**arguments)


def described(layer):
    # Keras counts the layers that it names itself.
    name = re.sub(r"(input_layer|pooling2d)_\d+$", r"\1", layer.name)
    return name, type(layer).__name__, layer.output.shape, [(v.path, v.shape, v.trainable) for v in layer.weights]


@once
@pytest.mark.parametrize("alpha", WIDTHS)
def test_names_classes_shapes_and_weights_in_order(alpha):
    for top, count in ((True, 156), (False, 154)):
        source, model = both_without_weights(alpha=alpha, include_top=top)
        assert len(model.layers) == len(source.layers)
        assert len(model.layers) == count
        for expected, found in zip(source.layers, model.layers, strict=True):
            assert described(found) == described(expected)
            assert isinstance(found, type(expected))
        assert [v.path for v in model.weights] == [v.path for v in source.weights]
        assert model.name == source.name


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_pooled_models_layers(pooling):
    source, model = both_without_weights(include_top=False, pooling=pooling)
    assert [described(layer) for layer in model.layers] == [described(layer) for layer in source.layers]


def test_the_dropout_is_the_one_addition():
    with keras.StatelessScope(initialize_variables=False):
        names = [layer.name for layer in keras_mnv2.MobileNetV2(twins.SIZE, weights=None).layers]
        expected = [layer.name for layer in twins.theirs(alpha=1.0).layers]
    names = [name for name in names if not name.startswith("dropout")]
    assert names[1:-2] == expected[1:-2]
    assert len(names) == len(expected)


def test_the_module_is_mirrored():
    ours, theirs = keras_mnv2.applications.mobilenet_v2, keras.applications.mobilenet_v2
    assert keras_mnv2.applications.MobileNetV2 is ours.MobileNetV2
    for name in ("MobileNetV2", "preprocess_input", "decode_predictions"):
        expected = inspect.signature(getattr(theirs, name)).parameters
        found = inspect.signature(getattr(ours, name)).parameters
        assert list(found)[: len(expected)] == list(expected)
        for parameter in expected.values():
            if name == "MobileNetV2" and parameter.name == "name":
                continue  # Theirs is made from the arguments where it is None.
            assert found[parameter.name].default == parameter.default, f"{name}({parameter.name})"
        assert all(found[extra].default is None for extra in list(found)[len(expected) :])


def freeze_norms(model):
    for layer in model.layers:
        if isinstance(layer, NORM):
            layer.trainable = False


def freeze_first(model):
    for layer in model.layers[:100]:
        layer.trainable = False


def freeze_but_last(model):
    for layer in model.layers[:-30]:
        layer.trainable = False


def train_one_block(model):
    for layer in model.layers:
        layer.trainable = "block_10" in layer.name and not isinstance(layer, NORM)


def freeze_up_to_a_name(model):
    train = False
    for layer in model.layers:
        train = train or layer.name == "block_13_expand"
        layer.trainable = train


@once
@pytest.mark.parametrize(
    ("script", "top", "trainable"),
    [
        (freeze_norms, True, 54),
        (freeze_first, False, None),
        (freeze_but_last, True, None),
        (train_one_block, True, 3),
        (freeze_up_to_a_name, True, None),
    ],
)
def test_a_freezing_script_leaves_the_same_to_train(script, top, trainable):
    source, model = both_without_weights(include_top=top)
    for one in (source, model):
        script(one)
    expected = [v.path for v in source.trainable_weights]
    assert [v.path for v in model.trainable_weights] == expected
    assert 0 < len(expected) < len(source.weights)
    assert trainable in (None, len(expected))
    assert [layer.trainable for layer in model.layers] == [layer.trainable for layer in source.layers]


@slow_on_jax
def test_frozen_norms_keep_their_statistics_in_fit():
    models = twins.pair()
    x, y = twins.batch()
    losses, counts = [], []
    for model in models:
        freeze_norms(model)
    twins.compile_alike(models, 1e-3)
    for model in models:
        before = twins.statistics(model)
        losses.append(twins.losses_of(model, x, y))
        counts.append((len(before), twins.moved(before, twins.statistics(model)), len(model.trainable_weights)))
    assert counts == [(104, 0, 54)] * 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][0] != losses[0][1]


@once
def test_norms_that_train_move_their_statistics_as_far():
    models = twins.pair()
    x, y = twins.batch()
    # A rounding moves an activation across a kink of ReLU6: the gradients of both are some per cent off exact ones.
    twins.compile_alike(models, 1e-6)
    losses, steps = [], []
    for model in models:
        before = twins.statistics(model)
        losses.append(twins.losses_of(model, x, y))
        after = twins.statistics(model)
        assert twins.moved(before, after) == 104
        steps.append(np.concatenate([b - a for a, b in zip(before, after, strict=True)]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert relative_difference(steps[1], steps[0]) <= 1e-3
    assert np.linalg.norm(steps[0]) < 0.01 * np.linalg.norm(np.concatenate(before))


def regularise(model):
    """Sets a regulariser on each layer that has one, and gives the model that its configuration makes."""
    count = 0
    for layer in model.layers:
        for name in ("kernel_regularizer", "depthwise_regularizer"):
            if hasattr(layer, name):
                setattr(layer, name, keras.regularizers.L2(1e-3))
                count += 1
    again = keras.models.model_from_json(model.to_json())
    again.set_weights(model.get_weights())
    return again, count


@once
def test_regularisers_that_are_set_on_layers_count():
    x, y = twins.batch()
    found = [regularise(model) for model in twins.pair()]
    models = [model for model, _ in found]
    counts = [count for _, count in found]
    assert counts[0] == counts[1] == 53
    assert [len(model.losses) for model in models] == [53, 53]
    assert type(models[1]) is type(twins.ours())
    twins.compile_alike(models)
    expected, loss = (model.evaluate(x, y, verbose=0) for model in models)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert float(keras.ops.convert_to_numpy(sum(models[1].losses))) > 0.01 * loss


@once
def test_layers_are_found_by_name_and_what_they_compute():
    source, model = twins.pair()
    x, _ = twins.batch(2)
    largest = 0.0
    expected = keras.Model(source.input, [source.get_layer(name).output for name in NAMED]).predict(x, verbose=0)
    found = keras.Model(model.input, [model.get_layer(name).output for name in NAMED]).predict(x, verbose=0)
    for name, a, b in zip(NAMED, found, expected, strict=True):
        largest = max(largest, relative_difference(a, b))
        assert largest <= 1e-5, name
    last = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)][-1]
    assert last.name == "Conv_1"
    whole = model.predict(x, verbose=0)
    difference = relative_difference(whole, source.predict(x, verbose=0))
    note("sub-models beside keras.applications: largest relative difference", max(largest, difference))
    assert difference <= 1e-5
    # From a tensor in the middle to the end, and one layer alone.
    for one, outputs in ((source, expected), (model, found)):
        rest = keras.Model(one.get_layer("block_16_project").output, one.output)
        assert relative_difference(rest.predict(outputs[3], verbose=0), whole) <= 1e-5
        alone = one.get_layer("Conv_1")(one.get_layer("block_16_project_BN")(outputs[3]))
        assert relative_difference(keras.ops.convert_to_numpy(alone), outputs[4]) <= 1e-5


def frozen_pair():
    models = twins.pair()
    for model in models:
        freeze_norms(model)
    twins.compile_alike(models, 1e-3)
    return models


@once
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_frozen_norms_stay_frozen_in_a_file(suffix, tmp_path):
    x, _ = twins.batch()
    for number, model in enumerate(frozen_pair()):
        path = tmp_path / f"{number}{suffix}"
        model.save(path)
        again = keras.models.load_model(path)
        assert type(again) is type(model)
        assert (len(again.trainable_weights), len(again.weights)) == (54, 262)
        assert all(np.array_equal(a, b) for a, b in zip(again.get_weights(), model.get_weights(), strict=True))
    # The last, ours.
    assert relative_difference(again.predict(x, verbose=0), model.predict(x, verbose=0)) <= 1e-6
    if suffix == ".keras":
        before = twins.statistics(again)
        again(x, training=True)
        assert twins.moved(before, twins.statistics(again)) == 0


@once
def test_frozen_norms_stay_frozen_in_copies():
    for model in frozen_pair():
        clone = keras.models.clone_model(model)
        assert len(clone.trainable_weights) == 54
        assert [layer.trainable for layer in clone.layers] == [layer.trainable for layer in model.layers]
        # One range and no statistics: kernels, and the classifier's two.
        assert len(keras_mnv2.quantize_aware(model).trainable_weights) == 54
    # Folding leaves no norms: kernels and biases of the convolutions that train.
    _, model = twins.pair()
    freeze_first(model)
    folded = keras_mnv2.fold_batch_norm(model)
    names = {layer.name for layer in folded.layers if layer.trainable_weights}
    assert names == {layer.name for layer in model.layers if layer.trainable_weights and not isinstance(layer, NORM)}


@once
def test_files_of_keras_applications_weights(tmp_path):
    source, model = twins.pair()
    expected = source.get_weights()
    source.save_weights(tmp_path / "new.weights.h5")
    source.save(tmp_path / "whole.h5")
    keras_mnv2.save_weights(model, tmp_path / "legacy.h5", layout="keras")
    # And the other way round.
    model.save_weights(tmp_path / "ours.weights.h5")
    others = twins.theirs(), twins.ours()
    for name in ("new.weights.h5", "whole.h5", "legacy.h5", "ours.weights.h5"):
        for other in others:
            other.set_weights([0 * weight for weight in expected])
            other.load_weights(tmp_path / name)
            assert all(np.array_equal(a, b) for a, b in zip(other.get_weights(), expected, strict=True)), name


def test_preprocessing_in_a_pipeline_of_tensorflow(rng):
    import tensorflow as tf

    x = rng.integers(0, 256, (4, 8, 8, 3))
    for dtype in ("uint8", "int64", "float32"):
        images = x.astype(dtype)
        data = tf.data.Dataset.from_tensor_slices((images, np.arange(4))).batch(2)
        found = data.map(lambda image, label: (keras_mnv2.preprocess_input(image), label))
        found = np.concatenate([image.numpy() for image, _ in found])
        expected = keras.applications.mobilenet_v2.preprocess_input(images.astype("float32"))
        assert found.dtype == "float32"
        assert np.abs(found - expected).max() <= 1e-6


def test_integers_of_numpy_are_integers():
    labels = np.array([0, 2, 1], "int64")
    with keras.StatelessScope(initialize_variables=False):
        for build in (keras_mnv2.applications.MobileNetV2, keras_mnv2.MobileNetV2):
            sides = np.int64(64), np.int32(64), np.int64(3)
            model = build(sides, np.float32(0.5), weights=None, classes=labels.max() + 1)
            assert (model.input_shape, model.output_shape) == ((None, *twins.SIZE), (None, 3))


def head(x):
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dense(twins.CLASSES, kernel_initializer=keras.initializers.GlorotUniform(seed=0))(x)


def nested(backbone):
    image = keras.Input(twins.SIZE)
    x = keras.applications.mobilenet_v2.preprocess_input(image)
    return keras.Model(image, head(backbone(x, training=False)))


def flattened(backbone):
    return keras.Model(backbone.input, head(backbone.output))


@pytest.mark.parametrize("around", [nested, pytest.param(flattened, marks=ONCE)])
def test_transfer_models_around_it(around):
    backbones = twins.pair(include_top=False)
    source, model = (around(backbone) for backbone in backbones)
    model.set_weights(source.get_weights())
    x, _ = twins.batch(4)
    x = (x + 1) * 127.5 if around is nested else x
    assert relative_difference(model.predict(x, verbose=0), source.predict(x, verbose=0)) <= 1e-5
    for backbone in backbones:
        backbone.trainable = False
    assert len(model.trainable_weights) == len(source.trainable_weights) == 2
    for backbone in backbones:
        backbone.trainable = True
        freeze_first(backbone)
    assert len(model.trainable_weights) == len(source.trainable_weights) == 56
    again = keras.models.model_from_json(model.to_json())
    assert len(again.trainable_weights) == 56
    flags = [[layer.trainable for layer in twins.layers_of(one) if layer.weights] for one in (again, model, source)]
    assert flags[0] == flags[1] == flags[2]
