"""Batches of a split: what `fit`, `evaluate` and `predict` read, on any backend."""

import collections
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

import keras_mnv2
from training import augment
from training.config import Config
from training.data import Split

MOST_WORKERS = 16
# Resize and crop of an evaluation of 224 pixels, torchvision's first and most used.
RESIZE, CROP = 256, 224


class Batches(keras.utils.PyDataset):
    """Batches of images (batch, height, width, channels) with values 0..255 and one-hot labels (batch, classes).

    Args:
        split: images and labels.
        classes: how many there are.
        batch_size: images a batch.
        prepare: from a split's image and a random generator to an array; all of one shape.
        change: from images, labels and a seed to a changed batch, or None.
        seed: of the order and all changes; the images that fill no whole batch are left out, others in each epoch. None
            keeps the order of the split, with a last batch that may be smaller.
        workers: threads that make batches.

    A batch depends only on (seed, epoch, index): not on what was asked for before, nor on the threads.
    """

    def __init__(
        self,
        split: Split,
        classes: int,
        batch_size: int,
        prepare: Callable[[Any, np.random.Generator], np.ndarray],
        change: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]] | None = None,
        seed: int | None = None,
        workers: int = 2,
    ):
        super().__init__(workers=workers)
        self.split = split
        self.classes = classes
        self.batch_size = batch_size
        self.prepare = prepare
        self.change = change
        self.seed = seed
        self.unreadable: dict[str, str] = {}
        """Names of the images that could not be read, and why."""
        self.waited = 0.0
        """Seconds for which a reader of `stream` waited."""
        self._order = functools.lru_cache(2)(self._new_order)

    def __len__(self):
        whole = len(self.split) // self.batch_size
        return math.ceil(len(self.split) / self.batch_size) if self.seed is None else max(1, whole)

    def __getitem__(self, index):
        found = self.batch(0, index)
        if found is None:
            # `fit` cannot validate on nothing: a black image of no class.
            images, labels = next(filter(None, (self.batch(0, other) for other in range(len(self)))))
            found = np.zeros_like(images[:1]), np.zeros_like(labels[:1])
        return found

    def batch(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Images and labels of batch `index` in `epoch`; None where none of them can be read.

        An image that cannot be read is left out of an ordered split. In training the next readable one of the data set
        takes its place, so that batches keep their shape.

        Raises:
            ValueError: where no image of the whole split can be read.
        """
        seed = self.seed or 0
        rng = np.random.default_rng((seed, epoch, index))
        chosen = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        pairs = [pair for i in chosen if (pair := self._read(int(i), rng)) is not None]
        if not pairs:
            if len(self.unreadable) == len(self.split):
                raise ValueError(f"dataset must have images that can be read. {self.told()}")
            return None
        images = np.stack([image for image, _ in pairs])
        labels = keras.utils.to_categorical([label for _, label in pairs], self.classes)
        if self.change is not None:
            images, labels = self.change(images, labels, int(rng.integers(2**31)))
        return images.astype("float32"), labels.astype("float32")

    def stream(
        self, epoch: int = 0, step: int = 0, epochs: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All batches from a place on, for so many epochs or without end, made ahead by threads."""
        numbers = itertools.count(epoch) if epochs is None else range(epoch, epoch + epochs)
        positions = ((e, i) for e in numbers for i in range(step if e == epoch else 0, len(self)))
        pool = ThreadPoolExecutor(self.workers)
        try:
            ahead = collections.deque(
                pool.submit(self.batch, *position) for position in itertools.islice(positions, self.workers + 1)
            )
            while ahead:
                start = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited += time.perf_counter() - start
                ahead += [pool.submit(self.batch, *position) for position in itertools.islice(positions, 1)]
                if batch is not None:
                    yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def for_fit(self, epoch: int = 0) -> Any:
        """The stream as `fit` takes it, together with `steps_per_epoch`."""
        if keras.backend.backend() != "tensorflow":
            return self.stream(epoch)
        import tensorflow as tf

        # Keras would prefetch from a generator, and `waited` would be the time that its reader waits, not the training.
        shapes = [tf.TensorSpec((None, *shape), tf.float32) for shape in (self.image_shape, (self.classes,))]
        return tf.data.Dataset.from_generator(lambda: self.stream(epoch), output_signature=tuple(shapes))

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        return self[0][0].shape[1:]

    def readable(self) -> list[int]:
        """The numbers of the split's images that an ordered reading gave."""
        return [i for i in range(len(self.split)) if self.split.name(i) not in self.unreadable]

    def told(self) -> str:
        """One line that names the images that could not be read; empty where there are none."""
        if not self.unreadable:
            return ""
        shown = "; ".join(f"{name} ({why})" for name, why in itertools.islice(sorted(self.unreadable.items()), 10))
        more = f"; and {len(self.unreadable) - 10} more" if len(self.unreadable) > 10 else ""
        return f"{len(self.unreadable)} images could not be read and were skipped: {shown}{more}."

    def _new_order(self, epoch):
        indices = np.arange(len(self.split))
        return indices if self.seed is None else np.random.default_rng((self.seed, epoch)).permutation(indices)

    def _read(self, i, rng):
        tries = 1 if self.seed is None else len(self.split)
        for j in (k % len(self.split) for k in range(i, i + tries)):
            try:
                image, label = self.split[j]
                return self.prepare(image, rng), label
            except (ValueError, OSError) as error:
                self.unreadable[self.split.name(j)] = str(error)
        return None


def preprocessing(config: Config) -> keras_mnv2.Preprocessing:
    """How the photographs of validation and test are resized and cropped."""
    size = config.evaluation_size or config.image_size
    known = {checkpoint.name: checkpoint.preprocessing for checkpoint in keras_mnv2.list_weights()}
    how = known.get(config.weights or "", keras_mnv2.Preprocessing(RESIZE, CROP, crop_rounding="round"))
    resize = config.resize or how.resize * size // how.crop
    return keras_mnv2.Preprocessing(resize, size, how.interpolation, how.mean, how.std, how.crop_rounding)


def training_batches(split: Split, classes: int, config: Config) -> Batches:
    """Batches in a new order each epoch, changed as `config` says."""
    centre = preprocessing(config)

    def prepare(image, rng):
        if config.crop_area is None:
            image = resized(image, centre, config.image_size)
        return augment.change_image(image, config, rng)

    return Batches(
        split,
        classes,
        config.batch_size,
        prepare,
        lambda images, labels, seed: augment.change_batch(images, labels, config, seed),
        config.seed,
        workers(config),
    )


def evaluation_batches(split: Split, classes: int, config: Config) -> Batches:
    """Batches in the split's order, of the centre of each image."""
    how = preprocessing(config)

    def prepare(image, rng):
        return resized(image, how, how.crop)

    return Batches(split, classes, config.batch_size, prepare, workers=workers(config))


def read_scores(run: Callable[[np.ndarray], Any], batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """What `run` gives for all images that can be read, in order, and their labels.

    Args:
        run: from images (batch, height, width, channels) to an array (batch, numbers).
        batches: ordered.

    Returns:
        Arrays (images, numbers) and (images,).
    """
    pairs = [(np.asarray(run(images)), labels.argmax(1)) for images, labels in batches.stream(epochs=1)]
    scores, labels = zip(*pairs, strict=True)
    return np.concatenate(scores), np.concatenate(labels)


def resized(image: Any, how: keras_mnv2.Preprocessing, size: int) -> np.ndarray:
    """The centre of a photograph, `size` pixels a side; an array that has this size stays as it is."""
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return image
    return keras_mnv2.resize_and_crop(augment.picture_of(image), how, size)[..., : augment.channels_of(image)]


def workers(config: Config) -> int:
    """Threads that make batches."""
    return config.workers or min(MOST_WORKERS, os.cpu_count() or 1)
