"""Random changes to the training images: of one image by Pillow and NumPy, of a batch by Keras's own layers."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

import keras_mnv2

from ..config import Config
from ..parallel import engines

# Torchvision's and Inception's: ratio of the sides of a random crop, and tries before the centre is taken.
RATIOS = (3 / 4, 4 / 3)
TRIES = 10
# TrivialAugment's wide space (Mueller and Hutter 2021, Table 7): largest magnitude of each operation, in 31 levels.
LEVELS = 31
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", *ENHANCERS,
    "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip


def change_image(image: Any, config: Config, rng: np.random.Generator) -> np.ndarray:
    """A training image of `image_size`, randomly cropped and changed as `config` says.

    Args:
        image: a Pillow image, or an array (height, width, channels).
        config: its `crop_area` and `trivial_augment`.
        rng: where all that is random comes from.

    Returns:
        An array (image_size, image_size, channels).
    """
    if config.crop_area is None and not config.trivial_augment:
        return np.asarray(image)
    picture = picture_of(image)
    if config.crop_area is not None:
        picture = random_crop(picture, config.image_size, config.crop_area, rng)
    if config.trivial_augment:
        picture = trivial_augment(picture, rng)
    return np.asarray(picture)[..., : channels_of(image)]


def picture_of(image: Any) -> Image.Image:
    """A Pillow image, or an array (height, width, 1 or 3) of 0..255, as a Pillow image in RGB."""
    if isinstance(image, np.ndarray):
        image = np.clip(np.round(image), 0, 255).astype("uint8")
    return keras_mnv2.load_image(image[..., 0] if channels_of(image) == 1 else image)


def channels_of(image: Any) -> int:
    """The channels that an image has to keep: an array's own, and 3 of a photograph."""
    return image.shape[-1] if isinstance(image, np.ndarray) else 3


