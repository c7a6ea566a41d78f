"""Validation: the loss and the measure of all images, on any number of processes."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ..config import Config
from ..data.batches import Batches
from ..data.boxes import Objects
from ..data.crops import ObjectBatches
from ..parallel import engines
from ..report import average_precision, metrics
from ..report.average_precision import Detections
from ..state.run_folder import Run
from .optimizers import box_losses, loss_of


def validate(run: Run, config: Config, model: keras.Model, batches: Batches) -> dict[str, float]:
    """`val_loss` and `val_accuracy`, `val_mean_iou` of all pixels, or `val_map` and `val_map_50` of all boxes.

    Keras's own would know one process's images alone, and take means over batches.

    Raises:
        Stopped: where a signal has come.
    """
    if isinstance(batches, ObjectBatches):
        truth, detected, loss = detections(run, run.engine.predictor(model), batches)
        measures = average_precision.measure(truth, detected, batches.classes)
        return {"val_map": measures.mean, "val_map_50": measures.mean_50, "val_loss": loss + penalty_of(model)}
    loss = loss_of(config, reduction="none")
    predict = run.engine.predictor(model)
    loss_sum, counts = 0.0, np.zeros((batches.classes,) * 2 if config.task == "segmentation" else 2)
    for images, labels in batches.stream(epochs=1):
        run.stop.check()
        scores = predict(images)
        with engines.own_cpu():
            loss_sum += keras.ops.convert_to_numpy(loss(labels, scores)).sum(dtype="float64")
        if config.task == "segmentation":
            counts += metrics.pixel_matrix(labels, scores.argmax(-1), batches.classes)
        else:
            counts += (scores.argmax(1) == labels.argmax(1)).sum(), len(labels)
    loss_sum, *found = run.channel.sum([loss_sum, *counts.ravel()])
    counts = np.reshape(found, counts.shape)
    if config.task == "segmentation":
        count, measure = counts.sum(), metrics.mean_iou(counts)
    else:
        count, measure = counts[1], counts[0] / counts[1]
    return {f"val_{config.measure}": float(measure), "val_loss": float(loss_sum / count) + penalty_of(model)}


def penalty_of(model: keras.Model) -> float:
    """The part of the loss that is of the weights alone, as `fit` reports it too."""
    return sum(float(keras.ops.convert_to_numpy(part)) for part in model.losses)


def detections(
    run: Run, predict: Callable[[np.ndarray], Any], batches: ObjectBatches
) -> tuple[list[Objects], list[Detections], float]:
    """The objects of all images that can be read, what was detected, and the loss over all that was matched.

    Args:
        run: this run.
        predict: from images to what `keras_mnv2.SSDLite` gives.
        batches: ordered, which know the model.

    Raises:
        Stopped: where a signal has come.
    """
    truth: list[Objects] = []
    found: list[Detections] = []
    losses, loss_sum, count = box_losses(), 0.0, 0.0
    for images, objects in batches.stream(epochs=1):
        run.stop.check()
        outputs, targets = predict(images), batches.encode(objects)
        with engines.own_cpu():
            loss = sum(float(losses[name](targets[name], outputs[name])) for name in losses)
            parts = keras.tree.map_structure(keras.ops.convert_to_numpy, batches.suppress(outputs))
        # A batch's loss is over its number of matched boxes.
        matched = float(targets["boxes"][..., 4].sum())
        loss_sum, count = loss_sum + loss * matched, count + matched
        truth += objects
        for boxes, scores, classes in zip(parts["boxes"], parts["scores"], parts["classes"], strict=True):
            kept = classes >= 0
            found.append(Detections(boxes[kept], classes[kept], scores[kept]))
    return truth, found, loss_sum / max(1.0, count)
