"""A model's predictions by the fastest runtime that is installed, on the CPU."""

import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.checks import check_choice, check_whole
from keras_mnv2.formats.export import FORMATS, export, missing_packages
from keras_mnv2.formats.graphs import output_names
from keras_mnv2.formats.runtimes import Run, load_export

# Runtimes by name, and the format that each runs.
RUNTIMES = {"openvino": "openvino", "onnxruntime": "onnx", "litert": "litert"}
# Calls that each runtime is measured with, after one that is not.
CALLS = 3
VERBOSE = ("auto", 0, 1, 2)
LARGEST_BATCH = 2**20


def accelerate(model: keras.Model, runtime: str = "auto") -> "Accelerated":
    """Gives an object with `predict` as the model's, that runs in the fastest runtime installed on this machine's CPU.

    The model is exported from any backend (`keras_mnv2.export`, which checks it in the runtime) to a temporary folder,
    loaded, and the folder is removed. It keeps the weights of that moment: after training accelerate it again.

    Args:
        model: a built model with one input, that `keras.models.load_model` can load. Its batch norms are folded.
        runtime: `"openvino"`, `"onnxruntime"` or `"litert"`; or `"auto"`, which exports for each that is installed and
            measures them on the first batch of each size: which one is fastest depends on it.

    Returns:
        An `Accelerated`.

    Raises:
        ValueError: on an unknown runtime, or a model that cannot be exported.
        ImportError: where the runtime, or with `"auto"` each of them, is not installed; it says what to install.
        RuntimeError: where the export fails, or its outputs differ from the model's.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> fast = accelerate(model, runtime="onnxruntime")
        >>> fast.predict(np.zeros((5, 32, 32, 3)), batch_size=2, verbose=0).shape
        (5, 10)
    """
    check_choice("runtime", runtime, ("auto", *RUNTIMES))
    wanted = [name for name in RUNTIMES if not missing_packages(RUNTIMES[name])] if runtime == "auto" else [runtime]
    if not wanted:
        extras = ", ".join(sorted(FORMATS[format].extra for format in RUNTIMES.values()))
        raise ImportError(
            f"runtime must be installed, got none of {', '.join(RUNTIMES)}: pip install "
            f'"keras_mnv2[openvino]" (or one of {extras}).'
        )
    runs: dict[str, Run] = {}
    errors: list[RuntimeError] = []
    # On Windows a file that a runtime has mapped stays until the process ends.
    with tempfile.TemporaryDirectory(prefix="keras_mnv2-", ignore_cleanup_errors=True) as folder:
        for name in wanted:
            format = RUNTIMES[name]
            path = Path(folder) / f"model{FORMATS[format].suffix}"
            try:
                export(model, path, format, verbose=False)
            except RuntimeError as error:
                errors.append(error)
                continue
            runs[name] = load_export(path)
    if not runs:
        raise errors[0]
    for left_out in errors:
        warnings.warn(f"A runtime is left out: {left_out}", stacklevel=2)
    return Accelerated(model, runs)


