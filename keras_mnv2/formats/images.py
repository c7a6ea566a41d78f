"""What an exported file is told of its images: how photographs are prepared, and whether the model scales pixels."""

from pathlib import Path

import keras
import numpy as np

from keras_mnv2.formats import converters
from keras_mnv2.formats.litert_file import fold_scaling, joined
from keras_mnv2.formats.litert_integers import round_by_images
from keras_mnv2.formats.litert_metadata import with_metadata
from keras_mnv2.preprocessing import SIDE, preprocessing_of
from keras_mnv2.rewrite import layers_of
from keras_mnv2.weights.table import Checkpoint, Preprocessing

_SCALING = (keras.layers.Rescaling, keras.layers.Normalization)


def takes_pixels(model: keras.Model) -> bool:
    """Whether the model scales pixels itself, by a layer of this package or of Keras, or by a division of the input."""
    inside = [model, *layers_of(model)]
    if any(layer.name == "preprocess" or isinstance(layer, _SCALING) for layer in inside):
        return True
    # `keras.applications.mobilenet_v2.preprocess_input` of a Keras tensor is no layer.
    operations = [operation for layer in inside for operation in getattr(layer, "operations", ())]
    return any(
        type(operation).__name__ in ("TrueDivide", "Divide", "Multiply")
        and not isinstance(operation, keras.Layer)
        and len(keras.tree.flatten(operation.input)) == 1
        for operation in operations
    )


def preprocessing_of_model(model: keras.Model, given: str | Checkpoint | Preprocessing | None) -> Preprocessing:
    """How photographs are prepared for the model; by default Keras's way at its size."""
    if given is not None:
        return preprocessing_of(given)
    shape = model.inputs[0].shape
    return Preprocessing.for_evaluation((shape[2] if len(shape) == 4 else None) or SIDE)


def check_page(model: keras.Model, how: Preprocessing) -> None:
    """Refuses a model whose images or scores a page cannot show."""
    given, scores = model.inputs[0].shape, model.output_shape
    sides = given[2:] if len(given) == 4 and given[1] == 3 else given[1:3]
    colours = len(given) == 4 and 3 in (given[1], given[3])
    if not colours or (sides[0] or how.crop) != (sides[1] or how.crop) or not isinstance(scores, tuple):
        raise ValueError(f'model must take square RGB images for format="web", got {given}.')
    if len(scores) != 2:
        raise ValueError(f'model must give scores (batch, classes) for format="web", got {scores}.')


def finish_litert(
    model: keras.Model,
    target: Path,
    precision: str,
    how: Preprocessing,
    labels: list[str] | None,
    calibration: np.ndarray | None = None,
) -> None:
    """What the converter leaves to be done: integers that read pixels, and what the file says about itself."""
    content, reference = target.read_bytes(), target.with_suffix(converters.REFERENCE)
    if precision == "int8":
        exact = reference.read_bytes() if reference.exists() else None
        if exact is not None and calibration is not None:
            content = round_by_images(content, exact, calibration)
        content = fold_scaling(content, exact, calibration)
        reference.unlink(missing_ok=True)
    behind = target.with_suffix(converters.BEHIND)
    if behind.exists():
        content = joined(content, behind.read_bytes())
        behind.unlink()
    shape = model.inputs[0].shape
    if len(shape) == 4 and shape[-1] in (1, 3):
        scaled = takes_pixels(model)
        mean, std = ([0.0], [1.0]) if scaled else ([255 * m for m in how.mean], [255 * s for s in how.std])
        content = with_metadata(content, mean, std, labels)
    elif labels is not None:
        raise ValueError(f"labels in LiteRT need a model of images (height, width, 3), got {tuple(shape[1:])}.")
    target.write_bytes(content)
