"""Data sets as arrays of raw images, and the batches that training reads."""

import math
from collections.abc import Callable
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


class Batches(keras.utils.PyDataset):
    """Batches of a split in a new order each epoch, randomly changed if asked.

    The changes are made here and not inside the model: compiled into the training step, XLA repeats
    them for each use of the images (50 times slower on a CPU).

    Args:
        split: images and labels.
        batch_size: images a batch; the last one may be smaller.
        seed: of the order; the order of an epoch is a function of the seed and the epoch's number.
        change: from a batch of images to a changed one, or None.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, change: Callable | None = None):
        super().__init__()
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.change = change
        self.epoch = -1
        self.on_epoch_begin()

    def __len__(self):
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __getitem__(self, index):
        part = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.split.images[part]
        if self.change is not None:
            images = keras.ops.convert_to_numpy(self.change(images))
        return images, self.split.labels[part]

    def on_epoch_begin(self):
        self.epoch += 1
        self.order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.split.labels))


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
    train, validation = train_test_split(rest, test_size=0.125, stratify=digits.target[rest], random_state=SPLIT_SEED)
    labels = keras.utils.to_categorical(digits.target)
    parts = [Split(images[part], labels[part]) for part in (train, validation, test)]
    return Dataset(*parts, class_names=tuple(map(str, digits.target_names)))
