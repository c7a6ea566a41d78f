"""Class activation maps: which parts of an image speak for a class."""

from typing import Any

import keras
import numpy as np
from PIL import Image

# From what speaks least to what speaks most: violet, red, orange, pale yellow.
COLOURS = np.array([(70, 10, 130), (200, 40, 90), (250, 140, 20), (255, 250, 160)], "float32")
# Of the colours over the image, where the map is 1.
STRENGTH = 0.75


def activation_maps(model: keras.Model, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """What in each image speaks for a class, for networks that end in a global average and one dense layer.

    The sum of the last feature map's channels, each times the dense layer's weight for the class (CAM, Zhou et al.
    2016, arXiv 1512.04150), without what is negative, and brought to the size of the image. For such networks
    Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, section 3, "Grad-CAM generalizes CAM") is the same up to a
    factor: the gradient of the score before the softmax is the weight over the number of positions, at each position.

    Args:
        model: whose last layers are `GlobalAveragePooling2D`, perhaps `Dropout`, and `Dense`, perhaps followed by a
            layer of its activation.
        images: as the model takes them, (images, height, width, channels), or with the channels first if it does.
        classes: of each image, the index of the class to explain, (images,).

    Returns:
        Maps (images, height, width) of 0 to 1, float32. Each is divided by its largest value; where nothing speaks for
        the class it is 0 everywhere.

    Raises:
        ValueError: where the model ends otherwise.

    Examples:
        >>> model = keras_mnv2.MobileNetV2((64, 96, 3), alpha=0.35, weights=None, classes=5, include_preprocessing=True)
        >>> activation_maps(model, np.zeros((2, 64, 96, 3)), np.array([3, 0])).shape
        (2, 64, 96)
    """
    pooling, dense = _top(model)
    features = keras.Model(model.inputs[0], pooling.input).predict_on_batch(images).astype("float32")
    if channels_first := pooling.data_format == "channels_first":
        features = np.moveaxis(features, 1, -1)
    kernel = keras.ops.convert_to_numpy(dense.kernel).astype("float32")
    maps = np.einsum("nhwk,kn->nhw", features, kernel[:, classes]).clip(min=0)
    height, width = images.shape[2:] if channels_first else images.shape[1:3]
    enlarged = (Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR) for one in maps)
    large = np.stack([np.asarray(one) for one in enlarged])
    largest = large.max(axis=(1, 2), keepdims=True)
    return large / np.where(largest > 0, largest, 1)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image in grey under the colours of its map; what does not speak for the class stays grey.

    Args:
        image: bytes (height, width, 1 or 3).
        heat: of `activation_maps`, (height, width).

    Returns:
        Bytes (height, width, 3).
    """
    grey = image.astype("float32").mean(axis=-1, keepdims=True)
    positions = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(heat, positions, channel) for channel in COLOURS.T], axis=-1)
    opacity = STRENGTH * heat[..., None]
    return (grey * (1 - opacity) + colours * opacity).round().astype("uint8")


def _top(model: keras.Model) -> tuple[Any, Any]:
    """The pooling and the dense layer that a model ends in."""
    layers = list(model.layers)
    while layers and isinstance(layers[-1], (keras.layers.Activation, keras.layers.Softmax)):
        layers.pop()
    dense = layers.pop() if layers else None
    while layers and isinstance(layers[-1], keras.layers.Dropout):
        layers.pop()
    pooling = layers.pop() if layers else None
    if not isinstance(dense, keras.layers.Dense) or not isinstance(pooling, keras.layers.GlobalAveragePooling2D):
        names = [type(layer).__name__ for layer in model.layers[-3:]]
        raise ValueError(f"model must end in GlobalAveragePooling2D and Dense, got {', '.join(names)}.")
    return pooling, dense
