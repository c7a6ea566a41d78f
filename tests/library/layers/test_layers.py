import keras
import numpy as np
import pytest

from keras_mnv2.layers import ConvNormActivation, InvertedResidual
from tests.helpers import randomise, relative_difference


def image(rng, channels=16, size=8):
    return keras.ops.convert_to_tensor(rng.normal(size=(2, size, size, channels)).astype("float32"))


def numbers(x):
    return keras.ops.convert_to_numpy(x)


@pytest.mark.parametrize("norm_layer", ["batch_norm", "sync_batch_norm", "group_norm", None])
@pytest.mark.parametrize("layer_class", [ConvNormActivation, InvertedResidual])
def test_a_layer_comes_back_from_its_config(layer_class, norm_layer, rng):
    layer = layer_class(16, stride=1, norm_layer=norm_layer, activation="relu", padding="symmetric", name="a")
    x = image(rng)
    expected = layer(x)
    copy = layer_class.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    copy(x)
    copy.set_weights(layer.get_weights())
    assert np.array_equal(numbers(copy(x)), numbers(expected))


def test_a_norm_layer_of_the_callers_is_copied_everywhere(rng):
    layer = InvertedResidual(16, norm_layer=keras.layers.LayerNormalization(epsilon=0.5))
    layer(image(rng))
    norms = [conv.norm for conv in (layer.expand, layer.depthwise, layer.project)]
    assert [type(norm) for norm in norms] == [keras.layers.LayerNormalization] * 3
    assert {norm.epsilon for norm in norms} == {0.5}
    assert len(set(map(id, norms))) == 3
    again = InvertedResidual.from_config(layer.get_config())
    again(image(rng))
    assert again.project.norm.epsilon == 0.5


@pytest.mark.parametrize("layer_class", [keras.layers.LayerNormalization, keras.layers.BatchNormalization])
def test_a_norm_layer_may_be_a_class(layer_class, rng):
    layer = ConvNormActivation(8, norm_layer=layer_class)
    layer(image(rng), training=True)
    assert type(layer.norm) is layer_class


def test_only_a_layer_without_norm_has_a_bias(rng):
    for norm_layer, names in (("batch_norm", {"kernel", "gamma", "beta"}), (None, {"kernel", "bias"})):
        layer = ConvNormActivation(8, norm_layer=norm_layer)
        layer(image(rng))
        assert {v.name for v in layer.trainable_variables} == names


@pytest.mark.parametrize(
    ("filters", "stride", "shortcut", "residual"),
    [
        (16, 1, "bottleneck", True),
        (16, 2, "bottleneck", False),
        (24, 1, "bottleneck", False),
        (16, 1, "expansion", True),
        (16, 1, None, False),
    ],
)
def test_the_shortcut_is_where_stride_is_1_and_channels_agree(filters, stride, shortcut, residual, rng):
    layer = InvertedResidual(filters, stride=stride, shortcut=shortcut)
    x = image(rng)
    layer(x)
    randomise(layer, rng, x)
    expanded = layer.expand(x)
    y = layer.depthwise(expanded)
    if residual and shortcut == "expansion":
        y = y + expanded
    y = layer.project(y)
    if residual and shortcut == "bottleneck":
        y = y + x
    assert layer.residual is residual
    assert relative_difference(numbers(layer(x)), numbers(y)) <= 1e-6


def test_expansion_is_absent_at_ratio_1_and_rounded_otherwise(rng):
    plain, wide = InvertedResidual(16, expand_ratio=1), InvertedResidual(16, expand_ratio=2.6)
    plain(image(rng)), wide(image(rng))
    assert plain.expand is None
    assert wide.expand.filters == 42  # round(16 * 2.6)


def test_the_bottleneck_is_linear_unless_asked(rng):
    x = image(rng)
    linear, bent = InvertedResidual(24), InvertedResidual(24, linear_bottleneck=False)
    assert numbers(linear(x)).min() < 0
    assert numbers(bent(x)).min() == 0


def test_return_expansion_gives_the_wide_input_too(rng):
    x = image(rng)
    layer = InvertedResidual(24, stride=2, return_expansion=True)
    out, expanded = layer(x)
    assert tuple(out.shape) == (2, 4, 4, 24)
    assert tuple(expanded.shape) == (2, 8, 8, 96)
    assert np.array_equal(numbers(expanded), numbers(layer.expand(x)))
    symbolic = layer(keras.Input((8, 8, 16)))
    assert [s.shape for s in symbolic] == [(None, 4, 4, 24), (None, 8, 8, 96)]


def test_inference_equals_the_unfolded_computation(rng):
    layer = ConvNormActivation(8, stride=2)
    x = image(rng)
    layer(x)
    randomise(layer, rng, x)
    plain = keras.ops.conv(x, layer.kernel, strides=2, padding="same")
    expected = keras.ops.relu6(layer.norm(plain, training=False))
    assert relative_difference(numbers(layer(x)), numbers(expected)) <= 1e-5


