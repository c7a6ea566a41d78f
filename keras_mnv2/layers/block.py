"""The inverted residual (Sandler et al. 2018, Table 1) as a definition: its convolutions, and how they are joined.

The graph of Keras's layers (`keras_mnv2.build`) and the block as one layer (`keras_mnv2.layers.compact`) follow it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from keras_mnv2.annotations import Tensor
from keras_mnv2.architecture import hidden_channels

SHORTCUTS = ("bottleneck", "expansion", None)


class Convolution(NamedTuple):
    """One of a block's convolutions, each of which has a normalisation.

    Attributes:
        part: `"expand"`, `"depthwise"` or `"project"`.
        filters: output channels.
        kernel_size: side of the kernel.
        stride: of both sides.
        dilation: of both sides.
        depthwise: whether it filters each channel alone.
        activated: whether an activation follows.
    """

    part: str
    filters: int
    kernel_size: int
    stride: int
    dilation: int
    depthwise: bool
    activated: bool


def convolutions(
    in_channels: int, filters: int, stride: int, expand_ratio: float, dilation_rate: int, linear_bottleneck: bool = True
) -> tuple[Convolution, ...]:
    """The convolutions of a block in order; arguments as for `keras_mnv2.layers.InvertedResidual`."""
    hidden = hidden_channels(in_channels, expand_ratio)
    expand = Convolution("expand", hidden, 1, 1, 1, False, True)
    depthwise = Convolution("depthwise", hidden, 3, stride, dilation_rate, True, True)
    project = Convolution("project", filters, 1, 1, 1, False, not linear_bottleneck)
    return (depthwise, project) if expand_ratio == 1 else (expand, depthwise, project)


def join(
    x: Tensor,
    parts: Mapping[str, Callable[[Tensor], Tensor]],
    add: Callable[[Tensor, Tensor], Tensor],
    shortcut: str | None,
) -> tuple[Tensor, Tensor]:
    """Runs a block.

    Args:
        x: its input.
        parts: what computes each convolution, by its `part`.
        add: the sum of a shortcut and the branch beside it.
        shortcut: what it connects, one of `SHORTCUTS`.

    Returns:
        The output, and the expanded input.
    """
    expanded = parts["expand"](x) if "expand" in parts else x
    y = parts["depthwise"](expanded)
    if shortcut == "expansion":
        y = add(expanded, y)
    y = parts["project"](y)
    return (add(x, y) if shortcut == "bottleneck" else y), expanded
