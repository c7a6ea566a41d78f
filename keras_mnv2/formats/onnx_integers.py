"""An ONNX graph with 8-bit integers: pairs of QuantizeLinear and DequantizeLinear, as every runtime reads them.

Run as a file by `onnx_file.py`, so that nothing of this package is imported.

Activations are unsigned, with a zero point: of signed ones ONNX Runtime computes some in float on x86. Weights are
signed and symmetric, with a scale for each output channel; biases have the product of both scales (Jacob et al. 2018,
arXiv 1712.05877).

x86 processors without VNNI multiply with VPMADDUBSW: two products of neighbours make one sum of 16 bits, which stays at
its limit where it is exceeded. So a scale is chosen by the largest sum of two neighbours, not by the largest weight.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper

LEVELS = 255
WEIGHT_LEVELS = 127
# What a largest sum of 127 steps can have become by rounding two weights.
TRAINED_LEVELS = (127, 126, 128)
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
        # A scale of 1, as pixels have, leaves neither a division nor a product.
        divide = _producer(graph, node.input[0])
        plain = divide is not None and divide.op_type == "Clip"
        clip = divide if plain else _producer(graph, divide.input[0])
        last = node if plain else _readers(graph, node.output[0])[0]
        (subtract,) = _readers(graph, last.output[0])
        (add,) = _readers(graph, subtract.output[0])
        between = [node, subtract] if plain else [divide, node, last, subtract]
        kinds = [other.op_type if other is not None else "nothing" for other in (clip, *between, add)]
        if kinds not in (["Clip", "Round", "Sub", "Add"], ["Clip", "Div", "Round", "Mul", "Sub", "Add"]):
            raise ValueError(f"the rounding of {node.name!r} was not recognised, it has {', '.join(kinds)}")
        scale = 1.0 if plain else float(constants[divide.input[1]])
        low = float(constants[clip.input[1]])
        # A ReLU before it may have raised the lower end.
        zero = int(np.clip(np.round(-low / scale), 0, LEVELS))
        for other in between:
            graph.node.remove(other)
        _insert_pair(graph, add, clip.output[0], add.output[0], scale, zero)
        graph.node.remove(add)
        _drop_limit(graph, clip, scale, zero, constants)


def with_integers(model: Any, images: np.ndarray, network: Callable[[Any], list[Any]] | None = None) -> Any:
    """A model in float32 as one that computes with 8-bit integers, which `images` give their ranges.

    Means of the images' ranges cost less than whole ones, but cut off what few images have: the way is taken that moves
    the outputs less, by the mean of their squared differences.

    Args:
        model: it stays as it is.
        images: as it takes them.
        network: gives the nodes of a graph that compute with integers, where these are not all. Ranges are then whole:
            what few images have, such as objects, is not cut off.

    Returns:
        The model.
    """
    corrected = type(model).FromString(model.SerializeToString())
    correct_biases(corrected, images)
    names = list(_activations(corrected.graph, None if network is None else network(corrected.graph)))
    ranges = calibrate(corrected, names, images)
    best, least = None, np.inf
    for whole in (False, True) if network is None else (True,):
        rounded = type(model).FromString(corrected.SerializeToString())
        round_by_ranges(rounded.graph, names, ranges, whole)
        round_what_moves(rounded.graph)
        round_weights(rounded.graph)
        moved = _moved(model, rounded, images) if network is None else 0
        if best is None or moved < least:
            best, least = rounded, moved
    return best


def _moved(model: Any, rounded: Any, images: np.ndarray) -> float:
    """The squared differences of the outputs, as a fraction of the squares of the model's own."""
    names = [value.name for value in model.graph.output]
    sums: dict[str, np.ndarray] = {name: np.full(2, TINY) for name in names}
    for (name, y), (_, found) in zip(_values(model, names, images), _values(rounded, names, images), strict=True):
        sums[name] += np.square(found - y, dtype="float64").sum(), np.square(y, dtype="float64").sum()
    return float(sum(difference / own for difference, own in sums.values()))


def round_by_ranges(graph: Any, names: list[str], ranges: dict[str, np.ndarray], whole: bool) -> None:
    """Rounds each activation between convolutions to a range.

    Args:
        graph: it is changed.
        names: of the activations.
        ranges: of `calibrate`.
        whole: whether a range is that of all images; else the mean of theirs, which a few outliers hardly stretch.
    """
    constants = _constants(graph)
    sources = {name: _moved_from(graph, name) for name in names}
    for name in names:
        ends = ranges[sources[name]]
        low, high = (ends[:, 0].min(), ends[:, 1].max()) if whole else ends.mean(axis=0)
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


