"""Quantisation-aware training: a model that computes with the rounding of 8-bit integers, and learns with it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mnv2 import ops
from keras_mnv2.annotations import Shape, Tensor
from keras_mnv2.checks import check_choice, check_rate
from keras_mnv2.layers.compact import ConvNormActivation, InvertedResidual, ScaleShift
from keras_mnv2.layers.detections import DefaultBoxes, Detections, JoinMaps
from keras_mnv2.layers.fusing import Group, Part, role_of
from keras_mnv2.norms import is_plain_batch_norm
from keras_mnv2.ops.default import WEIGHT_LEVELS
from keras_mnv2.ops.padding import spatial_padding
from keras_mnv2.rewrite import Merged, layers_of, rewrite, same_input

TINY = 1e-12
# Share of the old range that a training step keeps. Jacob et al. ask for one near 1; TensorFlow's toolkit has
# 0.999, which a fine-tuning of some hundred steps never leaves.
RANGE_MOMENTUM = 0.99
# Until the first training step: what an activation of this network is likely to lie in.
INITIAL_RANGE = (-6.0, 6.0)
# Names of the variables.
RANGE = ("range_minimum", "range_maximum", "range_updates")
_NORMS = ("batch_norm", None)
# Layers that only choose, move or, in training, change numbers: they stay as they are.
_MOVING = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    keras.layers.ZeroPadding2D,
    keras.layers.MaxPooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
    keras.layers.RandomContrast,
    keras.layers.RandomBrightness,
)
_COMPUTING = (
    keras.layers.AveragePooling2D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.Softmax,
    keras.layers.Add,
    keras.layers.Concatenate,
    DefaultBoxes,
    JoinMaps,
)


def quantize_aware(model: keras.Model) -> keras.Model:
    """Gives a new model that computes as if its numbers were 8-bit integers, for training with plain `fit`.

    Weights are rounded symmetrically with a scale for each output channel of a convolution; the input and each
    activation to 256 levels of a range that training follows. Batch norms are folded into the kernels before
    these are rounded (Jacob et al. 2018, arXiv 1712.05877, section 3). Train the model in float first, then this
    one for a few epochs at a low learning rate; `export(..., precision="int8")` as LiteRT or ONNX then writes the
    integers that it computed with.

    Args:
        model: a functional or sequential model of float32 with one input, of this package's layers and of
            Keras's poolings, dropouts, activations, `Dense`, `Rescaling`, `Normalization` and the like. It keeps
            its weights.

    Returns:
        A model of the same inputs, outputs and layer names with the same weights; compiled in the same way if
        `model` was. Until it has been trained its ranges are guesses: run `fit` before `predict`.

    Raises:
        ValueError: where `model` is not such a model; the message names the layer that cannot be quantised.

    Examples:
        >>> model = quantize_aware(MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10))
        >>> model.compile("sgd", "sparse_categorical_crossentropy")  # And then `model.fit(images, labels)`.
        >>> model.layers[1].name
        'input_range'
    """
    if not isinstance(model, keras.Model) or len(getattr(model, "inputs", None) or ()) != 1:
        raise ValueError(f"model must be a built functional or sequential Keras model with one input, got {model!r}.")
    if is_quantized(model):
        raise ValueError(f"model must not be quantised yet, got {model.name!r}, which is.")
    if isinstance(model, keras.Sequential):
        # The same layers: only a functional model can have one put in front.
        functional = keras.Model(model.inputs, model.outputs, name=model.name)
        if model.compiled:
            functional.compile_from_config(model.get_compile_config())
        model = functional
    image = same_input(model.inputs[0])
    rounded = FakeQuantize(name="input_range")(image)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer(*(rounded if x is image else x for x in args), **kwargs)

    quantized, pairs, merged = rewrite(model, _quantized, _quantized_unit, _like(model.input, image), call)
    for layer, copy in pairs:
        _copy_weights(layer, copy)
    for unit, copy in merged:
        _copy_unit(unit, copy)
    return quantized


def is_quantized(model: keras.Model) -> bool:
    """Whether `model` comes from `quantize_aware`, in whole or in part."""
    return any(isinstance(layer, FakeQuantize | QuantizedConvNormActivation) for layer in layers_of(model))


def _like(structure: Any, tensor: Tensor) -> Any:
    """`tensor` in the structure of a model's one input: itself, a list or a dict."""
    if isinstance(structure, dict):
        return dict.fromkeys(structure, tensor)
    return type(structure)([tensor]) if isinstance(structure, list | tuple) else tensor


