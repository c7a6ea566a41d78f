"""A `.tflite` file as its schema has it: read, changed where the converter leaves something to be wished for, written.

The schema's classes come with LiteRT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Levels of a byte, and the largest of a weight: weights are symmetric.
BYTE, WEIGHT = 255, 127


def read_file(content: bytes) -> Any:
    """The model of a `.tflite` file, as the classes of the schema."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def file_of(model: Any) -> bytes:
    """The bytes of such a model."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):
        """Weights lie at multiples of 16 bytes, as microcontrollers and delegates read them; Python's own writer
        would put bytes anywhere."""

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:
            return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)

    builder = Aligned(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def operators(content: bytes) -> list[tuple[str, int]]:
    """Name and version of each operator of a file, in order."""
    model = read_file(content)
    return [
        (operator_name(model, operator), _code(model, operator).version) for operator in model.subgraphs[0].operators
    ]


def fold_scaling(content: bytes, reference: bytes | None = None, images: np.ndarray | None = None) -> bytes:
    """Takes the scaling of pixels at the start of an 8-bit file into the first convolution, which then reads pixels.

    Scaling as an operator of integers rounds the pixels once more, and to fewer levels than they have. Here the
    kernel takes up the factor of each channel, and the bias the shift. The border of zeros around the scaled image
    becomes one of the pixels that are scaled to zero, rounded to a whole grey level: an operator that pads stays, one
    for each channel where these differ.

    Args:
        content: of a `.tflite` file of 8-bit integers.
        reference: of the same model in float32, for its exact numbers; without it those of the integers are taken.
        images: (number, height, width, channels), as the model takes them: the bias then moves by what rounding the
            kernel moves the mean of its sum, as in `litert_integers.round_by_images`, whose bias it replaces.

    Returns:
        A `.tflite` file; the same where it does not start with a scaling and a convolution of known size.
    """
    model = read_file(content)
    start = _read_start(model)
    if start is None:
        return content
    exact = None if reference is None else _read_start(read_file(reference))
    if exact is None or exact.names != start.names or exact.kernel.shape != start.kernel.shape:
        exact = start
    graph = model.subgraphs[0]
    step, zero = _pixels_of(graph, start)
    kernel = exact.kernel * exact.scale
    steps = np.abs(kernel).max(axis=(1, 2, 3)) / WEIGHT
    if exact is start and len(set(start.scale)) == 1 and start.scale[0] > 0:
        # The same integers.
        own = graph.tensors[start.conv.inputs[1]].quantization.scale
        steps = np.broadcast_to(np.asarray(own, "float64"), len(kernel)) * start.scale[0]
    steps = np.where(steps == 0, 1, steps)
    rounded = np.round(kernel / steps[:, None, None, None])
    # With the rounded kernel: its error then counts from the pixel that is scaled to zero, not from black.
    made = rounded * steps[:, None, None, None]
    bias = exact.bias + (made * exact.shift / exact.scale).sum(axis=(1, 2, 3))
    if images is not None:
        bias += ((exact.kernel - made / exact.scale) * _means(exact, images)).sum(axis=(1, 2, 3))
    _set(model, graph.tensors[start.conv.inputs[1]], rounded, "int8", steps)
    _set(model, graph.tensors[start.conv.inputs[2]], np.round(bias / (step * steps)), "int32", step * steps)

    border = np.clip(np.round(zero - exact.shift / exact.scale / step), -128, 127)
    first = graph.operators.index(start.left_out[0])
    graph.operators = [operator for operator in graph.operators if not any(operator is o for o in start.left_out)]
    graph.operators[first:first] = _padded(model, start, border)
    drop_unused(model)
    return file_of(model)


@dataclass
class _Start:
    """How a file begins: the tensor of the pixels, its scaling, the padding, and the first convolution.

    Attributes:
        tensor: number of the tensor of pixels.
        names: of the operators.
        scale: of each channel.
        shift: of each channel, added then.
        pads: rows and columns around the image, (4, 2).
        kernel: (outputs, height, width, inputs).
        bias: (outputs,)
        conv: the convolution.
        left_out: the operators between.
    """

    tensor: int
    names: list[str]
    scale: np.ndarray
    shift: np.ndarray
    pads: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    conv: Any
    left_out: list[Any]


def _read_start(model: Any) -> _Start | None:
    graph = model.subgraphs[0]
    if len(graph.inputs) != 1:
        return None
    operators = list(graph.operators)
    tensor = int(graph.inputs[0])
    scale, shift = np.ones(1), np.zeros(1)
    pads = np.zeros((4, 2), int)
    names: list[str] = []
    left_out: list[Any] = []
    if operator_name(model, operators[0]) == "QUANTIZE":
        tensor = int(operators.pop(0).outputs[0])
    now = tensor
    for operator in operators:
        name = operator_name(model, operator)
        readers = [o for o in graph.operators if now in o.inputs]
        if readers != [operator] or now in graph.outputs:
            return None
        if name == "CONV_2D" and operator.inputs[0] == now and names:
            break
        if name == "PAD" and operator.inputs[0] == now and names:
            zeros = numbers(model, graph.tensors[operator.inputs[1]])
            if zeros is None:
                return None
            pads = pads + zeros.astype(int)
        elif name in ("MUL", "ADD", "SUB", "DIV") and not pads.any():
            other = [i for i in operator.inputs if i != now]
            constant = numbers(model, graph.tensors[other[0]]) if len(other) == 1 else None
            swapped = operator.inputs[0] != now and name in ("SUB", "DIV")
            if constant is None or swapped or (constant.ndim > 1 and constant.size != constant.shape[-1]):
                return None
            constant = constant.reshape(-1)
            if name in ("MUL", "DIV"):
                factor = constant if name == "MUL" else 1 / constant
                scale, shift = scale * factor, shift * factor
            else:
                shift = shift + (constant if name == "ADD" else -constant)
            names.append(name)
        else:
            return None
        left_out.append(operator)
        now = int(operator.outputs[0])
    else:
        return None
    image = graph.tensors[tensor]
    kernel = numbers(model, graph.tensors[operator.inputs[1]])
    bias = numbers(model, graph.tensors[operator.inputs[2]]) if len(operator.inputs) > 2 else None
    sides = [int(n) for n in (image.shape if image.shapeSignature is None else image.shapeSignature)][1:3]
    if kernel is None or bias is None or min(sides) < 1 or kernel.shape[3] != image.shape[3]:
        return None
    options = operator.builtinOptions
    if options.padding == 0:
        strides = (options.strideH, options.strideW)
        dilations = (options.dilationHFactor, options.dilationWFactor)
        given = [n + int(pads[axis + 1].sum()) for axis, n in enumerate(sides)]
        for axis, (n, k, s, d) in enumerate(zip(given, kernel.shape[1:3], strides, dilations, strict=True)):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads[axis + 1] += [total // 2, total - total // 2]
    channels = kernel.shape[3]
    scale, shift = (np.broadcast_to(x, channels).astype("float64") for x in (scale, shift))
    return _Start(tensor, names, scale, shift, pads, kernel, bias, operator, left_out)


def _means(start: _Start, images: np.ndarray) -> np.ndarray:
    """The mean over images and places of what each number of the kernel is multiplied by, (height, width, inputs)."""
    options = start.conv.builtinOptions
    _, rows, columns, _ = start.kernel.shape
    dilations = (options.dilationHFactor, options.dilationWFactor)
    strides = (options.strideH, options.strideW)
    sums = np.zeros(start.kernel.shape[1:])
    for image in images:
        x = np.pad(image * start.scale + start.shift, start.pads[1:])
        reach = [(n - 1) * dilation for n, dilation in zip((rows, columns), dilations, strict=True)]
        ends = [side - far for side, far in zip(x.shape, reach, strict=False)]
        for i, j in np.ndindex(rows, columns):
            top, left = i * dilations[0], j * dilations[1]
            seen = x[top : top + ends[0] : strides[0], left : left + ends[1] : strides[1]]
            sums[i, j] += seen.mean(axis=(0, 1)) / len(images)
    return sums


def _pixels_of(graph: Any, start: _Start) -> tuple[float, int]:
    """Step and zero of the input; those of bytes where its range, of the calibration, is one of pixels."""
    image = graph.tensors[start.tensor].quantization
    step, zero = float(image.scale[0]), int(image.zeroPoint[0])
    if zero == -128 and BYTE / 2 < step * BYTE < BYTE + 1:
        step = 1.0
        for number in {start.tensor, int(graph.inputs[0])}:
            graph.tensors[number].quantization.scale = np.array([1.0], "float32")
            graph.tensors[number].quantization.min = graph.tensors[number].quantization.max = None
    return step, zero


def _padded(model: Any, start: _Start, border: np.ndarray) -> list[Any]:
    """The operators that pad the pixels, and the convolution without padding of its own behind them."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    start.conv.builtinOptions.padding = schema.Padding.VALID
    image = graph.tensors[start.tensor]
    start.conv.inputs = np.array([start.tensor, *start.conv.inputs[1:]], "int32")
    if not start.pads.any():
        return []

    def activation(name: str, pads: np.ndarray, channels: int) -> int:
        shape = [int(n) + int(pad.sum()) for n, pad in zip(image.shape, pads, strict=True)]
        shape[3] = channels
        batch = image.shape if image.shapeSignature is None else image.shapeSignature
        return add_tensor(model, name, shape, image.type, image.quantization, [int(batch[0]), *shape[1:]])

    def constant(name: str, value: Any, dtype: str, quantization: Any = None) -> int:
        array = np.asarray(value, dtype)
        kind = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}[dtype]
        return add_tensor(model, name, array.shape, kind, quantization, None, array.tobytes())

    pads = constant("border", start.pads, "int32")
    pad_code = _code_of(model, "PADV2", 2)
    none, channels = np.zeros((4, 2), int), len(border)
    if len(set(border)) == 1:
        one = activation("pixels_and_border", start.pads, channels)
        value = constant("border_value", border[0], "int8", image.quantization)
        start.conv.inputs[0] = one
        return [_operator(pad_code, [start.tensor, pads, value], [one], "PadV2Options")]
    parts = [activation(f"pixels_{i}", none, 1) for i in range(channels)]
    made = [activation(f"pixels_and_border_{i}", start.pads, 1) for i in range(channels)]
    whole = activation("pixels_and_border", start.pads, channels)
    start.conv.inputs[0] = whole
    split = _operator(_code_of(model, "SPLIT", 2), [constant("axis", 3, "int32"), start.tensor], parts, "SplitOptions")
    split.builtinOptions.numSplits = channels
    values = [constant(f"border_value_{i}", value, "int8", image.quantization) for i, value in enumerate(border)]
    join = _operator(_code_of(model, "CONCATENATION", 2), made, [whole], "ConcatenationOptions")
    join.builtinOptions.axis = 3
    padded = [
        _operator(pad_code, [part, pads, value], [one], "PadV2Options")
        for part, value, one in zip(parts, values, made, strict=True)
    ]
    return [split, *padded, join]


