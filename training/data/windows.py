"""Batches of images and masks: windows of one size, changed alike."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..config import Config
from .augment import picture_of
from .batches import Batches, cores
from .masks import IGNORED, MaskSplit

# Around an image that is smaller than its window: what the network's scaling to -1..1 makes about 0, as the authors'
# DeepLab code pads with the mean pixel.
FILL = (127, 127, 127)


class MaskBatches(Batches):
    """Batches of images as in `Batches`, and masks (batch, height, width) of whole numbers.

    Args:
        split: images and masks.
        classes: how many labels there are.
        batch_size: images a batch.
        prepare: from a split's image, its mask and a random generator to arrays (size, size, 3) and (size, size).
        seed: as in `Batches`.
        workers: likewise.
        shard: likewise.
    """

    def __init__(
        self,
        split: MaskSplit,
        classes: int,
        batch_size: int,
        prepare: Callable[[Any, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
        seed: int | None = None,
        workers: int = 2,
        shard: tuple[int, int] = (0, 1),
    ):
        super().__init__(split, classes, batch_size, prepare, None, seed, workers, shard)

    def example(self, i, rng):
        return self.prepare(*self.split[i], rng)

    def targets(self, labels):
        return np.stack(labels).astype("int32")


def training_batches(split: Any, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> MaskBatches:
    """Batches in a new order each epoch: random windows of images that are enlarged, reduced and mirrored at random."""

    def prepare(image, mask, rng):
        scale = fitting_scale(mask, config) * config.rescale ** rng.uniform(-1, 1)
        mirrored = config.flip and rng.random() < 0.5
        return window(image, mask, config.image_size, scale, rng.random(2), mirrored)

    workers = config.workers or cores()
    return MaskBatches(split, classes, config.batch_size, prepare, config.seed, workers, shard)


def evaluation_batches(split: Any, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> MaskBatches:
    """Batches of validation and test: whole images, which are reduced where they are larger than the window."""

    def prepare(image, mask, rng):
        return window(image, mask, config.evaluation_size or config.image_size, fitting_scale(mask, config))

    return MaskBatches(split, classes, config.batch_size, prepare, workers=config.workers or cores(), shard=shard)


def fitting_scale(mask: np.ndarray, config: Config) -> float:
    """What brings the longer side of an image to that of the evaluation's window, at most 1."""
    return min(1.0, (config.evaluation_size or config.image_size) / max(mask.shape))


def window(
    image: Any,
    mask: np.ndarray,
    size: int,
    scale: float,
    place: Sequence[float] | np.ndarray = (0.0, 0.0),
    mirrored: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """A square window of a resized image and of its mask; what it has beyond them is grey, and does not count.

    Args:
        image: a Pillow image, or an array (height, width, 3).
        mask: labels, bytes (height, width).
        size: side of the window, in pixels.
        scale: factor of the image's sides.
        place: of the window, from left and top: 0 at the one edge of the image, 1 at the other.
        mirrored: whether both are mirrored.

    Returns:
        Bytes (size, size, 3) and (size, size).
    """
    picture, labels = picture_of(image), Image.fromarray(mask)
    resized = [max(1, round(scale * side)) for side in picture.size]
    if resized != [*picture.size]:
        picture = picture.resize(resized, Image.Resampling.BILINEAR)
        labels = labels.resize(resized, Image.Resampling.NEAREST)
    corner = tuple(round((size - side) * part) for side, part in zip(resized, place, strict=True))
    found = []
    for part, fill in ((picture, FILL), (labels, IGNORED)):
        canvas = Image.new(part.mode, (size, size), fill)
        canvas.paste(part, corner)
        pixels = np.asarray(canvas)
        found.append(pixels[:, ::-1] if mirrored else pixels)
    return found[0], found[1]
