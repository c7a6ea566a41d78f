"""A program of PyTorch as an ONNX file that old and new runtimes take, without Keras.

Run as a file by `converters.py`, so that nothing of this package is imported.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

# What PyTorch's exporter writes at least. Its graphs of this network need less.
EXPORTED_OPSET = 18
# The first with a scale for each channel of a quantised weight.
LEAST_OPSET = 13
# Their newer versions take more types or inputs, and compute the same.
_WIDENED = ("Add", "Sub", "Mul", "Div", "Relu", "Identity", "Reshape", "Pad", "Shape")
# Their axes are an input since this version, and an attribute before.
_REDUCTIONS = dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), 18)
_POOLINGS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
_TO_CHANNELS_LAST = [0, 2, 3, 1]
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
# Operations of one tensor, number by number, and constants of one number.
_PLAIN = ("Clip", "Relu", "QuantizeLinear", "DequantizeLinear", "Identity", "Sigmoid", "HardSwish", "Tanh")


def write_onnx(
    source: Path,
    target: Path,
    input_name: str,
    output_names: list[str],
    precision: str = "float32",
    opset: int | None = None,
    layout: str | None = None,
    calibration: str = "",
    quantized: bool = False,
    detects: bool = False,
    **_: Any,
) -> None:
    """A `.pt2` file to an ONNX file by PyTorch's exporter; ONNX Runtime then removes what cancels out.

    Args:
        source: the program.
        target: file to write.
        input_name: of its one input.
        output_names: of its outputs, in their order.
        precision: `"float32"`, `"float16"` or `"int8"`.
        opset: of the file; by default the lowest that its graph needs, from 13 on.
        layout: `"NCHW"` or `"NHWC"`, of the images that the file takes, where the program takes the other one.
        calibration: for `"int8"`, a `.npy` file of images that the ranges of the activations are taken from.
        quantized: whether the graph has ranges of its own, from quantisation-aware training.
        detects: whether the graph decodes boxes behind its convolutions: that stays in float32 in each precision. In
            half precision areas of boxes overflow, and with 8 bits scores would be equal.
    """
    # Beside this file, which is not run as part of a package.
    integers = runpy.run_path(str(Path(__file__).with_name("onnx_integers.py")))
    program = torch.onnx.export(
        torch.export.load(source),
        dynamo=True,
        verbose=False,
        external_data=False,
        opset_version=max(EXPORTED_OPSET, opset or 0),
        input_names=[input_name],
        output_names=output_names,
    )
    assert program is not None
    model = program.model_proto
    if layout is not None:
        _transpose_input(model.graph, layout)
    model = _simplified(model, target.with_suffix(".first.onnx"))
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    # Shapes between: their names are not those of the input and the outputs, and some of them are changed here.
    del graph.value_info[:]
    _trim_kernels(graph)
    if quantized and precision == "int8":
        integers["round_as_trained"](graph)
    _pool(model)
    if precision == "int8":
        if not quantized:
            images = np.load(calibration, mmap_mode="r")
            if layout is not None:
                images = np.moveaxis(images, *((-1, 1) if layout == "NCHW" else (1, -1)))
            model = integers["with_integers"](model, images, _network if detects else None)
            graph = model.graph
        else:
            integers["round_what_moves"](graph)
            integers["round_weights"](graph, trained=True)
    if precision == "float16":
        _in_float16(model, _network(graph) if detects else list(graph.node))
    _remove_unused(graph)
    _set_opset(model, opset)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def _transpose_input(graph: Any, layout: str) -> None:
    """Gives the graph an input of this layout, with a transpose to the other one behind it."""
    there, back = _TO_CHANNELS_FIRST, _TO_CHANNELS_LAST
    if layout == "NHWC":
        there, back = back, there
    (image,) = graph.input
    inner = f"{image.name}_transposed"
    _rename(graph, image.name, inner, inputs=True)
    graph.node.insert(0, helper.make_node("Transpose", [image.name], [inner], perm=back))
    dims = list(image.type.tensor_type.shape.dim)
    copies = [type(dims[0]).FromString(dims[i].SerializeToString()) for i in there]
    del image.type.tensor_type.shape.dim[:]
    image.type.tensor_type.shape.dim.extend(copies)


def _simplified(model: Any, scratch: Path) -> Any:
    """The model after ONNX Runtime's passes that keep to standard operations.

    What goes: the pairs of transposes between PyTorch's and the model's layout, and what is computed of constants.
    """
    onnx.save(model, scratch)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(scratch.with_suffix(".basic.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(scratch), options, providers=["CPUExecutionProvider"])
    found = onnx.load(options.optimized_model_filepath)
    scratch.unlink()
    Path(options.optimized_model_filepath).unlink()
    return found


def _trim_kernels(graph: Any) -> None:
    """Removes leading rows and columns of zeros from kernels, and as many zeros from the padding.

    On PyTorch they stand for TensorFlow's uneven padding, which an ONNX convolution has an attribute for.
    """
    weights = {weight.name: weight for weight in graph.initializer}
    names = [name for node in graph.node for name in node.input]
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or names.count(weight.name) > 1:
            continue
        kernel = numpy_helper.to_array(weight)
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if "pads" not in attributes or "kernel_shape" not in attributes or kernel.ndim != 4:
            continue
        pads, shape = attributes["pads"].ints, attributes["kernel_shape"].ints
        if min(pads[:2]) < 1 or min(shape) < 2 or kernel[:, :, 0].any() or kernel[:, :, :, 0].any():
            continue
        pads[:] = [pads[0] - 1, pads[1] - 1, *pads[2:]]
        shape[:] = [side - 1 for side in shape]
        weight.CopyFrom(numpy_helper.from_array(kernel[:, :, 1:, 1:].copy(), weight.name))


def _pool(model: Any) -> None:
    """Means and maxima over a map as poolings, also those taken behind a transpose, which then goes."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    maps = {value.name for value in inferred if len(value.type.tensor_type.shape.dim) == 4}
    for node in list(graph.node):
        if node.op_type not in _POOLINGS or node.input[0] not in maps:
            continue
        axes = sorted(axis % 4 for axis in _reduced_axes(graph, node))
        kept = [a.i for a in node.attribute if a.name == "keepdims"] != [0]
        if axes == [1, 2] and not kept and (chain := list(_up_to_transpose(graph, node))):
            *between, transpose = chain
            (between[-1] if between else node).input[0] = transpose.input[0]
            graph.node.remove(transpose)
        elif axes != [2, 3]:
            continue
        pooled = node.output[0] if kept else f"{node.output[0]}_pooled"
        index = list(graph.node).index(node)
        graph.node.remove(node)
        if not kept:
            graph.node.insert(index, helper.make_node("Flatten", [pooled], [node.output[0]], axis=1))
        graph.node.insert(index, helper.make_node(_POOLINGS[node.op_type], [node.input[0]], [pooled]))


