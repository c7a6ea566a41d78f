"""The report of a training of segmentation: the images whose pixels were worst, and the page."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import keras_mnv2

from ..data.inputs import Inputs
from ..data.masks import IGNORED
from ..state.run_folder import Run
from . import metrics, page

# Images that are shown.
MOST = 24
# Of the colours over the grey image.
STRENGTH = 0.6


@dataclasses.dataclass(frozen=True)
class WorstImage:
    """An image with a low mean IoU.

    Attributes:
        name: of the image.
        image: bytes (height, width, 3), as the network sees it.
        truth: the same in grey under the colours of its labels.
        prediction: likewise, of the predictions.
        iou: mean over the classes that it has, as labels or predictions.
        label: name of the class of the most pixels that were taken for one other.
        taken_for: name of that other class.
        pixels: how many they are.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    iou: float
    label: str
    taken_for: str
    pixels: int


def worst_images(inputs: Inputs, worst: Sequence[tuple[float, int, np.ndarray]]) -> list[WorstImage]:
    """The images with the lowest mean IoU as the page shows them.

    Args:
        inputs: of the run.
        worst: (mean IoU, number among the test images that can be read, predictions (height, width)) of each.
    """
    test, names = inputs.test, inputs.class_names
    readable, found = test.readable(), []
    for iou, i, prediction in worst:
        image, mask = test.example(readable[i], np.random.default_rng(0))
        found.append(worst_image(test.split.name(readable[i]), image, mask, prediction, iou, names))
    return found


def worst_image(
    name: str, image: np.ndarray, mask: np.ndarray, prediction: np.ndarray, iou: float, class_names: Sequence[str]
) -> WorstImage:
    """An image as the page shows it.

    Args:
        name: of the image.
        image: bytes (height, width, 3).
        mask: labels (height, width).
        prediction: likewise.
        iou: mean over the classes that it has.
        class_names: of all classes.
    """
    matrix = metrics.pixel_matrix(mask, prediction, len(class_names))
    (confused,) = metrics.most_confused(matrix, class_names, 1) or [{"label": "", "prediction": "", "images": 0}]
    return WorstImage(
        name=name,
        image=image,
        truth=painted(image, mask),
        prediction=painted(image, prediction),
        iou=iou,
        label=confused["label"],
        taken_for=confused["prediction"],
        pixels=confused["images"],
    )


def painted(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """An image in grey under the colours of its pixels' labels.

    Args:
        image: bytes (height, width, 3).
        labels: bytes (height, width); those that do not count are white.

    Returns:
        Bytes (height, width, 3).
    """
    colours = keras_mnv2.palette().astype("float32")
    colours[IGNORED] = 255
    grey = image.astype("float32").mean(axis=-1, keepdims=True)
    return (grey * (1 - STRENGTH) + colours[labels] * STRENGTH).round().astype("uint8")


def write_report(
    run: Run,
    found: dict[str, Any],
    inputs: Inputs,
    matrix: np.ndarray,
    worst: Sequence[tuple[float, int, np.ndarray]],
    command: str,
) -> None:
    """Writes `report.html` and `report.md` of a run whose metrics are `found`.

    Args:
        run: this run.
        found: the metrics.
        inputs: of the run.
        matrix: of all pixels of the test, as `metrics.pixel_matrix`.
        worst: as `worst_images` takes them.
        command: what to run to repeat it.
    """
    page.write_run(
        run,
        found,
        inputs,
        command,
        "DeepLabV3",
        f"with {len(inputs.class_names)} classes of pixels",
        matrix=matrix,
        counted="pixels",
        worst=worst_images(inputs, worst),
    )
