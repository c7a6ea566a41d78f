"""What runs: a convolution with its batch norm and activation in one go, and blocks of these in chunks.

The layers of `keras_mnv2.layers.parts` are one operation each, as people look for them. Here they are read as units, a
convolution with what lies around it, and units as blocks. Either a graph of layers is read once (`Plan`), or the calls
of layers as they come (`Call`): both through `read_block`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras

from keras_mnv2 import ops
from keras_mnv2.annotations import Shape, Tensor
from keras_mnv2.norms import is_plain_batch_norm
from keras_mnv2.ops.padding import Padding


@dataclass(eq=False, slots=True)
class Unit:
    """A convolution with the padding before it, and the normalisation and activation behind it.

    Attributes:
        conv: layer with `kernel`, `bias`, `compute_dtype` and `variable_dtype`.
        norm: normalisation layer, or None.
        activation: an `Activation`, or None.
        depthwise: whether the convolution is.
        stride: of both sides.
        padding: of `keras_mnv2.ops.padding`.
        dilation: of both sides.
        data_format: `"channels_last"` or `"channels_first"`.
        filters: output channels.
        tensors: of the variables, as `ops.train_block` keeps them.
    """

    conv: Any
    norm: Any
    activation: "Activation | None"
    depthwise: bool
    stride: int
    padding: Padding
    dilation: int
    data_format: str
    filters: int
    tensors: Any = field(default=None, init=False)
    plain_norm: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain_norm = self.norm is not None and is_plain_batch_norm(self.norm, self.data_format)

    def __call__(self, x: Tensor, training: bool | None = None, own: bool = False) -> Tensor:
        """Computes it; in inference the batch norm is folded into the kernel (Jacob et al. 2018, section 3.2).

        Args:
            x: images.
            training: as in Keras.
            own: whether to take the layers' own tensors, as `Cache` has them, in the place of what Keras's variables
                stand for at the moment.
        """
        norm = self.norm
        if training and norm is not None and (found := ops.train_block((self,), x, False)) is not None:
            return found
        kernel, bias = self._parameters(own)
        if norm is None:
            y = self.convolve(x, kernel, bias)
        elif not self.plain_norm or ops.is_watched(norm) or (bias is not None and not training):
            y = norm(self.convolve(x, kernel, bias), training=training)
        elif training and norm.trainable:
            y = normalize_by_batch(norm, self.convolve(x, kernel, bias), self.data_format)
        else:
            y = self.convolve(x, *ops.fold(kernel, self.depthwise, *self._of_norm(own), norm.epsilon))
        return y if self.activation is None else self.activation(y)

    def prepare(self, x: Tensor, own: bool = False) -> Callable[[Tensor], Tensor]:
        """What computes it in inference for several parts of a batch; the kernel is folded and laid out once.

        Args:
            x: images of the same dtype.
            own: as for a call.
        """
        norm, activation = self.norm, self.activation
        kernel, bias = self._parameters(own)
        if norm is not None:
            if not self.plain_norm or ops.is_watched(norm) or bias is not None:
                return lambda y: self(y, False, own)
            kernel, bias = ops.fold(kernel, self.depthwise, *self._of_norm(own), norm.epsilon)
        kernel, bias = self._cast(x, kernel, bias)
        kernel = ops.lay_out(kernel, self.depthwise)
        if activation is None:
            return lambda y: self._convolve(y, kernel, bias)
        return lambda y: activation(self._convolve(y, kernel, bias))

    def folded(self, kernel: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel and bias that compute the convolution and its batch norm with these statistics."""
        norm = self.norm
        return ops.fold(kernel, self.depthwise, norm.gamma.value, norm.beta.value, mean, variance, norm.epsilon)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution alone, in the layer's compute dtype."""
        return self._convolve(x, *self._cast(x, kernel, bias))

    def _parameters(self, own: bool) -> tuple[Tensor, Tensor | None]:
        conv = self.conv
        return (*conv.cache.tensors, None)[:2] if own else (value_of(conv.kernel), value_of(conv.bias))

    def _of_norm(self, own: bool) -> Sequence[Tensor]:
        return self.norm.cache.tensors if own else norm_values(self.norm)

    def _cast(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.conv.compute_dtype == self.conv.variable_dtype:
            return kernel, bias
        # The kernel has its own precision until here, so that folding has too.
        return keras.ops.cast(kernel, x.dtype), None if bias is None else keras.ops.cast(bias, x.dtype)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return ops.convolution(
            x,
            kernel,
            bias,
            depthwise=self.depthwise,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            data_format=self.data_format,
        )


def value_of(variable: Any) -> Tensor | None:
    """The tensor of a variable; a tensor, as a layer with LoRA has one in the place of its kernel, or None stays."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def norm_values(norm: Any) -> Sequence[Tensor]:
    """Scale, shift, moving mean and variance of a plain batch norm as tensors."""
    return [v.value for v in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)]


def normalize_by_batch(norm: Any, x: Tensor, data_format: str) -> Tensor:
    """A plain batch norm in training: by the statistics of the batch, which the moving ones follow."""
    gamma, beta, moving_mean, moving_variance = norm_values(norm)
    y, mean, variance = ops.batch_normalization(
        x, gamma, beta, norm.epsilon, data_format, synchronized=norm.synchronized
    )
    norm.moving_mean.assign(ops.moving_average(moving_mean, mean, norm.momentum))
    norm.moving_variance.assign(ops.moving_average(moving_variance, variance, norm.momentum))
    return y


class Activation:
    """What an activation layer computes; it may overwrite its input.

    Args:
        layer: with the settings of a ReLU, or with `activation`; they are read at each call, since a script may change
            them.
        call: what computes it where it is not ReLU6.
    """

    __slots__ = ("_call", "_layer")

    def __init__(self, layer: Any, call: Callable[[Tensor], Tensor]) -> None:
        self._layer = layer
        self._call = call

    @property
    def is_relu6(self) -> bool:
        """Whether it is `min(max(x, 0), 6)`."""
        layer = self._layer
        if isinstance(layer, keras.layers.ReLU):
            return layer.max_value == 6 and not layer.negative_slope and not layer.threshold
        return layer.activation is keras.activations.relu6

    def __call__(self, y: Tensor) -> Tensor:
        return ops.relu6(y) if self.is_relu6 else self._call(y)


class Group(NamedTuple):
    """The layers of one unit, and the tensor that it reads."""

    pad: Any
    conv: Any
    norm: Any
    activation: Any
    start: Tensor

    @property
    def layers(self) -> tuple:
        """Those that are there, in order."""
        return tuple(layer for layer in self[:4] if layer is not None)

    def unit(self) -> Unit:
        """What computes them; kept with the convolution, since the same layers follow it each time."""
        conv = self.conv
        members = tuple(map(id, self[:4]))
        if conv.cache.members == members:
            return conv.cache.unit
        activation = self.activation and Activation(self.activation, self.activation.call)
        if activation is None and conv.activation is not keras.activations.linear:
            activation = Activation(conv, conv.activation)
        depthwise = isinstance(conv, keras.layers.DepthwiseConv2D)
        unit = Unit(
            conv,
            self.norm,
            activation,
            depthwise,
            conv.strides[0],
            self.pad.padding if self.pad else conv.padding,
            conv.dilation_rate[0],
            conv.data_format,
            conv.kernel.shape[2 if depthwise else 3],
        )
        conv.cache.members, conv.cache.unit = members, unit
        return unit


class Block(NamedTuple):
    """Units that follow each other, from one narrow tensor to the next.

    Attributes:
        groups: of the layers of each unit, in order.
        start: the tensor that the first one reads.
        shortcut: whether `start` is added to what comes out.
    """

    groups: Sequence[Group]
    start: Tensor
    shortcut: bool


_ROLES = (
    ("conv", (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)),
    ("norm", (keras.layers.BatchNormalization,)),
    ("activation", (keras.layers.ReLU, keras.layers.Activation)),
    ("add", (keras.layers.Add,)),
    ("pad", (keras.layers.ZeroPadding2D,)),
)


def role_of(layer: Any) -> str | None:
    """What a layer is to a block: `"conv"`, `"norm"`, `"activation"`, `"add"`, `"pad"`, or None."""
    kind: Any = type(layer)
    return _role_of_class(kind)


@functools.cache
def _role_of_class(kind: Any) -> str | None:
    return next((role for role, kinds in _ROLES if issubclass(kind, kinds)), None)


def read_unit(call: Any, call_of: Callable[[Tensor], Any], free: Callable[[Tensor], bool]) -> Group | None:
    """The unit whose output is that of `call`, or None where it is no convolution with what may follow one.

    Args:
        call: has `layer` and `inputs`, a tuple of tensors.
        call_of: from a tensor to the call that it comes from, or None.
        free: whether nobody else reads a tensor, so that it need not exist.
    """

    def before(call: Any, role: str) -> Any:
        """The call that the input of `call` comes from, if it has that role."""
        x = call.inputs[0]
        found = call_of(x) if free(x) else None
        return found if found is not None and role_of(found.layer) == role else None

    pad = norm = activation = None
    role = role_of(call.layer)
    if role == "activation":
        activation = call.layer
        call = before(call, "norm") or before(call, "conv")
        role = call and role_of(call.layer)
    if role == "norm":
        norm = call.layer
        call = before(call, "conv")
        role = call and role_of(call.layer)
    if role != "conv" or not is_square(call.layer):
        return None
    conv = call.layer
    if (norm or activation) and conv.activation is not keras.activations.linear:
        return None
    if conv.padding == "valid" and (padded := before(call, "pad")):
        pad, call = padded.layer, padded
    return Group(pad, conv, norm, activation, call.inputs[0])


def read_block(call: Any, call_of: Callable[[Tensor], Any], free: Callable[[Tensor], bool]) -> Block | None:
    """The block whose output is that of `call`, or None where it is none; arguments as for `read_unit`."""
    if role_of(call.layer) == "add" and len(call.inputs) == 2:
        for start, branch in (call.inputs, call.inputs[::-1]):
            last = call_of(branch) if free(branch) else None
            if last is not None:
                groups, found = _chain(last, call_of, free, start)
                if groups and found is start:
                    return Block(groups, start, True)
        return None
    groups, start = _chain(call, call_of, free, None)
    return Block(groups, start, False) if groups else None


def _chain(
    call: Any, call_of: Callable[[Tensor], Any], free: Callable[[Tensor], bool], until: Tensor | None
) -> tuple[list[Group], Tensor | None]:
    """Units up to that of `call`, the first of which reads `until` or the narrow end of another block."""
    groups: list[Group] = []
    while call is not None and (group := read_unit(call, call_of, free)):
        groups.insert(0, group)
        call = call_of(group.start) if free(group.start) and group.start is not until else None
        if call is not None and role_of(call.layer) != "activation":
            call = None
    return groups, groups[0].start if groups else None


def is_square(conv: Any) -> bool:
    """Whether a convolution of Keras is one that `Unit` knows: equal sides, and no groups but depthwise ones."""
    equal = len(set(conv.strides)) == len(set(conv.dilation_rate)) == 1
    whole = conv.depth_multiplier == 1 if isinstance(conv, keras.layers.DepthwiseConv2D) else conv.groups == 1
    return equal and whole and (conv.strides[0] == 1 or conv.dilation_rate[0] == 1) and conv.padding != "causal"


def is_plain(layer: Any) -> bool:
    """Whether a layer does what its class says and nobody watches it do so."""
    # Directly, since PyTorch's modules search long for an attribute that is not there.
    own = vars(layer)
    return (
        own.get("activity_regularizer") is None
        and "call" not in own
        and not own.get("lora_enabled")
        # Nothing public tells what keras.RematScope has set.
        and own.get("_remat_mode") is None
        and getattr(layer, "quantization_mode", None) is None
        and not ops.is_watched(layer)
    )


class Call:
    """A call of a layer of one operation in inference, which may be computed as part of a block.

    Attributes:
        layer: the layer.
        inputs: a tuple of tensors.
        shape: of the output; (batch, ...).
        value: the output, once it is computed.
        device: of the output, on PyTorch.
        versions: of what it reads, at the time of the call, where the backend counts them.
    """

    __slots__ = ("device", "inputs", "layer", "shape", "value", "versions")

    def __init__(self, layer: Any, inputs: tuple[Tensor, ...], shape: Shape | None = None, device: Any = None) -> None:
        self.layer = layer
        self.inputs = inputs
        self.shape = shape
        self.device = device
        self.versions: Any = None
        self.value: Any = None

    @property
    def ends_block(self) -> bool:
        """Whether the output is narrow, and not in the middle of a block."""
        return role_of(self.layer) in ("norm", "add", "conv")

    def evaluate(self, computed: Tensor | None = None) -> Tensor:
        """The output; `computed` is it, where it is known and the layer is at the end of no block.

        Raises:
            RuntimeError: where the numbers that it reads have changed since the call.
        """
        if self.value is None:
            block = read_block(self, _pending, _always)
            if block is not None:
                # Of blocks before this one first, so that the check ends there.
                x = ops.settled(block.start)
                self._check_versions()
                units = [group.unit() for group in block.groups]
                self.value = run_block(units, x, block.shortcut, False, units[0].data_format, self.versions is not None)
            elif computed is not None:
                self.value = computed
            else:
                inputs = [ops.settled(x) for x in self.inputs]
                self._check_versions()
                self.value = self.layer.call(inputs if len(inputs) > 1 else inputs[0], training=False)
            self.inputs = ()
        return self.value

    def _check_versions(self) -> None:
        if self.versions is not None and self.versions != ops.versions(self):
            raise RuntimeError(
                f"The output of the layer {self.layer.name!r} was not read before its weights or images were changed: "
                "read it first, or call the model outside torch.no_grad()."
            )
        for x in self.inputs:
            if (call := _pending(x)) is not None:
                call._check_versions()


def _pending(x: Tensor) -> Any:
    call = ops.call_of(x)
    return call if call is not None and call.inputs else None


def _always(x: Tensor) -> bool:
    return True


class Plan:
    """A functional model read once, to be run as blocks and, for what is none, layer by layer.

    Args:
        model: the model; what `read` gives fits it for as long as its graph stays.
    """

    def __init__(self, steps: list[tuple], image: int, outputs: list[int], layers: list[Any]) -> None:
        self._steps = steps
        self._image = image
        self._outputs = outputs
        self._layers = layers

    @classmethod
    def read(cls, model: keras.Model) -> "Plan | None":
        """The plan of a model, or None where it has more inputs than one or layers that are not known here."""
        calls: dict[int, Call] = {}
        readers: dict[int, int] = {}
        for layer in model.layers:
            if isinstance(layer, keras.layers.InputLayer):
                continue
            if not isinstance(layer, (Part, *_SIMPLE)) or len(keras.tree.flatten(layer.output)) != 1:
                return None
            inputs = tuple(keras.tree.flatten(layer.input))
            calls[id(layer.output)] = Call(layer, inputs)
            for x in inputs:
                readers[id(x)] = readers.get(id(x), 0) + 1
        if len(model.inputs) != 1 or not any(isinstance(call.layer, Part) for call in calls.values()):
            return None
        for x in model.outputs:
            readers[id(x)] = readers.get(id(x), 0) + 1
        steps: list[tuple] = []
        done = {id(model.inputs[0])}

        def add(x: Tensor) -> bool:
            if id(x) in done:
                return True
            if id(x) not in calls:
                return False  # A layer that is called more than once, or an operation that is no layer.
            call = calls[id(x)]
            block = read_block(call, lambda x: calls.get(id(x)), lambda x: readers[id(x)] == 1)
            if block and all(isinstance(group.conv, Part) for group in block.groups):
                sources, step = (block.start,), ([group.unit() for group in block.groups], block.shortcut)
            else:
                takes_training = "training" in inspect.signature(call.layer.call).parameters
                sources, step = call.inputs, (call.layer, takes_training)
            if not all(map(add, sources)):
                return False
            steps.append((step, [id(source) for source in sources], id(x)))
            done.add(id(x))
            return True

        if not all(map(add, model.outputs)):
            return None
        return cls(steps, id(model.inputs[0]), [id(x) for x in model.outputs], [c.layer for c in calls.values()])

    def may_run(self) -> bool:
        """Whether nobody looks inside: then layers need not be called one by one."""
        return all(map(is_plain, self._layers)) and keras.distribution.distribution() is None

    def __call__(self, x: Tensor, training: bool | None = None) -> list[Tensor]:
        """The model's outputs, in their order."""
        tensors = {self._image: x}
        for (what, flag), sources, target in self._steps:
            values = [tensors[source] for source in sources]
            if isinstance(what, list):
                images = values[0]
                if (dtype := what[0].conv.compute_dtype) != keras.backend.standardize_dtype(images.dtype):
                    images = keras.ops.cast(images, dtype)
                tensors[target] = run_block(what, images, flag, training, what[0].data_format)
            else:
                tensors[target] = _call_layer(what, flag, values if len(values) > 1 else values[0], training)
        return [tensors[output] for output in self._outputs]


def _call_layer(layer: Any, takes_training: bool, inputs: Any, training: bool | None) -> Any:
    """Calls a layer, without Keras's bookkeeping where that finds nothing to do."""
    keywords = {"training": training} if takes_training and training is not None else {}
    return (layer.call if ops.runs_directly(layer, inputs) else layer)(inputs, **keywords)


class Cache:
    """What a layer of one operation knows: its unit, the layers of that, shapes, variables and their tensors."""

    def __init__(self) -> None:
        self.variables: list = []
        self.tensors: list = []
        self.unit: Any = None
        self.members: tuple = ()
        self.shapes: dict[tuple, tuple] = {}


class Part(keras.layers.Layer):
    """A layer of one operation: the mark of the classes in `keras_mnv2.layers.parts`, which have a `cache`."""

    cache: Cache


class Simple(keras.layers.Layer):
    """A layer that a plan calls as it is."""


# Layers that a model of this package may have besides.
_SIMPLE = (
    Simple,
    keras.layers.Concatenate,
    keras.layers.Rescaling,
    keras.layers.Normalization,
    keras.layers.Dropout,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.Dense,
    keras.layers.Activation,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
)


def run_block(
    units: Sequence[Unit], x: Tensor, shortcut: bool, training: bool | None, data_format: str, own: bool = False
) -> Tensor:
    """Units one after the other, and their input added to what comes out where `shortcut` says so.

    Args:
        units: `Unit`s.
        x: images, NHWC (or NCHW with `data_format="channels_first"`).
        shortcut: whether to add `x`.
        training: as in Keras.
        data_format: of `x`.
        own: as for `Unit`.
    """

    def run(x: Tensor) -> Tensor:
        y = x
        for compute in computed:
            y = compute(y)
        return y + x if shortcut else y

    sides = x.shape[1:3] if data_format == "channels_last" else x.shape[2:4]
    if training and (found := ops.train_block(units, x, shortcut)) is not None:
        return found
    computed: list[Callable[[Tensor], Tensor]]
    if training:
        computed = [functools.partial(unit, training=training, own=own) for unit in units]
        return run(x)
    computed = [unit.prepare(x, own) for unit in units]
    if None in sides:
        return run(x)
    largest, pixels = 0, math.prod(sides)
    for unit in units:
        # A depthwise convolution reads as many channels as it writes, at the pixels before its stride.
        pixels = pixels if unit.depthwise else pixels // unit.stride**2
        largest = max(largest, pixels * unit.filters)
        pixels = pixels // unit.stride**2 if unit.depthwise else pixels
    return ops.block_in_chunks(run, x, largest)