def _quantized_unit(unit: Group) -> Merged | None:
    """A convolution with its batch norm and activation as one layer, which folds and rounds."""
    conv, norm = unit.conv, unit.norm
    _check_policy(conv)
    if norm is not None and (norm.synchronized or not is_plain_batch_norm(norm, conv.data_format)):
        return None
    depthwise = isinstance(conv, keras.layers.DepthwiseConv2D)
    if (norm is None and conv.bias is None) or len(set(conv.kernel_size)) > 1:
        return None
    padding, left_out = _padding_of(unit)
    new = QuantizedConvNormActivation(
        conv.kernel.shape[2 if depthwise else 3],
        kernel_size=conv.kernel_size[0],
        stride=conv.strides[0],
        groups=conv.kernel.shape[2] if depthwise else 1,
        padding=padding,
        dilation_rate=conv.dilation_rate[0],
        activation=_activation_of(unit),
        norm_layer="batch_norm" if norm is not None else None,
        norm_momentum=norm.momentum if norm is not None else 0.9,
        norm_epsilon=norm.epsilon if norm is not None else 1e-3,
        data_format=conv.data_format,
        kernel_regularizer=conv.depthwise_regularizer if depthwise else conv.kernel_regularizer,
        frozen=_frozen_parts(conv, norm),
        name=conv.name,
        dtype=conv.dtype_policy,
    )
    return new, left_out


def _frozen_parts(conv: Any, norm: Any) -> list[str]:
    return [*["kernel"] * (not conv.trainable), *["norm"] * (norm is not None and not norm.trainable)]


def _padding_of(unit: Group) -> tuple[str, tuple]:
    """The padding of a unit by name, and the layers that its new layer makes superfluous."""
    conv, left_out = unit.conv, [layer for layer in (unit.norm, unit.activation) if layer is not None]
    if unit.pad is None:
        return conv.padding, tuple(left_out)
    size = unit.start.shape[1:3] if conv.data_format == "channels_last" else unit.start.shape[2:4]
    for name in ("same", "symmetric"):
        zeros = spatial_padding(name, conv.kernel_size, size, conv.strides[0], conv.dilation_rate[0])
        if zeros is not None and [tuple(pair) for pair in zeros] == [tuple(pair) for pair in unit.pad.padding]:
            return name, (unit.pad, *left_out)
    return conv.padding, tuple(left_out)


def _activation_of(unit: Group) -> str | Callable[..., Any]:
    layer = unit.activation
    if layer is None:
        return unit.conv.activation
    if not isinstance(layer, keras.layers.ReLU):
        return layer.activation
    if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
        raise ValueError(f"model must have plain ReLU or ReLU6 layers to be quantised, got {layer.get_config()!r}.")
    return "relu6" if layer.max_value == 6 else "relu"


def _copy_unit(unit: Group, copy: Any) -> None:
    for name in ("kernel", "bias"):
        if getattr(copy, name) is not None:
            getattr(copy, name).assign(keras.ops.convert_to_numpy(getattr(unit.conv, name)))
    for name in ("gamma", "beta", "moving_mean", "moving_variance") if unit.norm is not None else ():
        getattr(copy.norm, name).assign(keras.ops.convert_to_numpy(getattr(unit.norm, name)))


def _stock(kind: Any) -> Any:
    """Keras's class of a layer of one operation; other classes stay."""
    return (
        next((base for base in kind.__mro__ if base.__module__.startswith("keras.")), kind)
        if issubclass(kind, Part)
        else kind
    )


