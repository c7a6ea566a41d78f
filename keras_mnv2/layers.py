"""The layers of the network: convolution with normalisation and activation, and the inverted residual."""

import math
from typing import Any

import keras

from keras_mnv2 import ops
from keras_mnv2.architecture import hidden_channels
from keras_mnv2.arguments import (
    activation_function,
    check_choice,
    check_positive,
    check_rate,
    check_whole,
    data_format_name,
    norm_config,
)
from keras_mnv2.initializers import Normal
from keras_mnv2.ops.padding import PADDINGS, output_size

SHORTCUTS = ("bottleneck", "expansion", None)

# PyTorch's BatchNorm2d default, 0.1, in Keras's convention (1 - momentum). The 0.999 of keras.applications
# needs thousands of steps before the moving statistics mean anything: a model trained from scratch does
# not validate until then.
NORM_MOMENTUM = 0.9
NORM_EPSILON = 1e-3


class _Block(keras.layers.Layer):
    """A layer of one tensor that is called without Keras's bookkeeping where `ops` finds that worthwhile."""

    def __call__(self, *args, **kwargs):
        # An explicit `training=False` is what `predict` and `evaluate` hand down.
        plain = self.built and len(args) == 1 and kwargs == {"training": False} and not self.activity_regularizer
        if plain and self.compute_dtype == self.variable_dtype and ops.calls_directly(args[0], self.compute_dtype):
            return self.call(args[0], training=False)
        return super().__call__(*args, **kwargs)


