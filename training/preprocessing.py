"""`python -m training.preprocessing MODEL FOLDER`: what another decoder or resizing than Pillow's costs.

Each row changes one step of the preprocessing of the model, and compares with Pillow's JPEG and its antialiased
bilinear resizing (`keras_mnv2.resize_and_crop`): grey levels apart, photographs of another class, and accuracy.
"""

import argparse
import functools
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
    packages: list[Any] = [modules.get(name) for name in PACKAGES]
    torchvision, cv2, tf = packages

    def by_torchvision(path: Path) -> np.ndarray:
        return torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()

    def by_opencv(path: Path) -> np.ndarray:
        return cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]

    def by_tensorflow(path: Path, method: str = "") -> np.ndarray:
        return tf.io.decode_jpeg(path.read_bytes(), 3, dct_method=method).numpy()

    found: dict[str, Decoder] = {}
    if torchvision:
        found["torchvision's JPEG"] = by_torchvision
    if cv2:
        found["OpenCV's JPEG"] = by_opencv
    if tf:
        found["TensorFlow's JPEG"] = by_tensorflow
        found["TensorFlow's JPEG, INTEGER_ACCURATE"] = functools.partial(by_tensorflow, method="INTEGER_ACCURATE")
    return found


def resizers(modules: dict[str, Any]) -> dict[str, Resizer]:
    """Ways to resize by name, of the packages that are there."""
    packages: list[Any] = [modules.get(name) for name in PACKAGES]
    torchvision, cv2, tf = packages

    def by_torchvision(x: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
        image = importlib.import_module("torch").from_numpy(x).permute(2, 0, 1)
        y = torchvision.transforms.v2.functional.resize(image, [height, width], antialias=antialias)
        return y.permute(1, 2, 0).numpy()

    def by_opencv(x: np.ndarray, height: int, width: int, how: int) -> np.ndarray:
        return cv2.resize(x, (width, height), interpolation=how)

    def by_tensorflow(x: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
        return tf.image.resize(x, (height, width), antialias=antialias).numpy()

    def by_keras(x: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
        y = keras.ops.image.resize(x.astype("float32"), (height, width), antialias=antialias)
        return keras.ops.convert_to_numpy(y)

    found: dict[str, Resizer] = {"Pillow, bicubic": functools.partial(by_pillow, how=Image.Resampling.BICUBIC)}
    ways: list[tuple[str, Any, Any]] = [("torchvision tensors", torchvision, by_torchvision)]
    ways += [("tf.image", tf, by_tensorflow), ("keras.ops.image", keras, by_keras)]
    for name, module, resize in ways:
        for antialias in (True, False) if module else ():
            said = "antialiased" if antialias else "not antialiased"
            found[f"{name}, {said}"] = functools.partial(resize, antialias=antialias)
    for name in ("INTER_LINEAR", "INTER_AREA") if cv2 else ():
        found[f"OpenCV, {name}"] = functools.partial(by_opencv, how=getattr(cv2, name))
    return found


def by_pillow(x: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """Pillow's resizing, always antialiased."""
    return np.asarray(Image.fromarray(x).resize((width, height), how))


def by_pillows_decoder(path: Path) -> np.ndarray:
    """A photograph as the library reads it."""
    return np.asarray(keras_mnv2.load_image(path))


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

    def pixels_of(decode: Decoder, resizer: Resizer) -> np.ndarray:
        return np.stack([prepared(decode(Path(path)), how, resizer) for path in paths])

    def classes_of(pixels: np.ndarray) -> np.ndarray:
        parts = [classifier.scores(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        return np.concatenate(parts).argmax(axis=1)

    reference = np.stack([keras_mnv2.resize_and_crop(path, how) for path in paths]).astype("float32")
    expected = classes_of(reference)
    rows = [[REFERENCE, "0", "0", "0", f"{(expected == labels).mean():.2%}"]]
    bilinear: Resizer = functools.partial(by_pillow, how=Image.Resampling.BILINEAR)
    variants = [(name, decode, bilinear) for name, decode in decoders(modules).items()]
    variants += [(name, by_pillows_decoder, resizer) for name, resizer in resizers(modules).items()]
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
