import functools
import inspect
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mnv2
from keras_mnv2.architecture import plan
from tests.conftest import ONCE, once, once_on
from tests.helpers import randomise, relative_difference


def small(**arguments):
    return keras_mnv2.MobileNetV2(
        **{"input_shape": (32, 32, 3), "alpha": 0.35, "weights": None, "classes": 5, **arguments}
    )


FEW = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 2)]


def images(rng, size=32, channels=3):
    return rng.uniform(-1, 1, (2, size, size, channels)).astype("float32")


def test_the_positional_arguments_are_those_of_keras_applications():
    ours = list(inspect.signature(keras_mnv2.MobileNetV2).parameters.values())
    theirs = list(inspect.signature(keras.applications.MobileNetV2).parameters.values())
    for a, b in zip(ours, theirs, strict=False):
        assert (a.name, a.kind) == (b.name, b.kind)
        # None stands for the checkpoint's, which without one is Keras's default.
        assert a.default == (None if a.name in ("alpha", "classes") else b.default)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    model = keras_mnv2.MobileNetV2(weights=None)
    assert (model.name, model.output_shape) == ("mobilenetv2_1.00_224", (None, 1000))


def last_layer(model, row):
    """The layer that gives a row's tensor, of a model of either form."""
    names = {"stem": "Conv1_relu", "head": "out_relu"}
    name = row.name if row.name != "block_0" else "expanded_conv"
    known = {layer.name for layer in model.layers}
    ends = (
        row.name,
        names.get(row.name),
        f"{name}_add",
        f"{name}_project_BN",
        f"{name}_project_norm",
        f"{name}_project",
    )
    return model.get_layer(next(end for end in ends if end in known))


