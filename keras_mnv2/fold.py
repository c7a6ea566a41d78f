"""Batch normalisation folded into the convolutions, as a new model."""

from typing import Any

import keras
import numpy as np

from keras_mnv2.layers.compact import ConvNormActivation, InvertedResidual, ScaleShift
from keras_mnv2.layers.fusing import Group
from keras_mnv2.layers.parts import Conv2D, DepthwiseConv2D
from keras_mnv2.quantize import RANGE, QuantizedConvNormActivation, QuantizedInvertedResidual
from keras_mnv2.rewrite import Merged, rewrite

_CONVOLUTIONS = (ConvNormActivation, QuantizedConvNormActivation)
_BLOCKS = (InvertedResidual, QuantizedInvertedResidual)
# Keras's classes, and this package's of the same name, with the class of the folded layer.
_FOLDED = {
    keras.layers.Conv2D: Conv2D,
    Conv2D: Conv2D,
    keras.layers.DepthwiseConv2D: DepthwiseConv2D,
    DepthwiseConv2D: DepthwiseConv2D,
}


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Gives a new model without batch normalisation that computes what `model` computes in inference.

    Each batch norm is an affine map once its statistics are fixed; the kernel before it takes up the scale
    and a bias the shift (Jacob et al. 2018, section 3.2, equation 14). A batch norm behind something else than a
    convolution, or whose convolution is read elsewhere too, becomes a `keras_mnv2.layers.ScaleShift`. `model` keeps
    its weights.

    Args:
        model: a functional or sequential model, also one that holds others, with or without layers of this
            package.

    Returns:
        A model of the same layers and names but the batch norms, saved and trained like any other; compiled in the
        same way if `model` was.

    Raises:
        ValueError: where `model` is not a built functional or sequential model, or a layer holds a batch
            norm that is not reached: one of the caller's own layers, or a wrapper around a model.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> folded = fold_batch_norm(model)
        >>> len(model.non_trainable_weights), len(folded.non_trainable_weights)
        (104, 0)
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(f"model must be a built functional or sequential Keras model, got {model!r}.")
    folded, pairs, merged = rewrite(model, _without_batch_norm, _with_bias)
    for layer, copy in pairs:
        _copy_weights(layer, copy)
    for unit, copy in merged:
        kernel = keras.ops.convert_to_numpy(unit.conv.kernel)
        bias = 0.0 if unit.conv.bias is None else keras.ops.convert_to_numpy(unit.conv.bias)
        kernel, bias = _folded(unit.norm, kernel, bias, type(copy) is DepthwiseConv2D)
        copy.kernel.assign(kernel)
        copy.bias.assign(bias)
    return folded


def _with_bias(unit: Group) -> Merged | None:
    """The convolution of a unit with a bias, which takes in its batch norm."""
    kind: Any = _FOLDED.get(type(unit.conv))
    if kind is None or not _is_batch_norm_of_channels(unit.norm, unit.conv.data_format):
        return None
    return kind.from_config({**unit.conv.get_config(), "use_bias": True}), (unit.norm,)


def _without_batch_norm(layer: Any) -> Any:
    """A new layer like `layer`, or an operation like it, with other layers in the place of batch norms."""
    config = layer.get_config()
    if type(layer) in _CONVOLUTIONS and _is_batch_norm_of_channels(layer.norm, layer.data_format):
        return type(layer).from_config({**config, "norm_layer": None})
    if type(layer) in _BLOCKS and _is_batch_norm_of_channels(layer.project.norm, layer.data_format):
        return type(layer).from_config({**config, "norm_layer": None})
    if _is_batch_norm(layer):
        common = {key: config[key] for key in ("name", "trainable", "dtype")}
        return ScaleShift(axis=layer.axis, **common)
    # By name: nothing public lists the layers inside one.
    if any(weight.name == "moving_variance" for weight in getattr(layer, "weights", ())):
        raise ValueError(
            f"model must have its batch norms in layers of keras_mnv2 or in keras.layers.BatchNormalization "
            f"itself, got one inside the layer {layer.name!r} of type {type(layer).__name__}."
        )
    return type(layer).from_config(config)


def _is_batch_norm(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and type(layer).__module__.startswith("keras")


def _is_batch_norm_of_channels(norm: Any, data_format: str) -> bool:
    channels = -1 if data_format == "channels_last" else 1
    return _is_batch_norm(norm) and norm.axis in (channels, channels % 4)


def _copy_weights(layer: Any, copy: Any) -> None:
    if type(layer) in _CONVOLUTIONS and copy.norm_layer != layer.norm_layer:
        _fold(layer, copy)
        _copy_ranges(layer, copy)
    elif type(layer) in _BLOCKS and copy.norm_layer != layer.norm_layer:
        for part in ("expand", "depthwise", "project"):
            if getattr(layer, part) is not None:
                _fold(getattr(layer, part), getattr(copy, part))
        _copy_ranges(layer, copy)
    elif type(copy) is ScaleShift and type(layer) is not ScaleShift:
        scale, shift = _scale_and_shift(layer)
        copy.scale.assign(scale)
        copy.shift.assign(shift)
    elif isinstance(layer, keras.Layer):
        copy.set_weights(layer.get_weights())
        # A layer may derive values from its weights when it loads them, as `Normalization` does.
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        # As NumPy arrays: two models that share an array of JAX lose it when one of them trains.
        copy.load_own_variables({key: keras.ops.convert_to_numpy(value) for key, value in store.items()})


def _fold(conv: Any, copy: Any) -> None:
    if type(conv) is QuantizedConvNormActivation:
        # By the layer's own arithmetic: a last bit more or less would round some weights to another level.
        kernel, bias = conv.folded(conv.norm.moving_mean.value, conv.norm.moving_variance.value)
        kernel, bias = keras.ops.convert_to_numpy(kernel), keras.ops.convert_to_numpy(bias)
    else:
        kernel, bias = _folded(conv.norm, keras.ops.convert_to_numpy(conv.kernel), 0.0, conv.groups > 1)
    copy.kernel.assign(kernel)
    copy.bias.assign(bias)


def _folded(norm: Any, kernel: np.ndarray, bias: Any, depthwise: bool) -> tuple[np.ndarray, np.ndarray]:
    scale, shift = _scale_and_shift(norm)
    # The scale runs along the last axis of a dense kernel, and the one before in a depthwise one.
    return kernel * (scale[:, None] if depthwise else scale), shift + bias * scale


def _copy_ranges(layer: Any, copy: Any) -> None:
    ranges = [[weight for weight in one.weights if weight.name in RANGE] for one in (layer, copy)]
    for source, target in zip(*ranges, strict=True):
        target.assign(keras.ops.convert_to_numpy(source))


def _scale_and_shift(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """A batch norm in inference as `x * scale + shift`, in float64."""

    def number(variable: Any, absent: Any) -> Any:
        return absent if variable is None else keras.ops.convert_to_numpy(variable).astype("float64")

    scale = number(norm.gamma, 1.0) / np.sqrt(number(norm.moving_variance, None) + norm.epsilon)
    return scale, number(norm.beta, 0.0) - number(norm.moving_mean, None) * scale
