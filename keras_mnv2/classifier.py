"""Any classifier, whatever file it is in and whatever runs it, as what gives scores for images."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import Shape
from keras_mnv2.checks import check_choice, check_whole
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
from keras_mnv2.model import MobileNetV2
from keras_mnv2.preprocessing import MOST_SIDE, SIDE, imagenet_labels, preprocessing_of, scales_pixels
from keras_mnv2.weights.source import checkpoint_of, classes_of, read_source
from keras_mnv2.weights.table import Checkpoint, Preprocessing, imagenet_checkpoint

# Numbers of ImageNet's classes, without and with the background.
IMAGENET = (1000, 1001)


@dataclasses.dataclass(eq=False)
class Classifier(Network):
    """A classifier that `load_classifier` found.

    Attributes:
        name: of the checkpoint, or the path.
        runtime: what runs it.
        input_shape: of its images, as it takes them: (batch, height, width, channels) or (batch, channels, height,
            width); what is free, or not known, is None.
        preprocessing: how a photograph is resized and cropped for it; `scores` takes its pixels of 0..255.
        scale: whether pixels are scaled to -1..1 for it.
        settings: of the training run in whose folder it lies; empty elsewhere.
        labels: names of its classes that an exported file says, or None.
    """

    name: str
    runtime: str
    input_shape: tuple[int | None, ...]
    preprocessing: Preprocessing
    scale: bool
    _classes: int | None
    _load: Callable[[], Run]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    _filled: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.sides
        if None not in (height, width) and height != width:
            raise ValueError(f"model must take square images, got one for {height} x {width} pixels.")

    @property
    def size(self) -> int | None:
        """Side of its images in pixels, or None where any is taken or it is not known."""
        return self.sides[1] or self.sides[0]

    @property
    def classes(self) -> int:
        """How many scores it gives an image; an exported file is run once to find out."""
        if self._classes is None:
            side = self.size or self.preprocessing.crop
            self.scores(np.zeros((1, side, side, self.channels or 3), "float32"))
        return self._classes or 0

    def scores(self, images: Any) -> np.ndarray:
        """Scores of images: probabilities or logits, as the model gives them; see `keras_mnv2.probabilities`.

        Args:
            images: NHWC with values 0..255; grey ones are repeated for a network of RGB.

        Returns:
            An array (batch, classes) of float32.

        Raises:
            ValueError: on images that the model does not take, or a model that is no classifier.
        """
        x = self.prepare(images)
        # One shape for all batches, the smaller ones too: each new shape would be compiled.
        self._filled = max(self._filled, len(x))
        filled = np.concatenate([x, np.repeat(x[:1], self._filled - len(x), axis=0)])
        outputs = self._outputs(filled)
        check_task("classification", self.name, {key: np.shape(y) for key, y in outputs.items()})
        if len(outputs) != 1:
            raise ValueError(f"model must have one output, got {', '.join(sorted(outputs))}.")
        scores = np.asarray(next(iter(outputs.values())), "float32")
        if scores.ndim != 2:
            raise ValueError(f"model must be a classifier with scores (batch, classes), got {scores.shape}.")
        self._classes = scores.shape[1]
        return scores[: len(x)]

    def match(self, names: Sequence[str]) -> tuple[int, np.ndarray, tuple[str, ...]]:
        """Which of its scores are those of a data set's classes.

        ImageNet's classes are found by WordNet id or name, and some of them are enough. Other classes are the data
        set's in their order. A background before ImageNet's classes is no answer: its score is left out.

        Args:
            names: of the data set's classes.

        Returns:
            How many of the first scores are left out, 0 or 1; the index of each class among the others; and the names
            of these.

        Raises:
            ValueError: where the data set's classes are others.
        """
        indices = _imagenet_indices(names) if self.classes in IMAGENET else {}
        if names and len(indices) == len(names):
            labels = [label for _, label in imagenet_labels()]
            for name, index in indices.items():
                labels[index] = name
            return self.classes - IMAGENET[0], np.array([indices[name] for name in names]), tuple(labels)
        background = (len(names), self.classes) == IMAGENET
        if len(names) != self.classes - background:
            unknown = [name for name in names if name not in indices]
            more = f", of which {unknown[0]!r} is no name of ImageNet's" if self.classes in IMAGENET else ""
            raise ValueError(
                f"The data set must have the classes of the model, which has {self.classes}, got {len(names)}{more}."
            )
        return int(background), np.arange(len(names)), tuple(names)


def load_classifier(
    model: str | os.PathLike, *, image_size: int | None = None, alpha: float | None = None, scale: str | None = None
) -> Classifier:
    """Finds a classifier by what it is called, and what it takes.

    Args:
        model: a whole model as `.keras`; the folder of a training run, with `model.keras` in it; a file that `export`
            wrote (`.onnx`, `.tflite`, `.xml`, `.pt2`, `.pte` or a SavedModel), which its own runtime runs; or what
            `MobileNetV2` takes as `weights`: the name of a published checkpoint, `"imagenet"`, an `hf://` address or a
            file of weights.
        image_size: side of the images in pixels, for a checkpoint, or for a model that takes any; by default the
            model's own.
        alpha: width multiplier, for a file of weights or `"imagenet"`.
        scale: `"keras"` scales pixels to -1..1, `"none"` leaves 0..255, for models that scale them themselves. By
            default none for exported files; for Keras models whatever their `include_preprocessing` asks for.

    Returns:
        A `Classifier`. A published checkpoint is downloaded and built when its scores are asked for first.

    Raises:
        ValueError: on an argument out of range, or a model that cannot be loaded or has no classifier.
        FileNotFoundError: where there is no such file.
        ImportError: where the runtime of an exported file is not installed.
        ConnectionError: where a file of weights at an `hf://` address cannot be downloaded.

    Examples:
        >>> MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10).save("ten.keras")
        >>> classifier = load_classifier("ten.keras")
        >>> classifier.size, classifier.classes, classifier.scores(np.zeros((2, 32, 32, 3))).shape
        (32, 10, (2, 10))
    """
    name = name_of_model(model)
    if image_size is not None:
        image_size = check_whole("image_size", image_size, most=MOST_SIDE)
    scale = check_choice("scale", scale, (None, *SCALES))
    path = path_of_model(name, alpha)
    if path is None:
        found = _of_weights(name, image_size, alpha)
    else:
        found = _exported(name, path) if is_exported(path) else _whole_model(name, path)
        if image_size is not None and found.size not in (None, image_size):
            raise ValueError(f"image_size must be {found.size}, as the model {name!r} takes it, got {image_size}.")
        found.settings = run_settings(path)
        found.labels = labels_of(path)
        size, run = image_size or found.size or SIDE, found.settings
        resize = run.get("resize") if size == (run.get("evaluation_size") or run.get("image_size")) else None
        found.preprocessing = Preprocessing.for_evaluation(size, run.get("weights"), resize)
    return found if scale is None else dataclasses.replace(found, scale=scale == "keras")


def _imagenet_indices(names: Sequence[str]) -> dict[str, int]:
    """The index among ImageNet's classes of each name that is a WordNet id, or the name of one class alone."""
    known: dict[str, list[int]] = {}
    for index, label in enumerate(imagenet_labels()):
        for name in label:
            known.setdefault(name, []).append(index)
    found = {name: known.get(name.replace(" ", "_"), []) for name in names}
    return {name: indices[0] for name, indices in found.items() if len(indices) == 1}