def joined(content: bytes, behind: bytes) -> bytes:
    """One file of two: the second runs on the outputs of the first, integers among them as real numbers.

    Args:
        content: of a `.tflite` file, with one signature.
        behind: of another one, whose inputs are called as the outputs of the first are.

    Returns:
        A `.tflite` file with the inputs of the first and the outputs of the second.
    """
    model, other = read_file(content), read_file(behind)
    (graph,), (last,) = model.subgraphs, other.subgraphs
    (signature,), (end,) = model.signatureDefs, other.signatureDefs
    ends = {one.name: graph.tensors[one.tensorIndex] for one in signature.outputs}
    numbers_of = {one.name: one.tensorIndex for one in signature.outputs}
    codes, buffers, count = len(model.operatorCodes), len(model.buffers), len(graph.tensors)
    model.operatorCodes += other.operatorCodes
    model.buffers += other.buffers
    graph.tensors += last.tensors
    for tensor in last.tensors:
        tensor.buffer += buffers
    number = {-1: -1, **{i: i + count for i in range(len(last.tensors))}}
    between = []
    for one in end.inputs:
        if ends[one.name].type == last.tensors[one.tensorIndex].type:
            number[one.tensorIndex] = numbers_of[one.name]
            continue
        code = _code_of(model, "DEQUANTIZE", 2)
        given, made = numbers_of[one.name], number[one.tensorIndex]
        between.append(_operator(code, [given], [made], "DequantizeOptions"))
    for operator in last.operators:
        operator.opcodeIndex += codes
        for name in ("inputs", "outputs"):
            setattr(operator, name, np.array([number[int(i)] for i in getattr(operator, name)], "int32"))
    graph.operators = [*graph.operators, *between, *last.operators]
    for one in end.outputs:
        one.tensorIndex = number[one.tensorIndex]
    signature.outputs = end.outputs
    graph.outputs = np.array([one.tensorIndex for one in end.outputs], "int32")
    drop_unused(model)
    return file_of(model)


