"""The fast operations against `keras.ops`, forward and backward."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mnv2 import ops
from keras_mnv2.ops import default
from tests.helpers import double_precision, relative_difference

SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "height": st.integers(5, 12),
        "width": st.integers(5, 12),
        "channels": st.sampled_from([1, 3, 8]),
        "side": st.sampled_from([1, 3, 5]),
        "stride_and_dilation": st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 3)]),
        "padding": st.sampled_from(["same", "symmetric"]),
        "data_format": st.sampled_from(["channels_last", "channels_first"]),
        "bias": st.booleans(),
        "depthwise": st.booleans(),
    }
)


def gradients(function, arrays):
    """Value and gradients of sum(function * fixed weights) on the active backend, as arrays."""
    backend = keras.backend.backend()

    def loss(*tensors):
        y = function(*tensors)
        weights = np.cos(np.arange(np.prod(y.shape))).reshape(tuple(y.shape)).astype("float32")
        return keras.ops.sum(y * keras.ops.convert_to_tensor(weights))

    if backend == "tensorflow":
        import tensorflow as tf

        tensors = [tf.constant(a) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = loss(*tensors)
        found = tape.gradient(value, tensors)
    elif backend == "jax":
        import jax

        value, found = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))(*map(np.asarray, arrays))
    else:
        import torch

        tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
        value = loss(*tensors)
        found = torch.autograd.grad(value, tensors)
        value = value.detach()
    return [np.asarray(keras.ops.convert_to_numpy(a)) for a in (value, *found)]


# JAX compiles each example.
@settings(max_examples=8 if keras.backend.backend() == "jax" else 25)
@given(shape=SHAPES)
def test_convolutions_equal_the_reference(shape):
    rng = np.random.default_rng(1)
    channels, side, depthwise = shape["channels"], shape["side"], shape["depthwise"]
    x = rng.normal(size=(shape["batch"], shape["height"], shape["width"], channels)).astype("float32")
    if shape["data_format"] == "channels_first":
        x = np.moveaxis(x, 3, 1).copy()
    out = channels if depthwise else 4
    arrays = [x, rng.normal(size=(side, side, channels, 1 if depthwise else out)).astype("float32")]
    if shape["bias"]:
        arrays.append(rng.normal(size=out).astype("float32"))
    stride, dilation = shape["stride_and_dilation"]
    options = {
        "depthwise": depthwise,
        "stride": stride,
        "dilation": dilation,
        "padding": shape["padding"],
        "data_format": shape["data_format"],
    }

    def run(module):
        compute = module.convolution
        if module is default and keras.backend.backend() == "tensorflow" and shape["data_format"] == "channels_first":
            # `keras.ops` has no such convolution on each CPU.
            last = {**options, "data_format": "channels_last"}

            def transposed(x, *arrays):
                y = compute(keras.ops.transpose(x, (0, 2, 3, 1)), *arrays, **last)
                return keras.ops.transpose(y, (0, 3, 1, 2))

            return transposed
        return lambda *arrays: compute(*arrays, **options)

    tensors = [keras.ops.convert_to_tensor(a) for a in arrays]
    found, expected = (keras.ops.convert_to_numpy(run(m)(*tensors)) for m in (ops, default))
    assert relative_difference(found, expected) <= 1e-5
    for a, b in zip(gradients(run(ops), arrays), gradients(run(default), arrays), strict=True):
        assert relative_difference(a, b) <= 1e-4


@pytest.mark.parametrize("batch", [1, 2])
def test_a_pointwise_convolution_of_one_image_or_more(batch, rng):
    arrays = [rng.normal(size=s).astype("float32") for s in ((batch, 5, 4, 8), (1, 1, 8, 6), (6,))]
    for a, b in zip(gradients(ops.convolution, arrays), gradients(default.convolution, arrays), strict=True):
        assert relative_difference(a, b) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2, "padding": "symmetric"}])
def test_convolutions_and_gradients_in_half_precision(depthwise, dtype, options, rng):
    x = rng.normal(size=(2, 9, 9, 8)).astype("float32")
    kernel = rng.normal(size=(3, 3, 8, 1 if depthwise else 4)).astype("float32")

    def low(*tensors):
        y = ops.convolution(*(keras.ops.cast(t, dtype) for t in tensors), depthwise=depthwise, **options)
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        return keras.ops.cast(y, "float32")

    def exact(*tensors):
        return default.convolution(*tensors, depthwise=depthwise, **options)

    limit = 2e-2 if dtype == "bfloat16" else 2e-3
    if (dtype, depthwise, keras.backend.backend()) == ("bfloat16", False, "tensorflow"):
        limit = 3e-2  # TensorFlow adds up in bfloat16 itself where the processor has no instructions for it: 2.5e-2.
    tensors = [keras.ops.convert_to_tensor(a) for a in (x, kernel)]
    assert relative_difference(*(keras.ops.convert_to_numpy(f(*tensors)) for f in (low, exact))) <= limit
    pairs = zip(gradients(low, [x, kernel])[1:], gradients(exact, [x, kernel])[1:], strict=True)
    assert max(relative_difference(a, b) for a, b in pairs) <= limit


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batch_normalization_equals_the_reference(data_format, dtype, rng):
    shape = (4, 6, 5, 8) if data_format == "channels_last" else (4, 8, 6, 5)
    x = rng.normal(1, 2, size=shape).astype("float32")
    gamma, beta = rng.uniform(0.5, 2, 8).astype("float32"), rng.normal(size=8).astype("float32")
    tensors = [keras.ops.cast(x, dtype), *map(keras.ops.convert_to_tensor, (gamma, beta))]
    found = ops.batch_normalization(*tensors, 1e-3, data_format)
    expected = default.batch_normalization(*tensors, 1e-3, data_format)
    limit = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = (keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in (a, b))
        assert relative_difference(a, b) <= limit
    if dtype == "float32":

        def run(module):
            return lambda *arrays: module.batch_normalization(*arrays, 1e-3, data_format)[0]

        arrays = [x, gamma, beta]
        for a, b in zip(gradients(run(ops), arrays), gradients(run(default), arrays), strict=True):
            assert relative_difference(a, b) <= 1e-4


def test_batch_normalization_keeps_double_precision(rng):
    x, gamma, beta = rng.normal(1, 2, (4, 6, 5, 8)), rng.uniform(0.5, 2, 8), rng.normal(size=8)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = ((x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, mean, variance)
    with double_precision():
        tensors = [keras.ops.convert_to_tensor(a, dtype="float64") for a in (x, gamma, beta)]
        found = ops.batch_normalization(*tensors, 1e-3)
        for a, b in zip(found, expected, strict=True):
            assert relative_difference(keras.ops.convert_to_numpy(a), b) <= 1e-12


def test_relu6_cuts_at_zero_and_six():
    x = keras.ops.convert_to_tensor(np.array([-1.0, 0.0, 3.0, 6.0, 7.0], "float32"))
    assert keras.ops.convert_to_numpy(ops.relu6(x)).tolist() == [0, 0, 3, 6, 6]


@pytest.mark.parametrize("whole", [True, False])
def test_round_to_multiples_keeps_each_gradient(whole):
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype("float32")
    scale = np.abs(x).max(None if whole else (0, 1, 2), keepdims=True) / 127
    for module in (ops, default):
        steps = keras.ops.convert_to_tensor(scale)
        found = keras.ops.convert_to_numpy(module.round_to_multiples(keras.ops.convert_to_tensor(x), steps))
        np.testing.assert_allclose(found, np.round(x / scale) * scale, atol=1e-6)
        _, gradient = gradients(lambda t, m=module, s=steps: m.round_to_multiples(t, s), [x])
        np.testing.assert_allclose(gradient, np.cos(np.arange(x.size)).reshape(x.shape), rtol=1e-6)


@given(low=st.floats(-20, 0), high=st.floats(0.01, 20), spread=st.floats(0.1, 30))
def test_fake_quantize_rounds_to_levels_that_hold_zero(low, high, spread):
    x = np.random.default_rng(0).normal(0, spread, (50,)).astype("float32")
    low, high = np.float32(low), np.float32(high)
    scale = max((high - low) / 255, 1e-12)
    zero_point = np.round(-low / scale)
    expected = (np.clip(np.round(x / scale) + zero_point, 0, 255) - zero_point) * scale
    limits = [keras.ops.convert_to_tensor(end) for end in (low, high)]
    inside = (x > -zero_point * scale + scale / 2) & (x < (255 - zero_point) * scale - scale / 2)
    outside = (x < -zero_point * scale - scale / 2) | (x > (255 - zero_point) * scale + scale / 2)
    weights = np.cos(np.arange(50)).astype("float32")
    for module in (ops, default):
        found = keras.ops.convert_to_numpy(module.fake_quantize(keras.ops.convert_to_tensor(x), *limits))
        # Half a level is rounded up here and down there.
        assert np.abs(found - expected).max() <= 1.001 * scale + 1e-6
        assert (np.abs(found - expected) > 1e-4 * scale + 1e-6).mean() <= 0.1
        _, gradient = gradients(lambda t, m=module: m.fake_quantize(t, *limits), [x])
        np.testing.assert_allclose(gradient[inside], weights[inside], rtol=1e-6)
        assert not gradient[outside].any()
