"""Batches of images with boxes: random crops and colours, in which the boxes stay on their objects.

They are Pillow's and NumPy's, as everywhere here. Keras's own layers know boxes too, but not what SSD needs: a crop is
chosen by what it overlaps, and cuts an object or drops it by where its centre is. They change arrays of one size,
where photographs differ, and draw from a state that a run could not go on from at any batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from PIL import Image, ImageEnhance

import keras_mnv2

from ..config import Config
from .augment import picture_of
from .batches import Batches, cores
from .boxes import Objects
from .objects import ObjectSplit, overlaps
from .windows import FILL

# Of SSD (Liu et al. 2016, section 2.2): what a crop overlaps some object by at least, once the whole image is left out;
# 0 is any crop. Sides as fractions of the image's: 0.3, as in the authors' code and torchvision, not the paper's 0.1.
LEAST_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
LEAST_SIDE, RATIOS = 0.3, (0.5, 2.0)
TRIES = 50
# Photometric distortion (Howard 2013, arXiv 1312.5402), in the ranges of torchvision's port of SSD's: factors, and the
# part of the circle of hues.
FACTORS = {
    "brightness": (ImageEnhance.Brightness, (0.875, 1.125)),
    "contrast": (ImageEnhance.Contrast, (0.5, 1.5)),
    "saturation": (ImageEnhance.Color, (0.5, 1.5)),
}
HUE = 0.05

Box = tuple[float, float, float, float]


class ObjectBatches(Batches):
    """Batches of images as in `Batches`, with their objects.

    In training the targets are those of `keras_mnv2.TargetEncoder`, once `for_model` has said of which model. Otherwise
    they are a list of the `Objects` of each image.

    Args:
        split: images and objects.
        classes: how many there are.
        batch_size: images a batch.
        prepare: from a split's image, its objects and a random generator to an array (size, size, 3) and its objects.
        seed: as in `Batches`.
        workers: likewise.
        shard: likewise.
    """

    def __init__(
        self,
        split: ObjectSplit,
        classes: int,
        batch_size: int,
        prepare: Callable[[Any, Objects, np.random.Generator], tuple[np.ndarray, Objects]],
        seed: int | None = None,
        workers: int = 2,
        shard: tuple[int, int] = (0, 1),
    ):
        super().__init__(split, classes, batch_size, prepare, None, seed, workers, shard)
        self.model: keras.Model | None = None
        self.encoder: keras_mnv2.TargetEncoder | None = None

    def for_model(self, model):
        self.model, self.encoder = model, keras_mnv2.TargetEncoder(model)

    def example(self, i, rng):
        return self.prepare(*self.split[i], rng)

    def targets(self, labels):
        return labels if self.seed is None or self.encoder is None else self.encode(labels)

    def encode(self, objects: Sequence[Objects]) -> dict[str, np.ndarray]:
        """What the network is trained on; objects that do not count are background."""
        assert self.encoder is not None
        return self.encoder([one.boxes for one in objects], [np.where(one.ignored, -1, one.classes) for one in objects])

    def suppress(self, outputs: dict[str, np.ndarray]) -> dict[str, Any]:
        """The detections of what the network says, as `keras_mnv2.detector` gives them."""
        return self._detections([outputs["boxes"], outputs["classes"]])

    @functools.cached_property
    def _detections(self) -> keras.layers.Layer:
        return keras_mnv2.detector(self.model).get_layer("detections")

    def nothing(self, targets):
        return [Objects(np.zeros((0, 4), "float32"), np.zeros(0, "int64"), np.zeros(0, bool))]

    @functools.cached_property
    def image_shape(self):
        # Before there is a model.
        return self[0][0].shape[1:]


def training_batches(split: Any, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> ObjectBatches:
    """Batches in a new order each epoch, changed at random as `config` says."""

    def prepare(image, objects, rng):
        picture = picture_of(image)
        image, objects = crop(picture, objects, random_crop(picture.size, objects, config, rng), config.image_size)
        if config.photometric:
            image = distort(image, rng)
        pixels = np.asarray(image)
        if config.flip and rng.random() < 0.5:
            pixels, objects = pixels[:, ::-1], mirrored(objects, config.image_size)
        return pixels, objects

    workers = config.workers or cores()
    return ObjectBatches(split, classes, config.batch_size, prepare, config.seed, workers, shard)


def evaluation_batches(split: Any, classes: int, config: Config, shard: tuple[int, int] = (0, 1)) -> ObjectBatches:
    """Batches of validation and test: whole images, each side resized to that of the network."""

    def prepare(image, objects, rng):
        picture = picture_of(image)
        image, objects = crop(picture, objects, (0, 0, *picture.size), config.image_size)
        return np.asarray(image), objects

    return ObjectBatches(split, classes, config.batch_size, prepare, workers=config.workers or cores(), shard=shard)


def random_crop(size: tuple[int, int], objects: Objects, config: Config, rng: np.random.Generator) -> Box:
    """A part of an image as SSD draws it (Liu et al. 2016, section 2.2, and 3.6 for what lies around the image).

    With `zoom_out` above 1 half of the images lie somewhere on a canvas that is larger by a random factor up to it.
    With `iou_crop` one of seven is drawn: the whole, or a crop whose overlap with some object is at least 0, 0.1, 0.3,
    0.5, 0.7 or 0.9, with the centre of an object inside. Where 50 crops do not fit, or there is no object, the whole
    is taken.

    Args:
        size: (width, height) of the image.
        objects: on the image.
        config: its `iou_crop` and `zoom_out`.
        rng: where all that is random comes from.

    Returns:
        (left, top, right, bottom) in pixels of the image, and beyond it where the canvas is larger.
    """
    left, top, width, height = 0.0, 0.0, float(size[0]), float(size[1])
    if config.zoom_out > 1 and rng.random() < 0.5:
        factor = rng.uniform(1, config.zoom_out)
        left, top = (-side * (factor - 1) * place for side, place in zip(size, rng.random(2), strict=True))
        width, height = width * factor, height * factor
    whole = (left, top, left + width, top + height)
    if not config.iou_crop or (choice := rng.integers(len(LEAST_OVERLAPS) + 1)) == len(LEAST_OVERLAPS):
        return whole
    boxes = objects.boxes[~objects.ignored].astype("float64")
    for _ in range(TRIES if len(boxes) else 0):
        w, h = rng.uniform(LEAST_SIDE, 1, 2) * (width, height)
        x, y = (left, top) + rng.random(2) * (width - w, height - h)
        found = (float(x), float(y), float(x + w), float(y + h))
        overlap = overlaps(np.array([found]), boxes).max()
        fits = RATIOS[0] <= w / h <= RATIOS[1] and overlap >= LEAST_OVERLAPS[choice]
        if fits and centre_inside(boxes, found).any():
            return found
    return whole


def centre_inside(boxes: np.ndarray, box: Box) -> np.ndarray:
    """Of which boxes (n, 4) the centre lies in `box`, (n,)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > box[:2]) & (centres < box[2:])).all(axis=1)


