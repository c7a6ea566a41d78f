"""The operations written with `keras.ops`: right on every backend, and the reference for the fast ones."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_mnv2.annotations import Tensor
from keras_mnv2.ops.padding import Padding, spatial_padding

# Signed weights without -128, so that they are symmetric (Jacob et al. 2018, section 3.1).
WEIGHT_LEVELS = 127


def runs_directly(layer: Any, inputs: Any) -> bool:
    """Whether a layer of one operation may skip Keras's bookkeeping for these inputs.

    It costs 0.1 to 0.2 ms a layer where nothing is compiled, and finds nothing to do.

    Args:
        layer: of `keras_mnv2.layers`.
        inputs: a tensor, or a list of them.
    """
    return False


def run_later(call: Any) -> Tensor | None:
    """The output of a call that is computed once somebody needs it, or None where it is computed at once.

    Args:
        call: of `keras_mnv2.layers.fusing`; its `evaluate()` computes it.
    """
    return None


def compiled(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """`function`, compiled where Keras's backend leaves that to the model; it is asked for with `jit_compile=True`.

    Args:
        function: of images and of whether they are trained on.
        x: the images.
    """
    return function


def is_compiling() -> bool:
    """Whether a compiler that cannot compile layers one by one is at work; each is then called by `uncompiled`."""
    return False


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives, run as it is while a compiler is at work around it."""
    return function(*args, **kwargs)


def versions(call: Any) -> int | None:
    """A number that changes with the variables and images that a call reads, or None where nobody counts."""
    return None


def note(output: Tensor, call: Any) -> Tensor:
    """Gives `output`, and remembers which call it is of where that helps those that read it."""
    return output


def call_of(x: Tensor) -> Any:
    """The call that `x` is the output of, where one is known."""
    return None


def numbers(x: Tensor) -> Tensor:
    """`x` as a tensor that can be read."""
    return x


def known(x: Tensor) -> Tensor:
    """`x` as a tensor that can be read, as `settled` gives it where it has done so already."""
    return x


def settled(x: Tensor) -> Tensor:
    """`x` as a tensor that can be read, computed as part of its block where it is the end of one."""
    return x


def folds_noted(x: Tensor) -> bool:
    """Whether a batch norm in inference should fold itself into the convolution that gave `x`."""
    return False


def is_watched(layer: Any) -> bool:
    """Whether somebody has asked to be told of each call of `layer`."""
    return False


