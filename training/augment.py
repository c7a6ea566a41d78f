"""Random changes to the training images, by Keras's own layers."""

import keras


def small_shifts(rate: float, seed: int) -> keras.Sequential:
    """Moves, turns and scales each image a little, for images whose object fills the frame.

    Args:
        rate: largest shift and change of scale, as a fraction of the side; turns are up to `rate / 2`
            of half a circle.
        seed: of the draws.

    Returns:
        A model from images (batch, height, width, channels) to changed ones; the identity outside training.
    """
    common = {"fill_mode": "constant", "seed": seed}
    return keras.Sequential(
        [
            keras.layers.RandomTranslation(rate, rate, **common),
            keras.layers.RandomRotation(rate / 4, **common),
            keras.layers.RandomZoom(rate, **common),
        ],
        name="augment",
    )
