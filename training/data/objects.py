"""Data sets of images with boxes around their objects: COCO's and Pascal VOC's folders, and the scenes made here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import keras_mnv2

from . import scenes
from .boxes import Annotation, Objects, read_coco, read_voc
from .masks import SCENES, SCENES_NUMBER
from .sets import SPLIT_NAMES, Dataset, Split, complete, fingerprint_of, size_of

# Of COCO: a folder of files such as `train.json` or `instances_train2017.json`, beside folders `train` or `train2017`.
ANNOTATIONS = "annotations"
COCO_NAME = re.compile(r"(?:instances_)?(([a-z]+)\d*)\.json")
# Of a part that `python -m training.scenes` writes.
PART_FILE, PART_IMAGES = "coco.json", "images"
# Of Pascal VOC.
VOC_ANNOTATIONS, VOC_IMAGES, VOC_SETS = "Annotations", "JPEGImages", "ImageSets/Main"
LAYOUTS = (
    f"{ANNOTATIONS}/train.json beside a folder train of images, train/{PART_FILE} beside train/{PART_IMAGES}, or "
    f"Pascal VOC's {VOC_IMAGES}, {VOC_ANNOTATIONS} and {VOC_SETS}"
)


class ObjectSplit(Split):
    """`split[i]` is (image, objects): a Pillow image or bytes (height, width, 3), and its `Objects`."""

    # An image may have the one class, or not.
    least_classes = 1

    @property
    def strata(self):
        """One for all: images of many classes have no one that could be spread evenly."""
        return np.zeros(len(self), "int64")


class ArrayObjectSplit(ObjectSplit):
    """Images as an array (number, height, width, 3) of bytes, and the objects of each."""

    def __init__(self, images: np.ndarray, objects: Sequence[Objects]):
        self.images = images
        self.objects = objects

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.objects[i]

    def fingerprint(self):
        return fingerprint_of(self.images, *_arrays(self.objects))


class FileObjectSplit(ObjectSplit):
    """Images of annotations, read when they are asked for; what cannot be read is a ValueError that names it."""

    def __init__(self, annotations: Sequence[Annotation]):
        self.annotations = annotations

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, i):
        found = self.annotations[i]
        image = keras_mnv2.load_image(found.path)
        if image.size != found.size:
            raise ValueError(
                f"An image must have the size that its annotation says, {found.size[0]}x{found.size[1]} pixels, got "
                f"{image.size[0]}x{image.size[1]} in {str(found.path)!r}."
            )
        return image, found

    def name(self, i):
        return str(self.annotations[i].path)

    def fingerprint(self):
        """Of the files' names and sizes, and the objects; the data set may move."""
        names = (f"{found.path.name} {size_of(found.path)}" for found in self.annotations)
        return fingerprint_of(*names, *_arrays(self.annotations))


def _arrays(objects: Sequence[Objects]) -> list[np.ndarray]:
    return [array for one in objects for array in (one.boxes, one.classes, one.ignored)]


def load(name: str, image_size: int, held_out: bool = True) -> Dataset:
    """Reads a data set with its three splits.

    Args:
        name: `"scenes"`, or a folder in one of three layouts. COCO: `annotations/train.json`, `val.json` and
            `test.json` beside folders `train`, `val` and `test` of images, or COCO's own names, such as
            `annotations/instances_train2017.json` and `train2017`. The folders of `python -m training.scenes`:
            `train`, `validation` and `test`, each with `coco.json` and `images`. Pascal VOC: `Annotations`,
            `JPEGImages`, and `ImageSets/Main` with `train.txt` (or `trainval.txt`), `val.txt` and `test.txt`.
        image_size: side of the scenes, in pixels; other images keep their size here.
        held_out: as in `sets.complete`.

    Raises:
        ValueError: on what is no such folder, and on annotations that do not fit; it names the file.
        OSError: where a file cannot be read.
        ImportError: where the scenes need scikit-image and it is missing.
    """
    if name == SCENES:
        return _scenes(image_size)
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"dataset must be 'scenes' or a folder with images and boxes that exists, got {name!r}.")
    found, names = _voc(path) if (path / VOC_IMAGES).is_dir() else _coco(path)
    if "train" in found and all(one.ignored.all() for one in found["train"]):
        raise ValueError(f"dataset must have boxes that count on its training images, got none in {name!r}.")
    return complete({part: FileObjectSplit(annotations) for part, annotations in found.items()}, names, held_out)


