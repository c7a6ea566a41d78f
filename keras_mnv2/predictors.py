"""Detectors and segmentation networks, whatever file they are in and whatever runs them, on whole photographs."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from PIL import Image

from keras_mnv2.checks import check_choice, check_number
from keras_mnv2.loading import (
    SCALES,
    Network,
    Run,
    check_task,
    is_exported,
    labels_of,
    load_exported,
    load_image_model,
    name_of_model,
    output_shapes,
    path_of_model,
    run_settings,
)
from keras_mnv2.preprocessing import Photograph, load_image, scales_pixels
from keras_mnv2.tasks.detection import SSDLite, detector
from keras_mnv2.tasks.segmentation import DeepLabV3
from keras_mnv2.weights.table import segmentation_checkpoint

# What a detection's score is at least, unless the caller says so.
SCORE = 0.5
# The longer side of a photograph for a segmentation network that takes any: that of the published one.
LONGEST = 513
# The least side that the network takes.
LEAST = 32
# Around a photograph that is smaller than the image: what a scaling to -1..1 makes about 0.
FILL = (127, 127, 127)
# Pixels of the image per pixel of the scores, along one side.
_STRIDES = (1, 8, 16)


@dataclasses.dataclass(eq=False)
class Detector(Network):
    """A detector that `load_detector` found.

    Attributes:
        name: the path.
        runtime: what runs it.
        input_shape: of its images, as it takes them.
        scale: whether pixels are scaled to -1..1 for it.
        settings: of the training run in whose folder it lies; empty elsewhere.
        labels: names of its classes that an exported file says, or None.
    """

    name: str
    runtime: str
    input_shape: tuple[int | None, ...]
    scale: bool
    _load: Callable[[], Run]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if None in self.sides:
            raise ValueError(f"model must take images of a known size to detect, got {self.input_shape}.")

    def detect(self, image: Photograph, score_threshold: float = SCORE) -> dict[str, np.ndarray]:
        """What is on a photograph. It is resized to the network's image, whatever its ratio of sides.

        Args:
            image: as `load_image` takes it.
            score_threshold: what the score of a detection is at least; a detector leaves out what is below its own.

        Returns:
            `"boxes"` float32 (detections, 4), (left, top, right, bottom) in pixels of the photograph; `"scores"`
            (detections,), best first; `"classes"` (detections,), whole numbers from 0.

        Raises:
            ValueError: on an image that `load_image` does not take, a threshold out of range, or a model that is no
                detector.
        """
        check_number("score_threshold", score_threshold, "a number from 0 to 1", lambda number: 0 <= number <= 1)
        photograph = load_image(image)
        height, width = self.sides
        assert height is not None
        assert width is not None
        pixels = np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR))
        found = self._outputs(self.prepare(pixels[None]))
        _check_detections(self.name, {name: np.shape(y) for name, y in found.items()})
        boxes, scores, classes = (np.asarray(found[name])[0] for name in ("boxes", "scores", "classes"))
        kept = (classes >= 0) & (scores >= score_threshold)
        enlarged = boxes[kept] * (2 * (photograph.width / width, photograph.height / height))
        return {
            "boxes": enlarged.astype("float32"),
            "scores": scores[kept].astype("float32"),
            "classes": classes[kept].astype("int32"),
        }


@dataclasses.dataclass(eq=False)
class Segmenter(Network):
    """A segmentation network that `load_segmenter` found.

    Attributes:
        name: of the checkpoint, or the path.
        runtime: what runs it.
        input_shape: of its images, as it takes them.
        scale: whether pixels are scaled to -1..1 for it.
        settings: of the training run in whose folder it lies; empty elsewhere.
        labels: names of its classes that a checkpoint or an exported file says, or None.
    """

    name: str
    runtime: str
    input_shape: tuple[int | None, ...]
    scale: bool
    _load: Callable[[], Run]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] | None = None

    def segment(self, image: Photograph) -> np.ndarray:
        """The class of each pixel of a photograph.

        A photograph that is larger than the network's image is reduced to it and keeps its ratio of sides; what the
        image has beyond it is grey, as in training. A network of any size gets it with a longer side of 513 pixels at
        most. Scores are resized to the photograph, bilinearly, before the largest is taken.

        Args:
            image: as `load_image` takes it.

        Returns:
            int32 (height, width), from 0.

        Raises:
            ValueError: on an image that `load_image` does not take, or a model that is no segmentation network.
        """
        photograph = load_image(image)
        height, width = self.sides
        factor = min(1.0, (width or LONGEST) / photograph.width, (height or LONGEST) / photograph.height)
        inner = max(1, round(factor * photograph.width)), max(1, round(factor * photograph.height))
        small = photograph.resize(inner, Image.Resampling.BILINEAR) if inner != photograph.size else photograph
        canvas = Image.new("RGB", (width or max(LEAST, inner[0]), height or max(LEAST, inner[1])), FILL)
        canvas.paste(small, (0, 0))
        outputs = self._outputs(self.prepare(np.asarray(canvas)[None]))
        check_task("segmentation", self.name, {name: np.shape(y) for name, y in outputs.items()})
        scores = np.asarray(next(iter(outputs.values())))[0]
        _check_scores(self.name, len(outputs), scores.shape)
        if scores.ndim == 3:
            scores = self._channels_last(scores, canvas.size)
        # The part of the scores that is the photograph's.
        right, bottom = (
            part * side / whole for part, whole, side in zip(inner, canvas.size, scores.shape[1::-1], strict=True)
        )
        return _labels(scores, (0.0, 0.0, right, bottom), photograph.size)

    def _channels_last(self, scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Scores (height, width, classes), whichever way the model has them."""
        sides = [tuple(-(-side // stride) for side in reversed(size)) for stride in _STRIDES]
        last, first = scores.shape[:2] in sides, scores.shape[1:] in sides
        # A file may take its images in another layout than it gives its scores.
        is_first = first if first != last else self._channels_first
        return np.moveaxis(scores, 0, -1) if is_first else scores


def load_detector(model: str | os.PathLike, *, alpha: float | None = None, scale: str | None = None) -> Detector:
    """Finds a detector by what it is called, and what it takes.

    Args:
        model: a model of `SSDLite` or `detector` as `.keras`; the folder of a training run, with `model.keras` in it; a
            detector that `export` wrote (`.onnx`, `.tflite`, `.xml`, `.pt2`, `.pte` or a SavedModel), which its own
            runtime runs; or what `SSDLite` takes as `weights`. Of a network alone, `detector` with its defaults
            decodes the boxes.
        alpha: width multiplier, for a file of weights that does not say it.
        scale: as in `load_classifier`.

    Returns:
        A `Detector`.

    Raises:
        ValueError: on an argument out of range, or a model that cannot be loaded or is no detector.
        FileNotFoundError: where there is no such file.
        ImportError: where the runtime of an exported file is not installed.

    Examples:
        >>> SSDLite((96, 96, 3), alpha=0.35, weights_backbone=None, classes=5).save("five.keras")
        >>> found = load_detector("five.keras").detect(np.zeros((48, 200, 3), "uint8"), score_threshold=0.0)
        >>> found["boxes"].shape[1], float(found["boxes"].max()) <= 200
        (4, True)
    """

    def of_weights(name: str) -> keras.Model:
        return SSDLite(alpha=alpha, weights=name, include_preprocessing=True)

    def whole(given: keras.Model, name: str) -> keras.Model:
        shapes = output_shapes(given)
        if set(shapes) != {"boxes", "classes"}:
            _check_detections(name, shapes)
            return given
        try:
            return detector(given)
        except ValueError as error:
            raise _alone(name) from error

    return _load(Detector, model, alpha, scale, of_weights, whole)


def load_segmenter(model: str | os.PathLike, *, alpha: float | None = None, scale: str | None = None) -> Segmenter:
    """Finds a segmentation network by what it is called, and what it takes.

    Args:
        model: a whole model as `.keras`; the folder of a training run, with `model.keras` in it; a file that `export`
            wrote (`.onnx`, `.tflite`, `.xml`, `.pt2`, `.pte` or a SavedModel), which its own runtime runs; or what
            `DeepLabV3` takes as `weights`: the name of a published checkpoint, an `hf://` address or a file of
            weights. The model may give logits, probabilities or the labels themselves.
        alpha: width multiplier, for a file of weights that does not say it.
        scale: as in `load_classifier`.

    Returns:
        A `Segmenter`.

    Raises:
        ValueError: on an argument out of range, or a model that cannot be loaded or is no segmentation network.
        FileNotFoundError: where there is no such file.
        ImportError: where the runtime of an exported file is not installed.
        ConnectionError: where a checkpoint cannot be downloaded.

    Examples:
        >>> DeepLabV3((65, 65, 3), alpha=0.35, weights_backbone=None, classes=5).save("pixels.keras")
        >>> load_segmenter("pixels.keras").segment(np.zeros((48, 200, 3), "uint8")).shape
        (48, 200)
    """

    def of_weights(name: str) -> keras.Model:
        return DeepLabV3(alpha=alpha, weights=name, include_preprocessing=True)

    def whole(given: keras.Model, name: str) -> keras.Model:
        shapes = output_shapes(given)
        check_task("segmentation", name, shapes)
        _check_scores(name, len(shapes), next(iter(shapes.values()))[1:])
        return given

    found = _load(Segmenter, model, alpha, scale, of_weights, whole)
    published = segmentation_checkpoint(found.name)
    if published is not None:
        found.labels = published.labels
    return found


def _load(
    kind: Any,
    model: str | os.PathLike,
    alpha: float | None,
    scale: str | None,
    of_weights: Callable[[str], keras.Model],
    whole: Callable[[keras.Model, str], keras.Model],
) -> Any:
    """A network of this kind: of an exported file, or of a model that `whole` checks and completes."""
    name = name_of_model(model)
    scale = check_choice("scale", scale, (None, *SCALES))
    path = path_of_model(name, alpha)
    own: dict[str, Any] = {}
    if path is not None:
        own = {"settings": run_settings(path), "labels": labels_of(path)}
    if path is not None and is_exported(path):
        run, shape, runtime = load_exported(name, path)
        return kind(name, runtime, shape, scale == "keras", lambda: run, **own)
    given = of_weights(name) if path is None else load_image_model(name, path)
    complete = whole(given, name)
    scaled = not scales_pixels(given) if scale is None else scale == "keras"
    return kind(name, f"Keras on {keras.backend.backend()}", given.input_shape, scaled, lambda: complete, **own)


def _check_detections(name: str, shapes: dict[str, Any]) -> None:
    check_task("detection", name, shapes)
    if set(shapes) == {"boxes", "classes"}:
        raise _alone(name)
    if set(shapes) != {"boxes", "scores", "classes"}:
        raise ValueError(
            f"model must give boxes, scores and classes, the one in {name!r} gives {', '.join(sorted(shapes))}."
        )


def _alone(name: str) -> ValueError:
    return ValueError(
        f"model must give detections, got the network alone in {name!r}: export keras_mnv2.detector(model), which "
        "decodes its boxes."
    )


def _check_scores(name: str, outputs: int, shape: tuple[int | None, ...]) -> None:
    """Of the scores (height, width, classes) or (classes, height, width) of an image, or its labels (height, width)."""
    if outputs != 1 or len(shape) not in (2, 3) or (len(shape) == 3 and 1 in (shape[0], shape[-1])):
        what = f"{outputs} outputs" if outputs != 1 else f"{tuple(shape)}"
        raise ValueError(
            f"model must give scores (height, width, classes) or labels (height, width), the one in {name!r} gives "
            f"{what} for an image."
        )


def _labels(scores: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The labels of a photograph of this size (width, height), whose part of the scores `box` is."""
    if scores.ndim == 2:
        found = Image.fromarray(scores.astype("int32")).resize(size, Image.Resampling.NEAREST, box=box)
        return np.asarray(found, "int32")
    labels = np.zeros(size[::-1], "int32")
    best = np.full(size[::-1], -np.inf, "float32")
    # Class by class: all of them at the size of a photograph may be gigabytes.
    for label in range(scores.shape[-1]):
        plane = Image.fromarray(np.ascontiguousarray(scores[..., label], "float32"))
        values = np.asarray(plane.resize(size, Image.Resampling.BILINEAR, box=box))
        labels[values > best] = label
        best = np.maximum(best, values)
    return labels