def _check_policy(layer: Any) -> None:
    policy = getattr(layer, "dtype_policy", None)
    if policy is not None and policy.compute_dtype != "float32":
        raise ValueError(f"model must compute in float32 to be quantised, got {policy.name} in {layer.name!r}.")


def _quantized(layer: Any) -> Any:
    """A new layer that computes what `layer` does, rounded."""
    kinds: dict[Any, Any] = {
        ConvNormActivation: QuantizedConvNormActivation,
        InvertedResidual: QuantizedInvertedResidual,
        ScaleShift: QuantizedScaleShift,
        keras.layers.Dense: QuantizedDense,
    }
    _check_policy(layer)
    if getattr(layer, "norm_layer", None) not in _NORMS:
        raise ValueError(
            f'model must have norm_layer="batch_norm" or None to be quantised, got {layer.norm_layer!r} in the layer '
            f"{layer.name!r}."
        )
    if type(layer) in kinds:
        return kinds[type(layer)].from_config(layer.get_config())
    if type(layer) in (keras.layers.Rescaling, keras.layers.Normalization):
        axis = layer.axis[0] if isinstance(layer, keras.layers.Normalization) else -1
        return QuantizedScaleShift(axis=axis, name=layer.name, trainable=False, dtype=layer.dtype_policy)
    if isinstance(layer, Detections):
        raise ValueError(
            "model must be the network of a detector, whose boxes and scores are no integers, got the layer "
            f"{layer.name!r}; give the model of SSDLite, and then the result to keras_mnv2.detector."
        )
    kind = _stock(type(layer))
    if kind in _MOVING:
        return kind.from_config(layer.get_config())
    if kind in _COMPUTING:
        return QuantizedOutput(kind.from_config(layer.get_config()), name=layer.name, dtype=layer.dtype_policy)
    if role_of(layer) == "conv" and layer.bias is None:
        raise ValueError(
            'model must have norm_layer="batch_norm" or None to be quantised, which gives each convolution a batch '
            f"norm of its own or a bias, got the layer {layer.name!r} with neither."
        )
    raise ValueError(
        f"model must consist of layers that can be quantised, those of keras_mnv2 and Keras's Dense, poolings, "
        f"activations and the like, got the layer {layer.name!r} of type {type(layer).__name__}."
    )


def _copy_weights(layer: Any, copy: Any) -> None:
    if isinstance(layer, keras.layers.Rescaling):
        copy.scale.assign(np.broadcast_to(layer.scale, copy.scale.shape))
        copy.shift.assign(np.broadcast_to(layer.offset, copy.shift.shape))
    elif isinstance(layer, keras.layers.Normalization):
        mean, variance = (keras.ops.convert_to_numpy(x).reshape(-1) for x in (layer.mean, layer.variance))
        # The least standard deviation that Keras divides by.
        scale = 1 / np.maximum(np.sqrt(variance), keras.config.epsilon())
        copy.scale.assign(np.broadcast_to(scale, copy.scale.shape))
        copy.shift.assign(np.broadcast_to(-mean * scale, copy.shift.shape))
    else:
        kept = [weight for weight in getattr(copy, "weights", ()) if weight.name not in RANGE]
        for source, target in zip(getattr(layer, "weights", ()), kept, strict=True):
            target.assign(keras.ops.convert_to_numpy(source))


