"""A small model and its exported files, made once for all tests that read them."""

import contextlib
import io

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.helpers import randomise

FORMATS = [
    ("tf_saved_model", "float32", "model"),
    ("onnx", "float32", "model.onnx"),
    ("onnx", "float16", "model.onnx"),
    ("onnx", "int8", "model.onnx"),
    ("litert", "float32", "model.tflite"),
    ("litert", "float16", "model.tflite"),
    ("litert", "dynamic_int8", "model.tflite"),
    ("litert", "int8", "model.tflite"),
    ("openvino", "float32", "model.xml"),
    ("torch", "float32", "model.pt2"),
]
# Each format on one backend, and each way to it: from this process, and through another.
HERE = {
    "tensorflow": (
        "tf_saved_model",
        "onnx int8",
        "openvino",
        "litert float32",
        "litert float16",
    ),
    "jax": ("tf_saved_model", "torch"),
    "torch": ("torch", "onnx float32", "litert int8"),
}[keras.backend.backend()]
ROWS = [(1, 16, 1, 1), (6, 24, 2, 2)]
LABELS = ["dress", "hat", "Hose", "long sleeve", "štěně"]


def marks_of(format, precision):
    """The marks of a test of this format: it runs on the backends that have it, elsewhere if slow."""
    return [] if {format, f"{format} {precision}"} & set(HERE) else [pytest.mark.slow]


def small(**arguments):
    return keras_mnv2.MobileNetV2(
        **{
            "input_shape": (32, 32, 3),
            "inverted_residual_setting": ROWS,
            "alpha": 0.35,
            "weights": None,
            "classes": 5,
            **arguments,
        }
    )


def pictures(rng, count=48):
    """Raw images with large shapes, whose scores differ more than those of noise."""
    coarse = rng.uniform(0, 255, (count, 4, 4, 3))
    return coarse.repeat(8, axis=1).repeat(8, axis=2).astype("float32")


@pytest.fixture(scope="session")
def decided():
    """A model with in-model preprocessing that decides clearly between its classes, and images."""
    rng = np.random.default_rng(1)
    keras.utils.set_random_seed(0)
    # In the order in which the compact form draws its numbers: what 8 and 16 bits lose depends on them.
    compact, images = small(include_preprocessing=True, block=keras_mnv2.layers.InvertedResidual), pictures(rng)
    randomise(compact, rng, images)
    model = small(include_preprocessing=True)
    model.set_weights(compact.get_weights())
    features = keras.Model(model.inputs, model.get_layer("predictions").input).predict(images, verbose=0)
    kernel = rng.normal(0, 1, (features.shape[1], 5))
    scores = (features - features.mean(0)) @ kernel
    kernel *= 4 / scores.std(0)
    model.get_layer("predictions").set_weights([kernel, -features.mean(0) @ kernel])
    assert np.bincount(model.predict(images, verbose=0).argmax(1), minlength=5).min() > 2
    return model, images


@pytest.fixture(scope="session")
def exported(decided, tmp_path_factory):
    """Exports that model when a format is first asked for: a function from format and precision to the report."""

    def once(format, precision="float32"):
        if (format, precision) in reports:
            return reports[format, precision]
        model, images = decided
        name = next(name for f, _, name in FORMATS if f == format)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            report = keras_mnv2.export(
                model,
                tmp_path_factory.mktemp("exported") / "out" / name,
                format,
                precision=precision,
                calibration=images if precision == "int8" else None,
                labels=LABELS if format in ("tf_saved_model", "litert") else None,
                sample=images,
            )
        assert str(report) in printed.getvalue()
        reports[format, precision] = report
        return reports[format, precision]

    reports = {}
    return once
