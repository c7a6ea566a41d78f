"""What a network costs, from the plan alone: parameters, multiply-adds, activations, peak memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from keras_mnv2.architecture import Row, plan
from keras_mnv2.checks import check_flag, check_whole
from keras_mnv2.ops.padding import output_size
from keras_mnv2.tables import in_columns

# 1 GiB in float32, 38 times width 1.4: more is a slip of the hand, which would end in a MemoryError.
MOST_PARAMETERS = 2**28


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
        for row in self.rows:
            height, width, channels = row.output_shape
            fused_stem = row.name == "stem" and len(self.rows) > 1 and self.rows[1].output_shape[0] == height
            if row.name not in ("head", "classifier") and not fused_stem:
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
    **architecture: Any,
) -> CostProfile:
    """Counts parameters, multiply-adds and memory of a network with batch norms, without building it.

    Args:
        input_shape: (height, width, channels).
        classes: of the classifier.
        include_top: whether to count the classifier.
        bytes_per_value: of an activation; the paper counts 2.
        print_fn: what prints the table; None prints nothing.
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
    rows = []
    shape = tuple(input_shape)
    for row in plan(in_channels=input_shape[2], **architecture):
        rows.append(_row_cost(row, shape, bytes_per_value))
        shape = rows[-1].output_shape
    if include_top:
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