def correct_biases(model: Any, images: np.ndarray) -> None:
    """Moves each bias by what the rounding of the weights moves the mean of its sum (Nagel et al. 2019, section 4.2).

    The means are those of `images`: beside each convolution another one runs, of what rounding changes.
    """
    copy = type(model).FromString(model.SerializeToString())
    constants = _constants(copy.graph)
    twins: dict[str, str] = {}
    for node in [node for node in copy.graph.node if node.op_type in ("Conv", "Gemm")]:
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.input[1] not in constants or bias not in constants or bias in twins.values():
            continue
        weights = constants[node.input[1]]
        integers, scale, shape = _rounded(node, weights, False)
        twin = type(node).FromString(node.SerializeToString())
        twin.name = twin.output[0] = f"{node.output[0]}_lost"
        twin.input[1:] = [f"{node.output[0]}_rounding"]
        lost = weights - integers * scale.reshape(shape)
        copy.graph.initializer.append(numpy_helper.from_array(lost.astype("float32"), twin.input[1]))
        copy.graph.node.insert(list(copy.graph.node).index(node), twin)
        twins[twin.output[0]] = bias
    sums: dict[str, Any] = {}
    for name, values in _values(copy, list(twins), images):
        mean = values.mean(axis=(0, *range(2, values.ndim)), dtype="float64")
        sums[name] = sums.get(name, 0) + mean * len(values) / len(images)
    biases = {weight.name: weight for weight in model.graph.initializer}
    for name, bias in twins.items():
        values = numpy_helper.to_array(biases[bias]) + sums[name]
        biases[bias].CopyFrom(numpy_helper.from_array(values.astype("float32"), bias))


def _rounded(
    node: Any, weights: np.ndarray, whole: bool, trained: bool = False
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Weights as integers, their scales, and the shape of these that fits the weights.

    What was trained with rounding consists of multiples of its scale. The largest one is 127, or next to it.
    """
    axis = _output_axis(node, weights)
    largest = _largest(node, np.moveaxis(weights, axis, 0))
    if whole:
        largest = largest.max()
    shape = [-1 if i == axis and not whole else 1 for i in range(weights.ndim)]
    scale = np.maximum(largest, TINY).astype("float32") / np.float32(WEIGHT_LEVELS)
    if trained:
        others = tuple(i for i in range(weights.ndim) if i != axis or whole)
        scales = [np.maximum(largest, TINY).astype("float32") / np.float32(n) for n in TRAINED_LEVELS]
        steps = [weights / scale.reshape(shape) for scale in scales]
        off = [np.abs(step - np.round(step)).max(axis=others) for step in steps]
        scale = np.choose(np.argmin(off, axis=0), scales)
    return np.round(weights / scale.reshape(shape)), scale, shape


def _largest(node: Any, weights: np.ndarray) -> np.ndarray:
    """Of each output channel, what becomes 127: the largest sum of one sign of two weights that are multiplied at once.

    255 times 128, which two rounded weights reach at most, is below 2**15. A depthwise convolution sums in 32 bits.
    """
    rows = weights.reshape(len(weights), -1)
    alone = np.abs(rows).max(axis=1)
    if any(a.name == "group" and a.i > 1 for a in node.attribute):
        return alone
    # The channels of one pixel are neighbours in images of channels last, the pixels of one channel else.
    orders = [rows, np.moveaxis(weights, 1, -1).reshape(rows.shape)]
    even = rows.shape[1] // 2 * 2
    pairs = [np.abs(row[:, :even:2] + row[:, 1:even:2]) for row in orders]
    return np.maximum(alone, np.concatenate(pairs, axis=1).max(axis=1, initial=0))


def _output_axis(node: Any, weights: np.ndarray) -> int:
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else weights.ndim - 1


def round_weights(graph: Any, trained: bool = False) -> None:
    """Weights and biases as integers wherever a convolution or a classifier reads integers.

    Args:
        graph: with rounded activations; it is changed.
        trained: whether the weights are rounded already, as `keras_mnv2.quantize_aware` does: a classifier's with one
            scale.
    """
    constants = _constants(graph)
    done = False
    for node in [node for node in graph.node if node.op_type in _WEIGHTED]:
        before = _producer(graph, node.input[0])
        if before is None or before.op_type != "DequantizeLinear" or node.input[1] not in constants:
            continue
        weights = constants[node.input[1]]
        axis, whole = _output_axis(node, weights), trained and node.op_type != "Conv"
        _, scale, shape = _rounded(node, weights, whole, trained)
        step = float(constants[before.input[1]])
        bias = constants[node.input[2]] if len(node.input) > 2 and node.input[2] in constants else None
        if bias is not None:
            # A channel of tiny weights has a bias of too many steps.
            needed = np.abs(bias) / (step * LARGEST_BIAS)
            scale = np.maximum(scale, needed.max() if whole else needed).astype("float32")
        integers = np.round(weights / scale.reshape(shape)).astype("int8")
        prefix = node.output[0]
        node.input[1] = _constant_pair(graph, node, f"{prefix}_weights", integers, scale, None if whole else axis)
        if bias is not None:
            step_of_sum = (np.float32(step) * scale).astype("float32")
            integers = np.round(bias / step_of_sum).astype("int32")
            node.input[2] = _constant_pair(graph, node, f"{prefix}_bias", integers, step_of_sum, None if whole else 0)
        done = True
    if not done:
        raise ValueError("the model has no convolution or classifier that could compute with integers")


def calibrate(model: Any, names: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """The least and the largest value of each tensor in each image, (images, 2); each range holds 0."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for name, values in _values(model, names, images):
        rows = values.reshape(len(values), -1)
        found[name].append(np.stack([np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)], axis=1))
    return {name: np.concatenate(ends).astype("float64") for name, ends in found.items()}


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


