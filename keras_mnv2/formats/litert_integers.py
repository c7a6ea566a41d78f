"""An 8-bit `.tflite` file that was quantised after training: its ranges and biases, from the same model in float32.

TensorFlow's converter gives a mean the range of what it is the mean of, and corrects no bias. Here a mean has a range
of its own, and biases are corrected as in 8-bit ONNX files (`onnx_integers.py`).
"""

import copy
import os
import warnings
from typing import Any

import numpy as np

from keras_mnv2.formats.litert_file import (
    BYTE,
    WEIGHT,
    add_tensor,
    drop_unused,
    file_of,
    numbers,
    operator_name,
    read_file,
)

TINY = 1e-12
# What a bias may be at most, so that a sum stays within 32 bits.
LARGEST_BIAS = 2**30
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# What gets a range of its own: logits keep that of the largest ones, which decide.
_RANGED = ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN")
# What only moves numbers: its output has the integers of its input.
_MOVING = ("PAD", "RESHAPE")
# What reads integers of any range besides.
_READING = ("FULLY_CONNECTED", "SOFTMAX", "LOGISTIC", "QUANTIZE")


def round_by_images(content: bytes, reference: bytes, images: np.ndarray) -> bytes:
    """Gives activations the ranges that `images` have, and moves biases by what the rounding of weights costs.

    A range goes from the least to the largest number of all images: what few images need, such as those of one class,
    is not cut off.
    A bias moves by what rounding the weights moves the mean of its sum (Nagel et al. 2019, section 4.2,
    arXiv 1906.04721).

    Args:
        content: of a `.tflite` file of 8-bit integers, as the converter writes it.
        reference: of the same model in float32.
        images: as the model takes them, (number, height, width, channels).

    Returns:
        A `.tflite` file; the same, with a warning, where the two files have not the same operators.
    """
    model, exact = read_file(content), read_file(reference)
    graph, floats = model.subgraphs[0], exact.subgraphs[0]
    integers = [operator for operator in graph.operators if operator_name(model, operator) != "QUANTIZE"]
    names = [operator_name(model, operator) for operator in integers]
    if names != [operator_name(exact, operator) for operator in floats.operators]:
        warnings.warn(
            "The 8-bit file keeps the ranges and biases of TensorFlow's converter, since its operators are others than "
            "in float32: what the images say of them is not used.",
            stacklevel=2,
        )
        return content
    triples = list(zip(names, integers, list(floats.operators), strict=True))
    free = _free(model)
    ranged = {
        int(there.outputs[0]): int(here.outputs[0])
        for name, here, there in triples
        if name in _RANGED and int(here.outputs[0]) in free
    }
    weighted = []
    for name, here, there in triples:
        if name in _WEIGHTED and (weights := _weights(exact, there)) is not None:
            whole = len(graph.tensors[here.inputs[1]].quantization.scale) == 1
            weighted.append((name, here, *weights, whole, _add_twin(exact, name, there, *weights, whole)))
    ranges, lost = _run(exact, list(ranged), [number for *_, number in weighted], images)
    for number, (low, high) in ranges.items():
        _set_range(graph.tensors[ranged[number]], low, high)
    for operator in graph.operators:
        name = operator_name(model, operator)
        if name in (*_MOVING, "QUANTIZE") and int(operator.outputs[0]) in free:
            source, target = (graph.tensors[i[0]] for i in (operator.inputs, operator.outputs))
            target.quantization = copy.deepcopy(source.quantization)
            # Unsigned bytes of an output.
            target.quantization.zeroPoint += 128 * (target.type != source.type)
    for name, here, kernel, bias, whole, number in weighted:
        _set_weights(model, name, here, kernel, bias + lost[number], whole)
    drop_unused(model)
    return file_of(model)


def _free(model: Any) -> set[int]:
    """The tensors whose ranges can be chosen: those that nothing ties to another's."""
    graph = model.subgraphs[0]
    made: set[int] = set()
    tied = {int(i) for i in graph.inputs}
    links = []
    for operator in graph.operators:
        name, inputs, outputs = operator_name(model, operator), set(operator.inputs), set(operator.outputs)
        made |= outputs
        if name in _MOVING or (name == "QUANTIZE" and outputs & set(graph.outputs)):
            links.append({operator.inputs[0], operator.outputs[0]})
        elif name not in _RANGED:
            tied |= outputs if name in _READING else inputs | outputs
    while grown := {i for link in links if tied & link for i in link} - tied:
        tied |= grown
    return {int(i) for i in made - tied}