def _up_to_transpose(graph: Any, node: Any) -> Iterator[Any]:
    """The nodes before `node` up to a transpose to NHWC, nearest first; none if there is something else on the way."""
    found: list[Any] = []
    outputs = {value.name for value in graph.output}
    while True:
        name = node.input[0]
        producers = [other for other in graph.node if name in other.output]
        readers = sum(name in other.input for other in graph.node)
        if not producers or readers != 1 or name in outputs:
            return
        (node,) = producers
        found.append(node)
        if node.op_type == "Transpose":
            if list(node.attribute[0].ints) == _TO_CHANNELS_LAST:
                yield from found
            return
        if node.op_type not in _PLAIN:
            return


def _reduced_axes(graph: Any, node: Any) -> list[int]:
    if len(node.input) > 1:
        return next(numpy_helper.to_array(w).tolist() for w in graph.initializer if w.name == node.input[1])
    return next(list(attribute.ints) for attribute in node.attribute if attribute.name == "axes")


def _network(graph: Any) -> list[Any]:
    """The convolutions, and what leads to them."""
    found: list[Any] = []
    wanted: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == "Conv" or wanted & set(node.output):
            found.insert(0, node)
            wanted |= set(node.input)
    return found


def _in_float16(model: Any, nodes: list[Any]) -> None:
    """Weights and computation of these nodes in 16 bits; input, outputs and what other nodes compute stay as they are.

    Raises:
        ValueError: where a weight is too large.
    """
    graph = model.graph
    floats, halves = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = [*inferred.value_info, *inferred.input, *inferred.output]
    real = {value.name for value in known if value.type.tensor_type.elem_type == floats}
    inside = {id(node) for node in nodes}
    made = {name for node in nodes for name in node.output}
    weights = {weight.name: weight for weight in graph.initializer if weight.data_type == floats}
    read_elsewhere = {name for node in graph.node if id(node) not in inside for name in node.input}
    read_elsewhere |= {value.name for value in graph.output}
    half: dict[str, str] = {}
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == floats:
                attribute.i = halves
        for i, name in enumerate(node.input):
            if name in weights and name not in half:
                half[name] = _halved(graph, weights[name], name in read_elsewhere)
            elif name in real and name not in made and name not in half:
                half[name] = f"{name}_half"
                place = next((k + 1 for k, other in enumerate(graph.node) if name in other.output), 0)
                graph.node.insert(place, helper.make_node("Cast", [name], [half[name]], to=halves))
            node.input[i] = half.get(name, name)
    for node in nodes:
        for name in [name for name in node.output if name in real and name in read_elsewhere]:
            for other in nodes:
                other.input[:] = [f"{name}_half" if i == name else i for i in other.input]
            node.output[:] = [f"{name}_half" if o == name else o for o in node.output]
            place = list(graph.node).index(node) + 1
            graph.node.insert(place, helper.make_node("Cast", [f"{name}_half"], [name], to=floats))


