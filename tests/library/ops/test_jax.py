"""On JAX, depthwise convolutions under its transformations, in either direction and to any order."""

from functools import partial

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2 import ops
from keras_mnv2.ops import default
from tests import twins
from tests.helpers import double_precision, relative_difference, run_python

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's transformations")

OPTIONS = [
    {},
    {"stride": 2},
    {"dilation": 2, "padding": "symmetric", "data_format": "channels_first"},
]


@pytest.fixture
def jax():
    import jax

    with double_precision():
        yield jax


@pytest.fixture(params=OPTIONS, ids=str)
def functions(request):
    """The fast convolution and the reference."""
    return [partial(module.convolution, depthwise=True, **request.param) for module in (ops, default)]


def draw(rng, *batch):
    """Two images, which are as well NHWC as NCHW of three channels, and a kernel, all after axes of `batch`."""
    return rng.normal(size=(*batch, 2, 3, 4, 3)), rng.normal(size=(*batch, 3, 3, 3, 1))


def loss(function):
    from jax import numpy as jnp

    # Not linear, so that all derivatives differ from 0. Not `keras.ops.sin`, which gives float32 for float64.
    return lambda x, kernel: jnp.sin(function(x, kernel)).sum()


def assert_equal(found, expected):
    import jax

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert relative_difference(a, b) <= 1e-12


def test_forward_mode_is_the_transpose_of_reverse_mode(jax, functions, rng):
    primals, tangents = draw(rng), draw(rng)
    found, expected = (jax.jvp(f, primals, tangents) for f in functions)
    assert_equal(found, expected)
    y, pull = jax.vjp(functions[0], *primals)
    weights = rng.normal(size=y.shape)
    forward = np.vdot(weights, found[1])
    assert forward == pytest.approx(sum(map(np.vdot, pull(weights), tangents)), rel=1e-12)
    y, push = jax.linearize(functions[0], *primals)
    assert_equal((y, push(*tangents)), expected)


def test_jacobians_of_both_modes(jax, functions, rng):
    arrays = draw(rng)
    expected = jax.jacrev(functions[1], (0, 1))(*arrays)
    for jacobian in (jax.jacrev, jax.jacfwd):
        assert_equal(jacobian(functions[0], (0, 1))(*arrays), expected)


def test_second_and_third_derivatives(jax, functions, rng):
    arrays, along = draw(rng), draw(rng)
    fast, reference = map(loss, functions)
    expected = jax.jit(jax.hessian(reference, (0, 1)))(*arrays)
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)):
        assert_equal(jax.jit(outer(inner(fast, (0, 1)), (0, 1)))(*arrays), expected)

    def directional(f):
        return lambda *arrays: sum(map(jax.numpy.vdot, jax.grad(f, (0, 1))(*arrays), along))

    found, expected = (jax.jit(jax.grad(directional(directional(f)), (0, 1)))(*arrays) for f in (fast, reference))
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "axes", [(0, None), *(pytest.param(a, marks=pytest.mark.slow) for a in ((None, 0), (0, 0))), (3, 1)]
)
def test_vectorised(axes, jax, functions, rng):
    arrays = [
        one if axis is None else np.moveaxis(many, 0, axis)
        for axis, one, many in zip(axes, draw(rng), draw(rng, 4), strict=True)
    ]
    for f in (functions[0], jax.grad(loss(functions[0]), (0, 1)), jax.jacfwd(loss(functions[0]), (0, 1))):
        each = [
            f(*(a if axis is None else np.take(a, i, axis) for axis, a in zip(axes, arrays, strict=True)))
            for i in range(4)
        ]
        assert_equal(jax.vmap(f, axes)(*arrays), jax.tree.map(lambda *parts: np.stack(parts), *each))

    def summed(f):
        return lambda *arrays: jax.vmap(f, axes)(*arrays).sum()

    found, expected = (jax.grad(summed(loss(f)), (0, 1))(*arrays) for f in functions)
    assert_equal(found, expected)


