"""Batches of a split: what `fit`, `evaluate` and `predict` read, on any backend."""

import collections
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

import keras_mnv2

from ..config import Config
from ..parallel.channel import Channel
from . import augment
from .sets import Split

MOST_WORKERS = 16


class Batches(keras.utils.PyDataset):
    """Batches of images (batch, height, width, channels) with values 0..255 and one-hot labels (batch, classes).

    Args:
        split: images and labels.
        classes: how many there are.
        batch_size: images a batch.
        prepare: from a split's image and a random generator to an array; all of one shape.
        change: from images, labels, a seed, the first row in the batch and the batch's size to changed rows, or None.
        seed: of the order and all changes; the images that fill no whole batch are left out, others in each epoch. None
            keeps the order of the split, with a last batch that may be smaller.
        workers: threads that make batches.
        shard: (number, of) of the process that reads. In training each reads its own rows of every batch, in order, so
            `of` must divide `batch_size`; of an ordered split it reads every `of`-th batch.

    A batch depends only on (seed, epoch, index): not on what was asked for before, nor on the threads. Its rows are the
    same for any number of processes, but for what Keras's layers draw, which they draw for a process's rows.
    """

    def __init__(
        self,
        split: Split,
        classes: int,
        batch_size: int,
        prepare: Callable[..., Any],
        change: Callable[[np.ndarray, np.ndarray, int, int, int], tuple[np.ndarray, np.ndarray]] | None = None,
        seed: int | None = None,
        workers: int = 2,
        shard: tuple[int, int] = (0, 1),
    ):
        super().__init__(workers=workers)
        self.split = split
        self.classes = classes
        self.batch_size = batch_size
        self.prepare = prepare
        self.change = change
        self.seed = seed
        self.shard = shard
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
            found = np.zeros_like(images[:1]), self.nothing(labels)
        return found

    def batch(self, epoch: int, index: int) -> tuple[np.ndarray, Any] | None:
        """Images and targets of batch `index` in `epoch`; None where none of them can be read.

        An image that cannot be read is left out of an ordered split. In training the next readable one of the data set
        takes its place, so that batches keep their shape.

        Raises:
            ValueError: where no image of the whole split can be read.
        """
        size, first = self.batch_size, 0
        if self.seed is not None:
            number, of = self.shard
            size //= of
            first = number * size
        start = index * self.batch_size + first
        # Of the batch and of each image. The order's has zeros in their places.
        position = (self.seed or 0, epoch, index + 1)
        rngs = (np.random.default_rng((*position, row + 1)) for row in itertools.count(first))
        chosen = self._order(epoch)[start : start + size]
        pairs = [pair for i, rng in zip(chosen, rngs, strict=False) if (pair := self._read(int(i), rng)) is not None]
        if not pairs:
            if len(self.unreadable) == len(self.split):
                raise ValueError(f"dataset must have images that can be read. {self.told()}")
            return None
        images = np.stack([image for image, _ in pairs])
        labels = self.targets([label for _, label in pairs])
        if self.change is not None:
            seed = int(np.random.default_rng(position).integers(2**31))
            images, labels = self.change(images, labels, seed, first, self.batch_size)
        return images.astype("float32"), labels

    def example(self, i: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        """The image `i` of the split as it goes into a batch, and its label."""
        image, label = self.split[i]
        return self.prepare(image, rng), label

    def targets(self, labels: list[Any]) -> Any:
        """What the labels of the images of a batch are for the training."""
        return keras.utils.to_categorical(labels, self.classes).astype("float32")

    def nothing(self, targets: Any) -> Any:
        """What stands for an image without a class, beside such targets."""
        return np.zeros_like(targets[:1])

    def for_model(self, model: keras.Model) -> None:
        """Is told the model that is trained, before the first batch, where the targets depend on it."""

    def stream(self, epoch: int = 0, step: int = 0, epochs: int | None = None) -> Generator[tuple[np.ndarray, Any]]:
        """All batches from a place on, for so many epochs or without end, made ahead by threads."""
        return (batch for _, batch in self.numbered_stream(epoch, step, epochs))

    def numbered_stream(
        self, epoch: int = 0, step: int = 0, epochs: int | None = None, until: int | None = None
    ) -> Iterator[tuple[int, tuple[np.ndarray, Any]]]:
        """The same with the index of each batch in its epoch, which ends before the index `until`."""
        numbers = itertools.count(epoch) if epochs is None else range(epoch, epoch + epochs)
        first, every = self.shard if self.seed is None else (0, 1)
        last = len(self) if until is None else until
        positions = ((e, i) for e in numbers for i in range(step if e == epoch else 0, last) if i % every == first)
        pool = ThreadPoolExecutor(self.workers)
        ahead: collections.deque[tuple[int, Future]] = collections.deque()

        def more(count):
            ahead.extend((e_i[1], pool.submit(self.batch, *e_i)) for e_i in itertools.islice(positions, count))

        try:
            more(self.workers + 1)
            while ahead:
                start = time.perf_counter()
                index, future = ahead.popleft()
                batch = future.result()
                self.waited += time.perf_counter() - start
                more(1)
                if batch is not None:
                    yield index, batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def for_fit(self, batches: Iterator[tuple[np.ndarray, Any]], class_weight: dict[int, float] | None = None) -> Any:
        """Batches of a stream as `fit` takes them, together with `steps_per_epoch`.

        With weights of the classes each batch has those of its images too, by their largest label: `fit` takes
        `class_weight` for no generator.
        """

        def stream():
            for images, labels in batches:
                if class_weight is None:
                    yield images, labels
                else:
                    yield images, labels, np.array([class_weight[int(i)] for i in labels.argmax(1)], "float32")

        if keras.backend.backend() != "tensorflow":
            return stream()
        import tensorflow as tf

        # Keras would prefetch from a generator, and `waited` would be the time that its reader waits, not the training.
        specs = keras.tree.map_structure(lambda empty: tf.TensorSpec((None, *empty.shape[1:]), empty.dtype), self.empty)
        specs += () if class_weight is None else (tf.TensorSpec((None,), "float32"),)
        return tf.data.Dataset.from_generator(stream, output_signature=specs)

    @functools.cached_property
    def empty(self) -> tuple[np.ndarray, Any]:
        """A batch without images, of the shapes and types of all."""
        return keras.tree.map_structure(lambda array: array[:0].copy(), self[0])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of the images."""
        return self.empty[0].shape[1:]

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
                return self.example(j, rng)
            except (ValueError, OSError) as error:
                self.unreadable[self.split.name(j)] = str(error)
        return None


def preprocessing(config: Config) -> keras_mnv2.Preprocessing:
    """How the photographs of validation and test are resized and cropped."""
    size = config.evaluation_size or config.image_size
    return keras_mnv2.Preprocessing.for_evaluation(size, config.weights, config.resize)


def training_batches(split: Split, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> Batches:
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
        lambda images, labels, seed, first, size: augment.change_batch(images, labels, config, seed, first, size),
        config.seed,
        config.workers or cores(),
        shard,
    )


def evaluation_batches(split: Split, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> Batches:
    """Batches of validation and test."""
    return ordered_batches(split, classes, preprocessing(config), config.batch_size, config.workers, shard)


def ordered_batches(
    split: Split,
    classes: int,
    how: keras_mnv2.Preprocessing,
    batch_size: int,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches in the split's order, of the centre of each image."""

    def prepare(image, rng):
        return resized(image, how, how.crop)

    return Batches(split, classes, batch_size, prepare, workers=workers or cores(), shard=shard)


def read_scores(
    run: Callable[[np.ndarray], Any],
    batches: Batches,
    channel: Channel | None = None,
    start: int = 0,
    until: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What `run` gives for all images that can be read, in order, and their labels.

    Args:
        run: from images (batch, height, width, channels) to an array (batch, numbers).
        batches: ordered; each worker's shard.
        channel: to the processes that read them. Process 0 gets everything, the names of unreadable images too, and the
            others get their own part.
        start: index of the first batch.
        until: index after the last one; by default all are read.

    Returns:
        Arrays (images, numbers) and (images,).
    """
    numbered = batches.numbered_stream(step=start, epochs=1, until=until)
    found = [(i, _numbers(run(images)), labels.argmax(1)) for i, (images, labels) in numbered]
    if channel is not None and channel.of > 1:
        own = [np.asarray(array) for batch in found for array in batch]
        for other in channel.gather_arrays(*own)[1:]:
            found += [(int(i), x, y) for i, x, y in zip(other[::3], other[1::3], other[2::3], strict=True)]
        found.sort(key=lambda one: one[0])
        share_unreadable(batches, channel)
    if not found:
        return np.zeros((0, 0), "float32"), np.zeros(0, "int64")
    _, scores, labels = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(labels)


def _numbers(scores):
    """As an array of NumPy; bfloat16, which its files do not have, as float32."""
    scores = np.asarray(scores)
    return scores if scores.dtype.kind in "biuf" else scores.astype("float32")


def share_unreadable(batches: Batches, channel: Channel) -> None:
    """Gives process 0 the names of the images that the others could not read."""
    for part in channel.gather(json.dumps(batches.unreadable).encode()):
        batches.unreadable |= json.loads(part)


def resized(image: Any, how: keras_mnv2.Preprocessing, size: int) -> np.ndarray:
    """The centre of a photograph, `size` pixels a side; an array that has this size stays as it is."""
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return image
    return keras_mnv2.resize_and_crop(augment.picture_of(image), how, size)[..., : augment.channels_of(image)]


def cores() -> int:
    """Threads that make batches, where nobody says how many."""
    return min(MOST_WORKERS, os.cpu_count() or 1)
