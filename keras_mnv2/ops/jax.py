"""The operations on JAX: on a CPU, depthwise convolutions as shifted products and pointwise ones as matrix products.

XLA runs grouped convolutions in a slow generic loop on CPUs, forward and backward; on other devices the
convolutions of `keras.ops` are the vendor's and stay.
"""

import functools
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_mnv2.ops import default
from keras_mnv2.ops.padding import spatial_padding

batch_normalization = default.batch_normalization
fake_quantize = default.fake_quantize
compiled = default.compiled
fold = default.fold
folds_noted = default.folds_noted
is_compiling = default.is_compiling
is_watched = default.is_watched
lay_out = default.lay_out
moving_average = default.moving_average
normalize = default.normalize
numbers = default.numbers
relu6 = default.relu6
run_later = default.run_later
runs_directly = default.runs_directly
train_block = default.train_block
uncompiled = default.uncompiled
versions = default.versions


# Of hidden activations: two images of alpha 1.0 at 224x224. The memory that XLA takes for a call is then below
# the 32 MB from which glibc maps and unmaps it each time: 200 images/s where whole batches of 32 gave 130 to 160.
CHUNK_BYTES = 10e6


def block_in_chunks(function, x, hidden_size):
    """See `keras_mnv2.ops.default.block_in_chunks`."""
    # Only where it is compiled: in eager mode the loop would be compiled again at each call.
    traced = isinstance(x, jax.core.Tracer) and isinstance(x.shape[0], int)
    if not (traced and _on_cpu() and keras.distribution.distribution() is None):
        return function(x)
    most = max(1, int(CHUNK_BYTES / (hidden_size * x.dtype.itemsize)))
    if most >= x.shape[0]:
        return function(x)
    # Chunks of one size, so that the function is compiled once.
    count = max(n for n in range(1, most + 1) if x.shape[0] % n == 0)
    y = lax.map(function, x.reshape(-1, count, *x.shape[1:]))
    return jax.tree.map(lambda part: part.reshape(x.shape[0], *part.shape[2:]), y)


network_in_chunks = block_in_chunks

# The call of each tensor of a block that is being traced, by the tensor's identity, for as long as it lives.
_calls: dict[int, tuple] = {}


def note(output, call):
    """See `keras_mnv2.ops.default.note`: what reads the end of a block then computes the block in chunks.

    While compiling alone: the compiler leaves out what nobody reads, here the block layer by layer.
    """
    if isinstance(output, jax.core.Tracer) and _on_cpu() and keras.distribution.distribution() is None:
        key = id(output)
        # At the end of the process a tensor may outlive the names of this module.
        forget = functools.partial(_calls.pop, key)
        _calls[key] = (weakref.ref(output, forget), call)
    return output


def call_of(x):
    """See `keras_mnv2.ops.default.call_of`."""
    reference, call = _calls.get(id(x), (None, None))
    return call if reference is not None and reference() is x else None


def known(x):
    """See `keras_mnv2.ops.default.known`."""
    call = call_of(x)
    return x if call is None or call.value is None else call.value


def settled(x):
    """See `keras_mnv2.ops.default.settled`."""
    call = call_of(x)
    return call.evaluate(x) if call is not None and call.ends_block else x


def convolution(x, kernel, bias=None, *, stride=1, padding="same", dilation=1, data_format="channels_last"):
    """See `keras_mnv2.ops.default.convolution`."""
    if _on_cpu() and kernel.shape[:2] == (1, 1) and stride == 1 and data_format == "channels_last":
        y = _product(x, kernel[0, 0])
        return y if bias is None else y + bias
    if _on_cpu() and kernel.shape[2] <= 4 and data_format == "channels_last":
        # The stem, as a matrix product of its windows: 1.7 ms instead of 3.6 for four images.
        pairs = spatial_padding(padding, kernel.shape[:2], x.shape[1:3], stride, dilation)
        assert pairs is not None
        windows = _Geometry(x.shape[1:3], kernel.shape[:2], stride, tuple(pairs), dilation).windows(x)
        columns = jnp.concatenate([window for _, window in windows], -1)
        y = _product(columns, kernel.reshape(-1, kernel.shape[3]))
        return y if bias is None else y + bias
    return default.convolution(
        x, kernel, bias, stride=stride, padding=padding, dilation=dilation, data_format=data_format
    )


def depthwise_convolution(x, kernel, bias=None, *, stride=1, padding="same", dilation=1, data_format="channels_last"):
    """See `keras_mnv2.ops.default.depthwise_convolution`."""
    if not _on_cpu():
        return default.depthwise_convolution(
            x, kernel, bias, stride=stride, padding=padding, dilation=dilation, data_format=data_format
        )
    first = data_format == "channels_first"
    x = jnp.moveaxis(x, 1, 3) if first else x
    pairs = spatial_padding(padding, kernel.shape[:2], x.shape[1:3], stride, dilation)
    assert pairs is not None
    y = _depthwise(x, kernel[..., 0], _Geometry(x.shape[1:3], kernel.shape[:2], stride, tuple(pairs), dilation))
    y = y if bias is None else y + bias
    return jnp.moveaxis(y, 3, 1) if first else y


def _on_cpu():
    return jax.default_backend() == "cpu"


