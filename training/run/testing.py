"""The test: what the trained network gives for the test images, and what the results and the report say of it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ..data.batches import read_scores
from ..data.crops import ObjectBatches
from ..data.inputs import Inputs
from ..report import average_precision, detection, metrics, segmentation, training
from ..state.run_folder import Run
from .validation import detections


class ClassificationTest:
    """The scores of all test images, in the first process.

    Args:
        run: this run.
        predict: from images to scores, on this process's devices.
        inputs: of this process.
    """

    def __init__(self, run: Run, predict: Callable[[np.ndarray], np.ndarray], inputs: Inputs):
        self.run = run
        self.inputs = inputs
        self.scores, self.labels = read_scores(predict, inputs.test, run.channel)

    def results(self) -> dict[str, Any]:
        """As `metrics.json` has them."""
        return {
            "test_accuracy": metrics.top_k(self.scores, self.labels, 1),
            "test_images": len(self.labels),
            "test_top5_accuracy": metrics.top_k(self.scores, self.labels, 5),
            "calibration_error": metrics.calibration_error(self.scores, self.labels),
        }

    def told(self) -> str:
        """The most important one as a line."""
        return f"test accuracy {metrics.top_k(self.scores, self.labels, 1):.2%} on {len(self.labels)} images"

    def write_report(self, model: keras.Model, found: dict[str, Any], command: str) -> None:
        """Writes `report.html` and `report.md` of a run whose metrics are `found`."""
        training.write_report(self.run, model, found, self.inputs, self.scores, self.labels, command)


class SegmentationTest:
    """The pixels of all test images, counted; the arguments are those of `ClassificationTest`."""

    def __init__(self, run: Run, predict: Callable[[np.ndarray], np.ndarray], inputs: Inputs):
        self.run = run
        self.inputs = inputs
        classes = len(inputs.class_names)
        self.matrix = np.zeros((classes, classes), "int64")
        self.images = 0
        # (mean IoU, number, predictions) of the images that the report shows.
        self.worst: list[tuple[float, int, np.ndarray]] = []
        for images, masks in inputs.test.stream(epochs=1):
            for mask, prediction in zip(masks, predict(images).argmax(-1), strict=True):
                matrix = metrics.pixel_matrix(mask, prediction, classes)
                self.matrix += matrix
                if (iou := metrics.mean_iou(matrix)) < 1 and matrix.any():
                    self.worst.append((iou, self.images, prediction.astype("uint8")))
                self.images += 1
            self.worst = sorted(self.worst, key=lambda one: one[:2])[: segmentation.MOST]

    def results(self) -> dict[str, Any]:
        """As `metrics.json` has them."""
        rows = metrics.per_class_of_pixels(self.matrix, self.inputs.class_names)
        return {
            "test_mean_iou": metrics.mean_iou(self.matrix),
            "test_images": self.images,
            "test_pixel_accuracy": float(np.trace(self.matrix) / max(1, self.matrix.sum())),
            "test_iou": {row["name"]: row["iou"] for row in rows},
        }

    def told(self) -> str:
        """The most important one as a line."""
        return f"test mean IoU {metrics.mean_iou(self.matrix):.2%} on {self.images} images"

    def write_report(self, model: keras.Model, found: dict[str, Any], command: str) -> None:
        """Writes `report.html` and `report.md` of a run whose metrics are `found`."""
        segmentation.write_report(self.run, found, self.inputs, self.matrix, self.worst, command)


class DetectionTest:
    """The detections on all test images, by pycocotools; the arguments are those of `ClassificationTest`."""

    def __init__(self, run: Run, predict: Callable[[np.ndarray], Any], inputs: Inputs):
        self.run = run
        self.inputs = inputs
        assert isinstance(inputs.test, ObjectBatches)
        self.truth, self.found, _ = detections(run, predict, inputs.test)
        self.measures = average_precision.measure(self.truth, self.found, len(inputs.class_names))

    def results(self) -> dict[str, Any]:
        """As `metrics.json` has them."""
        rows = zip(self.inputs.class_names, self.measures.per_class, strict=True)
        return {
            "test_map": self.measures.mean,
            "test_map_50": self.measures.mean_50,
            "test_images": len(self.truth),
            "test_ap": {name: row["ap"] for name, row in rows},
        }

    def told(self) -> str:
        """The most important one as a line."""
        return (
            f"test mAP {self.measures.mean_50:.2%} at IoU 0.5, {self.measures.mean:.2%} at 0.5 to 0.95, on "
            f"{len(self.truth)} images"
        )

    def write_report(self, model: keras.Model, found: dict[str, Any], command: str) -> None:
        """Writes `report.html` and `report.md` of a run whose metrics are `found`."""
        worst = detection.worst_images(self.inputs, self.truth, self.found)
        detection.write_report(self.run, found, self.inputs, self.measures.per_class, worst, command)


TESTS: dict[str, type[ClassificationTest] | type[SegmentationTest] | type[DetectionTest]] = {
    "classification": ClassificationTest,
    "segmentation": SegmentationTest,
    "detection": DetectionTest,
}