def random_crop(picture: Image.Image, size: int, smallest: float, rng: np.random.Generator) -> Image.Image:
    """A window of random area and ratio of sides, resized (Szegedy et al. 2015, section 6; ratios 3/4 to 4/3).

    Args:
        picture: a Pillow image.
        size: side of the result, in pixels.
        smallest: fraction of the area that the window covers at least.
        rng: where all that is random comes from.
    """
    width, height = picture.size
    for _ in range(TRIES):
        area = width * height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, (width - w, height - h), endpoint=True)
            break
    else:
        # The largest centre of an allowed ratio.
        w = min(width, max(1, round(height * RATIOS[1])))
        h = min(height, max(1, round(width / RATIOS[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def trivial_augment(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One operation of random strength (TrivialAugment, wide; Mueller and Hutter 2021).

    Keras has no such layer, and its RandAugment gives a whole batch one choice, and computes every operation for it:
    0.6 to 1.8 s for 16 images of 224 pixels on two cores.
    """
    name = OPERATIONS[rng.integers(len(OPERATIONS))]
    magnitude = rng.integers(LEVELS) / (LEVELS - 1)
    sign = rng.choice((-1, 1))
    if name in ENHANCERS:
        return ENHANCERS[name](picture).enhance(1 + sign * 0.99 * magnitude)
    if name == "rotate":
        return picture.rotate(sign * 135 * magnitude)
    if name == "posterize":
        return ImageOps.posterize(picture, 8 - round(6 * magnitude))
    if name == "solarize":
        threshold: Any = 256 * (1 - magnitude)  # Pillow only compares with it.
        return ImageOps.solarize(picture, threshold)
    if name == "auto_contrast":
        return ImageOps.autocontrast(picture)
    if name == "equalize":
        return ImageOps.equalize(picture)
    # Rows of the affine map from the result's coordinates to the picture's.
    slope = sign * 0.99 * magnitude if name.startswith("shear") else 0.0
    move = sign * 32 * magnitude if name.startswith("translate") else 0.0
    along_x = (1, slope, move, 0, 1, 0)
    along_y = (1, 0, 0, slope, 1, move)
    matrix = along_x if name.endswith("x") else along_y if name.endswith("y") else (1, 0, 0, 0, 1, 0)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix)


def pad_and_crop(images: np.ndarray, pad: int, tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
    """A window of each image with zeros around it (Krizhevsky 2010; He et al. 2016, section 4.2).

    Keras's RandomCrop cuts one place out of all images of a batch, and its RandomTranslation moves by fractions of a
    pixel, which blurs.

    Args:
        images: (batch, height, width, channels).
        pad: rows and columns of zeros on each side.
        tops: first row of each window, from 0 to twice `pad`.
        lefts: first column.
    """
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = tops[:, None] + np.arange(height), lefts[:, None] + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def change_batch(
    images: np.ndarray, labels: np.ndarray, config: Config, seed: int, first: int = 0, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A batch, or some rows of it, changed by padded crops and flips and by Keras's layers for the rest.

    The layers are made anew from `seed` for each batch, in about a millisecond: the result depends on nothing else, and
    threads share nothing.

    Args:
        images: (batch, height, width, channels), 0..255.
        labels: (batch, classes), one-hot.
        config: its `pad`, `shift`, `flip`, `erase`, `mixup` and `cutmix`.
        seed: of all that is random.
        first: row of the batch that the first image is. Crops and flips are those that the whole batch would get;
            Keras's layers draw for these rows alone.
        size: images of the whole batch; by default those that are given.

    Returns:
        Images and labels of the same shapes.
    """
    rng = np.random.default_rng(seed)
    rows, size = slice(first, first + len(images)), size or len(images)
    if config.pad:
        tops, lefts = rng.integers(0, 2 * config.pad, (2, size), endpoint=True)
        images = pad_and_crop(images, config.pad, tops[rows], lefts[rows])
    if config.flip:
        # Keras's RandomFlip takes 7 to 27 ms for 16 images of 224 pixels.
        mirrored = rng.random(size)[rows] < 0.5
        images = np.stack([image[:, ::-1] if m else image for image, m in zip(images, mirrored, strict=True)])
    own = np.random.default_rng((seed, first, 1))
    makers = _batch_layers(config, own)
    if not makers:
        return images, labels
    # Where batches are made, on the CPU: compiled into the model's step on JAX it was 50 times as slow.
    with engines.own_cpu():
        data = {"images": images.astype("float32"), "labels": labels.astype("float32")}
        # A seed each: with one for all, the images that are mirrored would be those that are erased.
        for (make, arguments), layer_seed in zip(makers, own.integers(2**31, size=len(makers)), strict=True):
            layer = make(**arguments, seed=int(layer_seed), dtype="float32")
            # Only the mixing layers know of labels.
            if make in (keras.layers.MixUp, keras.layers.CutMix):
                data = layer(data, training=True)
            else:
                data["images"] = layer(data["images"], training=True)
        return keras.ops.convert_to_numpy(data["images"]), keras.ops.convert_to_numpy(data["labels"])


def _batch_layers(config: Config, rng: np.random.Generator) -> list[tuple[Callable, dict]]:
    """Keras's layers and their arguments."""
    layers = keras.layers
    makers: list[tuple[Callable, dict]] = []
    if config.shift:
        edge = {"fill_mode": "constant"}
        makers += [
            (layers.RandomTranslation, {"height_factor": config.shift, "width_factor": config.shift, **edge}),
            (layers.RandomRotation, {"factor": config.shift / 4, **edge}),
            (layers.RandomZoom, {"height_factor": config.shift, **edge}),
        ]
    if config.erase:
        # The range of areas is Zhong et al.'s, as in torchvision.
        shape: dict[str, Any] = {"factor": (config.erase, config.erase), "scale": (0.02, 0.33), "value_range": (0, 255)}
        makers.append((layers.RandomErasing, {**shape, "fill_value": 127.5}))
    mixers: list[tuple[Callable, dict]] = [(layers.MixUp, {"alpha": config.mixup})] if config.mixup else []
    # A pair, since of a single number Keras draws what is below it too.
    mixers += [(layers.CutMix, {"factor": (config.cutmix, config.cutmix)})] if config.cutmix else []
    if mixers:
        makers.append(mixers[rng.integers(len(mixers))])
    return makers
