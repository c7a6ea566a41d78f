"""Data sets of images and masks, a class for each pixel: folders, and the scenes that are made here."""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import keras_mnv2

from . import scenes
from .sets import SPLIT_NAMES, Dataset, Split, complete, fingerprint_of, size_of

# The label of pixels that do not count, as in Pascal VOC.
IGNORED = 255
IMAGES, MASKS, CLASSES = "images", "masks", "classes.txt"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Without losses: JPEG would change labels.
MASK_SUFFIXES = (".bmp", ".gif", ".png", ".tif", ".tiff")
# Pillow's modes whose pixels are labels: bits, bytes, and numbers of colours.
MODES = ("1", "L", "P")
SCENES = "scenes"
# Training images where `dataset` is `scenes`.
SCENES_NUMBER = 4000


class MaskSplit(Split):
    """`split[i]` is (image, mask): the mask is bytes (height, width) of the image's size, labels and `IGNORED`."""

    @property
    def strata(self):
        """One for all: images of many classes have no one that could be spread evenly."""
        return np.zeros(len(self), "int64")


class ArrayMaskSplit(MaskSplit):
    """Arrays: images (number, height, width, 3) and masks (number, height, width), bytes."""

    def __init__(self, images: np.ndarray, masks: np.ndarray):
        self.images = images
        self.masks = masks

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.masks[i]

    def fingerprint(self):
        return fingerprint_of(self.images, self.masks)


class MaskFileSplit(MaskSplit):
    """Files of images and masks, read when they are asked for; what cannot be read is a ValueError that names it."""

    def __init__(self, paths: Sequence[Path], mask_paths: Sequence[Path]):
        self.paths = paths
        self.mask_paths = mask_paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = keras_mnv2.load_image(self.paths[i])
        return image, read_mask(self.mask_paths[i], image.size)

    def name(self, i):
        return str(self.paths[i])

    def fingerprint(self):
        """Of the files' names and sizes; the data set may move."""
        pairs = zip(self.paths, self.mask_paths, strict=True)
        return fingerprint_of(*(f"{path.name} {size_of(path)} {size_of(mask)}" for path, mask in pairs))


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The labels of a mask's pixels, bytes (height, width).

    Args:
        path: of an image that is grey or has a palette; its values are the labels, whatever its colours.
        size: (width, height) that it must have.

    Raises:
        ValueError: on another file or size.
    """
    try:
        with Image.open(path) as picture:
            mode, found = picture.mode, picture.size
            # Before the pixels are unpacked.
            labels = np.asarray(picture) if mode in MODES and size in (None, found) else None
    # Whatever Pillow's readers raise on broken files.
    except Exception as error:
        told = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"The file {str(path)!r} cannot be read as a mask: {told}.") from error
    if mode not in MODES:
        raise ValueError(
            f"A mask must be grey or have a palette, with the labels as its values, got {mode} pixels in {str(path)!r}."
        )
    if labels is None:
        raise ValueError(
            f"A mask must have the size of its image, {size and size[0]}x{size and size[1]} pixels, got "
            f"{found[0]}x{found[1]} in {str(path)!r}."
        )
    return labels.astype("uint8")


def load(name: str, image_size: int, held_out: bool = True) -> Dataset:
    """Reads a data set with its three splits.

    Args:
        name: `"scenes"`, or a folder of `images` and `masks` folders, or of `train`, `validation` and `test` folders of
            them. An image and its mask have one name and place, but for the suffix. `classes.txt` beside them has
            the names of the labels, a line each, from 0 on; without it they are numbers, up to the largest label.
        image_size: side of the scenes, in pixels; other images keep their size here.
        held_out: as in `sets.complete`.

    Raises:
        ValueError: on what is no such folder, and on masks that do not fit; it names the file.
        ImportError: where the scenes need scikit-image and it is missing.
    """
    if name == SCENES:
        return _scenes(image_size)
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"dataset must be 'scenes' or a folder with images and masks that exists, got {name!r}.")
    found: dict[str, Split] = {}
    pairs = {part: _pairs(folder) for part, folder in _parts(path).items()}
    names = _class_names(path / CLASSES)
    largest = 0
    for part, (images, masks) in pairs.items():
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            largest = max(largest, *pool.map(_checked, images, masks, [len(names or ())] * len(images)))
        found[part] = MaskFileSplit(images, masks)
    if not largest:
        # Such as black and white masks, whose white is 255.
        raise ValueError(
            f"dataset must have masks with labels above 0, got 0 and {IGNORED} alone in {name!r}, and {IGNORED} does "
            "not count."
        )
    return complete(found, names or tuple(map(str, range(largest + 1))), held_out)


def _scenes(image_size):
    parts: dict[str, Split] = {}
    for part, of_part in scenes.scenes(SCENES_NUMBER, image_size).items():
        images, masks = zip(*((scene.image, scene.mask) for scene in of_part), strict=True)
        parts[part] = ArrayMaskSplit(np.stack(images), np.stack(masks))
    return complete(parts, scenes.CLASS_NAMES)


def _parts(path: Path) -> dict[str, Path]:
    """The folders that have `images` and `masks`, by part."""
    if (path / IMAGES).is_dir() or (path / MASKS).is_dir():
        return {"train": path}
    parts = {part: path / name for part, names in SPLIT_NAMES.items() for name in names if (path / name).is_dir()}
    if not parts:
        raise ValueError(
            f"dataset must have folders {IMAGES} and {MASKS}, or train, validation and test folders of them, got "
            f"neither in {str(path)!r}."
        )
    return parts


def _pairs(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images and their masks, in the order of the names."""
    images, masks = _named(folder / IMAGES, IMAGE_SUFFIXES), _named(folder / MASKS, MASK_SUFFIXES)
    if lonely := sorted(set(images) - set(masks)):
        raise ValueError(
            f"dataset must have a mask for each image, got none in {str(folder / MASKS)!r} for "
            f"{str(images[lonely[0]])!r}{_more(lonely)}."
        )
    if lonely := sorted(set(masks) - set(images)):
        raise ValueError(
            f"dataset must have an image for each mask, got none in {str(folder / IMAGES)!r} for "
            f"{str(masks[lonely[0]])!r}{_more(lonely)}."
        )
    if not images:
        raise ValueError(f"dataset must have images, got none in {str(folder / IMAGES)!r}.")
    return [images[name] for name in sorted(images)], [masks[name] for name in sorted(images)]


