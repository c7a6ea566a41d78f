"""From the plan to a functional Keras model: the graph of the network."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_mnv2.annotations import Tensor
from keras_mnv2.architecture import Row
from keras_mnv2.arguments import activation_function
from keras_mnv2.initializers import Normal
from keras_mnv2.layers.block import Convolution, convolutions, join
from keras_mnv2.layers.compact import ConvNormActivation, kernel_initializer, make_norm
from keras_mnv2.layers.parts import Add, Conv2D, DepthwiseConv2D, ReLU, ZeroPadding2D
from keras_mnv2.ops.padding import spatial_padding

# Of the kernels that predict boxes and classes: the authors' configuration of SSDLite, and torchvision.
PREDICTION_STDDEV = 0.03


def feature_names(rows: Sequence[Row]) -> dict[str, str]:
    """The names that `features` knows, each with the name of the row that gives the tensor.

    `stride_S` is the last block of output stride S; `block_N_expand` the expanded input of a block.
    """
    names = {row.endpoint: row.name for row in rows if row.endpoint}
    names |= {row.name: row.name for row in rows}
    names |= {f"{row.name}_expand": row.name for row in rows if row.kind == "block" and row.expansion != 1}
    return names


def apply_rows(
    x: Tensor,
    rows: Sequence[Row],
    block: Callable[..., keras.layers.Layer] | None,
    stochastic_depth: float,
    features: Sequence[str] = (),
    **common: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs `x` through the rows.

    Args:
        x: Keras tensor, NHWC or NCHW.
        rows: of `keras_mnv2.architecture.plan`.
        block: makes the layer of a block row, with the arguments of `InvertedResidual`; None for a layer each
            operation.
        stochastic_depth: rate of the last block; it rises linearly from 0 (Huang et al. 2016).
        features: names of `feature_names` whose tensors are wanted; rows behind the last are left out.
        **common: arguments that every layer takes, of `InvertedResidual`.

    Returns:
        The last row's tensor, and the wanted tensors by name.
    """
    sources = feature_names(rows)
    wanted = {sources[name] for name in features}
    if wanted:
        last = max(i for i, row in enumerate(rows) if row.name in wanted)
        rows = rows[: last + 1]
    blocks = [row.name for row in rows if row.kind == "block"]
    tensors = {}
    for row in rows:
        drop = 0.0
        if row.kind == "block" and stochastic_depth and len(blocks) > 1:
            drop = stochastic_depth * blocks.index(row.name) / (len(blocks) - 1)
        if block is None:
            x, tensors[f"{row.name}_expand"] = _open_row(x, row, drop, **common)
        elif row.kind == "block":
            extra: dict[str, Any] = {"stochastic_depth": drop} if drop else {}
            if row.stride == 1 and row.in_channels == row.channels and not row.residual:
                extra["shortcut"] = None
            if f"{row.name}_expand" in features:
                extra["return_expansion"] = True
            x = _made(
                block,
                row.channels,
                stride=row.stride,
                expand_ratio=row.expansion,
                dilation_rate=row.dilation,
                name=row.name,
                **common,
                **extra,
            )(x)
            if extra.get("return_expansion"):
                x, tensors[f"{row.name}_expand"] = x
        else:
            kernel_size = 3 if row.kind == "stem" else 1
            x = ConvNormActivation(row.channels, kernel_size=kernel_size, stride=row.stride, name=row.name, **common)(x)
        tensors[row.name] = x
    return x, {name: tensors[name if name.endswith("_expand") else sources[name]] for name in features}


