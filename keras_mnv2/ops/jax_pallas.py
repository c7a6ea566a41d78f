"""The depthwise convolution and its gradients as kernels of Pallas (Triton) for one GPU, not measured on any.

Each program computes a block of pixels times channels of one image; the blocks' sides are powers of two, as Triton
wants them, and masks keep what sticks out from being read and written. Sums are in float32 at least.

The three functions are those that `keras_mnv2.ops.jax_depthwise` makes primitives of. Their `geometry` is its
`Geometry`: of each kernel in `kernels` (groups, height, width, C) there are N / groups images in a row.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PIXELS = 32
CHANNELS = 32
# Pixels of one image that one program of the kernel's gradient adds up: the more, the fewer sums are left to add, and
# the fewer programs there are.
STRIP = 1024
WARPS = 4


def output(x: jax.Array, kernels: jax.Array, *, geometry: Any, interpret: bool = False) -> jax.Array:
    """The convolution of images (N, height, width, C)."""
    return _convolve(x, kernels, geometry, geometry.output_size(), _met_by_output, interpret)


def images(dy: jax.Array, kernels: jax.Array, *, geometry: Any, interpret: bool = False) -> jax.Array:
    """The images' gradient, of the output's gradient (N, height, width, C)."""
    return _convolve(dy, kernels, geometry, geometry.size, _met_by_image, interpret)


def kernels(x: jax.Array, dy: jax.Array, *, geometry: Any, interpret: bool = False) -> jax.Array:
    """The kernels' gradient (groups, height, width, C), of images and the output's gradient."""
    n, height, width, channels = x.shape
    dtype, shape = jnp.promote_types(x.dtype, "float32"), (geometry.groups, *geometry.kernel_size, channels)
    if 0 in (*x.shape, *dy.shape):
        return jnp.zeros(shape, dtype)
    pixels, taps = dy.shape[1] * dy.shape[2], geometry.kernel_size[0] * geometry.kernel_size[1]
    strips, block = pl.cdiv(pixels, STRIP), _block(channels)
    partial = pl.pallas_call(
        functools.partial(_add_up, geometry=geometry, width=dy.shape[2], steps=pl.cdiv(min(pixels, STRIP), PIXELS)),
        jax.ShapeDtypeStruct((n, strips, taps, channels), dtype),
        grid=(n, strips, pl.cdiv(channels, block)),
        in_specs=[
            pl.BlockSpec((None, height, width, channels), lambda image, strip, c: (image, 0, 0, 0)),
            pl.BlockSpec((None, pixels, channels), lambda image, strip, c: (image, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, taps, channels), lambda image, strip, c: (image, strip, 0, 0)),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="depthwise_kernels",
    )(x, dy.reshape(n, pixels, channels))
    return partial.reshape(geometry.groups, -1, *shape[1:]).sum(1)


def _convolve(
    source: jax.Array,
    kernels: jax.Array,
    geometry: Any,
    size: tuple[int, ...],
    met: Callable[..., Any],
    interpret: bool,
) -> jax.Array:
    n, height, width, channels = source.shape
    if 0 in (*source.shape, *size):
        return jnp.zeros((n, *size, channels), source.dtype)
    pixels, block, per_kernel = size[0] * size[1], _block(channels), n // kernels.shape[0]
    return pl.pallas_call(
        functools.partial(_multiply, geometry=geometry, width=size[1], met=met),
        jax.ShapeDtypeStruct((n, pixels, channels), source.dtype),
        grid=(n, pl.cdiv(pixels, PIXELS), pl.cdiv(channels, block)),
        in_specs=[
            pl.BlockSpec((None, height, width, channels), lambda image, p, c: (image, 0, 0, 0)),
            pl.BlockSpec((None, *kernels.shape[1:]), lambda image, p, c: (image // per_kernel, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, pixels, channels), lambda image, p, c: (image, 0, 0)),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name=f"depthwise{met.__name__.removeprefix('_met_by')}",
    )(source, kernels).reshape(n, *size, channels)


def _block(channels: int) -> int:
    return min(CHANNELS, pl.next_power_of_2(channels))


def _places(start: Any, count: int, end: int) -> tuple[jax.Array, jax.Array]:
    positions = start + lax.iota("int32", count)
    return positions, positions < end


def _met_by_output(position: jax.Array, tap: int, before: int, geometry: Any) -> tuple[jax.Array, bool]:
    """On one side, the position in the image that a tap meets at a position of the output."""
    return position * geometry.stride + (tap * geometry.dilation - before), True


def _met_by_image(position: jax.Array, tap: int, before: int, geometry: Any) -> tuple[jax.Array, jax.Array]:
    """On one side, the position in the output at which a tap meets one of the image, and whether there is one."""
    shifted = position + (before - tap * geometry.dilation)
    return lax.div(shifted, jnp.int32(geometry.stride)), lax.rem(shifted, jnp.int32(geometry.stride)) == 0


def _read(
    ref: Any,
    pixels: jax.Array,
    inside: jax.Array,
    channels: tuple[jax.Array, jax.Array],
    tap: tuple[int, ...],
    width: int,
    geometry: Any,
    met: Callable[..., Any],
) -> jax.Array:
    """What a tap meets in `ref` (height, width, C) at pixels in an array of that width; 0 outside."""
    rows, columns = lax.div(pixels, jnp.int32(width)), lax.rem(pixels, jnp.int32(width))
    (row, row_exists), (column, column_exists) = (
        met(position, i, pair[0], geometry)
        for position, i, pair in zip((rows, columns), tap, geometry.pairs, strict=True)
    )
    inside = inside & (row >= 0) & (row < ref.shape[0]) & row_exists
    inside = inside & (column >= 0) & (column < ref.shape[1]) & column_exists
    return _load(ref, (row[:, None], column[:, None], channels[0][None]), inside[:, None] & channels[1][None])


def _load(ref: Any, positions: tuple[Any, ...], mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[positions], mask=mask, other=0)


def _multiply(source: Any, kernels: Any, y: Any, *, geometry: Any, width: int, met: Callable[..., Any]) -> None:
    block = _block(y.shape[1])
    pixels, inside = _places(pl.program_id(1) * PIXELS, PIXELS, y.shape[0])
    channels = _places(pl.program_id(2) * block, block, y.shape[1])
    total = jnp.zeros((PIXELS, block), kernels.dtype)
    for tap in itertools.product(*map(range, geometry.kernel_size)):
        window = _read(source, pixels, inside, channels, tap, width, geometry, met)
        total += window.astype(total.dtype) * _load(kernels, (*tap, channels[0]), channels[1])[None]
    mask = inside[:, None] & channels[1][None]
    triton.store(y.at[pixels[:, None], channels[0][None]], total.astype(y.dtype), mask=mask)


def _add_up(x: Any, dy: Any, sums: Any, *, geometry: Any, width: int, steps: int) -> None:
    block = _block(dy.shape[1])
    channels = _places(pl.program_id(2) * block, block, dy.shape[1])
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    start = pl.program_id(1) * STRIP

    def step(i: Any, totals: list[jax.Array]) -> list[jax.Array]:
        pixels, inside = _places(start + i * PIXELS, PIXELS, dy.shape[0])
        gradient = _load(dy, (pixels[:, None], channels[0][None]), inside[:, None] & channels[1][None])
        gradient = gradient.astype(sums.dtype)
        windows = (_read(x, pixels, inside, channels, tap, width, geometry, _met_by_output) for tap in taps)
        return [total + window.astype(sums.dtype) * gradient for total, window in zip(totals, windows, strict=True)]

    totals = lax.fori_loop(0, steps, step, [jnp.zeros((PIXELS, block), sums.dtype)] * len(taps))
    for i, total in enumerate(totals):
        triton.store(sums.at[i, channels[0]], total.sum(0), mask=channels[1])