def _halved(graph: Any, weight: Any, is_read_elsewhere: bool) -> str:
    """The name of a weight in 16 bits, which takes its place where no other node reads it."""
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(weight).astype(np.float16)
    if not np.isfinite(values).all():
        raise ValueError(f"the weights {weight.name!r} are too large for float16")
    name = f"{weight.name}_half" if is_read_elsewhere else weight.name
    halved = numpy_helper.from_array(values, name)
    if is_read_elsewhere:
        graph.initializer.append(halved)
    else:
        weight.CopyFrom(halved)
    return name


def _rename(graph: Any, old: str, new: str, inputs: bool = False, outputs: bool = False) -> None:
    for node in graph.node:
        if inputs:
            node.input[:] = [new if name == old else name for name in node.input]
        if outputs:
            node.output[:] = [new if name == old else name for name in node.output]


def _remove_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [weight for weight in graph.initializer if weight.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _set_opset(model: Any, opset: int | None) -> None:
    """Declares the opset: the one asked for, or the lowest; and the lowest version of the file format.

    Raises:
        ValueError: where the graph needs a higher one than was asked for.
    """
    (given,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    needed, for_what = LEAST_OPSET, ""
    for node in model.graph.node:
        since = onnx.defs.get_schema(node.op_type, given, node.domain).since_version
        newer = node.op_type in _WIDENED or (node.op_type in _REDUCTIONS and _has_constant_axes(model.graph, node))
        if since > needed and not newer:
            needed, for_what = since, node.op_type
    if opset is not None and opset < needed:
        raise ValueError(f"opset must be at least {needed} for this model, whose {for_what} needs it, got {opset}")
    chosen = opset or needed
    for node in model.graph.node:
        if node.op_type == "Reshape" and chosen < 14:
            _drop(node, "allowzero")
        if chosen < _REDUCTIONS.get(node.op_type, 0) and len(node.input) > 1:
            axes = _reduced_axes(model.graph, node)
            del node.input[1:]
            _drop(node, "noop_with_empty_axes")
            node.attribute.append(helper.make_attribute("axes", axes))
    _remove_unused(model.graph)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", chosen))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)


def _has_constant_axes(graph: Any, node: Any) -> bool:
    return len(node.input) < 2 or node.input[1] in {weight.name for weight in graph.initializer}


def _drop(node: Any, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
