"""Models as files for other runtimes, from every backend, each checked in its own runtime."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.arguments import check_choice

FORMATS = ("tf_saved_model",)
# The largest difference of an output that a right export shows in float32 is about 1e-6.
LARGEST_DIFFERENCE = 1e-4

# Run in processes of their own: the first with Keras on TensorFlow, the second with TensorFlow alone.
_EXPORT = """
import sys, keras, keras_mnv2
keras.models.load_model(sys.argv[1], compile=False).export(sys.argv[2], format="tf_saved_model", verbose=False)
"""
_RUN = """
import sys
sys.modules["keras"] = None  # Importing it fails from here on: the file must not need it.
import numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
outputs = {}
for start in range(0, len(images), 256):
    y = loaded.serve(tf.constant(images[start : start + 256]))
    for name, value in (y if isinstance(y, dict) else {"output": y}).items():
        outputs.setdefault(name, []).append(value.numpy())
np.savez(sys.argv[3], **{name: np.concatenate(values) for name, values in outputs.items()})
"""


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str = "tf_saved_model",
    sample: Any = None,
    verbose: bool = True,
) -> float:
    """Writes `model` as a SavedModel, from any backend, and checks it with TensorFlow alone.

    On JAX and PyTorch the model crosses over in a `.keras` file to a child process with Keras on
    TensorFlow, which exports it. The result is then loaded in a process without Keras and run on
    `sample`, whole and one image at a time of its first; only then does it get its final name.

    Args:
        model: a built model with one input, that `keras.models.load_model` can load.
        path: folder to write. A SavedModel that is there already is replaced.
        format: `"tf_saved_model"`.
        sample: images to compare on, (batch, *model.input_shape[1:]); by default four random ones.
        verbose: whether to print the largest difference.

    Returns:
        The largest absolute difference between the outputs of `model` and of the file.

    Raises:
        ValueError: on an unknown format, an unfit sample, or a path that holds something else.
        ImportError: where TensorFlow is not installed.
        RuntimeError: where the child process fails or the outputs differ by more than 1e-4; nothing
            is left under `path`.

    Example:

    >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    >>> export(model, "mobilenet", verbose=False) < 1e-4
    True
    """
    check_choice("format", format, FORMATS)
    path = Path(path)
    if path.exists() and not (path / "saved_model.pb").is_file():
        raise ValueError(f"path must be new or hold a SavedModel to replace, got {str(path)!r}.")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError('format="tf_saved_model" needs TensorFlow: pip install "keras_mnv2[tensorflow]".')
    images = _sample(model, sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch)
        target = folder / "saved_model"
        if keras.backend.backend() == "tensorflow":
            model.export(str(target), format=format, verbose=False)
        else:
            model.save(folder / "model.keras")
            _child(_EXPORT, folder / "model.keras", target)
        difference = max(_difference(model, target, x, folder) for x in (images, images[:1]))
        if not difference <= LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"The export to {str(path)!r} differs from the model by {difference:.2g}, "
                f"more than {LARGEST_DIFFERENCE:.0e}; nothing was written."
            )
        if path.exists():
            path.rename(folder / "replaced")
        target.rename(path)
    if verbose:
        print(f"{path}: outputs differ from the model's by at most {difference:.2g} on {len(images)} images.")
    return difference


def _sample(model, sample):
    if len(model.inputs) != 1:
        raise ValueError(f"model must have one input, got {len(model.inputs)}.")
    spec = model.inputs[0]
    if sample is None:
        # 64 pixels where the size is free.
        shape = [4, *(n or 64 for n in spec.shape[1:])]
        sample = np.random.default_rng(0).uniform(-1, 1, shape)
    images = np.asarray(sample, spec.dtype)
    expected = spec.shape[1:]
    fits = images.ndim == len(spec.shape) and all(
        n in (None, m) for n, m in zip(expected, images.shape[1:], strict=False)
    )
    if not fits or not len(images):
        raise ValueError(f"sample must have the shape (batch, *{tuple(expected)}), got {images.shape}.")
    return images


def _difference(model, target, images, folder):
    np.save(folder / "images.npy", images)
    _child(_RUN, target, folder / "images.npy", folder / "outputs.npz")
    expected = model.predict(images, verbose=0)
    expected = expected if isinstance(expected, dict) else {"output": expected}
    with np.load(folder / "outputs.npz") as found:
        if set(found) != set(expected):
            raise RuntimeError(f"The export has the outputs {sorted(found)}, the model {sorted(expected)}.")
        return max(float(np.abs(expected[name] - found[name]).max()) for name in expected)


def _child(code, *arguments):
    # A child that needs no accelerator: the parent may hold all of its memory.
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"TensorFlow could not export or run the model in its own process: {lines[-1]}")
