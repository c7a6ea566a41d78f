"""From the maps of a single-shot detector to lists of boxes, and from these to detections."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import Shape, Tensor
from keras_mnv2.arguments import data_format_name
from keras_mnv2.checks import check_rate, check_whole
from keras_mnv2.layers.fusing import Simple
from keras_mnv2.ops import take_of_rows
from keras_mnv2.tasks.boxes import ASPECT_RATIOS, CODE_WEIGHTS, SCALES, check_shapes, check_sides, default_boxes

# The largest factor of a side, 62.5, as in torchvision and Detectron: `exp` must not overflow.
MOST_LOGARITHM = math.log(1000 / 16)
# Rounds of suppression, an even number and one: see `Detections`.
ROUNDS = 33


@keras.saving.register_keras_serializable("keras_mnv2")
class JoinMaps(Simple):
    """Joins maps of predictions to one list: `values` numbers for each box.

    Args:
        values: numbers of a box.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        A list of maps (batch, height, width, boxes * values), of whatever sizes.

    Output shape:
        (batch, boxes, values): map by map, row by row, place by place.

    Raises:
        ValueError: on an unknown data format, and on maps whose channels are no multiple of `values`.

    Examples:
        >>> tuple(JoinMaps(4)([np.ones((2, 3, 3, 8)), np.ones((2, 1, 1, 16))]).shape)
        (2, 22, 4)
    """

    def __init__(self, values: int, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.values = check_whole("values", values)
        self.data_format = data_format_name(data_format)

    def build(self, input_shape: Any) -> None:
        for shape in input_shape:
            channels = shape[-1 if self.data_format == "channels_last" else 1] if len(shape) == 4 else 0
            if None in shape[1:] or not channels or channels % self.values:
                raise ValueError(
                    f"inputs must be maps of known sizes whose channels are a multiple of {self.values}, got "
                    f"{input_shape}."
                )

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        lists = []
        for x in inputs:
            x = x if self.data_format == "channels_last" else keras.ops.transpose(x, (0, 2, 3, 1))
            lists.append(keras.ops.reshape(x, (-1, math.prod(x.shape[1:]) // self.values, self.values)))
        return keras.ops.concatenate(lists, axis=1)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        return input_shape[0][0], sum(math.prod(shape[1:]) for shape in input_shape) // self.values, self.values

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "values": self.values, "data_format": self.data_format}


class _WithDefaultBoxes(keras.layers.Layer):
    """What a layer is told of the default boxes; arguments as for `keras_mnv2.tasks.boxes.default_boxes`."""

    def __init__(
        self,
        image_size: Sequence[int],
        map_sizes: Sequence[Sequence[int]],
        scales: Sequence[float] = SCALES,
        aspect_ratios: Sequence[Sequence[float]] = ASPECT_RATIOS,
        reduce_lowest: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = check_sides("image_size", image_size)
        self.scales, self.aspect_ratios, self.reduce_lowest = check_shapes(scales, aspect_ratios, reduce_lowest)
        if isinstance(map_sizes, str) or not isinstance(map_sizes, Sequence) or len(map_sizes) != len(aspect_ratios):
            raise ValueError(f"map_sizes must be {len(aspect_ratios)} times (height, width), got {map_sizes!r}.")
        self.map_sizes = tuple(check_sides("map_sizes", sides) for sides in map_sizes)

    @property
    def box_config(self) -> dict[str, Any]:
        """What another such layer is made with."""
        names = ("image_size", "map_sizes", "scales", "aspect_ratios", "reduce_lowest")
        return {name: getattr(self, name) for name in names}

    @property
    def boxes(self) -> np.ndarray:
        """The default boxes, float32 (boxes, 4): (left, top, right, bottom) in pixels of the image."""
        return default_boxes(**self.box_config)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.box_config}


@keras.saving.register_keras_serializable("keras_mnv2")
class DefaultBoxes(_WithDefaultBoxes, JoinMaps):
    """Joins maps of box regressions to one list, and knows the default box of each.

    Args:
        image_size: (height, width) in pixels.
        map_sizes: (height, width) of each map.
        scales: of each map and one more, as a share of the image's sides.
        aspect_ratios: of each map; each gives a wide and a high box beside the two squares.
        reduce_lowest: whether the first map has one square, of half its scale, and its first ratio alone.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        A list of maps (batch, height, width, boxes * 4).

    Output shape:
        (batch, boxes, 4), in the order of the property `boxes`.

    Raises:
        ValueError: on arguments out of range, and maps of other sizes.

    Examples:
        >>> layer = DefaultBoxes((64, 64), [(2, 2), (1, 1)], (0.2, 0.5, 1.0), ((), (2,)))
        >>> layer([np.ones((1, 2, 2, 8)), np.ones((1, 1, 1, 16))]).shape[1], layer.boxes.shape
        (12, (12, 4))
    """

    def __init__(
        self,
        image_size: Sequence[int],
        map_sizes: Sequence[Sequence[int]],
        scales: Sequence[float] = SCALES,
        aspect_ratios: Sequence[Sequence[float]] = ASPECT_RATIOS,
        reduce_lowest: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"values": 4, "data_format": data_format}
        super().__init__(image_size, map_sizes, scales, aspect_ratios, reduce_lowest, **own, **kwargs)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if self.compute_output_shape(input_shape)[1] != len(self.boxes):
            raise ValueError(
                f"inputs must have four values for each of {len(self.boxes)} default boxes, got {input_shape}."
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["values"]
        return config


@keras.saving.register_keras_serializable("keras_mnv2")
class Detections(_WithDefaultBoxes):
    """Boxes, scores and classes of what is on an image: decoding and non-maximum suppression, as part of the graph.

    Of the best pairs of a box and a class those go that overlap a better one of the same class that stays (greedy
    suppression, as in torchvision). All pairs are decided at once, in 33 rounds: each puts right those whose better
    ones are right (Zheng et al. 2020, arXiv 2005.03572, Cluster-NMS). That is the greedy result, unless more than 33
    boxes of a class overlap in a chain, each the next best; then boxes of the chain may be lost, none is found twice.

    Args:
        image_size: (height, width) in pixels.
        map_sizes: (height, width) of each map.
        scales: of each map and one more, as a share of the image's sides.
        aspect_ratios: of each map.
        reduce_lowest: as in `DefaultBoxes`.
        score_threshold: what a score must be above.
        iou_threshold: intersection over union that a better box of the class may have.
        candidates: how many of the best pairs of a box and a class of an image are looked at.
        max_detections: how many of those that stay are given.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        A list of two: the regressions (batch, boxes, 4), and the logits (batch, boxes, classes + 1), background first.

    Output shape:
        A dict: `"boxes"` (batch, max_detections, 4), (left, top, right, bottom) in pixels of the image and within it;
        `"scores"` (batch, max_detections), best first; `"classes"` (batch, max_detections), int32 from 0. Where there
        are fewer detections the last ones have the score 0, the class -1 and boxes of zeros.

    Raises:
        ValueError: on arguments out of range.

    Examples:
        >>> layer = Detections((64, 64), [(1, 1)], (0.5, 1.0), ((),), max_detections=3)
        >>> found = layer([np.zeros((1, 2, 4)), np.array([[[0.0, 3.0], [0.0, -9.0]]])])
        >>> found["classes"].shape[1], keras.ops.convert_to_numpy(found["boxes"])[0, 0].tolist()
        (2, [16.0, 16.0, 48.0, 48.0])
    """

    def __init__(
        self,
        image_size: Sequence[int],
        map_sizes: Sequence[Sequence[int]],
        scales: Sequence[float] = SCALES,
        aspect_ratios: Sequence[Sequence[float]] = ASPECT_RATIOS,
        reduce_lowest: bool = False,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.45,
        candidates: int = 400,
        max_detections: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, map_sizes, scales, aspect_ratios, reduce_lowest, **kwargs)
        self.score_threshold = check_rate("score_threshold", score_threshold)
        self.iou_threshold = check_rate("iou_threshold", iou_threshold)
        self.candidates = check_whole("candidates", candidates, most=10_000)
        self.max_detections = check_whole("max_detections", max_detections, most=candidates)

    def call(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        ops = keras.ops
        regressions, logits = inputs
        _, found, detections, classes = self._sizes(logits.shape)
        scores = ops.reshape(ops.softmax(logits, axis=-1)[..., 1:], (-1, logits.shape[1] * classes))
        scores, pairs = ops.top_k(scores, found)
        pairs = ops.cast(pairs, "int32")
        labels = pairs % classes
        corners = [take_of_rows(x, pairs // classes) for x in self._decoded(regressions)]

        suppresses = ops.cast(self._overlap(corners, labels), scores.dtype)
        stays = ops.ones_like(scores)[:, None]
        for _ in range(ROUNDS):
            stays = ops.cast(ops.matmul(stays, suppresses) < 0.5, scores.dtype)
        kept = ops.cast(scores > self.score_threshold, scores.dtype) * stays[:, 0]

        scores, best = ops.top_k(scores * kept, detections)
        best = ops.cast(best, "int32")
        is_one = scores > 0
        boxes = ops.stack([take_of_rows(x, best) * ops.cast(is_one, x.dtype) for x in corners], axis=-1)
        return {"boxes": boxes, "scores": scores, "classes": ops.where(is_one, take_of_rows(labels, best), -1)}

    def _decoded(self, regressions: Tensor) -> list[Tensor]:
        """Left, top, right and bottom of each box, within the image: the inverse of `boxes.encode`."""
        boxes = keras.ops.convert_to_tensor(self.boxes, dtype=regressions.dtype)
        height, width = self.image_size
        low, high = [], []
        for axis, most in ((0, width), (1, height)):
            side = boxes[:, axis + 2] - boxes[:, axis]
            offset = regressions[..., axis] / CODE_WEIGHTS[axis]
            growth = keras.ops.minimum(regressions[..., axis + 2] / CODE_WEIGHTS[axis + 2], MOST_LOGARITHM)
            centre = offset * side + (boxes[:, axis] + side / 2)
            half = keras.ops.exp(growth) * (side / 2)
            low.append(keras.ops.clip(centre - half, 0, most))
            high.append(keras.ops.clip(centre + half, 0, most))
        return [*low, *high]

    def _overlap(self, corners: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Whether a candidate (rows) suppresses another (columns), if it stays: (batch, candidates, candidates)."""
        ops = keras.ops
        left, top, right, bottom = corners

        def shared(low: Tensor, high: Tensor) -> Tensor:
            start = ops.maximum(low[:, :, None], low[:, None])
            return ops.maximum(ops.minimum(high[:, :, None], high[:, None]) - start, 0)

        area = (right - left) * (bottom - top)
        inside = shared(left, right) * shared(top, bottom)
        union = area[:, :, None] + area[:, None] - inside
        better = ops.convert_to_tensor(np.triu(np.ones((labels.shape[1],) * 2, bool), 1))
        same = ops.equal(labels[:, :, None], labels[:, None])
        return ops.logical_and(ops.logical_and(inside > self.iou_threshold * union, same), better)

    def _sizes(self, logits: Shape) -> tuple[Any, int, int, int]:
        """Images, candidates, detections and classes."""
        batch, boxes, classes = logits
        found = min(self.candidates, boxes * (classes - 1))
        return batch, found, min(self.max_detections, found), classes - 1

    def compute_output_spec(self, inputs: Sequence[Any]) -> dict[str, keras.KerasTensor]:
        batch, _, detections, _ = self._sizes(inputs[1].shape)
        return {
            "boxes": keras.KerasTensor((batch, detections, 4), inputs[0].dtype),
            "scores": keras.KerasTensor((batch, detections), inputs[1].dtype),
            "classes": keras.KerasTensor((batch, detections), "int32"),
        }

    def get_config(self) -> dict[str, Any]:
        names = ("score_threshold", "iou_threshold", "candidates", "max_detections")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
