"""What the shapes in a file of weights say of its network: alpha, depth, and whether stem and head follow alpha."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from keras_mnv2.architecture import Row, plan
from keras_mnv2.weights.rename import Block, file_names, later_blocks, to_keras
from keras_mnv2.weights.source import Source

# Published first: many a value between gives the same network.
_ALPHAS = (1.0, 0.35, 0.5, 0.75, 1.4, 1.3, 1.1, 1.2, *(n / 20 for n in range(2, 81)), *(n / 100 for n in range(1, 401)))
_MOST_BLOCKS = 100
_DEPTHS = (1.0, 1.2, 1.4, *(n / 10 for n in range(1, 41)))


class Widths(NamedTuple):
    """Channels of a network's layers.

    Attributes:
        stem: of the first convolution.
        blocks: hidden and output channels of each block, in order.
        head: of the last convolution, or None where the file ends before it.
    """

    stem: int
    blocks: tuple[tuple[int, int], ...]
    head: int | None


def settings_of(
    source: Source,
    given: dict[str, Any],
    inverted_residual_setting: Sequence[Sequence[float]] | None = None,
    round_nearest: int = 8,
) -> dict[str, Any]:
    """`alpha`, `depth_multiplier` and `fix_stem_head` of the network in a file.

    Args:
        source: the file.
        given: what the caller gave for these three, None where nothing.
        inverted_residual_setting: as in `MobileNetV2`.
        round_nearest: likewise.

    Returns:
        Values for `MobileNetV2` under which each layer has the file's width; those given, where they do. Nothing
        where no values do, as for blocks of the caller's own.

    Raises:
        ValueError: where what was given contradicts the file; the message says both values.
    """
    widths = widths_of(source)
    if widths is None:
        return {}
    names = ("alpha", "depth_multiplier", "fix_stem_head")
    wanted = tuple(given.get(name) for name in names)
    free = (None, None, None)
    for choice in (wanted, free):
        for values in _candidates(choice, len(widths.blocks), widths.head is not None, inverted_residual_setting):
            alpha, depth, fixed = values
            if _fits(widths, plan(alpha, inverted_residual_setting, round_nearest, depth, fixed)):
                for name, found, value in zip(names, values, wanted, strict=True):
                    if value not in (None, found):
                        raise ValueError(
                            f"{name} must be {found!r} or left out with the file {str(source.path)!r}, whose layers "
                            f"have those widths, got {value!r}."
                        )
                return dict(zip(names, values, strict=True))
    return {}


def widths_of(source: Source) -> Widths | None:
    """The channels of a file's layers, or None where they are not those of inverted residuals."""
    layout, arrays = source.layout, source.arrays
    later = later_blocks(layout, arrays, 0)
    if len(later) > _MOST_BLOCKS:
        return None

    def kernels(blocks: Sequence[Block], number: int) -> list[tuple[int, ...]] | None:
        names = file_names(layout, blocks, False, False, arrays)
        keys = [names[f"block_{number}/{part}/kernel"] for part in blocks[number].parts]
        if all(array.key in arrays and arrays[array.key].ndim == 4 for array in keys):
            return [to_keras(arrays[array.key], array.role, layout).shape for array in keys]
        return None

    blocks: list[Block] = []
    found = []
    for number, block in enumerate(later):
        for expanded in (True, False):
            shapes = kernels([*blocks, block._replace(expanded=expanded)], number)
            if shapes is not None:
                break
        else:
            return None
        blocks.append(block._replace(expanded=expanded))
        found.append((shapes[-2][2], shapes[-1][3]))
    names = file_names(layout, blocks, True, False, arrays)
    stem, head = (arrays.get(names[f"{end}/kernel"].key) for end in ("stem", "head"))
    if stem is None or stem.ndim != 4 or (head is not None and head.ndim != 4):
        return None
    last = None if head is None else to_keras(head, "conv", layout).shape[3]
    return Widths(to_keras(stem, "conv", layout).shape[3], tuple(found), last)


def _candidates(
    choice: Sequence[Any], count: int, whole: bool, setting: Sequence[Sequence[float]] | None
) -> Iterator[tuple[float, float, bool]]:
    """Values to try, of which those are fixed that are not None."""
    alpha, depth, fixed = choice
    depths = []
    for value in _DEPTHS if depth is None else (depth,):
        for fix in (False, True) if fixed is None else (fixed,):
            length = len(plan(1.0, setting, depth_multiplier=value, fix_stem_head=fix)) - 2
            if length == count or (length > count and not whole):
                depths.append((value, fix))
    for width in _ALPHAS if alpha is None else (alpha,):
        yield from ((width, value, fix) for value, fix in depths)


def _fits(widths: Widths, rows: tuple[Row, ...]) -> bool:
    blocks = tuple((row.hidden_channels, row.channels) for row in rows[1:-1])
    whole = widths.head is None or (len(blocks) == len(widths.blocks) and rows[-1].channels == widths.head)
    return whole and rows[0].channels == widths.stem and blocks[: len(widths.blocks)] == widths.blocks