def _weights(model: Any, operator: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Kernel and bias of an operator, where they are constants."""
    tensors = model.subgraphs[0].tensors
    if len(operator.inputs) < 3 or operator.inputs[2] < 0:
        return None
    kernel, bias = (numbers(model, tensors[i]) for i in operator.inputs[1:3])
    return None if kernel is None or bias is None else (kernel, bias)


def _steps(name: str, kernel: np.ndarray, whole: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """The step of each output channel, and the shape of these that fits the kernel."""
    axis = kernel.ndim - 1 if name == "DEPTHWISE_CONV_2D" else 0
    others = None if whole else tuple(i for i in range(kernel.ndim) if i != axis)
    steps = np.maximum(np.abs(kernel).max(axis=others), TINY).reshape(-1) / WEIGHT
    return steps, tuple(-1 if i == axis and not whole else 1 for i in range(kernel.ndim))


def _add_twin(exact: Any, name: str, operator: Any, kernel: np.ndarray, bias: np.ndarray, whole: bool) -> int:
    """Puts an operator beside another that computes what rounding takes from its sum; the number of its output."""
    from ai_edge_litert import schema_py_generated as schema

    graph = exact.subgraphs[0]
    steps, shape = _steps(name, kernel, whole)
    steps = steps.reshape(shape)
    constants = [
        add_tensor(exact, "lost", array.shape, schema.TensorType.FLOAT32, None, None, array.astype("float32").tobytes())
        for array in (kernel - np.round(kernel / steps) * steps, np.zeros_like(bias))
    ]
    output = graph.tensors[operator.outputs[0]]
    made = add_tensor(exact, f"lost_{len(graph.tensors)}", output.shape, output.type, None, output.shapeSignature)
    twin = copy.copy(operator)
    twin.builtinOptions = copy.copy(operator.builtinOptions)
    twin.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    twin.inputs = np.array([operator.inputs[0], *constants], "int32")
    twin.outputs = np.array([made], "int32")
    graph.operators.insert(next(i for i, o in enumerate(graph.operators) if o is operator), twin)
    return made


def _run(
    exact: Any, ranged: list[int], lost: list[int], images: np.ndarray
) -> tuple[dict[int, tuple[float, float]], dict[int, np.ndarray]]:
    """The range of some tensors, which holds 0; and the mean of each channel of others."""
    from ai_edge_litert.interpreter import Interpreter

    graph = exact.subgraphs[0]
    graph.outputs = np.array([*graph.outputs, *ranged, *lost], "int32")
    interpreter = Interpreter(model_content=file_of(exact), num_threads=os.cpu_count())
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    ranges = dict.fromkeys(ranged, (0.0, 0.0))
    means = {i: np.zeros(1) for i in lost}
    for x in images:
        interpreter.set_tensor(image["index"], np.asarray(x[None], "float32"))
        interpreter.invoke()
        for i in ranged:
            values = interpreter.get_tensor(i)
            ranges[i] = min(float(values.min()), ranges[i][0]), max(float(values.max()), ranges[i][1])
        for i in lost:
            values = interpreter.get_tensor(i)
            means[i] = means[i] + values.reshape(-1, values.shape[-1]).mean(axis=0, dtype="float64") / len(images)
    return ranges, means


def _set_range(tensor: Any, low: float, high: float) -> None:
    how = tensor.quantization
    step = max((high - low) / BYTE, TINY)
    how.scale, how.zeroPoint = np.array([step], "float32"), np.array([round(-128 - low / step)], "int64")
    how.min = how.max = None


def _set_weights(model: Any, name: str, operator: Any, kernel: np.ndarray, bias: np.ndarray, whole: bool) -> None:
    """Gives an operator constants of its own: those that are alike share one."""
    from ai_edge_litert import schema_py_generated as schema

    tensors = model.subgraphs[0].tensors
    (step,) = np.asarray(tensors[operator.inputs[0]].quantization.scale, "float64")
    old = [tensors[i] for i in operator.inputs[1:3]]
    steps, shape = _steps(name, kernel, whole)
    # A channel of tiny weights has a bias of too many steps.
    needed = np.abs(bias) / (step * LARGEST_BIAS)
    steps = np.maximum(steps, needed.max() if whole else needed).astype("float32")
    parts = (
        (np.round(kernel / steps.reshape(shape)), "int8", steps),
        (np.round(bias / (step * steps)), "int32", (step * steps).astype("float32")),
    )
    constants = []
    for tensor, (values, dtype, own) in zip(old, parts, strict=True):
        how = copy.deepcopy(tensor.quantization)
        how.scale, how.zeroPoint, how.min, how.max = own, np.zeros(len(own), "int64"), None, None
        kind = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}[dtype]
        data = values.astype(dtype).tobytes()
        constants.append(add_tensor(model, tensor.name.decode(), tensor.shape, kind, how, None, data))
    operator.inputs = np.array([operator.inputs[0], *constants], "int32")
