"""Batch normalisation folded into the convolutions, as a new model."""

from typing import Any

import keras
import numpy as np

from keras_mnv2.layers import ConvNormActivation, InvertedResidual, ScaleShift
from keras_mnv2.quantize import RANGE, QuantizedConvNormActivation, QuantizedInvertedResidual

_CONVOLUTIONS = (ConvNormActivation, QuantizedConvNormActivation)
_BLOCKS = (InvertedResidual, QuantizedInvertedResidual)


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Gives a new model without batch normalisation that computes what `model` computes in inference.

    Each batch norm is an affine map once its statistics are fixed; the kernel before it takes up the scale
    and a bias the shift (Jacob et al. 2018, section 3.2, equation 14). Batch norms that the caller added
    outside this package's layers become a `keras_mnv2.layers.ScaleShift`. `model` keeps its weights.

    Args:
        model: a functional or sequential model, also one that holds others, with or without layers of this
            package.

    Returns:
        A model of the same structure and layer names, saved and trained like any other; compiled in the
        same way if `model` was.

    Raises:
        ValueError: where `model` is not a built functional or sequential model, or a layer holds a batch
            norm that is not reached: one of the caller's own layers, or a wrapper around a model.

    Example:

    >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    >>> folded = fold_batch_norm(model)
    >>> len(model.non_trainable_weights), len(folded.non_trainable_weights)
    (104, 0)
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(f"model must be a built functional or sequential Keras model, got {model!r}.")
    pairs: list[tuple[Any, Any]] = []

    def clone(layer):
        copy = _without_batch_norm(layer)
        pairs.append((layer, copy))
        return copy

    folded = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for layer, copy in pairs:
        _copy_weights(layer, copy)
    return folded


def _without_batch_norm(layer):
    """A new layer like `layer`, or an operation like it, with other layers in the place of batch norms."""
    config = layer.get_config()
    if type(layer) in _CONVOLUTIONS and _is_batch_norm(layer):
        return type(layer).from_config({**config, "norm_layer": None})
    if type(layer) in _BLOCKS and _is_batch_norm(layer.project):
        return type(layer).from_config({**config, "norm_layer": None})
    if type(layer) is keras.layers.BatchNormalization:
        common = {key: config[key] for key in ("name", "trainable", "dtype")}
        return ScaleShift(axis=layer.axis, **common)
    # By name: nothing public lists the layers inside one.
    if any(weight.name == "moving_variance" for weight in getattr(layer, "weights", ())):
        raise ValueError(
            f"model must have its batch norms in layers of keras_mnv2 or in keras.layers.BatchNormalization "
            f"itself, got one inside the layer {layer.name!r} of type {type(layer).__name__}."
        )
    return type(layer).from_config(config)


def _is_batch_norm(conv):
    channels = -1 if conv.data_format == "channels_last" else 1
    return type(conv.norm) is keras.layers.BatchNormalization and conv.norm.axis in (channels, channels % 4)


def _copy_weights(layer, copy):
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


def _fold(conv, copy):
    if type(conv) is QuantizedConvNormActivation:
        # By the layer's own arithmetic: a last bit more or less would round some weights to another level.
        kernel, bias = conv.folded(conv.norm.moving_mean, conv.norm.moving_variance)
    else:
        scale, bias = _scale_and_shift(conv.norm)
        # The scale runs along the last axis of a dense kernel, and the one before in a depthwise one.
        along = scale if conv.groups == 1 else scale[:, None]
        kernel = keras.ops.convert_to_numpy(conv.kernel) * along
    copy.kernel.assign(keras.ops.convert_to_numpy(kernel))
    copy.bias.assign(keras.ops.convert_to_numpy(bias))


def _copy_ranges(layer, copy):
    ranges = [[weight for weight in one.weights if weight.name in RANGE] for one in (layer, copy)]
    for source, target in zip(*ranges, strict=True):
        target.assign(keras.ops.convert_to_numpy(source))


def _scale_and_shift(norm):
    """A batch norm in inference as `x * scale + shift`, in float64."""

    def number(variable, absent):
        return absent if variable is None else keras.ops.convert_to_numpy(variable).astype("float64")

    scale = number(norm.gamma, 1.0) / np.sqrt(number(norm.moving_variance, None) + norm.epsilon)
    return scale, number(norm.beta, 0.0) - number(norm.moving_mean, None) * scale
