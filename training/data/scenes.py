"""`python -m training.data.scenes --out FOLDER`: small real tasks of segmentation and detection, without a network.

Handwritten digits of scikit-learn lie as stickers on pieces of scikit-image's photographs: a digit in ink on paper that
is cut out around it. Training, validation and test share neither digits nor photographs.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .. import files, process
from ..process import fail
from ..ranges import Count, Seed, Side, check_all, parsed
from .palette import palette
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
SIDES, MARGIN = (0.32, 0.55), 0.12
# Least difference in brightness of ink and paper, of 0..255.
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
        raise ImportError("The scenes need scikit-image: pip install scikit-image.") from None
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
    """Colours of paper and ink that differ in brightness."""
    while True:
        paper, ink = rng.uniform(0, 255, (2, 3))
        if abs(paper.mean() - ink.mean()) >= CONTRAST:
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


def write(out: Path, parts: Mapping[str, Sequence[Scene]]) -> None:
    """Writes scenes as a folder in three formats.

    `classes.txt` has the names of the labels, a line each. For each part there are `images/`, `masks/` (PNG with a
    palette, whose values are the labels), `annotations/` (Pascal VOC's XML) and `coco.json`.

    Args:
        out: of the folder, which must be new or empty.
        parts: of `scenes`.

    Raises:
        ValueError: where the folder has content.
        OSError: where it cannot be written; nothing is left then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {str(out)!r}.")
    with files.told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"part_{out.name}_", dir=out.parent))
        try:
            # Readable by others, as a new folder is and one of `mkdtemp` is not.
            whole = scratch / "whole"
            whole.mkdir()
            (whole / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
            for part, of_part in parts.items():
                (whole / part).mkdir()
                _write_part(whole / part, of_part)
            os.replace(whole, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_part(folder, of_part):
    for name in ("images", "masks", "annotations"):
        (folder / name).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(of_part):
        name, (height, width) = f"{i:05d}", scene.mask.shape
        Image.fromarray(scene.image).save(folder / "images" / f"{name}.png")
        mask = Image.fromarray(scene.mask, "L")
        mask.putpalette(palette().tobytes())
        mask.save(folder / "masks" / f"{name}.png")
        ElementTree.ElementTree(_voc(scene, f"{name}.png")).write(folder / "annotations" / f"{name}.xml")
        images.append({"id": i + 1, "file_name": f"{name}.png", "width": width, "height": height})
        for own, label, (left, top, right, bottom) in zip(
            scene.objects, scene.classes.tolist(), scene.boxes.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(own.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": list(_runs(own))},
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES) if label]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))


def _runs(own: np.ndarray) -> Iterator[int]:
    """COCO's lengths of runs, of pixels outside and inside in turn, column by column."""
    inside = False
    for value, run in itertools.groupby(own.ravel(order="F").tolist()):
        if value != inside:
            # A mask that starts inside has a run of none before it.
            yield 0
        yield sum(1 for _ in run)
        inside = not value


def _voc(scene, file_name):
    """An annotation as the Pascal VOC development kit has it: pixels count from 1, and the last one is inside."""
    root = ElementTree.Element("annotation")

    def add(parent, name, text=None):
        child = ElementTree.SubElement(parent, name)
        child.text = None if text is None else str(text)
        return child

    add(root, "folder", "images")
    add(root, "filename", file_name)
    size = add(root, "size")
    height, width = scene.mask.shape
    for name, number in (("width", width), ("height", height), ("depth", 3)):
        add(size, name, number)
    add(root, "segmented", 1)
    for label, (left, top, right, bottom) in zip(scene.classes, scene.boxes.tolist(), strict=True):
        found = add(root, "object")
        add(found, "name", CLASS_NAMES[label])
        add(found, "truncated", 0)
        add(found, "difficult", 0)
        box = add(found, "bndbox")
        for name, number in (("xmin", left + 1), ("ymin", top + 1), ("xmax", right), ("ymax", bottom)):
            add(box, name, number)
    ElementTree.indent(root)
    return root


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes handwritten digits on photographs, with masks and boxes, as folders, Pascal VOC XML and COCO JSON."""

    out: Path
    """Folder for them, new or empty."""
    images: Count = 2000
    """Training images; a tenth of them for the validation and a fifth for the test come besides."""
    size: Side = 96
    """Side of the images, in pixels."""
    seed: Seed = 0
    """Of all that is random."""

    def __post_init__(self):
        check_all(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes what the command line asks for; an error of the caller's ends in one sentence."""
    options = parsed(Options, args=argv, prog=f"python -m {process.PACKAGE}.data.scenes")
    try:
        parts = scenes(options.images, options.size, options.seed)
        write(options.out, parts)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    told = " + ".join(f"{len(part):,}" for part in parts.values())
    print(f"{options.out}: {told} images of {len(CLASS_NAMES) - 1} digits for training, validation and test")


if __name__ == "__main__":
    main()
