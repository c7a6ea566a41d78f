"""The operations on TensorFlow: its own padding, bias and batch norm kernels.

Channels-first images are transposed on a CPU, where TensorFlow has a kernel for them only with oneDNN, which it takes
by itself on some processors alone. Dilations go through `keras.ops`. On a CPU the gradients of 1x1 convolutions, and of
dilated depthwise ones on small images, are our own. `jit_compile=True` is never used on a CPU: XLA's depthwise
convolution is ten times slower there.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_mnv2.annotations import Tensor
from keras_mnv2.ops import default
from keras_mnv2.ops.padding import Padding, spatial_padding

relu6 = tf.nn.relu6


def note(output: Tensor, call: Any) -> Tensor:
    """A batch norm then folds itself into the convolution before it.

    In a graph alone, which leaves out what nobody reads: here the convolution without the batch norm.
    """
    if not tf.executing_eagerly():
        output._keras_mnv2_call = call
    return output


def call_of(x: Tensor) -> Any:
    return getattr(x, "_keras_mnv2_call", None)


def folds_noted(x: Tensor) -> bool:
    return call_of(x) is not None


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
    options: dict[str, Any] = {"depthwise": depthwise, "stride": stride, "padding": padding, "dilation": dilation}
    if data_format == "channels_first" and _on_cpu():
        images = tf.transpose(x, (0, 2, 3, 1))
        y = convolution(images, kernel, bias, **options)
        return tf.transpose(y, (0, 3, 1, 2))
    if data_format == "channels_last" and _mostly_zeros(x, kernel, **options):
        y = _dilated_depthwise(x, kernel, dilation)
    elif bias is None and _is_product(x, kernel, depthwise, stride, data_format):
        y = _pointwise(x, kernel)
    elif data_format == "channels_first" or dilation > 1:
        return default.convolution(x, kernel, bias, data_format=data_format, **options)
    else:
        x, mode = _padded(x, kernel, stride, padding)
        if depthwise:
            y = tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], mode)
        else:
            y = tf.nn.conv2d(x, kernel, stride, mode)
    # As an operation of its own: TensorFlow's graph optimiser fuses it, and the activation, into the convolution.
    return y if bias is None else tf.nn.bias_add(y, bias)


def _on_cpu() -> bool:
    return not tf.config.list_physical_devices("GPU")


def _is_product(x: Tensor, kernel: Tensor, depthwise: bool, stride: int, data_format: str) -> bool:
    """Whether a convolution without a bias is a matrix product of the pixels, in a graph on a CPU.

    Inference adds a bias (see `note`), which TensorFlow fuses into its own convolution alone.
    """
    return (
        not (depthwise or tf.executing_eagerly())
        and tuple(kernel.shape[:2]) == (1, 1)
        and (stride, data_format, x.dtype) == (1, "channels_last", tf.float32)
        and _on_cpu()
    )


def _pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    """A 1x1 convolution whose gradients are matrix products.

    Those of the network's own, at 16 images of 224x224, take 0.54 (images) and 0.85 (kernels) of the time of TensorFlow
    2.21's (two x86 cores); its forward pass is as fast as a product.
    """
    inputs, outputs = kernel.shape[2:]

    @tf.custom_gradient
    def convolve(x: Tensor, kernel: Tensor) -> Any:
        def gradients(gradient: Tensor) -> Any:
            pixels, rows = tf.reshape(x, (-1, inputs)), tf.reshape(gradient, (-1, outputs))
            of_x = tf.reshape(tf.matmul(rows, kernel[0, 0], transpose_b=True), tf.shape(x))
            return of_x, tf.matmul(pixels, rows, transpose_a=True)[None, None]

        return tf.nn.conv2d(x, kernel, 1, "VALID"), gradients

    return convolve(x, tf.convert_to_tensor(kernel))


def _mostly_zeros(x: Tensor, kernel: Tensor, depthwise: bool, stride: int, padding: Padding, dilation: int) -> bool:
    """Whether a dilated depthwise convolution pads small images to at least twice their pixels."""
    if not depthwise or dilation == 1 or stride > 1 or None in x.shape[1:]:
        return False
    sides = x.shape[1:3]
    pairs = spatial_padding(padding, kernel.shape[:2], sides, stride, dilation)
    around = [k // 2 * dilation for k in kernel.shape[:2]]
    if (
        any(k % 2 == 0 for k in kernel.shape[:2])
        or pairs is None
        or [(n, n) for n in around] != list(map(tuple, pairs))
    ):
        return False
    height, width = (n + 2 * zeros for n, zeros in zip(sides, around, strict=True))
    return height * width >= 2 * sides[0] * sides[1] and _on_cpu()


def _dilated_depthwise(x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
    """A depthwise convolution as files know it, whose gradients leave out the zeros around small images.

    Every `dilation`-th pixel is an image of its own, which the kernel meets without gaps. For 16 images of 8x8x336 and
    dilation 4 (two x86 cores, TensorFlow 2.21) both passes take 6.3 ms instead of 10.3. For 4 of 65x65x960 TensorFlow's
    own gradients are the faster ones.
    """
    height, width, channels = x.shape[1:]
    rows, columns = -(-height // dilation), -(-width // dilation)

    def by_pixels(x: Tensor, kernel: Tensor) -> Tensor:
        x = tf.pad(x, [[0, 0], [0, rows * dilation - height], [0, columns * dilation - width], [0, 0]])
        x = tf.transpose(tf.reshape(x, (-1, rows, dilation, columns, dilation, channels)), (0, 2, 4, 1, 3, 5))
        y = tf.nn.depthwise_conv2d(tf.reshape(x, (-1, rows, columns, channels)), kernel, [1, 1, 1, 1], "SAME")
        y = tf.transpose(tf.reshape(y, (-1, dilation, dilation, rows, columns, channels)), (0, 3, 1, 4, 2, 5))
        return tf.reshape(y, (-1, rows * dilation, columns * dilation, channels))[:, :height, :width]

    @tf.custom_gradient
    def convolve(x: Tensor, kernel: Tensor) -> Any:
        def gradients(gradient: Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                y = by_pixels(x, kernel)
            return tape.gradient(y, (x, kernel), gradient)

        return default.convolution(x, kernel, depthwise=True, dilation=dilation), gradients

    return convolve(x, tf.convert_to_tensor(kernel))


def batch_normalization(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    data_format: str = "channels_last",
    synchronized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if data_format == "channels_first" or x.dtype == tf.float64:
        return default.batch_normalization(x, gamma, beta, epsilon, data_format)
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.convert_to_tensor(gamma),
        offset=tf.convert_to_tensor(beta),
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        is_training=True,
    )
    # The kernel gives the unbiased variance; Keras keeps the biased one.
    count = tf.cast(tf.size(x) // tf.shape(x)[-1], variance.dtype)
    return y, mean, variance * (count - 1) / count


def fake_quantize(x: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """LiteRT's converter knows the operation."""
    return tf.quantization.fake_quant_with_min_max_vars(x, tf.stop_gradient(minimum), tf.stop_gradient(maximum))


