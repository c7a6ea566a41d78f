"""The architecture as data: the paper's table, and the plan that expands it once into rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from keras_mnv2.checks import check_choice, check_positive, check_whole


class Stage(NamedTuple):
    """One row of the paper's Table 2: a bottleneck, repeated.

    Attributes:
        expansion: `t`, the ratio of hidden to input channels.
        channels: `c`, output channels at alpha 1.
        repeats: `n`, blocks in the stage.
        stride: `s`, stride of the first block, 1 or 2; the others have stride 1.
    """

    expansion: float
    channels: int
    repeats: int
    stride: int


# Sandler et al. 2018, Table 2.
PAPER_SETTING = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
# Bounds against a slip of the hand: published networks have up to 1.4, 6 and 26.
MOST_FACTOR = 1000
MOST_BLOCKS = 200
MOST_CHANNELS = 2**20
# The authors' SSDLite (`ssd_mobilenet_v2_feature_extractor`, and torchvision's): extra layers at alpha 1, and the least
# width of one.
EXTRA_CHANNELS = (512, 256, 256, 128)
LEAST_EXTRA = 16


@dataclass(frozen=True)
class Row:
    """One layer of the plan: the stem, a block or the head.

    Attributes:
        name: the Keras layer's name: `stem`, `block_0`, ..., `head`.
        kind: `"stem"` (3x3 convolution), `"block"` (inverted residual) or `"head"` (1x1 convolution). Of a detector
            also `"extra"` (1x1, depthwise 3x3 and 1x1 convolution, each activated) or `"prediction"` (depthwise 3x3
            and 1x1 convolution, the last one plain with a bias).
        in_channels: channels of the input.
        channels: channels of the output.
        expansion: hidden over input channels (1 for stem and head).
        stride: stride of the 3x3 convolution.
        dilation: dilation rate of the 3x3 convolution.
        residual: whether the input is added to the output.
        output_stride: pixels of the image per pixel of the output, along one side.
        endpoint: `stride_S` on the last block of output stride S, otherwise None.
        source: what it reads where that is not the row before: another row, or a name that `features` of
            `MobileNetV2` knows.
    """

    name: str
    kind: str
    in_channels: int
    channels: int
    expansion: float
    stride: int
    dilation: int
    residual: bool
    output_stride: int
    endpoint: str | None = None
    source: str | None = None

    @property
    def hidden_channels(self) -> int:
        """Channels between the 1x1 expansion and the projection."""
        return hidden_channels(self.in_channels, self.expansion)


def hidden_channels(in_channels: int, expansion: float) -> int:
    """Width inside a block, rounded as torchvision's `InvertedResidual` rounds it."""
    return round(in_channels * expansion)