def test_in_loops_and_computed_again(jax, functions, rng):
    xs, kernels = draw(rng, 3)
    fast = loss(functions[0])

    def looped(xs, kernel):
        total, _ = jax.lax.scan(lambda total, x: (total + jax.checkpoint(fast)(x, kernel), None), 0.0, xs)
        return total

    expected = jax.grad(lambda xs, kernel: sum(fast(x, kernel) for x in xs), (0, 1))(xs, kernels[0])
    assert_equal(jax.jit(jax.grad(looped, (0, 1)))(xs, kernels[0]), expected)
    with jax.disable_jit():
        assert_equal(jax.grad(fast, (0, 1))(xs[0], kernels[0]), jax.grad(fast, (0, 1))(xs[0], kernels[0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_derivatives_keep_the_dtype(dtype, jax, rng):
    primals, tangents = ([keras.ops.cast(a, dtype) for a in draw(rng)] for _ in range(2))
    f = partial(ops.convolution, depthwise=True)
    limit = {"bfloat16": 4e-2, "float16": 4e-3}[dtype]
    exact = [[np.asarray(a, "float64") for a in arrays] for arrays in (primals, tangents)]
    for transformed in (
        lambda *both: jax.jvp(f, *both),
        lambda arrays, _: jax.vjp(f, *arrays)[1](f(*arrays)),
        lambda *both: jax.jvp(lambda *arrays: jax.grad(loss(f), (0, 1))(*arrays), *both),
    ):
        found = jax.tree.leaves(transformed(primals, tangents))
        for a, b in zip(found, jax.tree.leaves(transformed(*exact)), strict=True):
            assert a.dtype == dtype
            assert relative_difference(np.asarray(a, "float64"), b) <= limit


def test_no_images(jax, rng):
    x, kernel = np.zeros((0, 4, 4, 3)), draw(rng)[1]
    y, tangent = jax.jvp(partial(ops.convolution, depthwise=True), (x, kernel), (x, kernel))
    assert y.shape == tangent.shape == x.shape
    assert not jax.grad(loss(partial(ops.convolution, depthwise=True)), 1)(x, kernel).any()


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import keras_mnv2
from keras_mnv2 import ops

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
split, whole = PartitionSpec("batch"), PartitionSpec()
rng = np.random.default_rng(0)
x, kernel = rng.normal(size=(4, 6, 5, 3)).astype("float32"), rng.normal(size=(3, 3, 3, 1)).astype("float32")

def loss(x, kernel):
    return (ops.convolution(x, kernel, depthwise=True, stride=2) ** 2).sum()

def mapped(x, kernel):
    return jax.lax.psum(loss(x, kernel), "batch")

expected = jax.value_and_grad(loss, (0, 1))(x, kernel)
mapped = jax.shard_map(mapped, mesh=mesh, in_specs=(split, whole), out_specs=whole)
placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, split), (kernel, whole))]
for f in (loss, mapped):
    found = jax.jit(jax.value_and_grad(f, (0, 1)))(*placed)
    assert len(found[1][0].sharding.device_set) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
"""


def test_on_two_devices():
    run_python(SHARDED, "jax")


@pytest.fixture
def network(jax):
    """Three logits of a small network as a function of images and of its weights, and both, in float64."""
    # Keras has images in float32 by default, and averages them in float32.
    image = keras.Input((32, 32, 3), dtype="float64")
    rows = [(1, 16, 1, 1), (6, 24, 2, 2)]
    model = keras_mnv2.MobileNetV2(None, 0.35, False, None, image, inverted_residual_setting=rows, activation="silu")
    twins.enliven(model)
    others = [v.value for v in model.non_trainable_variables]
    classifier = np.random.default_rng(1).normal(size=(1280, 3)) / 36

    def run(values, x, training=False):
        return model.stateless_call(values, others, x, training=training)[0].mean((1, 2)) @ classifier

    return run, [v.value for v in model.trainable_variables], np.float64(twins.batch(2, size=(32, 32, 3))[0])


def drawn_like(values, rng):
    return [rng.normal(size=v.shape) for v in values]


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_network_in_both_modes(training, jax, network, rng):
    run, values, x = network

    def loss(values):
        return jax.nn.log_softmax(run(values, x, training))[:, 0].mean()

    along, across = drawn_like(values, rng), drawn_like(values, rng)

    @jax.jit
    def products(values):
        gradient, second = jax.jvp(jax.grad(loss), (values,), (along,))
        return jax.jvp(loss, (values,), (along,))[1], gradient, second

    def vdot(a, b):
        return sum(map(np.vdot, a, b))

    forward, gradient, second = products(values)
    assert forward == pytest.approx(vdot(gradient, along), rel=1e-9)
    # The Hessian is symmetric: forward over reverse along one direction, reverse over forward along the other.
    swapped = jax.jit(jax.grad(lambda values: jax.jvp(loss, (values,), (across,))[1]))(values)
    assert vdot(second, across) == pytest.approx(vdot(swapped, along), rel=1e-8)
    assert abs(vdot(second, across)) > 0


def test_the_jacobian_of_a_networks_images(jax, network):
    run, values, x = network
    small = x[:1]

    def logits(patch):
        return run(values, jax.numpy.asarray(small).at[:, :2, :2].add(patch))[0]

    patch = np.zeros((2, 2, 3))
    found, expected = (jax.jit(mode(logits))(patch) for mode in (jax.jacfwd, jax.jacrev))
    assert found.shape == (3, 2, 2, 3)
    assert relative_difference(found, expected) <= 1e-9