def crop(picture: Image.Image, objects: Objects, box: Box, size: int) -> tuple[Image.Image, Objects]:
    """A part of an image, resized, with its objects; what it has beyond the image is grey.

    Objects whose centre is outside go, and the others end at the edge.

    Args:
        picture: in RGB.
        objects: on it.
        box: (left, top, right, bottom) of the part, in pixels of the image.
        size: side of the result, in pixels.

    Returns:
        An image of size x size pixels, and its objects.
    """
    if box == (0, 0, size, size) and picture.size == (size, size):
        return picture, objects
    corner, sides = np.array(box[:2]), np.subtract(box[2:], box[:2])
    # The image's part of the box, and the whole pixels of the result that it fills.
    low, high = np.maximum(box[:2], 0), np.minimum(box[2:], picture.size)
    first, last = (np.round((end - corner) / sides * size).astype(int) for end in (low, high))
    last = np.maximum(last, first + 1)
    part = picture.resize(
        tuple((last - first).tolist()), Image.Resampling.BILINEAR, box=(*low.tolist(), *high.tolist())
    )
    if part.size != (size, size):
        canvas = Image.new("RGB", (size, size), FILL)
        canvas.paste(part, tuple(first.tolist()))
        part = canvas
    factors = (last - first) / (high - low)
    moved = (objects.boxes.reshape(-1, 2, 2) - low) * factors + first
    boxes = np.clip(moved, 0, size).reshape(-1, 4).astype("float32")
    # Of a centre at the very edge rounding may leave no area.
    kept = centre_inside(objects.boxes, box) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return part, Objects(boxes[kept], objects.classes[kept], objects.ignored[kept])


def mirrored(objects: Objects, size: int) -> Objects:
    """The objects of an image of this width that is mirrored."""
    left, top, right, bottom = objects.boxes.T
    return Objects(np.stack([size - right, top, size - left, bottom], axis=1), objects.classes, objects.ignored)


def distort(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, each changed in half of the images and in a random order."""
    for i in rng.permutation(len(FACTORS) + 1):
        if rng.random() < 0.5:
            continue
        if i == len(FACTORS):
            hue, saturation, value = picture.convert("HSV").split()
            move = round(255 * rng.uniform(-HUE, HUE))
            hue = hue.point([(level + move) % 256 for level in range(256)])
            picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            enhancer, factors = list(FACTORS.values())[i]
            picture = enhancer(picture).enhance(rng.uniform(*factors))
    return picture
