"""Normalisation layers: what one is, and which batch norms have the plain formula."""

import functools
from typing import Any

import keras

NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.UnitNormalization,
)


def is_batch_norm(layer: Any) -> bool:
    """Whether `layer` is Keras's batch norm or this package's; what a class of the caller's computes is not known."""
    kind: Any = type(layer)
    return _is_batch_norm_class(kind)


@functools.cache
def _is_batch_norm_class(kind: Any) -> bool:
    known = kind.__module__.partition(".")[0] in ("keras", "keras_mnv2")
    return known and issubclass(kind, keras.layers.BatchNormalization)


def is_batch_norm_of_channels(norm: Any, data_format: str) -> bool:
    """Whether `norm` is a batch norm whose axis is that of the channels."""
    channels = -1 if data_format == "channels_last" else 1
    return is_batch_norm(norm) and norm.axis in (channels, channels % 4)


def is_plain_batch_norm(norm: Any, data_format: str) -> bool:
    """Whether `norm` is a batch norm over the channels with scale and shift, whose formula is that of the paper."""
    return (
        is_batch_norm_of_channels(norm, data_format)
        and norm.scale
        and norm.center
        and not norm.renorm
        # Statistics over replicas are Keras's own business on TensorFlow.
        and not (norm.synchronized and keras.backend.backend() == "tensorflow")
    )
