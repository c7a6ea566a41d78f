"""From the plan to a functional Keras model."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_mnv2.architecture import Row
from keras_mnv2.arguments import activation_function
from keras_mnv2.initializers import Normal
from keras_mnv2.layers import ConvNormActivation


def feature_names(rows: Sequence[Row]) -> dict[str, str]:
    """The names that `features` knows, each with the name of the row that gives the tensor.

    `stride_S` is the last block of output stride S; `block_N_expand` the expanded input of a block.
    """
    names = {row.endpoint: row.name for row in rows if row.endpoint}
    names |= {row.name: row.name for row in rows}
    names |= {f"{row.name}_expand": row.name for row in rows if row.kind == "block" and row.expansion != 1}
    return names


def apply_rows(
    x: Any,
    rows: Sequence[Row],
    block: Callable[..., keras.layers.Layer],
    stochastic_depth: float,
    features: Sequence[str] = (),
    **common: Any,
) -> tuple[Any, dict[str, Any]]:
    """Runs `x` through one layer a row.

    Args:
        x: Keras tensor, NHWC or NCHW.
        rows: of `keras_mnv2.architecture.plan`.
        block: makes the layer of a block row, with the arguments of `InvertedResidual`.
        stochastic_depth: rate of the last block; it rises linearly from 0 (Huang et al. 2016).
        features: names of `feature_names` whose tensors are wanted; rows behind the last are left out.
        **common: arguments that every layer takes.

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
        if row.kind == "block":
            extra: dict[str, Any] = {}
            if stochastic_depth and len(blocks) > 1:
                extra["stochastic_depth"] = stochastic_depth * blocks.index(row.name) / (len(blocks) - 1)
            if row.stride == 1 and row.in_channels == row.channels and not row.residual:
                extra["shortcut"] = None
            if f"{row.name}_expand" in features:
                extra["return_expansion"] = True
            layer = block(
                row.channels,
                stride=row.stride,
                expand_ratio=row.expansion,
                dilation_rate=row.dilation,
                name=row.name,
                **common,
                **extra,
            )
            x = layer(x)
            if extra.get("return_expansion"):
                x, tensors[f"{row.name}_expand"] = x
        else:
            kernel_size = 3 if row.kind == "stem" else 1
            x = ConvNormActivation(row.channels, kernel_size=kernel_size, stride=row.stride, name=row.name, **common)(x)
        tensors[row.name] = x
    return x, {name: tensors[name if name.endswith("_expand") else sources[name]] for name in features}


def classify(x: Any, classes: int, dropout: float, activation: Any, data_format: str, policy: keras.DTypePolicy) -> Any:
    """Pooling, dropout and the classifier, as torchvision's and Keras's top.

    In mixed precision the classifier computes in float32, so that the softmax and the loss are exact.
    """
    x = keras.layers.GlobalAveragePooling2D(data_format=data_format, name="global_pool", dtype=policy)(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout", dtype=policy)(x)
    return keras.layers.Dense(
        classes,
        activation=activation_function("classifier_activation", activation),
        kernel_initializer=Normal(0.01),
        dtype=policy.variable_dtype,
        name="predictions",
    )(x)
