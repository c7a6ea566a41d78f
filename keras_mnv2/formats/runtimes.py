"""Exported files in their own runtimes: `python runtimes.py FILE IMAGES.npz OUTPUTS.npz [--reference]`.

Run as a file it imports nothing of this package, and importing Keras fails, or for a file of Keras this package: the
exported file must not need it.
"""

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# From a batch of images to the outputs by name.
Run = Callable[[np.ndarray], dict[str, np.ndarray]]
# That, and the shape of the images as the runtime says it.
Loaded = tuple[Run, Iterable[Any]]

# What the outputs of LiteRT's reference kernels are called, and of how many images: they are slow.
REFERENCE, REFERENCE_IMAGES = "reference/", 8

# Images a call, so that a large sample needs no more memory than this many.
BATCH = 64


def load_export(path: str | os.PathLike[str]) -> Run:
    """Loads a file that `export` wrote in its own runtime, on the CPU and in float32.

    Args:
        path: a SavedModel's folder, or a file that ends in `.onnx`, `.tflite`, `.xml`, `.pt2`, `.pte` or `.keras`.

    Returns:
        A function from images, a batch in the model's layout, to its outputs by name. For 8-bit files it rounds the
        images to the file's integers, and gives the outputs as floats.

    Raises:
        ValueError: where the path ends in none of these and is no SavedModel.
        FileNotFoundError: where there is no such file.
        ImportError: where the runtime is not installed.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> report = export(model, "mobilenet.tflite", format="litert", verbose=False)
        >>> {name: y.shape for name, y in load_export("mobilenet.tflite")(np.zeros((2, 32, 32, 3))).items()}
        {'predictions': (2, 10)}
    """
    return load_with_shape(path)[0]


