"""The checks of arguments of Keras's kinds: each error names the argument, the value, and what is allowed."""

from collections.abc import Callable
from typing import Any

import keras

from keras_mnv2.checks import check_choice

NORMS = ("batch_norm", "sync_batch_norm", "group_norm")
FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_model(name: str, model: Any) -> keras.Model:
    """`model`; raises `ValueError` where it is no Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"{name} must be a Keras model, got a value of type {type(model).__name__}.")
    return model


def check_graph(name: str, model: Any) -> Any:
    """`model`; raises `ValueError` where it is no functional or sequential model that is built."""
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(f"{name} must be a built functional or sequential Keras model, got {model!r}.")
    return model


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