class Accelerated:
    """What `accelerate` gives: a model's predictions by another runtime.

    Threads may share it; one batch runs at a time, on all cores.

    Attributes:
        runtime: which runtime takes batches of a size, by the size: `{1: "litert", 32: "openvino"}`. Sizes up to the
            next power of 2 go together.
    """

    def __init__(self, model: keras.Model, runs: dict[str, Run]) -> None:
        self.runtime: dict[int, str] = {}
        self._runs = runs
        self._lock = threading.Lock()
        self._shape = tuple(model.inputs[0].shape)
        self._dtype = model.inputs[0].dtype
        self._names = None if len(model.outputs) == 1 and not isinstance(model.output, dict) else output_names(model)
        self._dtypes = {n: y.dtype for n, y in zip(output_names(model), model.outputs, strict=True)}
        self._as_dict = isinstance(model.output, dict)

    def predict(self, x: Any, batch_size: int | None = None, verbose: str | int = "auto") -> Any:
        """The model's outputs for many images, as `keras.Model.predict` gives them.

        Args:
            x: images as the model takes them, an array or a tensor of the backend; or what gives batches of them: a
                `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`, a generator that ends. Of a batch
                `(x, y)` or `(x, y, weights)` the first is taken.
            batch_size: images a call; 32 by default. What gives batches has its own.
            verbose: 0 for silence, 1 or `"auto"` for a bar, 2 for a line at the end.

        Returns:
            An array, or a list or dict of arrays as the model's outputs are.

        Raises:
            ValueError: on images of another shape, a size below 1, or no images at all.
        """
        check_choice("verbose", verbose, VERBOSE)
        if batch_size is not None:
            batch_size = check_whole("batch_size", batch_size, most=LARGEST_BATCH)
        batches, count = self._batches(x, batch_size)
        bar = keras.utils.Progbar(count, verbose=1 if verbose == "auto" else verbose) if verbose else None
        parts = []
        size = None
        for images in batches:
            # The last batch may be smaller: it is not worth being measured.
            size = max(size or 0, len(images))
            parts.append(self._run(images, size))
            if bar is not None:
                bar.update(len(parts), finalize=count is not None and len(parts) == count)
        if bar is not None and count is None:
            bar.update(len(parts), finalize=True)
        if not parts:
            raise ValueError("x must have at least one batch of images, got none.")
        if len(parts) == 1:
            return self._packed(parts[0])
        return self._packed({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def predict_on_batch(self, x: Any) -> Any:
        """The outputs for one batch, as `keras.Model.predict_on_batch` gives them; `x` is an array or a tensor."""
        images = self._images(x)
        return self._packed(self._run(images, len(images)))

    def __call__(self, x: Any, training: bool | None = None) -> Any:
        """The model's outputs for one batch as tensors of the backend, as calling the model gives them.

        Args:
            x: images, an array or a tensor with values: nothing can be traced, compiled or differentiated through it.
            training: None or False.
        """
        if training:
            raise ValueError(f"training must be None or False: another runtime cannot train, got {training!r}.")
        if isinstance(x, keras.KerasTensor):
            raise ValueError(f"x must be images, which another runtime can read, got the symbolic {x!r}.")
        return keras.tree.map_structure(keras.ops.convert_to_tensor, self.predict_on_batch(x))

    def _batches(self, x: Any, batch_size: int | None) -> tuple[Iterable[np.ndarray], int | None]:
        """The batches, and how many there are where that is known."""
        if isinstance(x, list | tuple) and len(x) == 1 and len(getattr(x[0], "shape", ())) == len(self._shape):
            x = x[0]  # The list of a model's one input.
        if hasattr(x, "shape") or isinstance(x, list | tuple):
            images, step = self._images(x), batch_size or 32
            starts = range(0, len(images), step)
            return (images[i : i + step] for i in starts), len(starts)
        if batch_size is not None:
            raise ValueError(f"batch_size must be left out where x gives batches, got {batch_size}.")
        if isinstance(x, keras.utils.PyDataset):
            count = x.num_batches
            if count is None:
                raise ValueError("x must be a dataset that ends, got one with any number of batches.")
            return (self._first(x[i]) for i in range(count)), count
        if not isinstance(x, Iterable):
            raise ValueError(f"x must be images, or what gives batches of them, got {x!r}.")
        if hasattr(x, "cardinality") and int(x.cardinality()) == -1:
            raise ValueError("x must be a dataset that ends, got one that repeats for ever.")
        return self._iterated(x), None

    def _iterated(self, x: Iterable[Any]) -> Iterator[np.ndarray]:
        for batch in x:
            yield self._first(batch)

    def _first(self, batch: Any) -> np.ndarray:
        return self._images(batch[0] if isinstance(batch, list | tuple) else batch)

    def _images(self, x: Any) -> np.ndarray:
        if hasattr(x, "numpy") and not hasattr(x, "detach"):
            x = x.numpy()  # TensorFlow's, which tf.data gives on each backend.
        elif not isinstance(x, np.ndarray):
            x = np.asarray(keras.ops.convert_to_numpy(x))
        fits = x.ndim == len(self._shape) and all(
            n in (None, m) for n, m in zip(self._shape[1:], x.shape[1:], strict=True)
        )
        if not fits or not len(x):
            raise ValueError(f"x must have the shape (batch, *{self._shape[1:]}), got {x.shape}.")
        if x.dtype.kind not in "biuf" and x.dtype.name != "bfloat16":
            raise ValueError(f"x must be real numbers, got values of type {x.dtype}.")
        return np.ascontiguousarray(x, self._dtype)

    def _run(self, images: np.ndarray, size: int) -> dict[str, np.ndarray]:
        size = 1 << (size - 1).bit_length()
        with self._lock:
            if size not in self.runtime:
                self.runtime[size] = self._fastest(images)
            return self._runs[self.runtime[size]](images)

    def _fastest(self, images: np.ndarray) -> str:
        if len(self._runs) == 1:
            return next(iter(self._runs))
        best = dict.fromkeys(self._runs, float("inf"))
        for run in self._runs.values():
            run(images)  # Makes what it needs for this size.
        for _ in range(CALLS):
            for name, run in self._runs.items():
                start = time.perf_counter()
                run(images)
                best[name] = min(best[name], time.perf_counter() - start)
        return min(best, key=lambda name: best[name])

    def _packed(self, found: dict[str, np.ndarray]) -> Any:
        """Outputs by name in the structure of the model's."""
        if len(self._dtypes) == 1:
            # Not every format names a single one.
            found = dict(zip(self._dtypes, found.values(), strict=True))
        typed = {name: self._cast(found[name], dtype) for name, dtype in self._dtypes.items()}
        if self._as_dict:
            return typed
        outputs = list(typed.values())
        return outputs[0] if self._names is None else outputs

    def _cast(self, y: np.ndarray, dtype: str) -> np.ndarray:
        if y.dtype == dtype:
            return y
        # Of mixed precision: what the backend's `predict` gives.
        return keras.ops.convert_to_numpy(keras.ops.cast(y, dtype))
