"""The report of a training of detection: the images on which most is missed or wrong, and the page."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import keras_mnv2

from ..data.boxes import Objects
from ..data.inputs import Inputs
from ..data.objects import overlaps
from ..state.run_folder import Run
from . import page
from .average_precision import LOOSE, Detections

# Images that are shown.
MOST = 24
# Least side of a picture with boxes and names in it, in pixels.
SIDE = 256


@dataclasses.dataclass(frozen=True)
class WorstImage:
    """An image with what was found there.

    Attributes:
        name: of the image.
        truth: the image with its objects, bytes (height, width, 3).
        prediction: the image with the detections.
        missed: names of the objects that were not found.
        wrong: names of the detections that are no object, or one that has been found.
    """

    name: str
    truth: np.ndarray
    prediction: np.ndarray
    missed: Sequence[str]
    wrong: Sequence[str]


def quality(objects: Objects, found: Detections) -> tuple[float, list[int], list[int]]:
    """How good the detections on an image are, 0 to 1, and what is missed and wrong.

    The sum of the intersections over union of the objects that are found, over the number of all objects and of wrong
    detections. From the best score on, a detection finds the object of its class that it overlaps most, by at least
    half. What is by half within an object that is ignored does not count, as for pycocotools.

    Returns:
        The quality, the numbers of the objects that are missed, and of the detections that are wrong.
    """
    found = counted(found)
    same = found.classes[:, None] == objects.classes[None]
    matrix = np.where(same, overlaps(found.boxes, objects.boxes), 0)
    areas = [(one.boxes[:, 2:] - one.boxes[:, :2]).prod(axis=-1) for one in (found, objects)]
    # The fraction of a detection that is inside of an object.
    within = matrix * (areas[0][:, None] + areas[1][None]) / (1 + matrix) / np.maximum(areas[0], 1e-9)[:, None]
    left, sum_of_found, wrong = set(np.flatnonzero(~objects.ignored).tolist()), 0.0, []
    for i, row in enumerate(matrix):
        is_ignored = (within[i][objects.ignored] >= LOOSE).any()
        best = max(left, key=lambda j: row[j], default=None)
        if best is not None and row[best] >= LOOSE:
            left.remove(best)
            sum_of_found += float(row[best])
        elif not is_ignored:
            wrong.append(i)
    count = int((~objects.ignored).sum()) + len(wrong)
    return (sum_of_found / count if count else 1.0), sorted(left), wrong


def counted(found: Detections) -> Detections:
    """Those that are drawn."""
    kept = found.scores >= page.LEAST_SCORE
    return Detections(found.boxes[kept], found.classes[kept], found.scores[kept])


def worst_images(inputs: Inputs, truth: Sequence[Objects], found: Sequence[Detections]) -> list[WorstImage]:
    """The images with the least quality as the page shows them.

    Args:
        inputs: of the run.
        truth: of each test image that can be read, its objects.
        found: likewise, what was detected.
    """
    test, names = inputs.test, inputs.class_names
    readable, shown = test.readable(), []
    rated = [quality(*pair) for pair in zip(truth, found, strict=True)]
    for i in sorted(range(len(rated)), key=lambda i: rated[i][0])[:MOST]:
        image, objects = test.example(readable[i], np.random.default_rng(0))
        shown.append(worst_image(test.split.name(readable[i]), image, objects, found[i], rated[i], names))
    return shown


def worst_image(
    name: str,
    image: np.ndarray,
    objects: Objects,
    found: Detections,
    rated: tuple[float, list[int], list[int]],
    class_names: Sequence[str],
) -> WorstImage:
    """An image as the page shows it.

    Args:
        name: of the image.
        image: bytes (height, width, 3).
        objects: on it.
        found: what was detected there.
        rated: of `quality`.
        class_names: of all classes.
    """
    _, missed, wrong = rated
    drawn = counted(found)
    return WorstImage(
        name=name,
        truth=with_boxes(image, objects, class_names),
        prediction=with_boxes(image, drawn, class_names),
        missed=[class_names[objects.classes[j]] for j in missed],
        wrong=[class_names[drawn.classes[j]] for j in wrong],
    )


def with_boxes(image: np.ndarray, found: Objects | Detections, names: Sequence[str]) -> np.ndarray:
    """An image with the boxes of its objects or detections, by `keras_mnv2.draw_detections`.

    Args:
        image: bytes (height, width, 3).
        found: what is drawn, in its pixels.
        names: of all classes.

    Returns:
        Bytes (height, width, 3), enlarged where the image is small.
    """
    factor = -(-SIDE // max(image.shape[:2]))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(
        (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.BILINEAR
    )
    drawn = {"boxes": found.boxes * factor, "classes": found.classes}
    if isinstance(found, Detections):
        drawn["scores"] = found.scores
    return np.asarray(keras_mnv2.draw_detections(picture, drawn, names))


def write_report(
    run: Run,
    found: dict[str, Any],
    inputs: Inputs,
    classes: Sequence[dict[str, Any]],
    worst: Sequence[WorstImage],
    command: str,
) -> None:
    """Writes `report.html` and `report.md` of a run whose metrics are `found`.

    Args:
        run: this run.
        found: the metrics.
        inputs: of the run.
        classes: of each class, its row of `average_precision.measure`.
        worst: of `worst_images`.
        command: what to run to repeat it.
    """
    names = inputs.class_names
    page.write_run(
        run,
        found,
        inputs,
        command,
        "SSDLite",
        f"with objects of {len(names)} classes",
        matrix=None,
        counted="objects",
        worst=worst,
        classes=[{"name": name, **row} for name, row in zip(names, classes, strict=True)],
    )