def fold(
    kernel: Tensor, depthwise: bool, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Kernel and bias that compute a convolution and its batch norm (Jacob et al. 2018, equation 14).

    Args:
        kernel: (height, width, in, out), or (height, width, channels, 1) of a depthwise convolution.
        depthwise: which of the two.
        gamma: scale, (channels,).
        beta: shift, (channels,).
        mean: (channels,).
        variance: (channels,).
        epsilon: what is added to the variance.

    Returns:
        A kernel of the same shape, and a bias (channels,).
    """
    scale = gamma * ops.rsqrt(variance + epsilon)
    # The scale runs along the last axis of a dense kernel, and the one before in a depthwise one.
    along = ops.expand_dims(scale, -1) if depthwise else scale
    return kernel * along, beta - mean * scale


def lay_out(kernel: Tensor, depthwise: bool) -> Any:
    """A kernel in the form in which several calls of `convolution` read it fastest."""
    return kernel


def moving_average(moving: Tensor, value: Tensor, momentum: float) -> Tensor:
    """`moving * momentum + value * (1 - momentum)`."""
    return moving * momentum + value * (1 - momentum)


def block_in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, hidden_size: int) -> Tensor:
    """Gives `function(x)`, in inference computed for some images at a time where that is faster.

    Args:
        function: from images to images.
        x: images; the first axis is the batch.
        hidden_size: the most numbers that `function` holds for one image.
    """
    return function(x)


def network_in_chunks(function: Callable[[Tensor], Any], x: Tensor, hidden_size: int) -> Any:
    """Like `block_in_chunks`, for the network as a whole; `function` may give several tensors."""
    return function(x)


def train_block(units: Any, x: Tensor, shortcut: bool) -> Tensor | None:
    """The output of a block in training, with the moving statistics changed, or None where it runs unit by unit.

    Args:
        units: of `keras_mnv2.layers.fusing`.
        x: images.
        shortcut: whether to add `x`.
    """
    return None


def relu6(x: Tensor) -> Tensor:
    """`min(max(x, 0), 6)` of a tensor that nobody else holds: it may be overwritten."""
    return ops.relu6(x)


def convolution(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    depthwise: bool = False,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    data_format: str = "channels_last",
) -> Tensor:
    """2D convolution, dense or depthwise.

    Args:
        x: images, NHWC (or NCHW with `data_format="channels_first"`).
        kernel: (height, width, in, out), or (height, width, channels, 1) of a depthwise convolution.
        bias: (out,), or None.
        depthwise: which of the two.
        stride: of both sides.
        padding: `"same"` as TensorFlow pads, `"symmetric"` as PyTorch does, `"valid"`, or the zeros before and after
            each side.
        dilation: of both sides; above 1 only with stride 1.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        The convolved images, in the layout and dtype of `x`.

    Examples:
        >>> tuple(convolution(np.ones((1, 8, 8, 3)), np.ones((3, 3, 3, 16)), stride=2).shape)
        (1, 4, 4, 16)
    """
    size = x.shape[1:3] if data_format == "channels_last" else x.shape[2:4]
    pairs = spatial_padding(padding, kernel.shape[:2], size, stride, dilation)
    if pairs is not None and any(map(any, pairs)):
        channels_last = data_format == "channels_last"
        x = ops.pad(x, [(0, 0), *pairs, (0, 0)] if channels_last else [(0, 0), (0, 0), *pairs])
    y = (ops.depthwise_conv if depthwise else ops.conv)(
        x,
        kernel,
        strides=stride,
        padding="same" if pairs is None else "valid",
        data_format=data_format,
        dilation_rate=dilation,
    )
    if bias is not None:
        y = y + (bias if data_format == "channels_last" else ops.reshape(bias, (-1, 1, 1)))
    return y


def batch_normalization(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    data_format: str = "channels_last",
    synchronized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the statistics of the batch, as in training (Ioffe and Szegedy 2015, algorithm 1).

    Args:
        x: NHWC (or NCHW with `data_format="channels_first"`).
        gamma: scale, (channels,), or None.
        beta: shift, (channels,), or None.
        epsilon: what is added to the variance.
        data_format: `"channels_last"` or `"channels_first"`.
        synchronized: whether the statistics are those of all processes. It matters on PyTorch alone:
            JAX's compiler takes them over the whole sharded batch anyway, and on TensorFlow the layer
            leaves it to Keras's own synchronised batch norm.

    Returns:
        The normalised `x` in its dtype; the mean; the variance, both (channels,) in float32 at least. The
        variance is the biased one (divided by N, not N - 1), as in Keras.
    """
    axis = -1 if data_format == "channels_last" else 1
    axes = [0, 1, 2] if axis == -1 else [0, 2, 3]
    # Not `result_type(x.dtype, "float32")`: it is float32 for float64 on JAX and PyTorch.
    dtype = keras.backend.standardize_dtype(x.dtype)
    wide = ops.cast(x, "float32") if dtype in ("float16", "bfloat16") else x
    mean, variance = ops.moments(wide, axes=axes)
    y = ops.batch_normalization(wide, mean, variance, axis=axis, offset=beta, scale=gamma, epsilon=epsilon)
    return ops.cast(y, x.dtype), mean, variance


def normalize(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    data_format: str = "channels_last",
) -> Tensor:
    """Normalises by given statistics, as in inference; arguments as for `batch_normalization`."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    wide = ops.cast(x, "float32") if dtype in ("float16", "bfloat16") else x
    axis = -1 if data_format == "channels_last" else 1
    y = ops.batch_normalization(wide, mean, variance, axis=axis, offset=beta, scale=gamma, epsilon=epsilon)
    return ops.cast(y, dtype)


def fake_quantize(x: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Rounds to 256 levels, one of which is 0, between about `minimum` and `maximum`.

    The levels are those of Jacob et al. 2018, section 3, and of TensorFlow's operation of this name: the range is
    moved so that 0 is a level. Gradients pass inside the range and are 0 outside; the range has none.

    Args:
        x: of any shape.
        minimum: scalar of at most 0.
        maximum: scalar of at least 0.

    Returns:
        The rounded `x`.

    Examples:
        >>> [float(v) for v in fake_quantize(np.array([-9.0, 0.0, 1.2]), np.array(-127.0), np.array(128.0))]
        [-9.0, 0.0, 1.0]
    """
    minimum, maximum = (ops.stop_gradient(ops.convert_to_tensor(end)) for end in (minimum, maximum))
    # A tensor of zeros has an empty range.
    scale = ops.maximum((maximum - minimum) / 255, 1e-12)
    zero_point = ops.round(-minimum / scale)
    inside = ops.clip(x, (0 - zero_point) * scale, (255 - zero_point) * scale)
    return inside + ops.stop_gradient(ops.round(inside / scale) * scale - inside)


def round_to_multiples(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds to multiples of a scale; the gradient passes as if nothing were rounded.

    Args:
        x: of any shape; at most 127 times the scale, as weights of 8 bits are.
        scale: of the number of axes of `x`, each of its size or 1.

    Returns:
        The rounded `x`.

    Examples:
        >>> [float(v) for v in round_to_multiples(np.array([-1.0, 0.125, 1.375]), np.array([0.5]))]
        [-1.0, 0.0, 1.5]
    """
    x, scale = ops.convert_to_tensor(x), ops.convert_to_tensor(scale)
    return x + ops.stop_gradient(ops.round(x / scale) * scale - x)


def resize(x: Tensor, size: Sequence[Any], data_format: str) -> Tensor:
    """Images of another size, bilinearly, without antialiasing and without aligned corners.

    Args:
        x: NHWC or NCHW.
        size: height and width; on TensorFlow they may be tensors.
        data_format: of `x`.
    """
    return ops.image.resize(x, tuple(size), interpolation="bilinear", data_format=data_format)


def take_of_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Of each row of `x` (batch, n) the values at its indices (batch, m), int32: (batch, m)."""
    return ops.take_along_axis(x, indices, axis=1)
