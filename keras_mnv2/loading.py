"""A network, whatever file it is in and whatever runs it, as what gives its outputs for images."""

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_mnv2.annotations import PathLike, Shape
from keras_mnv2.checks import check_path
from keras_mnv2.formats.runtimes import load_with_shape
from keras_mnv2.weights.hdf5 import open_hdf5

EXPORTED = (".onnx", ".tflite", ".xml", ".pt2", ".pte")
SCALES = ("none", "keras")
# What each task's network is called, and what loads it.
TASKS = {
    "classification": ("a classifier", "load_classifier"),
    "detection": ("a detector", "load_detector"),
    "segmentation": ("a segmentation network", "load_segmenter"),
}
# What gives the outputs of images: a model of Keras, or a function to one array or to several by name.
Run: TypeAlias = keras.Model | Callable[[np.ndarray], Any]


class Network:
    """What classifiers, detectors and segmentation networks have in common.

    Attributes:
        name: of the checkpoint, or the path.
        runtime: what runs it.
        input_shape: of its images, as it takes them: (batch, height, width, channels) or (batch, channels, height,
            width); what is free, or not known, is None.
        scale: whether pixels are scaled to -1..1 for it.
    """

    name: str
    runtime: str
    input_shape: tuple[int | None, ...]
    scale: bool
    _load: Callable[[], Run]

    def __post_init__(self) -> None:
        if len(self.input_shape) != 4:
            raise ValueError(f"model must take images (batch, height, width, channels), got {self.input_shape}.")

    @property
    def _channels_first(self) -> bool:
        return self.input_shape[1] in (1, 3) and self.input_shape[3] not in (1, 3)

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Height and width of its images in pixels; None where any is taken or it is not known."""
        height, width = self.input_shape[2:] if self._channels_first else self.input_shape[1:3]
        return height, width

    @property
    def channels(self) -> int | None:
        """Of its images, or None where that is not known."""
        return self.input_shape[1 if self._channels_first else 3]

    def load(self) -> None:
        """Downloads and builds it, where that is still to be done; what runs it does so too."""
        self._loaded  # noqa: B018  A cached property.

    @property
    def model(self) -> keras.Model | None:
        """The model of Keras that gives the outputs; None where another runtime runs a file."""
        return self._loaded if isinstance(self._loaded, keras.Model) else None

    @functools.cached_property
    def _loaded(self) -> Run:
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

    def _outputs(self, prepared: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of prepared images by name; a single one may have any name."""
        run = self._loaded
        found = run.predict_on_batch(prepared) if isinstance(run, keras.Model) else run(prepared)
        if isinstance(run, keras.Model) and not isinstance(found, dict):
            found = dict(zip(_names(run), found if isinstance(found, list | tuple) else [found], strict=True))
        return found if isinstance(found, dict) else {"output": np.asarray(found)}


def _names(model: keras.Model) -> Sequence[str]:
    # A sequential model does not name its output.
    return list(getattr(model, "output_names", None) or ["output"])


def output_shapes(model: keras.Model) -> dict[str, Shape]:
    """The shapes of a model's outputs by name."""
    # Of several outputs of one layer Keras 3.15 gives `output_shape` as a list, and `output_names` with one name alone.
    if isinstance(model, keras.Sequential):
        # One that was loaded has no `output`.
        return {_names(model)[0]: model.output_shape}
    given = model.output
    if not isinstance(given, dict):
        given = dict(zip(_names(model), given if isinstance(given, list) else [given], strict=True))
    return {name: tuple(y.shape) for name, y in given.items()}