def _activations(graph: Any, nodes: list[Any] | None) -> Iterator[str]:
    """The tensors to round, each once: what integer operations read, and what convolutions give."""
    constants, seen = _constants(graph), set()
    wanted: list[str] = []
    for node in graph.node if nodes is None else nodes:
        data = [name for name in node.input if name not in constants]
        joins = node.op_type in _JOINING and len(data) > 1
        weighted = node.op_type in _WEIGHTED and node.input[1] in constants
        if weighted or node.op_type in _POOLINGS or joins:
            wanted += data if joins else data[:1]
        is_read = nodes is None or any(node.output[0] in other.input for other in nodes)
        if is_read and (node.op_type == "Conv" or joins or node.op_type in _POOLINGS):
            wanted.append(_limited(graph, node.output[0]))
    for name in wanted:
        # What is moved is rounded before, too.
        for tensor in dict.fromkeys((name, _moved_from(graph, name))):
            if tensor not in seen:
                seen.add(tensor)
                yield tensor


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


def _insert_pair(graph: Any, node: Any, source: str, target: str, scale: float, zero: int, after: bool = False) -> None:
    """Rounds `source` to `target`, before or after a node."""
    place = list(graph.node).index(node) + after
    names = [f"{target}_scale", f"{target}_zero"]
    graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), names[0]))
    graph.initializer.append(numpy_helper.from_array(np.array(zero, np.uint8), names[1]))
    integers = f"{target}_integers"
    graph.node.insert(place, helper.make_node("DequantizeLinear", [integers, *names], [target]))
    graph.node.insert(place, helper.make_node("QuantizeLinear", [source, *names], [integers]))


def _constant_pair(graph: Any, node: Any, name: str, integers: np.ndarray, scale: np.ndarray, axis: int | None) -> str:
    """A constant as integers with what gives their values; the name of these."""
    names = [f"{name}_integers", f"{name}_scale", f"{name}_zero"]
    for key, value in zip(names, (integers, scale, np.zeros(scale.shape, integers.dtype)), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    how: dict[str, Any] = {} if axis is None else {"axis": axis}
    pair = helper.make_node("DequantizeLinear", names, [name], **how)
    graph.node.insert(list(graph.node).index(node), pair)
    return name


def _drop_limit(graph: Any, limit: Any, scale: float, zero: int, constants: dict[str, np.ndarray]) -> None:
    """Removes a Clip or a ReLU that the range of the integers behind it implies."""
    low, high = 0.0, np.inf
    if limit.op_type == "Clip":
        ends = zip([*limit.input[1:], "", ""][:2], (-np.inf, np.inf), strict=True)
        low, high = (float(constants[name]) if name else default for name, default in ends)
    slack = scale * 1e-3
    needed = low > -zero * scale + slack or high < (LEVELS - zero) * scale - slack
    if needed or len(_readers(graph, limit.output[0])) > 1:
        return
    for reader in _readers(graph, limit.output[0]):
        reader.input[:] = [limit.input[0] if name == limit.output[0] else name for name in reader.input]
    graph.node.remove(limit)


def round_what_moves(graph: Any) -> None:
    """Rounds on both sides of what only moves numbers, where one side is rounded: the integers are the same."""
    constants = _constants(graph)
    for node in [node for node in graph.node if node.op_type in _MOVING]:
        before, readers = _producer(graph, node.input[0]), _readers(graph, node.output[0])
        given = before is not None and before.op_type == "DequantizeLinear"
        wanted = [reader.op_type for reader in readers] == ["QuantizeLinear"]
        if given == wanted:
            continue
        scale, zero = (constants[name] for name in (before if given else readers[0]).input[1:])
        name = node.output[0] if given else node.input[0]
        if given:
            node.output[0] = f"{name}_moved"
            _insert_pair(graph, node, node.output[0], name, float(scale), int(zero), after=True)
        else:
            node.input[0] = f"{name}_rounded"
            _insert_pair(graph, node, name, node.input[0], float(scale), int(zero))


def _constants(graph: Any) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}


def _producer(graph: Any, name: str) -> Any:
    return next((node for node in graph.node if name in node.output), None)


def _readers(graph: Any, name: str) -> list[Any]:
    return [node for node in graph.node if name in node.input]
