"""The operations on JAX: on a CPU, depthwise convolutions as shifted products and pointwise ones as matrix products.

XLA runs grouped convolutions in a slow generic loop on CPUs, forward and backward; on other devices the
convolutions of `keras.ops` are the vendor's and stay.
"""

import weakref
from functools import partial

import jax
import jax.numpy as jnp
import keras
from jax import lax

from keras_mnv2.ops import default
from keras_mnv2.ops.padding import spatial_padding

batch_normalization = default.batch_normalization
fake_quantize = default.fake_quantize
fold = default.fold
folds_noted = default.folds_noted
is_watched = default.is_watched
moving_average = default.moving_average
normalize = default.normalize
numbers = default.numbers
relu6 = default.relu6
run_later = default.run_later
runs_directly = default.runs_directly
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
        _calls[key] = (weakref.ref(output, lambda _: _calls.pop(key, None)), call)
    return output


def call_of(x):
    """See `keras_mnv2.ops.default.call_of`."""
    reference, call = _calls.get(id(x), (None, None))
    return call if reference is not None and reference() is x else None


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
        _, windows = _windows(x, kernel.shape[:2], stride, tuple(pairs), dilation)
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
    y = _depthwise(x, kernel[..., 0], stride, tuple(pairs), dilation)
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


def _windows(x, kernel_size, stride, pairs, dilation):
    sides = [n + sum(pair) for n, pair in zip(x.shape[1:3], pairs, strict=True)]
    size = [(n - (k - 1) * dilation - 1) // stride + 1 for n, k in zip(sides, kernel_size, strict=True)]
    return size, _taps(_pad(x, pairs), kernel_size, size, stride, dilation)


def _shifted_products(x, kernel, stride, pairs, dilation):
    _, windows = _windows(x, kernel.shape[:2], stride, pairs, dilation)
    return sum(window * kernel[tap] for tap, window in windows)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, kernel, stride, pairs, dilation):
    return _shifted_products(x, kernel, stride, pairs, dilation)


def _depthwise_forward(x, kernel, stride, pairs, dilation):
    return _shifted_products(x, kernel, stride, pairs, dilation), (x, kernel)


def _depthwise_backward(stride, pairs, dilation, saved, dy):
    x, kernel = saved
    return _input_gradient(x, kernel, stride, pairs, dilation, dy), _kernel_gradient(
        x, kernel, stride, pairs, dilation, dy
    )


def _input_gradient(x, kernel, stride, pairs, dilation, dy):
    # The convolution of dy, its pixels `stride` apart, with the turned kernel.
    around = []
    for n, k, pair, out in zip(x.shape[1:3], kernel.shape[:2], pairs, dy.shape[1:3], strict=True):
        before = (k - 1) * dilation - pair[0]
        around.append((before, n + (k - 1) * dilation - before - ((out - 1) * stride + 1)))
    spread = _pad(dy, around, stride - 1)
    return sum(
        window * kernel[-1 - tap[0], -1 - tap[1]]
        for tap, window in _taps(spread, kernel.shape[:2], x.shape[1:3], 1, dilation)
    )


def _kernel_gradient(x, kernel, stride, pairs, dilation, dy):
    # Image by image: the nine sums over one image find it in the cache.
    def one(image):
        pixels, gradient = image
        windows = _taps(_pad(pixels[None], pairs), kernel.shape[:2], gradient.shape[:2], stride, dilation)
        wide = gradient.astype("float32")
        return jnp.stack([(window[0].astype("float32") * wide).sum((0, 1)) for _, window in windows])

    return lax.map(one, (x, dy)).sum(0).reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
