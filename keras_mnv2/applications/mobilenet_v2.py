"""`keras.applications.mobilenet_v2` with the same functions, arguments and defaults."""

from collections.abc import Callable
from typing import Any

import keras

from keras_mnv2 import model as _model
from keras_mnv2.annotations import PathLike, Tensor
from keras_mnv2.preprocessing import decode_predictions, preprocess_input

__all__ = ["MobileNetV2", "decode_predictions", "preprocess_input"]

# Of keras.applications.
_NORM_MOMENTUM = 0.999


def MobileNetV2(
    input_shape: tuple[int | None, ...] | None = None,
    alpha: float = 1.0,
    include_top: bool = True,
    weights: PathLike | None = "imagenet",
    input_tensor: Tensor | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: str | Callable[..., Any] | None = "softmax",
    name: str | None = None,
) -> keras.Model:
    """`keras_mnv2.MobileNetV2` as `keras.applications` has it: no dropout, and a momentum of 0.999.

    Arguments, output shape and errors are those of `keras_mnv2.MobileNetV2`.

    Examples:
        >>> model = MobileNetV2((96, 96, 3), alpha=0.35, weights=None)
        >>> len(model.layers), model.get_layer("block_13_expand_relu").output.shape
        (156, (None, 6, 6, 192))
    """
    return _model.MobileNetV2(
        input_shape,
        alpha,
        include_top,
        weights,
        input_tensor,
        pooling,
        classes,
        classifier_activation,
        name,
        dropout=0.0,
        norm_momentum=_NORM_MOMENTUM,
    )