def check_task(task: str, name: str, shapes: Mapping[str, Shape]) -> None:
    """Raises `ValueError` where a network's outputs are those of another task, as far as that can be seen.

    Args:
        task: that it is to have.
        name: of the network, for the error.
        shapes: of its outputs.
    """
    ranks = [len(shape) for shape in shapes.values()]
    found = None
    if {"boxes", "classes"} <= set(shapes):
        found = "detection"
    elif ranks == [2]:
        found = "classification"
    elif len(ranks) == 1 and any("mask" in key for key in shapes):
        found = "segmentation"
    if found not in (None, task):
        what, load = TASKS[str(found)]
        raise ValueError(f"model must be {TASKS[task][0]}, got {what} in {name!r}, which {load} takes.")


def name_of_model(model: str | os.PathLike) -> str:
    """What a network is called by: a path, or the name or address of a checkpoint."""
    name = os.fspath(check_path("model", model)) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name:
        raise ValueError(f"model must be a path, or a checkpoint's name or address, got {model!r}.")
    return name


def path_of_model(name: str, alpha: float | None = None) -> Path | None:
    """The `.keras` or exported file that a name stands for; None for a checkpoint or a file of weights.

    Args:
        name: of `name_of_model`; a run folder stands for its `model.keras`.
        alpha: what the caller says of the width, which a whole model has itself.

    Raises:
        ValueError: on another folder, and on an `alpha` beside a whole model.
        FileNotFoundError: where there is no such file.
    """
    path = Path(name)
    if (path / "model.keras").is_file():
        path = path / "model.keras"
    exported = is_exported(path)
    if not exported and path.suffix != ".keras" and not path.is_dir():
        return None
    if path.is_dir() and not exported:
        raise ValueError(f"model must be a run folder with model.keras or a SavedModel, got the folder {name!r}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {name!r}.")
    if alpha is not None:
        raise ValueError(f"alpha must be left out with a whole model, which has its own, got {alpha!r}.")
    return path


def is_exported(path: Path) -> bool:
    """Whether a path is that of a file that `export` writes for another runtime."""
    return path.suffix in EXPORTED or (path / "saved_model.pb").is_file()


def run_settings(path: Path) -> dict[str, Any]:
    """The settings of the training run in whose folder a model lies; empty elsewhere."""
    for folder in (path, path.parent):
        if (folder / "model.keras").is_file() and (folder / "config.json").is_file():
            with contextlib.suppress(ValueError):
                settings = json.loads((folder / "config.json").read_text("utf-8"))
                return settings if isinstance(settings, dict) else {}
    return {}


def labels_of(path: Path) -> tuple[str, ...] | None:
    """The names of the classes that `export` wrote into a SavedModel or a `.tflite` file; None where it has none."""
    if (path / "assets" / "labels.txt").is_file():
        content = (path / "assets" / "labels.txt").read_bytes()
    elif path.suffix == ".tflite" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "labels.txt" not in archive.namelist():
                return None
            content = archive.read("labels.txt")
    else:
        return None
    return tuple(content.decode("utf-8").splitlines())


def load_model(path: str | os.PathLike) -> keras.Model:
    """A whole model of a `.keras` file, once the file was checked; nothing in it is run.

    Raises:
        ValueError: where it cannot be loaded.
    """
    with as_value_error(path):
        with open_hdf5(Path(path)):
            pass  # It leads to no other file, and claims no more than it has.
        return keras.models.load_model(path, compile=False, safe_mode=True)


def load_image_model(name: str, path: Path) -> keras.Model:
    """The same of a model that takes images alone."""
    model = load_model(path)
    if not isinstance(model.input_shape, tuple):
        raise ValueError(f"model must take images alone, got one with {len(model.input_shape)} inputs.")
    return model


def load_exported(name: str, path: Path) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], Shape, str]:
    """What runs an exported file, the shape of its images, and the name of its runtime."""
    with as_value_error(name):
        run, shape = load_with_shape(path)
    return run, shape, path.suffix[1:] or "SavedModel"


@contextlib.contextmanager
def as_value_error(path: PathLike) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    # Each runtime raises errors of its own.
    except Exception as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"The file {os.fspath(path)!r} cannot be loaded as a model: {told[0]}") from error
