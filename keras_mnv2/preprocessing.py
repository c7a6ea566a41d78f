"""From a photograph to the network's input, as each checkpoint's library does it, and from scores to names."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np
from PIL import Image

from keras_mnv2.annotations import PathLike, Tensor
from keras_mnv2.arguments import data_format_name
from keras_mnv2.checks import check_whole
from keras_mnv2.weights.table import HALF, Checkpoint, Preprocessing, find_checkpoint, imagenet_checkpoint

# Pixels of a side; JPEG files have no more.
MOST_SIDE = 2**16
# Of a model that takes any size.
SIDE = 224
Photograph = PathLike | BinaryIO | Image.Image | np.ndarray
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def preprocess_input(x: Tensor, data_format: str | None = None, weights: str | Checkpoint | None = None) -> Tensor:
    """Scales pixels from 0..255 to what a checkpoint expects; by default -1..1, as Keras's do.

    The same signature as `keras.applications.mobilenet_v2.preprocess_input`, and `weights` besides; the
    input is not changed.

    Args:
        x: images with values 0..255, NHWC or NCHW (or one image, HWC or CHW): an array, a tensor of the backend or of
            another library, as tf.data hands them out, or a Keras tensor.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        weights: name of a published checkpoint, or a record of `list_weights`; None and `"imagenet"` stand for
            Keras's own. torchvision's and timm's subtract the mean and divide by the standard deviation of each
            channel of ImageNet.

    Returns:
        What `x` is, of the same shape, in Keras's float type or that of `x`.

    Raises:
        ValueError: on an unknown checkpoint or data format, or images that are not RGB where the mean of each
            channel is subtracted.

    Examples:
        >>> tuple(preprocess_input(np.array([[[[0, 127.5, 255]]]])).shape)
        (1, 1, 1, 3)
    """
    how = preprocessing_of(weights)
    channels_last = data_format_name(data_format) == "channels_last"
    if isinstance(x, list | tuple | Image.Image):
        x = np.asarray(x)
    if not hasattr(x, "dtype") or (isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "OSUc"):
        raise ValueError(f"x must be images, an array or a tensor of real numbers, got {x!r}.")
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        x = _cast(x, keras.config.floatx())
    if (how.mean, how.std) == (HALF, HALF):
        return x / 127.5 - 1
    shape, axis = ((3,), -1) if channels_last else ((3, 1, 1), -3)
    # In tf.data not even the number of axes may be known.
    known = getattr(x.shape, "rank", 0) is not None
    if known and (len(x.shape) < 3 or x.shape[axis] not in (3, None)):
        layout = "(height, width, 3)" if channels_last else "(3, height, width)"
        raise ValueError(f"x must be images of the shape {layout}, got {tuple(x.shape)}.")
    mean, std = (np.reshape(np.asarray(v, "float32"), shape) for v in (how.mean, how.std))
    return (x / 255 - _like(mean, x)) / _like(std, x)


def _module_of(x: object) -> str:
    """The library that a tensor is of: whatever the backend, tf.data hands out TensorFlow's."""
    return type(x).__module__.partition(".")[0]


def _cast(x: Tensor, dtype: str) -> Tensor:
    if isinstance(x, np.ndarray):
        return x.astype(dtype)
    module = _module_of(x)
    if module == "tensorflow":
        return sys.modules["tensorflow"].cast(x, dtype)
    if module == "torch":
        return x.to(getattr(sys.modules["torch"], dtype))
    return keras.ops.cast(x, dtype)


def _like(array: np.ndarray, x: Tensor) -> Tensor:
    """An array of NumPy as a tensor of the library and type of `x`."""
    module = _module_of(x)
    if module == "tensorflow":
        return sys.modules["tensorflow"].cast(array, x.dtype)
    if module == "torch":
        return sys.modules["torch"].as_tensor(array, dtype=x.dtype, device=x.device)
    return array.astype(x.dtype) if isinstance(x, np.ndarray) else keras.ops.cast(array, x.dtype)


