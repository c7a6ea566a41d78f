"""Any classifier, whatever file it is in and whatever runs it, as what gives scores for images."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import PathLike, Shape
from keras_mnv2.checks import check_choice, check_path, check_whole
from keras_mnv2.formats.runtimes import load_with_shape
from keras_mnv2.model import MobileNetV2
from keras_mnv2.preprocessing import MOST_SIDE, SIDE, imagenet_labels, preprocessing_of, scales_pixels
from keras_mnv2.weights.hdf5 import open_hdf5
from keras_mnv2.weights.source import checkpoint_of, classes_of, read_source
from keras_mnv2.weights.table import Checkpoint, Preprocessing, imagenet_checkpoint

EXPORTED = (".onnx", ".tflite", ".xml", ".pt2", ".pte")
SCALES = ("none", "keras")
# Numbers of ImageNet's classes, without and with the background.
IMAGENET = (1000, 1001)


@dataclasses.dataclass(eq=False)
class Classifier:
    """A classifier that `load_classifier` found.

    Attributes:
        name: of the checkpoint, or the path.
        runtime: what runs it.
        input_shape: of its images, as it takes them: (batch, height, width, channels) or (batch, channels, height,
            width); what is free, or not known, is None.
        preprocessing: how a photograph is resized and cropped for it; `scores` takes its pixels of 0..255.
        scale: whether pixels are scaled to -1..1 for it.
        settings: of the training run in whose folder it lies; empty elsewhere.
    """

    name: str
    runtime: str
    input_shape: tuple[int | None, ...]
    preprocessing: Preprocessing
    scale: bool
    _classes: int | None
    _load: Callable[[], keras.Model | Callable[[np.ndarray], Any]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    _filled: int = 0

    def __post_init__(self) -> None:
        if len(self.input_shape) != 4:
            raise ValueError(f"model must take images (batch, height, width, channels), got {self.input_shape}.")
        height, width = self.input_shape[2:] if self._channels_first else self.input_shape[1:3]
        if None not in (height, width) and height != width:
            raise ValueError(f"model must take square images, got one for {height} x {width} pixels.")

    @property
    def _channels_first(self) -> bool:
        return self.input_shape[1] in (1, 3) and self.input_shape[3] not in (1, 3)

    @property
    def size(self) -> int | None:
        """Side of its images in pixels, or None where any is taken or it is not known."""
        return self.input_shape[2] or self.input_shape[3 if self._channels_first else 1]

    @property
    def channels(self) -> int | None:
        """Of its images, or None where that is not known."""
        return self.input_shape[1 if self._channels_first else 3]

    @property
    def classes(self) -> int:
        """How many scores it gives an image; an exported file is run once to find out."""
        if self._classes is None:
            side = self.size or self.preprocessing.crop
            self.scores(np.zeros((1, side, side, self.channels or 3), "float32"))
        return self._classes or 0

    def load(self) -> None:
        """Downloads and builds it, where that is still to be done; `scores` does so too."""
        self._loaded  # noqa: B018  A cached property.

    @property
    def model(self) -> keras.Model | None:
        """The model of Keras that gives the scores; None where another runtime runs a file."""
        return self._loaded if isinstance(self._loaded, keras.Model) else None

    @functools.cached_property
    def _loaded(self) -> keras.Model | Callable[[np.ndarray], Any]:
        return self._load()

    def prepare(self, images: Any) -> np.ndarray:
        """Images as the model takes them: scaled, grey ones repeated for a network of RGB, channels first if it does.

        Args:
            images: NHWC with values 0..255.

        Returns:
            An array of float32.

        Raises:
            ValueError: on images that the model does not take.
        """
        images = np.asarray(images, "float32")
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, height, width, channels), got the shape {images.shape}.")
        if self.channels == 3 and images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        if self.channels not in (None, images.shape[-1]):
            raise ValueError(
                f"images must have {self.channels} channels, as the model takes them, got {images.shape[-1]}."
            )
        x = images / np.float32(127.5) - 1 if self.scale else images
        return np.moveaxis(x, -1, 1) if self._channels_first else x

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
        run = self._loaded if self.model is None else self.model.predict_on_batch
        scores = np.asarray(run(filled), "float32")
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
    name = os.fspath(check_path("model", model)) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name:
        raise ValueError(f"model must be a path, or a checkpoint's name or address, got {model!r}.")
    if image_size is not None:
        image_size = check_whole("image_size", image_size, most=MOST_SIDE)
    scale = check_choice("scale", scale, (None, *SCALES))
    path = Path(name)
    if (path / "model.keras").is_file():
        path = path / "model.keras"
    exported = path.suffix in EXPORTED or (path / "saved_model.pb").is_file()
    if not exported and path.suffix != ".keras" and not path.is_dir():
        found = _of_weights(name, image_size, alpha)
    elif path.is_dir() and not exported:
        raise ValueError(f"model must be a run folder with model.keras or a SavedModel, got the folder {name!r}.")
    elif not path.exists():
        raise FileNotFoundError(f"There is no model at {name!r}.")
    elif alpha is not None:
        raise ValueError(f"alpha must be left out with a whole model, which has its own, got {alpha!r}.")
    else:
        found = _exported(name, path) if exported else _whole_model(name, path)
        if image_size is not None and found.size not in (None, image_size):
            raise ValueError(f"image_size must be {found.size}, as the model {name!r} takes it, got {image_size}.")
        found.settings = _run_settings(path)
        size, run = image_size or found.size or SIDE, found.settings
        resize = run.get("resize") if size == (run.get("evaluation_size") or run.get("image_size")) else None
        found.preprocessing = Preprocessing.for_evaluation(size, run.get("weights"), resize)
    return found if scale is None else dataclasses.replace(found, scale=scale == "keras")


def _run_settings(path: Path) -> dict[str, Any]:
    """The settings of the training run in whose folder a model lies; empty elsewhere."""
    for folder in (path, path.parent):
        if (folder / "model.keras").is_file() and (folder / "config.json").is_file():
            with contextlib.suppress(ValueError):
                settings = json.loads((folder / "config.json").read_text("utf-8"))
                return settings if isinstance(settings, dict) else {}
    return {}


def _imagenet_indices(names: Sequence[str]) -> dict[str, int]:
    """The index among ImageNet's classes of each name that is a WordNet id, or the name of one class alone."""
    known: dict[str, list[int]] = {}
    for index, label in enumerate(imagenet_labels()):
        for name in label:
            known.setdefault(name, []).append(index)
    found = {name: known.get(name.replace(" ", "_"), []) for name in names}
    return {name: indices[0] for name, indices in found.items() if len(indices) == 1}