def _made(block: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """The layer that the caller's `block` makes."""
    try:
        layer = block(*args, **arguments)
    except TypeError as error:
        told = "block must take the arguments of keras_mnv2.layers.InvertedResidual and give a Keras layer"
        raise ValueError(f"{told}, got {block!r}: {error}.") from error
    if not callable(layer):
        raise ValueError(f"block must give a Keras layer, got {layer!r} from {block!r}.")
    return layer


class _Names(NamedTuple):
    """Of the layers of a unit; `batch_norm` or, of another normalisation, `norm`."""

    conv: str
    batch_norm: str
    norm: str
    activation: str
    pad: str


# keras.applications' names for what is no block.
_ENDS = {
    "stem": _Names("Conv1", "bn_Conv1", "Conv1_norm", "Conv1_relu", "Conv1_pad"),
    "head": _Names("Conv_1", "Conv_1_bn", "Conv_1_norm", "out_relu", "Conv_1_pad"),
}


def _names(prefix: str, part: str) -> _Names:
    name = f"{prefix}_{part}" if part else prefix
    return _Names(name, f"{name}_BN", f"{name}_norm", f"{name}_relu", f"{prefix}_pad")


def _open_row(x: Tensor, row: Row, drop: float, **common: Any) -> tuple[Tensor, Tensor]:
    """A row as a layer each operation, with the names of `keras.applications`: its output and its expanded input."""
    if row.kind != "block":
        kernel_size = 3 if row.kind == "stem" else 1
        spec = Convolution("", row.channels, kernel_size, row.stride, 1, False, True)
        y = _unit(x, spec, _ENDS[row.name], **common)
        return y, y
    specs = convolutions(row.in_channels, row.channels, row.stride, row.expansion, row.dilation)
    return _open_block(x, row.name, specs, "bottleneck" if row.residual else None, drop, **common)


def _open_block(
    x: Tensor,
    name: str,
    specs: Sequence[Convolution],
    shortcut: str | None,
    drop: float,
    make: Callable[..., Any] | None = None,
    **common: Any,
) -> tuple[Tensor, Tensor]:
    make = make or (lambda kind, *args, **arguments: kind(*args, **arguments))
    prefix = name if name != "block_0" else "expanded_conv"
    dtype = common["dtype"]

    def part(spec: Convolution) -> Callable[[Tensor], Tensor]:
        return lambda x: _unit(x, spec, _names(prefix, spec.part), make=make, **common)

    def add(shortcut: Tensor, branch: Tensor) -> Tensor:
        if drop:
            shape = (None, 1, 1, 1)
            branch = make(keras.layers.Dropout, drop, noise_shape=shape, name=f"{prefix}_drop", dtype=dtype)(branch)
        return make(Add, name=f"{prefix}_add", dtype=dtype)([shortcut, branch])

    return join(x, {spec.part: part(spec) for spec in specs}, add, shortcut)


def apply_layer(x: Tensor, layer: keras.layers.Layer, make: Callable[..., Any]) -> Tensor | tuple[Tensor, Tensor]:
    """A layer of several operations, `ConvNormActivation` or `InvertedResidual`, as layers of one operation each.

    Args:
        x: Keras tensor.
        layer: built; its weights are not copied.
        make: makes a layer from its class and arguments.

    Returns:
        Its output, or the pair that it gives with `return_expansion`.
    """
    own = ("padding", "norm_layer", "norm_momentum", "norm_epsilon", "data_format", "activation")
    common = {name: getattr(layer, name) for name in own} | {"dtype": layer.dtype_policy, "make": make}
    if isinstance(layer, ConvNormActivation):
        activated = layer.activation is not keras.activations.linear
        size, depthwise = layer.kernel_size, layer.groups > 1
        spec = Convolution("", layer.filters, size, layer.stride, layer.dilation_rate, depthwise, activated)
        return _unit(x, spec, _ENDS.get(layer.name) or _names(layer.name, ""), **common)
    channels = x.shape[-1 if layer.data_format == "channels_last" else 1]
    specs = convolutions(
        channels, layer.filters, layer.stride, layer.expand_ratio, layer.dilation_rate, layer.linear_bottleneck
    )
    shortcut = layer.shortcut if layer.residual else None
    pair = _open_block(x, layer.name, specs, shortcut, layer.stochastic_depth, **common)
    return pair if layer.return_expansion else pair[0]


def _unit(
    x: Tensor,
    spec: Convolution,
    names: _Names,
    *,
    padding: str,
    activation: Callable[..., Any],
    norm_layer: str | dict[str, Any] | None,
    norm_momentum: float,
    norm_epsilon: float,
    data_format: str,
    dtype: keras.DTypePolicy,
    make: Callable[..., Any] = lambda kind, *args, **arguments: kind(*args, **arguments),
) -> Tensor:
    """A convolution with its padding, normalisation and activation."""
    own = {"data_format": data_format, "dtype": dtype}
    # keras.applications' head has Keras's default, which for a kernel of one pixel is the same.
    keras_padding = "valid" if padding == "valid" or names is _ENDS["head"] else "same"
    if spec.stride > 1 and spec.kernel_size > 1 and (spec.depthwise or padding == "symmetric"):
        size = x.shape[1:3] if data_format == "channels_last" else x.shape[2:4]
        zeros = spatial_padding(padding, (spec.kernel_size,) * 2, size, spec.stride, spec.dilation)
        # With sides that are not known yet TensorFlow's zeros are not either: the convolution finds them itself.
        keras_padding = "valid" if zeros is not None else "same"
        x = make(ZeroPadding2D, tuple(map(tuple, zeros or ((0, 0), (0, 0)))), name=names.pad, **own)(x)
    arguments: dict[str, Any] = {
        "kernel_size": spec.kernel_size,
        "strides": spec.stride,
        "padding": keras_padding,
        "dilation_rate": spec.dilation,
        "use_bias": norm_layer is None,
        "name": names.conv,
        **own,
    }
    initializer = kernel_initializer(spec.kernel_size, spec.filters)
    if spec.depthwise:
        x = make(DepthwiseConv2D, depthwise_initializer=initializer, **arguments)(x)
    else:
        x = make(Conv2D, spec.filters, kernel_initializer=initializer, **arguments)(x)
    name = names.batch_norm if norm_layer in ("batch_norm", "sync_batch_norm") else names.norm
    norm = make_norm(
        norm_layer, spec.filters, norm_momentum, norm_epsilon, data_format, make=make, name=name, dtype=dtype
    )
    if norm is not None:
        x = norm(x)
    if not spec.activated or activation is keras.activations.linear:
        return x
    if activation in (keras.activations.relu6, keras.activations.relu):
        limit = 6.0 if activation is keras.activations.relu6 else None
        return make(ReLU, limit, name=names.activation, dtype=dtype)(x)
    return make(keras.layers.Activation, activation, name=names.activation, dtype=dtype)(x)


def unit(x: Tensor, name: str, filters: int, kernel_size: int = 1, dilation: int = 1, **common: Any) -> Tensor:
    """A convolution of stride 1 with its normalisation and activation, as layers of one operation each.

    Args:
        x: Keras tensor, NHWC or NCHW.
        name: of the convolution; that of its batch norm ends in `_BN`, that of its activation in `_relu`.
        filters: output channels.
        kernel_size: of both sides.
        dilation: of both sides.
        **common: as for `apply_rows`.
    """
    return _unit(x, Convolution("", filters, kernel_size, 1, dilation, False, True), _names(name, ""), **common)


def apply_extra(x: Tensor, row: Row, **common: Any) -> Tensor:
    """An extra layer of a detector, as layers of one operation each; arguments as for `apply_rows`."""
    specs = (
        Convolution("reduce", row.hidden_channels, 1, 1, 1, False, True),
        Convolution("depthwise", row.hidden_channels, 3, row.stride, 1, True, True),
        Convolution("project", row.channels, 1, 1, 1, False, True),
    )
    for spec in specs:
        x = _unit(x, spec, _names(row.name, spec.part), **common)
    return x


def apply_prediction(x: Tensor, row: Row, **common: Any) -> Tensor:
    """A separable prediction of a detector, as layers of one operation each; arguments as for `apply_rows`.

    In mixed precision the last convolution computes in float32, so that the scores and the losses are exact.
    """
    spec = Convolution("depthwise", row.in_channels, 3, 1, 1, True, True)
    x = _unit(x, spec, _names(row.name, spec.part), **common)
    own = {"data_format": common["data_format"], "dtype": common["dtype"].variable_dtype}
    return Conv2D(row.channels, 1, kernel_initializer=Normal(PREDICTION_STDDEV), name=f"{row.name}_project", **own)(x)


def classify(
    x: Tensor,
    classes: int,
    dropout: float,
    activation: str | Callable[..., Any] | None,
    data_format: str,
    policy: keras.DTypePolicy,
) -> Tensor:
    """Pooling, dropout and the classifier, as torchvision's and Keras's top.

    In mixed precision the classifier computes in float32, so that the softmax and the loss are exact.
    """
    x = keras.layers.GlobalAveragePooling2D(data_format=data_format, dtype=policy)(x)
    if dropout:
        x = keras.layers.Dropout(dropout, dtype=policy)(x)
    return keras.layers.Dense(
        classes,
        activation=activation_function("classifier_activation", activation),
        kernel_initializer=Normal(0.01),
        dtype=policy.variable_dtype,
        name="predictions",
    )(x)