def preprocessing_layer(
    policy: keras.DTypePolicy,
    data_format: str = "channels_last",
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> keras.layers.Layer:
    """`preprocess_input` as a layer, so that a model takes raw images."""
    if (tuple(mean), tuple(std)) == (HALF, HALF):
        return keras.layers.Rescaling(1 / 127.5, offset=-1, name="preprocess", dtype=policy)
    return keras.layers.Normalization(
        axis=-1 if data_format == "channels_last" else 1,
        mean=[255 * m for m in mean],
        variance=[(255 * s) ** 2 for s in std],
        name="preprocess",
        dtype=policy,
    )


def scales_pixels(model: keras.Model) -> bool:
    """Whether `model`, or one inside it, was built with `include_preprocessing`, and takes pixels of 0..255."""
    return any(
        layer.name == "preprocess" or (isinstance(layer, keras.Model) and scales_pixels(layer))
        for layer in model.layers
    )


def preprocessing_of(weights: str | Checkpoint | Preprocessing | None) -> Preprocessing:
    """The preprocessing of a checkpoint, by name or record; of Keras's own at 224 pixels for None and "imagenet"."""
    if isinstance(weights, Preprocessing):
        return weights
    if weights is None or (isinstance(weights, str) and weights == "imagenet"):
        weights = imagenet_checkpoint(1.0, (224, 224), True)
    checkpoint = weights if isinstance(weights, Checkpoint) else find_checkpoint(weights)
    return checkpoint.preprocessing


def resize_and_crop(
    image: Photograph, weights: str | Checkpoint | Preprocessing | None = None, size: int | None = None
) -> np.ndarray:
    """Resizes a photograph and cuts its centre out, as the checkpoint's library does for evaluation.

    The shorter side is resized by Pillow, with antialiasing; the bytes are those of torchvision's, timm's and
    transformers' own evaluation of a Pillow image. Keras publishes no such code: for its checkpoints it is the
    central 87.5 % that the authors evaluated them on.

    Args:
        image: path of a file, a Pillow image, or an array of bytes, (height, width, 3) or (height, width).
            Grey, palette, CMYK and transparent images are turned to RGB by Pillow, which ignores the EXIF
            orientation as the libraries do; of 16-bit grey the high byte is taken, as Pillow does of 16-bit RGB.
        weights: as in `preprocess_input`.
        size: pixels of each side instead of the checkpoint's; the resizing scales with it.

    Returns:
        An array of bytes (size, size, 3), for `preprocess_input`.

    Raises:
        ValueError: on an array of another shape or type, an image without pixels or with pixels of unknown
            range (32-bit), or a file that is no image.
        FileNotFoundError: where there is no such file.

    Examples:
        >>> resize_and_crop(np.zeros((300, 400, 3), "uint8"), "torchvision/IMAGENET1K_V2").shape
        (224, 224, 3)
    """
    how = preprocessing_of(weights)
    if size is not None:
        how = how.at(check_whole("size", size, most=MOST_SIDE))
    shorter, crop = how.resize, how.crop
    picture = load_image(image)
    width, height = picture.size
    if not width or not height:
        raise ValueError(f"image must have pixels, got one of height {height} and width {width}.")
    scale = shorter / min(width, height)
    # The shorter side first: as integers, the way all three libraries round.
    new = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    if scale != 1:
        picture = picture.resize(new, _RESAMPLING[how.interpolation])
    # Half of an odd difference: `round` goes to the even number.
    corner = round if how.crop_rounding == "round" else int
    left, top = (corner((side - crop) / 2) for side in new)
    # A copy: Pillow's own memory cannot be written to.
    return np.array(picture.crop((left, top, left + crop, top + crop)))


def load_image(image: Photograph) -> Image.Image:
    """Reads a photograph as RGB, whatever its file's mode, as `resize_and_crop` does.

    Args:
        image: path of a file, an open binary file, a Pillow image, or an array of bytes, (height, width, 3) or
            (height, width).

    Returns:
        A Pillow image in mode RGB.

    Raises:
        ValueError: on an array of another shape or type, pixels of unknown range (32-bit), or a file that is no image.
        FileNotFoundError: where there is no such file.

    Examples:
        >>> load_image(np.zeros((300, 400), "uint8")).mode
        'RGB'
    """
    is_path = isinstance(image, str | os.PathLike)
    if is_path or hasattr(image, "read"):
        file: Any = image
        if is_path and not Path(file).is_file():
            raise FileNotFoundError(f"There is no image at {str(image)!r}.")
        try:
            with Image.open(file) as picture:
                return _to_rgb(picture)
        # Pillow's readers raise SyntaxError, RuntimeError and others on broken files.
        except Exception as error:
            told = str(error).rstrip(".") or type(error).__name__
            name = f"The file {str(image)!r}" if is_path else "The data"
            raise ValueError(f"{name} cannot be read as an image: {told}.") from error
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise ValueError(
            "image must be a path, a Pillow image or an array of bytes, (height, width, 3) or (height, width), "
            f"got {array.dtype} of shape {array.shape}."
        )
    return Image.fromarray(array).convert("RGB")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's conversion would clip to 255 and leave a white image.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype("uint8"))
    elif picture.mode in ("I", "F"):
        raise ValueError(
            f"the image has 32-bit pixels (Pillow's mode {picture.mode}), whose range is unknown; "
            "scale them to bytes first."
        )
    return picture.convert("RGB")


@functools.cache
def imagenet_labels() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) of ImageNet's 1000 classes in order; names as Keras writes them."""
    lines = (Path(__file__).parent / "labels.txt").read_text("utf-8").splitlines()
    return tuple((wnid, name) for wnid, name in (line.split("\t") for line in lines))


