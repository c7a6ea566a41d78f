"""A block in training on PyTorch: one node of autograd for its convolutions, batch norms, ReLU6 and shortcut.

Layer by layer the host makes some hundred calls a unit, many of them to permute kernels and to follow the moving
statistics, and autograd keeps one image more a unit. Here images are rows of pixels, (batch * height * width,
channels): a 1x1 convolution is then a matrix product with Keras's kernel as it lies.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from keras_mnv2.ops.padding import Padding, spatial_padding

# Up to here a matrix product with its gradients takes as long as the convolution, without a permuted kernel. From 16
# to 96 channels the convolution and its gradients take 15 ms for 28 at 200,000 rows (two x86 cores), from 64 to 384
# 2.5 for 3.0 at 3,000. On a GPU it is always the product.
MOST_ROWS = 2**10
# So many are cleared as fast as the rows and columns at their edges.
FEW_NUMBERS = 2**16

_aten = torch.ops.aten
_convolution_backward = _aten.convolution_backward.default
_norm_backward = _aten.native_batch_norm_backward.default
_relu6_backward = _aten.hardtanh_backward.default
_relu6_backward_in_place = _aten.hardtanh_backward.grad_input


class Step(NamedTuple):
    """A unit of the block: a convolution without bias, its batch norm, and ReLU6 or nothing.

    Attributes:
        depthwise: whether the convolution is.
        stride: of both sides.
        padding: of `keras_mnv2.ops.padding`.
        dilation: of both sides.
        relu6: whether one follows.
        epsilon: what is added to the variance.
        momentum: fraction of the old moving statistics that stays.
        moving_mean: (channels,); is changed.
        moving_variance: (channels,); is changed.
    """

    depthwise: bool
    stride: int
    padding: Padding
    dilation: int
    relu6: bool
    epsilon: float
    momentum: float
    moving_mean: torch.Tensor
    moving_variance: torch.Tensor


def train(steps: list[Step], shortcut: bool, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """The block's output; the moving statistics of `steps` follow the batch.

    Args:
        steps: one for each unit.
        shortcut: whether `x` is added to what comes out.
        x: images, NHWC.
        parameters: kernel (height, width, in, out; or channels, 1), scale and shift of each unit, in order.
    """
    return _Block.apply(steps, shortcut, x, *parameters)


class Window(NamedTuple):
    """How PyTorch's convolution is called: with `padding` of its own, after the zeros `around` the images.

    Attributes:
        padding: (height, width).
        around: (left, right, top, bottom), or None. A kernel with a row of zeros would do the same, but the gradient of
            a kernel of 4x4 takes four times as long as that of 3x3. So do images that are smaller than the kernel and
            padded by the convolution itself: for 128 images of 2x2x384 its gradient takes 2.0 ms for 0.15.
    """

    padding: list[int]
    around: tuple[int, int, int, int] | None


@functools.lru_cache(1024)
def _window(
    padding: Padding, kernel_size: tuple[int, ...], size: tuple[int, ...], stride: int, dilation: int
) -> Window:
    pairs = spatial_padding(padding, kernel_size, size, stride, dilation)
    assert pairs is not None
    (top, bottom), (left, right) = pairs
    small = any(n < (k - 1) * dilation + 1 for n, k in zip(size, kernel_size, strict=True))
    if (top, left) == (bottom, right) and not small:
        return Window([top, left], None)
    return Window([0, 0], (left, right, top, bottom))


@functools.lru_cache(1024)
def _factors(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """count / (count - 1) and its inverse. Tensors, since PyTorch makes one of a number at each call."""
    correction = (count - 1) / count
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(1 / correction, dtype=dtype), torch.tensor(correction, dtype=dtype)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: list[Step], shortcut: bool, x: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        shape = tuple(x.shape[:3])
        first = rows = _contiguous(x)
        images = None
        saved: list = []
        calls = []
        window = _window_of(steps[0], parameters[0], rows, shape)
        last = len(steps) - 1
        for i, step in enumerate(steps):
            kernel, gamma, beta = parameters[3 * i : 3 * i + 3]
            weight = _weight(step, kernel, rows.dtype, window)
            if window is None:
                source, convolved, after = rows, rows.mm(weight), shape
            else:
                source = _padded(_images(rows, shape), window) if images is None else images
                y = _convolution(step, source, weight, window)
                convolved, after = _rows(y), (y.shape[0], *y.shape[2:])
            rows, mean, scale = _normalize(step, convolved, gamma, beta)
            saved += (source, convolved, mean, scale)
            calls.append((window, weight, shape))
            shape, images = after, None
            window = _window_of(steps[i + 1], parameters[3 * i + 3], rows, shape) if i < last else None
            if step.relu6:
                if window and window.around:
                    images = _relu6_with_zeros(_images(rows, shape), window.around)
                else:
                    rows.clamp_(0.0, 6.0)
        if steps[last].relu6:
            saved.append(rows)
            rows = rows + first if shortcut else rows
        elif shortcut:
            rows.add_(first)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.steps, ctx.shortcut, ctx.calls, ctx.shape = steps, shortcut, calls, shape
        return rows.view(*shape, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        steps, after = ctx.steps, ctx.shape
        parameters, saved = tensors[: 3 * len(steps)], tensors[3 * len(steps) :]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_gradients(ctx, x, parameters, gradient)
        wanted = ctx.needs_input_grad[2:]
        outer = _contiguous(gradient)
        g: Any = outer
        # What the unit behind read, which is what a ReLU6 gave.
        behind = saved[-1]
        own = False
        found: list[torch.Tensor | None] = [None] * len(parameters)
        for i in range(len(steps) - 1, -1, -1):
            step, (window, weight, shape) = steps[i], ctx.calls[i]
            kernel, gamma = parameters[3 * i], parameters[3 * i + 1]
            source, convolved, mean, scale = saved[4 * i : 4 * i + 4]
            of_kernel, of_gamma, of_beta = wanted[1 + 3 * i : 4 + 3 * i]
            of_source = i > 0 or wanted[0]
            if step.relu6:
                # Outside of 0 to 6 of what went in, and of what came out, are the same numbers.
                if own:
                    _relu6_backward_in_place(g, behind, 0.0, 6.0, grad_input=g)
                else:
                    g = _relu6_backward(g, behind, 0.0, 6.0)
            g, found[3 * i + 1], found[3 * i + 2] = _norm_backward(
                g if g.dim() == 2 else _rows(g),
                convolved,
                gamma,
                None,
                None,
                mean,
                scale,
                True,
                step.epsilon,
                [True, of_gamma, of_beta],
            )
            behind = source
            if window is None:
                by_kernel = _transposed(source).mm(g).view(kernel.shape) if of_kernel else None
                g = g.mm(_transposed(weight)) if of_source else None
            else:
                g, by_kernel = _convolve_backward(step, window, _images(g, after), source, weight, of_source, of_kernel)
                by_kernel = _keras_kernel(step, by_kernel) if of_kernel else None
                if of_source and window.around:
                    g, behind = _inside(g, window.around), _inside(source, window.around)
            if by_kernel is not None:
                found[3 * i] = by_kernel if by_kernel.dtype is kernel.dtype else by_kernel.to(kernel.dtype)
            # Inside of zeros a new tensor is made, which has no gaps.
            own, after = not (window and window.around), shape
        if not wanted[0]:
            return None, None, None, *found
        g = g if g.dim() == 2 else _rows(g)
        g = g.add_(outer) if ctx.shortcut else g
        return None, None, g.view(x.shape), *found


def _normalize(
    step: Step, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows normalised by their statistics, which the moving ones follow; mean; 1 / deviation."""
    moving = step.moving_variance
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(moving.shape, dtype=moving.dtype, device=x.device)
    scale = torch.empty(moving.shape, dtype=moving.dtype, device=x.device)
    out, new = (y, mean, scale), 1 - step.momentum
    if len(x) == 1:
        torch.native_batch_norm(x, gamma, beta, None, None, True, new, step.epsilon, out=out)
        step.moving_mean.lerp_(mean, new)
        moving.mul_(step.momentum)  # The variance of one number is 0.
        return out
    # The operation follows the variance times count / (count - 1), Keras the variance itself.
    grown, shrunk = _factors(len(x), moving.dtype)
    variance = moving * grown
    torch.native_batch_norm(x, gamma, beta, step.moving_mean, variance, True, new, step.epsilon, out=out)
    torch.mul(variance, shrunk, out=moving)
    return out


