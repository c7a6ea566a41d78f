"""Data sets as arrays of raw images."""

from dataclasses import dataclass

import keras
import numpy as np

SPLIT_SEED = 0  # Of the split alone: it stays the same whatever the run's seed.


@dataclass(frozen=True)
class Split:
    """Images (batch, height, width, channels) with values 0..255, and their labels (batch, classes), one-hot."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A data set's three parts and its class names."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


def load(name: str, image_size: int) -> Dataset:
    """Loads a data set by name, scaled to `image_size` pixels a side.

    Raises:
        ValueError: where the name is not known.
    """
    if name != "digits":
        raise ValueError(f"dataset must be 'digits', got {name!r}.")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.asarray(digits.images, "float32")[..., None] * (255 / 16)
    images = keras.ops.convert_to_numpy(keras.ops.image.resize(images, (image_size, image_size)))
    indices = np.arange(len(images))
    rest, test = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=0.125, stratify=digits.target[rest], random_state=SPLIT_SEED
    )
    labels = keras.utils.to_categorical(digits.target)
    parts = [Split(images[part], labels[part]) for part in (train, validation, test)]
    return Dataset(*parts, class_names=tuple(map(str, digits.target_names)))
