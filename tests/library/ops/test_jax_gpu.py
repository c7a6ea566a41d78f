"""On JAX, what runs on GPUs: held to `keras.ops` and to the form for CPUs by running it on a CPU."""

import re
from functools import partial

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2 import ops
from keras_mnv2.ops import default
from tests import twins
from tests.helpers import double_precision, relative_difference, run_python
from tests.library.ops.test_jax import SHARDED, assert_equal, draw, loss

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's forms")

FORMS = ["products", "pallas"]
# With stride 1, both paddings are the same numbers.
OPTIONS = [
    {},
    {"stride": 2},
    {"stride": 2, "padding": "symmetric"},
    {"dilation": 2, "padding": "symmetric"},
    {"stride": 2, "padding": [(3, 0), (0, 2)], "data_format": "channels_first"},
]


@pytest.fixture
def choose(monkeypatch):
    """Chooses a form for the rest of the test: "cpu", None, "products", or "pallas"."""
    from keras_mnv2.ops import jax as fast

    def choose(form):
        monkeypatch.setattr(fast, "_form", lambda: "gpu" if form in FORMS else form)
        if form in FORMS:
            monkeypatch.setenv("KERAS_MNV2_JAX_DEPTHWISE", form)

    return choose


@pytest.fixture(params=FORMS)
def form(request, choose):
    choose(request.param)
    return request.param


def value_and_pullback(function, arrays, weights):
    """The output, and the gradients of its sum with weights."""
    import jax

    def run(arrays, weights):
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(weights.astype(y.dtype))

    return [np.asarray(a, "float64") for a in jax.jit(run)(arrays, weights)]


def assert_close(options, arrays, rng, limits=(1e-5, 1e-4)):
    """The operation against the reference: the output within the first limit, the gradients within the second."""
    fast, reference = (partial(module.convolution, **options) for module in (ops, default))
    weights = rng.normal(size=reference(*arrays).shape).astype("float32")
    found, expected = (value_and_pullback(f, arrays, weights) for f in (fast, reference))
    for a, b, limit in zip(found, expected, [limits[0], *limits[1:] * len(arrays)], strict=True):
        assert relative_difference(a, b) <= limit


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_depthwise_convolutions_equal_the_reference(options, form, rng):
    # Odd and even sides; more channels than a block of Pallas has, and not a multiple of it.
    shape = (2, 40, 9, 8) if "data_format" in options else (2, 9, 8, 40)
    arrays = [rng.normal(size=s).astype("float32") for s in (shape, (3, 3, 40, 1), (40,))]
    assert_close({"depthwise": True, **options}, arrays, rng)


def test_few_channels_and_many_pixels(form, rng):
    # One strip of pixels of Pallas's kernel gradient is full, and the next is not.
    arrays = [rng.normal(size=s).astype("float32") for s in ((1, 45, 24, 3), (3, 5, 3, 1))]
    assert_close({"depthwise": True}, arrays, rng)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 9, 8, 3), (3, 3, 3, 6), {"stride": 2}),
        ((2, 9, 8, 3), (3, 3, 3, 6), {"stride": 2, "padding": "symmetric"}),
        ((2, 9, 8, 7), (1, 1, 7, 6), {}),
    ],
    ids=str,
)
def test_the_stem_and_pointwise_convolutions(shape, kernel, options, choose, rng):
    choose("products")
    arrays = [rng.normal(size=s).astype("float32") for s in (shape, kernel, kernel[3:])]
    assert_close(options, arrays, rng)
    text = lowered(lambda *arrays: ops.convolution(*arrays, **options), arrays)
    assert "convolution" not in text


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("bfloat16", {"stride": 2}), ("float16", {"padding": "symmetric"})],
    ids=str,
)
def test_half_precision_is_rounded_once(dtype, options, form, rng):
    x, kernel = (keras.ops.cast(rng.normal(size=s), dtype) for s in ((2, 9, 8, 5), (3, 3, 5, 1)))
    exact = [np.asarray(a, "float32") for a in (x, kernel)]
    run = partial(ops.convolution, depthwise=True, **options)
    reference = partial(default.convolution, depthwise=True, **options)
    y = run(x, kernel)
    assert y.dtype == dtype
    weights = keras.ops.cast(rng.normal(size=y.shape), dtype)
    found = value_and_pullback(run, [x, kernel], weights)
    expected = value_and_pullback(reference, exact, np.asarray(weights, "float32"))
    # Half a last bit of 8 or 11, of numbers and of the largest number: sums of float32 are not seen.
    limit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert relative_difference(a, b) <= 1.01 * limit


