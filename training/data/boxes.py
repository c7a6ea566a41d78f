"""Images with boxes: what COCO's JSON and Pascal VOC's XML say of each image."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

# Bytes that an annotation file has at most: twice those of COCO's largest, and far more than an XML file of one image.
MOST_JSON, MOST_XML = 2**30, 2**24
# Pixels by which a box may lie outside of its image, where it is cut off; rounding leaves one.
BEYOND = 1.0


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of one image.

    Attributes:
        path: of the image.
        size: (width, height) of the image in pixels, as the annotation says.
        boxes: float32 (boxes, 4): left, top, right and bottom edge in pixels, from the upper left corner of the image.
        classes: of each box, the number of its name, (boxes,).
        ignored: of each box, whether an evaluation leaves it out, (boxes,): COCO's crowds, VOC's difficult objects.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray


def read_coco(file: Path, images: Path) -> tuple[list[Boxes], tuple[str, ...]]:
    """Reads a file of COCO's format: `images`, `annotations` with a `bbox` (left, top, width, height), `categories`.

    Args:
        file: the JSON file.
        images: the folder that its names of files count from.

    Returns:
        The images in the order of the file, those without boxes too; and the names of the categories in the order of
        their ids, which need not follow one another: a class is the place of its name.

    Raises:
        ValueError: on another content; it names the file and the entry.
        OSError: where the file cannot be read.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"The file {str(file)!r} must be COCO's JSON, {what}.")

    try:
        content = json.loads(_bytes(file, MOST_JSON))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
            raise wrong(f"which it is not: {error}") from error
        raise
    lists: dict[str, list[dict[str, Any]]] = {}
    for name in ("images", "annotations", "categories"):
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise wrong(f"with a list of objects {name!r}, got {type(rows).__name__}")
        lists[name] = rows
    names = _numbered(lists["categories"], "name", str, wrong)
    classes = {number: place for place, number in enumerate(sorted(names))}
    by_image: dict[int, list[Any]] = {number: [] for number in _numbered(lists["images"], "file_name", str, wrong)}
    for row in lists["annotations"]:
        entry = f"annotation {row.get('id')!r}"
        for key, known in (("image_id", by_image), ("category_id", classes)):
            if type(row.get(key)) is not int or row[key] not in known:
                raise wrong(f"with a known {key} in {entry}, got {row.get(key)!r}")
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise wrong(f"with a bbox of four numbers in {entry}, got {box!r}")
        left, top, width, height = box
        corners = (left, top, left + width, top + height)
        by_image[row["image_id"]].append((entry, corners, classes[row["category_id"]], bool(row.get("iscrowd"))))
    found = []
    for row in lists["images"]:
        size = (row.get("width"), row.get("height"))
        if not all(type(side) is int and side > 0 for side in size):
            raise wrong(f"with width and height of image {row['id']!r}, got {size[0]!r} and {size[1]!r}")
        found.append(_boxes(_path(images, row["file_name"], wrong), size, by_image[row["id"]], wrong))
    return found, tuple(names[number] for number in sorted(names))


def read_voc(
    annotations: Path, images: Path, class_names: Sequence[str] | None = None
) -> tuple[list[Boxes], tuple[str, ...]]:
    """Reads a folder of Pascal VOC's XML files, one an image.

    The development kit counts pixels from 1, and the last one is inside: `xmin` 1 and `xmax` 10 are the edges 0 and 10.

    Args:
        annotations: the folder of `.xml` files.
        images: the folder that the names of files count from.
        class_names: of all classes; by default those that there are, sorted.

    Returns:
        The images in the order of the files' names, and the names: a class is the place of its name.

    Raises:
        ValueError: on another content; it names the file and the entry.
        OSError: where a file cannot be read.
    """
    files = sorted(path for path in annotations.iterdir() if path.suffix == ".xml" and not path.name.startswith("."))
    if not files:
        raise ValueError(f"annotations must be a folder of .xml files, got {str(annotations)!r}, which has none.")
    read = [_read_voc(file) for file in files]
    named = {row[2] for _, _, rows in read for row in rows}
    names = tuple(sorted(named) if class_names is None else class_names)
    classes = {name: place for place, name in enumerate(names)}
    found = []
    for file, (name, size, rows) in zip(files, read, strict=True):
        wrong = _voc_error(file)
        for entry, _, label, _ in rows:
            if label not in classes:
                raise wrong(f"with one of the {len(names)} known names in {entry}, got {label!r}")
        rows = [(entry, corners, classes[label], ignored) for entry, corners, label, ignored in rows]
        found.append(_boxes(_path(images, name, wrong), size, rows, wrong))
    return found, names