@keras.saving.register_keras_serializable("keras_mnv2")
class ConvNormActivation(_Block):
    """Convolution, normalisation, activation.

    In inference, batch normalisation is folded into the kernel on the fly (Jacob et al. 2018, section
    3.2), so that the images are read and written once. Initial kernels are He normal by fan out as
    PyTorch counts it: standard deviation sqrt(2 / (height * width * filters)), depthwise kernels too.

    Args:
        filters: output channels.
        kernel_size: side of the kernel.
        stride: stride of both sides, 1 or 2.
        groups: 1 for a dense convolution; `filters`, equal to the input channels, for a depthwise one.
        padding: `"same"` as TensorFlow pads (the odd zero at the end), or `"symmetric"` as PyTorch does
            (`(kernel_size - 1) // 2 * dilation_rate` on both sides).
        dilation_rate: of both sides; above 1 only with stride 1.
        activation: name or function of Keras, or None.
        norm_layer: `"batch_norm"`; `"sync_batch_norm"`, with statistics over all replicas; `"group_norm"`,
            in groups of 8 channels (Wu and He 2018); a Keras layer or layer class, of which each place
            gets a copy as it stands; or None, which gives the convolution a bias.
        norm_momentum: share of the old moving statistics that a step keeps. Keras's convention: it is 1
            minus PyTorch's. The default 0.9 is PyTorch's 0.1.
        norm_epsilon: what is added to the variance; 1e-3 in Keras, 1e-5 in PyTorch.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        NHWC `(batch, height, width, channels)`, or NCHW with `data_format="channels_first"`.

    Output shape:
        The same layout with `filters` channels and each side divided by the stride, rounded up.

    Raises:
        ValueError: on an argument out of range, or `groups` that does not fit the input.

    Example:

    >>> tuple(ConvNormActivation(32, stride=2)(np.ones((1, 224, 224, 3))).shape)
    (1, 112, 112, 32)
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        stride=1,
        groups=1,
        padding="same",
        dilation_rate=1,
        activation="relu6",
        norm_layer="batch_norm",
        norm_momentum=NORM_MOMENTUM,
        norm_epsilon=NORM_EPSILON,
        data_format=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_whole("filters", filters)
        check_whole("kernel_size", kernel_size)
        check_choice("stride", stride, (1, 2))
        check_choice("groups", groups, (1, filters))
        check_choice("padding", padding, PADDINGS)
        check_whole("dilation_rate", dilation_rate)
        if stride > 1 and dilation_rate > 1:
            raise ValueError(f"dilation_rate must be 1 where stride is {stride}, got {dilation_rate!r}.")
        check_rate("norm_momentum", norm_momentum)
        check_positive("norm_epsilon", norm_epsilon)
        self.filters = filters
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        self.padding = padding
        self.dilation_rate = dilation_rate
        self.activation = activation_function("activation", activation)
        self.norm_layer = norm_config(norm_layer)
        self.norm_momentum = norm_momentum
        self.norm_epsilon = norm_epsilon
        self.data_format = data_format_name(data_format)
        self.norm: Any = None
        self.kernel: Any = None
        self.bias: Any = None
        self._fused_norm = False

    def build(self, input_shape):
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        depthwise = self.groups > 1
        if depthwise and channels != self.groups:
            raise ValueError(f"groups must be 1 or the number of input channels, {channels}, got {self.groups}.")
        # Autocast is off so that folding happens in the kernel's own precision.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, self.kernel_size, channels, 1 if depthwise else self.filters),
            initializer=Normal(math.sqrt(2 / (self.kernel_size**2 * self.filters))),
            autocast=False,
        )
        ops.lay_out_kernel(self.kernel)
        self.norm = self._make_norm()
        if self.norm is None:
            self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros", autocast=False)
        else:
            self.norm.build(self.compute_output_shape(input_shape))
            self._fused_norm = _is_plain_batch_norm(self.norm, self.data_format)

    def call(self, inputs, training=None):
        norm = self.norm
        if norm is None:
            y = self._convolve(inputs, self.kernel.value, self.bias.value)
        elif not self._fused_norm:
            y = norm(self._convolve(inputs, self.kernel.value))
        elif training and norm.trainable:
            y, mean, variance = ops.batch_normalization(
                self._convolve(inputs, self.kernel.value),
                norm.gamma,
                norm.beta,
                norm.epsilon,
                self.data_format,
                synchronized=self.norm_layer == "sync_batch_norm",
            )
            keep = norm.momentum
            norm.moving_mean.assign(norm.moving_mean * keep + mean * (1 - keep))
            norm.moving_variance.assign(norm.moving_variance * keep + variance * (1 - keep))
        else:
            y = self._convolve(inputs, *self.folded(norm.moving_mean, norm.moving_variance))
        return ops.relu6(y) if self.activation is keras.activations.relu6 else self.activation(y)

    def folded(self, mean, variance):
        """Kernel and bias that compute the convolution and its batch norm with these statistics."""
        scale = self.norm.gamma * keras.ops.rsqrt(variance + self.norm.epsilon)
        # The scale runs along the last axis of a dense kernel, and the one before in a depthwise one.
        along = scale if self.groups == 1 else keras.ops.expand_dims(scale, -1)
        return self.kernel * along, self.norm.beta - mean * scale

    def compute_output_shape(self, input_shape):
        last = self.data_format == "channels_last"
        sides = input_shape[1:3] if last else input_shape[2:4]
        sides = [output_size(n, self.kernel_size, self.stride, self.dilation_rate, self.padding) for n in sides]
        return (input_shape[0], *sides, self.filters) if last else (input_shape[0], self.filters, *sides)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "groups": self.groups,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "activation": keras.activations.serialize(self.activation),
            "norm_layer": self.norm_layer,
            "norm_momentum": self.norm_momentum,
            "norm_epsilon": self.norm_epsilon,
            "data_format": self.data_format,
        }

    def _convolve(self, inputs, kernel, bias=None):
        convolution = ops.convolution if self.groups == 1 else ops.depthwise_convolution
        if self.compute_dtype != self.variable_dtype:
            kernel = keras.ops.cast(kernel, inputs.dtype)
            bias = None if bias is None else keras.ops.cast(bias, inputs.dtype)
        return convolution(
            inputs,
            kernel,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation_rate,
            data_format=self.data_format,
        )

    def _make_norm(self):
        axis = -1 if self.data_format == "channels_last" else 1
        if self.norm_layer is None:
            return None
        own = {"name": "norm", "dtype": self.dtype_policy, "trainable": self.trainable}
        common = {**own, "epsilon": self.norm_epsilon, "axis": axis}
        if self.norm_layer in ("batch_norm", "sync_batch_norm"):
            # On JAX and PyTorch it is `ops.batch_normalization` that looks at all replicas.
            synchronized = self.norm_layer == "sync_batch_norm" and keras.backend.backend() == "tensorflow"
            return keras.layers.BatchNormalization(momentum=self.norm_momentum, synchronized=synchronized, **common)
        if self.norm_layer == "group_norm":
            return keras.layers.GroupNormalization(groups=self.filters // math.gcd(self.filters, 8), **common)
        # A layer of the caller's: a copy of the prototype, in this layer's precision.
        config = {**self.norm_layer["config"], **own}
        config["trainable"] = self.trainable and self.norm_layer["config"].get("trainable", True)
        return keras.saving.deserialize_keras_object({**self.norm_layer, "config": config})


@keras.saving.register_keras_serializable("keras_mnv2")
class InvertedResidual(_Block):
    """Inverted residual with linear bottleneck (Sandler et al. 2018, section 3.3 and Table 1).

    A 1x1 convolution expands the channels (absent when `expand_ratio` is 1), a 3x3 depthwise convolution
    filters them, a 1x1 convolution projects them back, without activation. The input is added where the
    stride is 1 and input and output channels agree.

    Args:
        filters: output channels.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: hidden over input channels; the hidden width is `round(in_channels * expand_ratio)`.
        dilation_rate: of the depthwise convolution; above 1 only with stride 1.
        padding: `"same"` or `"symmetric"`, see `ConvNormActivation`.
        activation: after the expansion and the depthwise convolution.
        norm_layer: see `ConvNormActivation`.
        norm_momentum: see `ConvNormActivation`.
        norm_epsilon: see `ConvNormActivation`.
        stochastic_depth: probability of leaving out the residual branch of an image in training
            (Huang et al. 2016); without effect on a block that has no shortcut.
        linear_bottleneck: False puts the activation after the projection too (the paper's Figure 6a).
        shortcut: what the addition connects: `"bottleneck"`, input and output; `"expansion"`, the two
            wide layers before and after the depthwise convolution; or None, nothing (Figure 6b).
        return_expansion: True returns a pair, the output and the expanded input (what SSDLite reads).
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        NHWC `(batch, height, width, channels)`, or NCHW with `data_format="channels_first"`.

    Output shape:
        The same layout with `filters` channels and each side divided by the stride, rounded up.

    Raises:
        ValueError: on an argument out of range.

    Example:

    >>> tuple(InvertedResidual(24, stride=2, expand_ratio=6)(np.ones((1, 112, 112, 16))).shape)
    (1, 56, 56, 24)
    """

    convolution = ConvNormActivation

    def __init__(
        self,
        filters,
        stride=1,
        expand_ratio=6,
        dilation_rate=1,
        padding="same",
        activation="relu6",
        norm_layer="batch_norm",
        norm_momentum=NORM_MOMENTUM,
        norm_epsilon=NORM_EPSILON,
        stochastic_depth=0.0,
        linear_bottleneck=True,
        shortcut="bottleneck",
        return_expansion=False,
        data_format=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive("expand_ratio", expand_ratio)
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_rate("stochastic_depth", stochastic_depth)
        self.filters = filters
        self.stride = stride
        self.expand_ratio = expand_ratio
        self.dilation_rate = dilation_rate
        self.padding = padding
        self.activation = activation_function("activation", activation)
        self.norm_layer = norm_config(norm_layer)
        self.norm_momentum = norm_momentum
        self.norm_epsilon = norm_epsilon
        self.stochastic_depth = stochastic_depth
        self.linear_bottleneck = linear_bottleneck
        self.shortcut = shortcut
        self.return_expansion = return_expansion
        self.data_format = data_format_name(data_format)
        self.residual = False
        self.expand: ConvNormActivation | None = None
        self.depthwise: Any = None
        self.project: Any = None
        self.drop = None

    def build(self, input_shape):
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        hidden = hidden_channels(channels, self.expand_ratio)
        self.residual = self.shortcut is not None and self.stride == 1 and channels == self.filters
        if self.expand_ratio != 1:
            self.expand = self._conv(hidden, "expand", kernel_size=1)
        self.depthwise = self._conv(
            hidden, "depthwise", stride=self.stride, dilation_rate=self.dilation_rate, groups=hidden
        )
        activation = None if self.linear_bottleneck else self.activation
        self.project = self._conv(self.filters, "project", kernel_size=1, activation=activation)
        if self.residual and self.stochastic_depth:
            self.drop = keras.layers.Dropout(
                self.stochastic_depth, noise_shape=(None, 1, 1, 1), name="drop", dtype=self.dtype_policy
            )
        # By hand, since Keras would otherwise trace the whole block to find these shapes.
        shape = input_shape
        for conv in (self.expand, self.depthwise, self.project):
            if conv is not None:
                conv.build(shape)
                shape = conv.compute_output_shape(shape)

    def call(self, inputs, training=None):
        sides = inputs.shape[1:3] if self.data_format == "channels_last" else inputs.shape[2:4]
        if training or self.return_expansion or None in sides:
            return self._transform(inputs, training)
        hidden = self.depthwise.filters * math.prod(sides)
        return ops.block_in_chunks(lambda x: self._transform(x, training), inputs, hidden)

    def _transform(self, inputs, training):
        # `conv.call`, not `conv()`: the bookkeeping of a layer call costs an eager backend about 0.1 ms.
        expanded = inputs if self.expand is None else self.expand.call(inputs, training=training)
        x = self.depthwise.call(expanded, training=training)
        if self.residual and self.shortcut == "expansion":
            x = self._sum(expanded, self._drop(x, training), training)
        x = self.project.call(x, training=training)
        if self.residual and self.shortcut == "bottleneck":
            x = self._sum(inputs, self._drop(x, training), training)
        return (x, expanded) if self.return_expansion else x

    def compute_output_shape(self, input_shape):
        last = self.data_format == "channels_last"
        sides = input_shape[1:3] if last else input_shape[2:4]
        hidden = hidden_channels(input_shape[-1 if last else 1], self.expand_ratio)
        out = [output_size(n, 3, self.stride, self.dilation_rate, self.padding) for n in sides]
        if last:
            shape, expansion = (input_shape[0], *out, self.filters), (input_shape[0], *sides, hidden)
        else:
            shape, expansion = (input_shape[0], self.filters, *out), (input_shape[0], hidden, *sides)
        return (shape, expansion) if self.return_expansion else shape

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "stride": self.stride,
            "expand_ratio": self.expand_ratio,
            "dilation_rate": self.dilation_rate,
            "padding": self.padding,
            "activation": keras.activations.serialize(self.activation),
            "norm_layer": self.norm_layer,
            "norm_momentum": self.norm_momentum,
            "norm_epsilon": self.norm_epsilon,
            "stochastic_depth": self.stochastic_depth,
            "linear_bottleneck": self.linear_bottleneck,
            "shortcut": self.shortcut,
            "return_expansion": self.return_expansion,
            "data_format": self.data_format,
        }

    def _conv(self, filters, name, **kwargs):
        common = {
            "padding": self.padding,
            "activation": self.activation,
            "norm_layer": self.norm_layer,
            "norm_momentum": self.norm_momentum,
            "norm_epsilon": self.norm_epsilon,
            "data_format": self.data_format,
            "dtype": self.dtype_policy,
            "trainable": self.trainable,
            "name": name,
        }
        return self.convolution(filters, **{**common, **kwargs})

    def _sum(self, shortcut, branch, training):
        return shortcut + branch

    def _drop(self, x, training):
        return x if self.drop is None else self.drop(x, training=training)


@keras.saving.register_keras_serializable("keras_mnv2")
class ScaleShift(keras.layers.Layer):
    """`x * scale + shift` with a number of each a channel: what a batch norm is in inference.

    Args:
        axis: of the channels.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        Any.

    Output shape:
        The same.

    Example:

    >>> tuple(ScaleShift()(np.ones((2, 7, 7, 16))).shape)
    (2, 7, 7, 16)
    """

    def __init__(self, axis=-1, **kwargs):
        super().__init__(**kwargs)
        self.axis = axis
        self.scale: Any = None
        self.shift: Any = None

    def build(self, input_shape):
        channels = (input_shape[self.axis],)
        self.scale = self.add_weight(name="scale", shape=channels, initializer="ones")
        self.shift = self.add_weight(name="shift", shape=channels, initializer="zeros")

    def call(self, inputs, training=None, mask=None):
        # The unused arguments are those of the batch norm whose place it takes in a graph.
        scale, shift = self.factors(inputs)
        return inputs * scale + shift

    def factors(self, inputs):
        """Scale and shift in a shape that broadcasts over `inputs`."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        return keras.ops.reshape(self.scale, shape), keras.ops.reshape(self.shift, shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis}


def _is_plain_batch_norm(norm, data_format):
    channels = -1 if data_format == "channels_last" else 1
    plain = type(norm) is keras.layers.BatchNormalization and norm.scale and norm.center
    return plain and norm.axis in (channels, channels % 4) and not (norm.renorm or norm.synchronized)
