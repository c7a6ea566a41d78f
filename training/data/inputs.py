"""All that a run reads: its data set, as batches for the training, the validation and the test."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from ..config import Config
from . import batches, crops, masks, objects, sets, windows
from .batches import Batches
from .sets import Dataset


@dataclass
class Inputs:
    """What one process of a run reads.

    Attributes:
        dataset: the three splits.
        train: in a new order each epoch, and changed at random.
        ordered: the training images as for an evaluation.
        validation: in order.
        test: in order.
        class_weight: of each class, or None where all count the same.
    """

    dataset: Dataset
    train: Batches
    ordered: Batches
    validation: Batches
    test: Batches
    class_weight: dict[int, float] | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.dataset.class_names

    def for_model(self, model: keras.Model) -> None:
        """Is told the model that is trained, where what is read depends on it."""
        for of_part in (self.train, self.ordered, self.validation, self.test):
            of_part.for_model(model)


def read(config: Config, shard: tuple[int, int] = (0, 1)) -> Inputs:
    """The inputs that the settings ask for.

    Args:
        config: the settings.
        shard: (number, of) of the process that reads.

    Raises:
        ValueError: where the data set is none.
    """
    if config.task == "segmentation":
        dataset = masks.load(config.dataset, config.image_size, config.held_out)
    elif config.task == "detection":
        dataset = objects.load(config.dataset, config.image_size, config.held_out)
    else:
        dataset = sets.load(config.dataset, config.image_size, config.data_dir, config.held_out)
    return inputs_of(dataset, config, shard)


def inputs_of(dataset: Dataset, config: Config, shard: tuple[int, int] = (0, 1)) -> Inputs:
    """The same of a data set that has been read."""
    classes = len(dataset.class_names)
    # Of images with a class each, with a mask, or with boxes.
    of: Any = {"classification": batches, "segmentation": windows, "detection": crops}[config.task]
    ordered, validation, test = (
        of.evaluation_batches(split, classes, config, shard)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    weights = balanced(dataset.train.labels, classes) if config.class_weights else None
    train = of.training_batches(dataset.train, classes, config, shard)
    return Inputs(dataset, train, ordered, validation, test, weights)


def balanced(labels: np.ndarray, classes: int) -> dict[int, float]:
    """Weights of the classes: the mean number of images of a class over its own."""
    counts = np.bincount(labels, minlength=classes)
    return {label: len(labels) / classes / max(1, int(count)) for label, count in enumerate(counts)}