def _code(model: Any, operator: Any) -> Any:
    return model.operatorCodes[operator.opcodeIndex]


def operator_name(model: Any, operator: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    code = _code(model, operator)
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return next(name for name, value in vars(schema.BuiltinOperator).items() if value == number)


def _code_of(model: Any, name: str, version: int) -> int:
    """The number of an operator's entry, which is made where there is none."""
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, name)
    for i, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number and code.version >= version:
            return i
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = number
    code.version = version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _operator(code: int, inputs: Sequence[int], outputs: Sequence[int], options: str) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.OperatorT()
    made.opcodeIndex = code
    made.inputs, made.outputs = np.array(inputs, "int32"), np.array(outputs, "int32")
    made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
    made.builtinOptions = getattr(schema, f"{options}T")()
    return made


def add_tensor(
    model: Any, name: str, shape: Any, kind: int, quantization: Any, signature: Any = None, data: bytes | None = None
) -> int:
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.quantization = name.encode(), kind, quantization
    tensor.shape = np.array(shape, "int32")
    tensor.shapeSignature = None if signature is None else np.array(signature, "int32")
    tensor.hasRank = True
    tensor.buffer = _add_buffer(model, data)
    model.subgraphs[0].tensors.append(tensor)
    return len(model.subgraphs[0].tensors) - 1