@given(
    alpha=st.floats(0.1, 1.5),
    height=st.one_of(st.none(), st.integers(32, 70)),
    width=st.one_of(st.none(), st.integers(32, 70)),
    channels=st.integers(1, 5),
    setting=st.lists(
        st.tuples(st.integers(1, 4), st.integers(4, 32), st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=4
    ),
    round_nearest=st.sampled_from([1, 4, 8]),
    depth_multiplier=st.floats(0.5, 1.5),
    fix_stem_head=st.booleans(),
    stem_stride=st.sampled_from([1, 2]),
    output_stride=st.sampled_from([8, 16, 32]),
    padding=st.sampled_from(["same", "symmetric"]),
    norm_layer=st.sampled_from(["batch_norm", "group_norm", None]),
    stochastic_depth=st.floats(0, 0.9),
    block=st.sampled_from([None, keras_mnv2.layers.InvertedResidual]),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
)
def test_what_is_allowed_builds_and_has_the_shape_of_the_plan(height, width, channels, data_format, **arguments):
    of_plan = {
        name: arguments[name]
        for name in ("alpha", "round_nearest", "depth_multiplier", "fix_stem_head", "stem_stride", "output_stride")
    }
    setting = arguments.pop("setting")
    rows = plan(inverted_residual_setting=setting, in_channels=channels, **of_plan)
    shape = (height, width, channels) if data_format == "channels_last" else (channels, height, width)
    model = keras_mnv2.MobileNetV2(
        shape,
        include_top=False,
        weights=None,
        inverted_residual_setting=setting,
        data_format=data_format,
        **arguments,
    )
    sides = [None if side is None else math.ceil(side / rows[-1].output_stride) for side in (height, width)]
    last = rows[-1].channels
    expected = (None, *sides, last) if data_format == "channels_last" else (None, last, *sides)
    assert model.output_shape == expected
    for row in rows:
        assert last_layer(model, row).output.shape[-1 if data_format == "channels_last" else 1] == row.channels


FORBIDDEN = {
    "alpha": st.one_of(st.floats(max_value=0), st.just(math.nan), st.just(math.inf), st.text()),
    "input_shape": st.one_of(
        st.tuples(st.integers(-9, 31), st.integers(32, 64), st.integers(1, 4)),
        st.tuples(st.integers(32, 64), st.integers(32, 64), st.integers(-9, 0)),
        st.lists(st.integers(32, 64), max_size=5).filter(lambda shape: len(shape) != 3).map(tuple),
    ),
    "inverted_residual_setting": st.lists(
        st.lists(st.integers(1, 2), max_size=6).filter(lambda row: len(row) != 4), min_size=1, max_size=3
    ),
    "classes": st.one_of(st.integers(max_value=0), st.floats(), st.booleans()),
    "dropout": st.one_of(st.floats(max_value=-0.01), st.floats(min_value=1)),
    "stochastic_depth": st.one_of(st.floats(max_value=-0.01), st.floats(min_value=1)),
    "norm_momentum": st.one_of(st.floats(max_value=-0.01), st.floats(min_value=1)),
    "norm_epsilon": st.floats(max_value=0),
    "round_nearest": st.one_of(st.integers(max_value=0), st.floats()),
    "depth_multiplier": st.floats(max_value=0),
    "stem_stride": st.integers().filter(lambda stride: stride not in (1, 2)),
    "output_stride": st.integers().filter(lambda stride: stride not in (8, 16, 32)),
    "padding": st.text().filter(lambda name: name not in ("same", "symmetric")),
    "pooling": st.text(min_size=1).filter(lambda name: name not in ("avg", "max")),
    "activation": st.text(min_size=1, alphabet="xyz"),
    "classifier_activation": st.text(min_size=1, alphabet="xyz"),
    "norm_layer": st.text(min_size=1, alphabet="xyz"),
    "block": st.one_of(st.text(), st.integers()),
    "features": st.lists(st.text(alphabet="xyz"), min_size=1),
}


@settings(max_examples=150)
@given(data=st.data())
def test_what_is_forbidden_is_a_value_error_that_names_it(data):
    argument = data.draw(st.sampled_from(sorted(FORBIDDEN)))
    value = data.draw(FORBIDDEN[argument])
    with pytest.raises(ValueError, match=argument):
        small(**{argument: value})


def _no_layer(*args, **arguments):
    return None


def _no_arguments():
    return keras.layers.Identity()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alpha", 0),
        ("alpha", -0.5),
        ("alpha", math.nan),
        ("input_shape", (31, 32, 3)),
        ("input_shape", (32, 32)),
        ("input_shape", (32, 32, 0)),
        ("input_shape", (32, 32, None)),
        ("input_shape", (10**9, 32, 3)),
        ("input_shape", (32, 32, 10**9)),
        ("classes", 10**9),
        ("inverted_residual_setting", [(1, 16, 1)]),
        ("inverted_residual_setting", [(1, 16, 1, 3)]),
        ("padding", "valid"),
        ("block", "bottleneck"),
        ("block", int),
        ("block", dict),
        ("block", _no_layer),
        ("block", _no_arguments),
        ("activation", "relu7"),
        ("norm_layer", "instance_norm"),
        ("norm_layer", {"class_name": "x"}),
        ("norm_layer", {"class_name": "Dense", "config": {}}),
        ("norm_layer", keras.layers.Dense),
        ("norm_layer", keras.optimizers.SGD),
        ("dtype", "int8"),
        ("dtype", "int32"),
        ("dtype", "complex64"),
        ("dtype", "int8_from_float32"),
        ("dtype", "mixed_int8"),
        ("dtype", 0),
        ("dtype", keras.DTypePolicy("int32")),
        ("norm_momentum", 1.5),
        ("norm_epsilon", 0),
        ("classes", 0),
        ("classes", 2.5),
        ("classifier_activation", "hardmax"),
        ("dropout", 1.0),
        ("pooling", "mean"),
        ("stochastic_depth", -0.1),
        ("stem_stride", 3),
        ("output_stride", 64),
        ("weights", "no/such/file.weights.h5"),
        ("weights", "model.txt"),
        ("input_tensor", "image"),
        ("data_format", "NCHW"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        small(**{argument: value})
    shown = {"input_tensor": "str"}.get(argument, str(value))
    assert shown in str(error.value) or isinstance(value, list)


@pytest.mark.parametrize(
    ("argument", "value"), [("alpha", 100), ("round_nearest", 10**6), ("classes", 2**28)], ids=lambda v: str(v)
)
def test_what_no_machine_holds_is_refused_before_it_is_built(argument, value):
    with pytest.raises(ValueError, match=rf"{argument}.* must give at most 268,435,456 parameters, got [\d,]+\."):
        keras_mnv2.MobileNetV2((32, 32, 3), weights=None, **{argument: value})


def test_features_must_be_known_and_without_top():
    with pytest.raises(ValueError, match=r"features must be among .*'stride_64'"):
        small(features=["stride_64"], include_top=False)
    with pytest.raises(ValueError, match="features needs include_top=False"):
        small(features=True)


def test_input_shape_must_agree_with_input_tensor():
    with pytest.raises(ValueError, match="input_shape must agree with input_tensor"):
        small(input_shape=(64, 64, 3), input_tensor=keras.Input((32, 32, 3)))


@once
def test_input_tensor_keeps_what_comes_before(rng):
    source = keras.Input((32, 32, 1))
    model = small(input_shape=None, input_tensor=keras.layers.Concatenate()([source] * 3))
    assert model.input_shape == (None, 32, 32, 1)
    assert model.predict(images(rng, channels=1), verbose=0).shape == (2, 5)


def test_features_by_stride(rng):
    model = small(input_shape=(64, 64, 3), include_top=False, features=True)
    found = model.predict(images(rng, 64), verbose=0)
    assert list(found) == ["stride_2", "stride_4", "stride_8", "stride_16", "stride_32"]
    assert {name: value.shape[1:] for name, value in found.items()} == {
        "stride_2": (32, 32, 8),
        "stride_4": (16, 16, 8),
        "stride_8": (8, 8, 16),
        "stride_16": (4, 4, 32),
        "stride_32": (2, 2, 112),
    }


FEATURES = ["stem", "block_3", "block_13_expand", "stride_16"]


@once
def test_features_by_name_equal_the_whole_models(rng):
    model = small(include_top=False)
    ends = ["Conv1_relu", "block_3_project_BN", "block_13_expand_relu", "block_12_add"]
    check_features(model, [model.get_layer(name).output for name in ends], rng)


@once
def test_features_of_blocks_as_layers_equal_the_whole_models(rng):
    model = small(include_top=False, block=keras_mnv2.layers.InvertedResidual)
    stem, block_3, block_12 = (model.get_layer(name).output for name in ("stem", "block_3", "block_12"))
    check_features(model, [stem, block_3, model.get_layer("block_13").expand(block_12), block_12], rng)


def check_features(model, expected, rng):
    block = None if "Conv1" in {layer.name for layer in model.layers} else keras_mnv2.layers.InvertedResidual
    backbone = small(include_top=False, features=FEATURES, block=block)
    assert not [layer.name for layer in backbone.layers if layer.name.startswith("block_14")]
    randomise(model, rng)
    for layer in backbone.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights() if layer.weights else [])
    x = images(rng)
    found = backbone.predict(x, verbose=0)
    assert list(found) == FEATURES
    for name, value in zip(FEATURES, keras.Model(model.input, expected).predict(x, verbose=0), strict=True):
        assert relative_difference(found[name], value) <= 1e-5


@once
def test_output_stride_computes_what_the_strides_skip(rng):
    arguments = {"input_shape": (64, 64, 3), "include_top": False, "padding": "symmetric"}
    coarse, fine = small(**arguments), small(**arguments, output_stride=8)
    randomise(coarse, rng)
    assert [w.shape for w in coarse.weights] == [w.shape for w in fine.weights]
    fine.set_weights(coarse.get_weights())
    x = images(rng, 64)
    dense = fine.predict(x, verbose=0)
    assert dense.shape[1:3] == (8, 8)
    assert relative_difference(dense[:, ::4, ::4], coarse.predict(x, verbose=0)) <= 1e-5


def test_a_dynamic_model_takes_every_size(rng):
    dynamic = small(input_shape=(None, None, 3), inverted_residual_setting=FEW)
    randomise(dynamic, rng)
    for size in (32, 45, 64):
        static = small(input_shape=(size, size, 3), inverted_residual_setting=FEW)
        static.set_weights(dynamic.get_weights())
        x = images(rng, size)
        assert relative_difference(dynamic.predict(x, verbose=0), static.predict(x, verbose=0)) <= 1e-5


@once_on("tensorflow")
@pytest.mark.parametrize("padding", ["same", pytest.param("symmetric", marks=pytest.mark.slow)])
def test_channels_first_gives_the_numbers_of_channels_last(padding, rng):
    last = small(padding=padding, data_format="channels_last", inverted_residual_setting=FEW)
    first = small(padding=padding, input_shape=(3, 32, 32), data_format="channels_first", inverted_residual_setting=FEW)
    randomise(last, rng)
    first.set_weights(last.get_weights())
    x = images(rng)
    found = first.predict(np.moveaxis(x, 3, 1).copy(), verbose=0)
    assert relative_difference(found, last.predict(x, verbose=0)) <= 1e-5
    first.compile("sgd", "sparse_categorical_crossentropy")
    assert np.isfinite(first.train_on_batch(np.moveaxis(x, 3, 1).copy(), np.array([0, 1])))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=ONCE)])
