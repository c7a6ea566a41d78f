"""The depthwise convolution on JAX and its gradients, as primitives that are one another's derivatives."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _taps(
    padded: jax.Array, kernel_size: tuple[int, int], size: tuple[int, ...], stride: int, dilation: int
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """The window of `padded` that each tap of the kernel meets, as ((row, column), (N, height, width, C))."""
    n, _, _, c = padded.shape
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            row, column = i * dilation, j * dilation
            end = (n, row + (size[0] - 1) * stride + 1, column + (size[1] - 1) * stride + 1, c)
            yield (i, j), lax.slice(padded, (0, row, column, 0), end, (1, stride, stride, 1))


def _pad(x: jax.Array, pairs: Sequence[tuple[int, int]], interior: int = 0) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pair, interior) for pair in pairs), (0, 0, 0)])


class Geometry(NamedTuple):
    """What the shapes of a convolution follow from; sizes and padding are of (height, width)."""

    size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: int
    pairs: tuple[tuple[int, int], ...]
    dilation: int
    # How many kernels there are, each for as many images in a row; 0: each image has its own.
    groups: int = 0

    def output_size(self) -> tuple[int, ...]:
        sides = zip(self.size, self.kernel_size, self.pairs, strict=True)
        return tuple((n + sum(pair) - (k - 1) * self.dilation - 1) // self.stride + 1 for n, k, pair in sides)

    def windows(self, x: jax.Array) -> Iterator[tuple[tuple[int, int], jax.Array]]:
        return _taps(_pad(x, self.pairs), self.kernel_size, self.output_size(), self.stride, self.dilation)

    def turned_windows(self, dy: jax.Array) -> Iterator[tuple[tuple[int, int], jax.Array]]:
        """Those of dy, its pixels `stride` apart, that the turned kernel meets in the images' gradient."""
        around = []
        for n, k, pair, out in zip(self.size, self.kernel_size, self.pairs, dy.shape[1:3], strict=True):
            before = (k - 1) * self.dilation - pair[0]
            around.append((before, n + (k - 1) * self.dilation - before - ((out - 1) * self.stride + 1)))
        return _taps(_pad(dy, around, self.stride - 1), self.kernel_size, self.size, 1, self.dilation)


def depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry, form: str) -> jax.Array:
    """The depthwise convolution.

    Args:
        x: images, NHWC.
        kernel: (height, width, C).
        geometry: of the convolution.
        form: `"cpu"`; `"gpu"`, with sums over the whole batch; or `"pallas"`, for GPUs too.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    dtype = jnp.result_type(x, kernel)
    # Each image has a kernel of its own, so that `vmap` needs no more than a longer batch. In the forms for GPUs, which
    # sum over all images that share a kernel, each group of images has. The zeros, which XLA drops, vary over the mesh
    # axes that `x` varies over in `jax.shard_map`.
    if form != "cpu":
        geometry = geometry._replace(groups=1)
    shape = (geometry.groups or x.shape[0], *kernel.shape)
    kernels = kernel.astype(_wide(dtype)) + jnp.zeros_like(x, _wide(dtype), shape=shape)
    return _primitives(form).bind(x.astype(dtype), kernels, geometry=geometry)


def _wide(dtype: Any) -> Any:
    # Kernels, and their gradients until they are summed, are not of half precision.
    return jnp.promote_types(dtype, "float32")


# The sum of dy * convolution(x, kernels) is linear in each of the three. Leaving one out gives a function of the other
# two: the convolution, the images' gradient, the kernels' gradient. JAX is told that they are one another's
# derivatives, and so differentiates them in either direction and to any order.


def _total(products: Iterable[jax.Array]) -> Any:
    return sum(products)


def _compute_output(x: jax.Array, kernels: jax.Array, *, geometry: Geometry) -> jax.Array:
    kernels = kernels.astype(x.dtype)[:, :, :, None, None]
    return _total(window * kernels[:, i, j] for (i, j), window in geometry.windows(x))


def _compute_images(dy: jax.Array, kernels: jax.Array, *, geometry: Geometry) -> jax.Array:
    windows = geometry.turned_windows(dy)
    kernels = kernels.astype(dy.dtype)[:, :, :, None, None]
    return _total(window * kernels[:, -1 - i, -1 - j] for (i, j), window in windows)


def _compute_kernels(x: jax.Array, dy: jax.Array, *, geometry: Geometry) -> jax.Array:
    # Image by image: the nine sums over one image find it in the cache.
    def one(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        pixels, gradient = (part.astype(_wide(part.dtype)) for part in image)
        return jnp.stack([(window[0] * gradient).sum((0, 1)) for _, window in geometry.windows(pixels[None])])

    return lax.map(one, (x, dy)).reshape(x.shape[0], *geometry.kernel_size, x.shape[3])


# For GPUs: XLA fuses each of these into one pass or a few, and sums in float32 cost nothing there.


def _spread(kernels: jax.Array, count: int) -> jax.Array:
    """A kernel for each of `count` images, or the one of all, to be multiplied with windows."""
    if kernels.shape[0] > 1:
        kernels = jnp.repeat(kernels, count // kernels.shape[0], 0)
    return kernels[:, :, :, None, None]


def _fused_output(x: jax.Array, kernels: jax.Array, *, geometry: Geometry) -> jax.Array:
    kernels = _spread(kernels, x.shape[0])
    wide = (window.astype(kernels.dtype) * kernels[:, i, j] for (i, j), window in geometry.windows(x))
    return _total(wide).astype(x.dtype)


def _fused_images(dy: jax.Array, kernels: jax.Array, *, geometry: Geometry) -> jax.Array:
    kernels = _spread(kernels, dy.shape[0])
    windows = geometry.turned_windows(dy)
    wide = (window.astype(kernels.dtype) * kernels[:, -1 - i, -1 - j] for (i, j), window in windows)
    return _total(wide).astype(dy.dtype)


def _fused_kernels(x: jax.Array, dy: jax.Array, *, geometry: Geometry) -> jax.Array:
    def total(product: jax.Array) -> jax.Array:
        if geometry.groups == 1:
            return product.sum((0, 1, 2))[None]
        n, *rest = product.shape
        return product.reshape(geometry.groups, n // geometry.groups, *rest).sum((1, 2, 3))

    dy = dy.astype(_wide(dy.dtype))
    sums = [total(window.astype(dy.dtype) * dy) for _, window in geometry.windows(x)]
    return jnp.stack(sums, 1).reshape(geometry.groups, *geometry.kernel_size, x.shape[3])


def _primitive(name: str, compute: Callable[..., jax.Array]) -> Primitive:
    """A primitive of JAX that is `compute`."""
    primitive = Primitive(name)
    compiled = jax.jit(compute, static_argnames="geometry")
    primitive.def_impl(compiled)

    @primitive.def_abstract_eval
    def _(*operands: Any, geometry: Geometry) -> Any:
        # By tracing: the type says also how the result is sharded, and what it varies over in `jax.shard_map`.
        return jax.make_jaxpr(lambda *operands: compiled(*operands, geometry=geometry))(*operands).out_avals[0]

    def batched(
        operands: Sequence[jax.Array], axes: Sequence[int | None], *, geometry: Geometry
    ) -> tuple[jax.Array, int]:
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        fronts = [batching.bdim_at_front(x, axis, size) for x, axis in zip(operands, axes, strict=True)]
        geometry = geometry._replace(groups=size * geometry.groups)
        y = primitive.bind(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in fronts), geometry=geometry)
        return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0

    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    return primitive


@functools.cache
def _primitives(form: str) -> Primitive:
    """The convolution's primitive in a form; its derivatives are primitives in the same form."""
    computations: tuple[Callable[..., Any], ...]
    if form == "cpu":
        name, computations = "depthwise", (_compute_output, _compute_images, _compute_kernels)
    elif form == "gpu":
        name, computations = "depthwise_fused", (_fused_output, _fused_images, _fused_kernels)
    else:
        # Here: nobody else waits for the import of Pallas.
        from keras_mnv2.ops import jax_pallas

        # Interpreted in tests, which run the forms for GPUs on a CPU.
        interpret = jax.default_backend() == "cpu"
        computations = tuple(
            functools.partial(compute, interpret=interpret)
            for compute in (jax_pallas.output, jax_pallas.images, jax_pallas.kernels)
        )
        name = "depthwise_pallas"
    names = (name, f"{name}_images", f"{name}_kernels")
    output, images, kernels = map(_primitive, names, computations)
    # Of each primitive, how the gradient g of its result gives those of its operands.
    ad.defbilinear(
        output,
        lambda g, _, w, **geometry: images.bind(g, w, **geometry),
        lambda g, x, _, **geometry: kernels.bind(x, g, **geometry),
    )
    ad.defbilinear(
        images,
        lambda g, _, w, **geometry: output.bind(g, w, **geometry),
        lambda g, dy, _, **geometry: kernels.bind(g, dy, **geometry),
    )
    ad.defbilinear(
        kernels,
        lambda g, _, dy, **geometry: images.bind(dy, g, **geometry),
        lambda g, x, _, **geometry: output.bind(x, g, **geometry),
    )
    return output