def _scenes(image_size: int) -> Dataset:
    parts: dict[str, Split] = {}
    for part, of_part in scenes.scenes(SCENES_NUMBER, image_size).items():
        images, objects = [], []
        for scene in of_part:
            images.append(scene.image)
            ignored = np.zeros(len(scene.boxes), bool)
            objects.append(Objects(scene.boxes.astype("float32"), scene.classes - 1, ignored))
        parts[part] = ArrayObjectSplit(np.stack(images), objects)
    return complete(parts, scenes.CLASS_NAMES[1:])


def _coco(path: Path) -> tuple[dict[str, list[Annotation]], tuple[str, ...]]:
    """The images of each part, and the names of the classes."""
    found, names = {}, None
    for part, (file, images) in _coco_files(path).items():
        found[part], own = read_coco(file, images)
        if own != (names or own):
            raise ValueError(
                f"dataset must have the same categories in all its files, got {_told(own)} in {str(file)!r} and "
                f"{_told(names)} in another."
            )
        names = own
    return found, names or ()


def _coco_files(path: Path) -> dict[str, tuple[Path, Path]]:
    """Of each part, the file of the annotations and the folder of the images."""
    parts = {name: part for part, names in SPLIT_NAMES.items() for name in names}
    found: dict[str, tuple[Path, Path]] = {}
    for file in sorted((path / ANNOTATIONS).glob("*.json")) if (path / ANNOTATIONS).is_dir() else ():
        match = COCO_NAME.fullmatch(file.name)
        if match is None or match[2] not in parts:
            continue
        if (part := parts[match[2]]) in found:
            raise ValueError(
                f"dataset must have one file of annotations for each part, got {found[part][0].name} and {file.name} "
                f"in {str(file.parent)!r}."
            )
        found[part] = file, path / match[1]
    for name, part in parts.items():
        if part not in found and (path / name / PART_FILE).is_file():
            found[part] = path / name / PART_FILE, path / name / PART_IMAGES
    if not found:
        raise ValueError(f"dataset must have {LAYOUTS}, got none of these in {str(path)!r}.")
    return {part: found[part] for part in SPLIT_NAMES if part in found}


def _voc(path: Path) -> tuple[dict[str, list[Annotation]], tuple[str, ...]]:
    """The same of Pascal VOC's folder. The classes are those of all its parts, sorted."""
    chosen: dict[str, list[str]] = {}
    for part, stems in {**SPLIT_NAMES, "train": (*SPLIT_NAMES["train"], "trainval")}.items():
        files = (path / VOC_SETS / f"{stem}.txt" for stem in stems)
        if file := next((file for file in files if file.is_file()), None):
            chosen[part] = _image_set(file)
    for folder, there in ((VOC_ANNOTATIONS, (path / VOC_ANNOTATIONS).is_dir()), (f"{VOC_SETS}/train.txt", chosen)):
        if not there:
            raise ValueError(f"dataset must have {folder} beside {VOC_IMAGES}, got none in {str(path)!r}.")
    everything = [name for names in chosen.values() for name in names]
    annotations, class_names = read_voc(path / VOC_ANNOTATIONS, path / VOC_IMAGES, chosen=everything)
    found, start = {}, 0
    for part, names in chosen.items():
        found[part] = annotations[start : start + len(names)]
        start += len(names)
    return found, class_names


def _image_set(file: Path) -> list[str]:
    """The names of images in a file of Pascal VOC, one a line; a second column is of one class, and left out."""
    try:
        names = [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {str(file)!r} must have a name a line in UTF-8, got bytes that are not.") from error
    if not names:
        raise ValueError(f"The file {str(file)!r} must have a name a line, got none.")
    return names


def _told(names: Any) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of each box (n, 4) with each of the others (m, 4): (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = np.maximum(high - low, 0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (first, second)]
    return inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, np.finfo("float32").tiny)