@keras.saving.register_keras_serializable("keras_mnv2")
class FakeQuantize(keras.layers.Layer):
    """Rounds a tensor to 256 levels between a minimum and a maximum, as an 8-bit tensor holds it.

    The range always holds 0, which is a level itself (Jacob et al. 2018, equations 1 and 13). The first training
    step sets it to that of the batch, later ones move it there by an exponential average, in frozen layers too.
    Gradients pass inside the range as if nothing were rounded and are 0 outside (straight-through, Bengio et al. 2013).

    Args:
        momentum: share of the old range that a training step keeps.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        Any.

    Output shape:
        The same.

    Raises:
        ValueError: on a momentum out of range.

    Examples:
        >>> layer = FakeQuantize()
        >>> y = layer(np.linspace(0, 1, 1000, dtype="float32"), training=True)
        >>> len(np.unique(keras.ops.convert_to_numpy(y)))
        256
    """

    def __init__(self, momentum: float = RANGE_MOMENTUM, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        momentum = check_rate("momentum", momentum)
        self.momentum = momentum
        self.minimum: Any = None
        self.maximum: Any = None
        self.updates: Any = None

    def build(self, input_shape: Shape) -> None:
        self.minimum, self.maximum, self.updates = (
            self.add_weight(
                name=name, shape=(), initializer=keras.initializers.Constant(value), trainable=False, autocast=False
            )
            for name, value in zip(RANGE, (*INITIAL_RANGE, 0.0), strict=True)
        )

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if training:
            fixed = keras.ops.stop_gradient(inputs)
            keep = keras.ops.where(self.updates > 0, self.momentum, 0.0)
            lowest = keras.ops.minimum(keras.ops.min(fixed), 0.0)
            highest = keras.ops.maximum(keras.ops.max(fixed), 0.0)
            self.minimum.assign(self.minimum * keep + lowest * (1 - keep))
            self.maximum.assign(self.maximum * keep + highest * (1 - keep))
            self.updates.assign(self.updates + 1)
        return ops.fake_quantize(inputs, self.minimum.value, self.maximum.value)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum}


@keras.saving.register_keras_serializable("keras_mnv2")
class QuantizedConvNormActivation(ConvNormActivation):
    """`ConvNormActivation` with its folded kernel and its output rounded to 8 bits.

    In training the convolution runs twice (Jacob et al. 2018, figure C.8): once for the statistics of the batch,
    and once with the kernel that these are folded into, rounded. The kernel has a scale for each output channel.
    Arguments, shapes and errors are those of `ConvNormActivation`; `norm_layer` must be `"batch_norm"` or None.

    Examples:
        >>> tuple(QuantizedConvNormActivation(32, stride=2)(np.ones((1, 224, 224, 3))).shape)
        (1, 112, 112, 32)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_choice("norm_layer", self.norm_layer, _NORMS)
        self.output_range = FakeQuantize(name="output_range", dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.output_range.build(self.compute_output_shape(input_shape))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        norm, convolve = self.norm, self._unit.convolve
        if norm is None:
            kernel, bias = self.kernel.value, self.bias.value
        else:
            mean, variance = norm.moving_mean.value, norm.moving_variance.value
            if training and norm.trainable:
                axes = [0, 1, 2] if self.data_format == "channels_last" else [0, 2, 3]
                mean, variance = keras.ops.moments(convolve(inputs, self.kernel.value), axes)
                for moving, value in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
                    found = keras.ops.stop_gradient(value)
                    moving.assign(ops.moving_average(moving.value, found, norm.momentum))
            kernel, bias = self.folded(mean, variance)
        y = self.activation(convolve(inputs, self._rounded(kernel), bias))
        return self.output_range(y, training=training)

    def folded(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel and bias that compute the convolution and its batch norm with these statistics."""
        return self._unit.folded(self.kernel.value, mean, variance)

    def _rounded(self, kernel: Tensor) -> Tensor:
        # A depthwise kernel has its channels on the axis before the last.
        return _round_weights(kernel, axes=(0, 1, 2) if self.groups == 1 else (0, 1, 3))


@keras.saving.register_keras_serializable("keras_mnv2")
class QuantizedInvertedResidual(InvertedResidual):
    """`InvertedResidual` of `QuantizedConvNormActivation`, with the sum of its shortcut rounded too.

    Arguments, shapes and errors are those of `InvertedResidual`; `norm_layer` must be `"batch_norm"` or None.

    Examples:
        >>> tuple(QuantizedInvertedResidual(16)(np.ones((1, 112, 112, 16))).shape)
        (1, 112, 112, 16)
    """

    convolution = QuantizedConvNormActivation

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if self.residual:
            self.sum_range = FakeQuantize(name="sum_range", dtype=self.dtype_policy)
            self.sum_range.build(input_shape)

    def _sum(self, shortcut: Tensor, branch: Tensor, training: bool | None) -> Tensor:
        return self.sum_range(shortcut + branch, training=training)