def load_model(path: str | os.PathLike) -> keras.Model:
    """A whole model of a `.keras` file, once the file was checked; nothing in it is run.

    Raises:
        ValueError: where it cannot be loaded.
    """
    with _as_value_error(path):
        with open_hdf5(Path(path)):
            pass  # It leads to no other file, and claims no more than it has.
        return keras.models.load_model(path, compile=False, safe_mode=True)


def _whole_model(name: str, path: Path) -> Classifier:
    model = load_model(path)
    if not isinstance(model.input_shape, tuple):
        raise ValueError(f"model must take images alone, got one with {len(model.input_shape)} inputs.")
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
    with _as_value_error(name):
        run, shape = load_with_shape(path)

    def scores(images: np.ndarray) -> np.ndarray:
        outputs = run(images)
        if len(outputs) != 1:
            raise ValueError(f"model must have one output, got {', '.join(sorted(outputs))}.")
        return next(iter(outputs.values()))

    return Classifier(name, path.suffix[1:] or "SavedModel", shape, preprocessing_of(None), False, None, lambda: scores)


@contextlib.contextmanager
def _as_value_error(path: PathLike) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    # Each runtime raises errors of its own.
    except Exception as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"The file {os.fspath(path)!r} cannot be loaded as a model: {told[0]}") from error