def decode_predictions(preds: Tensor, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """The best classes of ImageNet by name, as `keras.applications.mobilenet_v2.decode_predictions` gives them.

    Args:
        preds: scores (batch, 1000), or (batch, 1001) with the background first, as Hugging Face's
            checkpoints give them.
        top: how many classes of each image.

    Returns:
        For each image a list of (WordNet id, name, score), the best first.

    Raises:
        ValueError: on another shape, NaN or values that are no real numbers, or a `top` out of range.

    Examples:
        >>> scores = np.zeros((1, 1000))
        >>> scores[0, 283] = 1
        >>> decode_predictions(scores, top=1)[0][0][:2]
        ('n02123394', 'Persian_cat')
    """
    scores = keras.ops.convert_to_numpy(preds)
    keys = _real_numbers("preds", scores)
    if scores.ndim != 2 or scores.shape[1] not in (1000, 1001):
        raise ValueError(f"preds must have the shape (batch, 1000) or (batch, 1001), got {scores.shape}.")
    top = check_whole("top", top)
    labels = imagenet_labels()
    if scores.shape[1] == 1001:
        labels = (("", "background"), *labels)
    if np.isnan(keys).any():
        raise ValueError(f"preds must be numbers, got NaN for {np.isnan(keys).any(1).sum()} of {len(keys)} images.")
    # Backwards twice: the negative of an unsigned number is another number, and equal ones stay in order.
    best = scores.shape[1] - 1 - np.argsort(keys[:, ::-1], axis=1, kind="stable")[:, : -top - 1 : -1]
    return [[(*labels[i], row[i]) for i in order] for row, order in zip(scores, best, strict=True)]


def probabilities(scores: Any) -> np.ndarray:
    """The softmax of logits; scores that are probabilities already stay as they are.

    They are where none is negative and each row's sum is 1 within 1e-3, or within half a step of 1/256 for each class:
    8-bit files round their softmax to such steps.

    Args:
        scores: (images, classes), of a classifier with or without a softmax.

    Returns:
        An array (images, classes) of float64.

    Raises:
        ValueError: on another shape, or values that are no real numbers.

    Examples:
        >>> probabilities([[0, np.log(3)], [2, 2]]).round(2).tolist()
        [[0.25, 0.75], [0.5, 0.5]]
    """
    scores = _real_numbers("scores", np.asarray(keras.ops.convert_to_numpy(scores))).astype("float64")
    if scores.ndim != 2:
        raise ValueError(f"scores must have the shape (images, classes), got {scores.shape}.")
    apart = np.abs(scores.sum(axis=1) - 1)
    if (scores >= 0).all() and (scores <= 1 + 1e-3).all() and (apart <= max(1e-3, scores.shape[1] / 512)).all():
        return scores
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _real_numbers(name: str, array: np.ndarray) -> np.ndarray:
    """An array in a type that NumPy can sort, which bfloat16 is not; whole numbers stay, float32 would round them."""
    try:
        return array if array.dtype.kind in "biuf" else array.astype("float32", casting="same_kind")
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be real numbers, got values of type {array.dtype}.") from None