def _read_voc(file):
    """The image's name, its size, and of each object what it is called in errors, corners, class name, ignored."""
    wrong = _voc_error(file)
    content = _bytes(file, MOST_XML)
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        # Which could grow without end.
        raise wrong("without a document type")
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise wrong(f"which it is not: {error}") from error

    def number(parent, name, entry):
        text = parent.findtext(name)
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise wrong(f"with a number as {name} of {entry}, got {text!r}")
        return value

    size = tuple(int(number(root, f"size/{name}", "the image")) for name in ("width", "height"))
    if min(size) <= 0:
        raise wrong(f"with sides above 0, got {size[0]} and {size[1]}")
    rows = []
    for i, row in enumerate(root.findall("object")):
        entry = f"object {i + 1}"
        label = (row.findtext("name") or "").strip()
        if not label:
            raise wrong(f"with a name in {entry}, got none")
        left, top, right, bottom = (number(row, f"bndbox/{name}", entry) for name in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (row.findtext("difficult") or "0").strip() == "1"
        rows.append((entry, (left - 1, top - 1, right, bottom), label, difficult))
    return (root.findtext("filename") or "").strip(), size, rows


def _voc_error(file):
    return lambda what: ValueError(f"The file {str(file)!r} must be Pascal VOC's XML, {what}.")


def _bytes(file: Path, most: int) -> bytes:
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"The file {str(file)!r} must have at most {most} bytes, got {size}.")
    return file.read_bytes()


def _numbered(rows, key, kind, wrong):
    """The value of `key` of each row, by its id."""
    found = {}
    for row in rows:
        number, value = row.get("id"), row.get(key)
        if type(number) is not int or number in found:
            raise wrong(f"with a whole number of its own as each id, got {number!r} for {key} {value!r}")
        if not isinstance(value, kind) or not value:
            raise wrong(f"with a text as {key} of id {number}, got {value!r}")
        found[number] = value
    if not found:
        raise wrong(f"with at least one {key}, got none")
    return found


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _path(images: Path, name: str, wrong: Callable[[str], ValueError]) -> Path:
    """The image of this name, which is below the folder."""
    place = PurePosixPath(name)
    if not name or place.is_absolute() or ".." in place.parts:
        raise wrong(f"with names of files below {str(images)!r}, got {name!r}")
    path = images / place
    if not path.is_file():
        raise wrong(f"with the names of images that exist, got {name!r}, of which there is none in {str(images)!r}")
    return path


def _boxes(path, size, rows, wrong):
    """What was found, with the boxes inside the image."""
    edges = np.array([*size, *size], "float64")
    for entry, corners, _, _ in rows:
        left, top, right, bottom = corners
        if right <= left or bottom <= top:
            raise wrong(f"with boxes of an area above 0, got {right - left:g} x {bottom - top:g} pixels in {entry}")
        if min(left, top) < -BEYOND or right > size[0] + BEYOND or bottom > size[1] + BEYOND:
            raise wrong(
                f"with boxes inside of their image of {size[0]}x{size[1]} pixels, got {left:g}, {top:g}, {right:g}, "
                f"{bottom:g} in {entry}"
            )
    boxes = np.array([corners for _, corners, _, _ in rows], "float64").reshape(-1, 4)
    return Boxes(
        path,
        size,
        np.clip(boxes, 0, edges).astype("float32"),
        np.array([label for _, _, label, _ in rows], "int64"),
        np.array([ignored for _, _, _, ignored in rows], bool),
    )
