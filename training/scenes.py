"""`python -m training.scenes --out FOLDER`: handwritten digits on photographs as files, with masks and boxes."""

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from . import files, process
from .process import fail
from .ranges import Count, Seed, Side, check_all, parsed

if TYPE_CHECKING:
    from .data.scenes import Scene


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes handwritten digits on photographs, with masks and boxes, as folders, Pascal VOC XML and COCO JSON."""

    out: Path
    """Folder for them, new or empty."""
    images: Count = 4000
    """Training images; a tenth of them for the validation and a fifth for the test come besides."""
    size: Side = 96
    """Side of the images, in pixels."""
    seed: Seed = 0
    """Of all that is random."""

    def __post_init__(self):
        check_all(self)


def write(out: Path, parts: Mapping[str, Sequence["Scene"]], class_names: Sequence[str]) -> None:
    """Writes scenes as a folder in three formats.

    `classes.txt` has the names of the labels, a line each. For each part there are `images/`, `masks/` (PNG with a
    palette, whose values are the labels), `annotations/` (Pascal VOC's XML) and `coco.json`.

    Args:
        out: of the folder, which must be new or empty.
        parts: of `data.scenes.scenes`.
        class_names: of the labels, from 0 on.

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
            (whole / "classes.txt").write_text("".join(f"{name}\n" for name in class_names))
            for part, of_part in parts.items():
                (whole / part).mkdir()
                _write_part(whole / part, of_part, class_names)
            os.replace(whole, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_part(folder, of_part, class_names):
    # Here, so that --help does not wait for a backend.
    import keras_mnv2

    for name in ("images", "masks", "annotations"):
        (folder / name).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(of_part):
        name, (height, width) = f"{i:05d}", scene.mask.shape
        Image.fromarray(scene.image).save(folder / "images" / f"{name}.png")
        mask = Image.fromarray(scene.mask, "L")
        mask.putpalette(keras_mnv2.palette().tobytes())
        mask.save(folder / "masks" / f"{name}.png")
        ElementTree.ElementTree(_voc(scene, f"{name}.png", class_names)).write(folder / "annotations" / f"{name}.xml")
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
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names) if label]
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


def _voc(scene, file_name, class_names):
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
        add(found, "name", class_names[label])
        add(found, "truncated", 0)
        add(found, "difficult", 0)
        box = add(found, "bndbox")
        for name, number in (("xmin", left + 1), ("ymin", top + 1), ("xmax", right), ("ymax", bottom)):
            add(box, name, number)
    ElementTree.indent(root)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Writes what the command line asks for; an error of the caller's ends in one sentence."""
    options = parsed(Options, args=argv, prog=f"python -m {process.PACKAGE}.scenes")
    try:
        # Here, so that --help does not wait for a backend.
        from .data import scenes

        parts = scenes.scenes(options.images, options.size, options.seed)
        write(options.out, parts, scenes.CLASS_NAMES)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    told = " + ".join(f"{len(part):,}" for part in parts.values())
    print(f"{options.out}: {told} images of {len(scenes.CLASS_NAMES) - 1} digits for training, validation and test")


if __name__ == "__main__":
    main()
