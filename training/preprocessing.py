"""`python -m training.preprocessing MODEL FOLDER`: what another decoder or resizing than Pillow's costs.

Each row changes one step of the preprocessing of the model, and compares with Pillow's JPEG and its antialiased
bilinear resizing (`keras_mnv2.resize_and_crop`): grey levels apart, photographs of another class, and accuracy.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

import keras_mnv2

# In this order: after TensorFlow PyTorch ends the process (torch 2.14, TensorFlow 2.21).
PACKAGES = {"torchvision": "torchvision", "cv2": "opencv-python-headless", "tensorflow": "tensorflow"}
REFERENCE = "Pillow, bilinear"
BATCH = 32

Decoder = Callable[[Path], np.ndarray]
# From an image (height, width, 3) of bytes and a new height and width to pixels of 0..255, whole or not.
Resizer = Callable[[np.ndarray, int, int], np.ndarray]


def decoders(modules: dict[str, Any]) -> dict[str, Decoder]:
    """Readers of JPEG files by name, of the packages that are there."""
    found: dict[str, Decoder] = {}
    if torchvision := modules.get("torchvision"):
        found["torchvision's JPEG"] = lambda path: (
            torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
        )
    if cv2 := modules.get("cv2"):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        found["OpenCV's JPEG"] = lambda path: cv2.imread(str(path), flags)[..., ::-1]
    if tf := modules.get("tensorflow"):
        for name, method in (("", ""), (", INTEGER_ACCURATE", "INTEGER_ACCURATE")):
            found[f"TensorFlow's JPEG{name}"] = lambda path, method=method: tf.io.decode_jpeg(
                path.read_bytes(), 3, dct_method=method
            ).numpy()
    return found


def resizers(modules: dict[str, Any]) -> dict[str, Resizer]:
    """Ways to resize by name, of the packages that are there."""

    def by_pillow(how: Image.Resampling) -> Resizer:
        return lambda x, height, width: np.asarray(Image.fromarray(x).resize((width, height), how))

    def by_keras(antialias: bool) -> Resizer:
        return lambda x, height, width: keras.ops.convert_to_numpy(
            keras.ops.image.resize(x.astype("float32"), (height, width), antialias=antialias)
        )

    found = {"Pillow, bicubic": by_pillow(Image.Resampling.BICUBIC)}
    if torchvision := modules.get("torchvision"):
        torch, resize = importlib.import_module("torch"), torchvision.transforms.v2.functional.resize
        for antialias in (True, False):
            found[f"torchvision tensors, {_said(antialias)}"] = lambda x, height, width, antialias=antialias: (
                resize(torch.from_numpy(x).permute(2, 0, 1), [height, width], antialias=antialias)
                .permute(1, 2, 0)
                .numpy()
            )
    if cv2 := modules.get("cv2"):
        for name, how in (("INTER_LINEAR", cv2.INTER_LINEAR), ("INTER_AREA", cv2.INTER_AREA)):
            found[f"OpenCV, {name}"] = lambda x, height, width, how=how: cv2.resize(
                x, (width, height), interpolation=how
            )
    if tf := modules.get("tensorflow"):
        for antialias in (True, False):
            found[f"tf.image, {_said(antialias)}"] = lambda x, height, width, antialias=antialias: tf.image.resize(
                x, (height, width), antialias=antialias
            ).numpy()
    for antialias in (True, False):
        found[f"keras.ops.image, {_said(antialias)}"] = by_keras(antialias)
    return found


def _said(antialias: bool) -> str:
    return "antialiased" if antialias else "not antialiased"


def prepared(image: np.ndarray, how: keras_mnv2.Preprocessing, resizer: Resizer) -> np.ndarray:
    """The crop that `resize_and_crop` takes, resized by another library."""
    height, width = image.shape[:2]
    shorter = how.resize
    if width <= height:
        height, width = int(shorter * height / width), shorter
    else:
        height, width = shorter, int(shorter * width / height)
    top, left = (height - how.crop) // 2, (width - how.crop) // 2
    image = resizer(np.ascontiguousarray(image), height, width)
    return image[top : top + how.crop, left : left + how.crop].astype("float32")


def compare(classifier: keras_mnv2.Classifier, folder: Path, modules: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: name, mean and largest distance in grey levels, other classes, accuracy."""
    paths, labels, _ = keras_mnv2.class_folders(folder)
    how = classifier.preprocessing

    def pixels_of(decode: Decoder | None, resizer: Resizer | None) -> np.ndarray:
        if decode is None and resizer is None:
            return np.stack([keras_mnv2.resize_and_crop(path, how) for path in paths]).astype("float32")
        read = decode or (lambda path: np.asarray(keras_mnv2.load_image(path)))
        scale = resizer or (lambda x, h, w: np.asarray(Image.fromarray(x).resize((w, h), Image.Resampling.BILINEAR)))
        return np.stack([prepared(read(Path(path)), how, scale) for path in paths])

    def classes_of(pixels: np.ndarray) -> np.ndarray:
        parts = [classifier.scores(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        return np.concatenate(parts).argmax(axis=1)

    reference = pixels_of(None, None)
    expected = classes_of(reference)
    rows = [[REFERENCE, "0", "0", "0", f"{(expected == labels).mean():.2%}"]]
    variants: list[tuple[str, Decoder | None, Resizer | None]]
    variants = [(name, decode, None) for name, decode in decoders(modules).items()]
    variants += [(name, None, resizer) for name, resizer in resizers(modules).items()]
    for name, decode, resizer in variants:
        pixels = pixels_of(decode, resizer)
        apart = np.abs(pixels - reference)
        found = classes_of(pixels)
        others = int((found != expected).sum())
        accuracy = f"{(found == labels).mean():.2%}"
        rows.append([name, f"{apart.mean():.2f}", f"{apart.max():.0f}", f"{others}", accuracy])
        print(*rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m training.preprocessing", description=__doc__)
    parser.add_argument("model", help="as in `keras_mnv2.load_classifier`")
    parser.add_argument("folder", type=Path, help="photographs in a folder for each class")
    parser.add_argument("--image-size", type=int, help="of a model that takes any")
    options = parser.parse_args()
    modules = {}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: pip install {package}", file=sys.stderr)
        else:
            modules[name] = importlib.import_module(name)
    if "torchvision" in modules:
        importlib.import_module("torchvision.transforms.v2")
    try:
        classifier = keras_mnv2.load_classifier(options.model, image_size=options.image_size)
        rows = compare(classifier, options.folder, modules)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    how = classifier.preprocessing
    print(f"Shorter side to {how.resize}, centre of {how.crop}, keras.ops on {keras.backend.backend()}:\n")
    print("| | mean grey levels apart | largest | other class | accuracy |\n|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
