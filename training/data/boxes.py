"""Images with boxes: what COCO's JSON and Pascal VOC's XML say of each image."""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

# Bytes that an annotation file has at most: twice those of COCO's largest, and far more than an XML file of one image.
MOST_JSON, MOST_XML = 2**30, 2**24
# Pixels by which a box may lie outside of its image, where it is cut off; rounding leaves one.
BEYOND = 1.0


# What is called wrong in a file, as the error that names it.
Wrong = Callable[[str], ValueError]


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects on one image.

    Attributes:
        boxes: float32 (objects, 4): left, top, right and bottom edge in pixels from the image's upper left corner.
        classes: of each object, the number of its name, (objects,).
        ignored: of each object, whether it does not count, (objects,): COCO's crowds, VOC's difficult objects.
    """

    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True, eq=False)
class Annotation(Objects):
    """What a file says of one image.

    Attributes:
        path: of the image.
        size: (width, height) of the image in pixels, as the annotation says.
    """

    path: Path
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Row:
    """An object of a file: what errors call it, its left, top, right and bottom, its class, whether it is ignored."""

    entry: str
    corners: tuple[float, float, float, float]
    label: Any
    ignored: bool


def read_coco(file: Path, images: Path) -> tuple[list[Annotation], tuple[str, ...]]:
    """Reads a file of COCO's format: `images`, `annotations` with a `bbox` (left, top, width, height), `categories`.

    Boxes without width or height are left out, with a warning that counts them.

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
    by_image: dict[int, list[_Row]] = {number: [] for number in _numbered(lists["images"], "file_name", str, wrong)}
    flat = 0
    for row in lists["annotations"]:
        entry = f"annotation {row.get('id')!r}"
        for key, known in (("image_id", by_image), ("category_id", classes)):
            if type(row.get(key)) is not int or row[key] not in known:
                raise wrong(f"with a known {key} in {entry}, got {row.get(key)!r}")
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise wrong(f"with a bbox of four numbers in {entry}, got {box!r}")
        left, top, width, height = box
        if 0 in (width, height):
            flat += 1
            continue
        corners = (left, top, left + width, top + height)
        by_image[row["image_id"]].append(_Row(entry, corners, classes[row["category_id"]], bool(row.get("iscrowd"))))
    if flat:
        warnings.warn(f"{flat} boxes of {str(file)!r} have no width or no height: they are left out.", stacklevel=2)
    found = []
    for row in lists["images"]:
        size: Any = (row.get("width"), row.get("height"))
        if not all(type(side) is int and side > 0 for side in size):
            raise wrong(f"with width and height of image {row['id']!r}, got {size[0]!r} and {size[1]!r}")
        found.append(_annotation(_path(images, row["file_name"], wrong), size, by_image[row["id"]], wrong))
    return found, tuple(names[number] for number in sorted(names))


def read_voc(
    annotations: Path,
    images: Path,
    class_names: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
) -> tuple[list[Annotation], tuple[str, ...]]:
    """Reads a folder of Pascal VOC's XML files, one an image.

    The development kit counts pixels from 1, and the last one is inside: `xmin` 1 and `xmax` 10 are the edges 0 and 10.

    Args:
        annotations: the folder of `.xml` files.
        images: the folder that the names of files count from.
        class_names: of all classes; by default those that there are, sorted.
        chosen: names of files without their suffix, which are read in this order; by default all, sorted.

    Returns:
        The images in the order of the files, and the names: a class is the place of its name.

    Raises:
        ValueError: on another content; it names the file and the entry.
        OSError: where a file cannot be read.
    """
    files = sorted(path for path in annotations.iterdir() if path.suffix == ".xml" and not path.name.startswith("."))
    if chosen is not None:
        known = {path.stem: path for path in files}
        if missing := [name for name in chosen if name not in known]:
            raise ValueError(f"annotations must have a file {missing[0]}.xml, got none in {str(annotations)!r}.")
        files = [known[name] for name in chosen]
    if not files:
        raise ValueError(f"annotations must be a folder of .xml files, got {str(annotations)!r}, which has none.")
    read = [_read_voc(file) for file in files]
    named = {row.label for _, _, rows in read for row in rows}
    names = tuple(sorted(named) if class_names is None else class_names)
    classes = {name: place for place, name in enumerate(names)}
    found = []
    for file, (name, size, rows) in zip(files, read, strict=True):
        wrong = _voc_error(file)
        for row in rows:
            if row.label not in classes:
                raise wrong(f"with one of the {len(names)} known names in {row.entry}, got {row.label!r}")
        rows = [replace(row, label=classes[row.label]) for row in rows]
        found.append(_annotation(_path(images, name, wrong), size, rows, wrong))
    return found, names