def _product(x, matrix):
    # Of two axes: for four, XLA transposes large arrays in the gradients (a training step took 1.4 times as long).
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _taps(padded, kernel_size, size, stride, dilation):
    """The window of `padded` that each tap of the kernel meets, as ((row, column), (N, height, width, C))."""
    n, _, _, c = padded.shape
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            row, column = i * dilation, j * dilation
            end = (n, row + (size[0] - 1) * stride + 1, column + (size[1] - 1) * stride + 1, c)
            yield (i, j), lax.slice(padded, (0, row, column, 0), end, (1, stride, stride, 1))


def _pad(x, pairs, interior=0):
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pair, interior) for pair in pairs), (0, 0, 0)])


class _Geometry(NamedTuple):
    """What the shapes of a convolution follow from; sizes and padding are of (height, width)."""

    size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: int
    pairs: tuple[tuple[int, int], ...]
    dilation: int

    def output_size(self):
        sides = zip(self.size, self.kernel_size, self.pairs, strict=True)
        return tuple((n + sum(pair) - (k - 1) * self.dilation - 1) // self.stride + 1 for n, k, pair in sides)

    def windows(self, x):
        return _taps(_pad(x, self.pairs), self.kernel_size, self.output_size(), self.stride, self.dilation)


def _depthwise(x, kernel, geometry):
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    dtype = jnp.result_type(x, kernel)
    # Each image has a kernel of its own, so that `vmap` needs no more than a longer batch. The zeros, which XLA drops,
    # vary over the mesh axes that `x` varies over in `jax.shard_map`.
    kernels = kernel.astype(_wide(dtype)) + jnp.zeros_like(x, _wide(dtype), shape=(x.shape[0], *kernel.shape))
    return _output.bind(x.astype(dtype), kernels, geometry=geometry)


def _wide(dtype):
    # Kernels, and their gradients until they are summed, are not of half precision.
    return jnp.promote_types(dtype, "float32")


# The sum of dy * convolution(x, kernels) is linear in each of the three. Leaving one out gives a function of the other
# two: the convolution, the images' gradient, the kernels' gradient. JAX is told that they are one another's
# derivatives, and so differentiates them in either direction and to any order.


def _compute_output(x, kernels, *, geometry):
    kernels = kernels.astype(x.dtype)[:, :, :, None, None]
    return sum(window * kernels[:, i, j] for (i, j), window in geometry.windows(x))


def _compute_images(dy, kernels, *, geometry):
    # The convolution of dy, its pixels `stride` apart, with the turned kernel.
    size, kernel_size, stride, pairs, dilation = geometry
    around = []
    for n, k, pair, out in zip(size, kernel_size, pairs, dy.shape[1:3], strict=True):
        before = (k - 1) * dilation - pair[0]
        around.append((before, n + (k - 1) * dilation - before - ((out - 1) * stride + 1)))
    windows = _taps(_pad(dy, around, stride - 1), kernel_size, size, 1, dilation)
    kernels = kernels.astype(dy.dtype)[:, :, :, None, None]
    return sum(window * kernels[:, -1 - i, -1 - j] for (i, j), window in windows)


def _compute_kernels(x, dy, *, geometry):
    # Image by image: the nine sums over one image find it in the cache.
    def one(image):
        pixels, gradient = (part.astype(_wide(part.dtype)) for part in image)
        return jnp.stack([(window[0] * gradient).sum((0, 1)) for _, window in geometry.windows(pixels[None])])

    return lax.map(one, (x, dy)).reshape(x.shape[0], *geometry.kernel_size, x.shape[3])


def _primitive(name, compute):
    """A primitive of JAX that is `compute`."""
    primitive = Primitive(name)
    compiled = jax.jit(compute, static_argnames="geometry")
    primitive.def_impl(compiled)

    @primitive.def_abstract_eval
    def _(*operands, geometry):
        # By tracing: the type says also how the result is sharded, and what it varies over in `jax.shard_map`.
        return jax.make_jaxpr(lambda *operands: compiled(*operands, geometry=geometry))(*operands).out_avals[0]

    def batched(operands, axes, *, geometry):
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        fronts = [batching.bdim_at_front(x, axis, size) for x, axis in zip(operands, axes, strict=True)]
        y = primitive.bind(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in fronts), geometry=geometry)
        return y.reshape(size, fronts[0].shape[1], *y.shape[1:]), 0

    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    return primitive


_output = _primitive("depthwise", _compute_output)
_images = _primitive("depthwise_images", _compute_images)
_kernels = _primitive("depthwise_kernels", _compute_kernels)
# Of each primitive, how the gradient g of its result gives those of its operands.
ad.defbilinear(
    _output,
    lambda g, _, kernels, **geometry: _images.bind(g, kernels, **geometry),
    lambda g, x, _, **geometry: _kernels.bind(x, g, **geometry),
)
ad.defbilinear(
    _images,
    lambda g, _, kernels, **geometry: _output.bind(g, kernels, **geometry),
    lambda g, dy, _, **geometry: _kernels.bind(g, dy, **geometry),
)
ad.defbilinear(
    _kernels,
    lambda g, _, dy, **geometry: _images.bind(dy, g, **geometry),
    lambda g, x, _, **geometry: _output.bind(x, g, **geometry),
)