def _window_of(step: Step, kernel: torch.Tensor, rows: torch.Tensor, shape: tuple[int, ...]) -> Window | None:
    """How a unit's convolution is called, or None where it is a matrix product."""
    size = tuple(kernel.shape[:2])
    pointwise = size == (1, 1) and step.stride == 1 and not step.depthwise
    unpadded = isinstance(step.padding, str) or not any(map(any, step.padding))
    if pointwise and unpadded and (len(rows) <= MOST_ROWS or rows.is_cuda):
        return None
    return _window(step.padding, size, shape[1:], step.stride, step.dilation)


def _weight(step: Step, kernel: torch.Tensor, dtype: torch.dtype, window: Window | None) -> torch.Tensor:
    """A kernel of Keras as PyTorch's operations take it: a matrix, or (out, in / groups, height, width)."""
    kernel = kernel if kernel.dtype is dtype else kernel.to(dtype)
    if window is None:
        return kernel.view(kernel.shape[2:])
    axes = (2, 3, 0, 1) if step.depthwise else (3, 2, 0, 1)
    return kernel.permute(axes).contiguous() if torch.is_grad_enabled() else _copy(kernel, axes)


def _keras_kernel(step: Step, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of `_weight` for that of the kernel: contiguous too, so that autograd takes it over as it is."""
    return _copy(weight, (2, 3, 0, 1) if step.depthwise else (2, 3, 1, 0))


def _convolution(step: Step, images: torch.Tensor, weight: torch.Tensor, window: Window) -> torch.Tensor:
    stride, dilation = [step.stride] * 2, [step.dilation] * 2
    groups = len(weight) if step.depthwise else 1
    return torch.convolution(images, weight, None, stride, window.padding, dilation, False, [0, 0], groups)


def _convolve_backward(
    step: Step,
    window: Window,
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    of_images: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the images and of the kernel; None for what is not wanted."""
    if step.depthwise and step.dilation > 1 and step.stride == 1 and images.device.type == "cpu":
        return _dilated_backward(step.dilation, window.padding, gradient, images, weight, [of_images, of_weight, False])
    stride, dilation = [step.stride] * 2, [step.dilation] * 2
    groups, mask = len(weight) if step.depthwise else 1, [of_images, of_weight, False]
    return _convolution_backward(
        gradient, images, weight, None, stride, window.padding, dilation, False, [0, 0], groups, mask
    )[:2]


def _dilated_backward(
    dilation: int,
    padding: list[int],
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    mask: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a dilated depthwise convolution, whose own gradients are slow on a CPU.

    Every `dilation`-th pixel is an image of its own, which the kernel meets without gaps. For 32 images of 12x12x336
    and dilation 4 (one x86 core, PyTorch 2.14) 12 ms instead of 45, for 4 of 65x65x960 0.35 s instead of 1.24.
    """
    inner, outer = [0, 0], [0, 0]
    for axis, pad in enumerate(padding):
        (inner if pad % dilation == 0 else outer)[axis] = pad
    inner = [pad // dilation for pad in inner]
    height, width = images.shape[2:]
    source = _every(images, outer, dilation)
    size = [n + 2 * pad - k + 1 for n, pad, k in zip(source.shape[2:], inner, weight.shape[2:], strict=True)]
    g = _every(gradient, [0, 0], dilation, size)
    by_images, by_weight, _ = _convolution_backward(
        g, source, weight, None, [1, 1], inner, [1, 1], False, [0, 0], len(weight), mask
    )
    if mask[0]:
        c, h, w = by_images.shape[1:]
        whole = by_images.permute(0, 2, 3, 1).reshape(-1, dilation, dilation, h, w, c).permute(0, 3, 1, 4, 2, 5)
        whole = whole.reshape(-1, h * dilation, w * dilation, c).permute(0, 3, 1, 2)
        by_images = whole[:, :, outer[0] : outer[0] + height, outer[1] : outer[1] + width]
    return by_images, by_weight


def _every(images: torch.Tensor, padding: list[int], dilation: int, size: Sequence[int] | None = None) -> torch.Tensor:
    """Every `dilation`-th pixel of padded NCHW images as images, (batch * dilation ** 2, channels, height, width).

    Args:
        images: to be padded on all sides.
        padding: of (height, width).
        dilation: pixels from one to the next.
        size: (height, width) of the result; by default what all pixels fill. Zeros fill the rest.
    """
    n, c, *sides = images.shape
    sides = [side + 2 * pad for side, pad in zip(sides, padding, strict=True)]
    size = [-(-side // dilation) for side in sides] if size is None else size
    bottom, right = (count * dilation - side for count, side in zip(size, sides, strict=True))
    if any(padding) or bottom or right:
        images = F.pad(images, (padding[1], padding[1] + right, padding[0], padding[0] + bottom))
    rows = images.permute(0, 2, 3, 1).reshape(n, size[0], dilation, size[1], dilation, c)
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, *size, c).permute(0, 3, 1, 2)


def _padded(images: torch.Tensor, window: Window) -> torch.Tensor:
    return F.pad(images, window.around) if window.around else images


def _relu6_with_zeros(images: torch.Tensor, around: tuple[int, int, int, int]) -> torch.Tensor:
    """ReLU6 of images with zeros around them: written where the convolution reads it, not copied there."""
    left, right, top, bottom = around
    n, c, h, w = images.shape
    size = (n, h + top + bottom, w + left + right, c)
    own: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
    if math.prod(size) <= FEW_NUMBERS:
        padded = torch.zeros(size, **own)
    else:
        padded = torch.empty(size, **own)
        for zeros in (padded[:, :top], padded[:, top + h :], padded[:, :, :left], padded[:, :, left + w :]):
            zeros.zero_()
    padded = _permuted(padded, (0, 3, 1, 2))
    torch.clamp(images, 0.0, 6.0, out=_inside(padded, around))
    return padded


def _inside(images: torch.Tensor, around: tuple[int, int, int, int]) -> torch.Tensor:
    """The view of NCHW images without the zeros around them."""
    left, right, top, bottom = around
    n, c, h, w = images.shape
    if not images.is_contiguous(memory_format=torch.channels_last):
        # As some devices give the gradient of the images.
        return images[:, :, top : h - bottom, left : w - right]
    size, offset = (n, c, h - top - bottom, w - left - right), images.storage_offset() + (top * w + left) * c
    return images.as_strided(size, (h * w * c, 1, w * c, c), offset)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """NHWC images as rows."""
    return x.view(-1, x.shape[3]) if x.is_contiguous() else x.contiguous().view(-1, x.shape[3])


# Each of these is one call, where `permute`, `view` and `t` are two or three.


def _images(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows as NCHW images, in PyTorch's channels-last format; what are images stays."""
    if rows.dim() == 4:
        return rows
    (n, h, w), c = shape, rows.shape[1]
    return rows.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _rows(images: torch.Tensor) -> torch.Tensor:
    """NCHW images as rows; copied where they are not in the channels-last format."""
    n, c, h, w = images.shape
    if not images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).reshape(-1, c)
    return images.as_strided((n * h * w, c), (c, 1))


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    return matrix.as_strided((columns, rows), (1, columns))


def _permuted(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    strides = x.stride()
    return x.as_strided([x.shape[axis] for axis in axes], [strides[axis] for axis in axes])


def _copy(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """`x` with its axes in another order, contiguous."""
    permuted = _permuted(x, axes)
    return torch.empty(permuted.shape, dtype=x.dtype, device=x.device).copy_(permuted)


def _differentiable_gradients(
    ctx: Any, x: torch.Tensor, parameters: Sequence[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients by operations that autograd knows, computed again, where they are to be differentiated."""
    images = x.permute(0, 3, 1, 2)
    for i, step in enumerate(ctx.steps):
        kernel, gamma, beta = parameters[3 * i : 3 * i + 3]
        window = _window(step.padding, tuple(kernel.shape[:2]), tuple(images.shape[2:]), step.stride, step.dilation)
        weight = _weight(step, kernel, images.dtype, window)
        images = _convolution(step, _padded(images, window), weight, window)
        images = torch.native_batch_norm(images, gamma, beta, None, None, True, 0.0, step.epsilon)[0]
        images = F.hardtanh(images, 0.0, 6.0) if step.relu6 else images
    y = images.permute(0, 2, 3, 1)
    y = y + x if ctx.shortcut else y
    needed = ctx.needs_input_grad[2:]
    wanted = [tensor for tensor, need in zip([x, *parameters], needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]