def make_divisible(value: float, divisor: int = 8, min_value: int | None = None) -> int:
    """Rounds a channel count to a multiple of `divisor`, never below 90 % of the request.

    The rule is that of the authors' TensorFlow code (`slim/nets/mobilenet`), which torchvision, timm
    and `keras.applications` share.

    Args:
        value: the requested number of channels.
        divisor: what the result is a multiple of.
        min_value: the least result; `divisor` where it is None.

    Returns:
        The number of channels.

    Examples:
        >>> make_divisible(24 * 0.75), make_divisible(16 * 0.35)
        (24, 8)
    """
    rounded = max(min_value or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def plan(
    alpha: float = 1.0,
    inverted_residual_setting: Sequence[Sequence[float]] | None = None,
    round_nearest: int = 8,
    depth_multiplier: float = 1.0,
    fix_stem_head: bool = False,
    stem_stride: int = 2,
    output_stride: int = 32,
    in_channels: int = 3,
) -> tuple[Row, ...]:
    """Expands the stage table into one row a layer, from the stem to the head.

    Args:
        alpha: width multiplier of every row (the head only where alpha is above 1, paper section 3.4).
        inverted_residual_setting: rows of `t, c, n, s` as in torchvision; the paper's Table 2 by default.
        round_nearest: what each width is a multiple of.
        depth_multiplier: factor on the repeats of each stage, rounded up (timm's 110d and 120d).
        fix_stem_head: keeps stem and head at 32 and 1280 channels and the first and last stage at their
            own depth, as timm's 110d and 120d do.
        stem_stride: stride of the first convolution, 1 or 2.
        output_stride: 8, 16 or 32; strides beyond it become dilations. The block that loses its stride
            keeps the dilation so far, as in the authors' DeepLab code.
        in_channels: channels of the image.

    Returns:
        The rows, in the order of computation.

    Raises:
        ValueError: where an argument is out of range; the message names it and what is allowed.

    Examples:
        >>> [row.channels for row in plan(alpha=0.35)[:4]]
        [16, 8, 8, 8]
    """
    alpha = check_positive("alpha", alpha, MOST_FACTOR)
    depth_multiplier = check_positive("depth_multiplier", depth_multiplier, MOST_FACTOR)
    round_nearest = check_whole("round_nearest", round_nearest, most=MOST_CHANNELS)
    stem_stride = check_choice("stem_stride", stem_stride, (1, 2))
    output_stride = check_choice("output_stride", output_stride, (8, 16, 32))
    stages = _stages(inverted_residual_setting)
    fixed = (0, len(stages) - 1) if fix_stem_head else ()
    repeats = [
        stage.repeats if index in fixed else math.ceil(stage.repeats * depth_multiplier)
        for index, stage in enumerate(stages)
    ]
    if sum(repeats) > MOST_BLOCKS:
        raise ValueError(
            f"depth_multiplier and inverted_residual_setting must give at most {MOST_BLOCKS} blocks, got "
            f"{sum(repeats):,} with depth_multiplier={depth_multiplier!r}."
        )

    def width(channels: int) -> int:
        return make_divisible(channels * alpha, round_nearest)

    rows = []
    current_stride, dilation = stem_stride, 1
    channels = STEM_CHANNELS if fix_stem_head else width(STEM_CHANNELS)
    rows.append(Row("stem", "stem", in_channels, channels, 1, stem_stride, 1, False, current_stride))
    for stage, count in zip(stages, repeats, strict=True):
        for repeat in range(count):
            stride = stage.stride if repeat == 0 else 1
            if current_stride * stride > output_stride:
                stride, next_dilation = 1, dilation * stride
            else:
                next_dilation = dilation
            current_stride *= stride
            out = width(stage.channels)
            # A block whose stride became a dilation does not gain a shortcut: it would change the network.
            strided = repeat == 0 and stage.stride != 1
            residual = not strided and channels == out
            if hidden_channels(channels, stage.expansion) < 1:
                raise ValueError(
                    f"inverted_residual_setting: the expansion t of the row {tuple(stage)} must leave at least one of "
                    f"{channels} channels."
                )
            name = f"block_{len(rows) - 1}"
            rows.append(Row(name, "block", channels, out, stage.expansion, stride, dilation, residual, current_stride))
            channels, dilation = out, next_dilation

    for i in range(1, len(rows)):
        if i + 1 == len(rows) or rows[i + 1].output_stride != rows[i].output_stride:
            rows[i] = replace(rows[i], endpoint=f"stride_{rows[i].output_stride}")
    head = HEAD_CHANNELS if fix_stem_head else make_divisible(HEAD_CHANNELS * max(1.0, alpha), round_nearest)
    rows.append(Row("head", "head", channels, head, 1, 1, 1, False, current_stride))
    return tuple(rows)


def detection_plan(
    rows: Sequence[Row], alpha: float, boxes: Sequence[int], classes: int
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows of SSDLite (paper, section 6.2) behind those of its backbone.

    The first map is the expansion of the block that goes to output stride 32, the second the head. The others are extra
    layers, each of which halves the sides. Each map has a prediction of boxes and one of classes.

    Args:
        rows: of `plan`, with output stride 32 and no other stages than the paper's.
        alpha: width multiplier of the extra layers.
        boxes: of each place, for each of the six maps.
        classes: with the background.

    Returns:
        The extra layers, and the predictions: of the boxes of each map, `box_1` to `box_6`, then of its classes.

    Examples:
        >>> extras, predictions = detection_plan(plan(), 1.0, [6] * 6, 81)
        >>> [row.channels for row in extras], predictions[0].source, predictions[-1].channels
        ([512, 256, 256, 128], 'block_13_expand', 486)
    """
    last = next(i for i, row in enumerate(rows) if row.output_stride == 32)
    maps = [(f"{rows[last].name}_expand", rows[last].hidden_channels, 16), (rows[-1].name, rows[-1].channels, 32)]
    extras: list[Row] = []
    for number, channels in enumerate(EXTRA_CHANNELS, 1):
        _, in_channels, stride = maps[-1]
        channels = make_divisible(channels * alpha, min_value=LEAST_EXTRA)
        expansion = channels // 2 / in_channels
        extras.append(Row(f"extra_{number}", "extra", in_channels, channels, expansion, 2, 1, False, 2 * stride))
        maps.append((extras[-1].name, channels, 2 * stride))
    predictions = [
        Row(f"{name}_{number}", "prediction", channels, count * values, 1, 1, 1, False, stride, None, source)
        for name, values in (("box", 4), ("class", classes))
        for number, ((source, channels, stride), count) in enumerate(zip(maps, boxes, strict=True), 1)
    ]
    return tuple(extras), tuple(predictions)


def _stages(setting: Sequence[Sequence[float]] | None) -> tuple[Stage, ...]:
    if setting is None:
        return PAPER_SETTING
    name = "inverted_residual_setting"
    if isinstance(setting, str) or not isinstance(setting, Sequence) or not setting:
        raise ValueError(f"{name} must be a sequence of at least one row (t, c, n, s), got {setting!r}.")
    stages = []
    for row in setting:
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 4:
            raise ValueError(f"{name} must have rows of four numbers (t, c, n, s), got the row {row!r}.")
        stage = Stage(*row)  # type: ignore[arg-type]  # Checked below.
        expansion = check_positive(f"{name}: the expansion t of the row {tuple(row)}", stage.expansion, MOST_FACTOR)
        channels, repeats = (
            check_whole(f"{name}: {letter} of the row {tuple(row)}", value, most=most)
            for letter, value, most in zip("cn", stage[1:3], (MOST_CHANNELS, MOST_BLOCKS), strict=True)
        )
        stride = check_choice(f"{name}: the stride s of the row {tuple(row)}", stage.stride, (1, 2))
        stages.append(Stage(expansion, channels, repeats, stride))
    return tuple(stages)