@pytest.fixture
def functions():
    """The convolution in a form for GPUs, and the reference, in float64."""
    with double_precision():
        yield [partial(module.convolution, depthwise=True, stride=2) for module in (ops, default)]


@pytest.mark.parametrize("axes", [(None, 0), (3, 1)])
def test_vectorised(axes, form, functions, rng):
    import jax

    arrays = [
        one if axis is None else np.moveaxis(many, 0, axis)
        for axis, one, many in zip(axes, draw(rng), draw(rng, 2), strict=True)
    ]
    parts = [
        [a if axis is None else np.take(a, i, axis) for axis, a in zip(axes, arrays, strict=True)] for i in range(2)
    ]

    def both(function):
        # The output, and the gradients of the images and of the kernel.
        return lambda *arrays: (function(*arrays), *jax.grad(loss(function), (0, 1))(*arrays))

    each = [jax.jit(both(functions[1]))(*part) for part in parts]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *each)
    vectorised = jax.vmap(both(functions[0]), axes)
    assert_equal(jax.jit(vectorised)(*arrays), expected)
    # A `vmap` in a `vmap`: groups of groups.
    twice = jax.jit(jax.vmap(vectorised))(*(np.stack([a, a]) for a in arrays))
    assert_equal(twice, jax.tree.map(lambda a: np.stack([a, a]), expected))


def test_second_derivatives(form, functions, rng):
    import jax

    arrays, along = draw(rng), draw(rng)
    fast, reference = map(loss, functions)
    found, expected = (jax.jit(partial(jax.jvp, jax.grad(f, (0, 1))))(arrays, along) for f in (fast, reference))
    assert_equal(found, expected)
    if form == "products":
        expected = jax.jit(jax.hessian(reference, 1))(*arrays)
        assert_equal(jax.jit(jax.hessian(fast, 1))(*arrays), expected)
        assert_equal(jax.jit(jax.jacrev(jax.jacfwd(fast, 1), 1))(*arrays), expected)


def test_no_images(form, rng):
    import jax

    x, kernel = np.zeros((0, 4, 4, 3), "float32"), rng.normal(size=(3, 3, 3, 1)).astype("float32")
    assert ops.convolution(x, kernel, depthwise=True).shape == x.shape
    assert not jax.grad(loss(partial(ops.convolution, depthwise=True)), 1)(x, kernel).any()


def test_on_two_devices():
    run_python(f"import keras_mnv2.ops.jax as fast\nfast._form = lambda: 'gpu'\n{SHARDED}", "jax")


def small_network(**arguments):
    """A step of training as a function of weights, statistics and images, and these; the network in inference."""
    import jax

    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3, **arguments)
    twins.enliven(model)
    x, labels = twins.batch(4, size=(32, 32, 3))

    def loss(values, others, x):
        scores, others = model.stateless_call(values, others, x, training=True)
        return -jax.numpy.log(scores[np.arange(4), labels]).mean(), (scores, others)

    def infer(values, others, x):
        return model.stateless_call(values, others, x, training=False)[0]

    values, others = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
    return jax.value_and_grad(loss, has_aux=True), infer, (values, others, x)


def lowered(function, arrays):
    """What JAX hands to the compiler."""
    import jax

    return jax.jit(function).lower(*arrays).as_text()


def grouped(text):
    return [n for n in re.findall(r"(?:feature|batch)_group_count = (\d+)", text) if int(n) > 1]


def test_a_training_step_has_no_convolution(choose):
    step, _, arrays = small_network()
    choose(None)
    # What is looked for is found where it is. JAX knows functions that it has traced: each form gets a new one.
    assert len(grouped(lowered(partial(step), arrays))) >= 17
    choose("products")
    text = lowered(partial(step), arrays)
    assert not grouped(text)
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" in text