def _add_buffer(model: Any, data: bytes | None) -> int:
    from ai_edge_litert import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = None if data is None else np.frombuffer(data, "uint8")
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def numbers(model: Any, tensor: Any) -> np.ndarray | None:
    """A constant's real numbers in float64; None for what is computed, or of another type."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {"FLOAT32": "float32", "INT8": "int8", "INT32": "int32"}
    dtype = next((d for name, d in kinds.items() if getattr(schema.TensorType, name) == tensor.type), None)
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or dtype is None:
        return None
    shape = () if tensor.shape is None else tuple(tensor.shape)
    values = np.frombuffer(np.asarray(data, "uint8").tobytes(), dtype).reshape(shape).astype("float64")
    how = tensor.quantization
    if how is None or how.scale is None or not len(how.scale):
        return values
    step, zero = np.asarray(how.scale, "float64"), np.asarray(how.zeroPoint, "float64")
    if len(step) > 1:
        along = [1] * values.ndim
        along[how.quantizedDimension] = -1
        step, zero = step.reshape(along), zero.reshape(along)
    return (values - zero) * step


def _set(model: Any, tensor: Any, values: np.ndarray, dtype: str, steps: np.ndarray) -> None:
    """Gives a constant other integers, with a step for each of its first axis."""
    # A buffer of its own: constants that are alike, such as biases of zeros, share one.
    tensor.buffer = _add_buffer(model, values.astype(dtype).tobytes())
    how = tensor.quantization
    how.scale, how.zeroPoint = steps.astype("float32"), np.zeros(len(steps), "int64")
    how.quantizedDimension, how.min, how.max = 0, None, None


def drop_unused(model: Any) -> None:
    """Leaves out the tensors that no operator reads or writes, and empties their buffers."""
    graph = model.subgraphs[0]
    used = {int(i) for o in graph.operators for i in (*o.inputs, *o.outputs)} | {-1}
    used |= {int(i) for i in (*graph.inputs, *graph.outputs)}
    kept = [i for i in range(len(graph.tensors)) if i in used]
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}
    buffers = {
        tensor.buffer for g in model.subgraphs for i, tensor in enumerate(g.tensors) if g is not graph or i in used
    }
    buffers |= {entry.buffer for entry in model.metadata or ()}
    for i, buffer in enumerate(model.buffers):
        if i not in buffers:
            buffer.data = None
    graph.tensors = [graph.tensors[i] for i in kept]
    for holder in (graph, *graph.operators):
        for name in ("inputs", "outputs"):
            setattr(holder, name, np.array([number[int(i)] for i in getattr(holder, name)], "int32"))
    for signature in model.signatureDefs or ():
        for one in (*signature.inputs, *signature.outputs):
            one.tensorIndex = number[one.tensorIndex]
