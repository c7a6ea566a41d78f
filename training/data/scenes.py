"""Scenes: small real tasks of segmentation and detection, made without a network.

Handwritten digits of scikit-learn lie as stickers on pieces of scikit-image's photographs: a digit in ink on brighter
paper that is cut out around it. Training, validation and test share neither digits nor photographs.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .sets import SPLIT_NAMES, digit_scans

# Of those that lie in scikit-image's package; its other photographs are downloads.
PHOTOGRAPHS = {
    "train": ("astronaut", "coffee", "rocket", "immunohistochemistry", "brick", "gravel", "coins"),
    "validation": ("chelsea", "moon"),
    "test": ("hubble_deep_field", "retina", "grass", "camera"),
}
CLASS_NAMES = ("background", *map(str, range(10)))
# Scenes of validation and test for each one of training.
FRACTIONS = {"train": 1.0, "validation": 0.1, "test": 0.2}
# Digits in a scene at most, and places that are tried for each.
MOST_DIGITS, TRIES = 3, 20
# Sides of a digit, as fractions of the scene's, and of the margin of paper around it, as a fraction of the digit's.
SIDES, MARGIN = (0.4, 0.6), 0.12
# By which paper is brighter than ink at least, of 0..255.
CONTRAST = 90
TURN = 15.0  # Degrees, to either side.


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image with its digits.

    Attributes:
        image: bytes (size, size, 3).
        mask: bytes (size, size): 0 for the background, 1 to 10 for the digits 0 to 9, paper and ink alike.
        objects: of each digit, bool (size, size): which pixels are its own.
        classes: of each digit, 1 to 10.
        boxes: of each digit, whole pixels (left, top, right, bottom), right and bottom outside, (digits, 4).
    """

    image: np.ndarray
    mask: np.ndarray
    objects: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray


class Scenes(Sequence[Scene]):
    """The scenes of one part. Each depends on the seed, the part and its number alone.

    Args:
        part: `train`, `validation` or `test`.
        number: of scenes.
        size: side of the scenes, in pixels, at least 32.
        seed: of all that is random.
    """

    def __init__(self, part: str, number: int, size: int = 96, seed: int = 0):
        self.part = part
        self.number = number
        self.size = size
        self.seed = seed
        self._scans, self._labels = digit_scans()[part]
        self._photographs = [_photograph(name) for name in PHOTOGRAPHS[part]]

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        if not 0 <= i < self.number:
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, list(SPLIT_NAMES).index(self.part), i))
        size = self.size
        image = _background(self._photographs[rng.integers(len(self._photographs))], size, rng)
        free = np.ones((size, size), bool)
        objects, classes, boxes = [], [], []
        for _ in range(rng.integers(1, MOST_DIGITS, endpoint=True)):
            chosen = rng.integers(len(self._scans))
            colours, shape = _sticker(self._scans[chosen], round(size * rng.uniform(*SIDES)), rng)
            height, width = shape.shape
            for _ in range(TRIES):
                top, left = (int(rng.integers(0, size - side, endpoint=True)) for side in (height, width))
                place = np.s_[top : top + height, left : left + width]
                if free[place].all():
                    break
            else:
                continue
            free[place] = False
            image[place] = np.where(shape[..., None], colours, image[place])
            whole = np.zeros((size, size), bool)
            whole[place] = shape
            objects.append(whole)
            classes.append(1 + int(self._labels[chosen]))
            boxes.append((left, top, left + width, top + height))
        mask = np.zeros((size, size), "uint8")
        for own, label in zip(objects, classes, strict=True):
            mask[own] = label
        return Scene(image, mask, np.stack(objects), np.array(classes), np.array(boxes))


@functools.cache
def _photograph(name: str) -> Image.Image:
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        if error.name != "skimage":
            raise
        raise ImportError('The scenes need scikit-image: pip install "keras_mnv2[train]".') from None
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def _background(photograph, size, rng):
    """A square window of a photograph, with at least the scene's pixels where it has so many, mirrored or not."""
    shorter = min(photograph.size)
    side = int(rng.uniform(min(size, shorter), shorter))
    left, top = (int(rng.integers(0, whole - side, endpoint=True)) for whole in photograph.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photograph.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return np.array(pixels[:, :: -1 if rng.random() < 0.5 else 1])


def _sticker(scan, side, rng):
    """A digit on paper: its colours (height, width, 3), and which of these pixels are the sticker's, without a rim."""
    from scipy import ndimage

    margin = max(1, round(MARGIN * side))
    digit = Image.fromarray((scan * (255 / 16)).astype("uint8")).resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (side + 2 * margin,) * 2)
    canvas.paste(digit, (margin, margin))
    canvas = canvas.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BILINEAR)
    ink = np.asarray(canvas, "float32")[..., None] / 255
    shape = ndimage.distance_transform_edt(ink[..., 0] < 0.4) <= margin
    shape = ndimage.binary_fill_holes(shape)
    paper, colour = _two_colours(rng)
    colours = (paper + ink * (colour - paper) + rng.normal(0, 6, ink.shape)).clip(0, 255).astype("uint8")
    rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return colours[inside], shape[inside]


def _two_colours(rng):
    """Colours of paper and of darker ink."""
    while True:
        paper, ink = rng.uniform(0, 255, (2, 3))
        if paper.mean() - ink.mean() >= CONTRAST:
            return paper, ink


def scenes(number: int, size: int = 96, seed: int = 0) -> dict[str, Scenes]:
    """The three parts.

    Args:
        number: scenes of the training; the validation has a tenth of them and the test a fifth, at least one each.
        size: side of the scenes, in pixels, at least 32.
        seed: of all that is random.

    Raises:
        ImportError: where scikit-image is missing.
    """
    return {part: Scenes(part, max(1, round(number * f)), size, seed) for part, f in FRACTIONS.items()}
