"""What a network costs, from the plan alone: parameters, multiply-adds, activations, peak memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from keras_mnv2.architecture import Row, detection_plan, plan
from keras_mnv2.checks import check_choice, check_flag, check_whole
from keras_mnv2.ops.padding import output_size
from keras_mnv2.tables import in_columns
from keras_mnv2.tasks.boxes import ASPECT_RATIOS, boxes_per_place

# 1 GiB in float32, 38 times width 1.4: more is a slip of the hand, which would end in a MemoryError.
MOST_PARAMETERS = 2**28
# What a profile can be of; segmentation as the authors' DeepLab code has it.
NETWORKS = ("MobileNetV2", "DeepLabV3", "SSDLite")
SEGMENTATION_CHANNELS = 256


@dataclass(frozen=True)
class RowCost:
    """Cost of one row for one image.

    Attributes:
        name: of the layer.
        input_shape: (height, width, channels).
        output_shape: (height, width, channels).
        parameters: trainable ones: kernels, batch norm's scale and shift, the classifier's bias.
        statistics: moving mean and variance of the batch norms.
        multiply_adds: of the convolutions and the classifier.
        activations: values written: every tensor between two convolutions, and the output.
        memory: bytes of input and output together, inner tensors of a block not counted (paper,
            section 5.1: a block is one operation, whose inner tensor need not exist as a whole).
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    statistics: int
    multiply_adds: int
    activations: int
    memory: int


