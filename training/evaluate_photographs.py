"""Segmentation networks and detectors on the photographs of a data set, whatever file they are in."""

import dataclasses
import heapq
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mnv2

from . import files
from .data import masks, objects
from .data.augment import picture_of
from .data.boxes import Objects
from .data.sets import Dataset
from .report import average_precision, detection, metrics, page, segmentation
from .report.average_precision import Detections
from .report.tables import table
from .report.versions import versions

# Side of the black image of the first call, which compiles and is not timed.
FIRST = 64


class Pixels:
    """What a segmentation network says of the pixels of photographs, in their own size.

    Args:
        network: of `keras_mnv2.load_segmenter`.
        split: of photographs with masks.
        names: of the classes.
    """

    counted = "pixels"

    def __init__(self, network: keras_mnv2.Segmenter, split: Any, names: tuple[str, ...]):
        self.network = network
        self.split = split
        self.names = names
        self.images = 0
        self.matrix = np.zeros((len(names),) * 2, "int64")
        # (-mean IoU, number, predictions): a heap whose best image goes first.
        self.worst: list[tuple[float, int, np.ndarray]] = []

    def run(self, image: Any) -> np.ndarray:
        """The class of each pixel of a photograph."""
        return self.network.segment(image)

    def add(self, i: int, image: Any, truth: Any) -> None:
        """Counts a photograph of this number."""
        prediction = self.run(image)
        _check_classes(self.network, prediction, self.names)
        matrix = metrics.pixel_matrix(truth, prediction, len(self.names))
        self.matrix += matrix
        self.images += 1
        if matrix.any() and (iou := metrics.mean_iou(matrix)) < 1:
            heapq.heappush(self.worst, (-iou, i, prediction.astype("uint8")))
            if len(self.worst) > segmentation.MOST:
                heapq.heappop(self.worst)

    def results(self) -> dict[str, Any]:
        """As JSON takes them."""
        return {
            "images": self.images,
            "mean_iou": metrics.mean_iou(self.matrix),
            "pixel_accuracy": float(np.trace(self.matrix) / max(1, self.matrix.sum())),
            "per_class": metrics.per_class_of_pixels(self.matrix, self.names),
        }

    def shown(self) -> dict[str, Any]:
        """What the page has of its own."""
        worst = []
        for iou, i, prediction in sorted(self.worst, key=lambda one: -one[0]):
            image, mask = self.split[i]
            pixels = np.asarray(picture_of(image))
            worst.append(segmentation.worst_image(self.split.name(i), pixels, mask, prediction, -iou, self.names))
        return {"matrix": self.matrix, "worst": worst}


class Boxes:
    """What a detector finds on photographs, in their own pixels.

    Args:
        network: of `keras_mnv2.load_detector`.
        split: of photographs with objects.
        names: of the classes.
    """

    counted = "objects"

    def __init__(self, network: keras_mnv2.Detector, split: Any, names: tuple[str, ...]):
        self.network = network
        self.split = split
        self.names = names
        self.numbers: list[int] = []
        self.truth: list[Objects] = []
        self.found: list[Detections] = []

    def run(self, image: Any) -> dict[str, np.ndarray]:
        """All that the detector gives: average precision looks at each score."""
        return self.network.detect(image, score_threshold=0.0)

    def add(self, i: int, image: Any, truth: Any) -> None:
        """Counts a photograph of this number."""
        found = self.run(image)
        _check_classes(self.network, found["classes"], self.names)
        self.numbers.append(i)
        self.truth.append(truth)
        self.found.append(Detections(found["boxes"], found["classes"], found["scores"]))

    def results(self) -> dict[str, Any]:
        """As JSON takes them."""
        measured = average_precision.measure(self.truth, self.found, len(self.names))
        rows = zip(self.names, measured.per_class, strict=True)
        return {
            "images": len(self.numbers),
            "map": measured.mean,
            "map_50": measured.mean_50,
            "per_class": [{"name": name, **row} for name, row in rows],
        }

    def shown(self) -> dict[str, Any]:
        """What the page has of its own."""
        rated = [detection.quality(*pair) for pair in zip(self.truth, self.found, strict=True)]
        worst = []
        for k in sorted(range(len(rated)), key=lambda k: rated[k][0])[: detection.MOST]:
            i = self.numbers[k]
            pixels = np.asarray(picture_of(self.split[i][0]))
            worst.append(
                detection.worst_image(self.split.name(i), pixels, self.truth[k], self.found[k], rated[k], self.names)
            )
        return {"matrix": None, "worst": worst}


# Of each task: how its network and its data set are read, and what counts.
Task = tuple[Callable[..., Any], Callable[..., Dataset], type[Pixels] | type[Boxes]]
TASKS: dict[str, Task] = {
    "segmentation": (keras_mnv2.load_segmenter, masks.load, Pixels),
    "detection": (keras_mnv2.load_detector, objects.load, Boxes),
}