def test_mixed_precision_computes_low_and_ends_in_float32(policy, rng):
    exact, low = small(inverted_residual_setting=FEW), small(dtype=policy, inverted_residual_setting=FEW)
    low.set_weights(exact.get_weights())
    assert low.get_layer("block_3_expand").compute_dtype == policy.removeprefix("mixed_")
    assert {w.dtype for w in low.weights} == {"float32"}
    x = images(rng)
    found = low.predict(x, verbose=0)
    assert found.dtype == "float32"
    assert np.abs(found - exact.predict(x, verbose=0)).max() < 0.05
    low.compile("sgd", "sparse_categorical_crossentropy")
    assert np.isfinite(low.train_on_batch(x, np.array([0, 1])))


def test_include_preprocessing_takes_raw_pixels(rng):
    scaled = small(inverted_residual_setting=FEW)
    raw = small(include_preprocessing=True, inverted_residual_setting=FEW)
    raw.set_weights(scaled.get_weights())
    x = rng.integers(0, 256, (2, 32, 32, 3)).astype("uint8")
    prepared = keras.ops.convert_to_numpy(keras_mnv2.preprocess_input(x))
    assert prepared.min() >= -1
    assert prepared.max() <= 1
    assert relative_difference(raw.predict(x, verbose=0), scaled.predict(prepared, verbose=0)) <= 1e-5