def _whole_model(name: str, path: Path) -> Classifier:
    model = load_image_model(name, path)
    check_task("classification", name, output_shapes(model))
    given = model.output_shape
    if not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"model must have a classifier, the one in {name!r} gives {given}.")
    scale = not scales_pixels(model)
    return _of_keras(name, model.input_shape, preprocessing_of(None), scale, given[1], lambda: model)


def _of_weights(name: str, image_size: int | None, alpha: float | None) -> Classifier:
    weights = name
    checkpoint: Checkpoint | None
    if name == "imagenet":
        checkpoint = imagenet_checkpoint(1.0 if alpha is None else alpha, (SIDE, SIDE), True)
        weights = checkpoint.name
    else:
        checkpoint = checkpoint_of(name)
    if checkpoint is not None:
        how, classes, side = checkpoint.preprocessing, checkpoint.classes, checkpoint.resolution
    else:
        how, classes, side = preprocessing_of(None), classes_of(read_source(name)), SIDE
    if not classes:
        raise ValueError(f"model must have a classifier, which {name!r} has not.")
    if image_size is not None:
        how = how.at(image_size)
    sides = (image_size or side,) * 2
    shape = (*sides, 3) if keras.config.image_data_format() == "channels_last" else (3, *sides)

    def build() -> keras.Model:
        own = None if image_size is None else shape
        return MobileNetV2(own, alpha, weights=weights, include_preprocessing=True)

    return _of_keras(weights, (None, *shape), how, False, classes, build)


def _of_keras(
    name: str,
    shape: Shape,
    how: Preprocessing,
    scale: bool,
    classes: int,
    build: Callable[[], keras.Model],
) -> Classifier:
    return Classifier(name, f"Keras on {keras.backend.backend()}", shape, how, scale, classes, build)


def _exported(name: str, path: Path) -> Classifier:
    run, shape, runtime = load_exported(name, path)
    return Classifier(name, runtime, shape, preprocessing_of(None), False, None, lambda: run)