def test_a_network_equals_itself_on_a_cpu(choose):
    import jax

    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2)]
    step, infer, arrays = small_network(inverted_residual_setting=rows)
    results = []
    for form in ("cpu", "products"):
        choose(form)
        found = jax.jit(partial(step))(*arrays), jax.jit(partial(infer))(*arrays)
        results.append([np.asarray(a) for a in jax.tree.leaves(found)])
    for found, expected in zip(*results, strict=True):
        # What is added before a batch norm has no gradient but rounding.
        assert np.abs(found - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-2)


def test_the_kernels_of_pallas_lower_to_triton():
    import jax

    from keras_mnv2.ops import jax_pallas
    from keras_mnv2.ops.jax_depthwise import Geometry

    geometry = Geometry((9, 8), (3, 3), 2, ((0, 1), (1, 1)), 1, groups=2)
    for dtype in ("float32", "bfloat16"):
        x, dy = (jax.ShapeDtypeStruct((4, *size, 40), dtype) for size in (geometry.size, geometry.output_size()))
        kernels = jax.ShapeDtypeStruct((2, 3, 3, 40), "float32")
        for function, arrays in (
            (jax_pallas.output, (x, kernels)),
            (jax_pallas.images, (dy, kernels)),
            (jax_pallas.kernels, (x, dy)),
        ):
            traced = jax.jit(partial(function, geometry=geometry)).trace(*arrays)
            assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_unknown_choice_is_an_error(choose, monkeypatch, rng):
    choose("products")
    monkeypatch.setenv("KERAS_MNV2_JAX_DEPTHWISE", "triton")
    with pytest.raises(ValueError, match=r"must be 'products' or 'pallas', got 'triton'\."):
        ops.convolution(*draw(rng), depthwise=True)


@pytest.mark.parametrize(
    ("platform", "form"), [("cpu", "cpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("tpu", None)]
)
def test_the_form_follows_the_devices(platform, form, monkeypatch, rng):
    import jax

    from keras_mnv2.ops import jax as fast

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.delenv("KERAS_MNV2_JAX_DEPTHWISE", raising=False)
    assert fast._form() == fast._depthwise_form() == form


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_batch_normalization_in_one_pass_equals_the_reference(data_format, choose, rng):
    choose("products")
    shape = (4, 6, 5, 8) if data_format == "channels_last" else (4, 8, 6, 5)
    x = keras.ops.cast(rng.normal(1, 2, shape), "bfloat16")
    gamma, beta = rng.uniform(0.5, 2, 8).astype("float32"), rng.normal(size=8).astype("float32")
    found, expected = (m.batch_normalization(x, gamma, beta, 1e-3, data_format) for m in (ops, default))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        limit = 1e-5 if a.dtype == "float32" else 2**-8
        assert relative_difference(np.asarray(a, "float64"), np.asarray(b, "float64")) <= limit

    def run(module):
        return lambda *arrays: module.batch_normalization(*arrays, 1e-3, data_format)[0]

    weights = rng.normal(size=shape)
    pulled = [value_and_pullback(run(m), [x, gamma, beta], weights) for m in (ops, default)]
    for a, b, limit in zip(*pulled, [2**-8, 2**-8, 1e-4, 1e-4], strict=True):
        assert relative_difference(a, b) <= limit


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_wider_images_keep_two_passes(dtype, choose, rng):
    choose("products")
    x = keras.ops.cast(rng.normal(1000, 1, (4, 6, 5, 8)), dtype)
    for a, b in zip(*(m.batch_normalization(x, None, None, 1e-3) for m in (ops, default)), strict=True):
        assert np.array_equal(a, b)


def test_a_variance_is_never_negative(choose, rng):
    choose("products")
    x = keras.ops.cast(1e3 + np.array([0, 1, 10, 100]) * rng.normal(size=(8, 16, 16, 4)), "bfloat16")
    y, mean, variance = (np.asarray(a, "float64") for a in ops.batch_normalization(x, None, None, 1e-3))
    assert (variance >= 0).all()
    assert np.isfinite(y).all()
    exact = np.asarray(x, "float64")
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-5)
    # Rounding to bfloat16 adds as much.
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), atol=5e-6 * 1e6)