def _more(found):
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


def _named(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files anywhere below a folder, by their place and name without the suffix; hidden ones are left out."""
    if not folder.is_dir():
        raise ValueError(f"dataset must have a folder {folder.name}, got none at {str(folder)!r}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or any(part.startswith(".") for part in place.parts):
            continue
        name = place.with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"dataset must have one file of each name, got {str(found[name])!r} and {str(path)!r}.")
        found[name] = path
    return found


def _class_names(path: Path) -> tuple[str, ...] | None:
    """The lines of a file of names; None where there is none."""
    if not path.is_file():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {str(path)!r} must have a name a line in UTF-8, got bytes that are not.") from error
    if not 2 <= len(names) <= IGNORED:
        raise ValueError(f"The file {str(path)!r} must have 2 to {IGNORED} names, a line each, got {len(names)}.")
    return names


def _checked(image: Path, mask: Path, classes: int) -> int:
    """The largest label of a mask that fits its image, and is below `classes` where that is not 0."""
    size: Any = None
    # An image that cannot be read is left out when it is its turn, as everywhere.
    with contextlib.suppress(Exception), Image.open(image) as picture:
        size = picture.size
    labels = read_mask(mask, size)
    largest = int(labels[labels != IGNORED].max(initial=0))
    if classes and largest >= classes:
        raise ValueError(
            f"A mask must have labels from 0 to {classes - 1}, or {IGNORED} for what does not count, got {largest} in "
            f"{str(mask)!r}."
        )
    return largest
