"""The checks of arguments: each error names the argument, the value, and what is allowed."""

import math
import numbers
from collections.abc import Sequence

import keras

NORMS = ("batch_norm", "sync_batch_norm", "group_norm")


def check_positive(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_rate(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a number from 0 up to, and not including, 1."""
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from 0 up to, and not including, 1, got {value!r}.")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises `ValueError` unless `value` is one of `allowed`."""
    if isinstance(value, bool) or not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def activation_function(name, activation):
    """The function behind a Keras activation's name; an unknown one is a `ValueError` that names `name`."""
    try:
        return keras.activations.get(activation)
    except ValueError:
        raise ValueError(
            f"{name} must be None, a function or the name of a Keras activation, got {activation!r}."
        ) from None


def data_format_name(data_format):
    """`data_format`, or Keras's setting where it is None."""
    if data_format is None:
        return keras.config.image_data_format()
    check_choice("data_format", data_format, ("channels_last", "channels_first"))
    return data_format


def is_plain_batch_norm(norm, data_format):
    """Whether `norm` is a batch norm over the channels with scale and shift, whose formula is that of the paper."""
    channels = -1 if data_format == "channels_last" else 1
    return (
        isinstance(norm, keras.layers.BatchNormalization)
        and norm.scale
        and norm.center
        and norm.axis in (channels, channels % 4)
        and not norm.renorm
        # Statistics over replicas are Keras's own business on TensorFlow.
        and not (norm.synchronized and keras.backend.backend() == "tensorflow")
    )


def norm_config(norm_layer):
    """The form in which a layer keeps `norm_layer`: None, a name, or a serialised prototype.

    Raises:
        ValueError: where `norm_layer` is none of what `ConvNormActivation` allows.
    """
    if norm_layer is None or (isinstance(norm_layer, str) and norm_layer in NORMS):
        return norm_layer
    if isinstance(norm_layer, dict) and "class_name" in norm_layer:
        return norm_layer
    if isinstance(norm_layer, type) and issubclass(norm_layer, keras.layers.Layer):
        norm_layer = norm_layer()
    if isinstance(norm_layer, keras.layers.Layer):
        return keras.saving.serialize_keras_object(norm_layer)
    names = ", ".join(map(repr, NORMS))
    raise ValueError(f"norm_layer must be {names}, a Keras layer, a layer class or None, got {norm_layer!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