def _read_voc(file: Path) -> tuple[str, tuple[int, int], list[_Row]]:
    """The image's name, its size, and its objects, whose labels are names."""
    wrong = _voc_error(file)
    content = _bytes(file, MOST_XML)
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        # Which could grow without end.
        raise wrong("without a document type")
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise wrong(f"which it is not: {error}") from error

    def number(parent: ElementTree.Element, name: str, entry: str) -> float:
        text = parent.findtext(name)
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise wrong(f"with a number as {name} of {entry}, got {text!r}")
        return value

    width, height = (int(number(root, f"size/{name}", "the image")) for name in ("width", "height"))
    if min(width, height) <= 0:
        raise wrong(f"with sides above 0, got {width} and {height}")
    rows = []
    for i, row in enumerate(root.findall("object")):
        entry = f"object {i + 1}"
        label = (row.findtext("name") or "").strip()
        if not label:
            raise wrong(f"with a name in {entry}, got none")
        left, top, right, bottom = (number(row, f"bndbox/{name}", entry) for name in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (row.findtext("difficult") or "0").strip() == "1"
        rows.append(_Row(entry, (left - 1, top - 1, right, bottom), label, difficult))
    return (root.findtext("filename") or "").strip(), (width, height), rows


def _voc_error(file: Path) -> Wrong:
    return lambda what: ValueError(f"The file {str(file)!r} must be Pascal VOC's XML, {what}.")


def _bytes(file: Path, most: int) -> bytes:
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"The file {str(file)!r} must have at most {most} bytes, got {size}.")
    return file.read_bytes()


def _numbered(rows: Sequence[dict[str, Any]], key: str, kind: type, wrong: Wrong) -> dict[int, Any]:
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _path(images: Path, name: str, wrong: Wrong) -> Path:
    """The image of this name, which is below the folder."""
    place = PurePosixPath(name)
    if not name or place.is_absolute() or ".." in place.parts:
        raise wrong(f"with names of files below {str(images)!r}, got {name!r}")
    path = images / place
    if not path.is_file():
        raise wrong(f"with the names of images that exist, got {name!r}, of which there is none in {str(images)!r}")
    return path


def _annotation(path: Path, size: tuple[int, int], rows: Sequence[_Row], wrong: Wrong) -> Annotation:
    """What was found, with the boxes inside the image."""
    edges = np.array([*size, *size], "float64")
    for row in rows:
        left, top, right, bottom = row.corners
        if right <= left or bottom <= top:
            raise wrong(f"with boxes of an area above 0, got {right - left:g} x {bottom - top:g} pixels in {row.entry}")
        if min(left, top) < -BEYOND or right > size[0] + BEYOND or bottom > size[1] + BEYOND:
            raise wrong(
                f"with boxes inside of their image of {size[0]}x{size[1]} pixels, got {left:g}, {top:g}, {right:g}, "
                f"{bottom:g} in {row.entry}"
            )
    boxes = np.array([row.corners for row in rows], "float64").reshape(-1, 4)
    return Annotation(
        np.clip(boxes, 0, edges).astype("float32"),
        np.array([row.label for row in rows], "int64"),
        np.array([row.ignored for row in rows], bool),
        path,
        size,
    )
