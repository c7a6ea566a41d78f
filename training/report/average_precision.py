"""Average precision of detections, by pycocotools (Lin et al. 2014, arXiv 1405.0312)."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.boxes import Objects

# Least intersections over union of a detection with the object that it finds, whose columns stand in the table.
LOOSE, STRICT = 0.5, 0.75
# Detections of an image that count, as for COCO.
MOST = 100


@dataclass(frozen=True, eq=False)
class Detections:
    """What was detected on one image.

    Attributes:
        boxes: (detections, 4): left, top, right and bottom edge in pixels of the network's image.
        classes: of each, from 0.
        scores: of each, the best first.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class AveragePrecision:
    """Means over the classes that have objects, 0 where none has; and each class.

    Attributes:
        mean: COCO's mAP, over least intersections over union of 0.5, 0.55, ... and 0.95.
        mean_50: mAP at 0.5.
        per_class: dicts with the number of `objects` that count, and `ap`, `ap_50` and `ap_75`, None without objects.
    """

    mean: float
    mean_50: float
    per_class: list[dict[str, Any]]


def measure(truth: Sequence[Objects], found: Sequence[Detections], classes: int) -> AveragePrecision:
    """The average precision of the detections on all images.

    Objects that are ignored count as COCO's crowds: it is no mistake to miss them, or to find them several times. Boxes
    may be those of resized images, since resizing leaves intersections over unions as they are.

    Args:
        truth: of each image, its objects.
        found: of each image, what was detected.
        classes: how many there are.

    Raises:
        ImportError: where pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        if error.name != "pycocotools":
            raise
        raise ImportError('mAP needs pycocotools: pip install "keras_mnv2[train]".') from None

    def described(annotations: list[dict[str, Any]]) -> Any:
        described = COCO()
        described.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": label} for label in range(classes)],
            # pycocotools takes the number 0 for none.
            "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
        }
        described.createIndex()
        return described

    objects = [
        {**one, "iscrowd": int(ignored)}
        for i, own in enumerate(truth)
        for one, ignored in zip(_boxes(i, own), own.ignored, strict=True)
    ]
    detections = [
        {**one, "score": float(score)}
        for i, own in enumerate(found)
        for one, score in zip(_boxes(i, own), own.scores, strict=True)
    ]
    # It prints how it goes on.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(described(objects), described(detections), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes) of precision; -1 for a class without objects.
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    at = np.round(evaluation.params.iouThrs, 2).tolist()
    counts = np.zeros(classes, int)
    for own in truth:
        counts += np.bincount(own.classes[~own.ignored], minlength=classes)
    rows = [
        {
            "objects": int(counts[label]),
            "ap": _mean(precision[:, :, label], None),
            "ap_50": _mean(precision[at.index(LOOSE), :, label], None),
            "ap_75": _mean(precision[at.index(STRICT), :, label], None),
        }
        for label in range(classes)
    ]
    return AveragePrecision(_mean(precision, 0.0), _mean(precision[at.index(LOOSE)], 0.0), rows)


def _boxes(image: int, own: Any) -> list[dict[str, Any]]:
    """Of an image, its boxes as COCO has them."""
    sides = own.boxes[:, 2:] - own.boxes[:, :2]
    rows = np.concatenate([own.boxes[:, :2], sides], axis=1).tolist()
    return [
        {"image_id": image, "category_id": label, "bbox": row, "area": row[2] * row[3]}
        for row, label in zip(rows, own.classes.tolist(), strict=True)
    ]


def _mean(precision, empty):
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else empty
