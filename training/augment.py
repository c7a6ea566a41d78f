"""Random changes to the training images, by Keras's own layers."""

from collections.abc import Callable

import keras

from training.config import Config


def small_shifts(config: Config) -> Callable | None:
    """Moves, turns and scales each image a little, for images whose object fills the frame.

    Args:
        config: its `shift` is the largest move and change of scale, as a fraction of the side; turns
            go up to a quarter of it, as a fraction of a full circle.

    Returns:
        A function from images (batch, height, width, channels) to changed ones, or None where `shift` is 0.
    """
    if not config.shift:
        return None
    common = {"fill_mode": "constant", "seed": config.seed}
    layers = [
        keras.layers.RandomTranslation(config.shift, config.shift, **common),
        keras.layers.RandomRotation(config.shift / 4, **common),
        keras.layers.RandomZoom(config.shift, **common),
    ]

    def change(images):
        for layer in layers:
            images = layer(images, training=True)
        return images

    return change
