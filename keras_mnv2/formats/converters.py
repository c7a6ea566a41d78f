"""From a graph to the other formats, without Keras: `python converters.py FORMAT SOURCE TARGET OPTIONS`.

Run as a file, so that nothing of this package is imported: a converter that fails, or ends its process, does so alone.
"""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# What a file of integers has beside it, in float32, for its exact numbers.
REFERENCE = ".reference.tflite"
# What the SavedModel of a last layer that stays in float32 is called after the other one, and the file that is made.
APART, BEHIND = "_apart", ".behind.tflite"


def to_litert(
    source: Path,
    target: Path,
    precision: str,
    calibration: str = "",
    quantized: bool = False,
    io_dtype: str = "int8",
    **_: Any,
) -> None:
    """A SavedModel to a `.tflite` file by TensorFlow's converter.

    Args:
        source: the SavedModel. One of its last layer may lie beside it (`APART`): a file in float32 is made of it.
        target: file to write. Beside one of `"int8"` from calibration, one in float32 (`REFERENCE`) is left, and that
            of the last layer (`BEHIND`).
        precision: `"float32"`, `"float16"`, `"dynamic_int8"` or `"int8"`.
        calibration: for `"int8"`, a `.npy` file of images that the ranges of the activations are taken from.
        quantized: whether the graph has ranges of its own, from quantisation-aware training.
        io_dtype: for `"int8"`, the type of input and output.
    """
    import tensorflow as tf

    behind = source.with_name(source.name + APART)
    if behind.is_dir():
        target.with_suffix(BEHIND).write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(behind)).convert())
    converter = tf.lite.TFLiteConverter.from_saved_model(str(source))
    if precision == "int8" and not quantized:
        target.with_suffix(REFERENCE).write_bytes(converter.convert())
        converter = tf.lite.TFLiteConverter.from_saved_model(str(source))
    if precision == "dynamic_int8":
        # One scale for the classifier's kernel: more is version 12 of the operator, which tflite-runtime has not.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        converter.inference_input_type = converter.inference_output_type = getattr(tf, io_dtype)
        if not quantized:
            images = np.load(calibration, mmap_mode="r")
            converter.representative_dataset = lambda: ([image[None]] for image in images)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = converter.convert()
    if precision == "int8":
        _check_integers(content)
    target.write_bytes(content)


def _check_integers(content: bytes) -> None:
    from ai_edge_litert.interpreter import Interpreter

    tensors = Interpreter(model_content=content).get_tensor_details()
    floats = [tensor["name"] for tensor in tensors if tensor["dtype"] == np.float32]
    if floats:
        raise ValueError(f"{len(floats)} of {len(tensors)} tensors would stay in float32, such as {floats[0]!r}")


def to_onnx(source: Path, target: Path, **options: Any) -> None:
    """A `.pt2` file to an ONNX file; see `onnx_file.py`, which is run as a file too."""
    runpy.run_path(str(Path(__file__).with_name("onnx_file.py")))["write_onnx"](source, target, **options)


def to_openvino(source: Path, target: Path, **_: Any) -> None:
    """A SavedModel to OpenVINO's pair of files, `.xml` and `.bin`."""
    import openvino

    openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)


def _in_file(name: str) -> Callable[..., None]:
    """The converter of a file beside this one, which is found without the package, too."""

    def convert(source: Path, target: Path, **options: Any) -> None:
        specification = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        module.convert(source, target, **options)

    return convert


CONVERTERS: dict[str, Callable[..., None]] = {
    "litert": to_litert,
    "onnx": to_onnx,
    "openvino": to_openvino,
    "executorch": _in_file("executorch_file"),
    "coreml": _in_file("coreml"),
}


if __name__ == "__main__":
    CONVERTERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), **json.loads(sys.argv[4]))
