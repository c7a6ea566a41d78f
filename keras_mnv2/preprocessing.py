"""Pixels to the network's range."""

from typing import Any

import keras


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """Scales pixels from 0..255 to -1..1, as the published Keras weights expect.

    The same signature as `keras.applications.mobilenet_v2.preprocess_input`; the input is not changed.

    Args:
        x: images with values 0..255, NHWC or NCHW (or one image, HWC or CHW).
        data_format: taken for compatibility; the scaling is the same for every channel.

    Returns:
        A tensor of the same shape, in Keras's float type or that of `x`.

    Example:

    >>> tuple(preprocess_input(np.array([[[[0, 127.5, 255]]]])).shape)
    (1, 1, 1, 3)
    """
    x = keras.ops.convert_to_tensor(x)
    if not keras.backend.is_float_dtype(x.dtype):
        x = keras.ops.cast(x, keras.config.floatx())
    return x / 127.5 - 1


def preprocessing_layer(policy: keras.DTypePolicy) -> keras.layers.Layer:
    """`preprocess_input` as a layer, so that a model takes raw images."""
    return keras.layers.Rescaling(1 / 127.5, offset=-1, name="preprocess", dtype=policy)
