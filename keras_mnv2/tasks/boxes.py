"""Default boxes of SSD (Liu et al. 2016, arXiv 1512.02325), what they match, and the numbers a box is coded as.

Boxes are (left, top, right, bottom) in pixels of the network's image, `"xyxy"` in Keras.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mnv2.checks import check_flag, check_positive, check_whole

# Of the authors' SSDLite (`ssd_anchor_generator` of their configuration) and torchvision's: 0.2 to 0.95 of the image,
# and 1 behind the last, for the second square.
SCALES = (*(0.2 + 0.15 * k for k in range(6)), 1.0)
# Besides the two squares of a place: each ratio of width to height and its inverse.
ASPECT_RATIOS = ((2.0, 3.0),) * 6
# SSD's code divides the offsets of a centre by 0.1 and those of the logarithm of a side by 0.2, its "variances".
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MOST_RATIOS = 16


def check_shapes(
    scales: Any, aspect_ratios: Any, reduce_lowest: Any
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...], bool]:
    """The shapes of default boxes: scales and aspect ratios as tuples of numbers, and `reduce_lowest`.

    Raises:
        ValueError: unless there is a sequence of ratios for each map, a scale for each and one more, and a flag.
    """
    if isinstance(aspect_ratios, str) or not isinstance(aspect_ratios, Sequence) or not aspect_ratios:
        raise ValueError(f"aspect_ratios must be a sequence of ratios for each map, got {aspect_ratios!r}.")
    for ratios in aspect_ratios:
        if isinstance(ratios, str) or not isinstance(ratios, Sequence) or len(ratios) > MOST_RATIOS:
            raise ValueError(f"aspect_ratios must have at most {MOST_RATIOS} ratios for each map, got {ratios!r}.")
    if isinstance(scales, str) or not isinstance(scales, Sequence) or len(scales) != len(aspect_ratios) + 1:
        raise ValueError(f"scales must be a sequence of {len(aspect_ratios) + 1} numbers, got {scales!r}.")
    checked = tuple(
        tuple(check_positive("aspect_ratios: a ratio", r, 1000) for r in ratios) for ratios in aspect_ratios
    )
    found = tuple(check_positive("scales: a scale", scale, 1000) for scale in scales)
    return found, checked, check_flag("reduce_lowest", reduce_lowest)


def check_sides(name: str, sides: Any) -> tuple[int, int]:
    """`sides` as (height, width)."""
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise ValueError(f"{name} must be (height, width), got {sides!r}.")
    height, width = (check_whole(f"{name}: a side", side, most=2**16) for side in sides)
    return height, width


def boxes_per_place(aspect_ratios: Sequence[Sequence[float]], reduce_lowest: bool) -> list[int]:
    """How many default boxes each place of each map has; arguments as for `default_boxes`."""
    counts = [2 + 2 * len(ratios) for ratios in aspect_ratios]
    return [1 + 2 * len(aspect_ratios[0][:1]), *counts[1:]] if reduce_lowest else counts


def default_boxes(
    image_size: Sequence[int],
    map_sizes: Sequence[Sequence[int]],
    scales: Sequence[float],
    aspect_ratios: Sequence[Sequence[float]],
    reduce_lowest: bool = False,
) -> np.ndarray:
    """The default boxes of an image (Liu et al. 2016, section 2.2), in the order of torchvision's.

    Of each place they are a square of the map's scale, one of the geometric mean with the next scale, and for each
    ratio a wide and a high box. Sides are at most those of the image; boxes may reach over its edge.

    Args:
        image_size: (height, width) in pixels.
        map_sizes: (height, width) of each map.
        scales: of each map and one more, as a share of the image's sides.
        aspect_ratios: of each map.
        reduce_lowest: whether the first map has a square of half its scale in the place of two, and the first ratio
            alone, as in the authors' code (`reduce_boxes_in_lowest_layer`).

    Returns:
        float32 (boxes, 4): map by map, row by row, place by place.

    Examples:
        >>> default_boxes((100, 100), [(1, 1)], (0.5, 1.0), [()]).round().tolist()
        [[25.0, 25.0, 75.0, 75.0], [15.0, 15.0, 85.0, 85.0]]
    """
    found = []
    for k, ((rows, columns), ratios) in enumerate(zip(map_sizes, aspect_ratios, strict=True)):
        between = math.sqrt(scales[k] * scales[k + 1])
        reduced = reduce_lowest and k == 0
        sides = [(scales[0] / 2,) * 2] if reduced else [(scales[k],) * 2, (between,) * 2]
        for ratio in ratios[:1] if reduced else ratios:
            wide, high = scales[k] * math.sqrt(ratio), scales[k] / math.sqrt(ratio)
            sides += [(wide, high), (high, wide)]
        half = np.minimum(sides, 1.0) / 2
        y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
        centres = np.stack([x, y], axis=-1)[:, :, None]
        found.append(np.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4))
    height, width = image_size
    return (np.concatenate(found) * (width, height, width, height)).astype("float32")


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of each box (n, 4) with each of the others (m, 4): (n, m).

    Examples:
        >>> overlaps(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 2], [1, 0, 3, 2]])).round(2).tolist()
        [[1.0, 0.33]]
    """
    corner = np.minimum(first[:, None, 2:], second[None, :, 2:]) - np.maximum(first[:, None, :2], second[None, :, :2])
    inside = np.maximum(corner, 0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - inside
    return inside / np.maximum(union, np.finfo("float32").tiny)


def match(truth: np.ndarray, boxes: np.ndarray, threshold: float) -> np.ndarray:
    """Which true box each default box is to find, or -1 (Liu et al. 2016, section 2.2).

    A default box takes the true box that it overlaps most, from the threshold on. Each true box has the default box
    that overlaps it most, whatever the threshold. Where two want the same the later one has it, as in torchvision.

    Args:
        truth: (n, 4).
        boxes: (m, 4).
        threshold: least intersection over union.

    Returns:
        Indices of `truth`, (m,).
    """
    if not len(truth):
        return np.full(len(boxes), -1)
    found = overlaps(truth, boxes)
    matched = np.where(found.max(axis=0) >= threshold, found.argmax(axis=0), -1)
    matched[found.argmax(axis=1)] = np.arange(len(truth))
    return matched


def encode(truth: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """What the network is to say of default boxes (n, 4) so that they become true ones (n, 4).

    Offsets of the centre in sides of the default box, and logarithms of the sides' ratios (Girshick et al. 2014, arXiv
    1311.2524, appendix C), times `CODE_WEIGHTS`.

    Examples:
        >>> encode(np.array([[1.0, 0, 3, 2]]), np.array([[0.0, 0, 2, 2]])).tolist()
        [[5.0, 0.0, 0.0, 0.0]]
    """
    sides, own = truth[:, 2:] - truth[:, :2], boxes[:, 2:] - boxes[:, :2]
    centres = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / own
    return np.concatenate([centres, np.log(sides / own)], axis=-1) * CODE_WEIGHTS
