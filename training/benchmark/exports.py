"""Every export format of a model on the active backend: `python -m training.benchmark.exports JSON`."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import keras
import numpy as np

import keras_mnv2

# Name: format, precision, suffix.
FILES = {
    "SavedModel": ("tf_saved_model", "float32", ""),
    "ONNX": ("onnx", "float32", ".onnx"),
    "LiteRT float32": ("litert", "float32", ".tflite"),
    "LiteRT float16": ("litert", "float16", ".tflite"),
    "LiteRT dynamic int8": ("litert", "dynamic_int8", ".tflite"),
    "LiteRT int8": ("litert", "int8", ".tflite"),
    "OpenVINO": ("openvino", "float32", ".xml"),
    "PyTorch .pt2": ("torch", "float32", ".pt2"),
}
# Images to calibrate and compare on, where none are given.
IMAGES = 32


def main() -> None:
    """Exports and prints, as JSON by name, what each file is like; first the model itself."""
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not mix with the answer.
    folder = Path(asked["folder"])
    folder.mkdir(parents=True)
    if "model" in asked:
        model = keras.models.load_model(asked["model"], compile=False)
        images = np.load(asked["images"])
    else:
        model, images = random_model(asked["alpha"], asked["size"])
    model.save(folder / "model.keras")
    size = (folder / "model.keras").stat().st_size
    found = {"keras_mnv2": {"path": str(folder / "model.keras"), "megabytes": size / 1e6}}
    for number, (name, (format, precision, suffix)) in enumerate(FILES.items()):
        report = keras_mnv2.export(
            model,
            folder / f"{number}{suffix}",
            format,
            precision=precision,
            calibration=images if precision == "int8" else None,
            sample=images,
        )
        facts = dataclasses.asdict(report)
        kept = ("largest_difference", "mean_absolute_error", "top1_agreement")
        found[name] = {"path": str(report.path), "megabytes": report.size / 1e6} | {key: facts[key] for key in kept}
    answers.write(json.dumps(found))


def random_model(alpha: float, size: int) -> tuple[keras.Model, np.ndarray]:
    """A model that rounding to 8 bits moves by some percent, as it does a trained one, and smooth random images.

    With plain random weights half of each ReLU6 is dead, and rounding is half of what tells the images apart. Here
    the hidden layers are lifted, the shortcuts carry most, and the statistics are those of the images.
    """
    keras.utils.set_random_seed(0)
    model = keras_mnv2.MobileNetV2((size, size, 3), alpha, weights=None, norm_momentum=0.0, classifier_activation=None)
    coarse = np.random.default_rng(0).uniform(-1, 1, (IMAGES, 7, 7, 3)).astype("float32")
    images = keras.ops.convert_to_numpy(keras.ops.image.resize(coarse, (size, size)))
    names = {layer.name for layer in model.layers}
    for layer in model.layers:
        if layer.name.endswith(("_expand_BN", "_depthwise_BN")):
            layer.beta.assign(np.ones(layer.beta.shape))
        if layer.name.endswith("_project_BN") and layer.name.replace("_project_BN", "_add") in names:
            layer.gamma.assign(np.full(layer.gamma.shape, 0.3))
    model(images, training=True)
    return model, images


if __name__ == "__main__":
    main()
