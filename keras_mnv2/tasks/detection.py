"""SSDLite on MobileNetV2: boxes around objects, and their classes (paper, section 6.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import PathLike
from keras_mnv2.architecture import detection_plan, plan
from keras_mnv2.arguments import check_graph, data_format_name, dtype_policy
from keras_mnv2.build import apply_extra, apply_prediction
from keras_mnv2.checks import check_number, check_whole
from keras_mnv2.cost import MOST_PARAMETERS, check_size
from keras_mnv2.layers.detections import DefaultBoxes, Detections, JoinMaps
from keras_mnv2.model import MobileNetV2, weights_and_settings
from keras_mnv2.network import MobileNetV2Model
from keras_mnv2.rewrite import layers_of, same_input
from keras_mnv2.tasks.boxes import ASPECT_RATIOS, SCALES, boxes_per_place, check_shapes, encode, match
from keras_mnv2.weights.load import load_source
from keras_mnv2.weights.rename import detector_names
from keras_mnv2.weights.source import checkpoint_of, detector_classes_of, read_source, without
from keras_mnv2.weights.table import Checkpoint

# Of the paper's Table 6, and of COCO.
SIDE, CLASSES = 320, 80
# Of the norms behind the backbone, as in the authors' configuration and torchvision.
EXTRA_EPSILON = 1e-3


def SSDLite(
    input_shape: tuple[int, ...] | None = None,
    alpha: float | None = None,
    weights: PathLike | None = None,
    weights_backbone: PathLike | None = "imagenet",
    classes: int | None = None,
    name: str | None = None,
    *,
    scales: Sequence[float] = SCALES,
    aspect_ratios: Sequence[Sequence[float]] = ASPECT_RATIOS,
    reduce_lowest: bool = True,
    averaged: bool | None = None,
    padding: str | None = None,
    norm_momentum: float | None = None,
    norm_epsilon: float | None = None,
    include_preprocessing: bool = False,
    data_format: str | None = None,
    dtype: str | keras.DTypePolicy | None = None,
) -> keras.Model:
    """Builds an SSDLite (Sandler et al. 2018, section 6.2), an SSD (Liu et al. 2016, arXiv 1512.02325), on MobileNetV2.

    Its predictions are separable convolutions on six maps: the expansion of `block_13` (output stride 16), the head
    (32), and four extra layers. The model gives what the network says of its default boxes, for training with
    `keras_mnv2.losses` and the targets of `TargetEncoder`; `detector` makes the model that gives detections.

    Args:
        input_shape: (height, width, channels), or (channels, height, width) with `data_format="channels_first"`; sides
            of at least 32. By default (320, 320, 3).
        alpha: width multiplier of the backbone and the extra layers; 1.0 by default.
        weights: what the whole network starts with: the path of a file that this package wrote, which says `alpha` and
            `classes`, unless they are given. With another number of classes their predictions stay random, and a line
            says so. `scales`, `aspect_ratios` and `reduce_lowest` must be those that it was trained with.
        weights_backbone: without `weights`, what the backbone starts with, as `weights` of `MobileNetV2`; by default
            Keras's ImageNet checkpoint of this width. None is random weights.
        classes: without the background; by default the file's or 80 (COCO).
        name: of the model.
        scales: of the default boxes of each map and one more, as a share of the image's sides.
        aspect_ratios: of the default boxes of each map beside two squares: each gives a wide and a high one.
        reduce_lowest: whether the first map has three boxes a place, as in the authors' code: a square of half its
            scale, and the first ratio's two. With False it has six like the others, as in torchvision.
        averaged: as in `MobileNetV2`.
        padding: likewise.
        norm_momentum: likewise.
        norm_epsilon: likewise, of the backbone; the other layers have 1e-3.
        include_preprocessing: likewise.
        data_format: likewise.
        dtype: likewise; what predicts computes in float32 under mixed precision.

    Returns:
        A functional `keras.Model`, whose output is a dict: `"boxes"` (batch, boxes, 4), offsets from the default boxes,
        and `"classes"` (batch, boxes, classes + 1), logits with the background first.

    Raises:
        ValueError: on an argument out of range or one that contradicts the file, and on a file that does not fit.
        ConnectionError: where a checkpoint cannot be downloaded.

    Examples:
        >>> model = SSDLite((96, 96, 3), alpha=0.35, weights_backbone=None, classes=5)
        >>> {name: tuple(y.shape) for name, y in model(np.zeros((2, 96, 96, 3))).items()}
        {'boxes': (2, 204, 4), 'classes': (2, 204, 6)}
    """
    data_format = data_format_name(data_format)
    policy = dtype_policy(dtype)
    scales, aspect_ratios, reduce_lowest = check_shapes(scales, aspect_ratios, reduce_lowest)
    if len(aspect_ratios) != len(ASPECT_RATIOS):
        raise ValueError(f"aspect_ratios must be of {len(ASPECT_RATIOS)} maps, got {len(aspect_ratios)}.")
    counts = boxes_per_place(aspect_ratios, reduce_lowest)
    if input_shape is None:
        input_shape = (SIDE, SIDE, 3) if data_format == "channels_last" else (3, SIDE, SIDE)
    elif isinstance(input_shape, Sequence) and None in input_shape:
        raise ValueError(f"input_shape must have known sides, which the default boxes depend on, got {input_shape!r}.")
    source, width = None, 0
    if weights is not None:
        source = read_source(checkpoint_of(weights) or weights, averaged)
        width = detector_classes_of(source, counts)
        if not width:
            raise ValueError(
                f"weights must be of an SSDLite, got {str(source.path)!r}, which has no predictions of boxes; "
                "weights_backbone takes a classifier's."
            )
    elif averaged is not None and weights_backbone is None:
        raise ValueError(f"averaged must be left out where there are no weights, got {averaged!r}.")
    classes = check_whole("classes", (width or CLASSES) if classes is None else classes, most=MOST_PARAMETERS)
    start: Any = weights_backbone if source is None else without(source, detector_names(source.layout, source.arrays))
    given = {"alpha": alpha, "padding": padding, "norm_epsilon": norm_epsilon}
    # Keras's ImageNet checkpoint of 224 pixels, whatever the size.
    start, settings = weights_and_settings(start, averaged, given, (224, 224), False)
    architecture = {name: settings[name] for name in ("alpha", "depth_multiplier", "fix_stem_head")}
    rows = plan(**architecture)
    extras, predictions = detection_plan(rows, architecture["alpha"], counts, classes + 1)
    check_size([*rows, *extras, *predictions], 0)
    backbone = MobileNetV2(
        input_shape,
        include_top=False,
        weights=start.name if isinstance(start, Checkpoint) else start,
        padding=settings["padding"],
        norm_momentum=norm_momentum,
        norm_epsilon=settings["norm_epsilon"],
        include_preprocessing=include_preprocessing,
        features=(str(predictions[0].source), str(predictions[1].source)),
        data_format=data_format,
        dtype=policy,
        **architecture,
    )
    common: dict[str, Any] = {
        "padding": settings["padding"],
        "activation": keras.activations.relu6,
        "norm_layer": "batch_norm",
        "norm_momentum": backbone.get_layer("bn_Conv1").momentum,
        "norm_epsilon": EXTRA_EPSILON,
        "data_format": data_format,
        "dtype": policy,
    }
    maps = dict(backbone.output)
    x = maps[rows[-1].name]
    for row in extras:
        x = maps[row.name] = apply_extra(x, row, **common)
    found = {row.name: apply_prediction(maps[str(row.source)], row, **common) for row in predictions}
    own = {"data_format": data_format, "dtype": policy.variable_dtype}
    axes = slice(1, 3) if data_format == "channels_last" else slice(2, 4)
    boxes = [y for name, y in found.items() if name.startswith("box")]
    logits = [y for name, y in found.items() if name.startswith("class")]
    image = backbone.input
    sizes = [y.shape[axes] for y in boxes]
    outputs = {
        "boxes": DefaultBoxes(image.shape[axes], sizes, scales, aspect_ratios, reduce_lowest, name="boxes", **own)(
            boxes
        ),
        "classes": JoinMaps(classes + 1, name="classes", **own)(logits),
    }
    label = f"ssdlite_{backbone.name.split('_')[1]}_{image.shape[axes][0]}"
    model = MobileNetV2Model(image, outputs, name=name or label)
    if source is not None:
        load_source(model, source, skip_classifier=classes != width)
    return model


def detector(
    model: keras.Model,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    candidates: int = 400,
    max_detections: int = 100,
    name: str | None = None,
) -> keras.Model:
    """Gives the model whose `predict` gives detections: `model`, and what decodes its boxes and leaves the best.

    Non-maximum suppression is part of the graph, and of exported files. Both models have the same weights: what trains
    `model` trains this one.

    Args:
        model: of `SSDLite`, also after `fold_batch_norm`.
        score_threshold: what the score of a detection must be above.
        iou_threshold: intersection over union that a better box of the same class may have.
        candidates: how many of the best pairs of a box and a class of an image are looked at.
        max_detections: how many an image has at most.
        name: of the model.

    Returns:
        A functional `keras.Model` from images to a dict: `"boxes"` (batch, detections, 4), (left, top, right, bottom)
        in pixels of the image; `"scores"` (batch, detections), best first; `"classes"` (batch, detections), from 0.
        Where an image has fewer detections the last ones have the score 0 and the class -1.

    Raises:
        ValueError: where `model` is no SSDLite, or an argument is out of range.

    Examples:
        >>> model = SSDLite((96, 96, 3), alpha=0.35, weights_backbone=None, classes=5)
        >>> found = detector(model, max_detections=10).predict(np.zeros((2, 96, 96, 3)), verbose=0)
        >>> {name: y.shape for name, y in sorted(found.items())}
        {'boxes': (2, 10, 4), 'classes': (2, 10), 'scores': (2, 10)}
    """
    boxes, _ = _outputs(model)
    layer = Detections(
        **boxes.box_config,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        candidates=candidates,
        max_detections=max_detections,
        name="detections",
        dtype=boxes.dtype_policy,
    )
    image = same_input(model.inputs[0])
    found = model(image)
    return keras.Model(image, layer([found["boxes"], found["classes"]]), name=name or f"{model.name}_detector")


class TargetEncoder:
    """Makes what `SSDLite` is trained on from true boxes and classes: a label and offsets for each default box.

    A default box is to find the true box that it overlaps most, from a threshold on, and each true box is given to the
    default box that overlaps it most (Liu et al. 2016, section 2.2). The arrays have the same size for any number of
    objects. An encoder is NumPy alone: it runs in the workers of a data pipeline, and can be pickled.

    Args:
        model: of `SSDLite`.
        iou_threshold: least intersection over union of a default box with the true one that it is to find.

    Raises:
        ValueError: where `model` is no SSDLite, or the threshold is out of range.

    Examples:
        >>> model = SSDLite((96, 96, 3), alpha=0.35, weights_backbone=None, classes=5)
        >>> targets = TargetEncoder(model)([[[10, 20, 60, 70]], []], [[3], []])
        >>> targets["boxes"].shape, targets["classes"].shape, int(targets["classes"].max())
        ((2, 204, 5), (2, 204), 4)
    """

    def __init__(self, model: keras.Model, iou_threshold: float = 0.5) -> None:
        boxes, logits = _outputs(model)
        self.boxes = boxes.boxes
        self.classes = logits.values - 1
        self.iou_threshold = check_number(
            "iou_threshold", iou_threshold, "a number above 0 and at most 1", lambda value: 0 < value <= 1
        )

    def __call__(self, boxes: Sequence[Any], classes: Sequence[Any]) -> dict[str, np.ndarray]:
        """Encodes the objects of some images.

        Args:
            boxes: of each image (objects, 4), (left, top, right, bottom) in pixels of the network's image.
            classes: of each image (objects,), from 0; -1 for boxes that do not count, as in arrays that are filled up.

        Returns:
            `"boxes"` float32 (batch, boxes, 5), offsets and 1 where the box is matched, and `"classes"` int32
            (batch, boxes), 0 for background and the class plus 1 for an object; for `fit`.

        Raises:
            ValueError: on boxes without area, unknown classes, and arrays of other shapes.
        """
        if len(boxes) != len(classes):
            raise ValueError(f"boxes and classes must be of as many images, got {len(boxes)} and {len(classes)}.")
        encoded = [self._encoded(i, *pair) for i, pair in enumerate(zip(boxes, classes, strict=True))]
        offsets, labels = zip(*encoded, strict=True) if encoded else ((), ())
        shape = (len(encoded), len(self.boxes))
        return {
            "boxes": np.array(offsets, "float32").reshape(*shape, 5),
            "classes": np.array(labels, "int32").reshape(shape),
        }

    def _encoded(self, image: int, boxes: Any, classes: Any) -> tuple[np.ndarray, np.ndarray]:
        try:
            truth, numbers = np.asarray(boxes, "float64"), np.asarray(classes, "float64")
        except (ValueError, TypeError):
            truth, numbers = np.empty((0, 0)), np.empty(0)
        truth = truth.reshape(-1, 4) if not truth.size and not numbers.size and truth.ndim == 1 else truth
        if truth.shape != (len(numbers), 4) or numbers.ndim != 1:
            raise ValueError(
                f"boxes must have the shape (objects, 4) and classes (objects,), got {np.shape(boxes)} and "
                f"{np.shape(classes)} for image {image}."
            )
        truth, numbers = truth[numbers != -1], numbers[numbers != -1]
        wrong = ~(np.isfinite(truth).all(axis=1) & (truth[:, 2:] > truth[:, :2]).all(axis=1))
        if wrong.any():
            raise ValueError(
                "boxes must be (left, top, right, bottom) with a width and a height above 0, got "
                f"{truth[wrong][0].tolist()} for image {image}."
            )
        unknown = ~np.isin(numbers, np.arange(self.classes))
        if unknown.any():
            raise ValueError(
                f"classes must be whole numbers from 0 to {self.classes - 1}, or -1, got {numbers[unknown][0]:g} for "
                f"image {image}."
            )
        matched = match(truth, self.boxes, self.iou_threshold)
        is_matched = matched >= 0
        offsets = np.zeros((len(self.boxes), 5))
        offsets[is_matched, :4] = encode(truth[matched[is_matched]], self.boxes[is_matched])
        offsets[:, 4] = is_matched
        labels = np.zeros(len(self.boxes))
        labels[is_matched] = numbers[matched[is_matched]] + 1
        return offsets, labels


def _outputs(model: Any) -> tuple[DefaultBoxes, JoinMaps]:
    """The layers of an SSDLite that give its boxes and its classes."""
    check_graph("model", model)
    found = {type(layer): layer for layer in layers_of(model) if type(layer) in (DefaultBoxes, JoinMaps)}
    if len(found) != 2:
        raise ValueError(f"model must be of keras_mnv2.SSDLite, got {model.name!r}.")
    return found[DefaultBoxes], found[JoinMaps]