@keras.saving.register_keras_serializable("keras_mnv2")
class QuantizedDense(keras.layers.Dense):
    """`keras.layers.Dense` with its kernel, its logits and its output rounded to 8 bits.

    The kernel has one scale, since LiteRT's fully connected operation has one. Arguments, shapes and errors are
    those of `Dense`.

    Examples:
        >>> tuple(QuantizedDense(10, activation="softmax")(np.ones((2, 1280))).shape)
        (2, 10)
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.logits_range = FakeQuantize(name="logits_range", dtype=self.dtype_policy)
        linear = self.activation is keras.activations.linear
        self.output_range = None if linear else FakeQuantize(name="output_range", dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        shape = (*input_shape[:-1], self.units)
        self.logits_range.build(shape)
        if self.output_range is not None:
            self.output_range.build(shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        y = keras.ops.matmul(inputs, _round_weights(self.kernel, axes=(0, 1)))
        y = self.logits_range(y if self.bias is None else y + self.bias, training=training)
        return y if self.output_range is None else self.output_range(self.activation(y), training=training)


@keras.saving.register_keras_serializable("keras_mnv2")
class QuantizedScaleShift(ScaleShift):
    """`ScaleShift` with its product and its sum rounded to 8 bits.

    Examples:
        >>> tuple(QuantizedScaleShift()(np.ones((2, 7, 7, 16))).shape)
        (2, 7, 7, 16)
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(axis=axis, **kwargs)
        self.product_range = FakeQuantize(name="product_range", dtype=self.dtype_policy)
        self.output_range = FakeQuantize(name="output_range", dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.product_range.build(input_shape)
        self.output_range.build(input_shape)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        scale, shift = self.factors(inputs)
        y = self.product_range(inputs * _round_weights(scale, axes=None), training=training)
        return self.output_range(y + shift, training=training)


@keras.saving.register_keras_serializable("keras_mnv2")
class QuantizedOutput(keras.layers.Wrapper):
    """A layer without weights, such as a pooling, with its output rounded to 8 bits.

    Args:
        layer: the layer.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Examples:
        >>> tuple(QuantizedOutput(keras.layers.GlobalAveragePooling2D())(np.ones((2, 7, 7, 16))).shape)
        (2, 16)
    """

    def __init__(self, layer: Any, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.output_range = FakeQuantize(name="output_range", dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.output_range.build(self.layer.compute_output_shape(input_shape))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.output_range(self.layer(inputs), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.layer.compute_output_shape(input_shape)


def _round_weights(weights: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """Symmetric 8-bit weights with a scale for each index that `axes` leave; the gradient passes as if unrounded."""
    largest = keras.ops.max(keras.ops.abs(weights), axis=axes, keepdims=True)
    if axes is not None and 3 not in axes:
        largest = keras.ops.maximum(largest, _largest_pair(weights, axes))
    return ops.round_to_multiples(weights, keras.ops.maximum(largest, TINY) / WEIGHT_LEVELS)


def _largest_pair(weights: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The largest sum of two weights that processors without 8-bit dot products add in 16 bits (VPMADDUBSW of x86).

    They are neighbours in the order in which a kernel (height, width, inputs, outputs) or (inputs, outputs) is summed,
    with the inputs as its last or its first axis. `255 * 128 < 2**15`, so that no sum is cut off.
    """
    outputs = weights.shape[-1]
    orders = [weights]
    if len(weights.shape) == 4 and weights.shape[0] * weights.shape[1] > 1:
        orders.append(keras.ops.transpose(weights, (2, 0, 1, 3)))
    rows = [keras.ops.reshape(order, (-1, outputs)) for order in orders]
    even = rows[0].shape[0] // 2 * 2
    if not even:
        return keras.ops.zeros((), weights.dtype)
    pairs = [keras.ops.abs(row[:even:2] + row[1:even:2]) for row in rows]
    largest = keras.ops.max(keras.ops.concatenate(pairs), axis=0 if len(axes) < len(weights.shape) else None)
    return keras.ops.reshape(largest, (1,) * (len(weights.shape) - 1) + (-1,))