def load_with_shape(path: str | os.PathLike[str]) -> tuple[Run, tuple[int | None, ...]]:
    """What `load_export` gives, and the shape of the images that the file takes; a size that is free is None."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be a path, got {path!r}.")
    path = Path(path)
    if (path / "saved_model.pb").is_file():
        return _of_shape(*_saved_model(path))
    if path.suffix not in _LOADERS:
        raise ValueError(f"path must be a SavedModel or end in {', '.join(_LOADERS)}, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"path must be an exported file that exists, got {str(path)!r}.")
    return _of_shape(*_LOADERS[path.suffix](path))


def _of_shape(run: Run, shape: Iterable[Any]) -> tuple[Run, tuple[int | None, ...]]:
    # A free size is a name, a symbol or a number below 1.
    return run, tuple(n if isinstance(n, int) and n > 0 else None for n in shape)


def _saved_model(path: Path) -> Loaded:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    image = serve.structured_input_signature[1][name]

    def run(
        images: np.ndarray, _loaded: Any = loaded
    ) -> dict[str, np.ndarray]:  # A signature does not keep its model alive.
        outputs = serve(**{name: tf.constant(images, image.dtype)})
        return {key: value.numpy() for key, value in outputs.items()}

    return run, image.shape


def _onnx(path: Path) -> Loaded:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    dtype = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[image.type]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(None, {image.name: np.asarray(images, dtype)}), strict=True))

    return run, image.shape


def _litert(path: Path, reference: bool = False) -> Loaded:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_REF if reference else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count(), experimental_op_resolver_type=kernels)
    signature = interpreter.get_signature_runner("serving_default")
    (image,) = signature.get_input_details().values()
    outputs = signature.get_output_details()
    allocated: list[tuple[int, ...]] = []

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        if np.issubdtype(image["dtype"], np.integer):
            scale, zero_point = image["quantization"]
            limits = np.iinfo(image["dtype"])
            images = np.clip(np.round(images / scale) + zero_point, limits.min, limits.max)
        # A signature would allocate all tensors anew at each call.
        if allocated != [images.shape]:
            allocated.clear()  # Where it fails, the next call tries again.
            interpreter.resize_tensor_input(image["index"], images.shape)
            interpreter.allocate_tensors()
            allocated.append(images.shape)
        interpreter.set_tensor(image["index"], np.asarray(images, image["dtype"]))
        interpreter.invoke()
        found = {key: interpreter.get_tensor(output["index"]) for key, output in outputs.items()}
        return {key: _real(value, *outputs[key]["quantization"]) for key, value in found.items()}

    return run, [int(n) for n in image["shape_signature"]]


def _real(value: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    # Without a scale they are numbers that were whole before, such as classes.
    if not np.issubdtype(value.dtype, np.integer) or not scale:
        return value
    return (value.astype("float32") - zero_point) * np.float32(scale)


def _openvino(path: Path) -> Loaded:
    import openvino

    # On CPUs that have it, OpenVINO would compute in bfloat16.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        # The images are not copied, if they lie as they must.
        found = request.infer([np.ascontiguousarray(images, "float32")], share_inputs=True)
        return {output.any_name: found[output].copy() for output in compiled.outputs}

    return run, [dim.get_length() if dim.is_static else None for dim in compiled.inputs[0].partial_shape]


def _torch(path: Path) -> Loaded:
    files = {"outputs.json": ""}
    with _without_triton():
        import torch

        program = torch.export.load(path, extra_files=files)
    # Files of version 0.1.0 do not name their outputs.
    names = json.loads(files["outputs.json"] or '["output"]')
    module = program.module()
    shapes = [node.meta["val"].shape for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")]
    (name,) = program.graph_signature.user_inputs
    (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    count = _images_in_cache(shape, shapes)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(np.asarray(images, "float32"))
        with torch.no_grad():
            parts = [module(part) for part in batch.split(count)]
        if isinstance(parts[0], dict):
            return {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
        return {names[0]: torch.cat(parts).numpy()}

    return run, shape


def _images_in_cache(shape: Sequence[Any], shapes: list[Any]) -> int:
    """How many images PyTorch runs at once: so many that their widest tensor needs no memory mapped for each call.

    glibc does that from 32 MB on. Keras's model runs in the same parts (`ops.torch.CHUNK_BYTES`).
    """
    if isinstance(shape[0], int):
        return shape[0]
    of_images = [other[1:] for other in shapes if len(other) == 4 and not isinstance(other[0], int)]
    if not all(isinstance(n, int) for sizes in of_images for n in sizes):
        return BATCH
    return max(1, int(20e6 / max(4 * math.prod(sizes) for sizes in of_images)))


def _executorch(path: Path) -> Loaded:
    with _without_triton(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what its packages use of Python and PyTorch.
        import torch
        from executorch.runtime import Runtime

    # Its program and methods read the file's memory, which the program keeps.
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    image = method.metadata.input_tensor_meta(0)
    outputs = range(method.metadata.num_outputs())
    names = [f"output_{i}" for i in outputs]
    if "output_names" in program.method_names:
        names = program.load_method("output_names").execute([])[0].split("\n")
    count = image.sizes()[0]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(np.ascontiguousarray(images, "float32"))
        # The next call writes to the same memory.
        parts = [[y.clone() for y in method.execute([part])] for part in batch.split(count)]
        return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in zip(outputs, names, strict=True)}

    # As many images as the caller has, one after the other.
    return run, (None, *image.sizes()[1:])


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """Inside, PyTorch does not load Triton: after TensorFlow that crashes the process (torch 2.14, TensorFlow 2.21)."""
    if "tensorflow" not in sys.modules or "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]


def _keras(path: Path) -> Loaded:
    import keras

    model = keras.models.load_model(path, compile=False)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        found = model.predict(images, verbose=0)
        if isinstance(found, dict):
            return found
        return dict(zip(model.output_names, found if isinstance(found, list) else [found], strict=True))

    return run, model.inputs[0].shape


_LOADERS = {
    ".onnx": _onnx,
    ".tflite": _litert,
    ".xml": _openvino,
    ".pt2": _torch,
    ".pte": _executorch,
    ".keras": _keras,
}


def reference_outputs(path: str | os.PathLike[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of LiteRT's reference kernels for the first images, where a file computes in integers throughout."""
    run, _ = _litert(Path(path), reference=True)
    return {f"{REFERENCE}{name}": y for name, y in run(images[:REFERENCE_IMAGES]).items()}


def outputs_of(run: Run, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of several batches, one after the other, each name with its batch's number: `0/predictions`."""
    found = {}
    for number, images in enumerate(batches):
        parts = [run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        for name in parts[0]:
            found[f"{number}/{name}"] = np.concatenate([part[name] for part in parts])
    return found


if __name__ == "__main__":
    foreign = "keras_mnv2" if sys.argv[1].endswith(".keras") else "keras"
    sys.modules[foreign] = None  # type: ignore[assignment]  # Importing it fails from here on.
    with np.load(sys.argv[2]) as batches:
        outputs = outputs_of(load_export(sys.argv[1]), batches.values())
        if "--reference" in sys.argv:
            outputs |= reference_outputs(sys.argv[1], batches["arr_0"])
    np.savez(sys.argv[3], allow_pickle=False, **outputs)