def test_training_equals_keras_batch_norm_and_moves_its_statistics(rng):
    x = image(rng)
    layer = ConvNormActivation(8, norm_momentum=0.75)
    layer(x)
    norm = keras.layers.BatchNormalization(momentum=0.75, epsilon=1e-3)
    plain = keras.ops.conv(x, layer.kernel, padding="same")
    expected = keras.ops.relu6(norm(plain, training=True))
    assert relative_difference(numbers(layer(x, training=True)), numbers(expected)) <= 1e-5
    for found, reference in (
        (layer.norm.moving_mean, norm.moving_mean),
        (layer.norm.moving_variance, norm.moving_variance),
    ):
        assert relative_difference(numbers(found), numbers(reference)) <= 1e-5


def test_a_frozen_layer_keeps_its_statistics_in_training(rng):
    layer = InvertedResidual(16)
    x = image(rng)
    before = numbers(layer(x))
    layer.trainable = False
    statistics = layer.get_weights()
    assert relative_difference(numbers(layer(x, training=True)), before) <= 1e-6
    for a, b in zip(layer.get_weights(), statistics, strict=True):
        assert np.array_equal(a, b)


def test_stochastic_depth_leaves_out_whole_images_in_training_only(rng):
    layer = InvertedResidual(16, stochastic_depth=0.5, norm_layer=None)
    x = keras.ops.convert_to_tensor(rng.normal(size=(64, 4, 4, 16)).astype("float32"))
    branch = numbers(layer(x)) - numbers(x)
    change = numbers(layer(x, training=True)) - numbers(x)
    kept = np.abs(change).max((1, 2, 3)) > 0
    assert 10 < kept.sum() < 54
    assert np.allclose(change[kept], 2 * branch[kept], atol=1e-4)


@pytest.mark.parametrize(("groups", "fan_out"), [(1, 9 * 64), (64, 9 * 64)])
def test_initial_kernels_are_he_normal_by_fan_out(groups, fan_out):
    layer = ConvNormActivation(64, groups=groups)
    layer.build((None, 8, 8, 64))
    kernel = numbers(layer.kernel)
    expected = np.sqrt(2 / fan_out)
    assert abs(kernel.std() / expected - 1) < 4 / np.sqrt(2 * kernel.size)
    assert abs(kernel.mean()) < 4 * expected / np.sqrt(kernel.size)


@pytest.mark.parametrize(
    ("layer_class", "argument", "value"),
    [
        (ConvNormActivation, "filters", 0),
        (ConvNormActivation, "kernel_size", 2.5),
        (ConvNormActivation, "stride", 3),
        (ConvNormActivation, "groups", 3),
        (ConvNormActivation, "padding", "full"),
        (ConvNormActivation, "dilation_rate", 0),
        (ConvNormActivation, "activation", "relu7"),
        (ConvNormActivation, "norm_layer", "instance_norm"),
        (ConvNormActivation, "norm_momentum", 1.0),
        (ConvNormActivation, "norm_epsilon", 0.0),
        (ConvNormActivation, "data_format", "NHWC"),
        (InvertedResidual, "expand_ratio", 0),
        (InvertedResidual, "padding", "valid"),
        (InvertedResidual, "shortcut", "wide"),
        (InvertedResidual, "stochastic_depth", 1.0),
    ],
)
def test_a_bad_argument_is_named_with_its_value(layer_class, argument, value):
    arguments = {"filters": 8, argument: value}
    with pytest.raises(ValueError, match=argument) as error:
        layer_class(**arguments)
    assert repr(value) in str(error.value)


def test_groups_must_fit_the_input(rng):
    with pytest.raises(ValueError, match="groups"):
        ConvNormActivation(8, groups=8)(image(rng, channels=16))


def test_stride_and_dilation_exclude_each_other():
    with pytest.raises(ValueError, match="dilation_rate"):
        ConvNormActivation(8, stride=2, dilation_rate=2)


@pytest.mark.parametrize("layer_class", [ConvNormActivation, InvertedResidual])
def test_a_frozen_layer_that_was_loaded_stays_frozen(layer_class, rng):
    x = image(rng)
    layer = layer_class(16)
    layer.trainable = False
    copy = layer_class.from_config(layer.get_config())
    copy(x)
    before = copy.get_weights()
    copy(x, training=True)
    assert all(np.array_equal(a, b) for a, b in zip(copy.get_weights(), before, strict=True))
    copy.trainable = True
    copy(x, training=True)
    assert not all(np.array_equal(a, b) for a, b in zip(copy.get_weights(), before, strict=True))


def test_a_batch_norm_over_another_axis_is_computed_as_it_stands(rng):
    layer = ConvNormActivation(8, norm_layer=keras.layers.BatchNormalization(axis=1))
    x = image(rng)
    layer(x)
    layer.norm.moving_variance.assign(rng.uniform(0.5, 2, 8))
    expected = keras.ops.relu6(layer.norm(keras.ops.conv(x, layer.kernel, padding="same")))
    assert relative_difference(numbers(layer(x)), numbers(expected)) <= 1e-6
