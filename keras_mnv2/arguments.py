"""The checks of arguments: each error names the argument, the value, and what is allowed."""

import numbers
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np

NORMS = ("batch_norm", "sync_batch_norm", "group_norm")
FLOATS = ("float16", "bfloat16", "float32", "float64")
Choice = TypeVar("Choice")


def check_positive(name: str, value: Any, most: float = sys.float_info.max) -> float:
    """`value` as a number of Python; raises `ValueError` unless it is above 0 and at most `most`."""
    if not _is_number(value) or not 0 < value <= most:
        bound = f", and at most {most}" if most != sys.float_info.max else ""
        raise ValueError(f"{name} must be a finite number above 0{bound}, got {value!r}.")
    return _plain(value)


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an integer of Python; raises `ValueError` unless it is whole, and from `least` to `most`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bound = f" and at most {most}" if most is not None else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{bound}, got {value!r}.")
    return int(value)


def check_rate(name: str, value: Any) -> float:
    """`value` as a number of Python; raises `ValueError` unless it is from 0 up to, and not including, 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number from 0 up to, and not including, 1, got {value!r}.")
    return _plain(value)


def check_choice(name: str, value: Any, allowed: Sequence[Choice]) -> Choice:
    """The one of `allowed` that `value` is; raises `ValueError` where it is none."""
    for choice in allowed:
        same = type(value) is type(choice) or (isinstance(value, numbers.Integral) and isinstance(choice, int))
        if same and not isinstance(value, bool) and value == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_flag(name: str, value: Any) -> bool:
    """`value` as True or False; raises `ValueError` where it is neither, such as a text."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def check_model(name: str, model: Any) -> keras.Model:
    """`model`; raises `ValueError` where it is no Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"{name} must be a Keras model, got a value of type {type(model).__name__}.")
    return model


def check_path(name: str, path: Any) -> Path:
    """`path` as a `Path`; raises `ValueError` where it is none, or empty."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise ValueError(f"{name} must be a path that is not empty, got {path!r}.")
    return Path(path)


def activation_function(name: str, activation: Any) -> Callable[..., Any]:
    """The function behind a Keras activation's name; an unknown one is a `ValueError` that names `name`."""
    try:
        return keras.activations.get(activation)
    except ValueError:
        raise ValueError(
            f"{name} must be None, a function or the name of a Keras activation, got {activation!r}."
        ) from None


def dtype_policy(dtype: Any) -> keras.DTypePolicy:
    """The dtype policy that `dtype` names, or Keras's setting where it is None.

    Raises:
        ValueError: where it is none, or one that does not compute in floating point.
    """
    dtype = keras.config.dtype_policy() if dtype is None else dtype
    try:
        policy = keras.dtype_policies.get(dtype)
        fits = {policy.compute_dtype, policy.variable_dtype} <= set(FLOATS)
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits or isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
        names = ", ".join(map(repr, FLOATS))
        raise ValueError(
            f"dtype must be {names}, 'mixed_float16', 'mixed_bfloat16', such a policy of Keras or None, got {dtype!r}."
        )
    return policy


def data_format_name(data_format: str | None) -> str:
    """`data_format`, or Keras's setting where it is None."""
    if data_format is None:
        return keras.config.image_data_format()
    check_choice("data_format", data_format, ("channels_last", "channels_first"))
    return data_format


def is_plain_batch_norm(norm: Any, data_format: str) -> bool:
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


def norm_config(norm_layer: Any) -> str | dict[str, Any] | None:
    """The form in which a layer keeps `norm_layer`: None, a name, or a serialised prototype.

    Raises:
        ValueError: where `norm_layer` is none of what `ConvNormActivation` allows.
    """
    if norm_layer is None or (isinstance(norm_layer, str) and norm_layer in NORMS):
        return norm_layer
    names = ", ".join(map(repr, NORMS))
    told = f"norm_layer must be {names}, a Keras layer, a layer class or None, got {norm_layer!r}."
    # What the classes raise that need arguments, or that nobody knows.
    try:
        if isinstance(norm_layer, dict) and isinstance(
            keras.saving.deserialize_keras_object(norm_layer), keras.layers.Layer
        ):
            return norm_layer
        if isinstance(norm_layer, type) and issubclass(norm_layer, keras.layers.Layer):
            norm_layer = norm_layer()
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(told) from error
    if not _is_layer(norm_layer):
        raise ValueError(told)
    return keras.saving.serialize_keras_object(norm_layer)


def _is_layer(value: object) -> bool:
    return isinstance(value, keras.layers.Layer)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value: Any) -> int | float:
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)
