"""From a graph to the other formats, without Keras: `python converters.py FORMAT SOURCE TARGET OPTIONS`.

Run as a file, so that nothing of this package is imported: a converter that fails, or ends its process, does so alone.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The newest that the runtimes of the field (ONNX Runtime, TensorRT, OpenVINO) share.
OPSET = 23


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
        source: the SavedModel.
        target: file to write.
        precision: `"float32"`, `"float16"`, `"dynamic_int8"` or `"int8"`.
        calibration: for `"int8"`, a `.npy` file of images that the ranges of the activations are taken from.
        quantized: whether the graph has ranges of its own, from quantisation-aware training.
        io_dtype: for `"int8"`, the type of input and output.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(source))
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


def to_onnx(source: Path, target: Path, input_name: str, output_names: list[str], **_: Any) -> None:
    """A `.pt2` file to an ONNX file by PyTorch's exporter; ONNX Runtime then removes what cancels out."""
    import onnx
    import onnxruntime
    import torch

    program = torch.onnx.export(
        torch.export.load(source),
        dynamo=True,
        verbose=False,
        external_data=False,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=output_names,
    )
    assert program is not None
    first = target.with_suffix(".first.onnx")
    program.save(first)
    # "Basic" keeps to standard operations. What goes: the pairs of transposes between PyTorch's and the model's layout.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(first), options, providers=["CPUExecutionProvider"])
    first.unlink()
    model = onnx.load(target)
    used = {node.domain for node in model.graph.node}
    domains = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    _trim_kernels(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def _trim_kernels(graph: Any) -> None:
    """Removes leading rows and columns of zeros from kernels, and as many zeros from the padding.

    On PyTorch they stand for TensorFlow's uneven padding, which an ONNX convolution has an attribute for.
    """
    import onnx

    weights = {weight.name: weight for weight in graph.initializer}
    names = [name for node in graph.node for name in node.input]
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or names.count(weight.name) > 1:
            continue
        kernel = onnx.numpy_helper.to_array(weight)
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if "pads" not in attributes or "kernel_shape" not in attributes or kernel.ndim != 4:
            continue
        pads, shape = attributes["pads"].ints, attributes["kernel_shape"].ints
        if min(pads[:2]) < 1 or min(shape) < 2 or kernel[:, :, 0].any() or kernel[:, :, :, 0].any():
            continue
        pads[:] = [pads[0] - 1, pads[1] - 1, *pads[2:]]
        shape[:] = [side - 1 for side in shape]
        described = [value for value in graph.value_info if value.name != weight.name]
        del graph.value_info[:]
        graph.value_info.extend(described)
        weight.CopyFrom(onnx.numpy_helper.from_array(kernel[:, :, 1:, 1:].copy(), weight.name))


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
