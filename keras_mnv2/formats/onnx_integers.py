"""An ONNX graph with 8-bit integers: pairs of QuantizeLinear and DequantizeLinear, as every runtime reads them.

Run as a file by `onnx_file.py`, so that nothing of this package is imported.

Activations are unsigned, with a zero point: ONNX Runtime's kernels for x86 are of this kind, and of signed activations
some stay in float there. Weights are signed and symmetric, with a scale for each output channel, and biases have the product of both scales (Jacob et al. 2018, arXiv 1712.05877).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper

LEVELS = 255
WEIGHT_LEVELS = 127
TINY = 1e-12
# What a bias may be at most, so that a sum stays within 32 bits.
LARGEST_BIAS = 2**30
# What is computed with integers where its inputs are.
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_JOINING = ("Add", "Concat")
_POOLINGS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool")
# What only moves numbers: its output has the integers of its input.
_MOVING = ("Flatten", "Reshape", "Transpose")
_LIMITING = ("Clip", "Relu")
# Images a call while ranges are looked for.
BATCH = 4


def round_as_trained(graph: Any) -> None:
    """Puts integers in the place of the rounding of `keras_mnv2.ops.fake_quantize`.

    As ONNX that is `c + (round(c / scale) * scale - c)` of `c = clip(x, minimum, maximum)`.
    """
    constants = _constants(graph)
    for node in [node for node in graph.node if node.op_type == "Round"]:
        divide = _producer(graph, node.input[0])
        clip = _producer(graph, divide.input[0])
        (multiply,) = _readers(graph, node.output[0])
        (subtract,) = _readers(graph, multiply.output[0])
        (add,) = _readers(graph, subtract.output[0])
        kinds = [other.op_type for other in (clip, divide, multiply, subtract, add)]
        if kinds != ["Clip", "Div", "Mul", "Sub", "Add"]:
            raise ValueError(f"the rounding of {node.name!r} was not recognised, it has {', '.join(kinds)}")
        scale = float(constants[divide.input[1]])
        low, high = (float(constants[name]) for name in clip.input[1:3])
        # A ReLU before it may have raised the lower end.
        zero = int(np.clip(np.round(-low / scale), 0, LEVELS))
        for other in (divide, node, multiply, subtract):
            graph.node.remove(other)
        _insert_pair(graph, add, clip.output[0], add.output[0], scale, zero)
        graph.node.remove(add)
        _drop_limit(graph, clip, scale, zero, constants)
    for node in [node for node in graph.node if node.op_type in _MOVING]:
        _move_behind_integers(graph, node)


def round_by_images(model: Any, images: np.ndarray) -> None:
    """Rounds each activation between convolutions to the range that `images` give it."""
    graph = model.graph
    names = list(_activations(graph))
    ranges = calibrate(model, names, images)
    constants = _constants(graph)
    sources = {name: _moved_from(graph, name) for name in names}
    for name in names:
        low, high = ranges[sources[name]]
        scale = max((high - low) / LEVELS, TINY)
        zero = int(np.round(-low / scale))
        maker = _producer(graph, name)
        inner = f"{name}_real"
        for reader in _readers(graph, name):
            reader.input[:] = [f"{name}_rounded" if other == name else other for other in reader.input]
        if name in {value.name for value in graph.output}:
            maker.output[0] = inner
            for reader in _readers(graph, f"{name}_rounded"):
                reader.input[:] = [name if other == f"{name}_rounded" else other for other in reader.input]
            _insert_pair(graph, maker, inner, name, scale, zero, after=True)
        elif maker is None:
            _insert_pair(graph, graph.node[0], name, f"{name}_rounded", scale, zero)
        else:
            _insert_pair(graph, maker, name, f"{name}_rounded", scale, zero, after=True)
        if maker is not None and maker.op_type in _LIMITING:
            _drop_limit(graph, maker, scale, zero, constants)


def round_weights(graph: Any, per_tensor: tuple[str, ...] = ()) -> None:
    """Weights and biases as integers wherever a convolution or a classifier reads integers.

    Args:
        graph: with rounded activations; it is changed.
        per_tensor: operations whose weights have one scale.
    """
    constants = _constants(graph)
    done: set[str] = set()
    for node in [node for node in graph.node if node.op_type in _WEIGHTED]:
        before = _producer(graph, node.input[0])
        if before is None or before.op_type != "DequantizeLinear" or node.input[1] not in constants:
            continue
        weights = constants[node.input[1]]
        axis = 0 if node.op_type == "Conv" else weights.ndim - 1
        if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            axis = 0
        others = tuple(i for i in range(weights.ndim) if i != axis)
        whole = node.op_type in per_tensor
        largest = np.abs(weights).max() if whole else np.abs(weights).max(axis=others)
        scale = np.maximum(largest, TINY).astype("float32") / np.float32(WEIGHT_LEVELS)
        step = float(constants[before.input[1]])
        bias = constants[node.input[2]] if len(node.input) > 2 and node.input[2] in constants else None
        if bias is not None:
            # A channel of tiny weights has a bias of too many steps.
            needed = np.abs(bias) / (step * LARGEST_BIAS)
            scale = np.maximum(scale, needed.max() if whole else needed).astype("float32")
        shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
        integers = np.round(weights / (scale if whole else scale.reshape(shape))).astype("int8")
        prefix = node.output[0]
        node.input[1] = _constant_pair(graph, node, f"{prefix}_weights", integers, scale, None if whole else axis)
        if bias is not None:
            step_of_sum = (np.float32(step) * scale).astype("float32")
            integers = np.round(bias / step_of_sum).astype("int32")
            node.input[2] = _constant_pair(graph, node, f"{prefix}_bias", integers, step_of_sum, None if whole else 0)
        done.add(node.op_type)
    if "Conv" not in done and "Gemm" not in done and "MatMul" not in done:
        raise ValueError("the model has no convolution or classifier that could compute with integers")


def calibrate(model: Any, names: list[str], images: np.ndarray) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each tensor over the images; each range holds 0."""
    found: dict[str, tuple[float, float]] = {}
    for name, values in _values(model, names, images):
        low, high = found.get(name, (0.0, 0.0))
        found[name] = min(low, float(values.min())), max(high, float(values.max()))
    return found