def test_another_block_is_used_everywhere(rng):
    block = functools.partial(keras_mnv2.layers.InvertedResidual, shortcut=None, linear_bottleneck=False)
    model = small(block=block)
    blocks = [layer for layer in model.layers if layer.name.startswith("block_")]
    assert len(blocks) == 17
    assert all(layer.shortcut is None and not layer.linear_bottleneck for layer in blocks)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_weights_come_from_a_file_of_this_package(suffix, tmp_path, rng):
    model = small(inverted_residual_setting=FEW)
    path = tmp_path / f"model{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    x = images(rng)
    found = small(weights=path, inverted_residual_setting=FEW).predict(x, verbose=0)
    assert np.array_equal(found, model.predict(x, verbose=0))
    with pytest.raises(ValueError, match=r"shape|weight"):
        small(weights=path, alpha=1.0, inverted_residual_setting=FEW)


@once
def test_fit_learns_and_validates_in_its_first_epochs(rng):
    labels = rng.integers(0, 2, 256)
    x = rng.normal(0, 0.3, (256, 32, 32, 3)).astype("float32")
    x[labels == 1, ::2] += 1
    model = small(classes=2, inverted_residual_setting=FEW)
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, labels, batch_size=16, epochs=6, validation_split=0.25, verbose=0)
    assert max(history.history["val_accuracy"]) >= 0.95


@once
def test_a_model_with_a_head_is_saved_and_loaded(tmp_path, rng):
    backbone = small(include_top=False, pooling="avg", norm_layer="sync_batch_norm")
    model = keras.Sequential([backbone, keras.layers.Dense(3)])
    x = images(rng)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(x, verbose=0), expected)


@once
@pytest.mark.parametrize(
    "dtype", [None, "float16", "mixed_bfloat16", "float32", keras.DTypePolicy("float32"), np.float32]
)
def test_a_dtype_of_floats_is_the_models(dtype):
    expected = keras.dtype_policies.get(keras.config.dtype_policy() if dtype is None else dtype)
    assert small(dtype=dtype).layers[1].compute_dtype == expected.compute_dtype