def evaluate(task: str, options: Any, command: str = "") -> dict[str, Any]:
    """Evaluates a segmentation network or a detector on a split of a data set, photograph by photograph.

    Args:
        task: `segmentation` or `detection`.
        options: of `training.evaluate`.
        command: what to run to repeat it, for the page.

    Returns:
        The results, as JSON takes them: of pixels `mean_iou` and `pixel_accuracy`, of objects `map` and `map_50`, and
        `per_class`; `images`, `images_per_second` and `skipped` as for a classifier.

    Raises:
        ValueError: on an argument that the task does not have, a model that cannot be loaded, or one of other classes
            than the data set's.
        ImportError: where a runtime is needed and missing.
    """
    load, read, counter = TASKS[task]
    defaults = {one.name: one.default for one in dataclasses.fields(options)}
    for name in ("resize", "data_dir", "batch_size"):
        if (given := getattr(options, name)) != defaults[name]:
            raise ValueError(f"{name} must be left out for {task}, which does not have it, got {given!r}.")
    if options.split == "all":
        raise ValueError(f"split must be train, validation or test for {task}, got 'all'.")
    network = load(options.model, alpha=options.alpha, scale=options.scale)
    run = network.settings
    name = options.dataset or run.get("dataset")
    if name is None:
        raise ValueError("dataset must be given, for a model that is no run folder.")
    size = options.image_size or run.get("image_size") or network.sides[0]
    if name == masks.SCENES and size is None:
        raise ValueError(f"image_size must be given for {name!r}, with a network that takes any size.")
    if name != masks.SCENES and options.image_size is not None:
        raise ValueError(
            f"image_size must be left out for {name!r}, whose photographs have their own, got {options.image_size}."
        )
    dataset = read(name, size, run.get("held_out", True))
    split, names = getattr(dataset, options.split), dataset.class_names
    # A folder of masks may have numbers in the place of names.
    numbers = task == "segmentation" and names == tuple(map(str, range(len(names))))
    if network.labels is not None and network.labels != names and not numbers:
        raise ValueError(
            f"model must have the classes of the data set in their order, {', '.join(names)}, got "
            f"{', '.join(network.labels)} from {network.name!r}."
        )
    count: Any = counter(network, split, names)
    count.run(np.zeros((FIRST, FIRST, 3), "uint8"))
    skipped: dict[str, str] = {}
    bar = keras.utils.Progbar(len(split), unit_name="image")
    start = time.perf_counter()
    for i in range(len(split)):
        try:
            image, truth = split[i]
        except (ValueError, OSError) as error:
            skipped[split.name(i)] = str(error)
        else:
            count.add(i, image, truth)
        bar.update(i + 1)
    seconds = time.perf_counter() - start
    if len(skipped) == len(split):
        raise ValueError(f"dataset must have images that can be read, got {next(iter(skipped.values()))}")
    settings = {
        "task": task,
        "model": network.name,
        "runtime": network.runtime,
        "dataset": name,
        "split": options.split,
    }
    results = {
        **settings,
        **count.results(),
        "images_per_second": round((len(split) - len(skipped)) / seconds, 2),
        "skipped": skipped,
        "versions": versions(),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(options.json, results)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        files.write_json(options.out / "results.json", results)
        report = page.Report(
            title=f"{Path(network.name).name} on {Path(name).name}",
            subtitle=f"{network.name}, run by {network.runtime}, on {results['images']:,} {options.split} images of "
            f"{name}.",
            results=rows(results),
            class_names=names,
            mistakes=(),
            unreadable=skipped,
            command=command,
            settings=settings,
            versions=results["versions"],
            counted=count.counted,
            classes=results["per_class"] if task == "detection" else (),
            **count.shown(),
        )
        page.write(options.out / "report.html", report)
    return results


def rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the head of the page."""
    if results["task"] == "detection":
        found = [("mAP at IoU 0.5", results["map_50"]), ("mAP at IoU 0.5 to 0.95", results["map"])]
    else:
        found = [("mean IoU", results["mean_iou"]), ("pixels that are right", results["pixel_accuracy"])]
    return [
        *((name, f"{value:.2%}") for name, value in found),
        ("images a second, reading included", f"{results['images_per_second']:,.1f}"),
    ]


def text(results: Mapping[str, Any]) -> str:
    """The results as people read them."""
    counted = "objects" if results["task"] == "detection" else "pixels"
    columns = page.FRACTIONS[counted]
    cells = [
        [row["name"], row[counted], *(None if row[key] is None else f"{row[key]:.1%}" for key in columns)]
        for row in results["per_class"]
    ]
    return "\n\n".join(
        [
            f"{results['model']} ({results['runtime']}) on {results['images']:,} {results['split']} images of "
            f"{results['dataset']}",
            "\n".join(f"{name}: {value}" for name, value in rows(results)),
            table(["class", counted, *columns.values()], cells),
        ]
    )


def _check_classes(network: Any, found: np.ndarray, names: tuple[str, ...]) -> None:
    if found.max(initial=0) >= len(names):
        raise ValueError(
            f"model must have the {len(names)} classes of the data set, got the class {found.max()} from "
            f"{network.name!r}."
        )