def _values(model: Any, names: list[str], images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of these names, a few images at a time."""
    copy = type(model).FromString(model.SerializeToString())
    (image,) = (value.name for value in copy.graph.input)
    made = {name for node in copy.graph.node for name in node.output}
    given = {value.name for value in copy.graph.output}
    wanted = [name for name in names if name in made]
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted if name not in given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for start in range(0, len(images), BATCH):
        x = np.ascontiguousarray(images[start : start + BATCH], "float32")
        if image in names:
            yield image, x
        yield from zip(wanted, session.run(wanted, {image: x}), strict=True)


def _activations(graph: Any) -> Iterator[str]:
    """The tensors to round, each once: what integer operations read, and what convolutions give."""
    constants, seen = _constants(graph), set()
    wanted: list[str] = []
    for node in graph.node:
        data = [name for name in node.input if name not in constants]
        joins = node.op_type in _JOINING and len(data) > 1
        if node.op_type in _WEIGHTED and node.input[1] in constants or node.op_type in _POOLINGS or joins:
            wanted += data if joins else data[:1]
        if node.op_type == "Conv" or joins or node.op_type in _POOLINGS:
            wanted.append(_limited(graph, node.output[0]))
    for name in wanted:
        while name is not None and name not in seen:
            seen.add(name)
            yield name
            maker = _producer(graph, name)
            # What is moved is rounded before, too.
            name = maker.input[0] if maker is not None and maker.op_type in _MOVING else None


def _limited(graph: Any, name: str) -> str:
    """A tensor after the activation that alone reads it."""
    readers = _readers(graph, name)
    alone = len(readers) == 1 and name not in {value.name for value in graph.output}
    return readers[0].output[0] if alone and readers[0].op_type in _LIMITING else name


def _moved_from(graph: Any, name: str) -> str:
    """The tensor whose numbers this one has: before what only moves."""
    while (maker := _producer(graph, name)) is not None and maker.op_type in _MOVING:
        name = maker.input[0]
    return name


def _insert_pair(
    graph: Any, node: Any, source: str, target: str, scale: float, zero: int, after: bool = False
) -> None:
    """Rounds `source` to `target`, before or after a node."""
    place = list(graph.node).index(node) + after
    names = [f"{target}_scale", f"{target}_zero"]
    graph.initializer.append(numpy_helper.from_array(np.float32(scale), names[0]))
    graph.initializer.append(numpy_helper.from_array(np.uint8(zero), names[1]))
    integers = f"{target}_integers"
    graph.node.insert(place, helper.make_node("DequantizeLinear", [integers, *names], [target]))
    graph.node.insert(place, helper.make_node("QuantizeLinear", [source, *names], [integers]))


def _constant_pair(
    graph: Any, node: Any, name: str, integers: np.ndarray, scale: np.ndarray, axis: int | None
) -> str:
    """A constant as integers with what gives their values; the name of these."""
    names = [f"{name}_integers", f"{name}_scale", f"{name}_zero"]
    for key, value in zip(names, (integers, scale, np.zeros(scale.shape, integers.dtype)), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    how = {} if axis is None else {"axis": axis}
    pair = helper.make_node("DequantizeLinear", names, [name], **how)
    graph.node.insert(list(graph.node).index(node), pair)
    return name


def _drop_limit(graph: Any, limit: Any, scale: float, zero: int, constants: dict[str, np.ndarray]) -> None:
    """Removes a Clip or a ReLU that the range of the integers behind it implies."""
    low, high = 0.0, np.inf
    if limit.op_type == "Clip":
        low, high = (float(constants[name]) if name else default for name, default in zip(
            [*limit.input[1:], "", ""][:2], (-np.inf, np.inf), strict=True))
    slack = scale * 1e-3
    if low > -zero * scale + slack or high < (LEVELS - zero) * scale - slack or len(_readers(graph, limit.output[0])) > 1:
        return
    for reader in _readers(graph, limit.output[0]):
        reader.input[:] = [limit.input[0] if name == limit.output[0] else name for name in reader.input]
    graph.node.remove(limit)


def _move_behind_integers(graph: Any, node: Any) -> None:
    """Rounds before a node that only moves numbers, too: what is before it then ends with integers."""
    before, readers = _producer(graph, node.input[0]), _readers(graph, node.output[0])
    if before is None or before.op_type == "DequantizeLinear" or [r.op_type for r in readers] != ["QuantizeLinear"]:
        return
    constants = _constants(graph)
    scale, zero = (constants[name] for name in readers[0].input[1:])
    name = f"{node.input[0]}_rounded"
    _insert_pair(graph, node, node.input[0], name, float(scale), int(zero))
    node.input[0] = name


def _constants(graph: Any) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}


def _producer(graph: Any, name: str) -> Any:
    return next((node for node in graph.node if name in node.output), None)


def _readers(graph: Any, name: str) -> list[Any]:
    return [node for node in graph.node if name in node.input]