@dataclass(frozen=True)
class CostProfile:
    """Rows of a cost profile, and their totals. `str(profile)` is a table."""

    rows: tuple[RowCost, ...]
    bytes_per_value: int

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def statistics(self) -> int:
        """Moving statistics of the batch norms, which are not trainable."""
        return sum(row.statistics for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def activations(self) -> int:
        """Values written for one image."""
        return sum(row.activations for row in self.rows)

    @property
    def peak_memory(self) -> int:
        """Bytes: the largest sum of input and output of an operation (paper, section 5.1, equation 2)."""
        return max(row.memory for row in self.rows)

    @property
    def largest_tensors(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Per resolution the channels and bytes of the largest tensor between rows, as in the paper's Table 3.

        The stem's output is left out where a block follows at the same resolution: the paper computes the
        two together (caption of Table 3). The paper prints 32, 64 and 160 channels for 56x56, 28x28 and
        14x14, where its own Table 2 has 24, 32 and 96: these are the stages that read, not write, those
        resolutions.
        """
        table: dict[tuple[int, int], tuple[int, int]] = {}
        last = next((i for i, row in enumerate(self.rows) if row.name == "head"), None)
        pooled = last is not None and all(row.name == "classifier" for row in self.rows[last + 1 :])
        for row in self.rows:
            height, width, channels = row.output_shape
            fused_stem = row.name == "stem" and len(self.rows) > 1 and self.rows[1].output_shape[0] == height
            if row.name != "classifier" and not (row.name == "head" and pooled) and not fused_stem:
                best = max(channels, table.get((height, width), (0, 0))[0])
                table[height, width] = (best, height * width * best * self.bytes_per_value)
            elif row.name == "head":
                # Pooled at once: only the mean over the image is kept.
                table[1, 1] = (channels, channels * self.bytes_per_value)
        return table

    def __str__(self) -> str:
        head = ("row", "output", "parameters", "multiply-adds", "activations", "memory, KiB")
        lines = [
            (
                row.name,
                "x".join(map(str, row.output_shape)),
                f"{row.parameters:,}",
                f"{row.multiply_adds:,}",
                f"{row.activations:,}",
                f"{row.memory / 1024:,.0f}",
            )
            for row in self.rows
        ]
        total = (
            "total",
            "",
            f"{self.parameters:,}",
            f"{self.multiply_adds:,}",
            f"{self.activations:,}",
            f"peak {self.peak_memory / 1024:,.0f}",
        )
        first, *text, last = in_columns([head, *lines, total], right=range(2, len(head)))
        rule = "-" * len(first)
        return "\n".join([first, rule, *text, rule, last])


def cost_profile(
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    include_top: bool = True,
    bytes_per_value: int = 2,
    print_fn: Callable[[str], Any] | None = print,
    network: str = "MobileNetV2",
    aspp: bool = False,
    reduce_lowest: bool = True,
    **architecture: Any,
) -> CostProfile:
    """Counts parameters, multiply-adds and memory of a network with batch norms, without building it.

    Args:
        input_shape: (height, width, channels).
        classes: of the classifier, of each pixel, or of objects without the background.
        include_top: whether to count what is behind the features: the classifier, the segmentation head without the
            resizing, or the extra layers and predictions.
        bytes_per_value: of an activation; the paper counts 2.
        print_fn: what prints the table; None prints nothing.
        network: `"MobileNetV2"`, `"DeepLabV3"`, which ends before the last 1x1 convolution and mostly has
            `output_stride=16`, or `"SSDLite"`.
        aspp: of `DeepLabV3`: whether its head has the dilated branches.
        reduce_lowest: of `SSDLite`: whether the first map has three boxes a place, not six.
        **architecture: of `keras_mnv2.MobileNetV2`: alpha, inverted_residual_setting, round_nearest,
            depth_multiplier, fix_stem_head, stem_stride, output_stride.

    Returns:
        A `CostProfile`.

    Raises:
        ValueError: on an argument out of range.

    Examples:
        >>> profile = cost_profile(print_fn=None)
        >>> profile.parameters, profile.multiply_adds
        (3504872, 300774272)
        >>> profile = cost_profile((320, 320, 3), classes=80, network="SSDLite", print_fn=None)
        >>> profile.parameters, profile.multiply_adds  # 4.3 M and 0.8 B in the paper's Table 6.
        (4337013, 788830144)
    """
    if isinstance(input_shape, str) or not isinstance(input_shape, Sequence) or len(input_shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape!r}.")
    for side in input_shape[:2]:
        check_whole("input_shape: a side", side, 32)
    check_whole("input_shape: the channels", input_shape[2])
    classes = check_whole("classes", classes)
    bytes_per_value = check_whole("bytes_per_value", bytes_per_value)
    include_top = check_flag("include_top", include_top)
    if not (print_fn is None or callable(print_fn)):
        raise ValueError(f"print_fn must be None or a function of one text, got {print_fn!r}.")
    network = check_choice("network", network, NETWORKS)
    aspp, reduce_lowest = check_flag("aspp", aspp), check_flag("reduce_lowest", reduce_lowest)
    planned = plan(in_channels=input_shape[2], **architecture)
    rows = _row_costs(planned[:-1] if network == "DeepLabV3" else planned, tuple(input_shape), bytes_per_value)
    shape = rows[-1].output_shape
    if include_top and network == "DeepLabV3":
        rows += _segmentation_costs(shape, classes, aspp, bytes_per_value)
    elif include_top and network == "SSDLite":
        rows += _detection_costs(planned, rows, classes, architecture.get("alpha", 1.0), reduce_lowest, bytes_per_value)
    elif include_top:
        channels = shape[-1]
        memory = (channels + classes) * bytes_per_value
        weights = channels * classes
        rows.append(
            RowCost("classifier", (1, 1, channels), (1, 1, classes), weights + classes, 0, weights, classes, memory)
        )
    profile = CostProfile(tuple(rows), bytes_per_value)
    if print_fn is not None:
        print_fn(str(profile))
    return profile


def check_size(rows: Sequence[Row], classes: int) -> None:
    """Raises a `ValueError` where a network has more parameters than `MOST_PARAMETERS`, before anything is built.

    Args:
        rows: of `plan`.
        classes: of the classifier, or 0.
    """
    parameters = sum(_row_cost(row, (1, 1, row.in_channels), 1).parameters for row in rows)
    parameters += (rows[-1].channels + 1) * classes
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            "alpha, inverted_residual_setting, round_nearest, classes and the channels of the image must give at most "
            f"{MOST_PARAMETERS:,} parameters, got {parameters:,}."
        )


def _row_costs(rows: Sequence[Row], shape: tuple[int, ...], bytes_per_value: int) -> list[RowCost]:
    """The cost of rows that follow each other, from the shape that the first one reads."""
    found: list[RowCost] = []
    for row in rows:
        found.append(_row_cost(row, found[-1].output_shape if found else shape, bytes_per_value))
    return found


def _detection_costs(
    planned: Sequence[Row], rows: list[RowCost], classes: int, alpha: float, reduce_lowest: bool, bytes_per_value: int
) -> list[RowCost]:
    """Of the extra layers and the predictions behind a backbone whose rows cost `rows`."""
    extras, predictions = detection_plan(planned, alpha, boxes_per_place(ASPECT_RATIOS, reduce_lowest), classes + 1)
    found = _row_costs(extras, rows[-1].output_shape, bytes_per_value)
    shapes = {row.name: row.output_shape for row in [*rows, *found]}
    for row, cost in zip(planned, rows, strict=True):
        # A block's expansion has the size of its input.
        shapes[f"{row.name}_expand"] = (*cost.input_shape[:2], row.hidden_channels)
    return found + [_row_cost(row, shapes[str(row.source)], bytes_per_value) for row in predictions]


def _segmentation_costs(shape: tuple[int, ...], classes: int, aspp: bool, bytes_per_value: int) -> list[RowCost]:
    """Of `DeepLabV3`'s head, from the shape of the features."""
    channels, pooled = SEGMENTATION_CHANNELS, (1, 1, shape[-1])
    found = [_unit_cost("image_pooling", pooled, channels, 1, bytes_per_value)]
    kernels = (1, 3, 3, 3) if aspp else (1,)
    found += [_unit_cost(f"aspp{i}", shape, channels, side, bytes_per_value) for i, side in enumerate(kernels)]
    joined = (*shape[:2], len(found) * channels)
    found.append(_unit_cost("projection", joined, channels, 1, bytes_per_value))
    return [*found, _unit_cost("logits", found[-1].output_shape, classes, 1, bytes_per_value, normed=False)]


def _unit_cost(
    name: str, shape: tuple[int, ...], channels: int, kernel_size: int, bytes_per_value: int, normed: bool = True
) -> RowCost:
    """Of a convolution of stride 1, with a batch norm or a bias."""
    height, width, in_channels = shape
    weights, pixels = kernel_size**2 * in_channels * channels, height * width
    vectors = 2 * channels if normed else channels
    memory = pixels * (in_channels + channels) * bytes_per_value
    statistics = vectors if normed else 0
    output = (height, width, channels)
    return RowCost(name, shape, output, weights + vectors, statistics, pixels * weights, pixels * channels, memory)


def _row_cost(row: Row, shape: tuple[int, ...], bytes_per_value: int) -> RowCost:
    height, width, channels = shape
    kernel_size = 1 if row.kind == "head" else 3
    # Both paddings give the same size for odd kernels.
    out_height, out_width = (
        output_size(n, kernel_size, row.stride, row.dilation, "same") or 0 for n in (height, width)
    )
    out_pixels = out_height * out_width
    # (pixels of the output, weights, output channels) of each convolution.
    bias = 0
    if row.kind in ("block", "extra", "prediction"):
        hidden = row.hidden_channels
        convs = [] if row.expansion == 1 else [(height * width, channels * hidden, hidden)]
        convs += [(out_pixels, 9 * hidden, hidden), (out_pixels, hidden * row.channels, row.channels)]
        bias = row.channels if row.kind == "prediction" else 0
    else:
        convs = [(out_pixels, kernel_size**2 * channels * row.channels, row.channels)]
    normed = sum(out for _, _, out in convs) - bias
    return RowCost(
        name=row.name,
        input_shape=shape,
        output_shape=(out_height, out_width, row.channels),
        parameters=sum(weights for _, weights, _ in convs) + 2 * normed + bias,
        statistics=2 * normed,
        multiply_adds=sum(pixels * weights for pixels, weights, _ in convs),
        activations=sum(pixels * out for pixels, _, out in convs),
        memory=(height * width * channels + out_pixels * row.channels) * bytes_per_value,
    )
