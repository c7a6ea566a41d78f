"""Layers of several operations: convolution with normalisation and activation, and the inverted residual."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from keras_mnv2 import ops
from keras_mnv2.annotations import Shape, Tensor
from keras_mnv2.architecture import hidden_channels
from keras_mnv2.arguments import activation_function, data_format_name, norm_config
from keras_mnv2.checks import check_choice, check_positive, check_rate, check_whole
from keras_mnv2.initializers import Normal
from keras_mnv2.layers.block import SHORTCUTS, Convolution, convolutions, join
from keras_mnv2.layers.fusing import Activation, Unit, is_plain
from keras_mnv2.layers.parts import BatchNormalization
from keras_mnv2.ops.padding import PADDINGS, output_size

# PyTorch's BatchNorm2d default, 0.1, in Keras's convention (1 - momentum). The 0.999 of keras.applications
# needs thousands of steps before the moving statistics mean anything: a model trained from scratch does
# not validate until then.
NORM_MOMENTUM = 0.9
NORM_EPSILON = 1e-3
# A name, a layer to copy, a layer class, the configuration of one, or nothing.
NormLayer: TypeAlias = str | keras.layers.Layer | type[keras.layers.Layer] | dict[str, Any] | None


class _Compact(keras.layers.Layer):
    """A layer of parts: called without Keras's bookkeeping where that finds nothing to do; keeps what parts are frozen.

    Subclasses give their parts by name in `_parts`.
    """

    def __init__(self, frozen: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._frozen = tuple(frozen)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.built and len(args) == 1 and kwargs == {"training": False}:
            direct = ops.runs_directly(self, args[0]) and is_plain(self)
            # Whoever watches a part is told only by its own `__call__`.
            parts = self._parts().values() if direct else ()
            if direct and all(is_plain(part) for part in parts if isinstance(part, keras.Layer)):
                return self.call(ops.numbers(args[0]), training=False)
        return super().__call__(*args, **kwargs)

    def _parts(self) -> dict[str, Any]:
        raise NotImplementedError

    def _freeze_parts(self) -> None:
        parts = self._parts()
        for name in self._frozen:
            if name in parts:
                parts[name].trainable = False

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Frozen parts of a frozen layer are what it says itself.
        frozen = [name for name, part in self._parts().items() if not part.trainable] if self.built else self._frozen
        if self.trainable and frozen:
            config["frozen"] = list(frozen)
        return config


def kernel_initializer(kernel_size: int, filters: int) -> Normal:
    """He normal by fan out as PyTorch counts it, depthwise kernels too (torchvision's `mobilenet_v2`)."""
    return Normal(math.sqrt(2 / (kernel_size**2 * filters)))


def make_norm(
    norm_layer: str | dict[str, Any] | None,
    filters: int,
    momentum: float,
    epsilon: float,
    data_format: str,
    make: Callable[..., Any] = lambda kind, *args, **arguments: kind(*args, **arguments),
    **own: Any,
) -> keras.layers.Layer | None:
    """The normalisation layer that `norm_layer`, in the form of `norm_config`, stands for.

    Args:
        norm_layer: as in `ConvNormActivation`.
        filters: channels.
        momentum: of a batch norm.
        epsilon: what is added to the variance.
        data_format: `"channels_last"` or `"channels_first"`.
        make: makes a layer from its class and arguments.
        **own: of the layer: name, dtype, trainable.
    """
    if norm_layer is None:
        return None
    common = {**own, "epsilon": epsilon, "axis": -1 if data_format == "channels_last" else 1}
    if norm_layer in ("batch_norm", "sync_batch_norm"):
        return make(BatchNormalization, momentum=momentum, synchronized=norm_layer == "sync_batch_norm", **common)
    if norm_layer == "group_norm":
        return make(keras.layers.GroupNormalization, groups=filters // math.gcd(filters, 8), **common)
    assert not isinstance(norm_layer, str)
    # A layer of the caller's: a copy of the prototype, in this place's precision.
    config = {**norm_layer["config"], **own}
    config["trainable"] = own.get("trainable", True) and norm_layer["config"].get("trainable", True)
    return keras.saving.deserialize_keras_object({**norm_layer, "config": config})


@keras.saving.register_keras_serializable("keras_mnv2")
class ConvNormActivation(_Compact):
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
            (`(kernel_size - 1) // 2 * dilation_rate` on both sides), or `"valid"`, not at all.
        dilation_rate: of both sides; above 1 only with stride 1.
        activation: name or function of Keras, or None.
        norm_layer: `"batch_norm"`; `"sync_batch_norm"`, with statistics over all replicas; `"group_norm"`,
            in groups of 8 channels (Wu and He 2018); a Keras layer or layer class, of which each place
            gets a copy as it stands; or None, which gives the convolution a bias.
        norm_momentum: fraction of the old moving statistics that a step keeps. Keras's convention: it is 1
            minus PyTorch's. The default 0.9 is PyTorch's 0.1.
        norm_epsilon: what is added to the variance; 1e-3 in Keras, 1e-5 in PyTorch.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        kernel_regularizer: of the kernel, as in `keras.layers.Conv2D`.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable; and `frozen`, the names of parts that do not train.

    Input shape:
        NHWC `(batch, height, width, channels)`, or NCHW with `data_format="channels_first"`.

    Output shape:
        The same layout with `filters` channels and each side divided by the stride, rounded up.

    Raises:
        ValueError: on an argument out of range, or `groups` that does not fit the input.

    Examples:
        >>> tuple(ConvNormActivation(32, stride=2)(np.ones((1, 224, 224, 3))).shape)
        (1, 112, 112, 32)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        padding: str = "same",
        dilation_rate: int = 1,
        activation: str | Callable[..., Any] | None = "relu6",
        norm_layer: NormLayer = "batch_norm",
        norm_momentum: float = NORM_MOMENTUM,
        norm_epsilon: float = NORM_EPSILON,
        data_format: str | None = None,
        kernel_regularizer: str | dict[str, Any] | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        filters = check_whole("filters", filters)
        kernel_size = check_whole("kernel_size", kernel_size)
        stride = check_choice("stride", stride, (1, 2))
        groups = check_choice("groups", groups, (1, filters))
        padding = check_choice("padding", padding, (*PADDINGS, "valid"))
        dilation_rate = check_whole("dilation_rate", dilation_rate)
        if stride > 1 and dilation_rate > 1:
            raise ValueError(f"dilation_rate must be 1 where stride is {stride}, got {dilation_rate!r}.")
        norm_momentum = check_rate("norm_momentum", norm_momentum)
        norm_epsilon = check_positive("norm_epsilon", norm_epsilon)
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
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.norm: Any = None
        self.kernel: Any = None
        self.bias: Any = None
        self._unit: Any = None

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        depthwise = self.groups > 1
        if depthwise and channels != self.groups:
            raise ValueError(f"groups must be 1 or the number of input channels, {channels}, got {self.groups}.")
        # Autocast is off so that folding happens in the kernel's own precision.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, self.kernel_size, channels, 1 if depthwise else self.filters),
            initializer=kernel_initializer(self.kernel_size, self.filters),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.norm = make_norm(
            self.norm_layer,
            self.filters,
            self.norm_momentum,
            self.norm_epsilon,
            self.data_format,
            name="norm",
            dtype=self.dtype_policy,
            trainable=self.trainable,
        )
        if self.norm is None:
            self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros", autocast=False)
        else:
            self.norm.build(self.compute_output_shape(input_shape))
        self._unit = Unit(
            self,
            self.norm,
            Activation(self, self._activate),
            depthwise,
            self.stride,
            self.padding,
            self.dilation_rate,
            self.data_format,
            self.filters,
        )
        self._freeze_parts()

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self._unit(inputs, training)

    def _activate(self, y: Tensor) -> Tensor:
        return self.activation(y)

    def _parts(self) -> dict[str, Any]:
        return {"kernel": self.kernel} | ({} if self.norm is None else {"norm": self.norm})

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        last = self.data_format == "channels_last"
        sides = input_shape[1:3] if last else input_shape[2:4]
        out = [output_size(n, self.kernel_size, self.stride, self.dilation_rate, self.padding) for n in sides]
        return (input_shape[0], *out, self.filters) if last else (input_shape[0], self.filters, *out)

    def get_config(self) -> dict[str, Any]:
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
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


@keras.saving.register_keras_serializable("keras_mnv2")
class InvertedResidual(_Compact):
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
        kernel_regularizer: of the kernels, as in `keras.layers.Conv2D`.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable; and `frozen`, the names of parts that do not train,
            such as `"expand"` or `"expand/norm"`.

    Input shape:
        NHWC `(batch, height, width, channels)`, or NCHW with `data_format="channels_first"`.

    Output shape:
        The same layout with `filters` channels and each side divided by the stride, rounded up.

    Raises:
        ValueError: on an argument out of range.

    Examples:
        >>> tuple(InvertedResidual(24, stride=2, expand_ratio=6)(np.ones((1, 112, 112, 16))).shape)
        (1, 56, 56, 24)
    """

    convolution = ConvNormActivation

    def __init__(
        self,
        filters: int,
        stride: int = 1,
        expand_ratio: float = 6,
        dilation_rate: int = 1,
        padding: str = "same",
        activation: str | Callable[..., Any] | None = "relu6",
        norm_layer: NormLayer = "batch_norm",
        norm_momentum: float = NORM_MOMENTUM,
        norm_epsilon: float = NORM_EPSILON,
        stochastic_depth: float = 0.0,
        linear_bottleneck: bool = True,
        shortcut: str | None = "bottleneck",
        return_expansion: bool = False,
        data_format: str | None = None,
        kernel_regularizer: str | dict[str, Any] | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        expand_ratio = check_positive("expand_ratio", expand_ratio)
        padding = check_choice("padding", padding, PADDINGS)
        shortcut = check_choice("shortcut", shortcut, SHORTCUTS)
        stochastic_depth = check_rate("stochastic_depth", stochastic_depth)
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
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.residual = False
        self.expand: ConvNormActivation | None = None
        self.depthwise: Any = None
        self.project: Any = None
        self.drop = None

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        self.residual = self.shortcut is not None and self.stride == 1 and channels == self.filters
        specs = convolutions(
            channels, self.filters, self.stride, self.expand_ratio, self.dilation_rate, self.linear_bottleneck
        )
        # By hand, since Keras would otherwise trace the whole block to find these shapes.
        shape = input_shape
        for spec in specs:
            conv = self._conv(spec)
            setattr(self, spec.part, conv)
            conv.build(shape)
            shape = conv.compute_output_shape(shape)
        if self.residual and self.stochastic_depth:
            self.drop = keras.layers.Dropout(
                self.stochastic_depth, noise_shape=(None, 1, 1, 1), name="drop", dtype=self.dtype_policy
            )
        self._freeze_parts()

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        sides = inputs.shape[1:3] if self.data_format == "channels_last" else inputs.shape[2:4]
        if training or self.return_expansion or None in sides:
            return self._transform(inputs, training)
        hidden = self.depthwise.filters * math.prod(sides)
        return ops.block_in_chunks(lambda x: self._transform(x, training), inputs, hidden)

    def _transform(self, inputs: Tensor, training: bool | None) -> Tensor | tuple[Tensor, Tensor]:
        def run(conv: Any) -> Any:
            # `conv.call`, not `conv()`, unless somebody watches: a layer call costs an eager backend about 0.1 ms.
            call = conv.call if is_plain(conv) else conv
            return lambda x: call(x, training=training)

        y, expanded = join(
            inputs,
            {name: run(conv) for name, conv in self.convolutions().items()},
            lambda shortcut, branch: self._sum(shortcut, self._drop(branch, training), training),
            self.shortcut if self.residual else None,
        )
        return (y, expanded) if self.return_expansion else y

    def convolutions(self) -> dict[str, ConvNormActivation]:
        """Its convolutions, once it is built, in order: `expand`, where it has one, `depthwise` and `project`."""
        convs = {"expand": self.expand, "depthwise": self.depthwise, "project": self.project}
        return {name: conv for name, conv in convs.items() if conv is not None}

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, conv in self.convolutions().items():
            parts |= {name: conv, **{f"{name}/{inner}": part for inner, part in conv._parts().items()}}
        return parts

    def compute_output_shape(self, input_shape: Shape) -> Shape | tuple[Shape, Shape]:
        last = self.data_format == "channels_last"
        sides = input_shape[1:3] if last else input_shape[2:4]
        hidden = hidden_channels(input_shape[-1 if last else 1], self.expand_ratio)
        out = [output_size(n, 3, self.stride, self.dilation_rate, self.padding) for n in sides]
        if last:
            shape, expansion = (input_shape[0], *out, self.filters), (input_shape[0], *sides, hidden)
        else:
            shape, expansion = (input_shape[0], self.filters, *out), (input_shape[0], hidden, *sides)
        return (shape, expansion) if self.return_expansion else shape

    def get_config(self) -> dict[str, Any]:
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
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }

    def _conv(self, spec: Convolution) -> ConvNormActivation:
        return self.convolution(
            spec.filters,
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            groups=spec.filters if spec.depthwise else 1,
            padding=self.padding,
            dilation_rate=spec.dilation,
            activation=self.activation if spec.activated else None,
            norm_layer=self.norm_layer,
            norm_momentum=self.norm_momentum,
            norm_epsilon=self.norm_epsilon,
            data_format=self.data_format,
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            name=spec.part,
        )

    def _sum(self, shortcut: Tensor, branch: Tensor, training: bool | None) -> Tensor:
        return shortcut + branch

    def _drop(self, x: Tensor, training: bool | None) -> Tensor:
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

    Examples:
        >>> tuple(ScaleShift()(np.ones((2, 7, 7, 16))).shape)
        (2, 7, 7, 16)
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.scale: Any = None
        self.shift: Any = None

    def build(self, input_shape: Shape) -> None:
        channels = (input_shape[self.axis],)
        self.scale = self.add_weight(name="scale", shape=channels, initializer="ones")
        self.shift = self.add_weight(name="shift", shape=channels, initializer="zeros")

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        # The unused arguments are those of the batch norm whose place it takes in a graph.
        scale, shift = self.factors(inputs)
        return inputs * scale + shift

    def factors(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift in a shape that broadcasts over `inputs`."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        return keras.ops.reshape(self.scale, shape), keras.ops.reshape(self.shift, shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}
