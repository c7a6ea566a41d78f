"""Photographs in batches, prepared as a checkpoint's library prepares them, for `evaluate` and `predict`."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import PathLike
from keras_mnv2.checks import check_whole
from keras_mnv2.folders import class_folders
from keras_mnv2.preprocessing import MOST_SIDE, preprocessing_of, resize_and_crop
from keras_mnv2.weights.table import Checkpoint, Preprocessing

# Losses and metrics take int32 labels on each backend.
LARGEST_LABEL = 2**31 - 1


class _Photographs(keras.utils.PyDataset):
    """Batch `i` holds images `i * batch_size` and on, whatever was asked for before."""

    def __init__(
        self,
        images: Any,
        labels: Any,
        how: Preprocessing,
        size: int | None,
        batch_size: int,
        normalize: bool,
        class_names: list[str] | None,
        workers: int,
    ) -> None:
        super().__init__(workers=workers)
        self.images, self.labels, self.class_names = images, labels, class_names
        self.paths = None if isinstance(images, np.ndarray) else images
        self.how, self.size, self.batch_size, self.normalize = how, size, batch_size, normalize

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index!r}.")
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        x = np.stack([resize_and_crop(image, self.how, self.size) for image in self.images[rows]]).astype("float32")
        if self.normalize:
            # On NumPy: a device tensor a batch would only be copied back.
            x = (x / 255 - np.asarray(self.how.mean, "float32")) / np.asarray(self.how.std, "float32")
        return (x,) if self.labels is None else (x, self.labels[rows])


def evaluation_data(
    images: PathLike | Sequence[Any] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    weights: str | Checkpoint | Preprocessing | None = None,
    batch_size: int = 32,
    size: int | None = None,
    workers: int = 2,
    normalize: bool = True,
) -> keras.utils.PyDataset:
    """Photographs as batches for `evaluate` and `predict` of any backend, prepared as a checkpoint expects.

    Args:
        images: a folder of class folders, as `class_folders` reads it, a sequence of paths, or an array of bytes
            (number, height, width, 3).
        labels: whole numbers from 0 to 2147483647, of a sequence or an array; those of a folder are the places of its
            class folders in their sorted order.
        weights: whose preprocessing, as in `preprocess_input` and `resize_and_crop`.
        batch_size: images a batch; the last one may have fewer.
        size: pixels of each side instead of the checkpoint's.
        workers: threads that read images.
        normalize: False leaves pixels of 0..255, for models with `include_preprocessing`.

    Returns:
        A `keras.utils.PyDataset` of float32 batches NHWC, with labels where there are any; its `class_names` are the
        folder's and its `paths` the files, otherwise None.

    Raises:
        ValueError: on a folder without class folders or images, an array of another shape or type, labels out of range
            or of another number and, while it is read, on a file that is no image.
        FileNotFoundError: while it is read, where there is no such file.

    Examples:
        >>> data = evaluation_data(np.zeros((5, 40, 60, 3), "uint8"), weights="torchvision/IMAGENET1K_V2", batch_size=4)
        >>> len(data), data[1][0].shape
        (2, (1, 224, 224, 3))
    """
    batch_size = check_whole("batch_size", batch_size)
    workers = check_whole("workers", workers)
    if size is not None:
        size = check_whole("size", size, most=MOST_SIDE)
    class_names = None
    if isinstance(images, str | os.PathLike):
        if labels is not None:
            raise ValueError("labels must be None where images is a folder, whose class folders are the labels.")
        try:
            images, labels, names = class_folders(images)
            class_names = list(names)
        except ValueError as error:
            raise ValueError(str(error).replace("folder must", "images must", 1)) from None
    if not isinstance(images, np.ndarray) or images.dtype.kind in "OU":
        try:
            images = list(images)
        except TypeError:
            raise ValueError(
                "images must be a folder, a sequence of paths or an array of bytes (number, height, width, 3), "
                f"got {images!r}."
            ) from None
    elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            "images must be a folder, a sequence of paths or an array of bytes (number, height, width, 3), "
            f"got {images.dtype} of shape {images.shape}."
        )
    if not len(images):
        raise ValueError("images must hold at least one image, got none.")
    if labels is not None:
        labels = _whole_labels(labels, len(images))
    how = preprocessing_of(weights)
    return _Photographs(images, labels, how, size, batch_size, normalize, class_names, workers)


def _whole_labels(labels: Any, count: int) -> np.ndarray:
    """Labels as an array of int32."""
    array = np.asarray(labels)
    if not array.shape:
        raise ValueError(f"labels must be a sequence of whole numbers, one an image, got {labels!r}.")
    if len(array) != count:
        raise ValueError(f"labels must have one label an image, got {len(array)} for {count} images.")
    # Those beyond int64 come as objects.
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers, one an image, got {array.dtype} of shape {array.shape}.")
    wrong = array[(array < 0) | (array > LARGEST_LABEL)]
    if len(wrong):
        raise ValueError(f"labels must be whole numbers from 0 to {LARGEST_LABEL}, got {wrong[0]}.")
    return array.astype("int32")