def round_to_multiples(x: Tensor, scale: Tensor) -> Tensor:
    """See `keras_mnv2.ops.default.round_to_multiples`. LiteRT's converter takes the scale over from the operation."""
    x = tf.convert_to_tensor(x)
    if x.dtype != tf.float32 or tuple(scale.shape) not in ((1,) * x.ndim, (*(1,) * (x.ndim - 1), x.shape[-1])):
        return default.round_to_multiples(x, scale)

    @tf.custom_gradient
    def rounded(x: Tensor) -> Any:
        limit = tf.reshape(scale, [-1]) * default.WEIGHT_LEVELS
        if limit.shape[0] == x.shape[-1]:
            y = tf.quantization.fake_quant_with_min_max_vars_per_channel(x, -limit, limit, narrow_range=True)
        else:
            y = tf.quantization.fake_quant_with_min_max_vars(x, -limit[0], limit[0], narrow_range=True)
        return y, lambda gradient: gradient

    return rounded(x)


def resize(x: Tensor, size: Sequence[Any], data_format: str) -> Tensor:
    """See `keras_mnv2.ops.default.resize`. Keras's own (3.15) refuses a size that is not known yet."""
    if data_format == "channels_first":
        return tf.transpose(resize(tf.transpose(x, (0, 2, 3, 1)), size, "channels_last"), (0, 3, 1, 2))
    return tf.cast(tf.image.resize(x, size), x.dtype)


def take_of_rows(x: Tensor, indices: Tensor) -> Tensor:
    """See `keras_mnv2.ops.default.take_of_rows`. Keras's own (3.15) takes a dozen operations for it."""
    return tf.gather(x, indices, batch_dims=1)


def _padded(x: Tensor, kernel: Tensor, stride: int, padding: Padding) -> tuple[Tensor, str]:
    # Explicit paddings would save the copy, but the depthwise kernel aborts the process on them (2.21).
    if padding == "same":
        return x, "SAME"
    pairs = spatial_padding(padding, kernel.shape[:2], x.shape[1:3], stride, 1)
    assert pairs is not None
    same = spatial_padding("same", kernel.shape[:2], x.shape[1:3], stride, 1)
    if same is not None and list(map(tuple, pairs)) == list(map(tuple, same)):
        return x, "SAME"
    return tf.pad(x, [[0, 0], *pairs, [0, 0]]), "VALID"
