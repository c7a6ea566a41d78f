"""The operations on JAX: depthwise convolutions as shifted products, pointwise ones and the stem as matrix products.

XLA runs grouped convolutions in a slow generic loop on CPUs, forward and backward. On GPUs it hands convolutions to
cuDNN, and tries out its algorithms for each gradient while compiling. On other devices the convolutions of `keras.ops`
stay.

With the environment variable `KERAS_MNV2_JAX_DEPTHWISE=pallas` depthwise convolutions on one GPU are the kernels of
`keras_mnv2.ops.jax_pallas`; `products` is the default.
"""

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

from keras_mnv2.annotations import Tensor
from keras_mnv2.ops import default
from keras_mnv2.ops.jax_depthwise import Geometry, depthwise
from keras_mnv2.ops.padding import Padding, spatial_padding

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
resize = default.resize
run_later = default.run_later
runs_directly = default.runs_directly
train_block = default.train_block
uncompiled = default.uncompiled
versions = default.versions


# Of hidden activations: two images of alpha 1.0 at 224x224. The memory that XLA takes for a call is then below
# the 32 MB from which glibc maps and unmaps it each time: 200 images/s where whole batches of 32 gave 130 to 160.
CHUNK_BYTES = 10e6


def block_in_chunks(function: Callable[[Tensor], Any], x: Tensor, hidden_size: int) -> Any:
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


def note(output: Tensor, call: Any) -> Tensor:
    """See `keras_mnv2.ops.default.note`: what reads the end of a block then computes the block in chunks.

    While compiling alone: the compiler leaves out what nobody reads, here the block layer by layer.
    """
    if isinstance(output, jax.core.Tracer) and _on_cpu() and keras.distribution.distribution() is None:
        key = id(output)
        # At the end of the process a tensor may outlive the names of this module.
        forget = functools.partial(_calls.pop, key)
        _calls[key] = (weakref.ref(output, forget), call)
    return output


def call_of(x: Tensor) -> Any:
    """See `keras_mnv2.ops.default.call_of`."""
    reference, call = _calls.get(id(x), (None, None))
    return call if reference is not None and reference() is x else None


def known(x: Tensor) -> Tensor:
    """See `keras_mnv2.ops.default.known`."""
    call = call_of(x)
    return x if call is None or call.value is None else call.value


def settled(x: Tensor) -> Tensor:
    """See `keras_mnv2.ops.default.settled`."""
    call = call_of(x)
    return call.evaluate(x) if call is not None and call.ends_block else x


def convolution(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    data_format: str = "channels_last",
) -> Tensor:
    """See `keras_mnv2.ops.default.convolution`."""
    if _form() is not None and kernel.shape[:2] == (1, 1) and stride == 1 and data_format == "channels_last":
        y = _product(x, kernel[0, 0])
        return y if bias is None else y + bias
    if _form() is not None and kernel.shape[2] <= 4 and data_format == "channels_last":
        # The stem, as a matrix product of its windows: on a CPU 1.7 ms instead of 3.6 for four images.
        pairs = spatial_padding(padding, kernel.shape[:2], x.shape[1:3], stride, dilation)
        assert pairs is not None
        windows = Geometry(x.shape[1:3], kernel.shape[:2], stride, tuple(pairs), dilation).windows(x)
        columns = jnp.concatenate([window for _, window in windows], -1)
        y = _product(columns, kernel.reshape(-1, kernel.shape[3]))
        return y if bias is None else y + bias
    return default.convolution(
        x, kernel, bias, stride=stride, padding=padding, dilation=dilation, data_format=data_format
    )


def depthwise_convolution(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    data_format: str = "channels_last",
) -> Tensor:
    """See `keras_mnv2.ops.default.depthwise_convolution`."""
    if _form() is None:
        return default.depthwise_convolution(
            x, kernel, bias, stride=stride, padding=padding, dilation=dilation, data_format=data_format
        )
    first = data_format == "channels_first"
    x = jnp.moveaxis(x, 1, 3) if first else x
    pairs = spatial_padding(padding, kernel.shape[:2], x.shape[1:3], stride, dilation)
    assert pairs is not None
    geometry = Geometry(x.shape[1:3], kernel.shape[:2], stride, tuple(pairs), dilation)
    form = _depthwise_form()
    assert form is not None
    y = depthwise(x, kernel[..., 0], geometry, form)
    y = y if bias is None else y + bias
    return jnp.moveaxis(y, 3, 1) if first else y


def batch_normalization(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    data_format: str = "channels_last",
    synchronized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `keras_mnv2.ops.default.batch_normalization`.

    On GPUs the statistics of bfloat16 images take one pass. Rounding to bfloat16 adds 1e-6 to 5e-6 of the mean's square
    to a variance, as much as its difference of two sums of float32 may lose; of wider images it would lose digits.
    """
    if _form() != "gpu" or x.dtype != jnp.bfloat16:
        return default.batch_normalization(x, gamma, beta, epsilon, data_format, synchronized)
    wide = x.astype("float32")
    axes = (0, 1, 2) if data_format == "channels_last" else (0, 2, 3)
    mean = wide.mean(axes)
    # Rounding may not make it negative.
    variance = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0)
    y = default.normalize(wide, gamma, beta, mean, variance, epsilon, data_format)
    return y.astype(x.dtype), mean, variance


def _form() -> str | None:
    """How convolutions are computed on these devices: as for CPUs, as for GPUs, or None: by `keras.ops`."""
    return {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend())


def _depthwise_form() -> str | None:
    chosen = os.environ.get("KERAS_MNV2_JAX_DEPTHWISE", "products")
    if chosen not in ("products", "pallas"):
        raise ValueError(f"KERAS_MNV2_JAX_DEPTHWISE must be 'products' or 'pallas', got {chosen!r}.")
    if _form() != "gpu":
        return _form()
    # XLA would gather all images on each device for a kernel that is not its own.
    return "pallas" if chosen == "pallas" and keras.distribution.distribution() is None else "gpu"


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    # Of two axes: for four, XLA transposes large arrays in the gradients (a training step took 1.4 times as long).
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)
